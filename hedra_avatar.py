#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["urllib3>=2.2,<3", "tqdm", "watchdog", "python-dotenv"]
# ///
"""Turn a portrait and a voice into a talking-avatar video with Hedra, and never pay twice for it.

examples, in a shell and in Python:
  hedra_avatar.py run --wav hello.wav --img friend.png       -> output/hello.mp4
  hedra_avatar.py run --say 'Good morning!' --voice Anna --img friend.png --out morning.mp4
  hedra_avatar.py run --say @news.txt --img friend.png --dry-run
  hedra_avatar.py batch course --jobs 8 --max-credits 500    (--dry-run: the price list)
  hedra_avatar.py watch --img friend.png                     until Ctrl-C
  hedra_avatar.py watch /mnt/share/drop --polling
  hedra_avatar.py credits --min 100                          exit status 1 if there is less
  hedra_avatar.py credits --spent                            by this folder, by month
  hedra_avatar.py voices --json

  hedra_avatar.make_video(Path("hello.wav"), Path("friend.png"), Path("hello.mp4"), key)

A recording (wav mp3 m4a flac ogg aif aiff) lasts 0.5 to 600 seconds. A clip of a folder is a
recording, or a text to be spoken, x.say.txt. Beside x.wav may lie x.png (or jpg, jpeg, webp), its
portrait, x.txt, its prompt, and x.voice.txt, who speaks. The video is output/x.mp4.

A clip is its content: the bytes of portrait and recording (or a text and a voice), the prompt,
resolution, aspect ratio, --set, models and account. The ledger, .cache/, remembers by it what was
asked of Hedra and what came back. So a clip is paid for once, whatever fails, is killed, is rerun
or races: run a command again and it takes up where the last one stopped; --force pays for a new
take.

Hedra has two APIs. A key with a colon is of the jobs API (v3, US dollars), any other of the web
API (v2, credits). For Linux and macOS.

environment, or, for the commands, a file .env in the working directory (a flag wins over both):
  HEDRA_API_KEY       the key, of either kind
  FRIEND_IMG          portrait of clips that have none
  HEDRA_VOICE         who speaks texts, by name or id
  HEDRA_MODEL_ID, HEDRA_WORKSPACE_ID, HEDRA_BASE_URL, HEDRA_CACHE_DIR (.cache)
  HEDRA_HTTP_TIMEOUT  seconds without an answer (60)
  HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE as with curl

exit status: 0 done, 1 something failed, 2 wrong usage, 130 Ctrl-C (129 SIGHUP, 143 SIGTERM)."""

# Facts about Hedra are from its OpenAPI documents unless a comment says otherwise. Every name is
# defined before its use.
from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (said before what an older one has not got)
    WORDS = "hedra_avatar needs Python 3.11 or newer, and this is "
    WORDS += ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(WORDS) if __name__ == "__main__" else ImportError(WORDS)

if __name__ == "__main__":  # Ctrl-C while the rest is still being imported
    import os
    import signal

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from importlib import import_module
from pathlib import Path
from stat import S_ISREG
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, ParamSpec, TypeVar
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

if TYPE_CHECKING:
    import urllib3

__version__ = "2.0.0"
__all__ = [  # what pydoc shows; the children of HedraError are public as well
    "make_video", "make_speech", "create_asset", "upload_asset", "upload", "get_default_model_id",
    "start_generation", "wait_and_download", "get_credit_balance", "get_balance", "get_voices",
    "retry", "main", "HedraError",
]


# ---- settings -----------------------------------------------------------------------------------

BASE_URLS = {"v2": "https://api.hedra.com/web-app/public", "v3": "https://api.hedra.com/v3"}
DEFAULT_PROMPT = "A person talks to the camera, natural expression, gentle movement of the head."
RESOLUTIONS = ("540p", "720p", "1080p")
ASPECT_RATIOS = ("9:16", "16:9", "1:1", "4:3", "3:4", "9:21", "21:9")

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 60.0  # without an answer, or without progress in a download
TRIES, SUBMIT_TRIES = 5, 6  # of one request, the first included
POLL_TRIES = 15  # in a row, before waiting for a generation is given up
GRACE_S = 30.0  # after a submit, a status of 404 may still mean "not yet"
FORCE_AFTER_S = 3600.0  # a take in flight that is younger is taken up by --force as well
LATE_BILL_S = 3600.0  # after a submit: a bill may still come
KEPT_S = 48 * 3600.0  # so long the jobs API keeps what it has made
LONGEST_RETRY_AFTER_S = 300.0  # that is waited for where there is no deadline
MODEL_AGE_S = 3600.0  # then the catalogue is asked again, for the price
BLOCK_BYTES = 1 << 20  # of a download
PIECE_BYTES = 1 << 16  # of an upload: a slow uplink takes it within the time-out
ANSWER_BYTES, EVENT_BYTES, VIDEO_BYTES = 16 << 20, 1 << 20, 8 << 30  # none of Hedra's is longer
PROMPT_BYTES, TEXT_BYTES = 64 << 10, 256 << 10  # of a prompt, of a text to be spoken
PROGRESS_BYTES = 16 << 10  # a download that gets less in SILENCE_TIMEOUT_S stands still
CHARS_PER_S = 15.0  # of speech, before anybody has spoken it
OUR_FIELDS = (  # of an order: they have a flag of their own, or are not free
    "prompt", "text_prompt", "resolution", "aspect_ratio", "start_image", "audio", "audio_id",
    "start_keyframe_id", "type", "generation_id", "idempotency_key", "model_slug", "ai_model_id",
    "workspace_id", "batch_size", "num_outputs", "audio_generation",
)

T = TypeVar("T")
P = ParamSpec("P")
Kind = Literal["image", "audio"]
VIDEO, SPEECH = "video", "speech"  # what is made


# ---- errors: HedraError, and those of its children that somebody catches ------------------------

LATER = "run the same command again later; what was paid for by then is not lost"


def printable(text: object) -> str:
    """Text for one line of a log: file names and answers may hold line breaks and escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class HedraError(Exception):
    """What happened, to what, and what to do next, in one line. `code`, `words` and `trace_id` are
    Hedra's own, `retry_after` is in seconds, `generation_id` is paid for and not lost."""

    status: int | None = None  # of HTTP; None: no answer
    code = words = trace_id = generation_id = ""
    retry_after: float | None = None
    retryable = ambiguous = False  # the same may succeed later; it may have been carried out
    is_of_all = False  # every clip would meet it now: no network, no access, no funds
    unfinished = is_open = False  # of a file: cut short, or still being written, by a program

    def __init__(self, message: str, **evidence: Any) -> None:
        super().__init__(printable(message))
        self.__dict__.update(evidence)

    def add(self, text: str) -> None:
        """Say more."""
        self.args = (printable(f"{self}; {text}"),)


class InputError(HedraError):
    """Refused before anything was sent: a file, a setting or a flag is not right."""


class Stopped(HedraError):
    """The program is ending, or sends nothing more; the clip itself is all right."""


class ApiError(HedraError):
    """A request that did not get the answer it should have."""


class RateLimited(ApiError):
    """429: too many requests, or too many generations at once. Nothing was done."""


class OutOfCredits(ApiError):
    """The balance does not cover the price. Nothing was paid."""

    is_of_all = True


class GenerationFailed(HedraError):
    """Hedra ended `generation_id` without a result."""


class StillRunning(HedraError, TimeoutError):
    """The time given was over first. What is at work at Hedra goes on and is not lost."""

    retryable = True


def explain(error: BaseException) -> str:
    """An error as one line for a person."""
    if isinstance(error, HedraError):
        return str(error)
    if isinstance(error, OSError):
        name = f"{printable(error.filename)}: " if error.filename else ""
        how = "nothing that was paid for is lost: mend that, and run it again"
        return f"{name}{error.strerror or error}; {how}"
    return f"{type(error).__name__}: {error} (a bug in hedra_avatar; -v shows where)"


def need(package: str) -> Any:
    """Import a package where it is first used, or say in one line what to install."""
    try:
        return import_module(package)
    except ImportError as error:
        packages = "'urllib3>=2.2,<3' tqdm watchdog python-dotenv"
        how = f"{sys.executable or 'python'} -m pip install {packages}"
        raise InputError(f"the package {error.name or package} is missing: {how}") from error


def amount(value: float | None, unit: str) -> str:
    """An amount of money to read: `12 credits`, `$1.20`, `?` where nobody knows."""
    if value is None:
        return "?"
    if unit == "USD":
        return f"${value:.2f}" if value >= 0.1 or value <= 0 else f"${value:.3g}"
    return f"{value:.10g} {unit}" if value != 1 else f"1 {unit.removesuffix('s')}"


def total(values: Iterable[float | None]) -> float | None:
    """A sum, None where one of the values is not known."""
    found = list(values)
    return None if None in found else round(sum(value or 0.0 for value in found), 6)


def parse_number(text: str | bytes) -> float | None:
    """A finite number that is not negative, from outside; None for anything else."""
    with contextlib.suppress(ValueError):
        return value if 0 <= (value := float(text)) < math.inf else None
    return None


# ---- account: Account, open_account -------------------------------------------------------------

@functools.lru_cache(maxsize=32)
def digest_of(*parts: str) -> str:
    """A 128-bit hexadecimal digest of some text."""
    import hashlib

    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Account(NamedTuple):
    """Who pays, and where: what must never mix in the cache. `silence_s`: HEDRA_HTTP_TIMEOUT."""

    key: str
    base_url: str
    workspace: str = ""
    cache: Path = Path(".cache")
    silence_s: float = SILENCE_TIMEOUT_S

    def __repr__(self) -> str:
        return f"Account({self.base_url})"  # the key stays out of every log and traceback

    @property
    def id(self) -> str:
        """A name for the account that does not tell the key."""
        return digest_of("account", self.key, self.base_url, self.workspace)[:16]


def setting(environ: Mapping[str, str], name: str, default: str = "") -> str:
    """A variable of the environment, without blanks around it; an empty one is absent."""
    return (environ.get(name) or "").strip() or default


def clean_key(raw: str) -> str:
    """The key without what pasting adds; raises InputError, never showing it."""
    if not (key := (raw or "").strip().strip("\ufeff").strip()):
        way = "set HEDRA_API_KEY, here or in a file named .env (`make demo` needs none)"
        raise InputError(f"no API key: {way}")
    if key.isascii() and key.isprintable():
        return key
    raise InputError("HEDRA_API_KEY has a line break or a character that no key has: copy it again")


def clean_url(raw: str) -> str:
    """A web address without its last slash; raises InputError, also for http to other machines."""
    url = raw.strip().rstrip("/")
    with contextlib.suppress(ValueError):  # the port is no port
        parts = urlsplit(url)
        if parts.hostname and parts.port != 0 and not re.search(r"[@\s]", parts.netloc):
            parts.hostname.encode("idna")  # which knows names that no host has
            local = re.fullmatch(r"localhost|::1|127(\.\d{1,3}){3}", parts.hostname)
            if parts.scheme == "https" or (parts.scheme == "http" and local):
                return url
            if parts.scheme == "http":
                raise InputError(f"refused: http://{parts.netloc} is not encrypted; use https://")
    raise InputError(f"not a web address: {url!r} (is HEDRA_BASE_URL right?)")


def open_account(api_key: str, environ: Mapping[str, str] | None = None) -> Account:
    """The account behind a key, with HEDRA_BASE_URL, HEDRA_WORKSPACE_ID, HEDRA_CACHE_DIR and
    HEDRA_HTTP_TIMEOUT (seconds) read from `environ` (default: os.environ). Raises InputError."""
    environ, key = os.environ if environ is None else environ, clean_key(api_key)
    mine, other = ("v3", "v2") if ":" in key else ("v2", "v3")
    url = clean_url(setting(environ, "HEDRA_BASE_URL", BASE_URLS[mine]))
    if "?" in url or "#" in url:
        raise InputError("HEDRA_BASE_URL takes no ? and no #: it is the start of every address")
    if url.endswith(urlsplit(BASE_URLS[other]).path):
        raise InputError(f"HEDRA_BASE_URL is of the {other} API, this key of {mine}: unset it")
    raw = setting(environ, "HEDRA_HTTP_TIMEOUT", f"{SILENCE_TIMEOUT_S}")
    if not (silence_s := parse_number(raw)):
        raise InputError(f"HEDRA_HTTP_TIMEOUT is {raw!r}: give seconds, as in 60")
    cache = Path(os.path.expanduser(setting(environ, "HEDRA_CACHE_DIR", ".cache")))
    return Account(key, url, setting(environ, "HEDRA_WORKSPACE_ID"), cache, min(silence_s, 86_400))


# ---- media: Media, inspect_file, inspect_film ---------------------------------------------------

LIMITS = {
    "image": (10_485_760, "a PNG, JPEG or WebP image"),
    "audio": (104_857_600, "a WAV, MP3, M4A, FLAC, Ogg or AIFF recording"),
}
MIN_SECONDS, MAX_SECONDS = 0.5, 600
TOO_EARLY = "it ends too early; copy or export it again"
SIGNATURES = {  # of the first bytes
    "image/png": rb"\x89PNG\r\n\x1a\n", "image/jpeg": rb"\xff\xd8\xff",
    "image/webp": rb"RIFF....WEBP", "audio/wav": rb"(RIFF|RF64|BW64)....WAVE",
    "audio/aiff": rb"FORM....AIF[FC]", "audio/flac": rb"fLaC", "audio/ogg": rb"OggS",
    "audio/mp4": rb"....ftyp(?!avi|crx|hei|hev|jp2|mif|msf)",  # which are images
    # A tag, or a frame: sync, MPEG 1, 2 or 2.5, layer III, a bit rate and a sampling rate.
    "audio/mpeg": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xeb]",
}


class Media(NamedTuple):
    """What a file is. `seconds` is None where nobody here can tell (0: a video does not say);
    `digest` is of its bytes."""

    content_type: str = ""
    size_bytes: int = 0
    seconds: float | None = None
    digest: str = ""
    has_sound: bool = True


@contextlib.contextmanager
def open_regular(file: Path) -> Iterator[io.BufferedReader]:
    """A file to read; raises InputError where that cannot be, and for a pipe or a device, which
    may run for ever."""
    try:
        if not S_ISREG(os.stat(file).st_mode):
            raise InputError(f"{file} is not a file: give the path of one")
        with open(file, "rb") as stream:
            yield stream
    except HedraError:  # StillRunning is an OSError as well
        raise
    except FileNotFoundError:
        raise InputError(f"{file} does not exist") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def signature(file: Path | str) -> str:
    """What changes when a file does: size, times and inode; "" where there is none."""
    try:
        stat = os.stat(file)
    except OSError:
        return ""
    return f"{stat.st_size}.{stat.st_mtime_ns}.{stat.st_ctime_ns}.{stat.st_ino}"


def size_of(file: Path) -> int:
    """Its bytes, 0 where there is none."""
    return file.stat().st_size if file.exists() else 0


def sniff(head: bytes, kind: str) -> str:
    """The content type that a file's first bytes show, "" where it is not of that kind."""
    found = (name for name, mark in SIGNATURES.items() if re.match(mark, head, re.DOTALL))
    return next((name for name in found if name.startswith(kind)), "")


def wav_seconds(stream: IO[bytes], size: int) -> float | None:
    """The duration that a WAV header promises, None where its sound is compressed; raises
    InputError unless the file holds it all."""
    stream.seek(0)
    head = stream.read(8)
    outer = int.from_bytes(head[4:], "little") if head[:4] == b"RIFF" else 0
    at, name, length, form, rate, wide = 12, b"", 0, 0, 0, 0
    for _ in range(10_000):
        stream.seek(at)
        head = stream.read(24)
        name, length, at = head[:4], int.from_bytes(head[4:8], "little"), at + 8
        if name == b"data" or len(head) < 8:
            break
        if name == b"ds64":  # of an RF64, whose other lengths are too short for it
            wide = int.from_bytes(head[16:24], "little")
        elif name == b"fmt ":
            form, rate = int.from_bytes(head[8:10], "little"), int.from_bytes(head[12:16], "little")
            rate *= int.from_bytes(head[20:22], "little")  # bytes of all channels at an instant
        at += length + length % 2
    promised, there = (wide or length, max(0, size - at)) if name == b"data" else (0, 0)
    if not promised or promised > there:
        text = f"its header promises {promised:,} bytes of sound and {there:,} are there"
        piped = " (to a file, not to a pipe)" if promised > LIMITS["audio"][0] else ""
        raise InputError(f"{text}; export or copy it again{piped}", unfinished=True)
    if size < outer < 0xFFFF_0000:  # chunks behind the sound; from a pipe it has no length
        raise InputError(TOO_EARLY, unfinished=True)
    if form not in (0, 1, 3, 6, 7, 0xFFFE):  # none told, integer, float, A-law, mu-law, any
        return None
    if not rate:
        raise InputError("it is a damaged WAV: its header has no sampling rate")
    return promised / rate


def probed_seconds(file: Path) -> float | None:
    """The duration by ffprobe, None where there is none or it cannot tell; raises InputError for
    what it cannot read, and for what ends before it says. Where the file does not say it, and the
    first packets would be no guide to the others, it is where the last packet ends."""
    import subprocess

    words = ["ffprobe", "-v", "warning", "-select_streams", "a:0", "-of", "csv=p=0"]
    shown = "packet=pts_time,duration_time:stream=duration:format=duration"  # and in that order
    name = os.path.abspath(file)  # so that it is not taken for a flag or a protocol
    asked, null = [*words, "-show_entries", shown, name], subprocess.DEVNULL
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(asked, stdin=null, capture_output=True, timeout=10, check=False)
        if done.returncode == 1:
            raise InputError("ffprobe cannot read it; copy or export it again", unfinished=True)
        *_, last, sound, film = (line.strip(b",") for line in [b"", b"", b"", *done.stdout.split()])
        ended = total(map(parse_number, last.split(b",")))
        seconds = parse_number(sound) or parse_number(film)
        if b"Estimating duration" in done.stderr:
            seconds = None
        if ended and seconds and ended < seconds - 0.2:
            text = f"of {seconds:.1f} s of sound {ended:.1f} s are there"
            raise InputError(f"{text}; copy or export it again", unfinished=True)
        return seconds or ended
    return None


def is_whole(data: bytes, content_type: str, size: int) -> bool:
    """Whether a file reaches its end; `data` is all of an image, or the head of a recording."""
    if content_type == "image/png":
        return b"IEND\xaeB`\x82" in data
    if content_type == "image/jpeg":
        at = 2  # from segment to segment: a preview, or a film behind it, has an end of its own
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
            length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            at += length if data[at + 1] != 0xFF else 1  # a filler
        return data.find(b"\xff\xd9", at) > 0
    if content_type in ("image/webp", "audio/aiff"):
        riff = content_type == "image/webp"
        return 0 < int.from_bytes(data[4:8], "little" if riff else "big") <= size - 8
    if data.startswith(b"ID3"):  # the size of a tag is written in bytes of seven bits
        return size > 10 + functools.reduce(lambda n, byte: n << 7 | byte & 127, data[6:10], 0)
    return size > 100


def ends_in_page(stream: IO[bytes], size: int) -> bool:
    """Whether the last page of an Ogg (RFC 3533, 6) is all there: players do not mind."""
    stream.seek(max(0, size - 65_307))  # the longest page
    page = stream.read().rpartition(b"OggS")[2]
    return len(page) >= 23 and len(page) >= 23 + page[22] + sum(page[23 : 23 + page[22]])


def iter_boxes(stream: IO[bytes], at: int, end: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, end and first bytes of each box of an MP4, and of those in `moov` that tell of its
    tracks; an outer one that is cut ends beyond `end`."""
    for _ in range(100_000):
        if at >= end:
            return
        stream.seek(at)
        data = stream.read(48)
        name, length, body = data[4:8], int.from_bytes(data[:4], "big"), 8
        if length == 1:
            length, body = int.from_bytes(data[8:16], "big"), 16
        elif length == 0:  # the box goes on to the end of the file, wherever that is
            length = end - at
        stop = at + length if len(data) >= 8 and length >= body else end + 1
        yield name, stop, data[body:]
        if name in (b"moov", b"trak", b"mdia"):
            for inner, _, content in iter_boxes(stream, at + body, min(stop, end)):
                yield inner, 0, content
        at = stop


def read_film(stream: IO[bytes], kind: str = VIDEO) -> Media | None:
    """What an MP4 holds, None where its `ftyp`, `moov` and `mdat` are not all whole. Of a recording
    what is no box is left to Hedra; one that has neither sound nor index has no end of its own."""
    names, seconds, tracks = set[bytes](), 0.0, set[bytes]()
    size = os.fstat(stream.fileno()).st_size
    for name, stop, data in iter_boxes(stream, 0, size):
        is_cut = stop > size and (kind == VIDEO or name in (b"moov", b"mdat", b"moof", b"free"))
        if is_cut or (not names and name != b"ftyp"):
            return None
        names.add(name)
        if name == b"mvhd":
            at, width = (20, 8) if data[:1] == b"\x01" else (12, 4)
            scale = int.from_bytes(data[at : at + 4], "big")
            length = int.from_bytes(data[at + 4 : at + 4 + width], "big")
            seconds = length / scale if scale else 0.0
        tracks |= {data[8:12]} if name == b"hdlr" else set()
    there = len(names & {b"moov", b"mdat"})
    if there == 1 or (there == 0 and kind == VIDEO):
        return None
    # Of a recording that names no track nobody here can tell.
    sound = b"soun" in tracks or (kind != VIDEO and not tracks)
    return Media("video/mp4", size, seconds, has_sound=sound)


def inspect_open(stream: IO[bytes], file: Path, kind: Kind) -> Media:
    """What an open file is; raises InputError that does not name it yet."""
    size, (limit, wanted) = os.fstat(stream.fileno()).st_size, LIMITS[kind]
    data = stream.read(limit if kind == "image" else 64)
    if not (content_type := sniff(data, kind)):
        if size < 44 and any(mark.startswith(data[:4]) for mark in (b"RIFF", b"\x89PNG")):
            raise InputError(f"it has {size} bytes: give {wanted}", unfinished=True)
        raise InputError(f"it is no {kind} that Hedra takes: give {wanted}")
    if size > limit:
        raise InputError(f"it has {size:,} bytes; Hedra takes at most {limit:,}")
    film = read_film(stream, kind) if content_type == "audio/mp4" else Media()
    if not film or not is_whole(data, content_type, size):
        raise InputError(TOO_EARLY, unfinished=True)
    if not film.has_sound:
        raise InputError("it has no sound track: give a recording that can be heard")
    if kind == "image":
        return Media(content_type, size)
    seconds = wav_seconds(stream, size) if content_type == "audio/wav" else None
    seconds = seconds or probed_seconds(file)
    if content_type == "audio/ogg" and seconds and not ends_in_page(stream, size):
        raise InputError(TOO_EARLY, unfinished=True)
    return Media(content_type, size, seconds)


def inspect_file(file: Path, kind: Kind) -> Media:
    """Look at a file before anything is sent; raises InputError that names it."""
    if kind not in LIMITS:
        raise InputError(f"{file}: {kind!r} is no kind of file; give 'image' or 'audio'")
    with open_regular(file) as stream:
        try:
            media = inspect_open(stream, file, kind)
            if media.seconds is not None and not MIN_SECONDS <= media.seconds <= MAX_SECONDS:
                takes = f"Hedra takes {MIN_SECONDS} to {MAX_SECONDS} s"
                raise InputError(f"it lasts {media.seconds:.2f} s; {takes}")
            return media
        except InputError as error:
            cut = "is cut short or still being written" if error.unfinished else "cannot be used"
            raise InputError(f"{file} {cut}: {error}", unfinished=error.unfinished) from None


def inspect_film(file: Path, kind: str = VIDEO) -> Media | None:
    """What a video (or, of that kind, a speech) holds, None where it is not whole."""
    with open_regular(file) as stream, contextlib.suppress(InputError):
        return read_film(stream) if kind == VIDEO else inspect_open(stream, file, "audio")
    return None


def is_film(file: Path) -> bool:
    """Whether a file begins as an MP4 does, or with nothing but what a crash leaves."""
    with open_regular(file) as stream:
        head = stream.read(12)
    return head[4:8] == b"ftyp" or not head.strip(b"\0")


def content_digest(file: Path) -> str:
    """The digest of a whole file, by what is fast on every processor."""
    import hashlib

    with open_regular(file) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def video_digest(file: Path) -> str:
    """The digest of sixteen samples and the size: tells one take from another at any size."""
    import hashlib

    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for n in range(16):
            stream.seek(max(0, size - 65536) * n // 15)
            digest.update(stream.read(65536))
    return digest.hexdigest()


# ---- replies: Reply, parse_status, parse_price, choose_model, parse_error, Record, Clip ---------

QUEUED, PROCESSING, FINALIZING = "queued", "processing", "finalizing"
COMPLETE, FAILED = ENDED = ("complete", "failed")
STATES = {
    "queued": QUEUED, "in_queue": QUEUED, "pending": QUEUED,
    "processing": PROCESSING, "in_progress": PROCESSING, "finalizing": FINALIZING,
    "complete": COMPLETE, "completed": COMPLETE, "succeeded": COMPLETE,
    "error": FAILED, "failed": FAILED, "cancelled": FAILED, "canceled": FAILED,
}


class Reply:
    """What came from outside: an answer, an event, a line of the cache. The one place that looks
    into foreign data: a field that is absent or of another type than asked for reads as absent."""

    def __init__(self, values: Any, where: str = "") -> None:
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        self.where = where

    def text(self, *names: str) -> str:
        """The first of some fields that is a text and not blank, else ""."""
        for name in names:
            if isinstance(value := self.values.get(name), str) and value.strip():
                return value
        return ""

    def number(self, *names: str) -> float | None:
        """The first of some fields that is a finite number, else None."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if abs(value) <= sys.float_info.max:
                return value
        return None

    def figure(self, name: str, default: float) -> float:
        """A number, `default` where the field is absent, NaN where it is something else."""
        found, absent = self.number(name), self.values.get(name) is None
        return found if found is not None else default if absent else math.nan

    def flag(self, name: str) -> bool:
        """Whether a field is true."""
        return self.values.get(name) is True

    def part(self, name: str) -> Reply:
        """The object in a field, an empty one where there is none."""
        return Reply(self.values.get(name), self.where)

    def rows(self, name: str) -> list[Reply] | None:
        """The objects in a list, None where the field is no list of objects."""
        rows = self.values.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return None
        return [Reply(row, self.where) for row in rows]

    def texts(self, name: str) -> list[str]:
        """The texts in a list, or the one in place of a list."""
        values = self.values.get(name)
        values = values if isinstance(values, list) else [values]
        return [value for value in values if isinstance(value, str) and value.strip()]

    def must(self, read: Callable[[str], T | None], name: str) -> T:
        """A field that has to be there; raises ApiError that names it."""
        value = read(name)
        if value is None or value == "":
            text = f"Hedra's answer to {self.where} has no {name!r} that could be right; {LATER}"
            raise ApiError(text, ambiguous=True, retryable=True)
        return value


def read_json(text: str | bytes) -> Any:
    """JSON as a value; ValueError also for what is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


class Status(NamedTuple):
    """One look at a generation. `progress` is 0..1; `cost` is what Hedra has billed; `is_of_it`:
    the answer names the generation, and so is no other's and no gateway's."""

    state: str
    progress: float | None = None
    url: str = ""
    asset_id: str = ""
    failure: str = ""
    transient: bool = False
    cost: float | None = None
    is_of_it: bool = False


class Balance(NamedTuple):
    """What an account can spend; `unit` is "credits" or "USD"."""

    remaining: float
    unit: str
    more: dict[str, Any] = {}


class Voice(NamedTuple):
    """Who can speak; `labels` are such as gender, accent, age, language."""

    id: str
    name: str
    labels: dict[str, str] = {}
    preview_url: str = ""


def parse_retry_after(value: str) -> float | None:
    """Seconds to wait from a Retry-After header: a number or an HTTP date, else None."""
    from email.utils import parsedate_to_datetime

    if (seconds := parse_number(value)) is not None:
        return seconds
    if value.isdecimal():  # more digits than a number has
        return math.inf
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def parse_failure(error: Reply, message: str = "") -> tuple[str, bool]:
    """Why a generation failed, in Hedra's words, and whether Hedra says that may pass."""
    code, reason = error.text("type", "code"), error.text("reason_code")
    # gRPC, which the codes are modelled on, calls UNAVAILABLE alone a transient condition.
    transient = "TRANSIENT" in reason or code == "UNAVAILABLE" or error.flag("retryable")
    labels = ", ".join(word for word in (code, reason) if word)
    text = error.text("message") or message or "no reason given"
    return (f"{text} ({labels})" if labels else text), transient


def parse_status(reply: Reply, name: str = "") -> Status:
    """A status reply of either API to who asked for the generation of that name. A word that nobody
    knows counts as work in progress."""
    state = STATES.get(reply.must(reply.text, "status").lower(), PROCESSING)
    progress, failure, cost = reply.number("progress"), ("", False), reply.number("cost")
    if state == FAILED:
        failure = parse_failure(reply.part("error"), reply.text("error", "error_message"))
    return Status(
        state, None if progress is None else min(1.0, max(0.0, progress)),
        reply.text("download_url", "url"), reply.text("asset_id"), *failure,
        None if (cost or 0) < 0 else cost, reply.text("job_id", "id").lower() == name.lower(),
    )


def parse_price(row: Reply, seconds: float, resolution: str, characters: int = 0) -> float | None:
    """Credits by a v2 catalogue entry, or None where it does not tell or cannot be right."""
    pricing, details = row.part("pricing"), row.part("price_details")
    base, rate = pricing.figure("base_cost", 0), pricing.figure("credits_per_second", 0)
    if base or rate:
        factor = pricing.part("modifiers").part("resolution").figure(resolution, 1)
        units = base + rate * seconds
    else:
        per = {"second": seconds, "minute": seconds / 60, "generation": 1, "character": characters}
        count = per.get(details.text("billing_unit").lower().removesuffix("s"), math.nan)
        factor, scale = details.figure("credit_cost", math.nan), details.figure("unit_scale", 1)
        units = count / scale if scale else math.nan
    return math.ceil(cost - 1e-6) if 0 <= (cost := factor * units) < 1e15 else None


def choose_model(rows: Sequence[Reply], asked: str = "") -> Reply:
    """The row that was asked for by id or slug, else Character 3; an empty one for none. Rows once
    had `ai_model_type` and `status`; today's have neither and are told by slug or name."""
    if asked:
        name = asked.lower()
        found = [row for row in rows if name in (row.text("id").lower(), row.text("slug").lower())]
    else:
        active = [row for row in rows if (row.text("status") or "ACTIVE").upper() == "ACTIVE"]
        found = [
            row for name in ("ai_model_type", "slug", "name") for row in active
            if re.search(r"\bcharacter-3$", re.sub(r"[\s_]+", "-", row.text(name).lower()))
            and row.text("id", "slug")
        ]
    return found[0] if found else Reply({})


def error_words(body: Any) -> tuple[Reply, str]:
    """The error object and the words in it, from any of the shapes that Hedra answers with."""
    if isinstance(body, str):  # the page of a proxy
        page = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", body[:20_000], flags=re.DOTALL)
        return Reply({}), " ".join(page.split())[:200]
    reply = Reply(body)
    error = reply.part("error") if reply.part("error").values else reply
    parts = [error.text("message"), reply.text("error"), reply.text("detail")]
    for name in ("details", "detail", "messages"):
        for row in error.rows(name) or reply.rows(name) or ():
            where = row.text("field") or ".".join(row.texts("loc"))
            parts.append(f"{where}: {row.text('message', 'msg')}".removeprefix(": "))
        parts += error.texts(name)
    if (billing := error.part("billing")).values:
        unit = billing.text("currency") or "USD"
        figures = [(name, billing.number(name)) for name in ("balance", "required")]
        parts += [f"{name} {amount(n, unit)}" for name, n in figures if n is not None]
        parts.append(f"{billing.text('reason')} add funds at {billing.text('funding_url')}".strip())
    return error, "; ".join(dict.fromkeys(part for part in parts if part))


HINTS = {  # by the status and the server's words: what a person can do
    "3": "redirects are not followed with a key; check HEDRA_BASE_URL",
    "401": "check HEDRA_API_KEY: a v3 key is id:secret, a v2 key has no colon",
    "402.*available: 0": "with credits on the dashboard set HEDRA_WORKSPACE_ID",
    "402": "add funds and run the same command again",
    "403.*scope": "make a key with that scope in Hedra's developer console",
    "403.*plan": "the plan of this account has no API access: change it at Hedra",
    "403": "if the account has moved to the new API, make a key with a colon (id:secret) there",
    "404.*model": "check --model, --speech-model and HEDRA_MODEL_ID",
    "413": "the file is too large for Hedra",
    "408|425|429|[5-9]": LATER,
}


def parse_error(status: int, headers: Mapping[str, str], text: str, where: str) -> ApiError:
    """An error answer as an exception that carries Hedra's own words."""
    try:
        body = read_json(text)
    except ValueError:
        body = text
    error, words = error_words(body)
    code, after = error.text("error_code", "code"), error.number("retry_after")
    after = parse_retry_after(headers.get("Retry-After", "")) if after is None else max(0.0, after)
    broke = status == 402 or code in ("MISSING_CREDITS", "INSUFFICIENT_BALANCE")
    said = f"Hedra answered {status} to {where}: {words or 'no reason given'}"
    if trace := Reply(body).text("trace_id"):
        said += f" [trace id {trace}]"
    case = f"{402 if broke and status >= 400 else status} {words.lower()}"
    hints = [hint for pattern, hint in HINTS.items() if re.match(pattern, case, re.DOTALL)][:1]
    return (RateLimited if status == 429 else OutOfCredits if broke else ApiError)(
        "; ".join([said, *hints]), status=status, code=code, words=words, trace_id=trace,
        retry_after=after, is_of_all=broke or status == 401,
        # What a gateway says, in words of its own, leaves open what Hedra did.
        ambiguous=not (isinstance(body, dict) and 400 <= status < 500) or status in (408, 409),
        # A 5xx is worth another try whatever it says of itself: the document's own example of a
        # 500 says that it is not, and the page of a proxy says nothing.
        retryable=status in (408, 425, 429) or status >= 500 or error.flag("retryable"),
        # One that was used already is no reason to send it elsewhere.
        names_key="idempotency_key" in f"{words} {error.text('param')}" and "already" not in words,
    )


def publish(draft: Path, target: Path, *, sync: bool = True) -> None:
    """Rename a finished file to its place; with `sync` a power cut spares it. Raises OSError."""
    for path in (draft, target.parent):
        if path == target.parent:
            os.replace(draft, target)
        if sync:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class Record(Reply):
    """A small JSON file, readable by a person; only the owner of its lock may save it."""

    def __init__(self, name: str | Path = "", values: Any = None) -> None:
        super().__init__(values, str(name))
        self.lock = threading.Lock()

    @functools.cached_property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.where)

    def save(self, *, sync: bool = False, **changes: Any) -> None:
        """Change some values in one step: who reads it sees the old text or the new; with `sync` a
        power cut spares them. Raises OSError that names the file."""
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.{threading.get_ident()}")
        with self.lock:
            self.values.update(changes)
            text = json.dumps(self.values, indent=1, ensure_ascii=False) + "\n"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # In JSON such an escape stands for the bytes of a file name that are no UTF-8.
                draft.write_bytes(text.encode("utf-8", "backslashreplace"))
                publish(draft, self.path, sync=sync)
            except OSError as error:
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)
                raise OSError(error.errno, error.strerror, str(self.path)) from error


def reserved_id(key: str, take: str) -> str:
    """The id that a take of a clip is submitted under: it follows from the clip, so that even a
    lost ledger finds the generation."""
    import uuid

    return str(uuid.UUID(hex=digest_of(key, take), version=5))


# What a clip needs, as Studio.judge finds.
NEW, DOUBT, FLIGHT, FETCH = "new", "in doubt", "in flight", "done, to be fetched"
REFUSED, DONE, BAD = "refused", "done", "bad"
OPEN = (NEW, DOUBT)  # may still have to be paid


def open_parts(clips: Iterable[Clip]) -> list[Clip]:
    """What is still to be paid for some clips, each once: some may be alike, or say the same."""
    parts = {part.key: part for clip in clips if clip.state in OPEN for part in clip.parts}
    return [part for part in parts.values() if part.state in OPEN]


class Clip:
    """A video, or the speech of one, that is to be made, and all that is known of it from the plan
    to the report; both APIs put it into their words. A video has a recording in `audio`, or a
    `speech`, which is a clip of its own whose prompt is the text."""

    kind, prompt, voice, resolution, aspect_ratio = VIDEO, "", "", "540p", "9:16"
    audio = image = Path()
    speech: Clip | None = None
    settings: Mapping[str, Any] = {}
    portrait = recording = Media()
    model = Reply({})  # an entry of the catalogue
    state = NEW
    looked = 0.0  # when its files were looked at: the video's time, so that a later file is newer
    key = other_key = found = ""  # by which the ledger has it; the id that Hedra has it under
    past: Collection[str] = ()  # what Hedra calls the takes that the ledger knew at the last look
    price: float | None = None
    billed: float | None = None
    error: Exception | None = None
    paid, warning, spent_s = False, "", 0.0
    shown = note = ""  # in its line of the View; `share` is how far it is in its state, 0..1
    share: float | None = None
    sending = 0  # bytes, of the files that are going up

    def __init__(self, name: str, target: Path, **wishes: Any) -> None:
        self.name, self.target, self.effort = name, target, dict[str, float]()
        self.record = Record()  # of its take
        self.__dict__.update(wishes)

    @functools.cached_property
    def place(self) -> str:
        """The target as an absolute path."""
        return os.path.abspath(self.target)

    @property
    def reserved(self) -> str:
        """What its take is submitted as: generation id (v2) or idempotency key (v3)."""
        record = self.record
        return reserved_id(self.key, record.text("take")) if self.key else record.text("reserved")

    @property
    def generation_id(self) -> str:
        """What Hedra calls it, "" before it does."""
        return self.record.text("generation_id")

    @property
    def digests(self) -> set[str]:
        """Of its take's results, wherever they came to."""
        videos = self.record.part("videos")
        return {*map(videos.text, videos.values)} - {""}

    @property
    def seconds(self) -> float | None:
        """How long it will be, None where nobody knows; see `is_estimate`."""
        if (asked := Reply(self.settings).number("duration_ms")) is not None:
            return asked / 1000
        spoken = (self.speech or self).prompt
        return len(spoken) / CHARS_PER_S if self.is_estimate else self.recording.seconds

    @property
    def is_estimate(self) -> bool:
        """Whether its length, and so its price, is known only when its speech is there."""
        unheard = bool(self.speech) and self.recording.seconds is None
        return self.kind == SPEECH or (unheard and "duration_ms" not in self.settings)

    @property
    def parts(self) -> list[Clip]:
        """Its speech, if it has one, and itself."""
        return [self.speech, self] if self.speech else [self]

    @property
    def due(self) -> float | None:
        """What is still to be paid by its quote: 0 where it is paid, None where nobody knows."""
        return total(part.price for part in open_parts([self]))

    def bill(self) -> tuple[bool, float | None, float | None]:
        """Whether this very run paid for it, what was quoted, and what Hedra has billed."""
        if paid := [part for part in self.parts if part.paid]:
            return True, total(part.price for part in paid), total(part.billed for part in paid)
        if self.error and self.state in OPEN:  # nothing was paid yet
            return False, self.due, None
        return False, self.record.number("price"), self.record.number("billed", "cost")

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add to the seconds spent on `what`."""
        before, name = time.monotonic(), f"{what}_s"
        try:
            yield
        finally:
            spent_s = self.effort.get(name, 0.0) + time.monotonic() - before
            self.effort[name] = round(spent_s, 3)


# ---- retry: retry, backoff_s --------------------------------------------------------------------

Sleep = Callable[[float], object]
Advance = Callable[[int], object]  # told of bytes that have moved
Headers = Mapping[str, str]


def backoff_s(failures: int, base: float, factor: float = 2.0, cap: float = 30.0) -> float:
    """Seconds, at random (full jitter): what failed together does not come back together."""
    import random

    return random.uniform(0.0, min(cap, base * factor ** min(failures, 60)))


def retry(
    exceptions: type[BaseException] | tuple[type[BaseException], ...], tries: int = 3,
    delay: float = 2, backoff: float = 2, *, max_delay: float = 30.0,
    max_retry_after: float = LONGEST_RETRY_AFTER_S, sleep: Sleep | None = None,
    on_retry: Callable[[Any, float], object] = lambda error, wait_s: None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: call again, up to `tries` times in all, when one of `exceptions` is raised, at
    a random time of up to min(max_delay, delay * backoff ** n) seconds, or after what its
    `retry_after` asks for. Raised at once: the last one, one whose `retryable` is False, and one
    whose `retry_after` is over `max_retry_after` seconds."""
    if tries < 1:
        raise ValueError("tries must be at least 1")

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            for failures in range(tries - 1):
                try:
                    return function(*args, **kwargs)
                except exceptions as error:
                    after = getattr(error, "retry_after", None)
                    if not getattr(error, "retryable", True) or (after or 0) > max_retry_after:
                        raise
                    wait_s = after or backoff_s(failures, delay, backoff, max_delay)
                    on_retry(error, wait_s)
                (sleep or time.sleep)(wait_s)
            return function(*args, **kwargs)

        return wrapper

    return decorate


# ---- transport: Pace, Transport, iter_polls -----------------------------------------------------

# What holds for the work of one thread: until when (time.monotonic), and its effort; until when
# (kernel_s) its answer has to come; what holds it up: Hedra's last words, if those were a refusal,
# or another process.
DEADLINE: ContextVar[float] = ContextVar("deadline", default=math.inf)
EFFORT: ContextVar[dict[str, float]] = ContextVar("effort", default={})  # noqa: B039
DUE: ContextVar[float] = ContextVar("due")
REFUSAL: ContextVar[str] = ContextVar("refusal", default="")


class Pace:
    """When requests may go out: none in the pause after a refusal, and then not all at once."""

    until, pause_s = -math.inf, 0.5
    sent = 0  # since the last pause

    def turn(self) -> float:
        """Seconds to wait until a request may go out: who waits comes back at random, spread over
        half as long again."""
        if (left_s := self.until - time.monotonic()) > 0:
            return left_s + backoff_s(0, self.pause_s / 2)
        self.sent += 1
        return 0.0

    def refused(self, error: HedraError) -> None:
        """Too fast: a pause for all; where Hedra does not say how long, the next one is longer if
        hardly anything went out after the last one."""
        now = time.monotonic()
        if now < self.until:
            return  # the echo of a burst that was answered for
        again, self.sent = self.sent < 4, 0
        self.pause_s = error.retry_after or (min(30.0, 2 * self.pause_s) if again else 1.0)
        self.until = now + self.pause_s


@contextlib.contextmanager
def faults(where: str, silence_s: float, proxy: str = "", ours: bool = True) -> Iterator[None]:
    """What becomes of a request without an answer: an ApiError to retry or to look into."""
    from urllib3 import exceptions as u

    try:
        yield
    except u.HTTPError as error:
        cause = getattr(error, "original_error", error)
        cause = [cause, *cause.args][-1]
        if isinstance(cause, HedraError):  # raised in the body that was being sent
            raise cause from None
        untrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
        unsent = untrusted or isinstance(error, u.ProxyError | u.ConnectTimeoutError)
        why, how = str(cause).rpartition(": ")[2], LATER
        barred = proxy and unsent and re.match(r"40[37]\b", why)
        if untrusted:
            why, how = f"its certificate is not trusted ({error})", "see SSL_CERT_FILE"
        elif barred:  # to try again would only lock somebody out
            why, how = f"the proxy {proxy} refuses ({why})", "check the login in HTTPS_PROXY"
        elif unsent:
            what, why = f"proxy {proxy}" if proxy else "server", why or "it keeps silent"
            why = f"the {what} cannot be reached ({why})"
        elif isinstance(error, u.TimeoutError):
            why = f"it did not come within {silence_s:.3g} s or the time given"
        text, away = f"no answer to {where}: {why}; {how}", unsent and ours
        raise ApiError(
            text, retryable=not (barred or untrusted), ambiguous=not unsent, is_of_all=away
        ) from None


def kernel_s() -> float:
    """The time by which sockets count."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class Line(io.RawIOBase):
    """What comes over a socket, by the moment DUE: the socket's own time-out would begin anew with
    every byte."""

    def __init__(self, sock: Any, stream: Any) -> None:
        self.sock, self.stream = sock, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        if (left_s := DUE.get() - kernel_s()) <= 0:
            raise TimeoutError
        self.sock.settimeout(left_s)
        return self.stream.raw.readinto(buffer)

    def close(self) -> None:
        self.stream.close()
        super().close()


def bounded(pools: Any, silence_s: float) -> Any:
    """A class of urllib3's pools whose answers come in time, from their first byte on."""
    from http.client import HTTPException, HTTPResponse
    from queue import LifoQueue

    from urllib3.exceptions import ProxyError

    def answer(sock: Any, *words: Any, **more: Any) -> HTTPResponse:
        response = HTTPResponse(sock, *words, **more)
        response.fp = io.BufferedReader(Line(sock, response.fp))
        return response

    class Bounded(pools.ConnectionCls):  # type: ignore[misc]
        response_class = staticmethod(answer)

        def send(self, data: Any) -> None:
            if self.sock:  # not that of connecting: an uplink may be slow
                self.sock.settimeout(silence_s)
            super().send(data)

        def _tunnel(self) -> None:
            DUE.set(kernel_s() + self.timeout)
            try:
                super()._tunnel()
            except (OSError, HTTPException) as error:
                raise ProxyError("no way through it", error) from error

        def getresponse(self) -> Any:
            DUE.set(kernel_s() + self.timeout)
            return super().getresponse()

    # For idle connections, however many: urllib3 fills a queue of a size with as many placeholders.
    idle: Any = staticmethod(lambda size: LifoQueue())
    return type("Pool", (pools,), {"ConnectionCls": Bounded, "QueueCls": idle})


class Transport:
    """One account's way to Hedra, safe for threads; every fault comes out as an ApiError."""

    def __init__(self, account: Account, stop: threading.Event | None = None) -> None:
        self.account, self.pools = account, dict[str, tuple[Any, str]]()
        self.pace, self.stop = Pace(), stop or threading.Event()
        self.waiting = set[str]()  # generations whose end is waited for

    def left_s(self) -> float:
        """Seconds until this thread's deadline."""
        return DEADLINE.get() - time.monotonic()

    def put_off(self) -> None:
        """Give what this thread receives as long again as an answer may keep silent."""
        DUE.set(kernel_s() + min(self.account.silence_s, self.left_s()))

    def longest_s(self) -> float:
        """The longest wait that Hedra may ask for."""
        return min(self.left_s(), 1e6) if DEADLINE.get() < math.inf else LONGEST_RETRY_AFTER_S

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond the deadline; raises Stopped where the program ends meanwhile."""
        if self.left_s() <= 0:
            said = f" (before that: {REFUSAL.get()})" * bool(REFUSAL.get())
            raise StillRunning(f"the time given is over{said}; {LATER}", words=REFUSAL.get())
        if self.stop.wait(max(0.0, min(seconds, self.left_s(), 1e6))):
            raise Stopped("the program was stopped; the next start takes this clip up")

    @contextlib.contextmanager
    def until(self, deadline: float, effort: dict[str, float] | None = None) -> Iterator[None]:
        """Hold this thread's requests and waits to a deadline (time.monotonic)."""
        before, old = DEADLINE.get(), EFFORT.get()
        DEADLINE.set(min(before, deadline))
        EFFORT.set(old if effort is None else effort)
        try:
            yield
        finally:  # a deadline that was put off while waiting for a place stays so
            DEADLINE.set(max(before, DEADLINE.get()))
            EFFORT.set(old)

    def together(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """Make two calls at once, both held to this thread's deadline."""
        try:
            from concurrent.futures import ThreadPoolExecutor

            pool = ThreadPoolExecutor(1)
            other = pool.submit(copy_context().run, second)
        except RuntimeError:  # no thread is to be had, as at the end of an interpreter
            return first(), second()
        with pool:
            return first(), other.result()

    def count(self, what: str, number: int = 1) -> None:
        """Add to this thread's effort."""
        EFFORT.get()[what] = EFFORT.get().get(what, 0) + number

    def pool(self, url: str) -> tuple[Any, str]:
        """The connection pool to an address's host, and the proxy that the environment named for it
        at first, "" for none. Plain http stays on this machine, and would show a proxy the key."""
        from urllib.request import getproxies, proxy_bypass

        parts = urlsplit(url)
        if found := self.pools.get(parts.netloc):
            return found
        named, proxy, urllib3 = "", "", need("urllib3")
        if parts.scheme == "https" and not proxy_bypass(parts.netloc):
            proxies = getproxies()
            named = (proxies.get("https") or proxies.get("all") or "").strip()
        try:
            pool = urllib3.PoolManager(retries=False)
            if named:
                at = urllib3.util.parse_url(named if "://" in named else f"http://{named}")
                proxy = f"{at.scheme}://{at.netloc}" if at.host else ""
                login = at.auth and unquote(at.auth)
                secret = urllib3.make_headers(proxy_basic_auth=login)
                pool = urllib3.ProxyManager(proxy, proxy_headers=secret, retries=False)
        except ValueError:
            text = f"the proxy {proxy or 'of HTTPS_PROXY'} is no http or https address"
            raise InputError(text) from None
        kinds = pool.pool_classes_by_scheme.items()
        pool.pool_classes_by_scheme = {
            scheme: bounded(pools, self.account.silence_s) for scheme, pools in kinds
        }
        return self.pools.setdefault(parts.netloc, (pool, proxy))

    def send(
        self, method: str, url: str, headers: Headers, body: Any = None, silence_s: float = 0.0
    ) -> urllib3.BaseHTTPResponse:
        """One request; the answer, its body unread. A redirect would take the key elsewhere."""
        (pool, proxy), silence_s = self.pool(url), silence_s or self.account.silence_s
        left_s = max(0.1, self.left_s())
        if method == "GET":  # which nothing is lost by
            silence_s = min(silence_s, left_s)
        self.count("requests")
        where, ours = f"{method} {urlsplit(url).netloc}{urlsplit(url).path}", self.account.base_url
        headers = {"User-Agent": f"hedra_avatar/{__version__}", **headers}
        connect_s = min(CONNECT_TIMEOUT_S, silence_s, left_s)
        limits = need("urllib3").Timeout(connect=connect_s, read=silence_s)
        with faults(where, silence_s, proxy, url.startswith(ours)):  # else it is a file's host
            response: urllib3.BaseHTTPResponse = pool.request(
                method, url, body=body, headers=headers, timeout=limits, preload_content=False,
                redirect=False,
            )
        if response.status < 200:  # the answer itself is still to come, and not to the next one
            response.close()
            text = f"{where}: {response.status} is no final answer; {LATER}"
            raise ApiError(text, ambiguous=True, retryable=True)
        return response

    def open(
        self, method: str, path: str, headers: Headers, body: Any = None, silence_s: float = 0.0
    ) -> urllib3.BaseHTTPResponse:
        """One request to the API, with the key; raises ApiError for any answer but 2xx."""
        key, where = self.account.key, f"{method} {path}".split("?")[0]
        mine = {"Authorization": f"Bearer {key}"} if ":" in key else {"X-API-Key": key}
        self.sleep(0.0)  # raises where the time is over
        while (wait_s := self.pace.turn()) > 0:
            self.sleep(wait_s)
        headers = {"Accept": "application/json", **mine, **headers}
        response = self.send(method, self.account.base_url + path, headers, body, silence_s)
        REFUSAL.set("")
        if 200 <= response.status < 300:
            return response
        text = ""
        with contextlib.suppress(ApiError):  # a body that is cut takes nothing from the status
            text = self.text(response, where)
        error = parse_error(response.status, response.headers, text, where)
        REFUSAL.set(error.words or f"status {error.status}")
        raise error

    def blocks(self, response: urllib3.BaseHTTPResponse, where: str) -> Iterator[bytes]:
        """The body of an answer as it arrives, by the moment DUE, which is that of its header until
        somebody puts it off; at the body's own end its connection is back in the pool by then."""
        try:
            with faults(where, self.account.silence_s):
                while block := response.read1(BLOCK_BYTES, decode_content=False):
                    self.count("bytes_down", len(block))
                    yield block
        finally:
            response.close()

    def text(self, response: urllib3.BaseHTTPResponse, where: str) -> str:
        """The whole body, without the key should the server echo it; raises ApiError."""
        body = bytearray()
        for block in self.blocks(response, where):
            body += block
            if (size := len(body)) > ANSWER_BYTES:
                text = f"Hedra's answer to {where} is too long: {size:,} bytes so far; {LATER}"
                raise ApiError(text, ambiguous=True)
        text = body.decode("utf-8", "replace")
        for secret in (self.account.key, self.account.key.partition(":")[2]):
            text = text.replace(secret, "[key]") if len(secret) > 3 else text
        return text

    def api(self, method: str, path: str, body: Any = None, more: Headers | None = None) -> Reply:
        """One API request: a dict goes out as JSON, JSON comes back; a list as the field "rows"."""
        headers, where = more or {}, f"{method} {path}".split("?")[0]
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
        text = self.text(self.open(method, path, headers, body), where)
        try:
            value = read_json(text)
        except ValueError:
            text = f"Hedra's answer to {where} is no JSON: {error_words(text)[1][:80]!r}; {LATER}"
            raise ApiError(text, retryable=True, ambiguous=True) from None
        return Reply({"rows": value} if isinstance(value, list) else value, where)

    def before_retry(self, error: HedraError, wait_s: float, until: float = math.inf) -> None:
        """Raise an error again where there is no time for another try; after a refusal for rate
        there is a pause for all."""
        if wait_s >= self.longest_s() or time.monotonic() + wait_s > until:
            raise error
        self.count("retries")
        if isinstance(error, RateLimited):
            self.pace.refused(error)

    def repeat(self, attempt: Callable[[], T], tries: int = TRIES, delay: float = 1.0) -> T:
        """Repeat a harmless request: a few times after faults, patiently while refused for rate."""
        until = time.monotonic() + self.longest_s()

        before_retry = functools.partial(self.before_retry, until=until)
        again = functools.partial(
            retry, max_retry_after=math.inf, max_delay=10.0, sleep=self.sleep, on_retry=before_retry
        )
        # Who is refused waits for the pace with all others, and not ahead of them.
        patient = again(RateLimited, 1_000_000, 0, sleep=lambda wait_s: None)(attempt)
        return again(ApiError, tries, delay)(patient)()

    def call(self, method: str, path: str, body: Any = None) -> Reply:
        """An API request that may be repeated without harm."""
        return self.repeat(lambda: self.api(method, path, body))

    def upload(self, path: str, file: Path, advance: Advance) -> Reply:
        """Send a file as the multipart field `file`, streamed and with an exact length."""
        with open_regular(file) as stream:
            size, sent = os.fstat(stream.fileno()).st_size, 0
            kind = sniff(stream.read(16), "") or "application/octet-stream"
            # The name in it is ours: a file's own may break a header.
            empty = {"file": (f"file.{kind.rpartition('/')[2]}", b"", kind)}
            form, kind = need("urllib3").encode_multipart_formdata(empty)
            opening, mark, closing = form.rpartition(b"\r\n--")  # before it the bytes belong
            headers = {"Content-Type": kind, "Content-Length": str(len(form) + size)}

            def body() -> Iterator[bytes]:
                nonlocal sent
                advance(-sent)
                sent = stream.seek(0)
                yield opening
                while block := stream.read(min(PIECE_BYTES, size - sent)):
                    yield block
                    sent += len(block)
                    self.count("bytes_up", len(block))
                    advance(len(block))
                    self.sleep(0.0)  # raises where the time is over
                if sent < size:
                    raise InputError(f"{file} shrank while it was sent; run it again")
                yield mark + closing

            return self.repeat(lambda: self.api("POST", path, body(), headers))

    def fetch(self, url: str, headers: Headers) -> urllib3.BaseHTTPResponse:
        """GET a file from another host: without the key, and only over an encrypted line."""
        target, headers = "", {"Accept-Encoding": "identity", **headers}
        for _ in range(5):
            try:
                url = urljoin(url, target)
                clean_url(url)
            except (InputError, ValueError) as error:  # a fresh address may be another
                raise ApiError(f"{error}; {LATER}", retryable=True, code="ADDRESS") from None
            self.sleep(0.0)  # raises where the time is over
            response = self.send("GET", url, headers)
            target = response.headers.get("Location", "")
            if response.status not in (301, 302, 303, 307, 308) or not target:
                return response
            response.close()
        raise ApiError(f"the result's address redirects in a circle; {LATER}", retryable=True)


def iter_polls(api: Api, name: str, interval_s: float, grace_s: float) -> Iterator[Status]:
    """Looks at a generation until it has ended: it is paid for, so failed polls are only that, and
    a 404 within `grace_s` means "not yet". Raises StillRunning at the thread's deadline."""
    started, http = time.monotonic(), api.http

    def look() -> Status:
        try:
            return api.look(name)
        except ApiError as error:
            # The page of a gateway is no word of Hedra's, but 401 and 402 may well be meant.
            by_other = error.ambiguous and error.status in (400, *range(403, 500))
            early = error.status == 404 and time.monotonic() - started < grace_s
            error.retryable |= by_other or early
            raise

    while True:
        status = http.repeat(look, tries=POLL_TRIES, delay=0.5)
        yield status
        if status.state in ENDED:
            return
        # All share the pace, and a poll costs two milliseconds of a processor.
        http.sleep(max(interval_s, len(http.waiting) * 0.02))


# ---- web API v2: WebApi -------------------------------------------------------------------------

UUID_SHAPE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
in_path = functools.partial(quote, safe="", errors="replace")  # an id as a part of an address
in_query = functools.partial(urlencode, errors="replace")


class WebApi:
    """Hedra's web API, v2: assets, generations named by an id of ours, credits."""

    unit = "credits"
    replays = False  # a lost submit is looked for, before another
    default_model = "together/hedra-character-3"  # what the catalogue calls it today
    default_speech_model = ""  # the server's own
    speech_limits: Mapping[str, int] = {"": 5_000}  # characters; documented nowhere

    def __init__(self, http: Transport) -> None:
        self.http, workspace = http, http.account.workspace
        self.mine = {"workspace_id": workspace} if workspace else {}

    def create_asset(self, name: str, kind: Kind) -> str:
        """Make the record that a file is uploaded to; its id."""
        reply = self.http.call("POST", "/assets", {"name": name, "type": kind, **self.mine})
        return reply.must(reply.text, "id")

    def upload_asset(self, asset_id: str, file: Path, advance: Advance) -> None:
        """Send the bytes of an asset."""
        try:
            self.http.upload(f"/assets/{in_path(asset_id)}/upload", file, advance)
        except ApiError as error:
            if error.status != 409:  # it has the bytes from a try whose answer was lost
                raise

    def upload(self, file: Path, kind: Kind, advance: Advance) -> tuple[str, float]:
        """Hand a file to Hedra; what a submit names it by, and when that lapses (by the epoch)."""
        name = file.name.encode("utf-8", "replace").decode()[:255]
        asset_id = self.create_asset(name, kind)
        self.upload_asset(asset_id, file, advance)
        return asset_id, 1e10

    def canonical(self, asked: str) -> str:
        """The name that a model goes by in a clip's key."""
        mine = ("", "d1dd37a3-e39a-4854-a298-6510289f9cf2")
        return self.default_model if asked.lower() in mine else asked

    def model(
        self, asked: str = "", kind: str = VIDEO, *, max_age_s: float = math.inf,
        known_only: bool = False,
    ) -> Reply:
        """The catalogue's entry of the model asked for, or of Character 3 (or what speaks): as
        remembered in `.cache/model_id`, else (but not if `known_only`) looked up and, if it can be
        right, remembered. What is not listed has just a name: the submit has the last word."""
        memo = Record(self.http.account.cache / "model_id")
        with contextlib.suppress(OSError, ValueError):
            memo = Record(memo.path, read_json(memo.path.read_bytes()))
        name = " ".join(filter(None, (self.http.account.id, kind.replace(VIDEO, ""), asked)))
        row, at = memo.part(name).part("model"), memo.part(name).number("at") or -math.inf
        row.values |= row.part("price").values  # as the first version had it
        if row.text("id", "slug") and time.time() - at < max_age_s:
            return row
        if known_only or not (model := self.listed(asked, kind)).values:
            return Reply({"id" if UUID_SHAPE.fullmatch(asked) else "slug": asked})
        # A row of the old kind has no prices at all; one whose prices make none is wrong.
        bare = not model.values.keys() & {"pricing", "price_details"}
        if model.text("id", "slug") and (bare or parse_price(model, 1.0, "540p") is not None):
            memo.values[name] = {"at": int(time.time()), "model": model.values}
            with contextlib.suppress(OSError):  # the cache of another user of the group
                memo.save()
        return model

    def listed(self, asked: str, kind: str) -> Reply:
        """The same from the catalogue, empty for what it does not list; of speech the first that
        speaks, without a name, as the server chooses."""
        reply = self.http.call("GET", "/models")
        rows = reply.must(reply.rows, "rows")
        if kind == SPEECH and not asked:
            spoken = [row.values for row in rows if row.text("type") == "text_to_speech"]
            return Reply({**spoken[0], "id": "", "slug": ""} if spoken else {})
        if (model := choose_model(rows, asked)).values or asked:
            return model
        fit = [row.text("slug", "id") for row in rows if row.flag("requires_audio_input")]
        text = "this account has no Character 3 model; set HEDRA_MODEL_ID (or give --model) to one"
        raise HedraError(f"{text} that takes audio: {', '.join(fit) or 'none'}")

    def body(self, clip: Clip) -> dict[str, Any]:
        """A clip in the words of this API."""
        if clip.kind == SPEECH:
            body: dict[str, Any] = {"voice_id": clip.voice, "text": clip.prompt}
            body["type"] = "text_to_speech"
        else:  # no duration_ms, unless it was asked for: it follows the audio, and is billed so
            image, audio = clip.record.text("image"), clip.record.text("audio")
            shape = {"resolution": clip.resolution, "aspect_ratio": clip.aspect_ratio}
            wishes = {"text_prompt": clip.prompt, **shape, **clip.settings}
            body = {"type": "video", "start_keyframe_id": image, "audio_id": audio}
            body["generated_video_inputs"] = wishes
        name, of_id = clip.model.text("slug", "id"), "model_slug"
        if UUID_SHAPE.fullmatch(name):
            of_id = "model_id" if clip.kind == SPEECH else "ai_model_id"
        named = {of_id: name, "generation_id": clip.reserved}
        return {**body, **self.mine, **{field: value for field, value in named.items() if value}}

    def submit(self, clip: Clip) -> str:
        """Start, and pay for, a generation; its id. One request, never repeated here."""
        reply = self.http.api("POST", "/generations", self.body(clip))
        return reply.must(reply.text, "id")

    def look(self, generation_id: str) -> Status:
        """One look at a generation."""
        path = f"/generations/{in_path(generation_id)}/status"
        return parse_status(self.http.api("GET", path), generation_id)

    def find(self, clip: Clip, *, far: bool = True) -> str:
        """The id of the generation that was submitted as `reserved` or, as a server may have
        ignored that, of the take's own recording or text; "" for none. `far` back, as the clock of
        that day may have been wrong."""
        try:
            self.http.repeat(lambda: self.look(clip.reserved))
            return clip.reserved
        except ApiError as error:
            if error.status != 404 or error.ambiguous:
                raise
        speech, since = clip.kind == SPEECH, clip.record.number("submitted_at") or 0.0
        after = time.gmtime(max(0.0, min(since, time.time()) - (30 if far else 1) * 86400))
        query = {"created_after": time.strftime("%Y-%m-%dT%H:%M:%SZ", after)}
        for row in self.iter_rows(type="text_to_speech" if speech else "video", **query):
            made = row.part("input")
            said = made.text("text") == clip.prompt and made.text("voice_id") == clip.voice
            said &= row.text("id") not in {*clip.past} - {clip.generation_id}
            said &= clip.model.text("slug") in ("", made.text("model_slug"))
            if said if speech else clip.record.text("audio") in made.texts("audio_id"):
                return row.text("id")
        return ""

    def find_all(self, ids: Sequence[str]) -> dict[str, float | None]:
        """Which of many ids exist, and what Hedra has billed for each: a few requests."""
        found, wanted = dict[str, float | None](), set(ids)
        for start in range(0, len(ids), 50):
            for row in self.iter_rows(ids=",".join(ids[start : start + 50])):
                found[row.text("id")] = row.number("credit_cost")
        return {name: cost for name, cost in found.items() if name in wanted}

    def iter_rows(self, **query: str) -> Iterator[Reply]:
        """The list of generations. That one is not in it is known if every row tells its id."""
        seen: set[str] = set()
        while True:
            page = {**query, "limit": "100", "offset": str(len(seen))}
            reply = self.http.call("GET", f"/generations?{in_query(page)}")
            rows = {row.must(row.text, "id"): row for row in reply.must(reply.rows, "data")}
            fresh = rows.keys() - seen
            yield from (row for name, row in rows.items() if name in fresh)
            seen |= fresh
            if not fresh or len(rows) < 100:
                return

    iter_status = iter_polls

    def result(self, generation_id: str, kind: str = VIDEO) -> Status:
        """A fresh address of the result: from the status or, where that has none, the asset."""
        status = self.http.repeat(lambda: self.look(generation_id))
        if status.url or not status.asset_id:
            return status
        query = {"type": "audio" if kind == SPEECH else "video", "ids": status.asset_id}
        for row in self.http.call("GET", f"/assets?{in_query(query)}").rows("rows") or ():
            if row.text("id") == status.asset_id:
                return status._replace(url=row.part("asset").text("download_url", "url"))
        return status

    def price(self, clip: Clip) -> float | None:
        """Credits by the catalogue, None where it does not tell. [Bills have run 17 % over it.]"""
        seconds = math.nan if clip.seconds is None else clip.seconds
        return parse_price(clip.model, seconds, clip.resolution, len(clip.prompt))

    def balance(self) -> Balance:
        """What is left, of the workspace where one is set."""
        reply = self.http.call("GET", "/billing/credits")
        left = reply.must(reply.number, "remaining")
        pool = reply.part("workspace_credit_pool").part(self.http.account.workspace)
        if pool.values:
            left = pool.must(pool.number, "available")
        names = [name for name in ("used", "expiring") if name in reply.values]
        return Balance(left, self.unit, {name: reply.number(name) for name in names})

    def voices(self, model: str) -> list[Voice]:
        """Who can speak."""
        reply, voices = self.http.call("GET", "/voices"), list[Voice]()
        for row in reply.must(reply.rows, "rows"):
            asset = row.part("asset")
            pairs = [(pair.text("name"), pair.text("value")) for pair in asset.rows("labels") or ()]
            labels = {name: value for name, value in pairs if name}
            named = row.must(row.text, "id"), row.text("name")
            voices.append(Voice(*named, labels, asset.text("preview_url")))
        return voices


# ---- jobs API v3: JobsApi, iter_events ----------------------------------------------------------

FIRST_FRAME_S = 10.0  # a stream silent from its start is being buffered by somebody


def iter_events(blocks: Iterable[bytes]) -> Iterator[tuple[str, str, str]]:
    """Server-sent events (name, data, id) from a body in arbitrary pieces (WHATWG HTML, 9.2.6). One
    that is cut before its blank line is dropped, one longer than EVENT_BYTES is the end."""
    buffer, size, last_id, frame = b"", 0, "", dict[str, list[str]]()
    for block in blocks:
        *lines, buffer = re.split(rb"\r\n|\n|\r(?!$)", buffer + block)
        for line in lines:
            if line:
                key, _, value = line.decode("utf-8", "replace").partition(":")
                frame.setdefault(key, []).append(value.removeprefix(" "))
                size += len(line)
                continue
            last_id = frame.get("id", [last_id])[-1]
            name, data = frame.get("event", [""])[-1], frame.get("data", [])
            if name or data:
                yield name or "message", "\n".join(data), last_id
            frame, size = {}, 0
        if size + len(buffer) > EVENT_BYTES:
            return


class JobsApi:
    """Hedra's jobs API, v3: file handles that lapse, jobs named by an idempotency key, dollars."""

    unit = "USD"
    replays = True  # a submit with the same idempotency key is the look: it replays the first
    default_model = "hedra-character-3"
    default_speech_model = "elevenlabs-multilingual-v2"
    speech_limits: Mapping[str, int] = {
        "": 40_000, "elevenlabs-v3": 5_000, "elevenlabs-multilingual-v2": 10_000,
        "elevenlabs-flash-v2": 30_000, "elevenlabs-flash-multilingual-v2": 40_000,
    }

    def __init__(self, http: Transport) -> None:
        self.http, self.key_in_body = http, True
        self.quoted = dict[str, float]()  # by what was asked

    def create_asset(self, *args: object) -> NoReturn:
        """The jobs API has no such step; always raises InputError."""
        text = "create_asset and upload_asset are of the web API (v2), and this key of the jobs API"
        raise InputError(f"{text} (v3): call upload(file, kind, api_key), which serves both")

    upload_asset = create_asset

    def upload(self, file: Path, kind: Kind, advance: Advance) -> tuple[str, float]:
        """Hand a file to Hedra; its handle, and when that lapses: an hour later."""
        import datetime

        reply, lapses = self.http.upload("/files", file, advance), time.time() + 3600
        with contextlib.suppress(ValueError, OverflowError):  # an instant of ISO 8601, with a zone
            lapses = datetime.datetime.fromisoformat(reply.text("expires_at")).timestamp()
        return reply.must(reply.text, "url"), lapses

    def canonical(self, asked: str) -> str:
        """The name that a model goes by in a clip's key. A v2 slug ends in the v3 id."""
        return asked.rpartition("/")[2] or self.default_model

    def model(self, asked: str = "", kind: str = VIDEO, **_: object) -> Reply:
        """The model asked for, or Character 3 (or the one that speaks): needs no look."""
        default = self.default_speech_model if kind == SPEECH else self.default_model
        name, limits = asked.rpartition("/")[2] or default, dict[str, Any]()
        if name.startswith("hedra-"):
            limits = {"resolutions": [*RESOLUTIONS], "aspect_ratios": [*ASPECT_RATIOS]}
            limits["max_duration_ms"] = MAX_SECONDS * 1000
        return Reply({"id": name, **limits})

    def body(self, clip: Clip) -> dict[str, Any]:
        """A clip in the words of this API, without its files."""
        if clip.kind == SPEECH:
            return {"text": clip.prompt, "voice_id": clip.voice}
        shape = {"aspect_ratio": clip.aspect_ratio, "resolution": clip.resolution}
        return {"prompt": clip.prompt, **shape, **clip.settings}

    def submit(self, clip: Clip) -> str:
        """Start, and pay for, a job; its id. The same `reserved` replays the first answer: Hedra's
        newest SDK (7.0.0, spec 3.20) has it as a header, documents to 3.17 in the body."""
        names = {"start_image": "image", "audio": "audio"} if clip.kind == VIDEO else {}
        refs = {name: {"source": "url", "url": clip.record.text(of)} for name, of in names.items()}
        key = {"idempotency_key": clip.reserved} if clip.reserved and self.key_in_body else {}
        body = {"input": {**self.body(clip), **refs}, **key}
        headers = {"Idempotency-Key": clip.reserved} if clip.reserved else {}
        path = f"/models/{in_path(clip.model.text('id'))}"
        try:
            reply = self.http.api("POST", path, body, headers)
        except ApiError as error:
            if not key or error.status != 400 or not error.__dict__.get("names_key"):
                raise
            self.key_in_body = False
            return self.submit(clip)
        return reply.must(reply.text, "job_id")

    def look(self, job_id: str) -> Status:
        """One look at a job."""
        return parse_status(self.http.api("GET", f"/jobs/{in_path(job_id)}/status"), job_id)

    def find(self, clip: Clip, *, far: bool = True) -> str:
        """Nothing to look for: a repeated submit is safe, and no list tells a job by its key."""
        return ""

    def find_all(self, ids: Sequence[str]) -> dict[str, float | None]:
        """What Hedra has billed for each of some jobs: a request each."""
        jobs = {name: self.http.call("GET", f"/jobs/{in_path(name)}") for name in ids}
        return {name: job.number("cost") for name, job in jobs.items()}

    def iter_status(self, job_id: str, interval_s: float, grace_s: float) -> Iterator[Status]:
        """The same from a stream, taken up again while it brings something new, then by polls."""
        status, last_id, before = Status(QUEUED), "", "none"
        with contextlib.suppress(ApiError, ValueError):
            while status.state not in ENDED and last_id != before:
                self.http.sleep(interval_s if last_id else 0.0)
                before = last_id
                for name, data, event_id in iter_events(self.iter_stream(job_id, last_id)):
                    last_id = event_id or last_id
                    if name == "status":
                        status = parse_status(Reply(read_json(data), "its stream"))
                        if status.state in ENDED:
                            break
                        yield status
        if status.state != COMPLETE:  # of a failure a poll has the last word
            for status in iter_polls(self, job_id, interval_s, grace_s):
                yield status
        result = self.result(job_id)  # the stream's connection is free by now
        yield result if result.state in ENDED else result._replace(state=status.state)

    def iter_stream(self, job_id: str, last_id: str) -> Iterator[bytes]:
        """The body of a job's stream, as long as data come in time: before the first a silence
        means that somebody on the way holds them back; what only keeps it open is none."""
        path, http = f"/jobs/{in_path(job_id)}/stream", self.http
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        headers |= {"Last-Event-Id": last_id} if last_id else {}
        first_s = min(FIRST_FRAME_S, http.account.silence_s)
        response = http.open("GET", path, headers, silence_s=first_s)
        for block in http.blocks(response, f"GET {path}"):
            http.sleep(0.0)  # raises where the time is over
            if b"data:" in block:
                http.put_off()
            yield block

    def result(self, job_id: str, kind: str = VIDEO) -> Status:
        """The end of a job: address of the result, cost in dollars, or why there is none."""
        reply = self.http.call("GET", f"/jobs/{in_path(job_id)}")
        status, output = parse_status(reply, job_id), (reply.rows("outputs") or [Reply({})])[0]
        if output.text("status") == "EXPIRED":
            text = f"the result of {job_id} has expired: Hedra keeps outputs for 48 hours"
            raise ApiError(text, code="EXPIRED", generation_id=job_id)
        if output.text("status") == "FAILED":
            failure, transient = parse_failure(output.part("error"))
            status = status._replace(state=FAILED, failure=failure, transient=transient)
        return status._replace(url=output.text("url"))

    def price(self, clip: Clip) -> float | None:
        """Dollars, None where Hedra does not tell before it has the files."""
        if (at := clip.seconds) is None:
            return None
        wishes = {"duration_ms": round(at * 1000)} if clip.kind == VIDEO else {}
        wishes |= self.body(clip)
        asked = json.dumps([clip.model.text("id"), {**wishes, "prompt": ""}])
        if asked in self.quoted:
            return self.quoted[asked]
        path = f"/models/{in_path(clip.model.text('id'))}/estimate"
        reply = self.http.call("POST", path, {"input": wishes})
        if (price := reply.must(reply.number, "cost")) < 0:
            return None
        return self.quoted.setdefault(asked, price)

    def balance(self) -> Balance:
        """What is left in the wallet, in US dollars."""
        reply = self.http.call("GET", "/balance")
        return Balance(reply.must(reply.number, "balance"), reply.text("currency") or self.unit)

    def voices(self, model: str) -> list[Voice]:
        """Who can speak with a speech model, all pages."""
        path = f"/models/{in_path(model or self.default_speech_model)}/voices"
        voices, seen, query = list[Voice](), {""}, ""
        while True:
            reply = self.http.call("GET", path + query)
            for row in reply.must(reply.rows, "data"):
                labels = row.part("labels")
                texts = {name: labels.text(name) for name in labels.values if labels.text(name)}
                named = row.must(row.text, "id"), row.text("name")
                voices.append(Voice(*named, texts, row.text("preview_url")))
            if (cursor := reply.text("next_cursor")) in seen:
                return voices
            seen.add(cursor)
            query = f"?{in_query({'cursor': cursor})}"


Api = WebApi | JobsApi


def api_for(http: Transport) -> Api:
    """The API that a key belongs to: the one place where the two are told apart."""
    return JobsApi(http) if ":" in http.account.key else WebApi(http)


# ---- progress: View, open_view ------------------------------------------------------------------

FRAME_S = 0.25  # between two drawings


def written(stream: Any, text: str) -> bool:
    """Write a piece at once; whether that worked: a full disk or a closed pipe stops no clip."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: no stream
        stream.write(text)
        stream.flush()
        return True
    return False


def complain(text: str) -> None:
    """What a person must read, on stderr, however quiet it is there."""
    written(sys.stderr, f"hedra_avatar: {printable(text)}\n")


def screen_size(stream: Any) -> os.terminal_size:
    """Columns and lines of the terminal that a stream is; no columns where nothing can move."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: no stream
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            return os.get_terminal_size(stream.fileno())
    return os.terminal_size((0, 0))


class View:
    """Where progress goes: nowhere, into a log with a plain line for each change of a state, or
    onto a terminal, with a line for each clip at work above one for the whole batch."""

    deaf = False  # a result could not be written
    clips = done = failed = drawn = results = 0
    spent = ""

    def __init__(self, where: Literal["", "log", "terminal"] = "", verbose: bool = False) -> None:
        self.where, self.verbose, self.lock = where, verbose, threading.RLock()
        self.closed, self.whole = threading.Event(), Clip("", Path())  # what all clips are at
        self.lines = {self.whole: time.monotonic()}  # since when; the first at the bottom
        if where == "terminal":
            self.tqdm, self.trim = need("tqdm").tqdm, need("tqdm.utils").disp_trim
            threading.Thread(target=self.tick, daemon=True).start()

    def over(self, stream: Any, text: str) -> bool:
        """Write above the moving lines; whether that worked."""
        with self.lock:
            self.draw(erase=True)
            done = written(stream, text)
            self.draw()
            return done

    def say(self, text: str, *, always: bool = False) -> None:
        """A line that stays, `always` also where only errors are wanted."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ") if self.where == "log" else ""
        if self.where or always:
            self.over(sys.stderr, f"{stamp}{printable(text)}\n")

    def result(self, text: str) -> None:
        """A result, on standard output."""
        self.results += 1
        self.deaf |= not self.over(sys.stdout, f"{text}\n")

    def name(self, clip: Clip, room: int = 46) -> str:
        """The name of a clip, cut on a terminal so that there is room for what follows."""
        if self.where != "terminal":
            return clip.name
        return str(self.trim(printable(clip.name), max(12, screen_size(sys.stderr).columns - room)))

    def state(
        self, clip: Clip, state: str, detail: str = "", note: str = "", share: float | None = None
    ) -> None:
        """A clip is in a state, or further in it; a `note`, such as its price, stays beside it."""
        with self.lock:
            self.lines.setdefault(clip, time.monotonic())
            old, clip.shown, clip.note, clip.share = clip.shown, state, note or clip.note, share
            if old != state and (self.where == "log" or self.verbose):
                self.say(f"{self.name(clip)}: {state}" + (f" ({detail})" if detail else ""))
            self.draw()

    def move(self, clip: Clip, count: int, total: int) -> None:
        """So many more bytes, of a `total` (0: nobody knows), of what the clip's state is about."""
        with self.lock:
            if total:
                clip.share = min(1.0, (clip.share or 0.0) + count / total)

    def leave(self, clip: Clip) -> None:
        """A clip is no longer at work."""
        with self.lock:
            self.lines.pop(clip, None)
            self.draw()

    def row(self, clip: Clip, since: float, columns: int) -> str:
        """A line with its clock and, where it is known how far it is, a bar; cut to the width."""
        name = f"{self.name(clip)}: " if clip.name else ""
        bar = "" if clip.share is None else " {percentage:3.0f}%|{bar}|"
        text = self.tqdm.format_meter(
            clip.share or 0.0, 1, time.monotonic() - since, ncols=columns, unit=clip.note,
            prefix=name + clip.shown, bar_format="{desc}" + bar + "  {unit}  {elapsed}",
            ascii=not str(getattr(sys.stderr, "encoding", "")).lower().startswith("utf"),
        )
        return str(self.trim(text, columns))

    def draw(self, *, erase: bool = False) -> None:
        """Draw the moving lines, as many as fit, or take them off the terminal."""
        if self.where != "terminal" or self.closed.is_set():
            return
        (columns, room), whole = screen_size(sys.stderr), self.whole
        if self.clips:
            failures = f"{self.failed} failed" * bool(self.failed)
            whole.note = ", ".join(word for word in (self.spent, failures) if word)
            whole.shown, whole.share = f"{self.done}/{self.clips} clips", self.done / self.clips
        lines = [] if erase else [item for item in self.lines.items() if item[0].shown]
        lines = lines[: max(1, room - 1)][::-1]
        rows = [self.row(clip, since, max(20, columns - 1)) for clip, since in lines]
        if rows or self.drawn:
            up = f"\r\x1b[{self.drawn}A" if self.drawn else ""
            written(sys.stderr, up + "".join(f"\x1b[2K{row}\n" for row in rows) + "\x1b[J")
        self.drawn = len(rows)

    def tick(self) -> None:
        """In a thread of its own: keep the clocks going until the view is closed."""
        while not self.closed.wait(FRAME_S):
            with self.lock:
                self.draw()

    def close(self) -> None:
        """Leave the terminal as it was."""
        with self.lock:
            self.draw(erase=True)
            self.closed.set()


def open_view(quiet: bool = False, verbose: bool = False) -> View:
    """Moving lines on a terminal of our own, plain ones in a log, nothing where none is wanted."""
    shared = re.search(r"(^| )-(j|-jobserver)", os.environ.get("MAKEFLAGS", ""))  # with others
    moves = screen_size(sys.stderr).columns and not shared
    return View() if quiet else View("terminal" if moves else "log", verbose)


# ---- ledger: hidden, Ledger ---------------------------------------------------------------------

def hidden(target: Path, of: str = "") -> Path:
    """A hidden file beside a target, with a name that is short however long the target's is."""
    return target.with_name(f".{digest_of(target.name, of)[:16]}.part")


@functools.cache
def lock_file(path: Path) -> int:
    """A file whose bytes are locks, opened once a process: closing any descriptor ends them all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


class Ledger:
    """What is known of clips, speeches, assets and files: a record each, shared by all processes
    and by the users of a group (files are made as the umask has them)."""

    guard, held = threading.Lock(), set[tuple[int, Path, int]]()  # by the threads of a process

    def __init__(self, folder: Path, sleep: Sleep, say: Callable[[str], object]) -> None:
        self.folder, self.sleep, self.say = Path(os.path.abspath(folder)), sleep, say
        self.home = str(self.folder.parent)
        self.speeches, self.kept = self.folder / "speeches", self.folder / "kept"
        self.seen: dict[tuple[str, str, str], Media] = {}
        self.digests = set[str]()  # of the results of all takes

    def load(self, kind: str, key: str, *, owned: bool = False) -> Record:
        """The record, empty if there is none. A damaged one is set aside by its owner, and what
        can still be read of it (which take it was) is kept: forgetting that could pay again."""
        name = f"{self.folder}/{kind}/{key}.json"
        try:
            with open(name, "rb", buffering=0) as file:
                raw = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return Record(name)
        with contextlib.suppress(ValueError):
            if isinstance(values := read_json(raw.decode()), dict):
                return Record(name, values)
        text = raw.decode("utf-8", "replace")
        kept = dict(re.findall(r'"(take|audio|generation_id)": "([^"\\]+)"', text))
        takes = re.findall(r'"([0-9a-f]{16})"', text.partition('"takes": [')[2].partition("]")[0])
        state = "submitted" if "generation_id" in kept else "intent"
        record = Record(name, {**kept, "takes": takes, "state": state})
        if owned:
            aside = record.path.with_name(f"{key}.damaged-{time.time_ns()}")
            self.say(f"warning: {name} is damaged, set aside as {aside.name}; Hedra is asked")
            os.replace(name, aside)
            record.save(sync=True)
        return record

    @contextlib.contextmanager
    def own(self, name: str, waiting: Callable[[], object]) -> Iterator[None]:
        """Be the only one who has that name; the kernel frees it with its owner. Who comes second
        calls `waiting`, which may raise, and waits."""
        import fcntl

        path, at = self.folder / "locks", int(digest_of(name)[:15], 16)
        descriptor, mine = lock_file(path), (os.getpid(), path, at)
        while True:
            try:
                with self.guard, contextlib.suppress(BlockingIOError, PermissionError):  # not free
                    if mine not in self.held:
                        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
                        self.held.add(mine)
                        break
            except OSError as error:  # a share without locks
                text = f"{path} cannot be locked: {error.strerror}; what was paid for is not lost"
                how = "move its folder to a disk that has locks, and set HEDRA_CACHE_DIR to it"
                raise HedraError(f"{text}: {how}") from error
            waiting()
            self.sleep(0.05)
        try:
            yield
        finally:
            with self.guard, contextlib.suppress(OSError):
                self.held.discard(mine)
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, at)

    def media(self, file: Path, kind: Kind) -> Media:
        """What a file is, with its digest; read only if it has changed since the last time, or its
        duration, which an ffprobe might tell by now, is not known. Raises InputError."""
        name = os.path.abspath(file)
        sign = signature(name)
        if media := self.seen.get((kind, name, sign)):
            return media
        record = self.load("files", digest_of(name, "2"))  # the second way to tell a duration
        media = Media(
            record.text("content_type"), int(record.number("size_bytes") or 0),
            record.number("seconds"), record.text("digest"),
        )
        timed = kind == "image" or MIN_SECONDS <= (media.seconds or 0) <= MAX_SECONDS
        fits = media.content_type.startswith(kind) and re.fullmatch("[0-9a-f]{32}", media.digest)
        if not (timed and fits and sign and record.text("signature") == sign):
            media = inspect_file(file, kind)._replace(digest=content_digest(file))
            if sign != signature(name):
                text = f"{file} changes while it is read; run it again later"
                raise InputError(text, unfinished=True)
            with contextlib.suppress(OSError):  # the cache of another user of the group
                record.save(file=name, signature=sign, **media._asdict())
        self.seen[kind, name, sign] = media
        return media

    def place(self, file: str) -> str:
        """Its name in the ledger: from the cache's own folder on, as both may be moved."""
        return file.removeprefix(self.home + os.sep)

    def find(self, clip: Clip, *, nearby: bool = False) -> str:
        """Where a take's result lies whole on this disk: at the target, or where it once was; or,
        `nearby`, under any name beside those; "" for nowhere."""
        places, seen = clip.record.part("videos").values, clip.record.part("seen")
        if not (digests := clip.digests):
            return ""
        files = [clip.place]
        files += [place if place[:1] == "/" else f"{self.home}/{place}" for place in places]
        for folder in {*map(os.path.dirname, files)} if nearby else ():
            files += map(str, Path(folder).glob("*.mp4"))
        files += [f"{self.kept}/{digest}.mp4" for digest in digests]
        files += [str(hidden(clip.target, clip.generation_id))]  # it came, and got no name
        for file in dict.fromkeys(files):
            with contextlib.suppress(OSError, InputError):
                is_it = seen.text(self.place(file)) == (signature(file) or "gone")
                if is_it or video_digest(Path(file)) in digests:
                    return file
        return ""

    def put(self, clip: Clip, draft: Path) -> None:
        """Rename what was brought to the target. What it is is written down first, should that be
        the last we do; on a full disk the video is worth more than the note."""
        videos = {**clip.record.part("videos").values, self.place(clip.place): video_digest(draft)}
        with contextlib.suppress(OSError):
            clip.record.save(videos=videos)
        self.spare(clip)
        publish(draft, clip.target)

    def keep(self, clip: Clip, **changes: Any) -> None:
        """Write down that a take's result lies at the target. A video is as old as the look at what
        it is made of: make is satisfied, and a file that has changed since is newer."""
        record, place = clip.record, self.place(clip.place)
        with contextlib.suppress(OSError):
            try:
                os.utime(clip.target, (clip.looked, clip.looked) if clip.looked else None)
            except PermissionError:  # of another user of the group, who may say "now"
                os.utime(clip.target)
        videos = {**record.part("videos").values, place: video_digest(clip.target)}
        seen = {**record.part("seen").values, place: signature(clip.target)}
        record.save(videos=videos, seen=seen, **changes)

    def is_ours(self, digest: str) -> bool:
        """Whether a file of that digest is the result of any take, of other processes as well."""
        if digest not in self.digests:
            texts = [(self.folder / f"clips/{key}.json").read_bytes() for key in self.clips()]
            found = re.findall(rb'"([0-9a-f]{32})"', b"".join(texts))
            self.digests = {digest.decode() for digest in found}
        return digest in self.digests

    def spare(self, clip: Clip) -> None:
        """Keep what lies at a target and gives its place to a result: it may be the only copy."""
        if not size_of(clip.target) or video_digest(clip.target) in clip.digests:
            return
        part = hidden(self.kept / "x", clip.place)  # the owner of the target alone writes it
        try:
            self.kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip.target, part)
            publish(part, kept := self.kept / f"{video_digest(part)}.mp4")
        finally:
            part.unlink(missing_ok=True)
        self.say(f"{clip.target} held something else, which is now {kept}")

    def clips(self) -> list[str]:
        """The keys of the records of all takes."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / "clips") as found:
            names = [entry.name for entry in found if entry.is_file()]
            return sorted(name[:-5] for name in names if name.endswith(".json") and name[0] != ".")
        return []


# ---- downloading: Download ----------------------------------------------------------------------

class Download:
    """Brings what was made for a clip, whole or not at all. It grows in a hidden file beside the
    target, for its owner alone; the ETag that it began with is in the record of the take."""

    def __init__(self, api: Api, clip: Clip, view: View) -> None:
        self.api, self.http, self.clip, self.view = api, api.http, clip, view
        self.path = hidden(clip.target, clip.generation_id)

    def run(self, url: str, interval_s: float) -> Media:
        """What came; takes up what was cut, asks for a fresh address where one has expired. Raises
        ApiError after TRIES in a row that got no further, OSError on a full disk."""
        failures, furthest = 0, 0
        with self.path.open("ab") as self.file:
            while True:
                try:
                    return self.fetch(url or self.fresh_address(interval_s))
                except ApiError as error:
                    failures = 1 if self.file.tell() > furthest + PROGRESS_BYTES else failures + 1
                    furthest = max(furthest, self.file.tell())
                    if failures >= TRIES or not error.retryable:
                        if not self.file.tell():  # nothing that could be gone on with
                            self.path.unlink(missing_ok=True)
                        raise
                    wait_s = error.retry_after or backoff_s(failures - 1, 1.0, cap=8.0)
                    self.http.before_retry(error, wait_s)
                    self.http.sleep(wait_s)
                    url = "" if error.code == "ADDRESS" else url  # it was answered by another thing

    def fresh_address(self, interval_s: float) -> str:
        """A new address of a finished result; Hedra may need a moment to have one."""
        for _ in range(10):
            if url := self.api.result(self.clip.generation_id, self.clip.kind).url:
                return url
            self.http.sleep(interval_s)
        text = f"Hedra gives no address for the finished generation {self.clip.generation_id}"
        raise ApiError(f"{text}; {LATER}", retryable=True)

    def restart(self, etag: str = "") -> None:
        """Begin again from nothing, with a strong ETag or none."""
        self.file.seek(0)
        self.file.truncate()
        if (etag := "" if etag.startswith("W/") else etag) != self.clip.record.text("etag"):
            with contextlib.suppress(OSError):  # a full disk of the cache does not stop the video
                self.clip.record.save(etag=etag)

    def begin(self, response: urllib3.BaseHTTPResponse) -> int:
        """Get ready for an answer's body; the file's length, 0 if unknown. Raises ApiError."""
        headers, size = response.headers, self.file.tell()
        if response.status == 200:
            self.restart(headers.get("ETag", ""))
            length = headers.get("Content-Length", "")
            return int(length) if re.fullmatch(r"\d{1,15}", length) else 0
        if response.status not in (206, 416):  # this address may have expired, a fresh one not
            text = f"the address of the result answered {response.status}; the clip is paid for"
            wait_s = parse_retry_after(headers.get("Retry-After", ""))
            raise ApiError(f"{text}; {LATER}", retryable=True, retry_after=wait_s, code="ADDRESS")
        shape = r"(\d{1,15})-\d+/(\d{1,15})" if response.status == 206 else r"\*/((\d{1,15}))"
        piece = re.fullmatch(f"bytes {shape}", headers.get("Content-Range", ""))
        etag = self.clip.record.text("etag")
        if piece and int(piece[1]) == size > 0 and headers.get("ETag", etag) == etag:
            return int(piece[2])
        self.restart()
        raise ApiError("the server sent another piece than was asked for", retryable=True)

    def receive(self, response: urllib3.BaseHTTPResponse, total: int) -> None:
        """Append a body; raises ApiError if it stands still or has no end, StillRunning if late."""
        mark = self.file.tell()
        for block in self.http.blocks(response, "the download"):
            self.file.write(block)
            self.view.move(self.clip, len(block), total)
            self.http.sleep(0.0)  # raises where the time is over
            if (size := self.file.tell()) >= mark + PROGRESS_BYTES:
                mark = size
                self.http.put_off()
            if max(size, total) > VIDEO_BYTES:
                self.path.unlink()
                raise ApiError(f"no video has {max(size, total):,} bytes; what came was dropped")

    def fetch(self, url: str) -> Media:
        """One request for what is lacking; what the whole is. Raises ApiError."""
        if not (etag := self.clip.record.text("etag")):  # nothing would tell that the rest fits
            self.restart()
        size = self.file.tell()
        headers = {"Range": f"bytes={size}-", "If-Range": etag} if size else {}
        response = self.http.fetch(url, headers)
        try:
            total = self.begin(response)
            self.view.move(self.clip, self.file.tell(), total)
            if response.status != 416:
                self.receive(response, total)
        finally:
            response.close()
        if (size := self.file.tell()) < total:
            raise ApiError(f"the download was cut at {size:,} bytes; {LATER}", retryable=True)
        self.file.flush()
        if size == (total or size) and (found := inspect_film(self.path, self.clip.kind)):
            return found
        self.restart()
        text = f"what came are {size:,} bytes and not a whole file"
        raise ApiError(f"{text}; {LATER}", retryable=True, code="ADDRESS")


# ---- making a clip: Studio ----------------------------------------------------------------------

def plain_name(name: str) -> str:
    """A name as it is compared: in any case, in any form of Unicode, with any blanks."""
    import unicodedata

    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()


LIST = "the list of generations"
IN_DOUBT = (
    "not known is whether it was carried out, but nothing is lost: run the same command again, and "
    "it is paid once"
)
FOREIGN = (  # what is at a target and not for us to replace
    "exists and is no video that Hedra made for this folder (edited, or of another origin): it is "
    "left as it is, and this run paid nothing; move it away or give another --out (--force makes, "
    "and pays, a new take in place of a video)"
)


class Studio:
    """All that the clips of a command have in common, and the verbs over them: plan, afford,
    make, settle."""

    deadline = math.inf  # of a command that makes one clip
    balance: Balance | None = None
    broke: OutOfCredits | None = None
    spent = 0.0

    def __init__(
        self, api: Api, view: View, *, model: str = "", speech_model: str = "",
        timeout_s: float = 1800.0, interval_s: float = 5.0, force: bool = False,
        cap: float | None = None,
    ) -> None:
        self.api, self.http, self.view, self.force, self.cap = api, api.http, view, force, cap
        self.account, self.timeout_s, self.interval_s = api.http.account, timeout_s, interval_s
        if not (timeout_s >= 0 and 0 <= interval_s < math.inf):
            raise InputError("a timeout and a poll interval are numbers of seconds")
        self.ledger = Ledger(self.account.cache, self.http.sleep, view.say)
        self.asked = {VIDEO: model, SPEECH: speech_model}
        self.lock, self.turn = threading.RLock(), threading.Lock()
        self.unread = dict[str, float]()  # until when not to ask again
        self.forgotten = set[str]()  # files that Hedra no longer knows
        self.held = dict[str, float]()  # against the cap: the price of what was submitted

    # -- plan: what each clip is, what it needs and what it costs

    def plan(self, clips: Sequence[Clip]) -> None:
        """Check the files of some clips, judge what each needs, and price what is new. A clip that
        cannot work has an `error` afterwards. Raises HedraError where nothing can."""
        # Looked up once a plan.
        self.model, self.voices = functools.cache(self.api.model), functools.cache(self.api.voices)
        for clip in [clip for clip in clips if not clip.error]:
            with self.blamed(clip):
                (self.identify_speech if clip.kind == SPEECH else self.identify)(clip)
                clip.state = self.judge(clip, force=self.force)
                self.check(clip)
        fine = [clip for clip in clips if not clip.error]
        ask = functools.partial(self.tolerant, self.api.balance, "the balance")
        if any(clip.state in OPEN for clip in fine):
            self.balance, _ = self.http.together(ask, lambda: self.plan_open(fine))
        else:
            self.plan_open(fine)

    def plan_open(self, clips: Sequence[Clip]) -> None:
        """Where some clips may still have to be paid: are they, and what do they cost?"""
        self.look_for(open_parts(clips))
        for clip in [clip for clip in clips if clip.state != DONE]:
            with self.blamed(clip):
                self.check_old(clip)
                self.quote(clip)

    @contextlib.contextmanager
    def blamed(self, clip: Clip) -> Iterator[None]:
        """What is wrong with one clip stops no other."""
        try:
            yield
        except (HedraError, OSError) as error:
            if isinstance(error, Stopped) or getattr(error, "is_of_all", False):
                raise
            clip.error, clip.state = error, BAD

    def identify(self, clip: Clip) -> None:
        """Find out what a clip is made of, and so its key. The first version's key had the model
        as the catalogue called it: it is taken where the ledger has it."""
        clip.looked = time.time()
        with clip.timed("hashing"):
            clip.portrait = self.ledger.media(clip.image, "image")
            if not clip.speech:
                clip.recording = self.ledger.media(clip.audio, "audio")
        if clip.speech:
            self.identify_speech(clip.speech)
        sound = f"speech {clip.speech.key}" if clip.speech else clip.recording.digest
        wishes = (clip.prompt, clip.resolution, clip.aspect_ratio)
        more = [json.dumps(clip.settings, sort_keys=True)] if clip.settings else []
        old = self.model(self.asked[VIDEO], known_only=True)
        clip.key, clip.other_key = (
            digest_of(clip.portrait.digest, sound, *wishes, name, self.account.id, *more)
            for name in (self.api.canonical(self.asked[VIDEO]), old.text("slug", "id"))
        )
        if clip.other_key != clip.key and self.ledger.load("clips", clip.other_key).values:
            clip.key = clip.other_key

    def identify_speech(self, clip: Clip) -> None:
        """The same of a speech; raises InputError for what nobody can say."""
        limits, model = self.api.speech_limits, self.asked[SPEECH] or self.api.default_speech_model
        limit = limits.get(model, limits[""])
        why = f"{len(clip.prompt):,} characters, and {model or 'Hedra'} speaks up to {limit:,}"
        if len(clip.prompt) > limit or not re.search(r"\w", clip.prompt):
            why = why if len(clip.prompt) > limit else "no word in it: it is blank"
            raise InputError(f"the text of {clip.name} has {why}; nothing was sent")

        def key_by(voice: str) -> str:
            return digest_of("speech", clip.prompt, voice, model, self.account.id)

        known = self.voice_ids(clip.voice)
        takes = {voice: self.ledger.load("clips", key_by(voice)) for voice in known}
        said = (voice for voice, take in takes.items() if take.text("state") not in ("", NEW))
        clip.voice = next(said, "") or self.voice(clip.voice)
        clip.key = key_by(clip.voice)
        if not clip.target.name:
            clip.target = self.ledger.speeches / f"{clip.key}.audio"

    @property
    def voice_names(self) -> Record:
        """The ids that voices have had, by their names."""
        return self.ledger.load("voices", digest_of(self.account.id, self.asked[SPEECH]))

    def voice_ids(self, asked: str) -> list[str]:
        """What a voice was known as: what it has said stays said, though it has a new id today."""
        return self.voice_names.part("names").texts(plain_name(asked)) if asked else []

    def voice(self, asked: str) -> str:
        """The id of a voice that is asked for by name, whatever its case, or id; raises InputError
        with the nearest ones."""
        if not asked:
            raise InputError("no voice is given: --voice NAME or HEDRA_VOICE (`voices` lists them)")
        if re.fullmatch(f"(voice_)?({UUID_SHAPE.pattern})", asked, re.IGNORECASE):
            return asked.lower()
        import difflib

        wanted, voices = plain_name(asked), self.voices(self.asked[SPEECH])
        named = dict.fromkeys(voice.id for voice in voices if plain_name(voice.name) == wanted)
        found = [voice.id for voice in voices if voice.id == asked][:1] or list(named)
        if len(found) == 1:
            if UUID_SHAPE.search(found[0]):
                memo, ids = self.voice_names, dict.fromkeys([*found, *self.voice_ids(asked)])
                memo.save(names={**memo.part("names").values, wanted: [*ids]})
            return found[0]
        if found:
            which = f"voices named {asked!r}: {', '.join(found)}"
            raise InputError(f"{which}; give --voice the id of one")
        called = {plain_name(voice.name): voice.name for voice in voices}
        near = difflib.get_close_matches(wanted, called, n=5, cutoff=0.3) or list(called)[:5]
        listed = ", ".join(called[name] for name in near) or "none"
        raise InputError(f"there is no voice {asked!r}; nearest: {listed} (`voices` lists all)")

    @functools.cached_property
    def names(self) -> dict[str, list[str]]:
        """The names of the takes that lie on the disk, by clip: a first record that is damaged or
        lost does not lose the others."""
        found = dict[str, list[str]]()
        for key, _, name in (key.partition(".") for key in self.ledger.clips()):
            found.setdefault(key, []).extend([name] * bool(name))
        return found

    def takes(self, key: str) -> list[Record]:
        """The records of all takes of a clip, oldest first: the first one names the others."""
        first = self.ledger.load("clips", key)
        names = dict.fromkeys([*first.texts("takes"), *self.names.get(key, ())])
        takes = [self.ledger.load("clips", f"{key}.{name}") for name in names]
        for take, name in zip(takes, names, strict=True):
            take.values.setdefault("take", name)
        if len(names) > len(first.texts("takes")):
            takes.sort(key=lambda take: take.number("submitted_at") or math.inf)
        return [first, *takes]

    def judge(self, clip: Clip, *, force: bool = False) -> str:
        """What a clip needs, from its records and its files: the one place that says so. A take
        that came to nothing leaves the one before in force. `force` is a new take in place of what
        was there when it was judged before, not of what came since, and of a speech only where
        that was refused or is lost."""
        takes = self.takes(clip.key)
        submitted = [take for take in takes if take.text("state") not in ("", NEW)]
        fine = [
            take for take in submitted if force or take.text("state") != "refused"
            and not (take.text("state") == "submitted" and take.flag("lost"))
        ]
        record = clip.record = (fine or submitted or takes[:1])[-1]
        is_old = not clip.past or clip.generation_id in clip.past
        clip.past = {take.text("generation_id") for take in takes}
        state, forced = record.text("state"), force and clip.kind == VIDEO and is_old
        if state == "intent":
            needs = DOUBT
        elif force and record.flag("lost") and not self.ledger.find(clip):
            needs = NEW
        elif state == "submitted":
            age_s = time.time() - (record.number("submitted_at") or 0.0)
            needs = NEW if forced and age_s > FORCE_AFTER_S else FLIGHT
        elif forced or state in ("", NEW):
            needs = NEW
        elif state == "refused":
            needs = NEW if force or record.flag("transient") else REFUSED
        else:
            needs = DONE if self.ledger.find(clip) == clip.place else FETCH
        if clip.speech and (needs in OPEN or record.flag("unbilled")):
            clip.speech.state = self.judge(clip.speech, force=force)
            if clip.speech.state == DONE and needs in OPEN:
                self.hear(clip, clip.speech)
            elif clip.speech.state == REFUSED and needs == NEW:
                needs = REFUSED
        return needs

    def hear(self, clip: Clip, speech: Clip) -> None:
        """The speech of a clip is there: from here on it is a recording like any other."""
        try:
            clip.audio, clip.recording = speech.target, self.ledger.media(speech.target, "audio")
        except InputError as error:
            text = f"the {speech.name} makes no video: {error}; change its text"
            raise InputError(text) from error

    def check(self, clip: Clip) -> None:
        """Raise InputError where a result could not be written; makes its folder."""
        target, inputs = clip.target, (clip.audio, clip.image)
        if clip.state == DONE:
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(target)  # another OSError where its name is too long
                if not target.is_file():
                    text = f"{target} is a folder, or else no file that a video could replace"
                    raise InputError(text, retryable=True)
                if any(target.samefile(file) for file in inputs if file.name and file.exists()):
                    raise InputError(f"{target} is an input: the video needs a name of its own")
                if clip.kind == VIDEO and not is_film(target):
                    raise InputError(f"{target} {FOREIGN}", retryable=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            probe = hidden(target, str(os.getpid()))
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            text = f"{target} cannot be written: {error.strerror}"
            raise InputError(f"{text}; choose another place for it") from error

    def check_old(self, clip: Clip) -> None:
        """Raise InputError for a video at the target that the ledger does not know: nothing is
        paid, nor fetched again, in place of it. Where the ledger was lost and Hedra may have the
        clip, that is fetched, and what lies there is kept."""
        target, is_speech = clip.target, clip.target.parent == self.ledger.speeches
        if self.force or is_speech or clip.state == DONE or not size_of(target):
            return
        # Of a video that old the jobs API replays nothing: to submit its key again would pay.
        is_lapsed = self.api.replays and time.time() - target.stat().st_mtime > KEPT_S
        is_new = clip.state == NEW or (clip.state == DOUBT and is_lapsed)
        is_known = bool(clip.record.part("videos").values)
        is_edited = is_known and (clip.kind == SPEECH or inspect_film(target))
        if not (is_new or is_edited) or self.ledger.is_ours(video_digest(target)):
            return
        if is_new and not clip.generation_id and LIST in self.unread:
            text = f"whether {target} is of this clip could not be looked up"
            raise ApiError(f"{text}, and nothing was paid; {LATER}", retryable=True)
        raise InputError(f"{target} {FOREIGN}", retryable=True)

    def look_for(self, clips: Sequence[Clip]) -> None:
        """Ask in one go whether Hedra has generations that this ledger does not know of."""
        if self.api.replays:
            return
        asked = {
            reserved_id(key, clip.record.text("take")): (clip, key) for clip in clips
            for key in (clip.key, clip.other_key)
            if key and (clip.state == DOUBT or not clip.generation_id)
        }
        ask = functools.partial(self.api.find_all, list(asked))
        for name in (self.tolerant(ask, LIST) or {}) if asked else ():
            clip, key = asked[name]
            clip.key, clip.found = key, name
            anew = self.force and clip.kind == VIDEO and clip.state == NEW
            clip.state = NEW if anew else FLIGHT

    # -- afford: prices against the balance and the cap

    def quote(self, clip: Clip) -> None:
        """The price of what is not paid yet; it stays None where nobody can tell."""
        for part in open_parts([clip]):
            if part.price is None:
                part.price = self.tolerant(functools.partial(self.price, part), "the price")

    def price(self, part: Clip) -> float | None:
        """The price of a video or a speech; raises InputError for what its model cannot do, by
        what the catalogue says today. A cap is a promise: today's price as well."""
        if self.cap is None:
            with contextlib.suppress(InputError):
                return self.price_by(part, MODEL_AGE_S)
        return self.price_by(part, 0.0)

    def price_by(self, part: Clip, age_s: float) -> float | None:
        """The same by a catalogue that may be so many seconds old."""
        part.model = self.model(self.asked[part.kind], kind=part.kind, max_age_s=age_s)
        model, seconds, name = part.model, part.seconds, part.model.text("name", "slug", "id")
        most_s = (model.number("max_duration_ms") or 0) / 1000
        for wish, offered, flag in (
            (part.resolution, model.texts("resolutions"), "--resolution"),
            (part.aspect_ratio, model.texts("aspect_ratios"), "--aspect-ratio"),
        ):
            if part.kind == VIDEO and offered and wish not in offered:
                raise InputError(f"{name} has no {flag} {wish}: choose one of {', '.join(offered)}")
        asked_s = Reply(part.settings).figure("duration_ms", 1000) / 1000
        if not MIN_SECONDS <= asked_s <= MAX_SECONDS:
            wrong = "a duration_ms that is not from 500 to 600,000"
            raise InputError(f"{part.name} has {wrong}; nothing was sent")
        if part.kind == VIDEO and seconds and 0 < most_s < seconds:
            limit = f"{name} takes at most {most_s:g} s"
            raise InputError(f"{part.name} lasts {seconds:.1f} s; {limit}")
        return self.api.price(part)

    def tolerant(self, call: Callable[[], T], what: str) -> T | None:
        """The value of a request that is good to have: a fault is a warning, as the server has
        the last word: it gets a quarter of the time, and after that a minute's rest. A key that is
        not accepted stops all the same."""
        if time.monotonic() < self.unread.get(what, -math.inf):
            return None
        try:
            with self.http.until(time.monotonic() + self.timeout_s / 4):
                value = call()
            self.unread.pop(what, None)
            return value
        except (ApiError, StillRunning) as error:
            if error.is_of_all and not isinstance(error, OutOfCredits):
                raise
            if what not in self.unread:
                self.view.say(f"warning: {what} could not be read: {error}")
            self.unread[what] = time.monotonic() + 60.0 * error.retryable
            return None

    def afford(self, clips: Sequence[Clip], kept: str = "nothing was uploaded or paid") -> None:
        """Raise OutOfCredits where the clips cost more than the balance or, with what was submitted
        before, than the cap, InputError where a cap is set and a price is not known. The cap counts
        an estimate with a fifth on top."""
        wanted, unit, cap = [clip for clip in clips if clip.state in OPEN], self.api.unit, self.cap
        self.tell_unknown(wanted, kept)
        parts = open_parts(wanted)
        guessed = sum(part.price or 0 for part in parts if part.is_estimate)
        high = round(sum(part.price or 0 for part in parts) + guessed / 5, 6)
        names = self.held.keys() - {part.reserved for part in parts}
        most = round(high + sum(self.held[name] for name in names), 6)
        if cap is not None and most > cap:
            guess = " (with a fifth on top of guesses)" * bool(guessed)
            before = f", and all together {amount(most, unit)}" * (most > high)
            text = f"to make: {len(wanted)}, for about {amount(high, unit)}{guess}{before}"
            raise OutOfCredits(f"{text}; --max-credits is {amount(cap, unit)}: raise it; {kept}")
        # What is in doubt may be paid already: there the server has the last word.
        new = open_parts(clip for clip in wanted if clip.state == NEW)
        price = round(sum(part.price or 0 for part in new), 6)
        if self.balance and price > (left := self.balance.remaining):
            how = f"add funds and run the same command again; {kept}"
            costs, has = amount(price, unit), amount(left, unit)
            text = f"this costs about {costs} and the account has {has}: {how}"
            share = MIN_SECONDS / max(MIN_SECONDS, sum(part.seconds or 0.0 for part in new))
            raise OutOfCredits(text, is_of_all=left < share * price)  # not even the shortest

    def tell_unknown(self, clips: Sequence[Clip], kept: str = "") -> None:
        """Say of which clips no price is known, and why; raises InputError where there is a cap and
        something is about to be paid."""
        if not (unknown := [clip for clip in clips if clip.due is None]):
            return
        text = f"no price is known of {', '.join(clip.name for clip in unknown)}"
        if any(clip.seconds is None for clip in unknown):
            text += ": how long the recording is cannot be told without ffprobe (a part of ffmpeg)"
        if kept and self.cap is not None:
            how = "run it again later, move these away, or leave --max-credits out"
            raise InputError(f"{text}; --max-credits is a limit, so {kept}: {how}")
        self.view.say(f"warning: {text}; the server has the last word")

    # -- make: one clip, under its lock

    def make(self, clip: Clip) -> None:
        """The product: one clip from its files to its video, free if it was paid for before.

        Raises HedraError, OSError; whatever was paid for by then is in the ledger.
        """
        deadline = min(self.deadline, time.monotonic() + self.timeout_s)
        with self.http.until(deadline, clip.effort), self.owned(clip):
            self.decide(clip)
            self.check(clip)
            self.check_old(clip)
            if clip.state in OPEN:
                self.order(clip)
            if clip.state != DONE:
                self.collect(clip)
            elif clip.kind == VIDEO:  # others may be reading a speech just now
                with contextlib.suppress(OSError, InputError):
                    self.ledger.keep(clip)

    def decide(self, clip: Clip) -> None:
        """Judge once more, as another process may have been at work since the plan, and take up
        what Hedra was found to have. Raises GenerationFailed for what was refused."""
        self.ledger.load("clips", clip.key, owned=True)
        force = self.force and clip.state in OPEN
        clip.state = self.judge(clip, force=force)
        if clip.state == REFUSED:
            part = next(part for part in clip.parts if part.state == REFUSED)
            whose = "" if part is clip else "its speech: "
            raise GenerationFailed(
                f"{whose}refused before, and not paid again: {part.record.text('reason')} (change "
                "portrait, recording, text or prompt; --force pays for a new take)",
                generation_id=part.generation_id,
            )
        doubtful, found = clip.state == DOUBT, "" if clip.generation_id else clip.found
        if not found and doubtful:
            found = self.look(clip)
            if not found and self.http.left_s() <= 0:  # which has found out nothing
                text = f"whether {clip.name} was paid for takes {GRACE_S:g} s to find out"
                raise StillRunning(f"{text}: run it again with a longer --timeout")
            if not found and not self.api.replays:
                clip.record.save(state=NEW)
                clip.state = self.judge(clip, force=force)
        if found:
            self.accept(clip, found, paid=False)
            clip.state = FLIGHT
            if self.force and not doubtful and clip.kind == VIDEO:
                clip.state = NEW  # how old that one is nobody knows: a new one was asked for
                clip.record.save(state="done")

    @contextlib.contextmanager
    def owned(self, clip: Clip) -> Iterator[None]:
        """Nobody else works on this clip, nor on a video of that name."""

        def refuse() -> None:
            busy = f"{clip.target} is being written by another process, for another clip"
            text = f"{busy}; nothing was paid: give this one another --out"
            raise InputError(text, unfinished=True)

        def wait() -> None:
            REFUSAL.set("another process is making it")
            self.view.state(clip, "waiting", "it is made elsewhere")

        mine = self.ledger.own(f"clip {clip.key}", wait)
        with mine, self.ledger.own(f"target {clip.place}", refuse):
            try:
                yield
            finally:
                self.http.waiting.discard(clip.generation_id)

    def begin_take(self, clip: Clip) -> None:
        """Take up the take that is about to be submitted: a new one, with a random name, where the
        last one was delivered or refused; one that was never submitted is used again."""
        if clip.record.text("state") in ("", NEW, "intent"):
            return
        first, *others = takes = self.takes(clip.key)
        if takes[-1].text("state") not in ("", NEW):
            name = os.urandom(8).hex()
            first.save(sync=True, takes=[*(take.text("take") for take in others), name])
            takes += [Record(first.path.with_name(f"{clip.key}.{name}.json"), {"take": name})]
        clip.record = takes[-1]

    def order(self, clip: Clip) -> None:
        """Rules 2 to 4: price, uploads, intent, submit."""
        if self.broke:
            raise Stopped(f"not sent, as the funds are used up: {self.broke}")
        if clip.speech and not clip.recording.size_bytes:
            self.speak(clip, clip.speech)
            self.balance = self.tolerant(self.api.balance, "the balance")  # it has cost something
        self.quote(clip)
        self.begin_take(clip)
        self.hold(clip)
        try:
            generation_id, fresh = self.submit(clip)
        except OutOfCredits as error:
            self.broke = error
            raise
        self.accept(clip, generation_id, paid=fresh)

    def speak(self, clip: Clip, speech: Clip) -> None:
        """Make the speech of a clip first, or take the one that there is; then its video has a
        known length and price. Where it turns out to be lost, --force pays for that, too."""
        try:
            self.make(speech)
        except HedraError as error:
            if self.force and speech.state in (FETCH, FLIGHT) and speech.record.flag("lost"):
                speech.state = NEW
                self.speak(clip, speech)
            else:
                error.args = (f"its speech: {error}",)
                raise
        finally:
            self.view.leave(speech)
            clip.effort |= speech.effort
        speech.state = DONE
        self.hear(clip, speech)
        clip.price = None

    def hold(self, clip: Clip) -> None:
        """Hold what is about to be paid against the cap and, as the true length of what says a text
        is known only now, against the balance."""
        before = "its speech" if clip.speech else "what was made before"
        kept = f"nothing was paid for the {clip.kind}; {before} is kept"
        with self.lock:
            if self.cap is not None and clip.kind == VIDEO and clip.is_estimate:
                how = "install ffprobe (a part of ffmpeg) or leave --max-credits out"
                raise InputError(f"how long its speech is, and so its price, is not known: {how}")
            if self.cap is not None or (clip.speech and clip.price):
                self.afford([clip], kept)
            self.held[clip.reserved] = clip.price or 0.0

    def about(self, clip: Clip) -> dict[str, Any]:
        """For the person who reads the ledger."""
        return {
            "clip": str(clip.name if clip.speech or clip.kind == SPEECH else clip.audio),
            "kind": clip.kind, "portrait": str(clip.image.name and clip.image),
            "voice": clip.voice, "prompt": clip.prompt, "model": self.asked[clip.kind],
            "account": self.account.id, "unit": self.api.unit,
        }

    def prepare(self, clip: Clip) -> None:
        """Upload what Hedra has not got, or what it has forgotten, and write down what will be
        asked of it. A portrait is shared by all clips and processes; a recording is of this clip
        and take alone, so that it tells them apart."""
        image, audio, clip.sending = "", "", 0
        if clip.kind == VIDEO:
            with clip.timed("uploading"):
                image, audio = self.http.together(
                    lambda: self.portrait(clip),
                    lambda: self.upload(clip, clip.audio, "audio", clip.record, "audio"),
                )
        clip.model = self.model(self.asked[clip.kind], kind=clip.kind)
        clip.record.save(sync=True, **{
            **self.about(clip), "state": "intent", "image": image, "audio": audio,
            "reserved": clip.reserved, "submitted_at": time.time(),
            "price": clip.record.number("price") if clip.price is None else clip.price,
        })

    def portrait(self, clip: Clip) -> str:
        """The portrait's asset; the first clip that needs it uploads it."""
        key = digest_of(clip.portrait.digest, self.account.id)
        with self.ledger.own(f"asset {key}", lambda: None):
            record = self.ledger.load("assets", key, owned=True)
            return self.upload(clip, clip.image, "image", record, "ref")

    def upload(self, clip: Clip, file: Path, kind: Kind, record: Record, name: str) -> str:
        """What a submit names a file by: as `record` has it (with five minutes left to send it),
        else uploaded, and then made sure that it was the one that was hashed."""
        ref, lapses = record.text(name), record.number(f"{name}_expires_at", "expires_at")
        if ref and ref not in self.forgotten and time.time() < (lapses or math.inf) - 300:
            return ref
        image = kind == "image"
        what, media = ("portrait", clip.portrait) if image else ("recording", clip.recording)
        self.view.state(clip, f"uploading {what}", f"{media.size_bytes / 1e6:.1f} MB")
        clip.sending += media.size_bytes
        ref, lapses = self.api.upload(
            file, kind, lambda count: self.view.move(clip, count, clip.sending)
        )
        if self.ledger.media(file, kind).digest != media.digest:
            text = f"{file} changed while it was sent; nothing was paid"
            raise InputError(text, unfinished=True)
        record.values |= {**self.about(clip), name: ref, f"{name}_expires_at": lapses}
        record.save()
        return ref

    def submit(self, clip: Clip) -> tuple[str, bool]:
        """The id of the generation, and whether this very submit made it. After an answer that
        leaves open what happened, look before another."""
        faults, refusals, renewed = 0, 0, False
        lost = clip.state == DOUBT  # it may be paid already, and a replay would not tell
        while True:
            self.prepare(clip)
            try:
                return self.api.submit(clip), clip.state != DOUBT
            except HedraError as error:  # Stopped, StillRunning: before anything went out
                lost = lost or (error.ambiguous and error.status != 409)
                if error.ambiguous and (found := self.look(clip)):
                    return found, lost  # else it was there before this submit
                if not (error.ambiguous or lost):
                    clip.record.save(state=NEW)
                    error.add(f"nothing was paid for the {clip.kind}")
                if not renewed and (renewed := self.renew(clip, error)):
                    continue
                is_limit = isinstance(error, RateLimited)  # of the account, or of a gateway
                faults, refusals = faults + (not is_limit), refusals + is_limit
                again = (error.retryable or error.ambiguous) and faults < SUBMIT_TRIES
                wait_s = error.retry_after or backoff_s(faults, 0.5, cap=8.0)
                if not again or wait_s > self.http.longest_s():
                    if error.ambiguous:
                        error.add(IN_DOUBT)
                    raise
                self.http.count("retries")
                if is_limit and not error.ambiguous:
                    self.view.state(clip, "waiting for a place", error.words)
                    self.await_place(error, refusals)
                else:
                    self.view.state(clip, "submitting again", f"after: {error.words or error}")
                    self.http.sleep(wait_s)

    def be_patient(self) -> None:
        """As long as a clip of ours is at work a place will be free, and the time that it takes is
        not that of the clip that waits."""
        if self.http.waiting:
            DEADLINE.set(min(self.deadline, time.monotonic() + self.timeout_s))
        self.http.sleep(0.0)

    def await_place(self, error: HedraError, refusals: int) -> None:
        """Wait after a refusal until it is over; or, one clip after the other, until one of the
        generations that run has ended, so that each clip takes the place of one."""
        http, words, alone = self.http, error.words.lower(), not self.http.waiting
        of_rate = alone or re.search(r"\brate\b|\brequests\b", words)
        if of_rate and "concurren" not in words:
            http.pace.refused(error)  # alone, and refused: it is the rate
            self.be_patient()
            return
        while not self.turn.acquire(timeout=0.2):
            self.be_patient()
        try:
            running = {*http.waiting}
            until = time.monotonic() + (error.retry_after or backoff_s(refusals, 1.0, cap=3.0))
            while running <= http.waiting and time.monotonic() < until:
                running = running or {*http.waiting}
                http.sleep(0.1)
            self.be_patient()
        finally:
            self.turn.release()

    def renew(self, clip: Clip, error: HedraError) -> bool:
        """Whether a refusal may be of files, or of a model, that were there before and are worth
        another try: they are forgotten."""
        words = f"{error.code} {error.words}".lower()
        is_clear = error.status in (400, 404, 410, 422) and not error.ambiguous
        if clip.kind == SPEECH or not is_clear or error.retryable:
            return False
        if "model" in words and not re.search("asset|image|audio|keyframe|file", words):
            if self.asked[VIDEO] or self.api.replays:
                return False
            self.model.cache_clear()
            (self.account.cache / "model_id").unlink(missing_ok=True)
        elif not re.search("asset|image|audio|keyframe|file|expired|not.?found", words):
            return False
        self.forgotten |= {clip.record.text("image"), clip.record.text("audio")}
        return True

    def look(self, clip: Clip) -> str:
        """Whether a submit whose answer was lost was carried out: the id of the generation, ""
        once Hedra, GRACE_S after this look began, still knows of nothing. Other machines' clocks
        do not count."""
        first, pause_s = time.monotonic(), 0.25
        with contextlib.suppress(StillRunning):
            while not self.api.replays:
                is_last = time.monotonic() - first >= GRACE_S
                if (found := self.api.find(clip, far=is_last)) or is_last:
                    return found
                self.view.state(clip, "looking", "was the submit carried out?")
                self.http.sleep(pause_s)
                pause_s = min(3.0, 2 * pause_s)
        return ""

    def accept(self, clip: Clip, generation_id: str, *, paid: bool) -> None:
        """Hedra has the generation: from here on it is paid for, and must not be forgotten."""
        clip.paid, take = paid, clip.record
        self.http.waiting.add(generation_id)  # it has a place, as who is refused must know
        take.save(sync=True, **{
            **self.about(clip), "state": "submitted", "generation_id": generation_id,
            "submitted_at": take.number("submitted_at") or time.time(), "unbilled": True,
        })
        if paid:
            with self.lock:
                self.spent = round(self.spent + (clip.price or 0.0), 6)
                self.view.spent = amount(self.spent, self.api.unit)
            cost = f"about {amount(clip.price, self.api.unit)}"
            detail = f"generation {generation_id}, {cost}"
            self.view.state(clip, "submitted", detail, note=cost)

    # -- collect: wait for a generation and fetch what it made

    def collect(self, clip: Clip) -> None:
        """Bring the result to its place: from this disk if it is there, as what was delivered may
        be no longer at Hedra, else at the end of the generation. What goes wrong here loses
        nothing."""
        if not clip.paid:
            detail = f"generation {clip.generation_id}, already paid"
            self.view.state(clip, "found", detail, note="already paid")
        try:
            if not self.copy(clip):
                self.bring(clip)
            self.ledger.keep(clip, state="done", etag="", lost=False)
        except OSError as error:
            if not isinstance(error, HedraError):  # as StillRunning is
                error.filename = error.filename or str(clip.target)  # a full disk names none
            raise

    def bring(self, clip: Clip) -> None:
        """Wait for the generation, and download what it made."""
        with clip.timed("waiting"):
            url = self.await_end(clip).url
        alone = [clip] if self.deadline < math.inf and clip.kind == VIDEO else []
        with clip.timed("downloading"):
            self.http.together(
                functools.partial(self.download, clip, url),
                functools.partial(self.settle, alone, owned=True),
            )

    def await_end(self, clip: Clip) -> Status:
        """Wait for the end; a generation that is not known leads back to what was reserved. Raises
        GenerationFailed, StillRunning."""
        delivered, found = clip.record.text("state") == "done", ""
        for again in (False, True):
            try:
                status = self.watch(clip, GRACE_S if again and not delivered else 0.0)
                break
            except ApiError as error:
                # 400 and 422 are of an id that could be none of Hedra's.
                if error.status not in (400, 404, 422) or error.ambiguous or again:
                    raise self.gone(clip, error, found) from error
                found = self.trace(clip) if clip.reserved else ""
        clip.billed = status.cost
        if status.cost is not None:  # written down with what comes of it
            clip.record.values |= {"billed": status.cost, "unbilled": False}
        if status.state == FAILED:
            text = f"Hedra could not make it: {status.failure} [generation {clip.generation_id}]"
            if status.is_of_it and not delivered:
                clip.record.save(state="refused", reason=text, transient=status.transient)
            how = "change what it is made of"
            if status.transient:
                how = "run the same command again for a new take"
            raise GenerationFailed(
                f"{text}; {how}", generation_id=clip.generation_id, words=status.failure,
                retryable=status.transient,
            )
        return status

    def watch(self, clip: Clip, grace_s: float) -> Status:
        """Look at a generation until it has ended; raises StillRunning, ApiError."""
        name, status, http = clip.generation_id, Status(QUEUED), self.http
        if not name:
            raise ApiError(f"the ledger has lost the id of {clip.name}", status=404)
        http.waiting.add(name)
        try:
            for status in self.api.iter_status(name, self.interval_s, grace_s):
                if status.state != FAILED:  # which is told with its reason
                    self.view.state(clip, status.state, share=status.progress)
            return status
        except StillRunning as error:
            error.generation_id = name
            error.add(f"generation {name} was {status.state} and goes on at Hedra")
            raise
        finally:
            http.waiting.discard(name)

    def trace(self, clip: Clip) -> str:
        """Hedra does not know the id that it answered the submit with, or not yet: find the one
        that the reserved id or key leads to, "" for none. The id of what was delivered was right:
        its key, if Hedra has forgotten that as well, would pay again."""
        take, at, found = clip.record, clip.record.number("submitted_at") or 0.0, ""
        delivered = take.text("state") == "done"
        if not self.api.replays:
            found = self.api.find(clip)
        elif time.time() - at < KEPT_S and not (clip.generation_id and delivered):
            try:
                self.prepare(clip)
                found = self.api.submit(clip)
            finally:  # as an intent it would be submitted again when its key may have lapsed
                take.save(state="submitted", submitted_at=at)
        if found and found != clip.generation_id:
            take.save(sync=True, generation_id=found)
        return found

    def gone(self, clip: Clip, error: HedraError, found: str = "") -> HedraError:
        """An error about a generation, with what to do where Hedra no longer has it; but where it
        was `found` in the list it is there."""
        if not clip.key:
            return error
        is_unknown = error.status == 404 and not error.ambiguous  # a gateway's page says nothing
        delivered = clip.record.text("state") == "done"
        if error.code == "EXPIRED" or (delivered and is_unknown and not found):
            error.add("it is neither at Hedra nor on this disk: --force pays for a new take")
            clip.record.save(lost=True)
        elif error.status == 404:
            error.add(LATER)
        return error

    def copy(self, clip: Clip) -> bool:
        """Take the result from where it lies on this disk, if it does."""
        for _ in range(3):  # by the time of the copy another may have come to where it lay
            if (there := self.ledger.find(clip, nearby=True)) in ("", clip.place):
                return bool(there)
            part = hidden(clip.target, clip.generation_id)
            try:
                if there != str(part):
                    shutil.copyfile(there, part)
            except OSError as error:  # which names what was read
                part.unlink(missing_ok=True)
                raise OSError(error.errno, error.strerror, str(clip.target)) from error
            if video_digest(part) in clip.digests:
                self.ledger.put(clip, part)
                return True
            part.unlink()  # a download would go on with it
        return False

    def download(self, clip: Clip, url: str) -> None:
        """Download the result, and say what is odd about it. [Videos have come without a sound
        track, or of another length than the recording.]"""
        self.view.state(clip, "downloading", str(clip.target))
        download, length = Download(self.api, clip, self.view), clip.seconds
        try:
            film = download.run(url, self.interval_s)
        except HedraError as error:
            raise self.gone(clip, error) from error
        self.ledger.put(clip, download.path)
        if not film.has_sound:
            clip.warning = "the video has no sound track; it is kept"
        elif not length or not film.seconds or clip.is_estimate:
            return
        elif abs(film.seconds - length) > 1 + 0.05 * length:
            both = f"{film.seconds:.1f} s, its recording {length:.1f} s"
            clip.warning = f"the video lasts {both}; it is kept"
        if clip.warning:
            self.view.say(f"warning: {clip.name}: {clip.warning}")

    # -- settle: what Hedra says that it cost

    def settle(self, clips: Sequence[Clip], *, owned: bool = False) -> None:
        """Ask what Hedra has billed for what was made and has not been asked for, as a run may have
        been stopped: one request for all of it, and for one alone, `owned`, while it comes."""
        asked = [
            part for clip in clips for part in clip.parts if part.record.flag("unbilled")
            if not clip.error or part.record.text("state") != "submitted"  # it goes on
        ]
        most_s = min(30.0, self.timeout_s, self.account.silence_s)
        limit = self.http.until(time.monotonic() + most_s)
        with contextlib.suppress(HedraError, OSError), limit:
            names = dict.fromkeys(part.generation_id for part in asked)
            ask = functools.partial(self.api.find_all, list(names))
            if asked and (found := self.tolerant(ask, "the bill")) is not None:
                for part in asked:
                    self.note_bill(part, found.get(part.generation_id), owned=owned)

    def note_bill(self, part: Clip, cost: float | None, *, owned: bool) -> None:
        """Write down what Hedra says of a take that was asked for; one that goes on, or has only
        just ended, is asked for again. Without its lock another process may have gone on with its
        record since."""
        part.billed = None if cost is None or cost < 0 else cost
        record = part.record if owned else self.ledger.load("clips", part.record.path.stem)
        if record.text("generation_id") == part.generation_id:
            part.record = record
            if record.flag("unbilled"):
                age_s = time.time() - (record.number("submitted_at") or 0.0)
                late = age_s < LATE_BILL_S and record.text("state") == "done"
                later = cost is None and (late or record.text("state") == "submitted")
                record.save(billed=part.billed, unbilled=later)


# ---- library: make_video, make_speech; step by step: create_asset, upload_asset, upload, ... -----

Environ = Mapping[str, str] | None


@functools.lru_cache(maxsize=8)
def connected(account: Account, process: int) -> Api:
    """One connection pool an account and process: a child must not read its parent's answers."""
    return api_for(Transport(account))


def connect(api_key: str, environ: Environ = None) -> Api:
    """The API that a key belongs to. Raises InputError for a key or setting that cannot be right.
    `environ`, here and below: where HEDRA_ variables are read, os.environ unless given."""
    return connected(open_account(api_key, environ), os.getpid())


def check_wishes(prompt: str, settings: Mapping[str, Any] | None) -> None:
    """Raise InputError for a blank prompt, and for settings that would not be priced."""
    if not prompt.strip():
        raise InputError("the prompt is blank: say in a few words what the person does")
    if not isinstance(settings or {}, Mapping):
        raise InputError("the settings are no mapping of names to values")
    if found := [name for name in settings or () if name in OUR_FIELDS]:
        raise InputError(f"{found[0]!r} has a parameter of its own, or is not free")
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings are no JSON: {error}") from None


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the disk refuses comes out as a HedraError that names the file."""
    try:
        yield
    except HedraError:  # StillRunning is an OSError as well
        raise
    except OSError as error:
        raise HedraError(explain(error)) from error


def make_one(studio: Studio, clip: Clip) -> Path:
    """Plan, afford, make: one clip for a program that calls."""
    studio.deadline = time.monotonic() + studio.timeout_s
    try:
        with told(), studio.http.until(studio.deadline):
            studio.plan([clip])
            if clip.error:
                raise clip.error
            studio.afford([clip])
            studio.make(clip)
        studio.settle([clip])
    finally:
        studio.view.leave(clip)
    return clip.target


def make_video(
    audio: Path, image: Path, out: Path, api_key: str, prompt: str = DEFAULT_PROMPT, *,
    resolution: str = "540p", aspect_ratio: str = "9:16", model: str = "",
    settings: Mapping[str, Any] | None = None, force: bool = False, timeout: float = 1800,
    poll_interval: float = 5.0, view: View | None = None, environ: Environ = None,
) -> Path:
    """The whole product in one call: the path of the video of a recording and a portrait, at `out`.

    Paid once, however often it is called, in whatever threads and processes; taken up where an
    earlier call ended. `force` pays a new take; `timeout` and `poll_interval` are in seconds;
    `settings` as of --set; silent unless given a `view`. Raises InputError before anything was
    sent, OutOfCredits, GenerationFailed, StillRunning (call again), ApiError.
    """
    environ, out = os.environ if environ is None else environ, Path(out)
    check_wishes(prompt, settings)
    studio = Studio(
        connect(api_key, environ), view or View(), force=force, timeout_s=timeout,
        model=model or setting(environ, "HEDRA_MODEL_ID"), interval_s=poll_interval,
    )
    return make_one(studio, Clip(
        out.stem, out, prompt=prompt.strip(), audio=Path(audio), image=Path(image),
        resolution=resolution, aspect_ratio=aspect_ratio, settings=settings or {},
    ))


def make_speech(
    text: str, voice: str, out: Path, api_key: str, *, speech_model: str = "",
    force: bool = False, timeout: float = 1800, poll_interval: float = 5.0,
    view: View | None = None, environ: Environ = None,
) -> Path:
    """A text spoken by a voice (its name or id), as a recording at `out`: a wav, mp3 or whatever
    Hedra makes. Paid once, as a video is, and kept in the cache, too; `force` makes one anew that
    was refused or is lost. Raises the same errors as make_video."""
    studio = Studio(
        connect(api_key, environ), view or View(), speech_model=speech_model, timeout_s=timeout,
        interval_s=poll_interval, force=force,
    )
    for target in (Path(out), Path()):  # the second, from the first, in the cache
        speech = Clip(Path(out).stem, target, prompt=text.strip(), kind=SPEECH)
        speech.voice = voice.strip()
        make_one(studio, speech)
    return Path(out)


def create_asset(name: str, kind: Kind, api_key: str, *, environ: Environ = None) -> str:
    """Make the record that a file is then uploaded to; its id. Web API (v2). Raises ApiError, and
    InputError with a key of the other API."""
    return connect(api_key, environ).create_asset(name, kind)


def upload_asset(asset_id: str, file: Path, api_key: str, *, environ: Environ = None) -> None:
    """Send a file's bytes to an asset, streamed. Web API (v2). Raises ApiError, InputError."""
    connect(api_key, environ).upload_asset(asset_id, Path(file), lambda count: None)


def upload(file: Path, kind: Kind, api_key: str, *, environ: Environ = None) -> str:
    """Hand a file to Hedra; the reference that start_generation takes, with either kind of key:
    an asset's id (v2), or a handle that lapses after an hour (v3). Raises ApiError, InputError."""
    inspect_file(Path(file), kind)
    return connect(api_key, environ).upload(Path(file), kind, lambda count: None)[0]


def get_default_model_id(api_key: str, *, environ: Environ = None) -> str:
    """HEDRA_MODEL_ID if set, else Character 3's id (or slug) from `.cache/model_id` or, looked up,
    from the catalogue. Raises HedraError with the models that would do where it has none."""
    asked = setting(os.environ if environ is None else environ, "HEDRA_MODEL_ID")
    return asked or connect(api_key, environ).model().text("id", "slug")


def start_generation(
    image_id: str, audio_id: str, prompt: str, api_key: str, model_id: str | None = None, *,
    resolution: str = "540p", aspect_ratio: str = "9:16", generation_id: str = "",
    settings: Mapping[str, Any] | None = None, environ: Environ = None,
) -> str:
    """Start a generation and pay for it; its id. The bare call: twice is two generations, unless
    `generation_id` is given (v2: a UUID that becomes the id; v3: an idempotency key). `settings`
    go as they are beside the prompt. Raises ApiError (`ambiguous` where it may have been carried
    out all the same), OutOfCredits."""
    api = connect(api_key, environ)
    check_wishes(prompt, settings)
    name = model_id or get_default_model_id(api_key, environ=environ)
    known = api.model(name if api.replays else "", known_only=True)
    if not api.replays and name not in (known.text("id"), known.text("slug")):
        known = Reply({"id": name})  # as it was given: no slug of an earlier day
    clip = Clip(
        "", Path(), prompt=prompt, resolution=resolution, aspect_ratio=aspect_ratio,
        settings=settings or {}, model=known,
    )
    clip.record.values |= {"image": image_id, "audio": audio_id, "reserved": generation_id}
    try:
        return api.submit(clip)
    except ApiError as error:
        if error.status != 409 or not generation_id or api.replays:
            raise
        return generation_id  # it has been started before


def wait_and_download(
    generation_id: str, out_dir: Path, api_key: str, timeout: int = 300, *,
    poll_interval: float = 5.0, name: str = "", view: View | None = None, environ: Environ = None,
) -> Path:
    """Wait for a generation, at most `timeout` seconds with a look every `poll_interval` seconds,
    and download it to `out_dir`/`name`.mp4 (default: its id), the path; a terminal shows how far it
    is. Raises GenerationFailed, StillRunning (a TimeoutError: nothing is lost), ApiError."""
    target = Path(out_dir) / ((name or re.sub(r"[^\w.-]", "_", generation_id)) + ".mp4")
    shown = view or open_view(quiet=not (sys.stderr and sys.stderr.isatty()))
    studio = Studio(connect(api_key, environ), shown, interval_s=poll_interval)
    clip = Clip(target.stem, target)
    clip.record = studio.ledger.load("parts", digest_of(clip.place, generation_id))
    clip.record.values |= {"generation_id": generation_id, "state": "submitted"}
    try:
        with told(), studio.http.until(time.monotonic() + timeout):
            target.parent.mkdir(parents=True, exist_ok=True)
            with studio.ledger.own(f"target {clip.place}", lambda: None):
                studio.collect(clip)
    finally:
        with contextlib.suppress(OSError):
            if not hidden(target, generation_id).exists():  # else its ETag is needed to go on
                clip.record.path.unlink(missing_ok=True)
        shown.leave(clip)
        if not view:
            shown.close()
    return target


def get_balance(api_key: str, *, environ: Environ = None) -> Balance:
    """What the account can spend, in its unit: credits (v2), US dollars (v3). Raises ApiError,
    InputError."""
    return connect(api_key, environ).balance()


def get_credit_balance(api_key: str, *, environ: Environ = None) -> int:
    """Credits left (v2); with a v3 key the whole dollars in the wallet: see get_balance."""
    return int(get_balance(api_key, environ=environ).remaining)


def get_voices(api_key: str, *, speech_model: str = "", environ: Environ = None) -> list[Voice]:
    """Who can speak (v3: with `speech_model`): id, name, labels, preview_url. Raises ApiError,
    InputError."""
    return connect(api_key, environ).voices(speech_model)


# ---- folders: clip_of, folder_clip, table, Command ----------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OF_A_CLIP = (*IMAGE_SUFFIXES, ".txt", ".voice.txt")  # what may lie beside its recording
SOUND_SUFFIXES = (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".aif", ".aiff")
SAY_SUFFIX = ".say.txt"
ENDLESS = (".mp3", ".m4a", ".flac", ".ogg")  # they need not tell where they end
STILL_S, LONG_STILL_S = 1.0, 4.0  # without a change: it may be whole
LONGEST_STEP_S = 150.0  # between two writes of an encoder: 256 KiB at 14 kbit/s
OTHER_SOUND = (  # what looks like sound
    r"\.(3ga|3gpp?|aac|ac3|aifc|amr|ape|au|awb|caf|m4b|m4r|mka|mp2|mpga|oga|opus|ra|spx|tta|w64|wave"
    r"|weba|webm|wma|wv)$"
)
Names = Mapping[str, str]  # of a folder, as `folder_names` gives them


def folder_names(folder: Path) -> Names:
    """The names in a folder, by themselves and in lower case, for cameras write X.JPG."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"the folder {folder}: {error.strerror}") from error
    return {name.lower(): name for name in names} | {name: name for name in names}


def stem_of(name: str) -> str:
    """The name of a clip, from that of its recording or text."""
    said = name.lower().endswith(SAY_SUFFIX)
    return name[: -len(SAY_SUFFIX)] if said else name.rpartition(".")[0] or name


def beside(source: Path, names: Names, suffixes: Sequence[str] = OF_A_CLIP) -> list[Path]:
    """The files beside a recording that have its name and one of some suffixes."""
    wanted = [stem_of(source.name) + suffix for suffix in suffixes]
    found = [names.get(name) or names.get(name.lower()) for name in wanted]
    return [source.parent / name for name in found if name and name != source.name]


def find_sources(folder: Path, names: Names) -> dict[str, list[Path]]:
    """By the name of a clip its recordings, or else the text to be spoken; no hidden files."""
    sounds, texts = dict[str, list[Path]](), dict[str, list[Path]]()
    for name in sorted(set(names.values())):
        if name.lower().endswith((*SOUND_SUFFIXES, SAY_SUFFIX)) and name[0] != ".":
            found = texts if name.lower().endswith(SAY_SUFFIX) else sounds
            found.setdefault(stem_of(name), []).append(folder / name)
    return dict(sorted((texts | sounds).items()))


def ignored_text(names: Names) -> str:
    """What to say of files that look like sound and are taken by nobody, "" for none."""
    matches = [re.search(OTHER_SOUND, name.lower()) for name in set(names.values())]
    if not (found := [match[0] for match in matches if match]):
        return ""
    files = f"{len(found)} file{'s' * (len(found) > 1)} ignored: {', '.join(sorted(set(found)))}"
    return f"{files} (taken are {' '.join(SOUND_SUFFIXES)} and x{SAY_SUFFIX})"


def read_text(file: Path, limit: int = PROMPT_BYTES) -> str:
    """What a text file says, without blanks around it."""
    with open_regular(file) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{file} has more than {limit:,} bytes: too long")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: {error}") from error


def has_writer(file: Path, flags: int = 0) -> bool:
    """Whether the kernel refuses a lease (fcntl(2), F_SETLEASE: Linux, of one's own files), as it
    does while a program has the file open to write."""
    import fcntl
    import signal

    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | flags)  # it may be a pipe
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # ignored, should a writer come now
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@functools.cache
def grants_leases(folder: Path) -> bool:
    """Whether it grants one of a file that nobody writes: some network shares have none to give."""
    probe = hidden(folder / "lease", str(os.getpid()))
    try:
        return not has_writer(probe, os.O_CREAT)
    except OSError:  # not a folder that we may write to: then a refusal counts
        return True
    finally:
        probe.unlink(missing_ok=True)


def still_s(file: Path) -> float:
    """How long a file has to be without a change, as it may still be being written."""
    return LONG_STILL_S if file.name.lower().endswith((*ENDLESS, ".txt")) else STILL_S


def is_being_written(file: Path, rest_s: float = 0.0) -> bool:
    """Whether a file has changed within `rest_s`, or a program still has it open that may add to
    it, though it looks whole: encoders write in steps that are many seconds apart, and some mend
    the header at each. What has long been left alone is taken; where nobody can tell, the times
    alone decide."""
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not on Linux
        if 0 <= (age_s := time.time() - os.stat(file).st_mtime) < LONGEST_STEP_S:
            return age_s < rest_s or (has_writer(file) and grants_leases(file.parent))
    return False


def clip_of(source: Path, args: argparse.Namespace, names: Names) -> Clip:
    """A clip from its recording or text (which in run may be no file) and what lies beside it; in
    run a flag wins over that. Raises InputError without a portrait, and while one of its files is
    being written."""
    files = [source, *beside(source, names)] if names else []
    is_drop = args.command == "watch"
    busy = (file for file in files if is_being_written(file, still_s(file) * is_drop))
    if file := next(busy, None):
        why = f"{file} is still being written: nothing is sent before that program has closed it"
        raise InputError(why, unfinished=True, is_open=True)

    def chosen(suffixes: Sequence[str], flag: str, fallback: str = "") -> str:
        found = beside(source, names, suffixes)
        texts = [str(f) if suffixes is IMAGE_SUFFIXES else read_text(f) for f in found]
        ranked = [flag, *texts] if args.command == "run" else [*texts, flag]
        return next((choice for choice in [*ranked, fallback] if choice.strip()), "")

    name, is_text = stem_of(source.name), source.name.lower().endswith(SAY_SUFFIX)
    says = args.say if args.command == "run" else "@" * is_text  # @: what the file says
    text = read_text(source, TEXT_BYTES) if says[:1] == "@" else says
    if not (image := chosen(IMAGE_SUFFIXES, args.img, args.fallback)):
        ways = f"put {name}.png beside it, give --img FILE, or set FRIEND_IMG"
        raise InputError(f"{source} has no portrait: {ways}")
    clip = Clip(
        name, Path(args.out) if args.out else Path(args.out_dir, f"{name}.mp4"),
        image=Path(image), audio=source, settings=dict(args.set),
        prompt=chosen([".txt"], args.prompt, DEFAULT_PROMPT).strip(),
        resolution=args.resolution, aspect_ratio=args.aspect_ratio,
    )
    if says:
        clip.speech = Clip(f"{name} (speech)", Path(), prompt=text.strip(), kind=SPEECH)
        clip.speech.voice = chosen([".voice.txt"], args.HEDRA_VOICE or "", args.voice).strip()
        clip.audio = Path()
    if re.search("[\ud800-\udfff]", "".join(part.prompt + part.voice for part in clip.parts)):
        raise InputError("the prompt, text or voice is not UTF-8 text")
    return clip


def folder_clip(sources: Sequence[Path], args: argparse.Namespace, names: Names) -> Clip:
    """The clip of some recordings of one name; one that cannot be made has an `error`."""
    try:
        if len(sources) > 1:
            rivals = ", ".join(source.name for source in sources)
            raise InputError(f"two recordings of one name: {rivals}; keep one")
        return clip_of(sources[0], args, names)
    except InputError as error:
        return Clip(stem_of(sources[0].name), Path(), error=error, state=BAD)


def table(clips: Sequence[Clip], left: str, unit: str, columns: int) -> str:
    """The answer to --dry-run; `~` marks lengths and prices of speeches that are not there yet."""
    rows = [("clip", "seconds", unit, "state")]
    for clip in clips:
        mark = "~" if clip.is_estimate and clip.state in OPEN else ""
        unknown = "" if clip.error else "?"
        seconds = unknown if clip.seconds is None else f"{mark}{clip.seconds:.1f}"
        price = "" if clip.error else f"{mark}{amount(clip.due, '').strip()}"
        state = clip.state + (f": {explain(clip.error)}" if clip.error else "")
        rows.append((printable(clip.name), seconds, price, printable(state)))
    new = [clip for clip in clips if clip.state == NEW]
    length = total(clip.seconds for clip in new)
    seconds = "?" if length is None else f"{length:.1f}"
    due = amount(total(part.price for part in open_parts(clips)), "").strip()
    rows.append(("total", seconds, due, f"{len(new)} new; balance: {left}"))
    width = max(5, min(max(len(row[0]) for row in rows), columns - 24 - len(rows[-1][3])))
    trim, cells = need("tqdm.utils").disp_trim, need("tqdm.utils").disp_len
    lines = []
    for name, *others in rows:
        name = name if cells(name) <= width else f"{trim(name, width - 1)}…"
        line = "{}  {:>8}  {:>10}  {}".format(name + " " * (width - cells(name)), *others)
        lines.append(trim(line, columns))
    return "\n".join(lines)


def outcome(clip: Clip, unit: str | None) -> dict[str, Any]:
    """A result as --json prints it."""
    paid, quoted, billed = clip.bill()
    error = explain(clip.error) if clip.error else None
    return {
        "name": clip.name, "status": "failed" if error else "done",
        "path": None if error else str(clip.target), "generation_id": clip.generation_id or None,
        "credits": quoted, "billed": billed, "paid": paid, "unit": unit, "seconds": clip.spent_s,
        "warning": clip.warning or None, "error": error, **clip.effort,
    }


def is_stale(clip: Clip) -> bool:
    """Whether a finished video is older than what it is made of."""
    with contextlib.suppress(OSError):
        files = [file for file in (clip.target, clip.audio, clip.image) if file.name]
        made_ns, *others_ns = (os.stat(file).st_mtime_ns for file in files)
        return made_ns <= max(others_ns)
    return True


def open_pool(jobs: int) -> Any:
    """A ThreadPoolExecutor for so many clips at once, each with its files and connections."""
    import resource
    from concurrent.futures import ThreadPoolExecutor

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * jobs + 100)), hard))
    return ThreadPoolExecutor(jobs)


def tell_traceback(args: argparse.Namespace, view: View, error: BaseException) -> None:
    """Where an error came from, if -v asks for it."""
    if args.verbose:
        import traceback

        view.over(sys.stderr, "".join(traceback.format_exception(error)))


class Command:
    """A command as it was called: its flags, its environment with .env, where progress goes; the
    making of its clips, and the telling."""

    def __init__(self, args: argparse.Namespace, environ: Mapping[str, str], view: View) -> None:
        self.args, self.environ, self.view, self.stop = args, environ, view, threading.Event()
        self.key = setting(environ, "HEDRA_API_KEY")
        self.untold: Sequence[Clip] = ()  # of a batch: their results have not been printed

    @functools.cached_property
    def studio(self) -> Studio:
        """What the flags ask for, on the account of the environment."""
        args, http = self.args, Transport(open_account(self.key, self.environ), self.stop)
        return Studio(
            api_for(http), self.view, model=setting(self.environ, "HEDRA_MODEL_ID"),
            speech_model=args.speech_model, timeout_s=args.timeout, interval_s=args.poll_interval,
            force=args.force, cap=args.max_credits,
        )

    def batch(self, clips: Sequence[Clip]) -> int:
        """Plan, afford, make, report; the exit status. With --dry-run only the plan is shown."""
        studio, args, deadline = self.studio, self.args, time.monotonic() + self.args.timeout
        self.untold = [] if args.dry_run else clips
        alone = args.command == "run"  # as make runs it, which wants a new time whatever the reason
        with studio.http.until(deadline):
            self.view.whole.shown = "looks at files and prices"
            studio.plan(clips)
            self.view.whole.shown = ""
            if args.dry_run:
                return self.show_plan(clips)
            try:
                studio.afford(clips)
            except HedraError as error:  # what is paid already is made all the same
                for clip in clips:
                    clip.error = clip.error or (error if clip.state in OPEN else None)
        if alone:
            studio.deadline = deadline
        else:
            self.view.clips = len(clips)
        todo = []
        for clip in clips:
            if clip.error or (clip.state == DONE and not (alone or is_stale(clip))):
                self.report(clip)
            else:
                todo.append(clip)
        with open_pool(args.jobs) as pool:
            list(pool.map(self.make, todo))
        studio.settle(clips)
        self.tell(clips)
        self.view.close()
        return self.tell_end(clips)

    def show_plan(self, clips: Sequence[Clip]) -> int:
        """The answer to --dry-run; the exit status."""
        studio, unit = self.studio, self.studio.api.unit
        balance = studio.balance or studio.tolerant(studio.api.balance, "the balance")
        studio.tell_unknown(clips)
        for clip in clips if self.args.json else ():
            shown = {
                "name": clip.name, "state": clip.state, "seconds": clip.seconds,
                "estimate": clip.is_estimate and clip.state in OPEN,
                "credits": None if clip.error else clip.due, "unit": unit, "error": None,
                "balance": balance and balance.remaining,
            }
            shown |= outcome(clip, unit) if clip.error else {}
            self.view.result(json.dumps(shown))
        if not self.args.json:
            columns = screen_size(sys.stdout).columns or 1000
            left = amount(balance.remaining, balance.unit) if balance else "?"
            self.view.result(table(clips, left, unit, columns))
        return self.tell_end(clips)

    def attempt(self, make: Callable[[Clip], object], clip: Clip) -> None:
        """Make a clip; what goes wrong becomes its error, for the others to go on."""
        started = time.monotonic()
        try:
            make(clip)
        except Exception as error:  # a worker outlives whatever a clip does to it
            # What was there is there, though the cache may be another user's.
            if clip.state != DONE or not isinstance(error, OSError):
                clip.error = error
        clip.spent_s = round(time.monotonic() - started, 3)

    def make(self, clip: Clip) -> None:
        """Make a clip of a batch, and tell of it."""
        self.attempt(self.studio.make, clip)
        self.report(clip)

    def report(self, clip: Clip) -> None:
        """One clip is done, or has failed. What was there before is not worth a line."""
        view = self.view
        with view.lock:
            view.done, view.failed = view.done + 1, view.failed + bool(clip.error)
        view.leave(clip)
        if clip.error and view.clips:
            state = "stopped" if isinstance(clip.error, Stopped) else "failed"
            view.say(f"{view.name(clip, 20)}: {state}")  # the reason comes at the end
        elif not clip.error and clip.state != DONE:
            view.say(f"{view.name(clip, 20)}: done (in {clip.spent_s:.1f} s)")
        if not self.args.json and not clip.error:
            view.result(str(clip.target))

    def tell(self, clips: Sequence[Clip], end: Exception | None = None) -> None:
        """Print results as objects, where they are wanted so; with what has put an `end` to a batch
        those of the clips that were still to come as well."""
        self.untold = []
        for clip in clips if self.args.json else ():
            if not (clip.error or clip.spent_s or clip.state == DONE):
                clip.error = end
            self.view.result(json.dumps(outcome(clip, self.studio.api.unit)))

    def tell_end(self, clips: Sequence[Clip]) -> int:
        """Say what a batch has cost and, last, what failed; the exit status."""
        unit, failed = self.studio.api.unit, [(clip, clip.error) for clip in clips if clip.error]
        paid = [part for clip in clips for part in clip.parts if part.paid]
        if paid and self.view.clips:  # what was refused and has cost nothing counts 0
            cost = [part for part in paid if part.billed or part.record.text("state") != "refused"]
            quoted = amount(total(part.price for part in cost), unit).removesuffix(f" {unit}")
            billed = amount(total(part.billed for part in cost), unit)
            self.view.say(f"quoted {quoted}, billed {billed}")
        unsent = [clip for clip, error in failed if isinstance(error, Stopped)]
        if self.studio.broke and unsent:
            missing = amount(total(clip.due for clip in unsent), unit)
            complain(f"out of funds; clips not sent: {len(unsent)}, they need about {missing}")
        whose: dict[Exception, list[str]] = {}  # one that stops several is told once, and last
        for clip, error in failed:
            if not (isinstance(error, Stopped) and self.stop.is_set()):  # which main tells of
                whose.setdefault(error, []).append(clip.name)
        for error, names in sorted(whose.items(), key=lambda item: len(item[1])):
            tell_traceback(self.args, self.view, error)
            complain(f"{names[0] if len(names) == 1 else f'{len(names)} clips'}: {explain(error)}")
        return int(bool(failed))


# ---- watch: Watcher, notify_systemd -------------------------------------------------------------

TURN_S = 0.2
STUCK_S = 10.0  # without a change: a file that is not whole is worth a line
RESCAN_S = 60.0  # events can be lost
PAUSES_S = (15.0, 300.0)  # between two tries: the first and the longest
PASSING = re.compile(  # what is another in each telling of the same
    rf"(?i){UUID_SHAPE.pattern}|\[trace id .*?\]|the account has [^:;]*"
)


class Wait:
    """When something is tried (again), and what was said of it; `sign`: how its files look."""

    tries, refusals, busy = 0, 0, False

    def __init__(self, sign: str = "", due: float = 0.0, why: str = "") -> None:
        self.sign, self.due, self.why = sign, due, why
        self.since = self.begun = time.monotonic()  # the second: when it was tried last

    def later(self) -> None:
        """The next pause: the same for a while, then twice as long each time."""
        self.tries += 1
        pause_s = PAUSES_S[0] * 2 ** min(9, max(0, self.tries - 3))
        self.due = time.monotonic() + min(PAUSES_S[1], pause_s)


class Watcher:
    """Makes a clip of every whole recording or text that lies in a folder or comes into it.

    Events only ring; what counts is what the folder holds: a clip is taken when its files have not
    changed for STILL_S, and again when they change. Who fails for a reason that passes waits for
    itself; only what no clip can be the reason of is an outage, which holds up the rest.
    """

    def __init__(self, command: Command) -> None:
        self.command, self.args, self.view = command, command.args, command.view
        self.studio, self.folder = command.studio, Path(self.args.folder)
        self.pool, self.lock = open_pool(self.args.jobs), threading.Lock()
        self.bell, self.say_once = threading.Event(), functools.cache(self.view.say)
        self.waits, self.outage = dict[str, Wait](), Wait()
        self.portrait, self.portrait_at = "", 0.0  # how the one that clips share looks, since when

    def dispatch(self, event: Any) -> None:
        """An event of watchdog's, in its thread. That we read a file is none."""
        if event.event_type not in ("opened", "closed_no_write"):
            self.bell.set()

    def run(self, observer: Any) -> None:
        """Until the program is stopped."""
        stop, inode, rescan_at = self.command.stop, -1, 0.0
        notify_systemd("READY=1")
        while not stop.is_set():
            there = 0
            with contextlib.suppress(OSError):
                there = os.stat(f"{self.folder}/").st_ino  # the slash: of a folder only
            if there != inode:
                inode, rescan_at = self.attach(observer, there), 0.0
            now = time.monotonic()
            if (portrait := signature(self.args.img or self.args.fallback)) != self.portrait:
                self.portrait, self.portrait_at = portrait, now
                self.bell.set()
            due = min([rescan_at, *(wait.due for wait in self.waits.values())])
            if inode and (self.bell.is_set() or now >= due) and now >= self.outage.due:
                self.bell.clear()  # before the folder is listed: what comes meanwhile rings again
                rescan_at = now + RESCAN_S
                with contextlib.suppress(OSError, InputError):  # the folder went away just now
                    self.look_round()
            notify_systemd("WATCHDOG=1")
            stop.wait(max(TURN_S, 4 * (time.monotonic() - now)))  # of a full folder less often

    def attach(self, observer: Any, inode: int) -> int:
        """Watch the folder that is there now, or say that none is; its inode."""
        observer.unschedule_all()
        if inode:
            try:
                observer.schedule(self, str(self.folder), recursive=False)
                self.view.say(f"watching {self.folder} for recordings and texts")
                return inode
            except OSError as error:
                if self.folder.is_dir():  # else gone again: the next turn sees it
                    text = f"{self.folder} cannot be watched: {error.strerror}"
                    raise InputError(f"{text}; --polling looks instead of listening") from error
        what = "no folder" if self.folder.exists() else "not there"
        self.view.say(f"{self.folder} is {what}; waiting for it")
        return 0

    def look_round(self) -> None:
        """Take what has come to rest or is due again: of all else the files' times are read."""
        names, now = folder_names(self.folder), time.monotonic()
        if text := ignored_text(names):
            self.say_once(text)
        found = find_sources(self.folder, names)
        self.waits = {stem: w for stem, w in self.waits.items() if stem in found or w.busy}
        for stem, sources in found.items():
            files, wait = [*sources, *beside(sources[0], names)], self.waits.get(stem)
            sign = " ".join(map(signature, files))
            changed = wait and (wait.sign != sign or (wait.why and wait.begun < self.portrait_at))
            if not wait or (changed and not wait.busy):
                rest_s = max(map(still_s, files))
                wait = self.waits[stem] = Wait(sign, now + rest_s, wait.why if wait else "")
            if now >= wait.due and not wait.busy:
                clip = folder_clip(sources, self.args, names)
                wait.busy, wait.due, wait.begun = True, math.inf, now
                self.pool.submit(self.work, clip, wait)

    def make(self, clip: Clip) -> None:
        """Plan, afford and make the clip that came."""
        studio = self.studio
        with studio.http.until(time.monotonic() + studio.timeout_s):
            studio.plan([clip])
            studio.broke = None
            if not clip.error and clip.state != DONE:
                studio.afford([clip])
                studio.make(clip)

    def work(self, clip: Clip, wait: Wait) -> None:
        """One clip, in a thread of the pool."""
        self.command.attempt(self.make, clip)
        try:
            self.after(clip, wait, clip.error)
        finally:
            wait.busy = False
            self.bell.set()  # its files may have changed meanwhile

    def after(self, clip: Clip, wait: Wait, error: Exception | None) -> None:
        """What became of a clip: what passes by itself is tried again."""
        before, now = wait.why, time.monotonic()
        self.view.leave(clip)
        unfinished = getattr(error, "unfinished", False) and now - wait.since < STUCK_S
        is_open = getattr(error, "is_open", False)  # which is no failure
        if error and is_open and not unfinished and before != str(error):
            wait.why = str(error)
            self.view.say(f"{clip.name}: waiting: {wait.why}")
        if unfinished or is_open or isinstance(error, Stopped):  # stopped: just now without funds
            wait.due = now + STILL_S
            return
        if self.is_outage(clip, wait, error):
            return
        again = error is not None and not is_final(clip, error, wait.refusals)
        wait.refusals += isinstance(error, GenerationFailed)
        wait.why = explain(error) + "; it is tried again" * again if error else ""
        same = PASSING.sub("", wait.why) == PASSING.sub("", before)
        if again:
            wait.later()
            wait.due = now if isinstance(error, StillRunning) else wait.due  # it has waited
        if error and not same:
            tell_traceback(self.args, self.view, error)
            self.view.say(f"{clip.name}: failed: {wait.why}", always=True)
        if not same if error else clip.state != DONE:
            self.command.report(clip)
            self.studio.settle([clip])
            self.command.tell([clip])
        elif not error:
            self.studio.settle([clip])  # a stop may have left a bill open

    def is_outage(self, clip: Clip, wait: Wait, error: Exception | None) -> bool:
        """Whether no clip can be made now, whatever it is: no network, no access, no funds. Its
        beginning and its end are a line each; in it one clip is tried now and then."""
        with self.lock:
            outage = self.outage
            if error and getattr(error, "is_of_all", False):
                sign = f"{type(error).__name__} {getattr(error, 'status', None)}"
                if outage.sign != sign:  # it begins, or for another reason goes on
                    self.view.say(f"{clip.name}: {explain(error)}", always=True)
                    self.command.tell([clip])
                    self.view.say("waiting until that is over; clips that come meanwhile are kept")
                if time.monotonic() >= outage.due:  # else another clip has met it just now
                    outage.later()
                outage.why, outage.sign, wait.due = explain(error), sign, outage.due
                outage.begun = max(outage.begun, wait.begun)
                return True
            # Hedra has answered a clip that was not at work before it.
            if outage.why and wait.begun > outage.begun and clip.effort.get("requests"):
                self.outage = Wait()
                self.view.say("going on")
            return False


def is_final(clip: Clip, error: Exception, refusals: int) -> bool:
    """Whether a clip as it is will never be made: its files, or what Hedra says of them; what Hedra
    calls transient gets a few takes."""
    if not isinstance(error, HedraError) or isinstance(error.__cause__, OSError):
        return False
    refused = error.status in (400, 413, 415, 422) and not (error.ambiguous or clip.generation_id)
    is_its_own = refused or isinstance(error, InputError | GenerationFailed)
    passes = error.unfinished or (error.retryable and refusals < TRIES)
    return error.code == "EXPIRED" or (is_its_own and not passes)


def notify_systemd(message: str) -> None:
    """Tell systemd, where it wants to know (sd_notify(3): a datagram to NOTIFY_SOCKET)."""
    if not (address := os.environ.get("NOTIFY_SOCKET")):
        return
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.setblocking(False)  # a reader that stalls must not hold up the watcher
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.send(message.encode())


# ---- command line: cmd_run, cmd_batch, cmd_watch, cmd_credits, cmd_voices, build_parser, main ---

def run_source(args: argparse.Namespace) -> Path:
    """What the clip of `run` is named after: a recording, a text file, or the first words of a
    text as if they were the name of one."""
    if args.wav or args.say.startswith("@"):
        return Path(args.wav or args.say[1:])
    name = "-".join(re.findall(r"\w+", args.say)).lower() or "speech"
    if len(name) > 40:  # texts that begin alike are not one video
        name = f"{name[:35].rpartition('-')[0] or name[:35]}-{digest_of(args.say)[:4]}"
    return Path(f"{name}{SAY_SUFFIX}")


def cmd_run(command: Command) -> int:
    """One clip: a batch of one."""
    args, source = command.args, run_source(command.args)
    if args.wav:
        command.studio.ledger.media(source, "audio")  # before a portrait is asked for
    elif args.say == "@":
        raise InputError("--say @ needs the name of a file, as in --say @news.txt")
    if args.out and not os.path.basename(args.out):
        raise InputError(f"--out {args.out} is a folder: --out-dir takes one")
    is_file = (args.wav or args.say.startswith("@")) and source.exists()
    names = folder_names(source.parent) if is_file else {}
    return command.batch([clip_of(source, args, names)])


def cmd_batch(command: Command, patience_s: float = 0.0) -> int:
    """A folder of clips; one whose files are still being written is waited for so long."""
    folder, view, until = Path(command.args.folder), command.view, time.monotonic() + patience_s
    while True:
        names = folder_names(folder)
        found = find_sources(folder, names).values()
        clips = [folder_clip(sources, command.args, names) for sources in found]
        is_busy = any(getattr(clip.error, "is_open", False) for clip in clips)
        if not is_busy or time.monotonic() >= until:
            break
        command.studio.http.sleep(TURN_S)
    if text := ignored_text(names):
        view.say(text)
    if not clips:
        kinds = ", ".join(SOUND_SUFFIXES)
        view.say(f"{folder} holds no recording ({kinds}) and no x{SAY_SUFFIX}")
    return command.batch(clips)


def cmd_watch(command: Command) -> int:
    """A folder that is watched, until Ctrl-C or SIGTERM."""
    args, view = command.args, command.view
    need("urllib3")  # else clip after clip would say that it is missing
    if not (args.img or args.fallback):
        view.say("warning: no --img and no FRIEND_IMG: only clips with a portrait beside them")
    if args.once:
        return cmd_batch(command, STUCK_S)
    watcher = Watcher(command)
    module = need("watchdog.observers" + (".polling" if args.polling else ""))
    observer = module.PollingObserver() if args.polling else module.Observer()
    observer.start()
    try:
        watcher.run(observer)
    finally:
        notify_systemd("STOPPING=1")
        command.stop.set()
        observer.stop()
        watcher.pool.shutdown(wait=False, cancel_futures=True)
        observer.join(0.5)
    return 0


def show_spent(ledger: Ledger, view: View, *, as_json: bool) -> int:
    """What this cache's ledger says was paid: a line for each month and unit."""
    months: dict[tuple[str, str], dict[str, Any]] = {}
    for take in (ledger.load("clips", key) for key in ledger.clips()):
        at, name = take.number("submitted_at"), take.text("generation_id")
        if not name or at is None:
            continue
        unit = take.text("unit") or ("USD" if name.startswith("job_") else "credits")
        month = time.strftime("%Y-%m", time.localtime(min(max(0.0, at), 4e9)))
        row = months.setdefault((month, unit), {
            "month": month, "clips": 0, "speeches": 0, "quoted": 0.0, "billed": 0.0, "unit": unit,
        })
        billed = take.number("billed", "cost") or 0
        if billed or take.text("state") != "refused":
            row["speeches" if take.text("kind") == SPEECH else "clips"] += 1
            row["quoted"] = round(row["quoted"] + (take.number("price") or 0), 6)
        row["billed"] = round(row["billed"] + billed, 6)
    line = "{:8} {:>6} {:>9} {:>14} {:>14}"
    if not as_json:
        view.result(line.format("month", "clips", "speeches", "quoted", "billed"))
    for (month, unit), row in sorted(months.items()):
        figures = (amount(row[name], unit) for name in ("quoted", "billed"))
        text = line.format(month, row["clips"], row["speeches"], *figures)
        view.result(json.dumps(row) if as_json else text)
    return 0


def limit_time(command: Command) -> None:
    """Hold a command without a --timeout to the time that one answer may take."""
    silence_s = open_account(command.key, command.environ).silence_s
    DEADLINE.set(time.monotonic() + max(SILENCE_TIMEOUT_S, silence_s))


def cmd_credits(command: Command) -> int:
    """The balance, or what was spent."""
    args, view = command.args, command.view
    if args.spent:
        folder = Path(os.path.expanduser(setting(command.environ, "HEDRA_CACHE_DIR", ".cache")))
        return show_spent(Ledger(folder, time.sleep, view.say), view, as_json=args.json)
    limit_time(command)
    balance = get_balance(command.key, environ=command.environ)
    shown = {"remaining": balance.remaining, "unit": balance.unit, **balance.more}
    left, asked = amount(balance.remaining, balance.unit), amount(args.min, balance.unit)
    if balance.remaining < args.min:
        short = f"the account has {left}, less than the {asked} asked for: add funds"
        shown = outcome(Clip(args.command, Path(), error=HedraError(short)), balance.unit) | shown
        complain(short)
    view.result(json.dumps(shown) if args.json else left)
    return int("error" in shown)


def cmd_voices(command: Command) -> int:
    """Who can speak."""
    args = command.args
    limit_time(command)
    for voice in get_voices(command.key, speech_model=args.speech_model, environ=command.environ):
        labels = ", ".join(voice.labels.values())
        line = f"{printable(voice.name):24}  {printable(labels):40}  {printable(voice.id)}"
        command.view.result(json.dumps(voice._asdict()) if args.json else line)
    return 0


COMMANDS = {  # what each does, and what it is for
    "run": (cmd_run, "make one clip"),
    "batch": (cmd_batch, "make a folder of clips"),
    "watch": (cmd_watch, "watch a drop folder"),
    "credits": (cmd_credits, "what the account can spend"),
    "voices": (cmd_voices, "who can speak: name, labels, id"),
}

def number(kind: Callable[[str], float], low: float, high: float, what: str) -> Any:
    """An argparse type: a number within limits."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


SECONDS = number(float, sys.float_info.min, sys.float_info.max, "a positive number")
FUNDS = number(float, 0.0, sys.float_info.max, "an amount of credits or dollars")
COUNT = number(int, 1, 10_000, "a whole number from 1 to 10,000")


def pair(text: str) -> tuple[str, Any]:
    """An argparse type: NAME=VALUE, the value as JSON if it is that, else as a text."""
    name, _, value = text.partition("=")
    name = name.strip()
    if not name or not value.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name in OUR_FIELDS:
        raise argparse.ArgumentTypeError(f"{name!r} has a flag of its own, or is not free")
    with contextlib.suppress(ValueError):
        parsed = read_json(value)
        json.dumps(parsed, allow_nan=False)
        return name, parsed
    return name, value


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """The flags of a command; one that it cannot honour it has not."""
    add = parser.add_argument
    if command == "run":
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--wav", metavar="FILE", default="", help="the recording, of any kind")
        source.add_argument("--say", metavar="TEXT|@FILE", default="", help="a text to be spoken")
    if command in ("batch", "watch"):
        folder = {"batch": "batch", "watch": "incoming"}[command]
        add("folder", metavar="DIR", nargs="?", default=folder, help="default %(default)s")
        add("--jobs", metavar="N", type=COUNT, default=4, help="clips at once (%(default)s)")
    if command == "batch":
        add("--max-credits", metavar="N", type=FUNDS, help="spend no more (v3: US dollars)")
    if command == "watch":
        add("--once", action="store_true", help="do what is there, and exit")
        add("--polling", action="store_true", help="look instead of listening (network shares)")
    if command in ("run", "batch"):
        add("--force", action="store_true", help="a new take, paid for (one in flight is kept)")
        add("--dry-run", action="store_true", help="print the price list, and stop")
    if command in ("run", "batch", "watch"):
        add("--img", metavar="FILE", default="", help="the portrait, png, jpg or webp")
        add("--prompt", metavar="TEXT", default="", help="what the person does")
        add("--voice", dest="HEDRA_VOICE", metavar="NAME|ID", help="who speaks a text")
        add("--resolution", choices=RESOLUTIONS, default="540p", help="default %(default)s")
        add("--aspect-ratio", choices=ASPECT_RATIOS, default="9:16", help="default %(default)s")
        add("--model", dest="HEDRA_MODEL_ID", metavar="ID", help="id or slug (Character 3)")
        add("--set", metavar="NAME=VALUE", type=pair, action="append", default=[],
            help="one more input of the model, as in seed=7 (again and again)")
        add("--timeout", metavar="SECONDS", type=SECONDS, default=1800.0,
            help="longest wait for a clip (default %(default)g)")
        add("--poll-interval", metavar="SECONDS", type=SECONDS, default=5.0,
            help="between two looks (default %(default)g)")
        place = parser.add_mutually_exclusive_group()
        if command == "run":
            place.add_argument("--out", metavar="FILE", help="default: output/x.mp4")
        place.add_argument("--out-dir", metavar="DIR", default="output", help="default %(default)s")
    if command == "credits":
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--min", metavar="N", type=FUNDS, default=0.0, help="exit 1 if less")
        which.add_argument("--spent", action="store_true", help="by month, from the ledger")
    else:
        add("--speech-model", metavar="ID", default="", help="that speaks (v3: elevenlabs-...)")
    if command != "voices":
        add("--workspace", dest="HEDRA_WORKSPACE_ID", metavar="ID", help="that pays (v2)")
    add("--json", action="store_true", help="one JSON object a result, failures too")
    add("-q", "--quiet", action="store_true", help="errors only on stderr")
    add("-v", "--verbose", action="store_true", help="say more")


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Every command; given `argv`, with flags for the one named there, which saves time."""
    purpose, _, manual = (__doc__ or "").partition("\n\n")
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    style |= {"epilog": manual, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="hedra_avatar", description=purpose, **style)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, **style)
        command.set_defaults(  # where a command has no such flag
            out="", jobs=1, force=False, dry_run=False, max_credits=None
        )
        if argv is None or name in argv:
            add_flags(command, name)
    return parser


def read_environment(environ: Mapping[str, str], args: argparse.Namespace) -> dict[str, str]:
    """Flag (some are named like the variable) over environment over .env."""
    found: dict[str, str | None] = {}
    if Path(".env").is_file():
        text = io.StringIO(read_text(Path(".env")).replace("\0", ""))
        found = need("dotenv").dotenv_values(stream=text, interpolate=False)
    flags = {name: value for name, value in vars(args).items() if name.startswith("HEDRA_")}
    values: dict[str, str] = {}
    for source in (found, environ, flags):
        values.update({name: value for name, value in source.items() if value and value.strip()})
    args.voice, args.fallback = setting(values, "HEDRA_VOICE"), setting(values, "FRIEND_IMG")
    args.fallback = os.path.expanduser(args.fallback)
    return values


def supervise(work: Callable[[Command], int], command: Command) -> int:
    """Run a command in a thread of its own, so that neither a lock nor a name that is looked up
    keeps a signal waiting; its exit status. Raises KeyboardInterrupt with a signal's number."""
    import signal
    from concurrent.futures import ThreadPoolExecutor, wait

    caught: list[int] = []  # and not an exception, which a callback might swallow
    is_main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if is_main else []
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup wants it
        signals = signals[:2]
    before = {n: signal.signal(n, lambda number, frame: caught.append(number)) for n in signals}
    try:
        future = ThreadPoolExecutor(1).submit(work, command)
        while not caught and not wait([future], 0.1).done:
            continue
        if not caught:
            return future.result()
        command.stop.set()
        wait([future], 1.2)
        raise KeyboardInterrupt(caught[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; raises SystemExit, and tells with --json as well what is wrong with them."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return build_parser(argv).parse_args(argv)
    except SystemExit as ended:
        written(sys.stderr, told.getvalue())
        if ended.code and "--json" in argv:
            name = next((word for word in argv if word in COMMANDS), "")
            error = InputError(told.getvalue().partition(": error: ")[2].strip())
            View().result(json.dumps(outcome(Clip(name, Path(), error=error), None)))
        raise


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """The command line; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args, view = read_flags(argv), View()
    command: Command | None = None
    error: Exception
    with contextlib.suppress(AttributeError):  # file names as they are, UTF-8 or not
        names = {"encoding": sys.getfilesystemencoding(), "errors": "surrogateescape"}
        sys.stdout.reconfigure(**names)  # type: ignore[union-attr]
    try:
        environ = read_environment(os.environ if environ is None else environ, args)
        view = open_view(args.quiet, args.verbose)
        command = Command(args, environ, view)
        status = supervise(COMMANDS[args.command][0], command)
        if view.deaf:
            made = "; what was made is in its place" * ("timeout" in args)
            raise HedraError(f"standard output took no more{made}")
        return status
    except KeyboardInterrupt as interrupt:
        signum = int(interrupt.args[0]) if interrupt.args else 2
        if signum == 15 and args.command == "watch" and not args.once:
            view.say("stopped; what is at work at Hedra is taken up by the next start")
            return 0
        how = "without --force to go on and pay no other take" if args.force else "to go on"
        why = f"stopped; nothing that was paid for is lost: run it again {how}"
        status, error = 128 + signum, Stopped(why)
    except Exception as failure:  # the last line of defence: a person reads this
        tell_traceback(args, view, failure)
        status, error = 1, failure
    finally:
        view.close()
    if command:
        command.tell(command.untold, error)
    if args.json and not view.results:  # else it has been told of the clip
        name = stem_of(run_source(args).name) if args.command == "run" else args.command
        view.result(json.dumps(outcome(Clip(name, Path(), error=error), None)))
    complain(explain(error))
    return status


if __name__ == "__main__":
    # Threads that still wait for Hedra are no reason to wait, and may crash an interpreter that
    # takes itself apart around them; what they do is in the ledger. All that was written is out.
    os._exit(main())
