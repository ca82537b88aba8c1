"""Hedra on your own machine: both of its APIs over loopback, no key, no credits, a real MP4 back.

    python sandbox.py [serve] [--port N] [--render-seconds S] [--rate N/S] [--concurrency N]
    python sandbox.py demo [--api v2|v3|both] [--out-dir DIR]
    python sandbox.py sample DIR
    python sandbox.py bench [--quick]

`serve` prints the two lines to export, then answers until Ctrl-C: the web API (v2) under
/web-app/public and the jobs API (v3) under /v3, on one port. Any key is good; one with a colon
is a v3 key. Videos come from a second port, by presigned URLs that expire and honour Range.
Assets must exist and be uploaded before a generation may name them, a generation goes through
queued, processing and finalizing, money goes down, a repeated `generation_id` gets a 409 and a
repeated `idempotency_key` its first answer. `demo` makes a clip with hedra_avatar.py from a drawn
portrait and a synthesised voice; `sample` writes those two files for you to keep. `bench` measures
the program against floors and peers, three minutes long, and prints one table.

The video is rendered with `ffmpeg` from the PATH, else with that of the package imageio-ffmpeg.

In a program the parts are: `Sandbox`, the rules and the books, which turns a `Request` into a
`Reply` and knows no sockets; and `serve`, which puts it on two ports:

    with Sandbox(render_seconds=1) as sandbox, serve(sandbox) as server:
        sandbox.faults.append(Fault("submit", "reset-after"))   # paid, but nobody hears of it
        ...                                                     # talk to server.url_v2 or url_v3
        assert len(sandbox.paid) == 1

Verbs, in `Sandbox.log` and for `Fault`: balance price create upload assets submit status list
stream result download models model. Fault kinds that replace the call: 500 502-html 503 429 408
404 302 reset; that spoil its answer: 500-after reset-after not-json cut stall; for download also
html ignore-range expired; for stream also buffer no-done.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import wave
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeAlias
from urllib.parse import parse_qsl, urlsplit

Json: TypeAlias = dict[str, Any]

PREFIX_V2, PREFIX_V3 = "/web-app/public", "/v3"
CHUNK = 1 << 20
FPS = 25
IMAGE_BYTES_MAX, AUDIO_BYTES_MAX = 10_485_760, 104_857_600
AUDIO_SECONDS = (0.5, 600.0)
UNKNOWN_SECONDS = 10.0  # what a recording counts as when it is no WAV: only WAV headers are read
RESOLUTIONS = {"540p": 540, "720p": 720, "1080p": 1080}
ASPECT_RATIOS = ["1:1", "4:3", "3:4", "16:9", "9:16", "9:21", "21:9"]
WORKSPACE = "sandbox-workspace"


# --------------------------------------------------------------------- messages
# Request, Reply, Drop, Refusal, Fault: what passes between a transport and the rules.


class Request(NamedTuple):
    """One HTTP request; header names in lower case, `body` ends at Content-Length."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: BinaryIO


class Reply(NamedTuple):
    """One HTTP answer. With `cut_after`, that many body bytes are sent, then a reset."""

    status: int
    headers: dict[str, str]
    body: bytes | Iterable[bytes]
    cut_after: int | None = None


class Drop(Exception):
    """The connection shall be reset, without an answer."""


class Refusal(Exception):
    """An error answer, before an API gives it the shape of its own error bodies."""

    def __init__(self, status: int, code: str, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.extra = status, code, message, extra


FAULTS = {
    *("500", "502-html", "503", "429", "408", "404", "302", "reset"),
    *("500-after", "reset-after", "not-json", "cut", "stall"),
    *("html", "ignore-range", "expired", "buffer", "no-done"),
}


@dataclass
class Fault:
    """Something that goes wrong for the next `times` calls of `verb`, after `skip` good ones."""

    verb: str
    kind: str
    times: int = 1
    skip: int = 0
    value: Any = None  # seconds (Retry-After, stall, buffer) or the Location of a 302

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"{self.kind!r} is no kind of fault: {' '.join(sorted(FAULTS))}")


class Call(NamedTuple):
    """A line of the log; a call that was reset has no status."""

    api: str
    verb: str
    status: int | None
    at: float


class FileSlice:
    """`length` bytes of a file from `offset`: an iterable that a server may also `sendfile`."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self.path, self.offset, self.length = path, offset, length

    def __iter__(self) -> Iterator[bytes]:
        left = self.length
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left and (chunk := file.read(min(left, 1 << 18))):
                left -= len(chunk)
                yield chunk


def json_reply(status: int, value: Any, **headers: str) -> Reply:
    """A JSON answer; header names are written with underscores."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return page(status, json.dumps(value).encode(), "application/json", named)


def page(status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> Reply:
    """An answer with a body that is all there."""
    length = {"Content-Type": kind, "Content-Length": str(len(body))}
    return Reply(status, {**length, **(headers or {})}, body)


def read_json(request: Request) -> Json:
    """The object in the body, else a Refusal."""
    try:
        value = json.loads(request.body.read(CHUNK))
    except ValueError:
        raise Refusal(422, "INVALID_ARGUMENT", "The body is no JSON", loc=["body"]) from None
    if not isinstance(value, dict):
        raise Refusal(422, "INVALID_ARGUMENT", "The body is no object", loc=["body"])
    return value


def copy_until(body: BinaryIO, held: bytes, mark: bytes, sink: Callable[[bytes], Any]) -> bytes:
    """Hand what comes before `mark` to `sink`; returns what was read beyond the mark."""
    keep = len(mark) - 1
    while (at := held.find(mark)) < 0:
        if not (chunk := body.read(CHUNK)):
            raise Refusal(400, "INVALID_ARGUMENT", "The multipart body is cut or malformed")
        cut = max(0, len(held) - keep)
        sink(held[:cut])
        held = held[cut:] + chunk
    sink(held[:at])
    return held[at + len(mark) :]


def save_upload(request: Request, out: Path) -> int:
    """Stream the multipart field `file` into `out`; returns its size."""
    boundary = request.headers.get("content-type", "").partition("boundary=")[2].strip('" ')
    mark = b"\r\n--" + boundary.encode()
    size = -1
    rest = copy_until(request.body, b"\r\n", mark, len)
    # Two bytes more than what is held, for they tell the last boundary from the others.
    while not (rest := rest + request.body.read(2)).startswith(b"--"):
        head = bytearray()
        rest = copy_until(request.body, rest, b"\r\n\r\n", head.extend)
        wanted = b'name="file"' in head
        with out.open("wb") if wanted else open(os.devnull, "wb") as file:
            rest = copy_until(request.body, rest, mark, file.write)
            size = file.tell() if wanted else size
    if size < 0:
        raise Refusal(422, "INVALID_ARGUMENT", "Field required", loc=["body", "file"])
    return size


def iso(at: float) -> str:
    """Seconds since 1970 as ISO 8601, UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def parse_time(text: str) -> float:
    """The inverse of `iso`; a time without a zone is UTC, and a blank was a plus sign."""
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        raise Refusal(422, "INVALID_ARGUMENT", f"{text!r} is no time", loc=["query"]) from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


# ------------------------------------------------------------------------ media
# sniff, wav_seconds, frame_size, render_mp4: what is in an upload, and the video made of two.


class RenderError(Exception):
    """The video could not be made; the text is one line."""


def sniff(path: Path) -> str:
    """The MIME type by the first bytes, as Hedra does it: names and headers are not trusted."""
    with path.open("rb") as file:
        head = file.read(12)
    kinds = {
        rb"\x89PNG\r\n": "image/png",
        rb"\xff\xd8\xff": "image/jpeg",
        rb"RIFF....WEBP": "image/webp",
        rb"RIFF....WAVE": "audio/wav",
        rb"ID3|\xff[\xe2-\xff]": "audio/mpeg",
        rb"....ftyp": "audio/mp4",
        rb"OggS": "audio/ogg",
        rb"fLaC": "audio/flac",
    }
    found = (kind for mark, kind in kinds.items() if re.match(mark, head, re.DOTALL))
    return next(found, "application/octet-stream")


def wav_seconds(path: Path) -> float | None:
    """The length of a WAV by its header, None for anything else."""
    with path.open("rb") as file:
        if not re.match(rb"RIFF....WAVE", file.read(12), re.DOTALL):
            return None
        rate = 0
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"data":
                there = path.stat().st_size - file.tell()
                return min(size, there) / rate if rate else None
            start = file.tell()
            if name == b"fmt ":
                rate = int.from_bytes(file.read(12)[8:], "little")
            file.seek(start + size + size % 2)
    return None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG by its header; of others the portrait size that Hedra favours."""
    with path.open("rb") as file:
        head = file.read(24)
    if head[:4] != b"\x89PNG" or len(head) < 24:
        return 540, 960
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def frame_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Width and height in pixels, even, the short side being what the resolution says."""
    short = RESOLUTIONS[resolution]
    across, down = map(int, aspect_ratio.split(":"))
    long = round(short * max(across, down) / min(across, down) / 2) * 2
    return (long, short) if across > down else (short, long)


def find_ffmpeg() -> str:
    """The path of ffmpeg: that on the PATH, else that of imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise RenderError(
            "there is no ffmpeg on the PATH: install it, or `pip install imageio-ffmpeg`"
        ) from None


def ffmpeg(*arguments: str | Path) -> None:
    """Run ffmpeg; the last line that it says is the error."""
    command = [find_ffmpeg(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise RenderError(f"ffmpeg failed: {words[-1]}")


def png(width: int, height: int, colour: int, rows: list[bytearray]) -> bytes:
    """A PNG of 8 bits a channel; `colour` is PNG's own code: 2 for RGB, 4 for grey and alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# The word SANDBOX, drawn, so that no font has to be found on the machine.
MARK = """
 ####  ###  #   # ####  ####   ###  #   #
#     #   # ##  # #   # #   # #   # #   #
#     #   # # # # #   # #   # #   #  # #
 ###  ##### #  ## #   # ####  #   #   #
    # #   # #   # #   # #   # #   #  # #
    # #   # #   # #   # #   # #   # #   #
####  #   # #   # ####  ####   ###  #   #
""".strip("\n").splitlines()


def overlay_png(width: int, height: int) -> bytes:
    """What lies over the portrait: the mark at the top right, a shade below the moving bars."""
    rows = []
    for y in range(height):
        depth = max(0.0, (y / height - 0.68) / 0.32)
        rows.append(bytearray(bytes((10, round(170 * depth**0.8))) * width))
    dot = max(2, min(width, height) // 270)
    wide, high, pad = max(map(len, MARK)) * dot, len(MARK) * dot, 4 * dot
    left, top = width - wide - 2 * pad - 4 * dot, 6 * dot
    for y in range(high + 2 * pad):
        row = rows[top + y]
        row[2 * left : 2 * (left + wide + 2 * pad)] = bytes((10, 120)) * (wide + 2 * pad)
        line = MARK[(y - pad) // dot] if pad <= y < pad + high else ""
        for at in (i for i, dotted in enumerate(line) if dotted == "#"):
            x = 2 * (left + pad + at * dot)
            row[x : x + 2 * dot] = bytes((255, 225)) * dot
    return png(width, height, 4, rows)


BARS, HALF, BAR_RATE = 27, 20, 8000

# The bars are a small grey film, enlarged to be the opacity of a mint surface over the portrait.
GRAPH = (
    "[0:v]scale={w}:{h}:force_original_aspect_ratio=increase,crop={w}:{h},setsar=1,"
    "format=yuv420p,loop=-1:1,setpts=N/({fps}*TB)[still];[still][2:v]overlay[shaded];"
    "[3:v]scale={bw}:{bh}:flags=neighbor[shape];color=c=0x9df3e2:s={bw}x{bh}:r={fps}[ink];"
    "[ink][shape]alphamerge[bars];"
    "[shaded][bars]overlay=(W-w)/2:H*0.89-h/2,format=yuv420p[video]"
)


def loudness(pcm: array[int]) -> list[float]:
    """How loud each video frame is, from 0 to 1: up at once, down softly, as a meter moves."""
    step = BAR_RATE // FPS
    peaks = [max(map(abs, pcm[at : at + step])) for at in range(0, len(pcm), step)]
    loudest, level, levels = max(peaks, default=0) or 1, 0.0, []
    for peak in peaks:
        level = max(peak / loudest, level * 0.72)
        levels.append(level)
    return levels


def bar_film(levels: list[float]) -> Iterator[bytes]:
    """Grey frames of 3 * BARS by 2 * HALF: now is in the middle, what was said runs outwards."""
    back = [abs(at - BARS // 2) for at in range(BARS)]
    for now in range(len(levels)):
        heights = [levels[now - ago] * (1 - ago / BARS) if now >= ago else 0.0 for ago in back]
        tall = [1 + round(height * (HALF - 1)) for height in heights]
        rows = [
            b"".join(b"\xf0\xf0\0" if high > row else b"\0\0\0" for high in tall)
            for row in range(HALF)
        ]
        yield b"".join(rows[::-1] + rows)


def render_mp4(image: Path, audio: Path, out: Path, width: int, height: int) -> None:
    """The portrait, cropped to `width` by `height`, with bars that move with the voice."""
    with tempfile.TemporaryDirectory() as name:
        voice, thin, overlay, film = (Path(name, part) for part in ("wav", "pcm", "png", "film"))
        # Decoded first, so that the length is known to the sample whatever the format: the
        # picture has no end of its own, and -shortest overruns by what the encoder buffers.
        ffmpeg(
            *("-i", audio, "-map", "0:a:0", "-c:a", "pcm_s16le", "-f", "wav", voice),
            *("-map", "0:a:0", "-ac", "1", "-ar", str(BAR_RATE), "-f", "s16le", thin),
        )
        overlay.write_bytes(overlay_png(width, height))
        with film.open("wb") as file:
            file.writelines(bar_film(loudness(array("h", thin.read_bytes()))))
        box = {"bw": width * 3 // 5 // 81 * 81 or 81, "bh": height // 8 // 40 * 40 or 40}
        graph = GRAPH.format(w=width, h=height, fps=FPS, **box)
        gray = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{3 * BARS}x{2 * HALF}")
        ffmpeg(
            *("-i", image, "-i", voice, "-i", overlay, *gray, "-r", str(FPS), "-i", film),
            *("-filter_complex", graph, "-map", "[video]", "-map", "1:a"),
            *("-t", f"{wav_seconds(voice) or 0:.3f}", "-r", str(FPS)),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "23"),
            *("-c:a", "aac", "-b:a", "128k", "-ar", "44100", "-movflags", "+faststart"),
            *("-map_metadata", "-1", "-fflags", "+bitexact", "-f", "mp4", out),
        )


# ----------------------------------------------------------------------- sample
# sample: a drawn friend and a synthesised hello, for people who have neither at hand.


class Oval(NamedTuple):
    """A filled superellipse: centre, radii, colour, opacity, and the rows it is kept to."""

    x: float
    y: float
    rx: float
    ry: float
    colour: int
    alpha: float = 1.0
    power: float = 2.0
    top: float = 0.0
    bottom: float = 1.0

    def reach(self, y: float) -> float:
        """Half the width at height `y`."""
        off = min(1.0, abs(y - self.y) / self.ry)
        return float(self.rx * (1 - off**self.power) ** (1 / self.power))


# The friend, back to front, on a canvas 540 wide and 960 high.
FACE = (
    Oval(110, 170, 190, 190, 0xFFFFFF, 0.10),
    Oval(470, 420, 150, 150, 0xFFFFFF, 0.08),
    Oval(270, 400, 186, 236, 0x3B2A26, power=2.3),
    Oval(270, 640, 172, 120, 0x3B2A26, power=3),
    Oval(270, 985, 262, 245, 0x2F6F73, power=2.6),
    Oval(270, 745, 92, 64, 0xD69A78),
    Oval(270, 690, 60, 96, 0xD69A78, power=4),
    Oval(270, 640, 58, 56, 0xB97C5E, 0.5, top=600),
    Oval(129, 440, 24, 40, 0xDFA383),
    Oval(411, 440, 24, 40, 0xDFA383),
    Oval(270, 435, 141, 190, 0xF0BC98, power=2.2),
    Oval(270, 296, 158, 86, 0x3B2A26, power=2.2, bottom=322),
    Oval(210, 322, 92, 34, 0x3B2A26),
    Oval(350, 318, 78, 26, 0x3B2A26),
    Oval(188, 505, 36, 24, 0xE98A76, 0.35),
    Oval(352, 505, 36, 24, 0xE98A76, 0.35),
    Oval(208, 388, 33, 7, 0x3B2A26),
    Oval(332, 388, 33, 7, 0x3B2A26),
    Oval(208, 436, 29, 21, 0xFFFFFF),
    Oval(332, 436, 29, 21, 0xFFFFFF),
    Oval(210, 437, 16, 17, 0x4A7A4B),
    Oval(330, 437, 16, 17, 0x4A7A4B),
    Oval(210, 437, 8, 9, 0x1B1A1A),
    Oval(330, 437, 8, 9, 0x1B1A1A),
    Oval(215, 430, 5, 5, 0xFFFFFF),
    Oval(335, 430, 5, 5, 0xFFFFFF),
    Oval(270, 494, 21, 13, 0xD9946F, 0.75),
    Oval(270, 484, 18, 13, 0xF0BC98),
    Oval(270, 535, 62, 46, 0xA9483F, top=535),
    Oval(270, 535, 52, 16, 0xFFFFFF, top=535),
    Oval(270, 570, 32, 11, 0xD9746A, 0.8),
)


def paint(rows: list[bytearray], oval: Oval) -> None:
    """Draw an oval with smooth edges; spans are blended by tables, a colour channel at a time."""
    width = len(rows[0]) // 3
    ink = oval.colour.to_bytes(3, "big")
    bottom = oval.bottom if oval.bottom > 1 else len(rows)
    first, last = max(oval.y - oval.ry, oval.top, 0), min(oval.y + oval.ry, bottom, len(rows))
    tables = [bytes(round(o + (c - o) * oval.alpha) for o in range(256)) for c in ink]
    for y in range(int(first), int(last)):
        inner, outer = sorted((oval.reach(y), oval.reach(y + 1)))
        left, right = max(0, math.ceil(oval.x - inner)), min(width, int(oval.x + inner))
        for channel, table in enumerate(tables):
            part = slice(3 * left + channel, max(left, right) * 3, 3)
            rows[y][part] = rows[y][part].translate(table)
        reach = range(max(0, int(oval.x - outer) - 1), min(width, int(oval.x + outer) + 2))
        for x in (*range(reach.start, left), *range(max(left, right), reach.stop)):
            # How much of the pixel is inside, between the widths at its upper and lower edge.
            away = abs(x + 0.5 - oval.x)
            cover = min(1.0, max(0.0, (outer + 0.5 - away) / (outer - inner + 1)))
            for channel in range(3):
                old = rows[y][3 * x + channel]
                rows[y][3 * x + channel] = round(old + (ink[channel] - old) * cover * oval.alpha)


def friend_png() -> bytes:
    """A friendly face before an evening sky, 540 by 960."""
    width, height = 540, 960
    sky = ((0x35, 0x4F, 0x8C), (0xF2, 0xB2, 0x8C))
    rows = []
    for y in range(height):
        colour = (round(a + (b - a) * y / height) for a, b in zip(*sky, strict=True))
        rows.append(bytearray(bytes(colour) * width))
    for oval in FACE:
        paint(rows, oval)
    return png(width, height, 2, rows)


# "Hello friend, I am talking to you": seconds, pitch, breath (0 voiced, 1 hiss), three formants.
Sound: TypeAlias = tuple[float, float, float, int, int, int]
SPEECH: tuple[Sound, ...] = (
    (0.12, 0, 0.0, 500, 1500, 2500),
    (0.07, 150, 0.8, 560, 1700, 2500),
    (0.13, 165, 0.0, 560, 1750, 2500),
    (0.09, 160, 0.0, 360, 1150, 2600),
    (0.26, 172, 0.0, 480, 900, 2400),
    (0.10, 0, 0.9, 900, 2400, 3400),
    (0.09, 150, 0.0, 380, 1250, 1700),
    (0.16, 158, 0.0, 550, 1770, 2500),
    (0.14, 138, 0.0, 300, 1400, 2400),
    (0.32, 0, 0.0, 500, 1500, 2500),
    (0.16, 150, 0.0, 740, 1150, 2500),
    (0.12, 160, 0.0, 380, 2050, 2700),
    (0.15, 168, 0.0, 680, 1600, 2450),
    (0.10, 150, 0.0, 290, 1100, 2300),
    (0.06, 0, 0.9, 1800, 3200, 3900),
    (0.18, 166, 0.0, 580, 900, 2450),
    (0.06, 0, 0.7, 1500, 2200, 2900),
    (0.14, 150, 0.0, 390, 1990, 2550),
    (0.12, 140, 0.0, 290, 1800, 2400),
    (0.05, 0, 0.9, 1800, 3300, 3900),
    (0.14, 142, 0.0, 350, 1150, 2300),
    (0.09, 146, 0.0, 290, 2150, 2800),
    (0.38, 128, 0.0, 330, 950, 2300),
    (0.40, 0, 0.0, 500, 1500, 2500),
)
RATE = 22050


def resonate(samples: list[float], tracks: list[float], width: float) -> list[float]:
    """A two-pole filter whose frequency follows `tracks`, one value for 64 samples."""
    keep = math.exp(-math.pi * width / RATE)
    near = far = 0.0
    out = []
    for at, hertz in enumerate(tracks):
        turn = 2 * keep * math.cos(2 * math.pi * hertz / RATE)
        gain = (1 - keep) * math.sqrt(
            1 - 2 * keep * math.cos(4 * math.pi * hertz / RATE) + keep * keep
        )
        for sample in samples[64 * at : 64 * at + 64]:
            near, far = gain * sample + turn * near - keep * keep * far, near
            out.append(near)
    return out


def glide(values: list[float], weight: float = 0.12) -> list[float]:
    """Follow steps softly, as a mouth does."""
    level, out = values[0], []
    for value in values:
        level += (value - level) * weight
        out.append(level)
    return out


def glottis(phase: float) -> float:
    """The flow of air over one period of the voice: opens slowly, shuts quickly."""
    if phase < 0.4:
        return 0.5 - 0.5 * math.cos(math.pi * phase / 0.4)
    return math.cos(math.pi * (phase - 0.4) / 0.32) if phase < 0.56 else 0.0


def hello_samples() -> list[float]:
    """The sentence as floats: a glottal pulse or a hiss, through three moving formants."""
    rng = random.Random(7)
    blocks = [sound for sound in SPEECH for _ in range(round(sound[0] * RATE / 64))]
    pitches = glide([block[1] or 145.0 for block in blocks])
    voiced = glide([1.0 if block[1] else 0.0 for block in blocks], 0.2)
    hiss = glide([block[2] * 0.4 for block in blocks], 0.3)
    source, phase, before = [], 0.0, 0.0
    for pitch, loud, breath in zip(pitches, voiced, hiss, strict=True):
        for _ in range(64):
            phase = (phase + pitch / RATE) % 1.0
            now = glottis(phase)
            # The lips pass on the change of the flow rather than the flow.
            source.append((now - before) * 8 * loud + rng.uniform(-1, 1) * (breath + 0.01 * loud))
            before = now
    out = [0.0] * len(source)
    for place, share, width in ((3, 1.0, 80.0), (4, 1.4, 110.0), (5, 1.2, 160.0)):
        tracks = glide([float(block[place]) for block in blocks])
        out = [a + share * b for a, b in zip(out, resonate(source, tracks, width), strict=True)]
    return out


def sample(folder: Path) -> tuple[Path, Path]:
    """Write `friend.png` and `hello.wav` into `folder`; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    image, audio = folder / "friend.png", folder / "hello.wav"
    image.write_bytes(friend_png())
    voice = hello_samples()
    scale = 20000 / max(map(abs, voice))
    pcm = array("h", (round(value * scale) for value in voice))
    if sys.byteorder == "big":
        pcm.byteswap()
    with wave.open(str(audio), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm.tobytes())
    return image, audio


# ------------------------------------------------------------------------ books
# Asset, Generation, Books: what was uploaded, ordered and paid; both APIs read and write it.


@dataclass
class Asset:
    """An upload. On v2 it is named by its id and filled later, on v3 by its handle."""

    id: str
    kind: str
    name: str
    created: float
    path: Path | None = None
    size: int = 0
    content_type: str = ""
    seconds: float = 0.0
    expires: float = math.inf


@dataclass
class Generation:
    """One video that was ordered; `take` fields first, then what became of it."""

    id: str
    api: str
    model: str
    image: str
    audio: str
    prompt: str
    resolution: str
    aspect_ratio: str
    seconds: float
    cost: float
    asset_id: str
    sources: tuple[Path, Path]
    request: Json
    created: float = 0.0  # time.monotonic()
    at: float = 0.0  # time.time()
    charged: bool = True
    refused: Json | None = None
    broken: bool = False
    rendered: bool = False
    looks: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the video."""
        return frame_size(self.resolution, self.aspect_ratio)

    @property
    def bill(self) -> float:
        """What it really cost."""
        return self.cost if self.charged else 0


def model_row(slug: str, name: str, kind: str, **more: Any) -> Json:
    """A row of v2's GET /models; what it costs is in `pricing`."""
    pricing = more.get("pricing") or {"base_cost": 10, "modifiers": {}}
    each = {"base_cost": "generation", "credits_per_second": "second"}
    key = next(key for key in each if pricing.get(key))
    price = {"credit_cost": pricing[key], "unit_scale": 1, "billing_unit": each[key]}
    row: Json = {"id": None, "slug": slug, "name": name, "type": kind, "price_details": price}
    return {**row, "description": None, "premium": False, "pricing": pricing, **more}


def slot(kind: str, role: str, **limits: int) -> Json:
    """An input of a model, and its limits."""
    return {"type": kind, "role": role, "required": True, "min_count": 1, "max_count": 1, **limits}


def avatar_row(slug: str, name: str, model_id: str, description: str) -> Json:
    """The row of a model that makes a video of a portrait and a recording."""
    low, high = (int(seconds * 1000) for seconds in AUDIO_SECONDS)
    lasts = {"min_duration_ms": low, "max_duration_ms": high}
    slots = [
        slot("image", "start_frame", max_file_size_bytes=IMAGE_BYTES_MAX),
        slot("audio", "audio_input", max_file_size_bytes=AUDIO_BYTES_MAX, **lasts),
    ]
    modifiers = {"resolution": {"540p": 0.5, "1080p": 3.0}}
    return model_row(
        *(slug, name, "video"),
        id=model_id,
        description=description,
        resolutions=list(RESOLUTIONS),
        aspect_ratios=ASPECT_RATIOS,
        durations=["auto"],
        requires_start_frame=True,
        requires_audio_input=True,
        max_duration_ms=high,
        pricing={"base_cost": 0, "credits_per_second": 6, "modifiers": modifiers},
        inputs=[{"mode": "avatar", "slots": slots}],
    )


def catalogue() -> list[Json]:
    """Six of the ninety or so rows, the avatars not first, so that nobody takes just any."""
    per_second = {"credits_per_second": 9, "modifiers": {"resolution": {"1080p": 2.0}}}
    shapes = {"resolutions": ["720p", "1080p"], "aspect_ratios": ["16:9", "9:16", "1:1"]}
    clip = {"pricing": per_second, "durations": ["5", "10"], **shapes}
    return [
        model_row("google/nano-banana", "Nano Banana", "image", aspect_ratios=["1:1", "9:16"]),
        model_row("kling/kling-video", "Kling Video", "video", requires_start_frame=True, **clip),
        avatar_row(
            *("together/hedra-avatar", "Hedra Avatar", "26f0fc66-152b-40ab-abed-76c43df99bc8"),
            "Long-form audio to video.",
        ),
        avatar_row(
            *("together/hedra-character-3", "Character 3", "d1dd37a3-e39a-4854-a298-6510289f9cf2"),
            "Audio to video, previous generation.",
        ),
        model_row("google/veo", "Veo", "video", requires_audio_input=False, **clip),
        model_row("elevenlabs/speech", "Speech", "text_to_speech", pricing={"base_cost": 5}),
    ]


# The share of the rendering time at which a state ends.
STAGES = ((0.1, "queued"), (0.9, "processing"), (1.0, "finalizing"))


@dataclass(kw_only=True, eq=False)
class Books:
    """Assets, generations and money; every public attribute may be read and set at any time."""

    render_seconds: float = 3.0
    concurrency: int | None = None  # generations that may be unfinished at once
    credits: int = 10_000
    usd: float = 100.0
    keys: set[str] | None = None  # those that are good; None: any that is not empty
    render: Callable[[Path, Path, Path, int, int], None] = render_mp4
    eager: bool = False  # render within the submit, not in a thread
    url_seconds: float = 3600.0
    handle_seconds: float = 3600.0
    folder: Path | None = None  # where files are kept; None: a folder that `close` removes
    files_url: str = "http://127.0.0.1"  # of the second port; set by whoever opens it

    # Quirks, as they are seen from outside. v2 makes an id of its own:
    ignore_reserved_id: bool = False
    repeat_is_conflict: bool = True  # else a repeated id is answered as at first, and unpaid
    hidden_seconds: float = 0.0  # so long a new generation is not found
    urlless_polls: int = 0  # v2: so many `complete` answers come without a URL
    fail_with: Json | None = None  # the v2 error in which the next generations end
    refund: bool = False  # and whether those cost nothing
    expired_outputs: bool = False  # v3
    echo_key: bool = False  # errors repeat the key
    balance_error: int | None = None  # the status that the balance gets

    catalogue: list[Json] = field(default_factory=catalogue)
    assets: dict[str, Asset] = field(default_factory=dict)  # by what a generation names them by
    generations: dict[str, Generation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.root = self.folder or Path(tempfile.mkdtemp(prefix="sandbox-"))
        self._secret = uuid.uuid4().bytes
        self._unfinished: list[Generation] = []
        self._renders: list[threading.Thread] = []
        self._stoves = threading.Semaphore(os.cpu_count() or 1)
        self._closed = False

    def close(self) -> None:
        """Let the videos that are being rendered finish, then remove what was stored."""
        self._closed = True
        for thread in self._renders:
            thread.join(timeout=10)
        if self.folder is None:
            shutil.rmtree(self.root, ignore_errors=True)

    @property
    def paid(self) -> list[Generation]:
        """All generations that were charged, oldest first."""
        with self.lock:
            return [one for one in self.generations.values() if one.charged]

    def forget_assets(self) -> None:
        """Drop every upload, as a server may after a while."""
        with self.lock:
            self.assets.clear()

    def store(self, asset: Asset, part: Path, size: int) -> None:
        """Take a file that arrived as the content of an asset."""
        path = self.root / asset.id
        part.replace(path)
        asset.seconds = wav_seconds(path) or UNKNOWN_SECONDS
        asset.path, asset.size, asset.content_type = path, size, sniff(path)

    def share(self, one: Generation) -> float:
        """How much of the rendering time has passed, from 0 to 1."""
        spent = time.monotonic() - one.created
        return min(1.0, max(0.0, spent / self.render_seconds)) if self.render_seconds > 0 else 1.0

    def state(self, one: Generation) -> str:
        """The v2 word, computed anew at each look: no timer ever fires."""
        share = self.share(one)
        if one.broken or (one.refused and share >= 1):
            return "error"
        if share < 1:
            return next(word for end, word in STAGES if share < end)
        return "complete" if one.rendered else "finalizing"

    def progress(self, one: Generation) -> float:
        """From 0 to 1; only a video that is there is all done."""
        return 1.0 if self.state(one) == "complete" else round(min(self.share(one), 0.99), 3)

    def is_over(self, one: Generation) -> bool:
        """Whether it will not change any more."""
        return self.state(one) in ("complete", "error")

    def seconds_left(self, one: Generation) -> float:
        """What the rendering will still take."""
        return (1 - self.share(one)) * self.render_seconds

    def is_hidden(self, one: Generation) -> bool:
        """Whether it is too new to be found."""
        return time.monotonic() - one.created < self.hidden_seconds

    def find(self, api: str, generation_id: str) -> Generation:
        """A generation of that API, else a 404."""
        one = self.generations.get(generation_id.lower())
        if one is None or one.api != api or self.is_hidden(one):
            raise Refusal(404, "NOT_FOUND", f"Generation {generation_id} not found")
        return one

    def listed(self, api: str) -> list[Generation]:
        """What the list of an API shows, newest first."""
        shown = (one for one in self.generations.values() if not self.is_hidden(one))
        return [one for one in shown if one.api == api][::-1]

    def order(self, one: Generation) -> None:
        """Enter a generation, unless too many are unfinished; whoever calls takes the money."""
        self._unfinished = [other for other in self._unfinished if not self.is_over(other)]
        if self.concurrency is not None and len(self._unfinished) >= self.concurrency:
            text = f"Too many generations at once: {self.concurrency} are allowed"
            raise Refusal(429, "RESOURCE_EXHAUSTED", text, retry_after=1)
        one.created, one.at = time.monotonic(), time.time()
        one.refused, one.charged = self.fail_with, not (self.fail_with and self.refund)
        self.generations[one.id] = one
        self._unfinished.append(one)

    def start(self, one: Generation) -> None:
        """Render what was ordered; not under the lock, for it takes its time."""
        if one.refused:
            return
        if self.eager:
            self._make(one)
            return
        thread = threading.Thread(target=self._make, args=(one,), daemon=True, name="render")
        with self.lock:
            self._renders = [*filter(threading.Thread.is_alive, self._renders), thread]
            thread.start()

    def _make(self, one: Generation) -> None:
        out = self.root / f"{one.asset_id}.mp4"
        with self._stoves:
            if self._closed:
                return
            try:
                self.render(*one.sources, out, *one.size)
                one.rendered = True
            except (RenderError, OSError) as error:
                one.refused = {"type": "INTERNAL", "message": str(error)}
                one.broken = True

    def presigned(self, name: str, seconds: float) -> str:
        """A URL on the files port that is good for so many seconds."""
        expires = math.ceil(time.time() + seconds)
        return f"{self.files_url}/{name}?expires={expires}&signature={self.sign(name, expires)}"

    def video_url(self, one: Generation) -> str:
        """A fresh URL of the video, another one at each call."""
        return self.presigned(f"{one.asset_id}.mp4", self.url_seconds)

    def sign(self, name: str, expires: int) -> str:
        """The signature that a URL of the files port must carry."""
        return hmac.new(self._secret, f"{name} {expires}".encode(), hashlib.sha256).hexdigest()


# ------------------------------------------------------------------------- desk
# Desk: what the web API, the jobs API and the file host have in common.

Handler: TypeAlias = Callable[[Request, str], Reply]


class Desk:
    """One of the three that answer: its routes, its keys, the shape of its errors."""

    name = ""
    prefix = ""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.routes: list[tuple[str, str, str, Handler]] = []

    def find(self, request: Request) -> tuple[str, Handler, str]:
        """The verb of a request, who handles it, and the id in its path."""
        path = request.path.removeprefix(self.prefix)
        for method, pattern, verb, handler in self.routes:
            if method == request.method and (match := re.fullmatch(pattern, path)):
                return verb, handler, "".join(match.groups())
        return "unknown", self.nowhere, ""

    def nowhere(self, request: Request, arg: str) -> NoReturn:
        """No such route."""
        raise Refusal(404, "", "Not Found")

    def key(self, request: Request) -> str:
        """The key that was sent, an empty text if none."""
        raise NotImplementedError

    def admit(self, request: Request) -> None:
        """Refuse a key that is missing, of the other API, or not known."""

    def refuse(self, refusal: Refusal) -> Reply:
        """An error in this desk's own shape."""
        raise NotImplementedError

    def is_known(self, key: str) -> bool:
        """Whether a key is good."""
        return bool(key) if self.books.keys is None else key in self.books.keys

    def check_balance(self) -> None:
        """Refuse if the balance shall not be readable."""
        if status := self.books.balance_error:
            raise Refusal(status, "INTERNAL", "The balance cannot be read now")

    def keep(self, request: Request, asset: Asset) -> None:
        """Store the multipart body of an upload; called without the lock."""
        part = self.books.root / f"{uuid.uuid4().hex}.part"
        try:
            size = save_upload(request, part)
            self.books.store(asset, part, size)
        finally:
            part.unlink(missing_ok=True)


def number(text: str, low: int, high: int) -> int:
    """A whole number out of the query, else a Refusal."""
    if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
        words = f"{text!r} is not from {low} to {high}"
        raise Refusal(422, "INVALID_ARGUMENT", words, loc=["query"])
    return int(text)


def retry_headers(refusal: Refusal) -> dict[str, str]:
    """The headers of an error: Retry-After and what the refusal brings along."""
    after = refusal.extra.get("retry_after")
    headers = dict(refusal.extra.get("headers", {}))
    return headers if after is None else {"Retry-After": str(after), **headers}


# ------------------------------------------------------------------ web API, v2
# WebApi: X-API-Key, credits, assets that are created and then filled.

ASSET_TYPES = ("text", "image", "audio", "video", "voice", "three_d", "rich_text")
UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


def invalid(loc: list[str], message: str) -> Refusal:
    """A 422 about a field of the body."""
    return Refusal(422, "INVALID_ARGUMENT", message, loc=["body", *loc])


def check_uuids(body: Json, *names: str) -> None:
    """Refuse ids that are none; a list of ids is good too."""
    for name in names:
        values = body.get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not re.fullmatch(UUID, str(value)):
                raise invalid([name], "Input should be a valid UUID")


def check_request(body: Json) -> None:
    """What the schema of POST /generations says, as far as avatars go."""
    inputs = body.get("generated_video_inputs")
    if body.get("type") != "video":
        raise invalid(["type"], "Input should be 'video': the sandbox makes nothing else")
    if not isinstance(inputs, dict):
        raise invalid(["generated_video_inputs"], "Field required")
    if not isinstance(prompt := inputs.get("text_prompt"), str) or not prompt.strip():
        raise invalid(["generated_video_inputs", "text_prompt"], "Input should not be blank")
    names = ("generation_id", "reserved_asset_id", "ai_model_id", "start_keyframe_id", "audio_id")
    check_uuids(body, *names)


def credit_cost(row: Json, resolution: str, seconds: float) -> int:
    """The formula of the document: base and seconds, times the modifiers, rounded up."""
    pricing = row["pricing"]
    flat = (pricing.get("base_cost") or 0) + (pricing.get("credits_per_second") or 0) * seconds
    factor = float(pricing["modifiers"].get("resolution", {}).get(resolution, 1.0))
    return math.ceil(flat * factor)


class WebApi(Desk):
    """v2; the handlers stand in the order of the routes."""

    name = "v2"
    prefix = PREFIX_V2

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.routes = [
            ("GET", "/billing/credits", "balance", self.balance),
            ("GET", "/models", "price", self.models),
            ("POST", "/assets", "create", self.create),
            ("POST", f"/assets/({UUID})/upload", "upload", self.upload),
            ("GET", "/assets", "assets", self.assets),
            ("POST", "/generations", "submit", self.submit),
            ("GET", f"/generations/({UUID})/status", "status", self.status),
            ("GET", "/generations", "list", self.generations),
        ]

    def key(self, request: Request) -> str:
        return request.headers.get("x-api-key", "")

    def admit(self, request: Request) -> None:
        key = self.key(request)
        if ":" in key:
            text = "This account has moved to the v3 API: use https://api.hedra.com/v3"
            raise Refusal(403, "PERMISSION_DENIED", text)
        if not self.is_known(key):
            raise Refusal(401, "", "Invalid API key" if key else "Not authenticated")

    def refuse(self, refusal: Refusal) -> Reply:
        """Four of the five shapes that are seen; the fifth, HTML, is a fault."""
        code, message = refusal.code, refusal.message
        body: Json = {"code": code, "messages": [message]}
        if refusal.status == 422:
            loc = refusal.extra.get("loc", ["body"])
            body = {"detail": [{"loc": loc, "msg": message, "type": "value_error"}]}
        elif not code:
            body = {"detail": message}
        elif refusal.status in (408, 409, 429) or refusal.status >= 500:
            body["error_code"] = code
        reply = json_reply(refusal.status, body)
        return reply._replace(headers=reply.headers | retry_headers(refusal))

    def balance(self, request: Request, arg: str) -> Reply:
        self.check_balance()
        left = self.books.credits
        used = int(sum(one.bill for one in self.books.paid if one.api == self.name))
        pool = {WORKSPACE: {"used": used, "allocated": left + used, "available": left}}
        body = {"remaining": left, "expiring": 0, "used": used, "workspace_credit_pool": pool}
        return json_reply(200, body)

    def models(self, request: Request, arg: str) -> Reply:
        kind = request.query.get("types")
        rows = [row for row in self.books.catalogue if kind in (None, row.get("type"))]
        return json_reply(200, rows)

    def create(self, request: Request, arg: str) -> Reply:
        body = read_json(request)
        name, kind = body.get("name"), body.get("type")
        if not isinstance(name, str):
            raise invalid(["name"], "Input should be a valid string")
        if kind not in ASSET_TYPES:
            raise invalid(["type"], f"Input should be one of {', '.join(ASSET_TYPES)}")
        check_uuids(body, "reserved_asset_id")
        asset = Asset(body.get("reserved_asset_id") or str(uuid.uuid4()), kind, name, time.time())
        with self.books.lock:
            self.books.assets[asset.id] = asset
        workspace = {"workspace_id": body.get("workspace_id")}
        return json_reply(200, {"id": asset.id, "name": name, "type": kind, **workspace})

    def upload(self, request: Request, arg: str) -> Reply:
        asset = self.books.assets.get(arg)
        if asset is None:
            raise Refusal(404, "NOT_FOUND", f"Asset {arg} not found")
        self.keep(request, asset)
        return json_reply(200, self._asset_row(asset))

    def _asset_row(self, asset: Asset) -> Json:
        content: Json = {"url": self.books.presigned(asset.id, self.books.url_seconds)}
        if asset.kind == "image" and asset.path:
            width, height = image_size(asset.path)
            content |= {"type": "uploaded_image", "width": width, "height": height}
        else:
            content |= {"type": "uploaded_audio", "duration_ms": round(asset.seconds * 1000)}
        row = {"id": asset.id, "type": asset.kind, "name": asset.name}
        return {**row, "created_at": iso(asset.created), "asset": content}

    def _video_row(self, one: Generation) -> Json:
        url = self.books.video_url(one)
        width, height = one.size
        inputs = one.request["generated_video_inputs"]
        content = {"type": "generated_video", "width": width, "height": height, "url": url}
        content |= {"download_url": url, "preview_url": url, "keyframe_start": None, "audio": None}
        content |= {"duration_ms": round(one.seconds * 1000), "generated_video_inputs": inputs}
        row = {"id": one.asset_id, "type": "video", "name": one.request.get("name") or one.prompt}
        return {**row, "created_at": iso(one.at), "asset": content}

    def assets(self, request: Request, arg: str) -> Reply:
        kind, ids = request.query.get("type"), request.query.get("ids")
        if kind not in ASSET_TYPES:
            raise Refusal(422, "INVALID_ARGUMENT", "Field required", loc=["query", "type"])
        with self.books.lock:
            if kind == "video":
                made = self.books.listed(self.name)
                rows = [self._video_row(one) for one in made if self.books.state(one) == "complete"]
            else:
                known = [one for one in self.books.assets.values() if one.kind == kind]
                ours = (one for one in known if one.path and one.expires == math.inf)
                rows = [self._asset_row(one) for one in ours]
        return json_reply(200, [row for row in rows if not ids or row["id"] in ids.split(",")])

    def submit(self, request: Request, arg: str) -> Reply:
        body = read_json(request)
        check_request(body)
        with self.books.lock:
            wish = str(body.get("generation_id") or "").lower()
            old = None if self.books.ignore_reserved_id else self.books.generations.get(wish)
            if old and self.books.repeat_is_conflict:
                raise Refusal(409, "ALREADY_EXISTS", f"Generation {wish} already exists")
            one = old or self._draft(body)
            if not old:
                self._pay(one)
        if not old:
            self.books.start(one)
        left = math.ceil(self.books.seconds_left(one))
        ack = {**self._progress(one), "eta_sec": left}
        return json_reply(200, {**one.request, **ack, "batch_results": [ack]})

    def _draft(self, body: Json) -> Generation:
        """The generation that a body asks for, checked against assets and model, not yet paid."""
        row = self._model(body)
        inputs = body["generated_video_inputs"]
        resolution, ratio = inputs.get("resolution") or "540p", inputs.get("aspect_ratio") or "9:16"
        if resolution not in row["resolutions"] or ratio not in row["aspect_ratios"]:
            text = f"{row['name']} does not offer {resolution} at {ratio}"
            raise Refusal(400, "INVALID_ARGUMENT", text)
        image = self._asset(body.get("start_keyframe_id"), "image")
        refs = body.get("audio_id")
        heard = [self._asset(ref, "audio") for ref in (refs if isinstance(refs, list) else [refs])]
        seconds = (inputs.get("duration_ms") or 0) / 1000 or sum(one.seconds for one in heard)
        reserved = None if self.books.ignore_reserved_id else body.get("generation_id")
        new_id = str(reserved or uuid.uuid4()).lower()
        return Generation(
            *(new_id, self.name, row["slug"], image.id, heard[0].id),
            *(inputs["text_prompt"], resolution, ratio, seconds),
            cost=credit_cost(row, resolution, seconds),
            asset_id=body.get("reserved_asset_id") or str(uuid.uuid4()),
            sources=(image.path or Path(), heard[0].path or Path()),
            request=body,
        )

    def _model(self, body: Json) -> Json:
        slug, model_id = body.get("model_slug"), body.get("ai_model_id")
        if not (wish := slug or model_id):
            raise Refusal(400, "INVALID_ARGUMENT", "One of model_slug and ai_model_id is required")
        key = "slug" if slug else "id"
        row = next((row for row in self.books.catalogue if row.get(key) == wish), None)
        if row is None:
            raise Refusal(404, "NOT_FOUND", f"Model {wish} not found")
        if not row.get("requires_audio_input"):
            raise Refusal(400, "INVALID_ARGUMENT", f"Model {wish} takes no audio")
        return row

    def _asset(self, ref: str | None, kind: str) -> Asset:
        if not ref:
            raise Refusal(400, "INVALID_ARGUMENT", f"This model needs an {kind} asset")
        asset = self.books.assets.get(ref)
        if asset is None or asset.kind != kind:
            raise Refusal(404, "NOT_FOUND", f"Asset {ref} not found")
        if asset.path is None:
            raise Refusal(400, "FAILED_PRECONDITION", f"Asset {ref} has not been uploaded yet")
        return asset

    def _pay(self, one: Generation) -> None:
        if one.cost > self.books.credits:
            text = f"Insufficient credits. Required: {one.cost}. Available: {self.books.credits}"
            raise Refusal(402, "MISSING_CREDITS", text)
        self.books.order(one)
        self.books.credits -= int(one.bill)

    def _progress(self, one: Generation) -> Json:
        state, progress = self.books.state(one), self.books.progress(one)
        row = {"id": one.id, "asset_id": one.asset_id, "status": state, "progress": progress}
        return {**row, "created_at": iso(one.at)}

    def status(self, request: Request, arg: str) -> Reply:
        with self.books.lock:
            one = self.books.find(self.name, arg)
            body = {**self._progress(one), "type": "video"}
            if body["status"] == "error":
                body["error"] = one.refused
            elif body["status"] == "complete":
                one.looks += 1
                if one.looks > self.books.urlless_polls:
                    url = self.books.video_url(one)
                    body |= {"url": url, "download_url": url}
        return json_reply(200, body)

    def generations(self, request: Request, arg: str) -> Reply:
        query = request.query
        limit = number(query.get("limit", "100"), 0, 1000)
        offset = number(query.get("offset", "0"), 0, 10**9)
        after = parse_time(query["created_after"]) if "created_after" in query else -math.inf
        before = parse_time(query["created_before"]) if "created_before" in query else math.inf
        ids = query.get("ids", "").lower().split(",")
        with self.books.lock:
            ones = [one for one in self.books.listed(self.name) if after <= one.at <= before]
            if query.get("type", "video") != "video":
                ones = []
            found = [one for one in ones if ids == [""] or one.id in ids]
            rows = [self._generation_row(one) for one in found[offset : offset + limit]]
        return json_reply(200, {"page_info": {"limit": limit, "offset": offset}, "data": rows})

    def _generation_row(self, one: Generation) -> Json:
        row = {**self._progress(one), "type": "video", "input": one.request}
        row |= {"credit_cost": int(one.bill), "asset": None}
        del row["asset_id"]  # not in the document here, so clients cannot count on it
        if row["status"] == "complete":
            row["asset"] = self._video_row(one)
        elif row["status"] == "error":
            row["error"] = one.refused
        return row


# ----------------------------------------------------------------- jobs API, v3
# JobsApi: Authorization, a wallet in dollars, file handles, strict inputs, an event stream.

WORDS_V3 = {
    "queued": "IN_QUEUE",
    "processing": "IN_PROGRESS",
    "finalizing": "IN_PROGRESS",
    "complete": "COMPLETED",
    "error": "FAILED",
}
USD_PER_SECOND = {"540p": 0.03, "720p": 0.06, "1080p": 0.12}
FUNDING_URL = "https://www.hedra.com/develop/billing?add_funds=true"
MEDIA = {"start_image": ("image/", IMAGE_BYTES_MAX), "audio": ("audio/", AUDIO_BYTES_MAX)}
INPUT_SCHEMA: Json = {
    "type": "object",
    "additionalProperties": False,
    "required": ["prompt", "aspect_ratio", "resolution", "start_image", "audio"],
    "properties": {
        "prompt": {"type": "string", "pattern": r"[^\s\x1C-\x1F]"},
        "aspect_ratio": {"type": "string", "enum": ASPECT_RATIOS},
        "resolution": {"type": "string", "enum": list(RESOLUTIONS)},
        "num_outputs": {"type": "integer", "enum": [1]},
        "duration_ms": {"type": "integer", "maximum": 600_000},
        "start_image": {"type": "object"},
        "audio": {"type": ["object", "array"]},
        "bounding_box_target": {"type": "array"},
    },
}
JSON_TYPES: dict[str, type[Any]] = {"string": str, "integer": int, "array": list}


def problem(name: str, message: str, reason: str, **more: Any) -> Json:
    """One entry of `details`."""
    return {"field": name, "message": f"{name}: {message}", "reason": reason, **more}


def value_problem(name: str, value: Any, rule: Json) -> Json | None:
    """What is wrong with one value by its rule of INPUT_SCHEMA."""
    if not isinstance(value, JSON_TYPES[rule["type"]]) or isinstance(value, bool):
        return problem(name, f"must be of type {rule['type']}", "type")
    if "enum" in rule and value not in rule["enum"]:
        allowed = [str(item) for item in rule["enum"]]
        return problem(name, f"must be one of {', '.join(allowed)}", "enum", allowed=allowed)
    if "pattern" in rule and not re.search(rule["pattern"], value):
        return problem(name, "must not be blank", "pattern")
    if "maximum" in rule and value > rule["maximum"]:
        return problem(name, f"must be at most {rule['maximum']}", "maximum")
    return None


def input_problems(data: Json, required: bool) -> list[Json]:
    """All that is wrong with an `input`, apart from what its handles lead to."""
    rules = INPUT_SCHEMA["properties"]
    strange = (name for name in data if name not in rules)
    found = [problem(f"input.{name}", "is not known", "extra") for name in strange]
    if required:
        missing = [name for name in INPUT_SCHEMA["required"] if name not in data]
        found += [problem(f"input.{name}", "is required", "required") for name in missing]
    known = ((name, data[name]) for name in rules if name in data and name not in MEDIA)
    wrong = (value_problem(f"input.{name}", value, rules[name]) for name, value in known)
    return found + [entry for entry in wrong if entry]


def raise_problems(problems: list[Json]) -> None:
    """Refuse with all of them at once, if there are any."""
    if problems:
        text = f"{len(problems)} input fields are invalid; see details."
        if len(problems) == 1:
            text = problems[0]["message"]
        extra = {"param": problems[0]["field"], "details": problems}
        raise Refusal(400, "INVALID_ARGUMENT", text, **extra)


class JobsApi(Desk):
    """v3; the handlers stand in the order of the routes."""

    name = "v3"
    prefix = PREFIX_V3

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.acks: dict[str, Json] = {}
        self.issued: set[str] = set()
        job = "/jobs/(job_[0-9a-f-]{36})"
        self.routes = [
            ("GET", "/balance", "balance", self.balance),
            ("GET", "/models", "models", self.models),
            ("GET", "/models/([^/]+)", "model", self.model),
            ("POST", "/models/([^/]+)/estimate", "price", self.estimate),
            ("POST", "/models/([^/]+)", "submit", self.submit),
            ("POST", "/files", "upload", self.upload),
            ("GET", "/jobs", "list", self.jobs),
            ("GET", job + "/status", "status", self.status),
            ("GET", job + "/stream", "stream", self.stream),
            ("GET", job, "result", self.result),
        ]

    def key(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return key.strip() if scheme.lower() in ("bearer", "key") else ""

    def admit(self, request: Request) -> None:
        key = self.key(request)
        if not key:
            raise Refusal(401, "UNAUTHORIZED", "Missing credentials: send Authorization: Bearer")
        if ":" not in key or not self.is_known(key):
            raise Refusal(401, "UNAUTHORIZED", "Invalid API key.")

    def refuse(self, refusal: Refusal) -> Reply:
        trace = uuid.uuid4().hex
        retryable = refusal.status in (408, 429) or refusal.status >= 500
        error: Json = {"code": refusal.code or "NOT_FOUND", "message": refusal.message}
        error |= {"retryable": retryable}
        names = ("retry_after", "param", "details", "billing")
        error |= {name: refusal.extra[name] for name in names if name in refusal.extra}
        status = 400 if refusal.status == 422 else refusal.status
        reply = json_reply(status, {"error": error, "trace_id": trace}, X_Trace_Id=trace)
        return reply._replace(headers=reply.headers | retry_headers(refusal))

    def balance(self, request: Request, arg: str) -> Reply:
        self.check_balance()
        left = round(self.books.usd, 4)
        return json_reply(200, {"balance": left, "spent": None, "currency": "USD"})

    def _summaries(self) -> dict[str, Json]:
        """The models that can be run here, by their public id, the last part of the slug."""
        rows = (row for row in self.books.catalogue if row.get("requires_audio_input"))
        price = f"From ${USD_PER_SECOND['540p']} a second at 540p."
        return {
            (name := row["slug"].rpartition("/")[2]): {
                "id": name,
                "modality": "video",
                "name": row["name"],
                "description": row["description"],
                "price_description": price,
            }
            for row in rows
        }

    def models(self, request: Request, arg: str) -> Reply:
        wanted = request.query.get("modality", "video") == "video"
        rows = [*self._summaries().values()] if wanted else []
        return json_reply(200, {"data": rows, "next_cursor": None})

    def _summary(self, model: str) -> Json:
        if found := self._summaries().get(model):
            return found
        if any(row["slug"].endswith("/" + model) for row in self.books.catalogue):
            raise Refusal(400, "FAILED_PRECONDITION", f"The sandbox cannot run '{model}'.")
        raise Refusal(404, "NOT_FOUND", f"Model '{model}' not found.")

    def model(self, request: Request, arg: str) -> Reply:
        schemas = {"input_schema": INPUT_SCHEMA, "output_schema": {"type": "object"}}
        return json_reply(200, {**self._summary(arg), **schemas})

    def upload(self, request: Request, arg: str) -> Reply:
        asset = Asset(uuid.uuid4().hex, "file", "file", time.time())
        self.keep(request, asset)
        asset.kind = asset.content_type.partition("/")[0]
        asset.expires = time.time() + self.books.handle_seconds
        asset.name = handle = self.books.presigned(asset.id, self.books.handle_seconds)
        with self.books.lock:
            self.books.assets[handle] = asset
            self.issued.add(handle)
        expires = iso(asset.expires)
        body = {"url": handle, "content_type": asset.content_type, "expires_at": expires}
        return json_reply(201, body)

    def _media(self, name: str, value: Any) -> tuple[list[Asset], list[Json]]:
        """The uploads that a media field refers to, and what is wrong with them."""
        found, wrong = [], []
        refs = value if isinstance(value, list) else [value]
        for at, ref in enumerate(refs):
            label = f"input.{name}[{at}]" if isinstance(value, list) else f"input.{name}"
            url = ref.get("url") if isinstance(ref, dict) else None
            asset = self.books.assets.get(str(url))
            if entry := self._handle_problem(label, name, ref, asset):
                wrong.append(entry)
            elif asset:
                found.append(asset)
        if not 1 <= len(refs) <= 4:
            wrong.append(problem(f"input.{name}", "takes 1 to 4 files", "items"))
        return found, wrong

    def _handle_problem(self, label: str, name: str, ref: Any, asset: Asset | None) -> Json | None:
        if not isinstance(ref, dict) or set(ref) != {"source", "url"} or ref["source"] != "url":
            return problem(label, 'must be {"source": "url", "url": ...}', "type")
        if asset is None and ref["url"] not in self.issued:
            return problem(label, "is not a url that POST /v3/files returned", "external_url")
        if asset is None or asset.expires <= time.time():
            text = "the url has expired. Upload the file again and submit the fresh url."
            return problem(label, text, "expired")
        kind, most = MEDIA[name]
        if not asset.content_type.startswith(kind):
            return problem(label, f"{asset.content_type} is not accepted here", "content_type")
        if asset.size > most:
            return problem(label, f"must be at most {most} bytes", "max_file_size")
        low, high = AUDIO_SECONDS
        if name == "audio" and not low <= asset.seconds <= high:
            return problem(label, f"must last from {low} to {high} seconds", "duration")
        return None

    def _checked(self, data: Any, required: bool) -> dict[str, list[Asset]]:
        """The uploads that an `input` names by field, else a Refusal with all that is wrong."""
        if not isinstance(data, dict):
            raise_problems([problem("input", "must be an object", "type")])
        problems = input_problems(data, required)
        uploads: dict[str, list[Asset]] = {name: [] for name in MEDIA}
        for name in (name for name in MEDIA if name in data):
            uploads[name], wrong = self._media(name, data[name])
            problems += wrong
        raise_problems(problems)
        return uploads

    def _draft(self, model: str, data: Any, required: bool) -> Generation:
        """The checked and priced job that an `input` asks for; an estimate needs no media."""
        summary = self._summary(model)
        uploads = self._checked(data, required)
        heard = sum(asset.seconds for asset in uploads["audio"])
        if not (seconds := data.get("duration_ms", 0) / 1000 or heard):
            raise_problems([problem("input.audio", "is required, or duration_ms", "required")])
        image, audio = (next(iter(uploads[name]), Asset("", "", "", 0.0)) for name in MEDIA)
        resolution, unique = data.get("resolution", "540p"), str(uuid.uuid4())
        return Generation(
            *("job_" + unique, self.name, summary["id"], image.name, audio.name),
            *(data.get("prompt", ""), resolution, data.get("aspect_ratio", "9:16"), seconds),
            cost=round(USD_PER_SECOND[resolution] * seconds, 4),
            asset_id="asset_" + unique,
            sources=(image.path or Path(), audio.path or Path()),
            request=data,
        )

    def estimate(self, request: Request, arg: str) -> Reply:
        body = read_json(request)
        with self.books.lock:
            one = self._draft(arg, body.get("input", {}), required=False)
        return json_reply(200, {"model": one.model, "cost": one.cost, "currency": "USD"})

    def submit(self, request: Request, arg: str) -> Reply:
        body = read_json(request)
        with self.books.lock:
            key = str(body.get("idempotency_key") or uuid.uuid4())
            if ack := self.acks.get(key):
                return json_reply(202, ack, Location=ack["result_url"])
            one = self._draft(arg, body.get("input"), required=True)
            self._pay(one)
            ack = self.acks[key] = self._ack(one)
        self.books.start(one)
        return json_reply(202, ack, Location=ack["result_url"])

    def _pay(self, one: Generation) -> None:
        left = round(self.books.usd, 4)
        if one.cost > left:
            text = f"Your API wallet balance is ${left:.2f} and this costs ${one.cost:.2f}."
            need = {"balance": left, "required": one.cost, "currency": "USD"}
            billing = {**need, "funding_url": FUNDING_URL}
            raise Refusal(402, "INSUFFICIENT_BALANCE", text, billing=billing)
        self.books.order(one)
        self.books.usd -= one.bill

    def _ack(self, one: Generation) -> Json:
        path = f"{PREFIX_V3}/jobs/{one.id}"
        row = {"job_id": one.id, "model": one.model, "status": "IN_QUEUE"}
        row |= {"status_url": path + "/status", "result_url": path}
        return {**row, "estimated_completion_at": iso(one.at + self.books.render_seconds)}

    def _status(self, one: Generation) -> Json:
        state, progress = self.books.state(one), self.books.progress(one)
        row = {"job_id": one.id, "status": WORDS_V3[state], "progress": progress}
        return {**row, "estimated_completion_at": iso(one.at + self.books.render_seconds)}

    def _events(self, one: Generation, after: int) -> list[Json]:
        """The lifecycle of a job so far, from what the clock says; ids count from 1."""
        state, share = self.books.state(one), self.books.share(one)
        parts = [(0.0, "queued"), *zip((0.1, 0.9), ("started", "finalizing"), strict=True)]
        past = [(part, event) for part, event in parts if share >= part]
        if state in ("complete", "error"):
            past.append((1.0, "completed" if state == "complete" else "failed"))
        return [
            {
                "id": at,
                "timestamp": iso(one.at + part * self.books.render_seconds),
                "level": "error" if event == "failed" else "info",
                "event": event,
                "message": f"The job is {event}.",
                "source": "worker",
                "data": {},
            }
            for at, (part, event) in enumerate(past, 1)
            if at > after
        ]

    def status(self, request: Request, arg: str) -> Reply:
        cursor = request.query.get("logs_after")
        with self.books.lock:
            one = self.books.find(self.name, arg)
            body = self._status(one)
            if cursor is not None:
                seen = 0 if cursor == "start" else number(cursor, 0, 10**6)
                body["logs"] = self._events(one, seen)
                if body["logs"]:
                    body["logs_next_cursor"] = str(body["logs"][-1]["id"])
        return json_reply(200, body)

    def stream(self, request: Request, arg: str) -> Reply:
        last = request.headers.get("last-event-id", "0")
        with self.books.lock:
            one = self.books.find(self.name, arg)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        return Reply(200, headers, self._frames(one, int(last) if last.isdigit() else 0))

    def _frames(self, one: Generation, seen: int) -> Iterator[bytes]:
        """The event stream: a snapshot, then each change; looks ten times a real second."""

        def frame(event: str, value: Json) -> bytes:
            return f"id: {seen}\nevent: {event}\ndata: {json.dumps(value)}\n\n".encode()

        status = self._status(one)
        yield frame("status", status)
        for tick in itertools.count(1):
            over = self.books.is_over(one)
            for entry in self._events(one, seen):
                seen = entry["id"]
                yield frame("log", entry)
            now = self._status(one)
            if now["status"] != status["status"] or (tick % 10 == 0 and now != status):
                status = now
                yield frame("status", status)
            if over:
                break
            if tick % 10 == 0:
                yield b": keep-alive\n\n"
            time.sleep(0.1)
        yield b"event: done\ndata: [STREAM_DONE]\n\n"

    def jobs(self, request: Request, arg: str) -> Reply:
        limit = number(request.query.get("limit", "20"), 1, 100)
        start = number(request.query.get("cursor", "0"), 0, 10**9)
        with self.books.lock:
            ones = self.books.listed(self.name)
            rows = [self._job_row(one) for one in ones[start : start + limit]]
        following = str(start + limit) if start + limit < len(ones) else None
        return json_reply(200, {"data": rows, "next_cursor": following})

    def _job_row(self, one: Generation) -> Json:
        state = WORDS_V3[self.books.state(one)]
        return {"job_id": one.id, "model": one.model, "status": state, "created_at": iso(one.at)}

    def result(self, request: Request, arg: str) -> Reply:
        with self.books.lock:
            one = self.books.find(self.name, arg)
            state = self.books.state(one)
            body: Json = {"job_id": one.id, "model": one.model, "status": WORDS_V3[state]}
            body |= {"prompt": one.prompt, "outputs": [], "error": None, "metrics": None}
            body |= {"logs": self._events(one, 0), "cost": one.bill, "currency": "USD"}
            if state == "complete":
                body["outputs"] = [self._output(one)]
                spent = round(self.books.render_seconds * 900)
                body["metrics"] = {"processing_time_ms": spent}
            elif state == "error":
                body["error"] = self._failure(one)
        return json_reply(200, body)

    def _output(self, one: Generation) -> Json:
        gone = self.books.expired_outputs
        width, height = one.size
        return {
            "status": "EXPIRED" if gone else "COMPLETED",
            "asset_id": None if gone else one.asset_id,
            "url": None if gone else self.books.video_url(one),
            "content_type": "video/mp4",
            "width": width,
            "height": height,
            "duration_ms": round(one.seconds * 1000),
            "fps": FPS,
            "error": None,
        }

    def _failure(self, one: Generation) -> Json:
        """A v2 error in the words of v3, which has no reason codes but says what may be retried."""
        error = one.refused or {}
        retryable = error.get("reason_code") == "MODERATION_OUTPUT_TRANSIENT"
        return {"code": error["type"], "message": error["message"], "retryable": retryable}


# ------------------------------------------------------------------------ files
# FileHost: presigned URLs, Range, If-Range; another host, to which no key must come.


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a Range header, None where there is none that is understood."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


class FileHost(Desk):
    """The second port."""

    name = "files"

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.routes = [("GET", "/([^/]+)", "download", self.download)]
        self.leaks: list[str] = []

    def key(self, request: Request) -> str:
        return request.headers.get("x-api-key") or request.headers.get("authorization", "")

    def admit(self, request: Request) -> None:
        if self.key(request):
            self.leaks.append(f"{request.method} {request.path}")

    def refuse(self, refusal: Refusal) -> Reply:
        text = f"<Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error>"
        headers = retry_headers(refusal)
        return page(refusal.status, text.encode(), "application/xml", headers)

    def download(self, request: Request, arg: str) -> Reply:
        expires = request.query.get("expires", "")
        good = self.books.sign(arg, int(expires)) if re.fullmatch(r"\d{1,15}", expires) else ""
        if not good or request.query.get("signature") != good:
            raise Refusal(403, "SignatureDoesNotMatch", "The signature does not match")
        if time.time() >= int(expires):
            raise Refusal(403, "AccessDenied", "Request has expired")
        path = self.books.root / arg
        if not path.is_file():
            raise Refusal(404, "NoSuchKey", "The specified key does not exist")
        return self._content(request, path)

    def _content(self, request: Request, path: Path) -> Reply:
        facts = path.stat()
        size, tag = facts.st_size, f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
        kind = "video/mp4" if path.suffix == ".mp4" else sniff(path)
        headers = {"Content-Type": kind, "ETag": tag, "Accept-Ranges": "bytes"}
        wish = byte_range(request.headers.get("range", ""), size)
        if wish is None or request.headers.get("if-range", tag) != tag:
            return Reply(200, headers | {"Content-Length": str(size)}, FileSlice(path, 0, size))
        first, last = wish
        if first >= size or last < first:
            where = {"Content-Range": f"bytes */{size}"}
            raise Refusal(416, "InvalidRange", "The range is not satisfiable", headers=where)
        length = last - first + 1
        headers |= {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(length)}
        return Reply(206, headers, FileSlice(path, first, length))


# ---------------------------------------------------------------------- sandbox
# Sandbox: faults, rate and log around the three desks.

# Faults that are an error answer in the desk's own shape, given before anything is done.
ERRORS = {
    "500": (500, "INTERNAL", "An unexpected error occurred"),
    "503": (503, "UNAVAILABLE", "Come back later"),
    "429": (429, "RESOURCE_EXHAUSTED", "Request rate limit exceeded"),
    "408": (408, "DEADLINE_EXCEEDED", "The request took too long"),
    "404": (404, "NOT_FOUND", "Not found for now"),
    "expired": (403, "AccessDenied", "Request has expired"),
}
HTML = "<html><head><title>{0}</title></head><body><h1>{0}</h1></body></html>\n"


def html(status: int, words: str, headers: dict[str, str] | None = None) -> Reply:
    """An answer that no client of an API hopes for."""
    return page(status, HTML.format(words).encode(), "text/html", headers)


def before_handling(fault: Fault, note: str) -> Reply | None:
    """The answer of a fault that replaces the call, None for one that lets it happen."""
    if fault.kind in ERRORS:
        status, code, message = ERRORS[fault.kind]
        default = 1 if status in (429, 503) else None
        after = default if fault.value is None else fault.value
        raise Refusal(status, code, message, **({} if after is None else {"retry_after": after}))
    if fault.kind == "502-html":
        return html(502, "502 Bad Gateway" + note)
    if fault.kind == "302":
        return html(302, "302 Found", {"Location": str(fault.value)})
    return None


def after_handling(fault: Fault, reply: Reply) -> Reply:
    """The answer as a fault that spoils answers leaves it."""
    body = reply.body
    if fault.kind in ("not-json", "html"):
        return html(200, "Welcome")
    if fault.kind == "cut":
        return reply._replace(cut_after=int(reply.headers.get("Content-Length", 512)) // 2)
    if isinstance(body, bytes):
        return reply
    if fault.kind == "no-done":
        return reply._replace(body=itertools.islice(body, 1))
    if fault.kind == "buffer":
        return reply._replace(body=itertools.chain(pause(fault.value), body))
    return reply


def pause(seconds: float) -> Iterator[bytes]:
    """No bytes, after a while."""
    time.sleep(seconds)
    yield from ()


@dataclass(kw_only=True, eq=False)
class Sandbox(Books):
    """Hedra: `api` answers both APIs, `files` the host of the videos."""

    rate: tuple[int, float] | None = None  # requests in seconds, for each key
    latency: float = 0.0  # seconds before each answer
    log: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._web, self._jobs, self._host = WebApi(self), JobsApi(self), FileHost(self)
        self._recent: dict[str, deque[float]] = {}

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def leaks(self) -> list[str]:
        """Requests to the files port that carried a key."""
        return self._host.leaks

    def count(self, verb: str, api: str | None = None) -> int:
        """How often a verb was called."""
        with self.lock:
            return sum(call.verb == verb and api in (None, call.api) for call in self.log)

    def api(self, request: Request) -> Reply:
        """Answer a request to the API port; may raise Drop."""
        jobs = request.path.startswith(PREFIX_V3 + "/")
        return self._answer(self._jobs if jobs else self._web, request)

    def files(self, request: Request) -> Reply:
        """Answer a request to the files port; may raise Drop."""
        return self._answer(self._host, request)

    def _answer(self, desk: Desk, request: Request) -> Reply:
        at = time.monotonic()
        if self.latency:
            time.sleep(self.latency)
        verb, handler, arg = desk.find(request)
        fault = self._next_fault(verb)
        kind = fault.kind if fault else ""
        reply = None
        if kind != "reset":
            reply = self._handle(desk, request, fault, lambda asked: handler(asked, arg))
        heard = None if kind == "reset-after" else reply
        with self.lock:
            self.log.append(Call(desk.name, verb, heard.status if heard else None, at))
        if heard is None:
            raise Drop
        if fault and kind == "stall":
            time.sleep(fault.value)
        return heard

    def _handle(
        self, desk: Desk, request: Request, fault: Fault | None, handler: Callable[[Request], Reply]
    ) -> Reply:
        note = f" (key: {desk.key(request)})" if self.echo_key else ""
        try:
            if fault and (early := before_handling(fault, note)):
                return early
            if fault and fault.kind == "ignore-range":
                request.headers.pop("range", None)
            desk.admit(request)
            self._check_rate(desk, request)
            reply = handler(request)
            if fault and fault.kind == "500-after":
                raise Refusal(*ERRORS["500"])
        except Refusal as refusal:
            refusal.message += note
            reply = desk.refuse(refusal)
        return after_handling(fault, reply) if fault else reply

    def _next_fault(self, verb: str) -> Fault | None:
        """The fault that this call meets, None if all is well."""
        with self.lock:
            for fault in self.faults:
                if fault.verb == verb and fault.skip > 0:
                    fault.skip -= 1
                elif fault.verb == verb and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _check_rate(self, desk: Desk, request: Request) -> None:
        """Refuse a request beyond the rate; the window slides."""
        if self.rate is None or desk is self._host:
            return
        most, window = self.rate
        now = time.monotonic()
        with self.lock:
            recent = self._recent.setdefault(desk.key(request), deque())
            while recent and recent[0] <= now - window:
                recent.popleft()
            if len(recent) < most:
                recent.append(now)
                return
            left = recent[0] + window - now
        after = max(1, math.ceil(left))
        headers = {"X-RateLimit-Limit": str(most), "X-RateLimit-Remaining": "0"}
        headers["X-RateLimit-Reset"] = str(math.ceil(time.time() + left))
        text = f"Request rate limit exceeded: {most} requests per {window:g}s."
        raise Refusal(429, "RESOURCE_EXHAUSTED", text, retry_after=after, headers=headers)


# --------------------------------------------------------------------- loopback
# serve: the rules on two ports of 127.0.0.1, one thread for each connection.


class Body:
    """The body of a request: a stream that ends where Content-Length says."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self.stream, self.left = stream, length

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(self.left if size < 0 else min(size, self.left))
        # A client that went away sends nothing more, whatever it promised.
        self.left = self.left - len(data) if data else 0
        return data


class Connection(BaseHTTPRequestHandler):
    """Turns HTTP into a Request, and a Reply into HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Port

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        if not length.isdigit() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._send(html(411, "411 Length Required"))
            return
        body = Body(self.rfile, int(length))  # type: ignore[arg-type]
        try:
            self._send(self.server.answer(self._request(body)))
        except Drop:
            self._reset()
        # Left unread it would be taken for the next request, or reset the answer on its way.
        while body.read(CHUNK):
            pass

    do_POST = do_GET

    def _request(self, body: Body) -> Request:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return Request(self.command, parts.path, query, headers, body)  # type: ignore[arg-type]

    def _send(self, reply: Reply) -> None:
        sized = "Content-Length" in reply.headers
        framing = {} if sized else {"Transfer-Encoding": "chunked"}
        lines = [f"{name}: {value}" for name, value in (reply.headers | framing).items()]
        reason = HTTPStatus(reply.status).phrase
        text = "\r\n".join([f"HTTP/1.1 {reply.status} {reason}", *lines, "", ""])
        head, most = text.encode("latin-1"), reply.cut_after
        if isinstance(reply.body, bytes):
            self.wfile.write(head + reply.body[:most])
        elif isinstance(reply.body, FileSlice):
            self.wfile.write(head)
            self._send_file(reply.body, reply.body.length if most is None else most)
        else:
            self.wfile.write(head)
            self._send_chunks(reply.body, math.inf if most is None else most)
        if most is not None:
            time.sleep(0.05)  # a reset overtakes bytes that are still on their way
            raise Drop

    def _send_file(self, part: FileSlice, length: int) -> None:
        if length:
            with part.path.open("rb") as file:
                self.connection.sendfile(file, part.offset, length)

    def _send_chunks(self, chunks: Iterable[bytes], most: float) -> None:
        for chunk in chunks:
            part = chunk[: min(len(chunk), int(min(most, 1 << 40)))]
            most -= len(part)
            if part:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if most <= 0:
                return
        self.wfile.write(b"0\r\n\r\n")

    def _reset(self) -> None:
        """Close with RST: what is said so far may arrive, that it was all may not."""
        self.close_connection = True
        self.server.resets.add(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        """Quiet."""


class Port(socketserver.ThreadingTCPServer):
    """A listening port; knows its connections, so that it can count and close them."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, answer: Callable[[Request], Reply]) -> None:
        self.answer = answer
        self.accepted, self.peak = 0, 0
        self.open: set[Any] = set()
        self.resets: set[Any] = set()
        try:
            super().__init__(("127.0.0.1", port), Connection)
        except OSError as error:
            raise OSError(f"port {port}: {error.strerror}; choose another") from None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        self.accepted += 1
        self.peak = max(self.peak, len(self.open))
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        if request in self.resets:
            # Not the polite shutdown, which would send FIN before the RST.
            self.resets.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away as they like; anything else is a bug and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):  # it may be closing by itself
                connection.shutdown(socket.SHUT_RDWR)


class Server:
    """The two ports of a sandbox; closing it leaves the sandbox itself open."""

    def __init__(self, sandbox: Sandbox, port: int, files_port: int) -> None:
        self._api = Port(port, sandbox.api)
        try:
            self._files = Port(files_port, sandbox.files)
        except OSError:
            self._api.close()
            raise
        sandbox.files_url = self._files.url
        self.url_v2 = self._api.url + PREFIX_V2
        self.url_v3 = self._api.url + PREFIX_V3

    @property
    def connections(self) -> int:
        """How many connections the API port has accepted."""
        return self._api.accepted

    @property
    def peak_connections(self) -> int:
        """How many of them were open at once, at most."""
        return self._api.peak

    def close(self) -> None:
        self._api.close()
        self._files.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(sandbox: Sandbox, port: int = 0, files_port: int = 0) -> Server:
    """Open the two ports on 127.0.0.1 and answer in the background; 0 is any free port."""
    return Server(sandbox, port, files_port)


# ------------------------------------------------------------------------ bench
# bench: what hedra_avatar.py costs beyond what Hedra itself needs, beside its floors.

MODULE = Path(__file__).resolve().with_name("hedra_avatar.py")
MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")
MISSING = "n/a"


class BenchError(Exception):
    """A part of the bench did not run; the text is one line."""


class Score(NamedTuple):
    """A row of the table; `asked` is what the ratio shall not exceed."""

    what: str
    ours: str
    peer: str = ""
    ratio: float | None = None
    asked: float | None = None

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        missed = self.asked is not None and self.ratio is not None and self.ratio > self.asked
        asked = "" if self.asked is None else f"{self.asked:g}" + (" missed" if missed else "")
        return [self.what, self.ours, self.peer, ratio, asked]


def amount(value: float, unit: str) -> str:
    """A measured value, to three digits; seconds below one are milliseconds."""
    if unit == "s" and value < 1:
        value, unit = value * 1000, "ms"
    return (f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}").rstrip()


def score(
    what: str, ours: float, unit: str, peer: float, of: str, asked: float | None = None
) -> Score:
    """A row of two numbers in one unit."""
    return Score(what, amount(ours, unit), f"{amount(peer, unit)} {of}", ours / peer, asked)


def table(scores: list[Score]) -> str:
    """The rows as Markdown."""
    heads = ["what", "ours", "floor or peer", "ratio", "asked"]
    rows = [heads, *(one.cells() for one in scores)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in wide])
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) for row in rows
    )
    return "\n".join(f"| {line} |" for line in lines)


class Facts(NamedTuple):
    """What the server saw: calls by verb, connections to the API in all and at once, and of each
    generation when it was ordered and when it ended (time.time())."""

    calls: dict[str, int]
    opened: int
    peak: int
    spans: dict[str, tuple[float, float]]


class Vague(Sandbox):
    """A sandbox whose generations are up to `jitter` seconds faster than others, and whose guess
    of when one of v2 ends is off by up to the share `error`."""

    def __init__(self, jitter: float = 0.0, error: float = 0.0, **rules: Any) -> None:
        super().__init__(**rules)
        self.jitter, self.error, self.ordered = jitter, error, dict[str, float]()

    def order(self, one: Generation) -> None:
        super().order(one)
        self.ordered[one.id] = one.at
        head_start = random.uniform(0, self.jitter)
        one.created, one.at = one.created - head_start, one.at - head_start

    def seconds_left(self, one: Generation) -> float:
        guess = super().seconds_left(one) * random.uniform(1 - self.error, 1 + self.error)
        return guess - 0.5  # the API rounds up, by half a second, which is much at our scale

    def store(self, asset: Asset, part: Path, size: int) -> None:
        super().store(asset, part, size)
        if asset.path and size > MIB:
            os.truncate(asset.path, 0)  # or fresh pages would be what is measured

    def facts(self, server: Server) -> Facts:
        """What the bench wants to know."""
        with self.lock:
            calls = Counter(call.verb for call in self.log)
            spans = {
                one.id: (self.ordered[one.id], one.at + self.render_seconds)
                for one in self.generations.values()
            }
        return Facts(dict(calls), server.connections, server.peak_connections, spans)


def host(pipe: Any, size: int, rules: Json) -> None:
    """The body of a Host's process: answers until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 10_240), most))  # a socket a clip
    sandbox = Vague(eager=True, credits=10**9, usd=1e9, **rules)
    # All videos are this one file, in memory already: whoever reads one first would pay for that.
    video = sandbox.root / "video"
    video.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(size - 12))
    sandbox.render = lambda image, audio, out, width, height: out.hardlink_to(video)
    with sandbox, serve(sandbox) as server:
        pipe.send({"v2": server.url_v2, "v3": server.url_v3})
        with contextlib.suppress(EOFError):
            while pipe.recv():
                pipe.send(sandbox.facts(server))


class Host:
    """A sandbox in a process of its own, so that time and memory of a client are its own."""

    def __init__(self, size: int = 50_000, **rules: Any) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=host, args=(theirs, size, rules), daemon=True)
        self.process.start()
        theirs.close()
        self.urls: dict[str, str] = self.pipe.recv()

    def facts(self) -> Facts:
        """What it has seen so far."""
        self.pipe.send("facts")
        facts: Facts = self.pipe.recv()
        return facts

    def environ(self, api: str, cache: Path) -> dict[str, str]:
        """The environment of a client."""
        blank = dict.fromkeys(("HEDRA_MODEL_ID", "HEDRA_WORKSPACE_ID", "FRIEND_IMG"), "")
        mine = {"HEDRA_BASE_URL": self.urls[api], "HEDRA_API_KEY": KEYS[api]}
        # Byte-compiled modules are kept, as they are unless somebody forbids it.
        blank["PYTHONDONTWRITEBYTECODE"] = ""
        more = {"HEDRA_CACHE_DIR": str(cache), "PYTHONPATH": str(MODULE.parent)}
        return {**os.environ, **blank, **mine, **more}

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(10)


class Usage(NamedTuple):
    """What a process has cost: seconds of wall and CPU, peak memory in MiB; and what it said."""

    wall: float
    cpu: float
    peak: float
    text: str = ""


def peak_mib(used: resource.struct_rusage) -> float:
    """The most memory that was resident: in KiB on Linux, in bytes on macOS."""
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


class Client:
    """A process that is measured. Its peak counts from that of this process, which is small."""

    def __init__(self, command: list[Any], environ: dict[str, str], folder: Path) -> None:
        self.started = time.perf_counter()
        self.name = " ".join(map(str, command[1:4]))
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 [closed by end]
        null = subprocess.DEVNULL
        words = list(map(str, command))
        self.process = subprocess.Popen(
            words, env=environ, cwd=folder, stdin=null, stdout=self.said, stderr=null
        )

    def end(self, kill: bool = False) -> Usage:
        """Wait for it, or kill it; raises BenchError if it failed."""
        if kill:
            self.process.kill()
        try:
            _, status, used = os.wait4(self.process.pid, 0)
        except (KeyboardInterrupt, Terminated):
            self.process.kill()
            raise
        wall = time.perf_counter() - self.started
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode and not kill:
            raise BenchError(f"{self.name} ended with {self.process.returncode}")
        with self.said:
            self.said.seek(0)
            text = self.said.read().decode()
        return Usage(wall, used.ru_utime + used.ru_stime, peak_mib(used), text)

    def cpu(self) -> float | None:
        """Seconds of CPU so far; None where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except FileNotFoundError:
            return None
        ticks = stat.rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def hedra(*words: object) -> list[object]:
    """The command line of the program, byte-compiled."""
    return [sys.executable, "-m", "hedra_avatar", *words]


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def medians(runs: Mapping[str, Callable[[], float]], times: int) -> dict[str, float]:
    """The median of each, taken in turns, so that a busy moment hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of a call in a process of its own, which keeps this one small."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def write_portrait(path: Path) -> Path:
    """A portrait like no other: what follows the end of a PNG is not looked at."""
    rows = [bytearray(6), bytearray(6)]
    path.write_bytes(png(2, 2, 2, rows) + uuid.uuid4().bytes)
    return path


def write_voice(path: Path, size: int = 20_000) -> Path:
    """A recording of nearly `size` bytes like no other."""
    rate = 8000 if size < MIB else 48_000
    with path.open("wb") as file, wave.open(file, "wb") as sound:
        sound.setparams((2, 2, rate, 0, "NONE", ""))
        sound.writeframes(uuid.uuid4().bytes)
        for at in range(60, size - 3, MIB):
            sound.writeframesraw(bytes(min(MIB, (size - at) // 4 * 4)))
    return path


def bench_start(folder: Path, quick: bool) -> list[Score]:
    """A start against the least that a script of this size can do."""
    image, audio = write_portrait(folder / "s.png"), write_voice(folder / "s.wav")
    compiling = f"compile(open({str(MODULE)!r}, 'rb').read(), 'hedra_avatar.py', 'exec')"
    floor = [sys.executable, "-c", f"import argparse, json, pathlib, re; {compiling}"]
    done = ["run", "--wav", audio, "--img", image, "--out", folder / "s.mp4"]
    words: dict[str, list[Any]] = {name: [name] for name in ("--help", "--version")}
    words["run, finished clip"] = done
    commands: dict[str, list[Any]] = {"floor": floor}
    for name, more in words.items():
        commands |= {name: [sys.executable, MODULE, *more], f"{name}, -m": hedra(*more)}
    with Host(render_seconds=0) as server:
        environ = server.environ("v2", folder / "start")
        Client(hedra(*done), environ, folder).end()

        def run(command: list[Any]) -> float:
            return Client(command, environ, folder).end().wall

        calls = {name: partial(run, command) for name, command in commands.items()}
        took = medians(calls, 5 if quick else 15)
    asked = {"--help": 1.3, "--version": 1.3, "run, finished clip": 1.6}
    floor_s = took.pop("floor")
    return [
        score(f"start: {name}", value, "s", floor_s, "bare start", asked.get(name))
        for name, value in took.items()
    ]


def ask(line: HTTPConnection, method: str, path: str, value: Any = None, **headers: str) -> bytes:
    """One request on a kept-alive connection: bytes go as they are, anything else as JSON."""
    body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
    named = {"X-API-Key": KEYS["v2"], "Content-Type": "application/json", **headers}
    line.request(method, path, body, named)
    response = line.getresponse()
    data = response.read()
    if response.status != 200:
        raise BenchError(f"{method} {path} was answered {response.status}")
    return data


def give(base: str, file: Path, kind: str) -> tuple[HTTPConnection, str]:
    """Create and upload an asset: two round trips."""
    parts = urlsplit(base)
    line = HTTPConnection(parts.hostname or "", parts.port)
    named = {"name": file.name, "type": kind}
    asset = json.loads(ask(line, "POST", f"{PREFIX_V2}/assets", named))["id"]
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    kinds = {"Content-Type": "multipart/form-data; boundary=b"}
    body = head + file.read_bytes() + b"\r\n--b--\r\n"
    ask(line, "POST", f"{PREFIX_V2}/assets/{asset}/upload", body, **kinds)
    return line, asset


def order_of(image: str, audio: str) -> Json:
    """The body of a v2 submit."""
    inputs = {"text_prompt": "A person talks.", "resolution": "540p", "aspect_ratio": "9:16"}
    return {
        "type": "video",
        "start_keyframe_id": image,
        "audio_id": audio,
        "model_slug": "together/hedra-character-3",
        "generated_video_inputs": inputs,
    }


def chain(base: str, image: Path, audio: Path, out: Path) -> None:
    """The round trips of a v2 clip that nobody can avoid, and nothing else."""
    with ThreadPoolExecutor(2) as pool:
        pictured, voiced = pool.map(give, (base, base), (image, audio), ("image", "audio"))
    line = pictured[0]
    order = order_of(pictured[1], voiced[1])
    made = json.loads(ask(line, "POST", f"{PREFIX_V2}/generations", order))["id"]
    url = json.loads(ask(line, "GET", f"{PREFIX_V2}/generations/{made}/status"))["url"]
    parts = urlsplit(url)
    files = HTTPConnection(parts.hostname or "", parts.port)
    files.request("GET", f"{parts.path}?{parts.query}")
    out.write_bytes(files.getresponse().read())
    for one in (line, voiced[0], files):
        one.close()


def peer_clip(base: str, image: Path, audio: Path, out: Path, interval: float) -> None:
    """The simplest honest script that a user would write: one thing after the other, with
    `requests`, files read whole."""
    requests = importlib.import_module("requests")
    key = {"X-API-Key": KEYS["v2"]}
    assets = []
    for file, kind in ((image, "image"), (audio, "audio")):
        named = {"name": file.name, "type": kind}
        reply = requests.post(f"{base}/assets", json=named, headers=key, timeout=60)
        reply.raise_for_status()
        assets.append(reply.json()["id"])
        files = {"file": (file.name, file.read_bytes())}
        address = f"{base}/assets/{assets[-1]}/upload"
        requests.post(address, files=files, headers=key, timeout=300).raise_for_status()
    order = order_of(*assets)
    reply = requests.post(f"{base}/generations", json=order, headers=key, timeout=60)
    reply.raise_for_status()
    address = f"{base}/generations/{reply.json()['id']}/status"
    while True:
        row = requests.get(address, headers=key, timeout=60).json()
        if row["status"] in ("complete", "error"):
            break
        time.sleep(interval)
    out.write_bytes(requests.get(row["url"], timeout=300).content)


def race(environ: dict[str, str], folder: Path, times: int, interval: float, rival: str) -> Json:
    """Clips by us and by a rival in turns, the program being loaded; seconds of each."""
    client = importlib.import_module("hedra_avatar")
    importlib.import_module("urllib3" if rival == "chain" else "requests")
    base, out = environ["HEDRA_BASE_URL"], folder / f"{rival}.mp4"
    os.environ.update(environ)
    rivals: dict[str, Callable[[Path, Path], None]] = {
        "chain": lambda image, audio: chain(base, image, audio, out),
        "peer": lambda image, audio: peer_clip(base, image, audio, out, interval),
    }

    def ours(image: Path, audio: Path) -> None:
        words = ["--wav", audio, "--img", image, "--out", f"{out}.ours.mp4", "-q"]
        words += ["--poll-interval", interval]
        with contextlib.redirect_stdout(io.StringIO()):
            if client.main(["run", *map(str, words)]):
                raise BenchError("hedra_avatar run has failed")

    def run(make: Callable[[Path, Path], None]) -> float:
        files = write_portrait(folder / "race.png"), write_voice(folder / "race.wav")
        return seconds_of(lambda: make(*files))

    return medians({"ours": partial(run, ours), rival: partial(run, rivals[rival])}, times)


def bench_warm(folder: Path, quick: bool) -> list[Score]:
    """One clip where every answer takes 50 ms, the model being known."""
    with Host(render_seconds=0, latency=0.05) as server:
        environ = server.environ("v2", folder / "warm")

        def whole() -> float:
            image, audio = write_portrait(folder / "w.png"), write_voice(folder / "w.wav")
            words = ("run", "--wav", audio, "--img", image, "--out", folder / "w.mp4")
            return Client(hedra(*words), environ, folder).end().wall

        whole()  # from now on the model is known
        took = in_process(race, environ, folder, 3 if quick else 9, 5.0, "chain")
        before = server.facts().calls
        times = 3 if quick else 5
        bare = [sys.executable, "-c", "pass"]
        alone = medians(
            {"ours": whole, "bare": lambda: Client(bare, environ, folder).end().wall}, times
        )
        after = server.facts().calls
    counts = {verb: (after[verb] - before.get(verb, 0)) / times for verb in after}
    besides = sum(counts.values()) - counts["status"] - counts["download"]
    named = ", ".join(f"{verb} {count:g}" for verb, count in counts.items() if count)
    floor = took["chain"] + alone["bare"]
    return [
        score("one warm clip, 50 ms a request", took["ours"], "s", took["chain"], "chain", 1.25),
        score("  as a process, start included", alone["ours"], "s", floor, "chain + bare python"),
        Score(f"  requests: {named}", f"{besides:g}", "6 besides status, download", besides / 6, 1),
    ]


TRANSFER = """
import json, sys, time
from pathlib import Path
import hedra_avatar as hedra
audio, image, out, key = *map(Path, sys.argv[1:4]), sys.argv[4]
other = hedra.upload(image, "image", key)
marks = [time.perf_counter()]
ref = hedra.upload(audio, "audio", key)
marks.append(time.perf_counter())
made = hedra.start_generation(other, ref, "A person talks.", key)
marks.append(time.perf_counter())
video = hedra.wait_and_download(made, out, key, name="ours")
marks.append(time.perf_counter())
video.unlink()
print(json.dumps([marks[1] - marks[0], marks[3] - marks[2], made]))
"""


class Transfers:
    """A recording up and a video down, by the library and by curl."""

    def __init__(self, server: Host, folder: Path, size: int) -> None:
        self.folder, self.base = folder, server.urls["v2"]
        self.environ = server.environ("v2", folder / "big")
        self.image = write_portrait(folder / "b.png")
        self.audio = write_voice(folder / f"b{size}.wav", size)
        self.took: dict[str, list[float]] = {name: [] for name in ("up", "down", "curl up")}
        self.took["curl down"] = []
        self.peak = 0.0

    def ours(self) -> str:
        """Both ways; the id of the generation."""
        words = [self.audio, self.image, self.folder, KEYS["v2"]]
        used = Client(
            [sys.executable, "-c", TRANSFER, *words], self.environ, self.folder
        ).end()
        up, down, made = json.loads(used.text)
        self.took["up"].append(up)
        self.took["down"].append(down)
        self.peak = max(self.peak, used.peak)
        return str(made)

    def curl(self, made: str) -> None:
        """The same two."""
        parts = urlsplit(self.base)
        line = HTTPConnection(parts.hostname or "", parts.port)
        named = {"name": "b", "type": "audio"}
        asset = json.loads(ask(line, "POST", f"{PREFIX_V2}/assets", named))["id"]
        url = json.loads(ask(line, "GET", f"{PREFIX_V2}/generations/{made}/status"))["url"]
        line.close()
        up = f"{self.base}/assets/{asset}/upload"
        out, key = self.folder / "curl.mp4", f"X-API-Key: {KEYS['v2']}"
        files = ["-o", os.devnull, "-H", key, "-F", f"file=@{self.audio}", up]
        for name, words in {"curl up": files, "curl down": ["-o", out, url]}.items():
            command = ["curl", "-sSf", *words]
            self.took[name].append(Client(command, self.environ, self.folder).end().wall)
        out.unlink()


def bench_files(folder: Path, quick: bool) -> tuple[list[Score], list[str]]:
    """Big files against curl; memory must not know their size."""
    up, down = 100 * MIB, 200_000_000
    with Host(down, render_seconds=0) as server:
        small, big = Transfers(server, folder, MIB), Transfers(server, folder, up)
        small.ours()
        for _ in range(1 if quick else 5):
            made = big.ours()
            if shutil.which("curl"):
                big.curl(made)
    took = {name: statistics.median(values) if values else 0 for name, values in big.took.items()}
    rows = [Score("100 MiB up, 200 MB down", MISSING, "curl is not installed")]
    if took["curl up"]:
        both, peer = took["up"] + took["down"], took["curl up"] + took["curl down"]
        rows = [
            score("100 MiB up", took["up"], "s", took["curl up"], "curl"),
            score("200 MB down, by us with a sync", took["down"], "s", took["curl down"], "curl"),
            score("both", both, "s", peer, "curl", 1.25),
        ]
    rows.append(score("  peak memory", big.peak, "MiB", 56, "bound", 1))
    text = f"memory by bytes: {small.peak:.0f} MiB with 1 MiB up, {big.peak:.0f} MiB with 100 MiB"
    return [*rows, hash_score(big.audio)], [text]


def hash_times(file: Path) -> Json:
    """Seconds to hash a file, by us and by what the standard library has."""
    client = importlib.import_module("hedra_avatar")

    def by(name: str) -> float:
        with file.open("rb") as stream:
            return seconds_of(lambda: hashlib.file_digest(stream, name))

    names = ("blake2b", "blake2s", "md5", "sha1", "sha256", "sha512", "sha3_256")
    ours = partial(seconds_of, partial(client.content_digest, file))
    return medians({"ours": ours, **{name: partial(by, name) for name in names}}, 3)


def hash_score(file: Path) -> Score:
    """The one pass over a recording against the fastest hash that there is."""
    took = in_process(hash_times, file)
    ours = took.pop("ours")
    best = min(took, key=lambda name: took[name])
    size = file.stat().st_size / 1e9
    speeds = " ".join(f"{name} {size / seconds:.1f}" for name, seconds in took.items())
    return score(f"hash of 100 MiB (GB/s: {speeds})", ours, "s", took[best], best)


def make_folder(folder: Path, clips: int) -> Path:
    """A folder of so many recordings."""
    folder.mkdir()
    for number in range(clips):
        write_voice(folder / f"clip-{number:04}.wav")
    return folder


def batch(server: Host, api: str, folder: Path, *words: object) -> Client:
    """Start a batch over a folder, with a cache and an output of its own."""
    image, name = write_portrait(folder.with_suffix(".png")), f"{folder.name}-{api}"
    out, environ = folder.with_name(f"{name}-out"), server.environ(api, folder.with_name(name))
    command = hedra("batch", folder, "--img", image, "--out-dir", out, "--json", *words)
    return Client(command, environ, folder.parent)


def bench_many(folder: Path, api: str) -> tuple[list[Score], float]:
    """200 clips of which Hedra renders 50 at once, in 2 s each; also the CPU ms a clip."""
    clips, jobs, render = 200, 50, 2.0
    recordings = make_folder(folder / f"many-{api}", clips)
    with Host(render_seconds=render) as server:
        used = batch(server, api, recordings, "--jobs", jobs).end()
        facts = server.facts()
    bound, each = clips / jobs * render, used.cpu / clips * 1000
    return [
        score(f"{clips} clips, {jobs} jobs, {api}", used.wall, "s", bound, "bound", 1.3),
        score("  CPU a clip", each, "ms", 20, "bound", 1),
        score(f"  connections at once (in all: {facts.opened})", facts.peak, "", jobs, "jobs", 1),
    ], used.peak


def wait_for(server: Host, verb: str, count: int) -> None:
    """Until a verb was called so often; raises BenchError after two minutes."""
    for _ in range(240):
        if server.facts().calls.get(verb, 0) >= count:
            return
        time.sleep(0.5)
    raise BenchError(f"{verb} was called {server.facts().calls.get(verb, 0)} times, not {count}")


def bench_waiting(folder: Path, api: str, quick: bool) -> tuple[list[Score], float]:
    """Clips that all wait: their memory, and the CPU of ten seconds in which nothing ends."""
    clips = 200 if quick else 1000
    recordings = make_folder(folder / f"wait-{api}", clips)
    with Host(render_seconds=600) as server:
        client = batch(server, api, recordings, "--jobs", clips, "--timeout", 900)
        try:
            wait_for(server, "submit", clips)
            time.sleep(2)
            before, started = client.cpu(), time.monotonic()
            time.sleep(10)
            after, seconds = client.cpu(), time.monotonic() - started
        finally:
            used = client.end(kill=True)
    share = f"{100 * (after - before) / seconds:.1f} %" if after and before else MISSING
    return [
        score(f"{clips} clips waiting, {api}: memory", used.peak, "MiB", 200, "bound", 1),
        Score("  share of a CPU while they wait", share),
    ], used.peak


def bench_growth(folder: Path, quick: bool) -> str:
    """CPU a clip by the number of clips."""
    costs = {}
    for clips in (20, 50) if quick else (50, 200, 800):
        recordings = make_folder(folder / f"grow-{clips}", clips)
        with Host(render_seconds=0) as server:
            used = batch(server, "v2", recordings, "--jobs", 50).end()
        costs[clips] = f"{used.cpu / clips * 1000:.1f} ms at {clips}"
    return f"CPU a clip by clips (v2, 50 jobs, start included): {', '.join(costs.values())}"


RENDER, INTERVAL = 6.6, 1.0  # a fifth of half a minute, and of the interval of 5 s


def lateness(text: str, facts: Facts) -> list[float]:
    """Of the clips in --json lines: seconds from a generation's end to its file, ascending."""
    rows = [json.loads(line) for line in text.splitlines()]
    return sorted(
        # The rename is the last thing that is done to a video, and what changes its ctime.
        max(0.0, Path(row["path"]).stat().st_ctime - facts.spans[row["generation_id"].lower()][1])
        for row in rows
    )


def bench_detection(folder: Path, api: str, quick: bool) -> list[Score]:
    """From the end of a generation to the file on disk, and the polls spent on it."""
    clips = 12 if quick else 40
    recordings = make_folder(folder / f"detect-{api}", clips)
    with Host(render_seconds=RENDER, jitter=2 * INTERVAL, error=0.4) as server:
        words = ("--jobs", clips, "--poll-interval", INTERVAL)
        used = batch(server, api, recordings, *words).end()
        facts = server.facts()
    late, half = lateness(used.text, facts), INTERVAL / 2
    marks = (late[0], statistics.median(late), late[len(late) * 9 // 10], late[-1])
    spread = " / ".join(f"{1000 * value:.0f}" for value in marks) + " ms"
    how = {"v2": "looks, estimate off by 40 %", "v3": "stream"}[api]
    plain = sum(math.ceil((end - start) / INTERVAL) + 1 for start, end in facts.spans.values())
    what = f"end to file, {api}, {how}: min / median / 90 % / max"
    polls = facts.calls.get("status", 0) / clips
    return [
        Score(what, spread, f"{1000 * half:.0f} ms half an interval", marks[1] / half),
        score("  looks a clip", polls, "", plain / clips, "one every interval", 1),
    ]


def peer_big(base: str, image: Path, audio: Path, out: Path) -> float:
    """The peak memory, in MiB, of the simplest script with the big files."""
    peer_clip(base, image, audio, out, 5)
    return peak_mib(resource.getrusage(resource.RUSAGE_SELF))


def bench_peer(folder: Path, quick: bool) -> list[Score]:
    """The same clip by a script with `requests`."""
    if not importlib.util.find_spec("requests"):
        return [Score("one clip against `requests`", MISSING, "requests is not installed")]
    render, interval = RENDER / 2, INTERVAL / 2
    with Host(render_seconds=render, jitter=2 * interval, error=0.4, latency=0.05) as server:
        environ = server.environ("v2", folder / "peer")
        took = in_process(race, environ, folder, 1 if quick else 5, interval, "peer")
    with Host(200_000_000, render_seconds=0) as server:
        big = Transfers(server, folder, 100 * MIB)
        big.ours()
        out = folder / "peer.mp4"
        peak = in_process(peer_big, server.urls["v2"], big.image, big.audio, out)
    what = f"one clip, {render:g} s of rendering, looks every {interval:g} s"
    return [
        score(what, took["ours"], "s", took["peer"], "script with requests"),
        score("  memory with big files", big.peak, "MiB", peak, "script with requests"),
    ]


def run_bench(folder: Path, quick: bool) -> tuple[list[Score], list[str]]:
    """All rows, and the lines under the table."""
    scores, peaks = [*bench_start(folder, quick), *bench_warm(folder, quick)], []
    rows, lines = bench_files(folder, quick)
    scores += rows
    for api in KEYS:
        rows, few = bench_many(folder, api)
        more, many = bench_waiting(folder, api, quick)
        scores += [*rows, *more, *bench_detection(folder, api, quick)]
        peaks.append(f"{api} {few:.0f} MiB at 50, {many:.0f} MiB at {200 if quick else 1000}")
    scores += bench_peer(folder, quick)
    lines += [f"memory by jobs: {'; '.join(peaks)}", bench_growth(folder, quick)]
    return scores, lines


def cmd_bench(arguments: argparse.Namespace) -> int:
    """Print the table."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        scores, lines = run_bench(Path(folder), arguments.quick)
    print(table(scores), "", *lines, sep="\n")
    spent = f"{time.monotonic() - started:.0f} s on {os.cpu_count()} CPUs"
    print(f"One run, {spent}, Python {sys.version.split()[0]}; load {os.getloadavg()[0]:.1f}")
    return 0


# ----------------------------------------------------------------- command line
# main: serve, sample, demo, bench.

EXPORTS = """Hedra's sandbox is up; Ctrl-C ends it. In another terminal, for the web API (v2):
  export HEDRA_BASE_URL={v2} HEDRA_API_KEY=sandbox
or, for the jobs API (v3):
  export HEDRA_BASE_URL={v3} HEDRA_API_KEY=sandbox:secret
then, with the files of `python sandbox.py sample DIR` or your own:
  python hedra_avatar.py run --img DIR/friend.png --wav DIR/hello.wav"""
KEYS = {"v2": "sandbox", "v3": "sandbox:secret"}


def cmd_serve(arguments: argparse.Namespace) -> int:
    """Answer until Ctrl-C or SIGTERM."""
    try:
        find_ffmpeg()
    except RenderError as error:
        print(f"sandbox: generations will fail: {error}", file=sys.stderr)
    names = ("render_seconds", "rate", "concurrency")
    sandbox = Sandbox(**{name: getattr(arguments, name) for name in names})
    with sandbox, serve(sandbox, arguments.port) as server:
        print(EXPORTS.format(v2=server.url_v2, v3=server.url_v3), flush=True)
        with contextlib.suppress(KeyboardInterrupt, Terminated):
            threading.Event().wait()
    return 0


def cmd_sample(arguments: argparse.Namespace) -> int:
    """Write the drawn portrait and the synthesised voice."""
    for path in sample(arguments.folder):
        print(path)
    return 0


def cmd_demo(arguments: argparse.Namespace) -> int:
    """From nothing to a video, by the real program over the real protocol."""
    find_ffmpeg()
    names = {"v2": "demo.mp4", "v3": "demo-v3.mp4"}
    chosen = list(names) if arguments.api == "both" else [arguments.api]
    videos = [(arguments.out_dir / names[api]).resolve() for api in chosen]
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder, Sandbox() as sandbox:
        image, audio = sample(Path(folder))
        with serve(sandbox) as server:
            urls = {"v2": server.url_v2, "v3": server.url_v3}
            for api, video in zip(chosen, videos, strict=True):
                words = ["--img", image, "--wav", audio, "--out", video, "--poll-interval", "1"]
                settings = {"HEDRA_BASE_URL": urls[api], "HEDRA_API_KEY": KEYS[api]}
                cache = str(Path(folder, api))
                if status := run_client(words, {**settings, "HEDRA_CACHE_DIR": cache}):
                    return status
    print(*videos, sep="\n")
    return 0


def run_client(words: list[Any], settings: dict[str, str]) -> int:
    """Run `hedra_avatar run` from beside this file; its exit status. Ends it if we are ended."""
    # Set to nothing rather than removed, for else a .env of the user's would fill them in.
    blank = dict.fromkeys(("HEDRA_MODEL_ID", "HEDRA_WORKSPACE_ID", "FRIEND_IMG"), "")
    command = [sys.executable, "-m", "hedra_avatar", "run", *map(str, words)]
    here = Path(__file__).resolve().parent
    # Its result lines are ours to print, when all is done.
    quiet = subprocess.DEVNULL
    environment = {**os.environ, **blank, **settings}
    with subprocess.Popen(command, cwd=here, env=environment, stdout=quiet) as client:
        try:
            return client.wait()
        except (KeyboardInterrupt, Terminated):
            client.terminate()
            client.wait()
            raise


class Terminated(Exception):
    """SIGTERM, as an exception, so that folders and processes are cleaned up."""


def on_sigterm(*_: object) -> None:
    raise Terminated


def parse_rate(text: str) -> tuple[int, float]:
    """`60/60` is sixty requests a minute."""
    match = re.fullmatch(r"(\d+)/(\d+(?:\.\d+)?)", text)
    if not match or not float(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 60/60, requests and seconds")
    return int(match[1]), float(match[2])


def port_number(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to 65535")
    return int(text)


SERVE_DEFAULTS = {"port": 8321, "render_seconds": 3.0, "rate": None, "concurrency": None}


def build_parser() -> argparse.ArgumentParser:
    """The options; `serve` is what happens without a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.set_defaults(run=cmd_serve, **SERVE_DEFAULTS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    server = commands.add_parser("serve", help="answer on loopback until Ctrl-C (the default)")
    server.set_defaults(run=cmd_serve)
    for one in (parser, server):
        # No defaults here: those of a subcommand would undo what stood before its name.
        options = one.add_argument_group("serve", argument_default=argparse.SUPPRESS)
        options.add_argument("--port", type=port_number, metavar="N", help="default: 8321")
        options.add_argument("--render-seconds", type=float, metavar="S", help="default: 3")
        options.add_argument("--rate", type=parse_rate, metavar="N/S", help="requests per seconds")
        options.add_argument("--concurrency", type=int, metavar="N", help="generations at once")
    files = commands.add_parser("sample", help="write friend.png and hello.wav")
    files.add_argument("folder", type=Path, metavar="DIR")
    files.set_defaults(run=cmd_sample)
    demo = commands.add_parser("demo", help="make a clip with hedra_avatar.py, from nothing")
    demo.add_argument("--api", choices=("v2", "v3", "both"), default="v2")
    demo.add_argument("--out-dir", type=Path, metavar="DIR", default=Path("output"))
    demo.set_defaults(run=cmd_demo)
    bench = commands.add_parser("bench", help="what hedra_avatar.py costs, beside its floors")
    bench.add_argument("--quick", action="store_true", help="fewer repetitions, fewer clips")
    bench.set_defaults(run=cmd_bench)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return int(arguments.run(arguments))
    except (RenderError, BenchError, OSError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated):
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
