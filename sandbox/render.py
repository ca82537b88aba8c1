"""Pictures and sounds: what is in a file, a speech of a text, and the video made of two files.

ffmpeg is that of the PATH or of the package imageio-ffmpeg; a speech is by espeak-ng or `say`,
where the machine has one. The mouth of our own portrait opens; over any other there are bars.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import random
import re
import shutil
import struct
import subprocess
import tempfile
import wave
import zlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

RESOLUTIONS = {"540p": 540, "720p": 720, "1080p": 1080}
ASPECT_RATIOS = ("1:1", "4:3", "3:4", "16:9", "9:16", "9:21", "21:9")
FRIEND, HELLO = (Path(__file__).with_name(name) for name in ("friend.png", "hello.wav"))


class RenderError(Exception):
    """The file could not be made; the text is one line."""


# ----------------------------------------------------------- what is in a file

KINDS = {
    rb"\x89PNG\r\n\x1a\n": "image/png", rb"\xff\xd8\xff": "image/jpeg",
    rb"RIFF....WEBP": "image/webp", rb"RIFF....WAVE": "audio/wav",
    rb"ID3|\xff[\xe2-\xff]": "audio/mpeg", rb"....ftyp": "audio/mp4",
    rb"fLaC": "audio/flac", rb"OggS": "audio/ogg", rb"FORM....AIF[FC]": "audio/aiff",
}  # fmt: skip


def sniff(path: Path) -> str:
    """The content type by the first bytes, "" where they say nothing: names are not trusted."""
    with path.open("rb") as file:
        head = file.read(12)
    return next((kind for mark, kind in KINDS.items() if re.match(mark, head, re.DOTALL)), "")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG by its header; of others the portrait size that Hedra favours."""
    with path.open("rb") as file:
        head = file.read(24)
    if head[:4] == b"\x89PNG" and len(head) == 24:
        return int.from_bytes(head[16:20]), int.from_bytes(head[20:])
    return 540, 960


def wav_seconds(path: Path) -> float | None:
    """The length of a WAV by its header, None where that is damaged."""
    rate = 0
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"data":
                there = path.stat().st_size - file.tell()
                return min(size, there) / rate if rate else None
            body = file.read(size + size % 2)
            if name == b"fmt ":
                rate = int.from_bytes(body[8:12], "little")
    return None


def media_seconds(path: Path) -> float | None:
    """How long a recording or a video is; None for what is neither and where nobody can tell."""
    kind = sniff(path)
    if not kind.startswith("audio/"):
        return None
    if kind == "audio/wav":
        return wav_seconds(path)
    try:  # ffmpeg tells it before it says that nothing is to be made of the file
        command = [find_ffmpeg(), "-nostdin", "-hide_banner", "-i", str(path.resolve())]
        told = subprocess.run(command, capture_output=True, timeout=20, check=False).stderr
    except (RenderError, OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"Duration: (\d+):(\d+):([\d.]+)", told)
    return float(match[3]) + 60 * int(match[2]) + 3600 * int(match[1]) if match else None


def frame_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Width and height in pixels, even, the short side being what the resolution says."""
    short = RESOLUTIONS[resolution]
    across, down = map(int, aspect_ratio.split(":"))
    long = round(short * max(across, down) / min(across, down) / 2) * 2
    return (long, short) if across > down else (short, long)


# ----------------------------------------------------- a text becomes a speech

SHORTEST_SPEECH, SPEECH_TIMEOUT = 0.6, 60.0  # seconds: of sound; that the machine may take
WOMEN, MEN = ("f2", "f3", "f5"), ("m1", "m3", "m7")  # variants of espeak-ng


def speak(text: str, out: Path, voice: str) -> None:
    """Write a WAV of `text`, the same each time; the word male or female in `voice` is obeyed."""
    try:
        samples, rate = synthesize(text, voice)
    except (OSError, subprocess.SubprocessError, wave.Error, EOFError):
        samples, rate = murmur(len(text), voice)
    with wave.open(str(out), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.ljust(2 * math.ceil(SHORTEST_SPEECH * rate), b"\0"))


def synthesize(text: str, voice: str) -> tuple[bytes, int]:
    """Let the machine speak: samples, and how many a second. FileNotFoundError if it cannot."""
    chance, words = random.Random(voice), voice.lower().split()
    speed, pitch = str(chance.randint(155, 190)), str(chance.randint(30, 70))
    kind = chance.choice(MEN if "male" in words else WOMEN if "female" in words else WOMEN + MEN)
    if tool := shutil.which("espeak-ng"):
        command = [tool, "-v", f"en-us+{kind}", "-s", speed, "-p", pitch, "--stdin", "-w"]
    elif tool := shutil.which("say"):
        command = [tool, "-r", speed, "-f", "-", "--data-format=LEI16@22050", "-o"]
    else:
        raise FileNotFoundError("espeak-ng")
    # By stdin a text is no option. Control characters would end it, `[[` is a command to `say`.
    plain = re.sub(r"[\0-\x1f\x7f]+", " ", text).replace("[[", "[ [").encode(errors="replace")
    with tempfile.TemporaryDirectory() as folder:
        file, limit = Path(folder, "speech.wav"), SPEECH_TIMEOUT
        command.append(str(file))
        subprocess.run(command, input=plain, capture_output=True, timeout=limit, check=True)
        return read_wav(file)


def murmur(characters: int, voice: str) -> tuple[bytes, int]:
    """The voice of hello.wav, as long as so many characters take; played faster it is higher."""
    samples, rate = read_wav(HELLO)
    rate = round(rate * random.Random(voice).uniform(0.8, 1.25))
    size = 2 * math.ceil(rate * characters / 15)  # so many a second
    return (samples * math.ceil(size / len(samples)))[:size], rate


def read_wav(path: Path) -> tuple[bytes, int]:
    """The samples of a mono WAV of 16 bits, and how many a second."""
    with wave.open(str(path), "rb") as file:
        return file.readframes(file.getnframes()), file.getframerate()


# -------------------------------------------------------------- ffmpeg and PNG


def find_ffmpeg() -> str:
    """The path of ffmpeg: that on the PATH, else that of imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        words = "there is no ffmpeg on the PATH: install it, or `pip install imageio-ffmpeg`"
        raise RenderError(words) from None


def ffmpeg(task: str, *arguments: str | Path, feed: Iterable[bytes] = ()) -> None:
    """Run ffmpeg, with `feed` as its standard input; the last line that it says is the error."""
    command = [find_ffmpeg(), "-v", "error", "-y", *map(str, arguments)]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said) as process:
            assert process.stdin
            # It may end before it has read everything, by an error or since it has enough.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.writelines(feed)
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise RenderError(f"ffmpeg cannot {task}: {lines[-1] if lines else 'no reason given'}")


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


def mark_png() -> bytes:
    """The mark, a pixel a dot."""
    dots = {" ": b"\x0a\x78", "#": b"\xff\xe1"}
    wide = max(map(len, MARK))
    rows = [bytearray(b"".join(dots[dot] for dot in line.ljust(wide))) for line in MARK]
    return png(wide, len(MARK), 4, rows)


# -------------------------------------- a portrait, and a film that moves with a voice

FPS, RATE = 25, 8000  # of the video; of the samples that are measured
KEPT = 0.75  # how much of a portrait's width or height is seen, at least
Box: TypeAlias = tuple[int, int, int, int]  # left, top, width, height


class Place(NamedTuple):
    """Where the portrait is in the frame, which may cut off some of it; and its scale."""

    left: int
    top: int
    width: int
    height: int
    scale: float


class Film(NamedTuple):
    """Pictures for a box, drawn a column at a time; `size` is height x width of a picture."""

    size: str
    box: Box
    pictures: Iterator[bytes]
    flags: str  # how ffmpeg enlarges a picture
    shade: str = "null"  # a filter of what is beneath


def place(size: tuple[int, int], width: int, height: int) -> Place:
    """Fill the frame as far as most of the portrait stays in it; rather cut the bottom."""
    ratios = width / size[0], height / size[1]
    scale = min(max(ratios), min(ratios) / KEPT)
    # Even throughout, as the colours of a video have half its resolution.
    wide, high = (2 * math.ceil(side * scale / 2 - 1e-6) for side in size)
    share = 0.35 if high > height else 0.5
    return Place((width - wide) // 4 * 2, int((height - high) * share / 2) * 2, wide, high, scale)


def loudness(pcm: array[int], frames: int) -> list[float]:
    """How loud each video frame is, from 0 to 1: up at once, down softly, as a meter moves."""
    step = RATE // FPS
    peaks = [max(map(abs, pcm[at : at + step])) for at in range(0, len(pcm), step)]
    loudest = max(peaks) or 1
    shares = (peak / loudest for peak in (peaks + [0] * frames)[:frames])
    return list(accumulate(shares, lambda level, share: max(share, level * 0.72)))


BARS, HALF = 27, 15  # how many; how high half a bar may be
INK, CLEAR = b"\x9d\xf3\xe2\xf0", bytes(4)
SHADE = "geq=" + ":".join(f"{c}='{c}(X,Y)*(1-clip(2*(Y/H-0.65),0,0.65))'" for c in "rgb")


def bars(levels: list[float], width: int, height: int) -> Film:
    """For any portrait: now is in the middle, what was said runs outwards."""

    def picture(now: int) -> bytes:
        columns = []
        for ago in (abs(at - BARS // 2) for at in range(BARS)):
            level = levels[now - ago] * (1 - ago / BARS) if now >= ago else 0.0
            tall = 1 + round(level * (HALF - 1))
            blank = CLEAR * (HALF - tall)
            columns += [blank + INK * 2 * tall + blank] * 2 + [CLEAR * 2 * HALF]
        return b"".join(columns)

    # Whole pixels for each dot of a picture.
    wide = min(width, height) * 3 // 5 // (3 * BARS) * 3 * BARS
    high = height // 8 // (2 * HALF) * 2 * HALF
    box = (width - wide) // 2, round(height * 0.89) - high // 2, wide, high
    return Film(f"{2 * HALF}x{3 * BARS}", box, map(picture, range(len(levels))), "neighbor", SHADE)


# Where friend.png, and no other picture, has its mouth; there is nothing but skin around it.
FRIEND_DIGEST = "2128a4f3c31237108daddf46bed4efeb35290966d04306ed08524b422405209f"
MOUTH: Box = (400, 1064, 280, 124)
SKIN, LIP, TEETH, TONGUE = b"\xf0\xbc\x98", b"\xa9\x48\x3f", b"\xff\xff\xff", b"\xcf\x6b\x61"
STEPS = 12  # from shut to wide open


def stripe(column: bytearray, top: float, bottom: float, colour: bytes) -> None:
    """Colour a column from `top` to `bottom`, softly where a pixel is reached in part."""
    first, last = int(top), int(bottom)
    column[4 * first + 4 : 4 * last] = (colour + b"\xff") * max(0, last - first - 1)
    for y in {first, last}:
        cover = max(0.0, min(bottom, y + 1) - max(top, y))
        for at, ink in enumerate(colour, 4 * y):
            column[at] += round((ink - column[at]) * cover)


def arc(across: float, reach: float) -> float:
    """The height of an oval over its middle line: 1 at its middle, 0 from `reach` on."""
    return math.sqrt(max(0.0, 1 - (across / reach) ** 2))


@cache
def mouth_picture(step: int) -> bytes:
    """The mouth, `step` of STEPS open: at first a curved line, at last all teeth and tongue."""
    opened = step / STEPS
    columns, smile = [], 26 * (1 - opened)
    for across in range(-MOUTH[2] // 2, MOUTH[2] // 2):
        column = bytearray((SKIN + b"\xff") * MOUTH[3])
        if arch := arc(across, 122 - 14 * opened):
            upper = 12 + smile * arch * arch
            lower = upper + (7 + 80 * opened) * arch
            tooth = min(lower, upper + 32 * opened * arc(across, 92))
            tongue = 19 + smile + 40 * opened * (2 - arc(across, 62))
            stripe(column, upper, lower, LIP)
            stripe(column, upper, tooth, TEETH)
            stripe(column, min(max(tongue, tooth), lower), lower, TONGUE)
        columns.append(column)
    return b"".join(columns)


def mouth(levels: list[float], spot: Place) -> Film:
    """For friend.png: the mouth opens with the voice, and a little before it as mouths do."""
    steps = (round(STEPS * min(1.0, 0.6 * (now + soon))) for now, soon in pairwise([*levels, 0]))
    left, top, width, height = (round(value * spot.scale) for value in MOUTH)
    box = spot.left + left, spot.top + top, width, height
    return Film(f"{MOUTH[3]}x{MOUTH[2]}", box, map(mouth_picture, steps), "lanczos")


# The portrait lies on a blur of itself. All is one still until the film comes on top of it.
GRAPH = (
    "[0:v]split[far][near];"
    "[far]scale=6:6:flags=area,scale={w}:{h}:flags=bicubic,lutrgb=val*0.6:val*0.6:val*0.6[back];"
    "[near]scale={spot.width}:{spot.height}:flags=lanczos[portrait];"
    "[back][portrait]overlay={spot.left}:{spot.top}:format=gbrp,{film.shade}[shaded];"
    "[1:v]format=rgba,pad=iw+6:ih+6:3:3:0x0a0a0a@0.47,scale=iw*{dot}:ih*{dot}:flags=neighbor"
    "[mark];[shaded][mark]overlay=W-w-4*{dot}:4*{dot},"
    "setsar=1,format=yuv420p,loop=-1:1,setpts=N/({fps}*TB)[still];"
    "[2:v]transpose,scale={film.box[2]}:{film.box[3]}:flags={film.flags}[film];"
    "[still][film]overlay={film.box[0]}:{film.box[1]},format=yuv420p[video]"
)


def decode(image: Path, audio: Path, folder: Path) -> array[int]:
    """Write the portrait as PNG, whose size can be told; the samples of the voice at RATE."""
    if sniff(image) == "image/png":
        shutil.copyfile(image, folder / "portrait.png")
    else:
        ffmpeg("read the portrait", "-i", image, "-frames:v", "1", folder / "portrait.png")
    sound = ("-map", "0:a:0", "-ac", "1", "-ar", str(RATE), "-f", "s16le", folder / "pcm")
    ffmpeg("read the recording", "-i", audio, *sound)
    if pcm := array("h", (folder / "pcm").read_bytes()):
        return pcm
    raise RenderError("the recording is empty")


def encode(folder: Path, audio: Path, film: Film, graph: str, seconds: float) -> None:
    """Make video.mp4 of portrait.png and mark.png; the film comes by the standard input."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgba", "-framerate", str(FPS), "-video_size", film.size)
    ffmpeg(
        "make the video",
        *("-i", folder / "portrait.png", "-i", folder / "mark.png", *raw, "-i", "pipe:0"),
        *("-i", audio, "-filter_complex", graph, "-map", "[video]", "-map", "3:a:0"),
        # Neither the picture nor the padded voice has an end of its own.
        *("-af", "apad", "-t", f"{seconds:.3f}", "-r", str(FPS), "-c:v", "libx264", "-crf", "23"),
        *("-preset", "veryfast", "-c:a", "aac", "-b:a", "128k", "-ar", "44100"),
        *("-movflags", "+faststart", "-map_metadata", "-1", "-fflags", "+bitexact"),
        folder / "video.mp4",
        feed=film.pictures,
    )


def render_mp4(
    image: Path, audio: Path, out: Path, width: int, height: int, seconds: float | None = None
) -> None:
    """The portrait in a frame of `width` by `height`, and what the voice makes it do.

    As long as the recording, or `seconds`: cut, or with silence at the end. Raises RenderError.
    """
    friend = hashlib.sha256(image.read_bytes()).hexdigest() == FRIEND_DIGEST
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pcm = decode(image, audio, folder)
        (folder / "mark.png").write_bytes(mark_png())
        seconds = seconds or len(pcm) / RATE
        levels = loudness(pcm, math.ceil(seconds * FPS))
        spot = place(image_size(folder / "portrait.png"), width, height)
        film = mouth(levels, spot) if friend else bars(levels, width, height)
        dot = max(2, min(width, height) // 270)
        graph = GRAPH.format(w=width, h=height, fps=FPS, dot=dot, spot=spot, film=film)
        encode(folder, audio, film, graph, seconds)
        shutil.move(folder / "video.mp4", out)
