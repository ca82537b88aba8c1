"""Tests of hedra_avatar: real HTTP over loopback, and time that moves by freezegun.

Single calls meet answers scripted with pytest-httpserver; whole flows meet `sandbox.Sandbox`,
mounted on the same server, whose books say what was paid. What can be told of both APIs is told
once, over the fixture `version`. The sections are those of the module, in its order.

Fixtures: `clock`: frozen time that every sleep moves; `server`, `environ`: a scripted Hedra;
`world`: the sandbox under the clock, with a portrait and a recording; `live`: in real time.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import os
import pty
import pydoc
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import wave
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock
from urllib.parse import parse_qsl, urlsplit

import freezegun.config
import pytest
import tqdm  # noqa: F401  (imported under a frozen clock it would keep it)
import urllib3
import watchdog.observers  # noqa: F401
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

import hedra_avatar as hedra
import sandbox.render
from sandbox import Fault, Sandbox

pytestmark = pytest.mark.filterwarnings("error")

HERE = Path(__file__).resolve().parent
KEYS = {"v2": "sk_hedra_0123456789abcdef", "v3": "kid0123456789:shh-abcdef0123456789"}
KEY, KEY3 = KEYS.values()
PREFIXES = {"v2": sandbox.PREFIX_V2, "v3": sandbox.PREFIX_V3}
UUID = "6f1c2b3a-4d5e-4f60-8a7b-9c0d1e2f3a4b"
CHARACTER_3 = "d1dd37a3-e39a-4854-a298-6510289f9cf2"
SLUG = "together/hedra-character-3"
TOOLS = os.environ.get("PATH", "")  # tests see none of the machine's programs but by this
FILLER = 50_000  # bytes of a video that are no structure
QUICK = ("--poll-interval", "0.05")
README = (HERE / "README.md").read_text()

# What is frozen must be frozen in threads as well, but not for pytest's own stopwatch.
REAL = {*freezegun.config.DEFAULT_IGNORE_LIST, "_pytest.timing"} - {"threading", "queue"}
freezegun.configure(default_ignore_list=[*REAL])  # type: ignore[attr-defined]
if os.access("/dev/shm", os.W_OK):  # half of the time would go into the disk
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.tempdir = "/dev/shm"
logging.getLogger("werkzeug").setLevel(logging.ERROR)


# ---- fixtures -----------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def real_clock() -> Iterator[None]:
    """Freezegun goes through all modules once; a freeze within this one costs next to nothing."""
    with freezegun.freeze_time(tick=True):
        freezegun.configure(default_ignore_list=[])  # type: ignore[attr-defined]
        with freezegun.freeze_time(tick=True):  # that asks less often who is asking
            yield


@pytest.fixture(scope="module", autouse=True)
def no_environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ |= {"PATH": "/nowhere", "LANG": "C", "TERM": "xterm"}
    yield
    os.environ |= before


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty working directory, and neither connections nor threads left over, but for those of
    the http servers."""
    before, pools, opened = set(threading.enumerate()), list[Any](), urllib3.PoolManager.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        opened(self, *args, **options)
        pools.append(self)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
    monkeypatch.setattr(urllib3.PoolManager, "__init__", init)
    for value in vars(hedra).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    yield
    for one in pools:
        one.clear()
    for thread in set(threading.enumerate()) - before:
        if not re.search("process_request_thread|serve_forever", thread.name):
            thread.join(2.0)
            assert not thread.is_alive(), f"{thread} is left over"


@contextlib.contextmanager
def frozen(start: str = "") -> Iterator[Any]:
    """Time that moves by being slept: any length of waiting costs nothing."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0, tzinfo=None)
    with pytest.MonkeyPatch.context() as patch, freezegun.freeze_time(start or now) as clock:
        clock.start, clock.naps, alone = time.monotonic(), [], threading.active_count() + 2
        tick, lock, breath = clock.tick, threading.Lock(), threading.Event()
        stopped = hedra.Transport.sleep

        def move(seconds: float) -> None:
            with lock:  # a stream left a moment ago may nap while a test moves the clock
                tick(datetime.timedelta(seconds=seconds))

        def nap(seconds: float) -> None:
            clock.naps.append(seconds)
            clock.tick(seconds)

        def sleep(self: Any, seconds: float) -> None:
            stopped(self, 0.0)
            nap(max(0.0, min(seconds, self.left_s(), 1e6)))
            if self.stop.is_set():
                stopped(self, 0.0)
            if threading.active_count() > alone:
                breath.wait(0.0005)  # it is others who are waited for

        clock.tick = move
        patch.setattr(time, "sleep", nap)
        patch.setattr(hedra.Transport, "sleep", sleep)
        yield clock


@pytest.fixture
def clock() -> Iterator[Any]:
    with frozen() as clock:
        yield clock


def host() -> Iterator[HTTPServer]:
    with HTTPServer("127.0.0.1", 0, threaded=True) as server:
        yield server


make_httpserver = pytest.fixture(scope="session")(host)  # in place of the plugin's own
files_server = pytest.fixture(scope="session", name="files_server")(host)  # for videos


@pytest.fixture
def server(httpserver: HTTPServer) -> Iterator[HTTPServer]:
    """A scripted Hedra; that nothing was asked but what the script says is checked at the end."""
    yield httpserver
    httpserver.check()
    assert not httpserver.ordered_handlers, "not all of the script was asked for"


@pytest.fixture
def environ(server: HTTPServer) -> dict[str, str]:
    return {"HEDRA_BASE_URL": server.url_for("")}


@pytest.fixture(params=["v2", "v3"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


only_v2 = pytest.mark.parametrize("version", ["v2"])
only_v3 = pytest.mark.parametrize("version", ["v3"])


class Sent(NamedTuple):
    """A request as a server got it; header names in lower case."""

    port: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_submit(self) -> bool:
        return bool(re.fullmatch(r"POST .*(/generations|/models/[^/]+)", " ".join(self[1:3])))


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1] if self.err else ""

    def fails(self, *words: str) -> Outcome:
        assert (self.status, [word for word in words if word not in self.last]) == (1, []), self.err
        return self

    def works(self) -> Outcome:
        assert self.status == 0, self.err
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def call(*words: str, environ: dict[str, str] | None = None) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = hedra.main(words, environ=environ or {})
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


class World:
    """Hedra in this process, and somebody who wants a clip of it."""

    def __init__(self, version: str, box: Sandbox, base_url: str, folder: Path) -> None:
        self.version, self.key, self.box, self.folder = version, KEYS[version], box, folder
        self.environ = {"HEDRA_API_KEY": self.key, "HEDRA_BASE_URL": base_url}
        self.sent: list[Sent] = []
        self.before: list[Callable[[int], object]] = []  # called with a request's number from 1
        self.after: list[Callable[[int], object]] = []  # the same, when it has been carried out
        self.wav, self.img = write_wav(folder / "hello.wav"), write_png(folder / "friend.png")
        self.target, self.rash = folder / "output/hello.mp4", list[int]()  # submits, no intent

    def call(self, *words: str, **environ: str) -> Outcome:
        return call(*words, environ={**self.environ, **environ})

    def run(self, *flags: str, wav: Path | None = None, say: str = "", **environ: str) -> Outcome:
        source = ["--say", say, "--voice", "Otis"] if say else ["--wav", str(wav or self.wav)]
        return self.call("run", *source, "--img", str(self.img), *flags, **environ)

    def batch(self, *flags: str, **environ: str) -> Outcome:
        return self.call("batch", "--img", str(self.img), *flags, **environ)

    def video(self, name: str = "hello", **more: Any) -> Path:
        out, environ = self.folder / "output" / f"{name}.mp4", {**self.environ}
        return hedra.make_video(self.wav, self.img, out, self.key, environ=environ, **more)

    def fill(self, *names: str, where: str = "batch", seconds: float = 1.0) -> list[Path]:
        folder = self.folder / where
        return [write_wav(folder / f"{n}.wav", seconds, zlib.crc32(n.encode())) for n in names]

    def fail(self, verb: str, kind: str, times: int = 1, **more: Any) -> None:
        self.box.faults.append(Fault(verb, kind, times, **more))

    def heal(self, **books: Any) -> World:
        vars(self.box).update(books)
        self.box.faults.clear()
        self.before.clear()
        return self

    def money(self, credits: int) -> None:
        self.box.credits, self.box.usd = credits, credits / 100

    def cost(self, credits: int) -> str:
        return {"v2": f"{credits} credits", "v3": f"${credits / 100:.2f}"}[self.version]

    @property
    def verbs(self) -> list[str]:
        return [call.verb for call in self.box.log]

    @property
    def costly(self) -> int:
        return sum(verb in ("create", "upload", "submit") for verb in self.verbs)

    def bought(self, kind: str = "video") -> list[Any]:
        return [one for one in self.box.paid if one.kind == kind]

    def videos(self) -> list[bytes]:
        return [(self.box.root / one.file).read_bytes() for one in self.bought() if one.rendered]

    def check_paid(self, times: int = 1, speeches: int = 0) -> None:
        """So many payments, the last video there byte for byte, nothing else beside it, and the
        key not told to the host of the videos."""
        assert (len(self.bought()), len(self.bought("text_to_speech"))) == (times, speeches)
        assert self.target.read_bytes() == self.videos()[-1]
        assert [*os.listdir(self.target.parent), *self.box.leaks, *self.rash] == [self.target.name]

    def succeed(self, *flags: str, paid: int = 1, speeches: int = 0, **more: Any) -> Outcome:
        done = self.run(*flags, **more).works()
        self.check_paid(paid, speeches)
        return done

    def outputs(self) -> dict[str, bytes]:
        return {f.stem: f.read_bytes() for f in (self.folder / "output").glob("*.mp4")}

    def check_all_paid(self, *names: str) -> None:
        assert len({one.sources[1].read_bytes() for one in self.bought()}) == len(names)
        assert (len(self.bought()), set(self.outputs())) == (len(names), set(names))
        assert sorted(self.outputs().values()) == sorted(self.videos())
        assert [*(self.folder / "output").glob(".*"), *self.box.leaks, *self.rash] == []

    def records(self, kind: str = "clips") -> list[Path]:
        return sorted((self.folder / ".cache" / kind).glob("*.json"))

    def submits(self) -> list[Sent]:
        return [sent for sent in self.sent if sent.is_submit]

    def answer(self, port: str, ask: Callable[..., sandbox.Reply], request: Request) -> Response:
        """Between werkzeug and the sandbox; a reset and a cut are made on the socket."""
        url = urlsplit(request.environ["RAW_URI"])
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = request.get_data()
        self.sent.append(Sent(port, request.method, url.path, dict(headers), body))
        number, query = len(self.sent), dict(parse_qsl(url.query, keep_blank_values=True))
        if self.sent[-1].is_submit:
            self.rash += [1] * (b'"intent"' not in b"".join(map(Path.read_bytes, self.records())))
        try:
            for hook in list(self.before):
                hook(number)
            reply = ask(sandbox.Request(request.method, url.path, query, headers, io.BytesIO(body)))
        except sandbox.Drop:
            return Response(reset(request.environ["werkzeug.socket"]))
        for hook in list(self.after):
            hook(number)
        blocks: Any = [reply.body] if isinstance(reply.body, bytes) else reply.body
        if reply.cut_after is not None:
            blocks = cut(blocks, reply.cut_after)
        return Response(blocks, reply.status, headers=list(reply.headers.items()))


def reset(connection: socket.socket) -> Iterator[bytes]:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    here, there = socket.socketpair()
    there.close()
    os.dup2(here.fileno(), connection.fileno())  # closes the connection, at once
    here.close()
    raise ConnectionResetError
    yield b""


def cut(blocks: Any, length: int) -> Iterator[bytes]:
    for block in blocks:
        yield block[:length]
        length -= len(block)
        if length <= 0:
            raise ConnectionAbortedError


def mp4_box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return (len(body) + 8).to_bytes(4, "big") + kind + body


def mp4(seconds: float = 1.0, *, sound: bool = True, filler: bytes = bytes(99)) -> bytes:
    head = bytes(12) + struct.pack(">II", 1000, round(seconds * 1000)) + bytes(80)
    kinds = [b"vide", b"soun"] if sound else [b"vide"]
    tracks = [mp4_box(b"mdia", mp4_box(b"hdlr", bytes(8), kind, bytes(12))) for kind in kinds]
    moov = mp4_box(b"moov", mp4_box(b"mvhd", head), *(mp4_box(b"trak", one) for one in tracks))
    return mp4_box(b"ftyp", b"mp42", bytes(4), b"mp42isom") + moov + mp4_box(b"mdat", filler)


def stub_render(image: Path, audio: Path, out: Path, *size: int, seconds: float = 0.0) -> None:
    seed = image.read_bytes() + audio.read_bytes() + out.name.encode()
    seconds = seconds or sandbox.render.wav_seconds(audio) or 10.0
    out.write_bytes(mp4(seconds, filler=hashlib.shake_128(seed).digest(FILLER)))


def write_wav(file: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setparams((1, 1, 8000, 0, "NONE", ""))
        sound.writeframes(random.Random(seed).randbytes(round(8000 * seconds)))
    return file


def stub_speak(text: str, out: Path, voice: str) -> None:
    write_wav(out, max(0.6, len(text) / 15), zlib.crc32(f"{text} {voice} {out.name}".encode()))


def write_png(file: Path, shade: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(sandbox.png(9, 16, 2, [bytearray([shade] * 27) for _ in range(16)]))
    return file


def until(met: Callable[[], object]) -> None:
    deadline, tick = time.monotonic() + 60, threading.Event()
    while not met():
        assert time.monotonic() < deadline, "it did not come to pass"
        tick.wait(0.01)


@pytest.fixture
def box(httpserver: HTTPServer, files_server: HTTPServer) -> Iterator[Sandbox]:
    files_server.clear()
    url = files_server.url_for("").rstrip("/")
    with Sandbox(render_seconds=0.0, eager=True, files_url=url) as box:
        box.render, box.speak = stub_render, stub_speak
        yield box
    httpserver.check()
    files_server.check()


@pytest.fixture
def live(
    version: str, box: Sandbox, httpserver: HTTPServer, files_server: HTTPServer, tmp_path: Path
) -> World:
    world = World(version, box, httpserver.url_for(PREFIXES[version]), tmp_path)
    for port, server in (("api", httpserver), ("files", files_server)):
        handler = functools.partial(world.answer, port, getattr(box, port))
        server.expect_request(re.compile(".*")).respond_with_handler(handler)
    return world


@pytest.fixture
def world(clock: Any, live: World) -> World:
    return live


def python(code: str, *words: str, site: bool = True, **environ: str) -> Any:
    """Run a piece of Python in a process of its own, with no variables but those; without `site`
    it has no packages."""
    path = {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/nowhere"}
    return subprocess.run(
        [sys.executable, *([] if site else ["-S"]), "-c", code, *words], env={**path, **environ},
        capture_output=True, text=True, timeout=60,
    )


# ---- the module as a whole ----------------------------------------------------------------------

SIGNATURES = {
    "create_asset": "name kind api_key", "upload_asset": "asset_id file api_key",
    "get_default_model_id": "api_key", "retry": "exceptions tries=3 delay=2 backoff=2",
    "start_generation": "image_id audio_id prompt api_key model_id=None",
    "wait_and_download": "generation_id out_dir api_key timeout=300", "upload": "file kind api_key",
    "get_credit_balance": "api_key", "get_balance": "api_key", "get_voices": "api_key",
    "make_video": "audio image out api_key prompt", "make_speech": "text voice out api_key",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_leading_parameters_are_those_of_the_contract(name):
    parameters = inspect.signature(getattr(hedra, name)).parameters.values()
    leading = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p not in leading)
    plain = {inspect.Parameter.empty, hedra.DEFAULT_PROMPT}
    shown = [p.name + f"={p.default}" * (p.default not in plain) for p in leading]
    assert " ".join(shown) == SIGNATURES[name]


def test_importing_has_no_effect(tmp_path):
    code = """
import sys, os
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
before = dict(os.environ)
os.environ = None
import hedra_avatar
os.environ = before
assert not {"tqdm", "watchdog", "dotenv", "urllib3", "ssl", "fcntl", "sandbox"} & {*sys.modules}
assert not [args for args in opened if args[1] not in ("r", "rb", None)]
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, "", "", [])


def test_a_missing_package_and_an_older_python_are_told_in_one_line_and_help_needs_neither():
    code = "import hedra_avatar, sys; raise SystemExit(hedra_avatar.main(sys.argv[1:]))"
    assert python("import urllib3", site=False).returncode != 0
    assert python(code, "--help", site=False).returncode == 0
    refused = python(code, "credits", "--json", site=False, HEDRA_API_KEY="k")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "pip install" in json.loads(refused.stdout)["error"] in refused.stderr
    ast.parse((HERE / "hedra_avatar.py").read_text(), feature_version=(3, 9))  # it gets that far
    code = "import sys; sys.version_info = (3, 10, 1); import runpy; runpy.run_path(sys.argv[1]%s)"
    for ending in ("", ", run_name='__main__'"):
        done = python(code % ending, str(HERE / "hedra_avatar.py"), "--help")
        assert done.returncode == 1
        assert "needs Python 3.11 or newer, and this is 3.10" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1


def test_the_manual_is_a_few_pages_that_begin_with_what_people_call():
    lines = pydoc.plain(pydoc.render_doc(hedra)).splitlines()
    assert len(lines) < 800  # a third are methods of exceptions
    assert (hedra.__all__[0], set(SIGNATURES) < set(hedra.__all__)) == ("make_video", True)
    assert [name for name in hedra.__all__ if not getattr(hedra, name).__doc__] == []
    head = "\n".join(lines[:40])
    assert all(word in head for word in ("HEDRA_API_KEY", " run ", " batch ", "make_video("))


# ---- account ------------------------------------------------------------------------------------

def test_a_key_is_stripped_of_what_pasting_adds_and_else_refused_without_being_shown():
    for raw in ("  sk_hedra_1\n", "\ufeffsk_hedra_1", " \ufeff sk_hedra_1 \r\n"):
        assert hedra.clean_key(raw) == "sk_hedra_1"
    for raw in ("", " ", "\ufeff", "sk_a\nsk_b", "sk_a\x00b", "sk_ä", "sk_a\tb"):
        with pytest.raises(hedra.InputError, match="HEDRA_API_KEY") as refused:
            hedra.clean_key(raw)
        assert "sk_" not in str(refused.value)


def test_a_base_url_is_https_or_loopback_so_that_no_network_is_told_the_key():
    for url in ("https://api.hedra.com/v3", "http://localhost:8321", "http://[::1]:1"):
        assert hedra.clean_url(f" {url}/ ") == url
    assert hedra.clean_url("http://127.9.9.9:1/x") == "http://127.9.9.9:1/x"
    bad = "http://api.hedra.com http://127.evil.com http://127.0.0.1.evil.com https://x:0 https://"
    bad += " http://localhost.evil.com http://127.0.0.1@evil.com https://me:word@evil.com https://x:y"
    bad += " http://0.0.0.0 http://192.168.0.1 ftp://127.0.0.1 api.hedra.com"
    for url in [*bad.split(), ""]:
        with pytest.raises(hedra.InputError):
            hedra.clean_url(url)


def test_the_key_chooses_the_api_and_the_base_url_only_the_host():
    assert hedra.open_account("sk").base_url == "https://api.hedra.com/web-app/public"
    assert hedra.open_account("id:secret").base_url == "https://api.hedra.com/v3"
    with pytest.raises(hedra.InputError, match="HEDRA_BASE_URL"):
        hedra.open_account("sk", {"HEDRA_BASE_URL": "https://x.example/?a=1"})
    for value in ("0", "-1", "inf", "nan"):
        with pytest.raises(hedra.InputError, match="HEDRA_HTTP_TIMEOUT"):
            hedra.open_account("k", {"HEDRA_HTTP_TIMEOUT": value})
    hedra.open_account("k", {"HEDRA_HTTP_TIMEOUT": "1e308"})


# ---- media --------------------------------------------------------------------------------------

def wav_bytes(promised: int, there: int, rate: int = 8000, extra: bytes = b"") -> bytes:
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8)
    return b"RIFF\0\0\0\0WAVE" + form + extra + b"data" + struct.pack("<I", promised) + bytes(there)


def rf64(there: int, promised: int) -> bytes:
    sizes = b"ds64" + struct.pack("<IQQQI", 28, 0, promised, 0, 0)
    return b"RF64" + b"\xff" * 4 + b"WAVE" + sizes + wav_bytes(0xFFFF_FFFF, there)[12:]


def m4a(brand: bytes, *, sound: bool = True) -> bytes:
    return mp4_box(b"ftyp", brand, bytes(4), brand) + mp4(1.0, sound=sound)[24:]


PNG = sandbox.png(9, 16, 2, [bytearray(27) for _ in range(16)])
PREVIEW = b"\xff\xe1\0\x0e\xff\xd8 preview\xff\xd9"  # in the head of a JPEG, with an end of its own
JPEG = b"\xff\xd8" + PREVIEW + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(40) + b"\xff\xd9"
WEBP = b"RIFF" + struct.pack("<I", 48) + b"WEBPVP8 " + bytes(40)
MP3_FRAME = b"\xff\xfb\x90\0" + bytes(413)
TAGGED = b"ID3\4\0\0\0\0\1\x48" + bytes(200) + MP3_FRAME
SOUNDS = {
    "mp3": TAGGED, "m4a": m4a(b"M4A ") + bytes(range(99)), "flac": b"fLaC\0\0\0\x22" + bytes(120),
    "ogg": b"OggS\0\2" + bytes(22) + b"\1\x13OpusHead" + bytes(120),
    "aif": b"FORM" + struct.pack(">I", 124) + b"AIFF" + bytes(120),
    "aiff": b"FORM" + struct.pack(">I", 124) + b"AIFC" + bytes(120),
}
OUTER = b"RIFF" + struct.pack("<I", 8044) + wav_bytes(8000, 8000)[8:]  # the size of all of it
GUESS = "echo 2,1; echo 9,0.5,; echo Estimating duration >&2; echo 76; echo 77"
ADPCM = wav_bytes(8000, 8000).replace(b"\x10\0\0\0\1", b"\x10\0\0\0\x11")
KINDS = {  # content types, and files of them by what is peculiar to each
    "image/png": {"png": PNG}, "image/jpeg": {"jpeg": JPEG}, "image/webp": {"webp": WEBP},
    "audio/wav": {"wav": wav_bytes(8000, 8000), "RF64": rf64(8000, 8000), "outer": OUTER},
    "audio/mpeg": {"tag": TAGGED, "no tag": MP3_FRAME, "8 kHz": b"\xff\xe3\x18\xc4" + bytes(140)},
    "audio/flac": {"flac": SOUNDS["flac"]}, "audio/ogg": {"opus": SOUNDS["ogg"]},
    "audio/mp4": {"M4A": SOUNDS["m4a"], "dash": m4a(b"dash"), "XAVC": m4a(b"XAVC"),
                  "no track": m4a(b"M4A ")[:20] + mp4_box(b"moov") + mp4_box(b"mdat", bytes(99)),
                  "by its head": m4a(b"M4A ")[:20] + bytes(range(125))},
    "audio/aiff": {"AIFF": SOUNDS["aif"], "AIFC": SOUNDS["aiff"]},
}


@pytest.mark.parametrize("content_type", KINDS)
def test_files_are_known_by_their_first_bytes_whatever_their_names(tmp_path, content_type):
    for name, content in KINDS[content_type].items():
        file = tmp_path / f"anything {name}"
        file.write_bytes(content)
        media = hedra.inspect_file(file, content_type[:5])
        assert (media.content_type, media.size_bytes) == (content_type, len(content))
        assert media.seconds == (1.0 if content_type == "audio/wav" else None)


PIECE = b"junk\0\0\0\0"
CUT = {  # else they are sent, and paid
    "a PNG of 8 bytes": PNG[:8], "a PNG without its end": PNG[:-12], "nearly a PNG": PNG[:-5],
    "a JPEG after its preview": JPEG[:40], "a JPEG without its end": JPEG[:-2],
    "a WebP cut": WEBP[:-3], "three bytes of a tag": b"ID3", "a tag cut": TAGGED[:150],
    "a tag alone": TAGGED[:210], "an AIFF cut": SOUNDS["aif"][:-20], "a bit of FLAC": b"fLaC\0",
    "nothing": b"", "a bit of a WAV": b"RIFF\0\0", "no sound yet": b"RIFF\0\0\0\0WAVEfmt ",
    "a WAV with its tail missing": wav_bytes(16000, 8000), "an RF64 as well": rf64(8000, 16000),
    "a WAV that is being written": wav_bytes(0, 8000),
    "a WAV cut behind its sound": b"RIFF\xff\xff\0\0" + wav_bytes(8000, 8000)[8:],
    "an AIFF that is being written": b"FORM\0\0\0\0AIFF" + bytes(120),
    "an M4A without its index": m4a(b"M4A ")[:20] + mp4_box(b"mdat", bytes(99)),
    "an M4A cut in its sound": m4a(b"M4A ")[:-9], "nor of it": mp4()[:-107],
}


@pytest.mark.parametrize("what", CUT)
def test_a_file_that_is_cut_is_refused_as_cut(tmp_path, what):
    file = tmp_path / "the file"
    file.write_bytes(CUT[what])
    kind = "image" if re.search("PNG|JPEG|WebP", what) else "audio"
    with pytest.raises(hedra.InputError, match="the file is cut short"):
        hedra.inspect_file(file, kind)


@pytest.mark.parametrize(("kind", "content", "words"), [
    ("audio", b"hello, this is text" * 9, "used"), ("audio", PNG, "used"),
    ("audio", wav_bytes(3999, 3999), "0.50 s"), ("image", SOUNDS["aif"], "used"),
    ("audio", m4a(b"heic"), "used"), ("audio", wav_bytes(2**31, 8000), "not to a pipe"),
    ("audio", wav_bytes(8000, 8000, rate=13), "615.38 s"), ("image", b"GIF89a" * 9, "used"),
    ("audio", wav_bytes(8000, 8000, rate=0), "damaged"),
    ("audio", m4a(b"M4A ", sound=False), "no sound track"),
    pytest.param("image", PNG + bytes(10_485_761 - len(PNG)), "10,485,760", id="a byte more"),
    pytest.param("audio", wav_bytes(9, 9, extra=PIECE * 4_000_000), "the file", id="pieces"),
])
def test_a_file_that_hedra_would_not_take_is_refused_by_name(tmp_path, kind, content, words):
    file, started = tmp_path / "the file", time.process_time()
    file.write_bytes(content)
    with pytest.raises(hedra.InputError, match=re.escape(words)) as refused:
        hedra.inspect_file(file, kind)
    assert str(file) in str(refused.value)
    assert time.process_time() - started < 1


@pytest.fixture
def ffprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put an ffprobe on the PATH that is a shell's script; the file of its arguments."""

    def install(script: str) -> Path:
        program, asked = tmp_path / "bin/ffprobe", tmp_path / "asked"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>\'{asked}\'\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return asked

    return install


@pytest.mark.parametrize(("script", "seconds"), [
    ("echo 12.5", 12.5), ("echo nan", None), ("echo N/A", None), (GUESS, 9.5),
])
def test_ffprobe_is_asked_for_the_length_without_a_shell(tmp_path, ffprobe, script, seconds):
    asked, file = ffprobe(script), tmp_path / "-i $(touch evil) memo.m4a"
    for content in (SOUNDS["m4a"], ADPCM):
        file.write_bytes(content)
        assert hedra.inspect_file(Path(file.name), "audio").seconds == seconds
    assert asked.read_text().splitlines()[-1] == str(file)
    assert not Path("evil").exists()


FILM = mp4(2.5)
FTYP, MDAT = FILM[:24], FILM[-107:]
FILMS = {  # whether it is whole, and what it is made of
    "whole": (True, FILM), "fragments": (True, FILM + mp4_box(b"moof", bytes(90)) + MDAT),
    "an open end": (True, FILM[:-107] + b"\0\0\0\0mdat" + bytes(50)),
    "64 bits": (True, FILM[:-107] + b"\0\0\0\1mdat" + (66).to_bytes(8, "big") + bytes(50)),
    "too many": (False, FILM[:-107] + b"\0\0\0\1mdat" + (1 << 62).to_bytes(8, "big")),
    "a byte short": (False, FILM[:-1]), "half": (False, FILM[: len(FILM) // 2]),
    "its first box": (False, FTYP), "no moov": (False, FTYP + MDAT), "no mdat": (0, FILM[:-107]),
    "no ftyp": (False, FILM[24:]), "rubbish": (False, FTYP + b"what no box begins with"),
    "a fragment cut": (False, FILM + mp4_box(b"moof", bytes(90))[:-1]),
    "a page": (False, b"<html>Just a moment...</html>"), "nothing": (False, b""),
}


@pytest.mark.parametrize("what", FILMS)
def test_a_film_is_whole_if_all_of_its_boxes_are(tmp_path, what):
    whole, content = FILMS[what]
    (tmp_path / "x.part").write_bytes(content)
    film = hedra.inspect_film(tmp_path / "x.part")
    assert (film is not None) == whole
    assert not film or (film.seconds, film.has_sound) == (2.5, True)


# ---- replies ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("value", "seconds"), [
    ("5", 5.0), ("0", 0.0), ("0.5", 0.5), ("1e9", 1e9), ("1e11", 1e11), ("-3", None),
    ("inf", None), ("nan", None), ("1e400", None), ("soon", None), ("", None),
    ("Fri, 02 Jan 2026 03:04:35 GMT", 30.0), ("Fri, 02 Jan 2026 03:04:00 GMT", 0.0),
    ("Thu, 02 Jan 2026 03:04:35 GMT", 30.0), ("Fri, 32 Jan 2026 03:04:35 GMT", None),
    ("Fri, 02 Jan 100000 03:04:35 GMT", None), ("9" * 400, math.inf),
])
def test_retry_after_is_seconds_or_a_date(value, seconds):
    with frozen("2026-01-02 03:04:05"):
        assert hedra.parse_retry_after(value) == seconds


@pytest.mark.parametrize(("body", "code", "words"), [
    ({"code": "NOT_FOUND", "messages": ["a", "b"]}, "NOT_FOUND", "a; b"),
    ({"code": 5, "error_code": "INTERNAL", "messages": ["a"]}, "INTERNAL", "a"),
    ({"detail": [{"loc": ["body", "name"], "msg": "too long"}]}, "", "body.name: too long"),
    ({"detail": "Not authenticated"}, "", "Not authenticated"),
    ({"detail": -1, "messages": {"a": 1}}, "", "no reason given"),
    ({"error": {"message": "2 are", "details": [{"field": "a.b", "message": "is blank"}]},
      "trace_id": "t1"}, "", "2 are; a.b: is blank [trace id t1]"),
    ("<html><style>b{}</style><h1>Bad\n Gateway</h1></html>", "", "Bad Gateway"),
    ("", "", "no reason given"), (None, "", "no reason given"), ([1], "", "no reason given"),
])
def test_an_error_shows_the_servers_own_words_from_any_shape(body, code, words):
    text = body if isinstance(body, str) else json.dumps(body)
    error = hedra.parse_error(400, {}, text, "GET /x")
    assert (error.status, error.code) == (400, code)
    assert words in str(error)
    assert "<" not in str(error)
    assert error.trace_id == ("t1" if "t1" in words else "")


def flat(credit_cost: Any, billing_unit: Any, **more: Any) -> dict[str, Any]:
    return {"price_details": {"credit_cost": credit_cost, "billing_unit": billing_unit, **more}}


def rates(**more: Any) -> dict[str, Any]:
    modifiers = {"resolution": {"540p": 0.5}}
    return {"pricing": {"base_cost": 2, "credits_per_second": 6, "modifiers": modifiers, **more}}


@pytest.mark.parametrize(("price", "seconds", "resolution", "credits"), [
    (rates(), 10.0, "540p", 31), (rates(), 10.1, "540p", 32), (rates(), 10.0, "720p", 62),
    (rates(modifiers=None, base_cost=None), 2.0, "540p", 12), (flat(9, "mile"), 99, "", None),
    (flat(3, "second", unit_scale=1), 2.1, "", 7), (flat(9, "generation"), 99, "", 9),
    (flat(30, "seconds", unit_scale=10), 2, "", 6), (flat(-5, "second"), 2, "", None),
    (flat(math.nan, "second"), 2, "", None), (flat("3", "second"), 2, "", None),
    (flat(3, ["second"]), 2, "", None), (rates(credits_per_second=-6), 2.0, "540p", None),
    (rates(credits_per_second=math.nan), 2.0, "540p", None), ({}, 1.0, "540p", None),
    (rates(modifiers={"resolution": {"540p": "x"}}), 2.0, "540p", None),
])
def test_a_price_follows_the_formula_or_is_unknown(price, seconds, resolution, credits):
    assert hedra.parse_price(hedra.Reply(price), seconds, resolution) == credits


def entry(**more: Any) -> dict[str, Any]:
    return {"id": None, "slug": None, "name": None, **more}


OLD = entry(id="old", name="n", ai_model_type="character-3", status="DEPRECATED")
NEW = entry(id="new", name="n", ai_model_type="character-3", status="ACTIVE")
SLUGGED = next(row for row in sandbox.catalogue() if row["slug"] == SLUG)
OTHER = entry(id="o", slug="together/hedra-avatar", name="Hedra Avatar")


@pytest.mark.parametrize(("rows", "asked", "model"), [
    ([OTHER, OLD, NEW], "", "new"), ([OLD, OTHER], "", None), ([], "", None),
    ([OTHER, SLUGGED], "", CHARACTER_3), ([{**SLUGGED, "id": None}], "", SLUG),
    ([entry(slug="x/character-30"), SLUGGED], "", CHARACTER_3), ([SLUGGED], "no/one", None),
    ([entry(id="n3", name="Hedra Character 3")], "", "n3"), ([SLUGGED, OTHER], "o", "o"),
    ([SLUGGED, OTHER], "together/hedra-avatar", "o"), ([OTHER], "Together/Hedra-Avatar", "o"),
])
def test_the_model_is_chosen_on_both_shapes_of_the_catalogue(rows, asked, model):
    chosen = hedra.choose_model([hedra.Reply(row) for row in rows], asked)
    assert (chosen.text("id", "slug") or None) == model


# ---- retry --------------------------------------------------------------------------------------

def test_retry_tries_again_after_full_jitter_until_it_works_or_may_no_more(clock, monkeypatch):
    naps, good, bad = [], Mock(side_effect=[OSError, KeyError, "done"]), Mock(side_effect=OSError)
    again = hedra.retry((KeyError, OSError), tries=3, delay=1, sleep=naps.append)(good)
    assert (again(), again.__doc__, len(naps)) == ("done", good.__doc__, 2)
    with pytest.raises(OSError):
        hedra.retry(OSError, tries=3)(bad)()
    assert (good.call_count, bad.call_count, len(clock.naps)) == (3, 3, 2)
    with pytest.raises(ValueError, match="tries"):
        hedra.retry(OSError, tries=0)
    limits, _ = [], clock.naps.clear()
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append((low, high)) or high)
    flaky = Mock(side_effect=[*[OSError] * 6, "done"])
    assert hedra.retry(OSError, tries=7, delay=2, backoff=2, max_delay=20)(flaky)() == "done"
    assert limits == [(0, nap) for nap in clock.naps] == [(0, n) for n in (2, 4, 8, 16, 20, 20)]


@pytest.mark.parametrize(("error", "naps"), [
    (hedra.ApiError("x", retryable=True, retry_after=17.0), [17.0]), (OSError("x"), []),
    (hedra.ApiError("x", retryable=True, retry_after=301.0), []),
    (hedra.ApiError("x", retryable=True, retry_after=0.0), [2.0]),
    (hedra.ApiError("x", retryable=False), []),
])
def test_retry_obeys_retry_after_and_leaves_alone_what_says_no(clock, error, naps, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    flaky = Mock(side_effect=[error, "done"])
    with contextlib.nullcontext() if naps else pytest.raises(type(error)):
        assert hedra.retry((hedra.HedraError, KeyError))(flaky)() == "done"
    assert clock.naps == naps


# ---- transport, over both APIs ------------------------------------------------------------------

HTTP = b"HTTP/1.1 200 OK\r\nContent-Length: 80\r\n\r\n"  # the head of an answer on the wire
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 80
BALANCE = {"v2": ("/billing/credits", {"remaining": 5}), "v3": ("/balance", {"balance": 5})}


def balance(key: str, **environ: str) -> Any:
    return hedra.get_balance(key, environ=environ).remaining


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503, 504])
def test_a_harmless_request_is_repeated_after_a_passing_fault(clock, server, version, status):
    path, reply = BALANCE[version]
    for _ in range(2):
        script = server.expect_ordered_request(path)
        script.respond_with_data("<h1>busy</h1>", status, {"Retry-After": "11"})
    server.expect_ordered_request(path).respond_with_json(reply)
    assert balance(KEYS[version], HEDRA_BASE_URL=server.url_for("")) == 5
    assert sum(clock.naps) == pytest.approx(27.5, abs=5.5)
    assert (11.0 in clock.naps) == (status != 429), "of the refused none comes first"
    server.expect_request(path).respond_with_data("{}", 429, {"Retry-After": "100"})
    with pytest.raises(hedra.RateLimited):
        balance(KEYS[version], HEDRA_BASE_URL=server.url_for(""))
    assert sum(clock.naps) < 700, "where no deadline says when to stop"


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_a_server_that_cannot_be_reached_is_told_with_its_port_or_its_name(clock, monkeypatch):
    port = closed_port()
    with pytest.raises(hedra.ApiError, match=f"{port}.*refused") as failed:
        balance(KEY, HEDRA_BASE_URL=f"http://127.0.0.1:{port}")
    assert (failed.value.status, failed.value.ambiguous) == (None, False)
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
    with pytest.raises(hedra.ApiError, match=r"api\.nowhere\.test"):
        balance(KEY3, HEDRA_BASE_URL="https://api.nowhere.test/v3")


def test_an_answer_over_16_mib_is_an_error_and_not_kept_in_memory(clock, server, version):
    sent = []
    blocks = (sent.append(1) or b" " * (1 << 20) for _ in range(64))
    server.expect_request(BALANCE[version][0]).respond_with_response(Response(blocks))
    with pytest.raises(hedra.ApiError, match="no end|too long"):
        balance(KEYS[version], HEDRA_BASE_URL=server.url_for(""))
    assert len(sent) < 40


@contextlib.contextmanager
def wire(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                serve(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def drip(asked: list[bytes], *answers: bytes, slow: bytes = b"\0never") -> Any:
    """Answer a request a connection, and byte by byte from `slow` on."""
    left = list(answers)

    def serve(client: socket.socket) -> None:
        asked.append(client.recv(65536))
        head, mark, rest = (left.pop(0) if len(left) > 1 else left[0]).partition(slow)
        client.sendall(head)
        for byte in mark + rest:
            client.sendall(bytes([byte]))
            threading.Event().wait(0.04)

    return wire(serve)


@pytest.mark.parametrize("slow", [b"Content-Length", b"{", b"000"])
def test_an_answer_that_trickles_counts_as_silence_when_its_time_is_up(slow, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    answer = CHUNKS if slow == b"000" else HTTP + b'{"remaining": 5}'.ljust(80)
    server, started = drip(asked := [], answer, slow=slow), time.monotonic()
    with server as address, pytest.raises(hedra.ApiError) as failed:
        balance(KEY, HEDRA_BASE_URL=f"http://{address}", HEDRA_HTTP_TIMEOUT="0.1")
    assert (failed.value.retryable, time.monotonic() - started < 6) == (True, True)
    assert 2 <= len(asked) <= 6


def test_an_early_answer_is_not_the_final_one_nor_that_of_the_next_request(clock):
    one, two = (HTTP + b'{"remaining": %d}'.ljust(81) % n for n in (1, 2))
    asked = []
    with drip(asked, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + one, two) as address:
        found = [balance(KEY, HEDRA_BASE_URL=f"http://{address}") for _ in range(2)]
    assert found in ([2, 2], [1, 2]) and all(request.startswith(b"GET") for request in asked)


# A certificate for *.hedra.test, its own authority, good until 2126, for nothing but these tests.
TEST_CERT = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIHUQ8txPiFHlUTW0zqS5xgUDn9qtWaU/Hp+ncV8bUYgqoAoGCCqGSM49AwEHoUQDQgAE1dUH6R83xtqryctzsCdu
JpNO4pwC9xLWx8nFANy2ID5yc3zkM3uzyUkaY1lETPxjEr+OkuSkE64yPlp6nhjUEQ==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBuDCCAV6gAwIBAgIUR6jceiFkvZ1YJFdIHidlMTUegG8wCgYIKoZIzj0EAwIwFTETMBEGA1UEAwwKaGVkcmEudGVzdDAg
Fw0yNjExMjUwMTQ5MTVaGA8yMTI2MTEwMTAxNDkxNVowFTETMBEGA1UEAwwKaGVkcmEudGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABNXVB+kfN8baq8nLc7AnbiaTTuKcAvcS1sfJxQDctiA+cnN85DN7s8lJGmNZREz8YxK/jpLkpBOuMj5aep4Y
1BGjgYkwgYYwHQYDVR0OBBYEFKVz5gtfVmG4UrXjBuHDReQ8tl4RMB8GA1UdIwQYMBaAFKVz5gtfVmG4UrXjBuHDReQ8tl4R
MCMGA1UdEQQcMBqCDCouaGVkcmEudGVzdIIKaGVkcmEudGVzdDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAK
BggqhkjOPQQDAgNIADBFAiBX3rn50g8dzI0asdKvQOiGCohGd9z+EzkyK0hCcOQeZwIhAKSVegLBvN884cTW2c5AL+7L0fbO
UT3GoG3MA8wHiBiQ
-----END CERTIFICATE-----
"""


def tunnel(port: int, heads: list[bytes], login: str = "") -> Any:
    """A proxy that knows CONNECT and nothing else, and leads to one port whatever is asked for."""
    wanted = urllib3.make_headers(basic_auth=login)["authorization"].encode() if login else b""

    def serve(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1)
        heads.append(head)
        if wanted not in head:
            client.sendall(b"HTTP/1.1 407 Who are you?\r\nContent-Length: 0\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", port)) as there:
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            ends = {client: there, there: client}
            while True:
                for end in select.select(list(ends), [], [], 10)[0]:
                    if not (data := end.recv(65536)):
                        return
                    ends[end].sendall(data)

    return wire(serve)


@pytest.fixture(scope="session")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HTTPServer]:
    """A server that speaks TLS, for the API and its files; `authority` is who vouches for it."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "server.pem").write_text(TEST_CERT)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem")
    with HTTPServer("127.0.0.1", 0, ssl_context=context, threaded=True) as server:
        server.authority = str(folder / "server.pem")
        yield server


@pytest.fixture
def company(live: World, tls_server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> World:
    def answer(request: Request) -> Response:
        port = "files" if request.host.startswith("files.") else "api"
        return live.answer(port, getattr(live.box, port), request)

    tls_server.clear()
    tls_server.expect_request(re.compile(".*")).respond_with_handler(answer)
    live.box.files_url = "https://files.hedra.test"
    live.environ["HEDRA_BASE_URL"] = f"https://api.hedra.test{PREFIXES[live.version]}"
    monkeypatch.setenv("SSL_CERT_FILE", tls_server.authority)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    return live


@pytest.mark.parametrize(
    ("version", "name"), [("v2", "HTTPS_PROXY"), ("v3", "https_proxy"), ("v2", "ALL_PROXY")]
)
def test_a_proxy_sees_connect_and_nothing_else(company, tls_server, name, monkeypatch):
    heads = []
    with tunnel(tls_server.port, heads, "me:p w0rd-of-mine") as address:
        scheme = "http://" * (name != "https_proxy")  # curl needs none
        monkeypatch.setenv(name, f"{scheme}me:p%20w0rd-of-mine@{address}")
        done = company.succeed("-vv", *QUICK)
    hosts = {b"CONNECT api.hedra.test:443", b"CONNECT files.hedra.test:443"}
    assert {b" ".join(head.split()[:2]) for head in heads} == hosts
    assert company.key.encode() not in b"".join(heads)
    told = done.out + done.err + str(company.sent)
    told += "".join(file.read_text() for file in company.folder.glob(".cache/**/*.json"))
    assert not re.search("w0rd-of-mine|proxy-authorization", told.lower())


@only_v3
def test_what_is_wrong_with_a_proxy_is_told_without_its_password(company, tls_server, monkeypatch):
    port, silent, heads = closed_port(), wire(lambda client: client.recv(65536)), list[bytes]()
    with tunnel(tls_server.port, heads, "me:another") as address, silent as deaf:
        for proxy, words in (
            (f"http://me:w0rd@127.0.0.1:{port}", rf"proxy.*127\.0\.0\.1:{port}"),
            (f"http://me:w0rd@{deaf}", f"proxy.*{deaf}"),
            (f"http://me:w0rd@{address}", "refuses.*407.*PROXY"),
            ("socks5://me:w0rd@127.0.0.1:1", "socks5"), ("http://", "of HTTPS_PROXY is no http"),
        ):
            monkeypatch.setenv("HTTPS_PROXY", proxy)
            told = company.run()
            assert (told.status, "w0rd" in told.err) == (1, False)
            assert re.search(words, told.last)
    assert company.box.paid == []
    assert 1 <= len(heads) <= 2, "what is refused once would lock an account"


@only_v2
def test_no_proxy_is_obeyed(company, tls_server, monkeypatch, clock):
    found, port = socket.getaddrinfo, tls_server.port
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, _, *more, **how: found("127.0.0.1", port, *more, **how)
    )
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
    for number, no_proxy in enumerate(("hedra.test", "*", "api.hedra.test, files.hedra.test"), 1):
        monkeypatch.setenv("NO_PROXY", no_proxy)
        assert company.run("--prompt", no_proxy, *QUICK).status == 0
        assert len(company.bought()) == number
    monkeypatch.delenv("SSL_CERT_FILE")
    hedra.connected.cache_clear()
    clock.naps.clear()
    assert ("certificate" in company.call("credits").last, len(clock.naps)) == (True, 1)


# ---- web API v2 ---------------------------------------------------------------------------------

def test_create_asset_names_file_and_kind_and_the_workspace_where_one_is_set(server, environ):
    script = {"name": "friend.png", "type": "image"}
    for more in ({}, {"workspace_id": "w1"}):
        handler = server.expect_ordered_request("/assets", "POST", json={**script, **more})
        handler.respond_with_json({"id": "a1"})
        environ["HEDRA_WORKSPACE_ID"] = more.get("workspace_id", "")
        assert hedra.create_asset("friend.png", "image", KEY, environ=environ) == "a1"
    sent = server.log[0][0].headers
    assert (sent["X-API-Key"], "Authorization" in sent) == (KEY, False)
    pools = {"remaining": 7, "workspace_credit_pool": {"w1": {"available": 1234}}}
    server.expect_ordered_request("/billing/credits").respond_with_json(pools)
    assert hedra.get_credit_balance(KEY, environ=environ) == 1234


@pytest.mark.parametrize("size", [0, 70_000, 3_000_000])
def test_an_upload_sends_the_exact_bytes_with_an_exact_length(server, environ, tmp_path, size):
    file = tmp_path / 'a "quoted"\r\nX-Evil: 1 ü.wav'
    file.write_bytes(random.Random(size).randbytes(size))
    for status in (200, 409, 400):  # 409: an answer was lost, and the bytes are there
        server.expect_ordered_request("/assets/a1/upload", "POST").respond_with_json({}, status)
        with pytest.raises(hedra.ApiError) if status == 400 else contextlib.nullcontext():
            hedra.upload_asset("a1", file, KEY, environ=environ)
    with server.log[0][0] as request:
        assert "Transfer-Encoding" not in request.headers
        assert (request.content_length, list(request.files)) == (len(request.get_data()), ["file"])
        assert request.files["file"].read() == file.read_bytes()
        assert "evil" not in str(request.files["file"].headers).lower()


SHAPE = {"resolution": "540p", "aspect_ratio": "9:16"}
START = {
    "type": "video", "start_keyframe_id": "img", "audio_id": "aud",
    "generated_video_inputs": {"text_prompt": "smiles", **SHAPE},
}
REFS = ("img", "aud", "smiles")
HD = {"resolution": "720p", "aspect_ratio": "1:1"}
SEEDED = {"text_prompt": "smiles", **HD, "seed": 7}


@pytest.mark.parametrize(("model", "more", "body"), [
    (CHARACTER_3, {}, {"ai_model_id": CHARACTER_3}), ("a/b", {}, {"model_slug": "a/b"}),
    ("m", {"generation_id": UUID}, {"model_slug": "m", "generation_id": UUID}),
    ("m", {**HD, "settings": {"seed": 7}}, {"model_slug": "m", "generated_video_inputs": SEEDED}),
])
def test_a_generation_is_started_with_just_what_it_needs(server, environ, model, more, body):
    script = server.expect_ordered_request("/generations", "POST", json={**START, **body})
    script.respond_with_json({"id": "g1", "status": "queued"})
    assert hedra.start_generation(*REFS, KEY, model, environ=environ, **more) == "g1"
    if name := more.get("generation_id"):  # which was started before
        server.expect_ordered_request("/generations", "POST").respond_with_json({}, 409)
        assert hedra.start_generation(*REFS, KEY, model, environ=environ, **more) == name


@pytest.mark.parametrize(("row", "model_id", "named"), [
    (SLUGGED, CHARACTER_3, {"model_slug": SLUG}),
    ({**SLUGGED, "id": None}, SLUG, {"model_slug": SLUG}),
    ({**NEW, "id": UUID}, UUID, {"ai_model_id": UUID}),  # of the old kind, without prices
])
def test_the_default_model_is_looked_up_once_an_account(server, environ, row, model_id, named):
    for _ in range(2):
        server.expect_ordered_request("/models").respond_with_json([OTHER, OLD, row])
    script = {**START, **named}
    server.expect_ordered_request("/generations", json=script).respond_with_json({"id": "g"})
    for key in (KEY, "sk_other", KEY, "sk_other"):
        assert hedra.get_default_model_id(key, environ=environ) == model_id
    assert KEY not in Path(".cache/model_id").read_text()
    assert hedra.start_generation(*REFS, KEY, environ=environ) == "g"


MP4 = mp4(filler=bytes(range(256)) * 40)


def video_at(server: HTTPServer) -> str:
    server.expect_request("/v.mp4").respond_with_data(MP4, content_type="video/mp4")
    return server.url_for("/v.mp4")


def fetch(environ: dict[str, str], name: str = "g", key: str = KEY, **more: Any) -> bytes:
    video = hedra.wait_and_download(name, Path("out"), key, environ=environ, **more)
    assert video == Path(f"out/{name}.mp4")
    return video.read_bytes()


def test_waiting_looks_every_five_seconds_and_a_timeout_loses_nothing(clock, server, environ):
    going = [{"status": word, "progress": 0.3} for word in ("queued", "processing", "finalizing")]
    for reply in [*going, {"status": "complete", "url": video_at(server)}]:
        server.expect_oneshot_request("/generations/g/status").respond_with_json(reply)
    assert (fetch(environ), time.monotonic() - clock.start) == (MP4, pytest.approx(15))
    assert (server.log[-1][0].path, os.listdir("out")) == ("/v.mp4", ["g.mp4"])
    assert KEY not in str(server.log[-1][0].headers)
    server.expect_request("/generations/h/status").respond_with_json({"status": "queued"})
    with pytest.raises(hedra.StillRunning, match="not lost") as late:
        fetch(environ, "h")
    assert (isinstance(late.value, TimeoutError), late.value.generation_id) == (True, "h")
    spent_s = time.monotonic() - clock.start
    assert (spent_s, os.listdir("out")) == (pytest.approx(315, abs=6), ["g.mp4"])


def test_refusals_that_name_no_time_make_the_pauses_longer_only_in_a_row(server, environ, clock):
    statuses = iter([429, *[200] * 5] * 6 + [429] * 99)
    server.expect_request("/billing/credits").respond_with_handler(
        lambda request: Response('{"remaining": 5}', next(statuses))
    )
    assert all(hedra.get_balance("key", environ=environ) for _ in range(30))
    assert 6.0 <= sum(clock.naps) <= 6 * 1.5
    with pytest.raises(hedra.RateLimited):
        hedra.get_balance("key", environ=environ)
    assert 30.0 <= max(clock.naps) <= 45.0


def test_the_balance_has_a_unit_and_an_integer_in_the_old_function(server, environ, monkeypatch):
    server.expect_request("/billing/credits").respond_with_json({"remaining": 321.5})
    server.expect_request("/balance").respond_with_json({"balance": 12.34, "currency": "USD"})
    monkeypatch.setenv("HEDRA_BASE_URL", environ["HEDRA_BASE_URL"])  # read when it is called
    for key, amount, unit in ((KEY, 321.5, "credits"), (KEY3, 12.34, "USD")):
        assert hedra.get_balance(key, environ=environ)[:2] == (amount, unit)
        assert repr(hedra.get_credit_balance(key)) == str(int(amount))


# ---- jobs API v3 --------------------------------------------------------------------------------

TRANSCRIPTS = {
    b"data: a\n\n": [("message", "a", "")], b"data:a\ndata:  b\n\n": [("message", "a\n b", "")],
    b"id: 7\r\nevent: s\r\ndata: a\r\n\r\n": [("s", "a", "7")],
    b"id: 7\revent: s\rdata: a\r\r\n": [("s", "a", "7")],
    b"id: 1\ndata: a\n\ndata: b\n\n": [("message", "a", "1"), ("message", "b", "1")],
    b'event: status\ndata: {"cut': [], b"event: status\ndata: {}\n": [],
    b": hi\nfoo: bar\nretry: \xb2\ndata: a\n\n": [("message", "a", "")],
    b"data: \xc3\xa4\n\nevent: done\ndata: [D]\n\n": [("message", "ä", ""), ("done", "[D]", "")],
}


@pytest.mark.parametrize("body", TRANSCRIPTS)
def test_a_stream_is_read_the_same_however_it_is_cut_into_blocks(body):
    ways = [[body], [bytes([byte]) for byte in body]]
    ways += [[body[:at], body[at:]] for at in range(1, len(body))]
    for blocks in ways:
        assert list(hedra.iter_events(blocks)) == TRANSCRIPTS[body]
    assert not [*hedra.iter_events([b"data: " + b"x" * (1 << 20), b"\n\n"])], "over 1 MiB"


def test_upload_serves_both_apis_and_create_asset_says_so(server, environ, version):
    handle = {"url": "https://h/1?x=y", "content_type": "audio/wav", "expires_at": "2036-01-01"}
    server.expect_request("/assets", "POST").respond_with_json({"id": "a1"})
    server.expect_request("/assets/a1/upload").respond_with_json({})
    server.expect_request("/files").respond_with_json(handle, 201)
    ref = hedra.upload(write_wav(Path("x.wav")), "audio", KEYS[version], environ=environ)
    assert ref == {"v2": "a1", "v3": "https://h/1?x=y"}[version]
    for name in ("create_asset", "upload_asset") if version == "v3" else ():
        with pytest.raises(hedra.HedraError, match=r"upload\("):
            getattr(hedra, name)("x", Path("image"), KEY3, environ=environ)


def test_a_job_is_started_with_just_what_it_needs_and_its_key_in_both_places(server, environ):
    named = {name: {"source": "url", "url": name[:3]} for name in ("img", "audio")}
    files = {"start_image": named["img"], "audio": named["audio"]}
    script = {"input": {"prompt": "smiles", **SHAPE, **files}}
    keyed = {"input": {**script["input"], "seed": 7}, "idempotency_key": "k1"}
    for path, body, headers in (
        ("/models/hedra-character-3", script, {}),
        ("/models/hedra-avatar", keyed, {"Idempotency-Key": "k1"}),
    ):
        handler = server.expect_ordered_request(path, "POST", json=body, headers=headers)
        handler.respond_with_json({"job_id": "job_1", "status": "IN_QUEUE"}, 202)
    assert hedra.start_generation(*REFS, KEY3, environ=environ) == "job_1"
    model, more = "together/hedra-avatar", {"generation_id": "k1", "settings": {"seed": 7}}
    assert hedra.start_generation(*REFS, KEY3, model, environ=environ, **more) == "job_1"
    headers = server.log[0][0].headers
    assert headers["Authorization"] == f"Bearer {KEY3}"
    assert not {"X-Api-Key", "Idempotency-Key"} & set(headers.keys())


def frame(number: int, status: str, **more: Any) -> str:
    data = json.dumps({"job_id": "job_1", "status": status, **more})
    return f"id: {number}\nevent: status\ndata: {data}\n\n"


def respond_with_stream(server: HTTPServer, *frames: str) -> None:
    """A stream that is cut behind its last frame; what the job's end is, and its video."""
    script = server.expect_oneshot_request("/jobs/job_1/stream")
    script.respond_with_data("".join(frames), content_type="text/event-stream")
    output = {"status": "COMPLETED", "url": video_at(server)}
    reply = {"job_id": "job_1", "status": "COMPLETED", "outputs": [output], "cost": 0.03}
    server.expect_request("/jobs/job_1").respond_with_json(reply)


def test_a_stream_that_is_cut_is_taken_up_behind_its_last_event(clock, server, environ):
    log, done = "id: 2\nevent: log\ndata: {}\n\n", "event: done\ndata: [STREAM_DONE]\n\n"
    respond_with_stream(server, frame(1, "IN_QUEUE"), ": keep-alive\n\n", log, "id: 3\nev")
    respond_with_stream(server, frame(5, "COMPLETED"), done)
    assert fetch(environ, "job_1", KEY3) == MP4
    assert 5.0 in clock.naps, "not at once"
    asked = [(r.path, r.headers.get("Last-Event-Id")) for r, _ in server.log]
    streams = [("/jobs/job_1/stream", None), ("/jobs/job_1/stream", "2")]
    assert asked == [*streams, ("/jobs/job_1", None), ("/v.mp4", None)]
    assert not {"X-Api-Key", "Authorization"} & set(server.log[-1][0].headers.keys())


@pytest.mark.parametrize(("status", "body", "kind"), [
    *((status, "<h1>no</h1>", "text/html") for status in (404, 429, 200)),
    (200, frame(1, "IN_QUEUE") + "data: x\n" * 150_000, "text/event-stream"),
    (200, "event: status\ndata: [5]\n\n", "text/event-stream"),
    (200, frame(1, "FAILED"), "text/event-stream"),
])
def test_without_a_stream_the_job_is_polled(clock, server, environ, status, body, kind):
    server.expect_request("/jobs/job_1/stream").respond_with_data(body, status, content_type=kind)
    script = [{"status": "IN_QUEUE"}] * 4 + [{"status": "IN_PROGRESS"}] * 4
    for reply in [*script, {"status": "COMPLETED"}]:
        server.expect_oneshot_request("/jobs/job_1/status").respond_with_json(reply)
    respond_with_stream(server)
    server.oneshot_handlers.pop()
    assert fetch(environ, "job_1", KEY3) == MP4
    assert sum(r.path.endswith("/stream") for r, _ in server.log) <= 3
    assert sum(r.path.endswith("/status") for r, _ in server.log) == 9


# ---- waiting and downloading --------------------------------------------------------------------

BODIES = {  # status, headers, and the body, of no known length if it is a list
    "nothing": (200, {}, b""), "six bytes": (200, {}, MP4[:6]), "a box": (200, {}, MP4[:24]),
    "half of it, with the half's length": (200, {}, MP4[: len(MP4) // 2]),
    "its first box, and no length": (200, {}, [MP4[:24]]),
    "more than any video": (200, {"Content-Length": str(9 << 30)}, [MP4]),
    "a page": (200, {}, b"<html>Just a moment...</html>"),
    "another piece": (206, {"Content-Range": "bytes 5-9999/10000"}, MP4[5:]),
    "no content": (204, {}, b""), "a video as a refusal": (403, {}, MP4),
    "a redirect in a circle": (302, {"Location": "/v.mp4"}, b""),
    "a redirect to plain http": (302, {"Location": "http://cdn.example/v.mp4"}, b""),
}


@pytest.mark.parametrize("what", BODIES)
def test_an_answer_that_is_no_whole_video_is_an_error_and_no_file(clock, server, environ, what):
    status, headers, body = BODIES[what]
    server.expect_request("/v.mp4").respond_with_handler(lambda request: Response(
        iter(body) if isinstance(body, list) else body, status, headers=headers
    ))
    reply = {"status": "complete", "url": server.url_for("/v.mp4")}
    server.expect_request("/generations/g/status").respond_with_json(reply)
    with pytest.raises(hedra.HedraError):
        fetch(environ)
    assert not list(Path("out").iterdir())


# ---- making a clip: one clip --------------------------------------------------------------------

CALLS = {"v2": "balance create create download list list price status submit upload upload",
         "v3": "balance download price result stream submit upload upload"}


def test_a_clip_takes_just_these_requests_and_one_payment(world):
    assert world.run()[:2] == (0, "output/hello.mp4\n")
    world.check_paid()
    assert " ".join(sorted(world.verbs)) == CALLS[world.version]
    first = min(world.verbs.index("upload"), (world.verbs + ["create"]).index("create"))
    assert set(world.verbs[:first]) >= {"price", "balance"}, "before any upload"


def test_hedra_gets_the_files_bytes_the_prompt_the_shape_and_what_else_is_set(world):
    flags = ["--prompt", "waves", "--resolution", "720p", "--aspect-ratio", "1:1"]
    assert world.run(*flags, "--set", "bounding_box_target=[0.5, 0.25]").status == 0
    (one,) = world.bought()
    assert [*map(Path.read_bytes, one.sources)] == [*map(Path.read_bytes, (world.img, world.wav))]
    assert (one.prompt, one.resolution, one.aspect_ratio) == ("waves", "720p", "1:1")
    sent = one.request.get("generated_video_inputs", one.request)
    assert (sent["bounding_box_target"], "duration_ms" in sent) == ([0.5, 0.25], False)
    assert (world.run("--set", "duration_ms=2000").status, world.bought()[1].length) == (0, 2.0)


def test_the_intent_is_on_disk_before_the_submit_and_the_id_after_it(world, monkeypatch):
    seen, synced = [], []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(len(world.sent)))
    world.before.append(lambda number: world.sent[number - 1].is_submit and seen.extend(
        path.read_text() for path in world.records()
    ))
    assert world.run().status == 0
    body = json.loads(world.submits()[0].body)
    assert (body.get("generation_id") or body.get("idempotency_key")) in seen[0]
    at = next(n for n, sent in enumerate(world.sent, 1) if sent.is_submit)
    assert min(synced.count(at - 1), synced.count(at)) >= 2  # the record and its folder


@only_v2
def test_whatever_makes_another_clip_is_paid_for_once(world):
    flags = [[], ["--prompt", "another"], ["--resolution", "720p"], ["--aspect-ratio", "16:9"],
             ["--model", "together/hedra-avatar"], ["--set", "bounding_box_target=[0.5, 0.5]"]]
    for paid, more in enumerate(flags * 2, 1):
        assert (world.run(*more).status, len(world.bought())) == (0, min(paid, len(flags)))
    assert world.run(HEDRA_API_KEY="sk_other").status == 0
    times = world.wav.stat()
    write_wav(world.wav, seed=5)  # other bytes of the same size and time
    os.utime(world.wav, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (world.run().status, len(world.bought())) == (0, len(flags) + 2)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("resolutions", ["720p"], "no --resolution 540p: choose one of 720p"),
    ("aspect_ratios", ["1:1"], "no --aspect-ratio 9:16: choose one of 1:1"),
    ("max_duration_ms", 900, "takes at most 0.9 s"), ("set", "duration_ms=400", "500 to 600,000"),
    ("slug", "x/y", "takes audio: x/y"), ("model", "nobody/nothing", "check --model"),
])
@only_v2
def test_what_the_model_cannot_do_is_refused_by_name_and_not_paid(world, field, value, words):
    world.box.catalogue = [{**SLUGGED, "name": None, field: value}]
    world.run(*[f"--{field}", value] * (field in ("set", "model"))).fails(words)
    assert world.box.paid == []
    assert world.costly == 0 or field == "model", "the catalogue does not list all that works"


def test_too_few_credits_shows_both_figures_and_uploads_nothing(world):
    world.money(2)
    (row,) = world.run("--json").fails(world.cost(2), world.cost(3)).rows
    assert (world.costly, row["credits"]) == (0, {"v2": 3, "v3": 0.03}[world.version])
    world.box.balance_error = 500  # then it is the submit that is refused, in Hedra's figures
    figures = {"v2": ["Required: 3", "Available: 2"],
               "v3": ["balance $0.02", "required $0.03", sandbox.FUNDING_URL, "trace id"]}
    assert "warning" in world.run().fails(*figures[world.version]).err
    assert world.box.paid == []
    world.money(100)
    world.fail("balance", "429", 999)
    world.box.render_seconds = 10.0  # for which there is time left
    assert "warning" in world.succeed("--timeout", "25").err


def test_a_generation_that_fails_shows_hedras_reason_and_is_not_paid_again(world):
    world.box.fail_with = {"type": "MODERATION_FAILED", "message": "No celebrities, please"}
    world.run().fails("No celebrities, please")
    world.box.fail_with, before = None, world.costly
    world.run().fails("No celebrities, please", "not paid again")
    assert (world.costly, world.target.exists()) == (before, False)
    world.succeed("--force", paid=2)
    reason = {"type": "X", "reason_code": "MODERATION_OUTPUT_TRANSIENT", "message": "Again"}
    world.box.fail_with, world.box.refund = reason, True  # what passes gets a new take by itself
    world.run("--prompt", "nods").fails()
    world.box.fail_with = None
    assert (world.run("--prompt", "nods").status, len(world.bought())) == (0, 3)


# ---- making a clip: pay once, whatever goes wrong -----------------------------------------------

TEXT = "Good morning! This is the news of the day, and it is short."
EVERY = ["500", "502-html", "503", "429", "408", "302", "reset"]
AFTER = ["500-after", "reset-after", "html-after", "not-json", "cut"]
VERBS = {"v2": ["balance", "price", "create", "upload", "list", "download"],
         "v3": ["upload", "stream", "status", "result", "download"]}
SEVERAL = [
    *((version, "submit", kind) for version in VERBS for kind in [*EVERY, *AFTER]),
    *(("v2", "status", kind) for kind in EVERY if kind != "302"),
    *((v, verb, kind) for v in VERBS for verb in VERBS[v] for kind in ("reset-after", "429")),
]
SPOKEN = [(version, "submit", kind) for version in VERBS for kind in ("reset", *AFTER[1:4])]
SPOKEN += [("v2", "voices", "500"), ("v2", "status", "503"), ("v3", "result", "reset")]
GATEWAY = [*(("v2", status) for status in (302, 400, 403, 404, 422, 499)), ("v3", 404)]
CASES = [*((*case, None, "") for case in SEVERAL), *((*case, None, TEXT) for case in SPOKEN)]
CASES += [(version, "submit", "html-after", status, "") for version, status in GATEWAY]
CASES += [(version, "status", "html-after", 403, "") for version in VERBS]


@pytest.mark.parametrize(("version", "verb", "kind", "value", "say"), CASES)
def test_a_fault_of_any_call_pays_once(world, verb, kind, value, say):
    world.box.ignore_reserved_id = bool(value or say) and verb == "submit"
    if (world.version, verb) == ("v3", "status"):
        world.fail("stream", "404", 9)
    world.fail(verb, kind, value="/elsewhere" if kind == "302" else value)
    world.succeed("--out", "output/hello.mp4", say=say, speeches=bool(say))
    assert world.box.faults[-1].times == 0, "the fault was not met"


RULES = [
    *(("v3", {"idempotency": rule}) for rule in ("body", "header", "both", "header-only")),
    ("v2", {"ignore_reserved_id": True}), ("v2", {"repeat_is_conflict": False}), ("v2", {}),
    *((version, {"hidden_seconds": 20.0}) for version in ("v2", "v3")),
    ("v2", {"hidden_seconds": 20.0, "ignore_reserved_id": True}),
]


@pytest.mark.parametrize(("version", "rule"), RULES)
def test_five_lost_answers_and_a_rerun_pay_once_wherever_hedra_reads_the_key(world, rule):
    vars(world.box).update(rule)
    world.fail("submit", "reset-after", 5, skip=rule == {"idempotency": "header-only"})
    world.succeed()
    world.target.unlink()
    world.succeed()
    assert world.version == "v3" or world.verbs.count("submit") == 1
    assert len({sent.headers.get("idempotency-key") for sent in world.submits()}) == 1
    if rule.get("idempotency") == "header-only":
        fields = ["idempotency_key" in json.loads(sent.body) for sent in world.submits()]
        assert fields == [True] + [False] * 6


def spoil_json(world, monkeypatch, verb, change):
    """Let something else be in the answers to a verb than the sandbox says."""
    ask = type(world.box)._answer

    def answer(self, desk, request):
        reply = ask(self, desk, request)
        if desk.find(request)[0] != verb or not isinstance(reply.body, bytes):
            return reply
        body = json.dumps(change(json.loads(reply.body))).encode()
        headers = {**reply.headers, "Content-Length": str(len(body))}
        return reply._replace(body=body, headers=headers)

    monkeypatch.setattr(type(world.box), "_answer", answer)


@pytest.mark.parametrize(("version", "wrong"), [("v2", ".."), ("v2", -1), ("v3", "x"), ("v3", [])])
def test_a_wrong_id_from_a_submit_leads_back_to_the_reserved_one(world, wrong, monkeypatch):
    wrongs = [wrong]

    def change(body):
        return {**body, ("job_id" if "job_id" in body else "id"): wrongs.pop()} if wrongs else body

    spoil_json(world, monkeypatch, "submit", change)
    world.succeed()
    assert world.run().status == 0
    (record,) = world.records()
    assert json.loads(record.read_text())["generation_id"] == world.bought()[0].id


def test_a_failure_that_names_no_generation_ends_a_run_and_not_the_clip(world, monkeypatch):
    down = {"status": "failed", "error": {"code": "UNAVAILABLE", "message": "It is down"}}
    with monkeypatch.context() as patch:
        for verb in ("status", "result"):
            spoil_json(world, patch, verb, lambda body: down)
        world.run().fails("It is down")
    world.succeed()


def test_an_id_in_the_ledger_that_hedra_does_not_know_leads_back_and_never_to_paying(world):
    world.box.render_seconds = 1e6
    world.run("--timeout", "60").fails("not lost", world.bought()[0].id if world.bought() else "")
    (record,) = world.records()
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "generation_id": "oops"}))
    for verb, kind in (("status", "404"), ("list", "503"), ("submit", "503")):
        world.fail(verb, kind, 99)
    world.run().fails()
    after = json.loads(record.read_text())
    assert [after[name] == values[name] for name in ("state", "submitted_at")] == [True, True]
    world.box.render_seconds = 0.0
    assert "--force" not in world.heal().succeed().err


@only_v2
def test_a_generation_that_hedra_hides_is_looked_for_and_not_paid_for_again(world):
    world.box.ignore_reserved_id, world.box.hidden_seconds = True, 20.0
    world.fail("submit", "reset-after")
    world.run("--timeout", "3").fails("not known", "nothing is lost")
    world.run("--timeout", "3").fails("30 s", "longer --timeout")
    world.succeed()
    world.box.hidden_seconds = 1e9
    for _ in range(3):
        assert "--force" not in world.run("--prompt", "nods").fails("not lost").err
        assert len(world.bought()) == 2


@only_v2
def test_a_recording_that_changes_while_it_is_read_or_sent_is_not_paid(world, monkeypatch):
    world.after.append(lambda n: b"WAVE" in world.sent[n - 1].body and write_wav(world.wav, 2.0))
    world.run().fails("hello.wav changed while it was sent; nothing was paid")
    world.after.clear()
    world.succeed()
    assert world.bought()[0].sources[1].read_bytes() == world.wav.read_bytes()
    write_wav(world.wav, 1.2)
    monkeypatch.setattr(hedra, "content_digest", lambda file: write_wav(file, 1.5) and "1")
    with pytest.raises(hedra.InputError, match="changes while it is read") as told:
        world.video()
    assert told.value.unfinished, "watch waits for its end in silence"


@pytest.mark.parametrize(("lost", "kind"), [(6, "refused"), (1, "refused"), (1, "429")])
@only_v3
def test_a_refusal_forgets_no_order_that_may_be_paid(world, lost, kind):
    world.fail("submit", "reset-after", lost)
    world.fail("submit", kind, 99, value=0)
    for _ in range(1 + (lost == 6)):
        assert "nothing was paid" not in world.run("--timeout", "60").fails().err
    world.heal(credits=0, usd=0.0).succeed()


@pytest.mark.parametrize(("version", "verb", "more"), [
    ("v2", "status", {"url": None, "download_url": ""}),
    ("v3", "result", {"outputs": [{"status": "FAILED", "error": {"message": "No face"}}]}),
])
def test_a_result_may_be_with_its_asset_or_have_failed(world, verb, more, monkeypatch):
    spoil_json(world, monkeypatch, verb, lambda body: {**body, **more})
    world.run().fails("No face") if verb == "result" else world.succeed()
    assert len(world.bought()) == 1


@only_v3
def test_pages_without_an_end_end_with_the_time(world, monkeypatch, clock):
    cursors = map(str, range(9_999))
    spoil_json(world, monkeypatch, "voices", lambda page: {**page, "next_cursor": next(cursors)})
    world.after.append(lambda number: clock.tick(1))
    world.fail("voices", "503")  # which is over by then, and no reason
    world.run("--timeout", "50", say=TEXT).fails("time given is over; ")
    cursors = iter("\ud800" * 9)  # which cannot be sent as it is
    world.run(say=TEXT).fails("Hedra answered 400")


@only_v2
def test_a_clock_that_was_ahead_when_a_clip_was_submitted_hides_it_from_no_rerun(world, clock):
    world.box.ignore_reserved_id, then = True, time.time() - 43 * 86400  # and still is, by three
    world.fail("submit", "reset-after")
    world.before.append(lambda n: world.sent[n - 1].is_submit and clock.tick(-40 * 86400))
    world.before.append(lambda n: [setattr(o, "at", then) for o in world.box.generations.values()])
    world.succeed()


def test_a_submit_that_is_never_answered_ends_and_the_rerun_finishes_the_clip(world, clock):
    world.fail("submit", "reset-after", 99)
    world.fail("status", "500", 999)
    assert "--force" not in world.run().fails("again").err
    world.heal(hidden_seconds=1e9)
    clock.tick(3600)  # by another machine's clock it is old, which does not count
    for one in world.box.generations.values():
        one.created = time.monotonic() - 1e9 + 15
    world.succeed()


def test_assets_that_hedra_forgot_are_uploaded_again_but_not_for_ever(world):
    assert world.run().status == 0
    world.box.forget_assets()
    for seed, uploads in ((2, {4, 5}), (3, {5, 6})):
        assert world.run(wav=write_wav(world.folder / f"{seed}.wav", seed=seed)).status == 0
        assert world.verbs.count("upload") in uploads
    assert len(world.bought()) == 3
    world.before.append(lambda n: world.sent[n - 1].is_submit and world.box.forget_assets())
    world.run("--prompt", "nods").fails()
    assert world.verbs.count("upload") <= 10


@only_v3
def test_handles_that_lapse_are_uploaded_again_and_the_same_key_pays_once(world, clock):
    world.fail("submit", "reset-after", 99)
    assert world.run().status == 1
    world.heal()
    clock.tick(3400)  # a handle that is about to lapse is not used either
    before = len(world.verbs)
    assert (world.run().status, world.verbs[before:].count("upload")) == (0, 2)
    world.check_paid()
    bodies = [json.loads(sent.body) for sent in world.submits()]
    assert len({body["idempotency_key"] for body in bodies}) == 1
    assert len({body["input"]["audio"]["url"] for body in bodies}) == 2


@pytest.mark.parametrize("moment", ["seen anew", "refused"])
@only_v2
def test_a_catalogue_that_renames_character_3_bills_nothing_again(world, moment):
    world.fill("anna", "ben", "cleo")
    assert world.batch().status == 0
    row = next(row for row in world.box.catalogue if row["id"] == CHARACTER_3)
    row.update(slug="together/new-character-3", id=UUID if moment == "refused" else CHARACTER_3)
    if moment != "refused":
        shutil.rmtree(".cache")
        shutil.rmtree("output")
    world.fill("dora")
    world.batch().works()
    world.check_all_paid("anna", "ben", "cleo", "dora")
    assert world.bought()[-1].model == "together/new-character-3"


# ---- making a clip: reruns, takes and what is on disk -------------------------------------------

def test_a_rerun_asks_nothing_and_renews_the_videos_time(world, monkeypatch):
    assert world.run().status == 0
    refuse = Mock(side_effect=PermissionError(errno.EPERM, "Not permitted", str(world.target)))
    utime, count = os.utime, len(world.sent)
    utime(world.target, (1, 1))  # it belongs to another user of the group, who says when
    monkeypatch.setattr(os, "utime", lambda *when: refuse() if when[1:] else utime(*when))
    assert world.run() == (0, "output/hello.mp4\n", "")
    assert world.target.stat().st_mtime > 1_000_000
    monkeypatch.setattr(os, "utime", refuse)
    assert world.run()[:2] == (0, "output/hello.mp4\n")
    monkeypatch.setattr(os, "open", refuse)  # nor can one lock a cache that is read-only
    assert world.run(HEDRA_CACHE_DIR=str(Path(".cache").rename("theirs"))).status == 0
    assert len(world.sent) == count
    world.check_paid()


def damage(content, *kinds, gone=False):
    """Something else, or made of what is there, in all records of some kinds; and no video."""

    def spoil(world):
        for kind in kinds:
            files = [Path(".cache/model_id")] if kind == "model_id" else world.records(kind)
            for file in files:
                file.write_bytes(content(file.read_bytes()) if callable(content) else content)
        world.target.unlink() if gone else None

    return spoil


HALF, REST = (lambda raw: raw[: len(raw) // 2]), ("files", "assets", "model_id")
OTHER_ID = functools.partial(re.sub, rb'(generation_id": )"[^"]*', rb'\1"oops')
AFTERWARDS = {
    "the video is gone": damage(b"", gone=True),
    "the video is empty": lambda w: w.target.write_bytes(b""),
    "the video is cut": lambda w: w.target.write_bytes(w.target.read_bytes()[:-1]),
    "ledger and video are gone": lambda w: (shutil.rmtree(".cache"), w.target.unlink()),
    "the ledger is gone": lambda w: shutil.rmtree(".cache"),
    "no ledger, a video there": lambda w: shutil.rmtree(".cache") or w.target.write_bytes(FILM),
    "the record is cut": damage(HALF, "clips"), "the record is empty": damage(b"", "clips"),
    "the record is cut, the video gone": damage(HALF, "clips", gone=True),
    "the record is nested too deep, the video gone": damage(b"[" * 100_000, "clips", gone=True),
    "the record is no text, the video gone": damage(b"\xff\0\xfe", "clips", gone=True),
    "the rest of the cache is nonsense": damage(b"x\n\0 x", *REST),
    "the rest of the cache is wrong": damage(b'{"ref": 5, "digest": []}', *REST),
    "a digest is none": damage(lambda raw: raw.replace(b'"digest": "', b'"digest": "x'), "files"),
    "an id is wrong, the video gone": damage(OTHER_ID, "clips", gone=True),
}


@pytest.mark.parametrize(("version", "what"), [
    *(("v2", what) for what in AFTERWARDS),
    *(("v3", what) for what in AFTERWARDS if re.search("record is cut|ledger and", what)),
])
def test_whatever_happens_to_what_was_made_it_is_not_paid_again(world, what):
    assert world.run().status == 0
    AFTERWARDS[what](world)
    told = world.run().works()
    assert (told.out, "--force" in told.err) == ("output/hello.mp4\n", False)
    world.check_paid()
    assert "record" not in what or "damaged" in told.err
    assert Path(".cache/kept").exists() == bool(re.search("video there|video is cut", what))
    assert len(list(Path(".cache/clips").glob("*damaged*"))) == ("record" in what)


@pytest.mark.parametrize("way", ["edited", "foreign", "half", "text", "input"])
@only_v2
def test_what_is_at_the_target_and_is_no_video_of_ours_is_left_as_it_is(world, way):
    if way == "edited":
        assert world.run().status == 0
    content = {"text": b"my notes", "input": PNG, "half": mp4(7.5)[:-9]}.get(way, mp4(7.5))
    asked, count = len(world.sent), world.costly
    world.target = world.img if way == "input" else world.target
    world.target.parent.mkdir(exist_ok=True)
    world.target.write_bytes(content)
    told = world.run("--out", str(world.target))
    assert (told.status, "--out" in told.last or "is an input" in told.last) == (1, True)
    assert (world.target.read_bytes(), world.costly) == (content, count)
    assert len(world.sent) == asked or way not in ("text", "input"), "without network"
    assert (world.run("--out", "output/other.mp4").status, len(world.bought())) == (0, 1)
    if way == "edited":
        assert (world.run("--force").status, world.target.read_bytes()) == (0, world.videos()[1])
        assert [path.read_bytes() for path in Path(".cache/kept").iterdir()] == [content]


def test_a_forced_take_in_flight_is_taken_up_by_force_until_it_is_an_hour_old(world, clock):
    assert world.run().status == 0
    world.box.render_seconds = 1e6
    assert [world.run("--force", "--timeout", "30").status for _ in range(2)] == [1, 1]
    assert len(world.bought()) == 2
    clock.tick(3700)
    world.box.render_seconds, made = 0.0, []
    world.succeed("--force", paid=3)
    world.before.append(lambda n: made or made.append(n) or world.video(force=True))  # since then
    world.succeed("--force", paid=4)
    world.succeed(paid=4)


@pytest.mark.parametrize("way", ["killed", "full", "came", "replaced"])
def test_what_becomes_of_the_files_while_a_clip_is_made_loses_nothing(world, way):
    """It dies behind the rename; the cache's disk is full; a file comes, or is replaced."""
    full = Mock(side_effect=OSError(28, "No space left"))

    def at_work(number):
        if world.verbs[-1] in ("status", "stream"):
            world.after.clear()
            {
                "killed": lambda: patch.setattr(hedra.Ledger, "keep", full),
                "full": lambda: patch.setattr(hedra.Record, "save", full),
                "came": lambda: world.target.write_bytes(FILM),
                "replaced": lambda: write_wav(world.wav, seed=9),
            }[way]()

    os.utime(world.wav, (1, 1))
    world.after.append(at_work)
    with pytest.MonkeyPatch.context() as patch:
        told = world.run()
    if way == "replaced":
        assert told.works() and world.target.stat().st_mtime < world.wav.stat().st_mtime
    else:
        assert way == "came" or told.fails("No space left")
        kept = [path.read_bytes() for path in Path(".cache/kept").glob("*")]
        assert (kept, "held something else" in told.err) == ([FILM] * (way == "came"), bool(kept))
        assert world.target.read_bytes() == world.videos()[0]
        world.box.expired_outputs, before = way != "full", len(world.sent)
        world.succeed()
        assert way == "full" or "files" not in [sent.port for sent in world.sent[before:]]


@only_v3
def test_what_expired_unfetched_is_made_anew_by_force_and_hides_no_other_take(world, clock):
    world.succeed()
    for say, force, more in (("", ["--force"], []), (TEXT, [], ["--out", "output/a.mp4"])):
        world.heal(render_seconds=1e6)
        world.run(*force, *more, "--timeout", "30", say=say).fails("goes on at Hedra")
        clock.tick(49 * 3600)
        world.heal(render_seconds=0.0).run(*more, say=say).fails("expired", "--force pays")
    assert world.run().works() and world.target.read_bytes() == world.videos()[0]
    world.run(*more, "--force", say=TEXT).works()
    assert (len(world.bought()), len(world.bought("text_to_speech"))) == (3, 2)


@pytest.mark.parametrize("way", ["funds", "upload", "submit", "lost", "again", "failed"])
def test_a_forced_take_that_comes_to_nothing_leaves_the_finished_one_in_force(world, way):
    assert world.run().status == 0
    if way == "funds":
        world.box.balance_error = 500
        world.money(0)
    elif way == "upload":
        world.box.forget_assets()
        world.fail("create" if world.version == "v2" else "upload", "404", 99)
    elif way == "failed":
        world.box.fail_with = {"type": "GONE", "message": "No face"}
    else:
        fault = "502-html" if way + world.version in ("lostv2", "againv2") else "refused"
        world.fail("submit", fault, 9)
    assert world.run("--force").status == 1
    world.heal(balance_error=None, fail_with=None, credits=100, usd=1.0)
    paid = 1 + (way in ("again", "failed"))
    assert world.run(*["--force"] * (way == "again"))[:2] == (0, "output/hello.mp4\n")
    world.target.unlink()
    world.succeed(paid=paid)
    world.succeed("--force", paid=paid + 1)


@pytest.mark.parametrize("way", ["folder moved", "recording renamed", "another folder", "renamed"])
@only_v3
def test_what_is_on_disk_is_used_wherever_it_went_when_hedra_has_deleted_it(world, way):
    world.succeed()
    world.box.expired_outputs = True
    flags = {"another folder": ["--out-dir", "else"], "renamed": ["--out", "output/kept.mp4"]}
    if way == "folder moved":
        Path("moved").mkdir()
        for name in (".cache", "output", "hello.wav", "friend.png"):
            shutil.move(name, f"moved/{name}")
        os.chdir("moved")
        world.wav, world.img = Path("hello.wav"), Path("friend.png")
    elif way == "recording renamed":
        world.wav = world.wav.rename(world.folder / "new.wav")
    elif way == "renamed":
        world.target.rename(world.target.with_name("kept.mp4"))
    count, told = world.costly, world.run(*flags.get(way, [])).works()
    target = Path(told.out.strip())
    assert (target.read_bytes(), world.costly) == (world.videos()[0], count)
    assert [f for f in target.parent.iterdir() if f.name.startswith(".")] == []
    target.unlink()
    shutil.rmtree("output", ignore_errors=True)
    world.run(*flags.get(way, [])).fails("48", "--force")  # no free way is left
    for kind, gone in (("503", False), ("html-after", False), ("404", True)):
        world.box.faults = [Fault(verb, kind, 99) for verb in ("stream", "status", "result")]
        told = world.run(*flags.get(way, [])).fails().last
        assert ("neither at Hedra nor on this disk" in told, "--force" in told) == (gone, gone)
    assert world.costly == count


@only_v3
def test_recordings_that_change_names_find_their_videos_though_hedra_has_none(world):
    one, two = world.fill("anna", "ben")
    assert world.batch().status == 0
    Path("output/anna.mp4").rename("output/clara.mp4")
    world.fail("download", "cut", 99)  # of which nothing is left beside what lies there
    assert world.batch().status == 0
    assert sorted(os.listdir("output")) == ["anna.mp4", "ben.mp4", "clara.mp4"]
    before, world.box.expired_outputs = world.outputs(), True
    for source, target in ((one, "x.wav"), (two, one), ("x.wav", two)):
        Path(source).rename(target)
    assert world.batch("--jobs", "1").status == 0
    assert world.outputs() == {**before, "anna": before["ben"], "ben": before["anna"]}
    assert len(world.bought()) == 2


@only_v2
@pytest.mark.parametrize("length", [219, 235, 251, 252])
def test_a_long_name_is_refused_before_it_is_paid_or_its_video_comes(world, length):
    name = "x" * (length - 2) + "é"
    done = world.run("--out", f"output/{name}.mp4")
    assert (done.status, "name" in done.last, world.costly == 0) == (length > 251,) * 3
    assert world.outputs() == ({} if done.status else {name: world.videos()[0]})


def version_1(world, slug, **values):
    """In place of the ledger, one of the first version that knows the clip as it did."""
    account = hedra.open_account(world.key, world.environ).id
    digest = functools.partial(hashlib.blake2b, digest_size=16)
    files = [digest(file.read_bytes()).hexdigest() for file in (world.img, world.wav)]
    parts = [*files, hedra.DEFAULT_PROMPT, "540p", "9:16", slug, account]
    key = digest(json.dumps(parts).encode()).hexdigest()
    shutil.rmtree(".cache")
    Path(".cache/clips").mkdir(parents=True)
    record = {"clip": "hello.wav", "prompt": hedra.DEFAULT_PROMPT, "price": 3, **values}
    Path(f".cache/clips/{key}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("state", ["done", "deleted", "submitted", "renamed"])
def test_what_the_first_version_paid_for_is_found_in_its_ledger(world, state):
    slugs = {"v2": "x/character-3" if state == "renamed" else SLUG, "v3": "hedra-character-3"}
    world.box.ignore_reserved_id = True  # only the ledger knows of it
    (one,) = world.run().works() and world.bought()
    values = {"state": "submitted" if state == "submitted" else "done", "generation_id": one.id}
    if state == "done":
        (video,) = world.videos()
        starts = [max(0, len(video) - 65536) * n // 15 for n in range(16)]
        parts = [str(len(video)).encode(), *(video[at : at + 65536] for at in starts)]
        digest = hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()
        values["videos"] = {str(world.target): digest}
    else:
        world.target.unlink()
    memory = Path(".cache/model_id")
    remembered = memory.read_bytes() if (state, world.version) == ("renamed", "v2") else b""
    version_1(world, slug := slugs[world.version], **values)
    if remembered:  # the catalogue has another slug by now than the cache remembers
        ((account, entry),) = json.loads(remembered).items()
        price = {"pricing": entry["model"]["pricing"]}
        entry["model"] = {"price": price, "id": CHARACTER_3, "slug": slug}
        memory.write_text(json.dumps({account: entry}))
        row = next(row for row in world.box.catalogue if row["id"] == CHARACTER_3)
        row["slug"] = "together/new-character-3"
    count, asked = len(world.sent), len(world.verbs)
    assert world.run().works().out == "output/hello.mp4\n"
    world.check_paid()
    assert state != "done" or len(world.sent) == count
    assert "price" not in world.verbs[asked:], "neither the catalogue nor an estimate"
    assert "?" not in world.run("--dry-run", "--prompt", "nods").out


@only_v2
def test_the_ledger_is_readable_by_a_person_and_tells_no_key_and_no_address(world):
    before = os.umask(0o002)
    assert world.run().status == 0
    os.umask(before)
    values = json.loads(world.records()[0].read_text())
    assert (values["state"], values["generation_id"]) == ("done", world.bought()[0].id)
    files = [p for p in Path(".cache").rglob("*") if p.is_file()]
    told = "".join(p.read_text(errors="replace") for p in files)
    assert [words in told for words in ("hello.wav", KEY, world.bought()[0].file)] == [1, 0, 0]
    assert {path.stat().st_mode & 0o777 for path in [*files, world.target]} == {0o664}


@pytest.mark.parametrize("what", ["clips", "assets", "cache"])
@only_v2
def test_what_is_wrong_with_the_cache_is_told_with_its_name(world, what):
    world.succeed()
    if what == "cache":
        shutil.rmtree(".cache")
        Path(".cache").write_text("in the way")
    else:
        path = world.records(what)[0]
        path.unlink()
        path.mkdir()
        write_wav(world.wav, seed=8) if what == "assets" else None
    assert ("a bug in" in world.run().fails(".cache").err, len(world.bought())) == (False, 1)
    assert what == "cache" or call("credits", "--spent").works()


# ---- making a clip: transfers -------------------------------------------------------------------

def ranges(world):
    downloads = [s.headers for s in world.sent if s.port == "files"]
    return [(headers.get("range", ""), headers.get("if-range", "")) for headers in downloads]


def statuses(world, verb="download"):
    return [call.status for call in world.box.log if call.verb == verb]


def half_a_video(world):
    world.fail("download", "cut")
    world.fail("download", "503", 99)
    assert world.run().status == 1
    world.heal()
    (part,) = world.target.parent.glob(".*.part")
    assert not world.target.exists()
    return part.stat().st_size


@only_v2
def test_a_download_that_is_cut_goes_on_while_it_gets_further(world, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FILLER", 3_000_000)
    seen = []
    world.before.append(lambda number: seen.append(world.target.exists()))
    world.fail("download", "cut", 7)
    world.succeed()
    assert statuses(world) == [200, *[206] * 7]
    first, second, *_ = ranges(world)
    assert (first, second[0][:8], second[1][:1]) == (("", ""), "bytes=15", '"')
    assert not any(seen[: len(world.sent) - 1]), "under the final name is the whole or nothing"


@only_v3
def test_the_next_process_takes_up_what_came_at_a_fresh_address(world, clock, monkeypatch):
    size, real = half_a_video(world), Response

    def short(blocks, status, headers):  # pieces of less than was asked for
        told = [header for header in headers if status != 206 or header[0] != "Content-Length"]
        some = size // 2 + 1 if status == 206 else None
        return real([b"".join(blocks)[:some]], status, headers=told)

    monkeypatch.setattr(sys.modules[__name__], "Response", short)
    clock.tick(2 * 3600)
    world.succeed()
    assert (ranges(world)[-2][0], statuses(world)[-3:]) == (f"bytes={size}-", [503, 206, 206])


@pytest.mark.parametrize("size", [FILLER, 2 * FILLER, 30])
@only_v3
def test_a_video_that_changed_meanwhile_is_never_spliced(world, size):
    half_a_video(world)
    new = mp4(filler=random.Random(size).randbytes(size))
    path = world.box.root / world.bought()[0].file
    path.write_bytes(new)
    os.utime(path, (1, 1))
    world.succeed()
    assert world.target.read_bytes() == new


def no_room(source, target, replace=os.replace, full=(True,)):
    if full and str(target).endswith(".mp4"):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))
    replace(source, target)


@pytest.mark.parametrize("noted", [True, False])
@only_v3
def test_a_full_disk_keeps_the_part_and_the_rerun_needs_no_byte_more(world, noted, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", no_room)
        put = hedra.Ledger.put if noted else (lambda _, clip, part: no_room(part, clip.target))
        patched.setattr(hedra.Ledger, "put", put)
        world.run().fails("No space left on device", "hello.mp4", "paid")
    assert not world.target.exists()
    world.succeed()
    assert statuses(world) == [200] + [416] * (not noted)


@pytest.mark.parametrize(("film", "words"), [
    (mp4(1.0, sound=False), ["no sound"]), (mp4(4.0), ["4.0 s", "1.0 s"]),
    (mp4(2.0), []), (mp4(0.1), []),
])
@only_v2
def test_a_video_without_sound_or_of_another_length_is_kept_and_told(world, film, words):
    world.box.render = lambda image, audio, out, width, height: out.write_bytes(film)
    told = world.run("--json")
    warning = told.rows[0]["warning"]
    assert (told.status, world.target.read_bytes()) == (0, film)
    assert bool(warning) == bool(words) == ("warning" in told.err)
    assert [word for word in words if word not in warning or word not in told.err] == []


# ---- making a clip: a text is spoken first ------------------------------------------------------

def test_a_text_becomes_a_speech_and_a_video_each_paid_once(world, clock):
    done = world.run(say=TEXT)
    assert re.fullmatch(r"output/good-morning-this-is[\w-]*\.mp4\n", done.out), done.err
    (speech,), (video,) = world.bought("text_to_speech"), world.bought()
    assert (speech.prompt, speech.voice) == (TEXT, "Otis")
    assert video.sources[1].read_bytes() == (world.box.root / speech.file).read_bytes()
    assert list(world.outputs().values()) == world.videos()
    Path("news.txt").write_text(TEXT)  # is the text, and not a prompt that lies beside it
    count, told = len(world.sent), [world.run(say=said).status for said in (TEXT, "@news.txt")]
    assert (told, len(world.sent)) == ([0, 0], count)
    image = str(write_png(world.folder / "other.png", 9))
    next(Path(".cache/speeches").iterdir()).write_bytes(b"rubbish")  # it is fetched again
    more = ("--img", image, "--out", "output/b.mp4")
    world.box.faults = [Fault(verb, "404", 99) for verb in ("status", "result")]
    assert ("--force" in world.run(*more, say=TEXT).fails().last) == (world.version == "v3")
    assert world.heal().run(*more, say=f" {TEXT}\n").status == 0
    assert (len(world.bought("text_to_speech")), len(world.bought())) == (1, 2)
    for hours, paid in ((0, (1, 3)), (49, (1 + (world.version == "v3"), 4))):  # it deletes
        clock.tick(3600 * hours)
        shutil.rmtree(".cache/speeches")
        world.run("--force", say=TEXT).works()
        assert (len(world.bought("text_to_speech")), len(world.bought())) == paid
    world.box.ignore_reserved_id = True  # by then it is looked for in the list
    world.fail("submit", "reset")
    world.run(say="Another text, of the same voice.").works()
    assert world.bought("text_to_speech")[-1].prompt == "Another text, of the same voice."


def test_many_portraits_say_one_text_that_is_spoken_and_priced_once(world):
    for n in range(4):
        write_png(world.folder / f"batch/{n}.png", n)
        (world.folder / f"batch/{n}.say.txt").write_text("x" * 150)
    flags = ("--voice", "Otis", "--jobs", "4")
    *_, (_, _, price, *_) = map(str.split, world.batch(*flags, "--dry-run").out.splitlines())
    assert float(price) == pytest.approx({"v2": 4 * 30 + 5, "v3": 4 * 0.3 + 0.015}[world.version])
    world.batch(*flags).works()
    made = len(world.bought("text_to_speech")), len(world.bought())
    assert (*made, len(set(world.outputs().values()))) == (1, 4, 4)


def test_a_speech_that_no_video_can_have_is_delivered_and_a_voice_made_anew_is_found(world):
    world.box.speak = lambda text, out, voice: write_wav(out, 0.4)
    more = {"environ": world.environ, "poll_interval": 0.1}
    out = hedra.make_speech("Hi.", "Otis", Path("hi.wav"), world.key, **more)
    assert hedra.inspect_film(out, "speech").seconds == 0.4
    out.unlink()
    count = len(world.sent)
    assert hedra.make_speech("Hi.", "Otis", out, world.key, **more).exists()
    assert len(world.sent) == count, "it is in the cache"
    for _ in range(2):
        world.run(say="Hi.").fails("0.40 s")
    assert (len(world.bought("text_to_speech")), world.bought()) == (1, [])
    world.box.speak = stub_speak
    world.box.voices = [{**one, "id": one["id"][:-1] + "e"} for one in world.box.voices]
    world.run(say="Hi.").fails("0.40 s")  # by the voice that it was
    world.fail("submit", "refused")  # what was never spoken is bound to no voice
    world.run(say=TEXT).fails("by moderation")
    world.box.voices = [{**one, "id": one["id"][:-1] + "d"} for one in world.box.voices]
    world.succeed("--out", "output/hello.mp4", say=TEXT, paid=1, speeches=2)


@pytest.mark.parametrize(("voice", "words"), [
    ("", ["--voice", "HEDRA_VOICE", "voices"]), ("Mayo", ["Mayo", "Maya", "voices"]),
    ("maya", []), ("inés", []), ("MAYA RIVERS", []), ("otis", ["voices named 'otis'", UUID]),
])
@only_v2
def test_a_voice_is_known_in_any_case_and_else_the_nearest_are_told(world, voice, words):
    flags = ["--img", str(world.img), "--out", "output/hello.mp4"]
    world.box.voices += [{**one, "id": UUID} for one in world.box.voices if one["name"] == "Otis"]
    done = world.call("run", "--say", TEXT, *flags, HEDRA_VOICE=voice)
    assert done.fails(*words) if words else done.status == 0
    spoken = [one.voice.casefold() for one in world.bought("text_to_speech")]
    assert spoken == ([] if words else [voice.casefold()])


@pytest.mark.parametrize("kind", ["422", "failed", "lost"])
def test_a_text_that_is_refused_is_told_in_a_line_and_makes_no_video(world, kind):
    world.box.ignore_reserved_id = lost = kind == "lost"
    words = ["by moderation", "nothing was paid"] if kind == "422" else ["No news, please"]
    world.box.refuse_texts = ("NEWS",) if kind == "422" else ()
    world.box.fail_speech_with = {"type": "MODERATION_FAILED", "message": words[0]}
    world.fail("submit", "reset-after", lost)
    assert all(world.run(say=TEXT).fails(*words) for _ in range(2))
    assert (len(world.bought("text_to_speech")), world.bought()) == (kind != "422", [])
    assert ("refused" in world.run("--dry-run", say=TEXT).out) == (kind != "422")
    world.box.refuse_texts, world.box.fail_speech_with = (), None  # a new take of the speech, too:
    world.fail("submit", "reset", lost)  # what was not carried out is not the one before
    world.succeed("--force", "--out", "output/hello.mp4", say=TEXT, speeches=1 + (kind != "422"))


@pytest.mark.parametrize(("say", "words"), [
    ("... ", "blank"), ("@blank.txt", "blank"), ("@none.txt", "none.txt"), ("@zero", "zero"),
    ("x" * 10_001, "10,001 characters"), ("@pipe", "pipe is not a file"),
])
@only_v3
def test_a_text_that_cannot_be_spoken_is_refused_before_anything_is_sent(world, say, words):
    Path("blank.txt").write_text("\ufeff \n")
    os.mkfifo("pipe")
    Path("zero").symlink_to("/dev/zero")
    told = world.run("--json", say=say).fails(words)
    assert (told.err.count("\n"), told.rows[0]["name"] == "run", world.costly) == (1, False, 0)


@only_v3
def test_a_folder_may_hold_texts_with_voices_of_their_own_and_a_recording_wins(world):
    folder = world.fill("both")[0].parent
    for name, text in (("news", TEXT), ("both", "Not me."), ("ines", "Hola."), ("NEWS", "LOUD")):
        (folder / f"{name}.say.txt").write_text(text)
    (folder / "NEWS.say.txt").rename(folder / "Loud.SAY.TXT")
    (folder / "ines.voice.txt").write_text("Ine\u0301s\n")  # as macOS writes it
    (folder / "news.txt").write_text("nods")
    world.batch(HEDRA_VOICE="Jonnas").fails("Jonas")
    assert world.verbs.count("voices") == 1, "once for all texts"
    world.batch(HEDRA_VOICE="Jonas").works()
    assert set(world.outputs()) == {"news", "both", "ines", "Loud"}
    spoken = {one.prompt: one.voice for one in world.bought("text_to_speech")}
    assert spoken == {TEXT: "Jonas", "Hola.": "Inés", "LOUD": "Jonas"}
    assert sorted(one.prompt for one in world.bought())[-1] == "nods"
    count = world.costly
    assert world.batch(HEDRA_VOICE="Jonas").status == 0
    run = ("run", "--say", "@batch/ines.say.txt", "--img", "friend.png", "--out", "output/ines.mp4")
    assert world.call(*run, HEDRA_VOICE="Jonas").status == 0  # the clip's own, as in a folder
    assert world.costly == count


def test_a_speech_that_is_longer_than_its_estimate_breaks_neither_cap_nor_balance(world):
    world.box.speak = lambda text, out, voice: write_wav(out, 100.0 if text[0] == "b" else 60.0)
    for wav in world.fill("a", "b", "c"):  # a and c are too dear together, and b alone is
        wav.rename(wav.with_suffix(".say.txt")).write_text(wav.stem * 150)
    flags, cap = ["--voice", "Otis"], {"v2": "250", "v3": "2.5"}[world.version]
    told = world.batch(*flags, "--max-credits", cap).fails("--max-credits", "raise it").err
    assert world.cost(300) in told and sum(one.cost for one in world.box.paid) <= float(cap)
    assert (len(world.bought("text_to_speech")), len(world.bought())) == (3, 1)
    world.money(100)
    (wav,) = world.fill("d", where="more")
    wav.rename(wav.with_suffix(".say.txt")).write_text("d" * 150)
    world.batch("more", *flags).fails(world.cost(180), "its speech is kept")
    assert (len(world.bought("text_to_speech")), len(world.bought())) == (4, 1)
    world.money(200)
    world.batch("more", *flags).works()
    assert (len(world.bought("text_to_speech")), len(world.bought())) == (4, 2)


def test_before_there_is_a_speech_its_price_is_an_estimate(world):
    words = ("run", "--say", "x" * 150, "--voice", "Otis", "--img", "friend.png", "--dry-run")
    row = world.call(*words).out.splitlines()[1].split()
    assert (row[1], row[2]) == ("~10.0", {"v2": "~35", "v3": "~0.315"}[world.version])
    (world.folder / "batch").mkdir()
    (world.folder / "batch/a.say.txt").write_text("x" * 150)
    caps = {"v2": ("41", "42"), "v3": ("0.377", "0.378")}[world.version]
    assert world.costly == 0
    world.batch("--voice", "Otis", "--max-credits", caps[0]).fails()  # a fifth is added
    world.batch("--voice", "Otis", "--max-credits", caps[1]).works()
    rows = world.batch("--voice", "Otis", "--dry-run", "--json").rows
    assert [(r["state"], r["credits"], r["estimate"]) for r in rows] == [("done", 0, False)]


def test_voices_tells_names_labels_and_ids_over_all_pages(world):
    world.box.voices_per_page = 2
    told, rows = world.call("voices").out.splitlines(), world.call("voices", "--json").rows
    for line, row, voice in zip(told, rows, world.box.voices, strict=True):
        assert set(row) == {"id", "name", "labels", "preview_url"}
        assert (row["name"], row["labels"]) == (voice["name"], voice["labels"])
        assert all(word in line for word in (row["id"], row["name"], *row["labels"].values()))
    found = hedra.get_voices(world.key, environ=world.environ)
    assert [voice.id for voice in found] == [row["id"] for row in rows]


# ---- making a clip: promises about money --------------------------------------------------------

@pytest.mark.parametrize(
    ("version", "way"), [*(("v2", way) for way in ("-5", "NaN", '"x"', "[6]", "500", "m4a"))]
    + [("v3", "-5"), ("v3", "NaN"), ("v3", "500")],
)
def test_max_credits_stops_where_a_price_is_unknown_negative_or_no_number(world, way, monkeypatch):
    world.fill("anna", "ben")
    if way == "m4a":
        (world.folder / "batch/ben.wav").unlink()
        (world.folder / "batch/ben.m4a").write_bytes(SOUNDS["m4a"])
    elif way == "500":
        world.fail("price", "500", 99)
    else:
        price, wrong = r'"(cost|credits_per_second|credit_cost)": [\d.]+', rf'"\1": {way}'
        spoil_json(world, monkeypatch, "price",
                   lambda body: json.loads(re.sub(price, wrong, json.dumps(body))))
    told = world.batch("--max-credits", "1000").fails("ben", "--max-credits")
    assert ("a bug in" in told.err, world.costly) == (False, 0)
    assert ("ffprobe" in told.last) == (way == "m4a")
    if (way, world.version) == ("500", "v2"):
        world.heal()
    done = world.batch()
    assert (done.status, "nan" in done.err.lower()) == (0, False), done.err
    (world.folder / "output/anna.mp4").unlink()
    world.fill("dear")
    world.batch("--max-credits", "0").fails("dear", "--max-credits")  # what is paid is fetched
    world.check_all_paid("anna", "ben")


def test_copies_of_a_recording_are_priced_billed_and_paid_once(world):
    anna, bad = world.fill("anna", "bad", seconds=2.0)
    shutil.copy(anna, anna.with_name("ben.wav"))
    price = {"v2": "6", "v3": "0.06"}[world.version]
    bad.write_bytes(b"no sound")
    told = world.batch("--json", "--max-credits", "0.05").fails("nothing was uploaded or paid")
    assert told.err.count("bad.wav") == 1
    assert [row["name"] for row in told.rows if row["status"] == "failed"] == ["anna", "bad", "ben"]
    bad.unlink()
    done = world.batch("--json", "--max-credits", price).works()
    assert sum(row["paid"] for row in done.rows) == len(world.bought()) == 1
    assert [row["billed"] for row in done.rows] == [float(price)] * 2
    if world.version == "v2":  # a cap asks for today's price
        row = next(row for row in world.box.catalogue if row["id"] == CHARACTER_3)
        row["pricing"]["base_cost"] = 99
        world.batch("--max-credits", "50", "--prompt", "nods").fails("--max-credits")


@only_v2
def test_a_lost_ledger_and_a_failure_leave_force_the_new_take_that_was_asked_for(world):
    world.succeed()
    shutil.rmtree(".cache")
    world.fail("list", "503", 99)
    assert "--force" not in world.run().fails("nothing was paid", "later").last
    world.fail("submit", "404", 9)
    world.run("--force").fails("nothing was paid for the video")
    world.heal().succeed()
    world.succeed("--force", paid=2)
    next(path for path in world.records() if "." not in path.stem).write_bytes(b"")
    world.succeed(paid=2)


@only_v2
def test_credits_that_run_out_stop_new_submits_and_let_what_runs_finish(world):
    names = [f"clip{n}" for n in range(7)]
    world.fill(*names)
    world.box.balance_error = 500  # so that nobody can tell before
    world.money(7)
    world.box.render_seconds = 60.0
    told = world.batch("--jobs", "3")
    assert (told.status, len(world.bought()), world.box.count("submit") <= 2 + 3) == (1, 2, True)
    assert len(told.out.splitlines()) == len(world.outputs()) == 2
    assert re.search(r"clips not sent: \d, they need about", told.err)
    for name in set(names) - set(world.outputs()):
        assert len(re.findall(f"(?m)^hedra_avatar: {name}: ", told.err)) == 1
    world.money(100)
    assert world.batch().status == 0
    world.check_all_paid(*names)


def test_quoted_billed_and_paid_agree_with_the_books_after_force_and_refusals(world, clock):
    world.box.bill_factor, world.box.costless_looks, flags = 1.34, 1, ("--voice", "Otis")
    world.fill("anna", "ben")
    (world.folder / "batch/cleo.say.txt").write_text(TEXT)
    unit = {"v2": "credits", "v3": "USD"}[world.version]
    done = world.batch(*flags, "--json").works()
    for row in done.rows:
        made = [one for one in world.box.paid if one.id == row["generation_id"]]
        made += world.bought("text_to_speech") if row["name"] == "cleo" else []
        assert (row["paid"], row["unit"]) == (True, unit)
        assert row["credits"] == pytest.approx(sum(one.cost for one in made))
        assert row["billed"] == pytest.approx(sum(one.bill for one in made))
    quoted, billed = (sum(getattr(one, n) for one in world.box.paid) for n in ("cost", "bill"))
    shown = {"v2": f"quoted {quoted:g}, billed {billed:g} credits",
             "v3": f"quoted ${quoted:.2f}, billed ${billed:.2f}"}[world.version]
    assert shown in done.err
    again = world.batch(*flags, "--json")
    assert ([row["paid"] for row in again.rows], "quoted" in again.err) == ([False] * 3, False)
    world.fail("list", "500", 99)  # the bill cannot be asked for, but by the next batch
    assert world.batch(*flags, "--force").status == 0
    world.heal(fail_with={"type": "GONE", "message": "No"})
    world.fill("dora")
    told = world.batch(*flags).fails("dora", "No (GONE)")
    assert (told.err.count("dora: failed"), told.err.count("(GONE)")) == (1, 1)
    world.box.fail_with = None
    count, told = len(world.sent), call("credits", "--spent").out.splitlines()
    clock.tick(40 * 86400)
    (row,) = call("credits", "--spent", "--json").rows  # neither needs a key or a request
    assert (row["clips"], row["speeches"], row["unit"]) == (7, 1, unit)  # a refusal that cost
    assert row["quoted"] == pytest.approx(sum(one.cost for one in world.box.paid))
    assert row["billed"] == pytest.approx(sum(one.bill for one in world.box.paid))
    assert (row["month"] in told[1], len(told), len(world.sent)) == (True, 2, count)
    assert world.batch(*flags, "--force").status == 0
    months = [row["month"] for row in call("credits", "--spent", "--json").rows]
    assert months == sorted({row["month"], time.strftime("%Y-%m")})


@only_v2
def test_a_bill_undoes_nothing_that_another_process_has_written_meanwhile(world):
    world.fail("list", "500", 99)
    world.run().works()
    world.heal()
    (path,) = world.records()
    marked = json.dumps({**json.loads(path.read_text()), "mark": 1})
    world.before.append(lambda number: path.write_text(marked))
    world.run().works()
    found = json.loads(path.read_text())
    assert (found["billed"], found["mark"]) == (world.bought()[0].cost, 1)


@only_v3
def test_a_bill_that_comes_late_is_asked_for_again(world):
    for late in (99, 0):
        world.box.costless_looks = late
        assert world.run("--json").works().rows[0]["billed"] == (None if late else 0.03)


# ---- making a clip: nobody can hold it ----------------------------------------------------------

@pytest.mark.parametrize(("version", "verb", "after"), [
    ("v2", "status", "1e9"), ("v3", "stream", "1e9"), ("v2", "submit", 20), ("v2", "submit", "1e9"),
    ("v3", "submit", "1e11"), ("v2", "download", "Fri, 02 Jan 2099 03:04:00 GMT"),
    *((version, verb, "soon") for version in ("v2", "v3") for verb in ("submit", "upload")),
])
def test_what_asks_for_a_wait_beyond_the_time_ends_the_clip(world, verb, after):
    world.fail(verb, "429" if after == "soon" else "503", 99, value=after)
    world.fail("status", "503", 99, value=after) if verb == "stream" else None
    said = {"soon": "rate limit", "submit": "Come back later", "download": "503"}
    world.fill("hello")[0].write_bytes(world.wav.read_bytes())  # the same clip
    for command in (world.run, world.batch)[: 1 + (after == "soon")]:
        started, told = time.monotonic(), command("--timeout", "25")
        told.fails(said.get(after, said.get(verb, "Come back later")))
        assert ("a bug in" in told.err, time.monotonic() - started <= 26) == (False, True)
    world.heal().succeed()


@pytest.mark.parametrize(("version", "verb", "frames"), [
    ("v2", "submit", 0), ("v3", "submit", 0), ("v3", "stream", 0), ("v3", "stream", 1),
    ("v2", "download", 0), ("v2", "download", 2),  # 2: it is slow, and gets further
])
def test_what_trickles_counts_as_lost_and_the_clip_is_paid_once(live, verb, frames, monkeypatch):
    """A byte now and then, for as long as one listens, or behind the first frame."""
    live.box.render_seconds = 0.2 * frames
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    ask, armed = type(live.box)._answer, [True]

    def answer(self, desk, request):
        reply = ask(self, desk, request)
        if desk.find(request)[0] != verb or not armed:
            return reply
        armed.clear()
        body = reply.body if isinstance(reply.body, bytes) else b"".join(reply.body)
        at = (body.find(b"\n\n") + 2) * frames
        pieces = [body[:at], *(bytes([byte]) for byte in body[at:] * (not frames) + b":" * 999)]
        slow = [body[n : n + 17_000] for n in range(0, len(body) * (frames > 1), 17_000)]
        blocks = (threading.Event().wait(0.03 + 0.1 * bool(slow)) or p for p in slow or pieces if p)
        headers = {n: v for n, v in reply.headers.items() if n != "Content-Length"}
        return reply._replace(body=blocks, headers=headers)

    monkeypatch.setattr(type(live.box), "_answer", answer)
    live.succeed(*QUICK, "--timeout", "9", HEDRA_HTTP_TIMEOUT="0.25")
    assert not armed and (frames < 2 or live.verbs.count("download") == 1)


# ---- making a clip: the library, as a web application calls it ----------------------------------

def test_make_video_is_the_whole_product_in_one_silent_call_paid_once(world, capsys):
    assert world.video() == world.video() == world.target
    world.check_paid()
    assert capsys.readouterr() == ("", "")
    assert world.run()[:2] == (0, "output/hello.mp4\n"), "the command line's clip is the same"
    world.check_paid()
    assert world.video(force=True) == world.target
    world.check_paid(2)
    assert world.video(name="b", resolution="720p", prompt="nods") and len(world.bought()) == 3


@only_v2
def test_make_video_is_safe_in_threads(live):
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(live.video, name, poll_interval=0.05) for name in "aabb"]
    found = [one.result().read_bytes() for one in found]
    assert (found, live.outputs().keys()) == (live.videos() * 4, {"a", "b"})


@only_v2
def test_what_another_call_waits_for_puts_off_no_calls_timeout(live):
    live.box.render_seconds, live.box.concurrency = 600.0, 1
    with ThreadPoolExecutor() as pool:
        running = pool.submit(live.video, "a", timeout=6, poll_interval=0.05)
        until(lambda: live.bought())
        with pytest.raises(hedra.RateLimited):
            live.video("b", prompt="nods", timeout=1.5)
        assert not running.done()
        live.box.render_seconds = 0.0
        assert running.result().exists()


@only_v2
def test_the_errors_of_the_library_carry_their_evidence(world):
    world.box.fail_with = {"type": "GONE", "message": "No face"}
    with pytest.raises(hedra.GenerationFailed, match="No face") as failed:
        world.video()
    world.box.fail_with, world.box.render_seconds = None, 1e6
    with pytest.raises(hedra.StillRunning) as late:
        world.video(resolution="1080p", timeout=60)
    assert [e.value.generation_id for e in (failed, late)] == [one.id for one in world.box.paid]
    world.money(0)
    with pytest.raises(hedra.OutOfCredits):
        world.video(resolution="720p")
    world.box.keys = set()
    with pytest.raises(hedra.ApiError) as refused:
        hedra.get_balance(world.key, environ=world.environ)
    assert refused.value.status == 401
    world.wav.write_bytes(b"no sound at all" * 9)
    wrong = [{"prompt": " "}, {"settings": {"resolution": "1080p"}}, {"settings": {"x": math.nan}}]
    wrong += [{"settings": ["seed"]}, {"poll_interval": math.nan}, {"timeout": -1}]
    for bad in ({}, *wrong):
        words = "prompt|parameter|JSON|mapping|seconds" if bad else "hello.wav"
        with pytest.raises(hedra.InputError, match=words):
            world.video(**bad)


@only_v2
def test_a_clip_needs_no_second_thread_and_locks_that_are_refused_are_told(world, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "lockf", Mock(side_effect=OSError(37, "No locks available")))
        world.run().fails(".cache/locks cannot be locked: No locks", "HEDRA_CACHE_DIR")
    monkeypatch.setattr(ThreadPoolExecutor, "submit", Mock(side_effect=RuntimeError("no thread")))
    world.video()
    world.check_paid()


# ---- making a clip: a fuzz of wrong values over every answer ------------------------------------

WRONG = [None, True, [], {}, "", "x", -1, 0, 1e308, 10**30, float("nan"), "\x1b[31m", ["x"], [{}]]
WRONG += [{"a": 1}, "²", [1e308], "-5", "\ud800"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    for name, one in enumerate(value[:2]) if isinstance(value, list) else pairs:
        yield from places(one, (*path, name))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy


class Direct:
    """A transport's send without sockets: hundreds of runs in seconds."""

    def __init__(self, world: World) -> None:
        self.world, self.number, self.at = world, 0, list[int]()
        self.chance, self.spoilt = random.Random(0), ""

    def send(
        self, transport: Any, method: str, url: str, headers: Any, body: Any = None, *more: Any
    ) -> urllib3.HTTPResponse:
        parts, data = urlsplit(url), body.encode() if isinstance(body, str) else body
        data = data if isinstance(data, bytes) else b"".join(data or ())
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        named = {name.lower(): value for name, value in headers.items()}
        ask = self.world.box.files if parts.port == 1 else self.world.box.api
        reply = ask(sandbox.Request(method, parts.path, query, named, io.BytesIO(data)))
        content = reply.body if isinstance(reply.body, bytes) else b"".join(reply.body)
        self.number += 1
        if self.number in self.at:
            content = self.spoil(f"{method} {parts.path}", content)
        return urllib3.HTTPResponse(
            io.BytesIO(content), {**reply.headers, "Content-Length": str(len(content))},
            reply.status, preload_content=False,
        )

    def spoil(self, where: str, content: bytes) -> bytes:
        with contextlib.suppress(ValueError):
            value = json.loads(content)
            path, new = self.chance.choice(list(places(value))), self.chance.choice(WRONG)
            self.spoilt += f"{where}: {path} = {new!r}\n"
            return json.dumps(with_value(value, path, new)).encode()
        if b"event:" in content:
            wrong = json.dumps(self.chance.choice(WRONG)).encode()
            self.spoilt += f"{where}: {wrong!r}\n"
            return re.sub(rb'("status": )"\w+"', lambda match: match[1] + wrong, content)
        return content


@pytest.mark.parametrize("say", ["", "Hi"])
def test_a_wrong_value_in_any_answer_is_no_bug_and_not_paid(clock, version, monkeypatch, say):
    with Sandbox(render_seconds=0.0, eager=True, files_url="http://127.0.0.1:1") as box:
        box.render, box.speak = stub_render, stub_speak
        world = World(version, box, "http://127.0.0.1:2" + PREFIXES[version], Path.cwd())
        direct = Direct(world)
        monkeypatch.setattr(hedra.Transport, "send", lambda *w, **more: direct.send(*w, **more))
        for case in range(15 if say else 30):
            for name in (".cache", "output"):
                shutil.rmtree(name, ignore_errors=True)
            write_wav(world.wav, seed=case)
            text = f"{say} {case}" if say else ""
            direct.at = direct.chance.sample(range(1, 20 if say else 11), 3)
            direct.number, direct.spoilt = 0, ""
            before = len(world.bought()), len(world.bought("text_to_speech"))
            first, direct.at = world.run("--timeout", "100", say=text), []
            again = world.run(say=text)
            story = f"{direct.spoilt}\n{first.err}\n{again.err}"
            assert not re.search("a bug in|\x1b", story), story
            assert "--force" not in first.err, story
            assert (again.status, len(world.outputs())) == (0, 1), story
            assert len(world.bought()) == before[0] + 1, story
            assert len(world.bought("text_to_speech")) == before[1] + bool(say), story
            for path in world.records():
                name = json.loads(path.read_text()).get("generation_id")
                assert name in box.generations, story
            if case % 5 == 0:  # nothing that is wrong is remembered
                row = world.run("--dry-run", "--force", "--json", say=text).rows[0]
                price = {"v2": 2 if say else 3, "v3": 0.018 if say else 0.03}[version]
                assert row["credits"] == price, story


# ---- folders ------------------------------------------------------------------------------------

FIRST_HALF = set(globals())  # `make test` runs the two side by side

ROWS = re.compile(r"(?m)^(\S+) +(~?[\d.?]*) +(~?[\d.?]*)  (\S.*)$")


@only_v2
def test_a_batch_pays_each_clip_once_and_the_next_one_says_and_asks_nothing(world):
    names = ("anna", "ben", "cleo", "dora", "emil")
    world.fill(*names)
    done = world.batch().works()
    world.check_all_paid(*names)
    assert world.box.count("upload") == 5 + 1  # what they share is uploaded once
    assert (paths := sorted(done.out.splitlines())) == sorted(f"output/{n}.mp4" for n in names)
    count, again = len(world.sent), world.batch()
    assert (again.status, sorted(again.out.splitlines()), again.err) == (0, paths, "")
    assert (len(world.sent), world.batch("--force").status, len(world.bought())) == (count, 0, 10)
    assert sorted(world.outputs().values()) == sorted(world.videos()[5:])


@only_v3
def test_a_folder_with_one_of_each_kind_is_made_by_batch_each_paid_once(world):
    folder = world.fill("wave")[0].parent
    for number, (kind, content) in enumerate(SOUNDS.items()):
        (folder / f"{kind}.{kind.upper() if number % 2 else kind}").write_bytes(content)
    for name in ("x.amr", "y.wma", "z.WMA", "notes.doc", "w.opus"):
        (folder / name).write_bytes(b"?")
    for _ in range(2):
        done = world.batch()
        assert (done.status, set(world.outputs())) == (0, {"wave", *SOUNDS}), done.err
        assert len(world.bought()) == 1 + len(SOUNDS)
        (line,) = [line for line in done.err.splitlines() if "ignored" in line]
        assert "4 files ignored: .amr, .opus, .wma" in line


@only_v3
def test_with_ffprobe_every_recording_has_a_price_and_a_limit(live, ffprobe):
    answers = "*long*) echo 700;; *cut*) echo 4,1 5.3, 5.1;; *half*) exit 1;; *hard*) echo 5;; "
    ffprobe(f"case $* in {answers}*) echo 9.7,0.1 10 20; esac")  # a sound whose film goes on
    folder = live.fill("wave")[0].parent
    (folder / "memo.m4a").write_bytes(SOUNDS["m4a"])
    page = b"OggS\0\4" + bytes(20) + b"\2\4\4" + bytes(7)  # which lacks a byte
    for name, content in (("hard", page), ("hall", page + b"\0")):
        (folder / f"{name}.ogg").write_bytes(SOUNDS["ogg"] + content)
    for name in ("cut", "half", "long"):
        (folder / f"{name}.mp3").write_bytes(SOUNDS["mp3"])
    table = {row[0]: row[1:3] for row in ROWS.findall(live.batch("--dry-run").out)}
    assert table["memo"] == ("10.0", "0.3")
    told = live.batch(*QUICK).fails("hedra_avatar: long: ", "700.00 s")
    assert len(re.findall(r"(?:cut\.mp3|half\.mp3|hard\.ogg) is cut short", told.err)) == 3
    assert set(live.outputs()) == {"hall", "memo", "wave"}


@only_v3
def test_a_failed_clip_stops_no_other_and_is_listed_last_once_with_its_reason(world, monkeypatch):
    names = ("anna", "ben", "cleo", "dora", "emil", "finn", "gina")
    anna, *_, gina = world.fill(*names)
    whole, folder = anna.read_bytes(), anna.parent
    anna.write_bytes(whole[:-100])
    (folder / "dora.txt").write_bytes(b"\xff\xfe\xfa")
    os.mkfifo(folder / "finn.txt")
    (folder / "emil.mp3").write_bytes(SOUNDS["mp3"])  # neither is guessed at
    world.fail("submit", "refused", skip=1)
    with gina.open("ab"):
        os.utime(gina, (time.time(), time.time()))
        told = world.batch("--jobs", "1").fails()
        assert (told.out, "Traceback" in told.err) == ("output/ben.mp4\n", False)
        world.run(wav=gina).fails("gina.wav is still being written")
        began, once = time.time(), ["watch", str(folder), "--once", "--img", "friend.png"]
        assert "gina.wav is" in world.call(*once).fails().err and 10 <= time.time() - began < 15
        last = told.err.splitlines()[-6:]
        for reason in ("anna.*cut short", "cleo.*modera", "dora.*UTF-8", "emil.mp3, emil.wav",
                       "finn.*not a file", "gina.wav is still being written"):
            assert len([line for line in last if re.search(reason, line)]) == 1
        anna.write_bytes(whole)
        os.utime(anna, (began := time.time(), began))  # dropped just now
        for name in ("dora.txt", "finn.txt", "emil.mp3"):
            (folder / name).unlink()
        hedra.grants_leases.cache_clear()  # some shares refuse every lease:
        monkeypatch.setattr(fcntl, "fcntl", Mock(side_effect=BlockingIOError))
        assert world.call(*once).works() and os.stat("output/anna.mp4").st_mtime >= began + 1
    world.check_all_paid(*names)


def test_a_dry_run_of_a_folder_tells_each_clips_state_and_the_totals(world):
    world.fill("done")
    assert world.batch().status == 0
    world.fill("refused")
    world.box.fail_with = {"type": "GONE", "message": "No face"}
    world.batch().fails()
    world.fill("flies")
    world.box.fail_with, world.box.render_seconds = None, 900.0
    world.batch("--timeout", "30").fails()
    world.fill("new1", "new2", "wrong")[-1].write_bytes(b"no sound" * 9)
    before, told = world.costly, world.batch("--dry-run").out.partition("\n")[2]
    rows = {row[0]: row[1:] for row in ROWS.findall(told)}
    price, total = {"v2": ("3", "6"), "v3": ("0.03", "0.06")}[world.version]
    assert [*rows] == ["done", "flies", "new1", "new2", "refused", "wrong", "total"]
    assert rows["new1"] == rows["new2"] == ("1.0", price, "new")
    assert (rows["done"][1:], rows["flies"][1:]) == (("0", "done"), ("0", "in flight"))
    assert (rows["refused"][2][:7], rows["wrong"][2][:5]) == ("refused", "bad: ")
    assert (rows["total"][:2], "2 new" in rows["total"][2]) == (("2.0", total), True)
    assert {"v2": "9991 credits", "v3": "$99.91"}[world.version] in rows["total"][2]
    objects = {row["name"]: row for row in world.batch("--dry-run", "--json").rows}
    assert (objects["new1"]["credits"], bool(objects["wrong"]["error"])) == (float(price), True)
    assert (world.costly, set(world.outputs())) == (before, {"done"})
    (world.folder / "batch/new1.wav").unlink()
    (world.folder / "batch/new1.m4a").write_bytes(SOUNDS["m4a"])
    rows = {row[0]: row[1:] for row in ROWS.findall(world.batch("--dry-run").out)}
    assert rows["new1"][:2] == rows["total"][:2] == ("?", "?")


@only_v2
def test_the_limits_of_the_account_slow_a_batch_down_and_fail_nothing(world):
    names = [f"{n:02}" for n in range(8)]
    world.fill(*names)
    world.box.render_seconds, world.box.concurrency, world.box.rate = 60.0, 1, (5, 5.0)
    assert world.batch("--jobs", "8", "--timeout", "30").status == 1
    before, told = len(world.bought()), world.batch("--jobs", "8", "--json").works()
    assert sum(row["paid"] for row in told.rows) == len(names) - before
    assert "looking" not in told.err, "who waits for a place is in no doubt"
    world.check_all_paid(*names)
    assert sum(c.verb == "upload" and c.status != 429 for c in world.box.log) == 9
    assert any(call.status == 429 for call in world.box.log), "the limits were not met"


@only_v3
def test_a_batch_takes_every_name(world):
    names = ['a "b" \'c\'', "ä ö 你好 🎬", "line\nbreak", "-dash", "$(touch x);`y`", "%s{0}"]
    names += ["~x", "#1 x", "a.b", os.fsdecode(b"caf\xe9"), "\x1b[31m"]
    world.fill(*(name for name in names if name != names[-2]))
    shutil.copy(world.wav, os.fsencode(world.folder / "batch") + b"/caf\xe9.wav")
    world.fill(".hidden")
    told = world.batch("--json").works()
    assert {row["name"]: row["path"] for row in told.rows} == {n: f"output/{n}.mp4" for n in names}
    assert all(line.isprintable() for line in told.err.splitlines())
    world.check_all_paid(*names)
    assert not Path("x").exists()
    assert len(world.batch("--dry-run").out.splitlines()) == len(names) + 2


@only_v2
def test_in_a_batch_what_lies_beside_a_recording_wins_over_the_flags_and_in_run_a_flag_wins(world):
    anna, ben, *others = world.fill("anna", "Ben", "c", "d", "e")
    own = write_png(anna.with_suffix(".PNG"), 99)
    ben.rename(ben.with_suffix(".WAV"))
    anna.with_suffix(".txt").write_text("\ufeff nods\n")
    ben.with_suffix(".txt").write_text(" \n")
    for other, suffix in zip(others, (".jpg", ".jpeg", ".webp"), strict=True):
        other.with_suffix(suffix).write_bytes(WEBP)
    assert world.batch("--prompt", "waves", FRIEND_IMG="/none.png").status == 0
    found = {(one.prompt, one.sources[0].read_bytes()) for one in world.bought()}
    assert found == {("nods", own.read_bytes()), ("waves", world.img.read_bytes()), ("waves", WEBP)}
    assert world.run("--prompt", "waves", wav=anna).status == 0
    one = world.bought()[-1]
    assert (one.prompt, one.sources[0].read_bytes()) == ("waves", world.img.read_bytes())
    world.call("batch", "--out-dir", "else").fails("Ben.png", "--img", "FRIEND_IMG")
    world.call("batch", "nowhere").fails("nowhere: No such file")


# ---- watch --------------------------------------------------------------------------------------

class Watch:
    """A watcher of `incoming`, on a real Observer; what happens meanwhile is a function that is
    run beside it. Time goes on only as fast as that function waits for something."""

    def __init__(self, world: World, clock: Any) -> None:
        self.world, self.clock, self.folder = world, clock, world.folder / "incoming"
        self.told, self.out, self.flags = io.StringIO(), io.StringIO(), ["--img", "friend.png"]
        self.folder.mkdir()

    def __call__(self, story: Callable[[], object], *flags: str, **environ: str) -> None:
        over = threading.Event()

        def tell() -> None:
            try:
                self.until(lambda: self.lines("watching ", "is not there"))
                story()
            finally:
                while not over.wait(0.1):
                    os.kill(os.getpid(), signal.SIGTERM)
                    self.nudge()

        handler = signal.signal(signal.SIGTERM, lambda *_: None)  # before and after it is heard
        err, out = contextlib.redirect_stderr(self.told), contextlib.redirect_stdout(self.out)
        with err, out, ThreadPoolExecutor(1) as pool:
            teller, words = pool.submit(tell), ["watch", *self.flags, *flags]
            status = hedra.main(words, environ={**self.world.environ, **environ})
            over.set()
        signal.signal(signal.SIGTERM, handler)
        assert (teller.result(), status) == (None, 0)

    def nudge(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / ".nudge").touch()

    def lines(self, *words: str) -> list[str]:
        return [n for n in self.told.getvalue().splitlines() if any(word in n for word in words)]

    def until(self, met: Callable[[], object], step: float = 0.5) -> None:
        for _ in range(1500):
            if met():
                return
            self.clock.tick(step)
            self.nudge()
            threading.Event().wait(0.005)
        raise AssertionError(f"it did not come to pass:\n{self.told.getvalue()}")

    def wait_for(self, *names: str) -> None:
        self.until(lambda: all(self.lines(f" {name}: done") for name in names))

    def let_pass(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, step=min(5.0, seconds / 20))

    def drop(self, *names: str, seed: int = 0) -> list[Path]:
        made = [write_wav(self.world.folder / "made" / n, seed=zlib.crc32(n.encode()) + seed)
                for n in names]
        return [file.rename(self.folder / file.name) for file in made]


@pytest.fixture
def watch(world: World, clock: Any, monkeypatch: pytest.MonkeyPatch) -> Watch:
    real = threading.Event.wait

    def wait(self: Any, timeout: float | None = None) -> bool:
        if timeout is None or isinstance(threading.current_thread(), threading.Timer):
            return real(self, timeout)
        return real(self, min(timeout, 0.004))

    monkeypatch.setattr(threading.Event, "wait", wait)
    return Watch(world, clock)


@only_v2
def test_a_dropped_recording_or_text_becomes_a_video_and_its_path_is_told(watch):
    def story():
        write_png(watch.folder / "anna.png", 77)
        (watch.folder / "anna.txt").write_text("nods")
        (watch.folder / "news.say.txt").write_text(TEXT)
        (watch.folder / "memo.M4A").write_bytes(SOUNDS["m4a"])
        watch.drop(*odd, "x.amr", "anna.wav", "Ben.WAV")
        watch.wait_for("anna", "Ben", "news", "memo")
        watch.let_pass(70)

    odd = (".hidden.wav", "a.wav.part", "a.wav~", "4913")
    watch(story, "--prompt", "waves", "--voice", "Otis")
    assert (watch.lines(*odd), len(watch.lines("1 file ignored: .amr"))) == ([], 1)
    assert set(watch.world.outputs()) == {"anna", "Ben", "news", "memo"}
    assert sorted(one.prompt for one in watch.world.bought()) == ["nods", *["waves"] * 3]
    assert len(watch.world.bought("text_to_speech")) == 1
    paths = sorted(watch.out.getvalue().splitlines())
    assert paths == [f"output/{name}.mp4" for name in ("Ben", "anna", "memo", "news")]
    lines = watch.lines("anna: ")
    assert 2 <= len(lines) == len(set(lines)) <= 15


@only_v2
def test_a_slow_writer_that_pauses_is_waited_for_and_said_once(watch):
    whole = write_wav(watch.world.folder / "made.wav").read_bytes()
    portrait = write_png(watch.world.folder / "made.png", 5).read_bytes()

    def story():
        with (watch.folder / "slow.wav").open("wb", buffering=0) as stream:
            stream.write(whole[:30])  # not even a header
            watch.until(lambda: watch.lines("slow.wav"))
            stream.write(whole[30:4030])
            watch.drop("other.wav")
            watch.wait_for("other")
            assert len(watch.world.bought()) == 1
            stream.write(whole[4030:])  # which might be all
            with (watch.folder / "nods.txt").open("wb", buffering=0) as prompt:
                prompt.write(b"nods ")
                watch.drop("nods.wav")
                watch.let_pass(15)
                assert len(watch.world.bought()) == 1
                prompt.write(b"twice")
        watch.wait_for("slow", "nods")
        with (watch.folder / "live.mp3").open("wb", buffering=0) as live:
            live.write(SOUNDS["mp3"][:2000])  # which might be all
            (watch.folder / "copied.png").write_bytes(portrait[:50])
            watch.drop("copied.wav")
            watch.let_pass(30)
            assert len(watch.world.bought()) == 3
            (watch.folder / "copied.png").write_bytes(portrait)
            watch.wait_for("copied")
            live.write(SOUNDS["mp3"][2000:])
        watch.wait_for("live")

    watch(story)
    assert len(watch.lines("slow.wav is")) == 1
    watch.world.check_all_paid("other", "slow", "nods", "copied", "live")
    assert whole in [one.sources[1].read_bytes() for one in watch.world.bought()]
    assert watch.world.bought()[3].sources[0].read_bytes() == portrait
    assert "nods twice" in [one.prompt for one in watch.world.bought()]


@only_v2
def test_one_clip_that_always_fails_is_no_outage_for_the_others(watch):
    world, tries, armed = watch.world, [], [True]

    def refuse(number):
        if armed and b"bad.wav" in world.sent[number - 1].body:
            tries.append(time.monotonic())
            raise sandbox.Drop

    def story():
        world.before.append(refuse)
        watch.drop("bad.wav")
        watch.until(lambda: watch.lines("bad: failed"))
        watch.drop("good.wav", "more.wav")
        watch.wait_for("good", "more")
        watch.let_pass(800)
        armed.clear()
        watch.until(lambda: watch.lines("bad: done"), step=5.0)

    watch(story)
    assert len(watch.lines("bad: failed")) == 1, "a reason is said when it is new"
    world.check_all_paid("bad", "good", "more")
    rounds = [b - a for a, b in zip(tries, tries[1:], strict=False) if b - a > 12]
    assert max(rounds[:2]) < 120 < max(rounds) < 480


@only_v3
def test_events_touches_and_restarts_cost_nothing_and_new_content_is_a_new_clip(watch):
    def story():
        (anna,) = watch.drop("anna.wav")
        watch.wait_for("anna")
        os.utime(anna)
        watch.let_pass(3)
        anna.write_bytes(anna.read_bytes())
        watch.let_pass(70)

    def second():
        watch.let_pass(70)
        assert len(watch.world.sent) == count
        assert len(watch.lines("anna: ")) == said, "a finished clip is no news"
        watch.drop("anna.wav", seed=1)
        watch.until(lambda: len(watch.lines("anna: done")) == 2)

    watch(story)
    assert len(watch.world.bought()) == 1
    count, said = len(watch.world.sent), len(watch.lines("anna: "))
    watch(second)
    assert watch.world.outputs() == {"anna": watch.world.videos()[1]}


@only_v2
def test_what_fails_for_good_is_told_once_and_does_not_end_the_watcher(watch):
    watch.world.box.fail_with = {"type": "GONE", "message": "No face"}
    (watch.folder / "bad.wav").write_bytes(b"no sound at all" * 9)
    (watch.folder / "link.wav").symlink_to("nowhere")
    face = watch.world.img.rename("elsewhere.png")

    def story():
        watch.drop("anna.wav")
        watch.until(lambda: len(watch.lines("friend.png does not exist")) == 3)
        face.rename(watch.world.img)  # each is looked at again when that comes
        watch.until(lambda: all(map(watch.lines, ("No face", "bad.wav", "link.wav"))))
        watch.world.box.fail_with = None
        watch.drop("ben.wav")
        watch.wait_for("ben")
        watch.let_pass(200)
        assert len(watch.lines("No face")) == len(watch.lines("bad.wav")) == 1
        watch.drop("bad.wav")  # it is looked at again when it changes
        watch.wait_for("bad")

    watch(story, "--json")
    assert (set(watch.world.outputs()), len(watch.world.bought())) == ({"bad", "ben"}, 3)
    rows = [json.loads(line) for line in watch.out.getvalue().splitlines()]
    found = {(row["name"], row["status"], row["paid"]) for row in rows}
    assert found >= {("bad", "failed", False), ("ben", "done", True)}


@pytest.mark.parametrize(
    "way", ["302", "disk", "400", "401", "folder", "transient", "500", "lock", "dir", "dear"]
)
@only_v3
def test_a_clip_is_tried_again_until_it_is_there(watch, way, monkeypatch):
    world, full, busy = watch.world, [True], {"type": "UNAVAILABLE"}
    lock, place = contextlib.ExitStack(), Path("output/anna.mp4").absolute()
    ledger = hedra.Ledger(Path(".cache"), time.sleep, print)

    def lock_out(number):
        world.box.keys = set() if full and world.bought() else world.box.keys

    {
        "folder": lambda: Path("output").symlink_to("gone/away"),
        "disk": lambda: monkeypatch.setattr(os, "replace", functools.partial(no_room, full=full)),
        "401": lambda: world.after.append(lock_out),
        "transient": lambda: setattr(world.box, "fail_with", {**busy, "message": "Busy"}),
        "302": lambda: world.fail("download", "302", 10**6, value="http://cdn.example/x"),
        "500": lambda: world.fail("upload", "500", 10**6),
        "400": lambda: world.fail("upload", "html-after", 10**6, value=400),  # a gateway's
        "lock": lambda: lock.enter_context(ledger.own(f"target {place}", int)),
        "dir": lambda: place.mkdir(parents=True),
        "dear": lambda: world.money(2),  # of 3, and enough for a shorter one: no outage
    }[way]()

    def story():
        watch.drop("anna.wav")
        watch.until(lambda: watch.lines("anna: failed", "waiting until", "HEDRA_API_KEY"))
        watch.let_pass(100 if way != "transient" else 20)
        assert len(watch.lines("anna: failed")) <= 1, "a reason is said once"
        assert way != "dear" or not watch.lines("waiting until")
        full.clear()
        lock.close()
        world.heal(keys=None, fail_with=None, credits=100, usd=1.0)
        Path("output").unlink() if way == "folder" else None
        place.rmdir() if way == "dir" else None
        watch.wait_for("anna")

    watch(story)
    world.check_all_paid("anna") if way != "transient" else None


@pytest.mark.parametrize(("version", "kind"), [("v3", "unreachable"), ("v2", "funds")])
def test_an_outage_is_outlived_with_a_line_each_way(watch, kind):
    world, names = watch.world, ("anna", "ben", "cleo", "dora")
    early, world.box.render_seconds = ["early"] * (kind == "funds"), 200.0
    world.money(4)  # for one, which goes on: the rest is not enough for the shortest clip
    if kind != "funds":
        world.environ["HEDRA_BASE_URL"] = f"http://127.0.0.1:{closed_port()}/x"

    def story():
        watch.drop(*(f"{name}.wav" for name in early))
        watch.until(lambda: len(world.bought()) == len(early))
        watch.drop("anna.wav", "ben.wav")
        watch.until(lambda: watch.lines("waiting until"))
        watch.drop("cleo.wav", "dora.wav")
        watch.let_pass(300)
        assert len(watch.lines("waiting until")) == 1
        assert len(watch.lines(*names)) <= 4, watch.told.getvalue()
        assert (set(world.outputs()), watch.lines("going on")) == (set(early), [])
        if kind == "funds":
            world.box.keys = set()
            watch.until(lambda: watch.lines("HEDRA_API_KEY"))  # another reason is told
            world.heal(keys=None, credits=100)
            watch.until(lambda: len(watch.lines(": done")) == 5, step=5.0)
            assert len(watch.lines("going on")) == 1
            world.check_all_paid(*names, *early)

    watch(story)


# ---- command line -------------------------------------------------------------------------------

def test_a_log_has_two_to_fifteen_plain_lines_a_clip(world):
    world.box.render_seconds = 60.0
    told = world.run()
    assert told[:2] == (0, "output/hello.mp4\n")
    assert world.run("-q", "--prompt", "nods") == (0, "output/hello.mp4\n", "")
    lines = told.err.splitlines()
    assert 2 <= len(lines) == len(set(lines)) <= 15
    assert all("hello" in line and line.isprintable() for line in lines) and "\r" not in told.err
    assert any(re.search(r"submitted.*about (3 credits|\$0\.03)", line) for line in lines)


@pytest.mark.parametrize("words", [
    "", "run", "nonsense", "run --wav", "run --wav x --say y", "run --wav x --resolution 8k",
    "run --wav x --aspect-ratio 2:1", "run --wav x --timeout 0", "run --wav x --timeout nan",
    "run --wav x --poll-interval -1", "run --wav x --jobs 2", "run --wav x --max-credits 1",
    "run --wav x --out y --out-dir z", "credits --min much", "credits --min 1 --spent",
    "batch --jobs 0", "batch --max-credits -1", "batch --max-credits nan", "voices --img x",
    "watch --force", "watch --dry-run", "run --wav x --set idempotency_key=x",
    *(f"run --wav x --set {pair}" for pair in ("seed", "seed=", "=5", "prompt=x", "audio_id=x")),
])
def test_wrong_usage_is_exit_status_2(words):
    told, (row,) = call(*words.split()), call(*words.split(), "--json").rows
    assert (told.status, told.out, "usage" in told.err) == (2, "", True)
    assert (row["status"], row["error"] in told.err) == ("failed", True)


BAD = {  # what makes a clip that cannot work, and the words of the error
    "no wav": (lambda w: w.wav.unlink(), "hello.wav does not exist"),
    "cut wav": (lambda w: w.wav.write_bytes(w.wav.read_bytes()[:3000]), "hello.wav is cut short"),
    "folder": (lambda w: (w.wav.unlink(), w.wav.mkdir()), "hello.wav is not a file"),
    "pipe": (lambda w: (w.wav.unlink(), os.mkfifo(w.wav)), "hello.wav is not a file"),
    "too short": (lambda w: write_wav(w.wav, 0.4), "0.40 s"),
    "no image": (lambda w: w.img.unlink(), "friend.png does not exist"),
    "out is a folder": (lambda w: ["--out", os.mkdir("there") or "there"], "there is a folder"),
    "out is a folder to be": (lambda w: ["--out", "there/"], "there/ is a folder"),
    "out below a file": (lambda w: ["--out", "hello.wav/x.mp4"], "hello.wav/x.mp4 cannot be"),
    "prompt file": (lambda w: w.wav.with_suffix(".txt").write_bytes(b"\xff\xfe"), "hello.txt"),
    "prompt unreadable": (lambda w: Path("hello.txt").symlink_to("/proc/self/mem"), "hello.txt"),
    "prompt endless": (lambda w: Path("hello.txt").write_text("x" * 70_000), "too long"),
    "prompt": (lambda w: ["--prompt", os.fsdecode(b"caf\xe9")], "not UTF-8"),
    ".env": (lambda w: Path(".env").write_bytes(b"# caf\xe9\n"), ".env"),
}


@pytest.mark.parametrize("what", BAD)
@only_v2
def test_what_cannot_work_is_refused_by_name_and_as_json_before_anything_is_sent(world, what):
    spoil, words = BAD[what]
    flags = spoil(world)
    for more in (["--json"], ["--json", "--dry-run"]):
        told = world.run(*(flags if isinstance(flags, list) else []), *more).fails(words)
        (row,) = told.rows
        assert (row["status"], row["path"], row["paid"]) == ("failed", None, False)
        assert (len(told.err.splitlines()), words in row["error"], world.costly) == (1, True, 0)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("HEDRA_API_KEY", "", "HEDRA_API_KEY"), ("HEDRA_BASE_URL", "http://x.test", "not encrypted"),
    ("HEDRA_BASE_URL", "https://x.test/v3", "v3"), ("HEDRA_HTTP_TIMEOUT", "soon", "TIMEOUT"),
])
@only_v2
def test_a_wrong_setting_is_refused_by_name_and_as_json(world, name, value, words):
    world.fill("anna")
    run = "run --wav hello.wav --img friend.png"
    for command in (run, "batch --img friend.png", "credits", "voices"):
        told = world.call(*command.split(), "--json", **{name: value}).fails(words)
        assert (told.rows[-1]["status"], len(told.err.splitlines())) == ("failed", 1)
    assert world.sent == []


@only_v2
def test_flag_over_environment_over_dotenv_over_default(world):
    key = world.environ.pop("HEDRA_API_KEY")
    env = f"\ufeffHEDRA_API_KEY={key}\nHEDRA_MODEL_ID=nobody/nothing\nHEDRA_WORKSPACE_ID=w\n"
    Path(".env").write_text(env)
    model = "together/hedra-avatar"
    # An empty variable hides nothing, and blanks around a value are stripped.
    assert world.run(HEDRA_MODEL_ID=f" {model}\n", HEDRA_API_KEY=" ").status == 0
    assert world.run("--model", SLUG, HEDRA_MODEL_ID=model).status == 0
    assert [one.model for one in world.bought()] == [model, SLUG]
    assert json.loads(world.submits()[0].body)["workspace_id"] == "w"
    Path(".env").write_text("HEDRA_API_KEY='sk$HOME${X}#1'\n")
    world.box.keys = {"sk$HOME${X}#1"}
    assert world.run("--resolution", "720p").status == 0


def test_the_key_is_told_to_nobody_else(world, files_server):
    world.box.echo_key = True
    for verb in ("price", "upload", "submit", "status", "stream", "result", "download"):
        world.fail(verb, "502-html")
    world.fail("balance", "302", value=files_server.url_for("/away"))
    first = world.run("-vv").works()
    world.fail("submit", "404", 9)
    told = f"{first} {world.run('-vv', '--force')}"
    told += "".join(p.read_text(errors="replace") for p in Path().rglob("*") if p.is_file())
    told += "".join(str(sent) for sent in world.sent if sent.port == "files")
    assert not [key for key in {world.key, world.key.partition(":")[2] or world.key} if key in told]
    assert ("/away" in [sent.path for sent in world.sent], world.box.leaks) == (False, [])


@pytest.mark.parametrize(("flags", "status"), [(["--min", "50"], 0), (["--min", "1e5"], 1)])
def test_credits_tells_the_balance_and_whether_it_is_enough(world, flags, status):
    told = world.call("credits", *flags)
    shown = {"v2": "10000 credits\n", "v3": "$100.00\n"}[world.version]
    assert (told.status, told.out, world.verbs) == (status, shown, ["balance"])
    assert not status or told.fails({"v2": "100000 credits", "v3": "$100000.00"}[world.version])
    row = world.call("credits", *flags, "--json", "--workspace", sandbox.WORKSPACE).rows[0]
    wanted = {"v2": (10_000, "credits"), "v3": (100.0, "USD")}[world.version]
    assert (row["remaining"], row["unit"], row.get("status") == "failed") == (*wanted, bool(status))
    world.fail("balance", "429", 99, value="soon")
    before, _ = time.monotonic(), world.call("credits", *flags).fails("rate limit")
    assert time.monotonic() - before <= 61, "it has no --timeout, and cron waits for it"


# ---- command line: on a terminal ----------------------------------------------------------------

class Screen:
    """A terminal: what is to be seen on it, by the few control codes that are used."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0
        self.seen, self.wrapped, self.odd = list[str](), 0, set[str]()

    def feed(self, text: str) -> None:
        """What a program writes; what comes behind an erased line is a line that moves."""
        moving = False
        for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|.", text):
            line = self.lines[self.row]
            if piece in "\r\n":
                self.row, self.column = self.row + (piece == "\n"), 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif piece[-1] == "A" and piece[0] == "\x1b":
                self.row = max(0, self.row - int(piece[2:-1] or 1))
            elif piece in ("\x1b[J", "\x1b[K"):
                self.lines[self.row] = line[: self.column]
                self.lines = self.lines[: self.row + 1] if piece[-1] == "J" else self.lines
            elif piece == "\x1b[2K":
                self.seen.append("\n".join(self.lines))  # however much came in one piece
                self.lines[self.row] = ""
            elif piece[0] == "\x1b":
                self.odd.add(piece)
            else:
                after = line[self.column + len(piece) :]
                self.lines[self.row] = line.ljust(self.column)[: self.column] + piece + after
                self.column += len(piece)
                self.wrapped += moving and self.column >= self.columns
            moving = piece == "\x1b[2K"
        self.seen.append("\n".join(self.lines))


def on_terminal(
    world: World, columns: int, *words: str, stop: Callable[[Any], object] = str, **environ: str
) -> tuple[int, Screen]:
    """Run a command in a process on a terminal of that width; Ctrl-C when `stop` says so."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = start(world, *words, out=theirs, err=theirs, TERM="xterm", **environ)
    os.close(theirs)
    screen, stopped, decoder = Screen(columns), False, codecs.getincrementaldecoder("utf-8")()
    with contextlib.suppress(OSError):  # EIO: it has ended
        while data := os.read(ours, 65536):
            screen.feed(decoder.decode(data).replace("\r\n", "\n"))
            if stop(screen) is True and not stopped:
                stopped = True
                process.send_signal(signal.SIGINT)
    os.close(ours)
    return process.wait(20), screen


@pytest.mark.parametrize(("version", "columns"), [("v2", 100), ("v3", 60)])
def test_a_batch_on_a_terminal_has_a_line_for_each_clip_above_one_for_all(live, columns):
    names = ["anna", "ben", "a name that is so long that it would not fit on any line at all " * 2]
    live.fill(*names, "wrong")[-1].write_bytes(b"no sound" * 9)
    live.box.render_seconds = 0.6
    words = ("batch", "--img", "friend.png", "--jobs", "4", "--poll-interval", "0.1")
    status, screen = on_terminal(live, columns, *words, NO_COLOR="1" if columns == 60 else "")
    assert (status, screen.wrapped, screen.odd) == (1, 0, set())
    busy = [view for view in screen.seen if re.search(r"(?m)^\d/4 clips", view)]
    assert any(re.search(r"(?m)^anna: (queued|processing).*\d:\d\d", view) for view in busy)
    assert any("ben: " in view and "anna: " in view and "a name" in view for view in busy)
    assert re.search(r"(?m)^\d/4 clips.*(credits|\$).*1 failed.*\d:\d\d", "\n".join(busy))
    text = screen.lines
    assert not any(re.search(r"clips|\d%|queued", line) for line in text), text
    assert all(len(line) < columns for line in text if ": done" in line), text
    assert sum("wrong.wav" in line for line in text) == 1, "a failure is printed once"
    assert sum(line.startswith("output/") for line in text) == 3
    live.check_all_paid(*names)


@only_v2
def test_run_on_a_terminal_says_what_it_does_since_when_and_what_it_costs(live):
    live.box.render_seconds = 0.6
    words = ("run", "--wav", "hello.wav", "--img", "friend.png", "--poll-interval", "0.1")
    status, screen = on_terminal(live, 80, *words)
    assert (status, screen.wrapped, screen.odd) == (0, 0, set())
    wanted = ("uploading", "submitted", "processing", "about 3 credits", "0:00")
    assert [word for word in wanted if word not in "\n".join(screen.seen)] == []
    assert [line for line in screen.lines if line.strip()][-1] == "output/hello.mp4"
    assert not any("%" in line for line in screen.lines)
    _, shared = on_terminal(live, 80, *words, "--force", MAKEFLAGS="k -j4 --jobserver-auth=3,4")
    assert ("submitted" in shared.seen[-1], "%" in str(shared.seen)) == (True, False)


# ---- command line: processes, kills, races and signals ------------------------------------------

def start(
    world: World, *words: str, kind: Any = subprocess.Popen, out: Any = subprocess.PIPE,
    err: Any = subprocess.PIPE, **environ: str,
) -> subprocess.Popen[str]:
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGHUP) if is_main else ()
    heard = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        return kind(
            [sys.executable, "-m", "hedra_avatar", *words], cwd=world.folder, text=True,
            env={**world.environ, "PYTHONPATH": str(HERE), "PATH": "/nowhere", **environ},
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


def finish(process: subprocess.Popen[str], number: int = 0) -> tuple[int, str, str]:
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert not number or time.monotonic() - started < 2
    return process.returncode, out, err


MOMENTS = [*(("v2", at, "") for at in (5, 7, 8, 9)), *(("v3", at, "") for at in (4, 5, 6, 7))]
MOMENTS += [(version, at, TEXT) for version in ("v2", "v3") for at in (1, 2)]  # of its submits


@pytest.mark.parametrize(("version", "moment", "say"), MOMENTS)
def test_a_process_that_is_killed_has_paid_once_and_the_rerun_finishes(live, moment, say):
    live.box.ignore_reserved_id = moment == 8  # then its recording tells the generation
    started, process = threading.Event(), list[Any]()

    def kill(number):
        assert started.wait(30)
        if process[0].returncode is None and moment == (len(live.submits()) if say else number):
            process[0].kill()
            process[0].wait()

    live.before.append(kill)
    words = ("--say", say, "--voice", "Otis") if say else ("--wav", "hello.wav")
    flags = ("--img", "friend.png", "--out", "output/hello.mp4", *QUICK)
    process.append(start(live, "run", *words, *flags))
    started.set()
    assert finish(process[0])[:2] == (-signal.SIGKILL, "")
    live.before.clear()
    with frozen():
        live.succeed("--out", "output/hello.mp4", say=say, speeches=bool(say))
    (row,) = call("credits", "--spent", "--json").rows
    cost = sum(one.cost for one in live.box.paid)
    assert (say or row["billed"], row["quoted"]) == (say or cost, pytest.approx(cost))


def test_processes_on_one_clip_one_text_and_one_portrait_pay_once(live):
    live.box.render_seconds = 0.3
    wavs = [live.wav, live.wav, live.wav, *live.fill("other", where=".")]
    clips = [*(["--wav", str(wav)] for wav in wavs), *[["--say", "Hi", "--voice", "Otis"]] * 2]
    started = [start(live, "run", *clip, "--img", "friend.png", *QUICK) for clip in clips]
    told = [f"output/{name}.mp4\n" for name in ["hello"] * 3 + ["other", "hi", "hi"]]
    assert [finish(process)[:2] for process in started] == [(0, path) for path in told]
    live.check_all_paid("hello", "other", "hi")
    assert [live.verbs.count(verb) for verb in ("submit", "upload", "download")] == [4, 4, 4]


@only_v2
def test_force_beside_a_process_that_makes_the_clip_takes_it_up(live):
    live.box.render_seconds = 1.0
    live.fill("anna")
    first = start(live, "batch", "--img", "friend.png", *QUICK)
    until(lambda: live.bought())
    assert live.batch("--force", "--max-credits", "0", *QUICK).status == 0
    assert (finish(first)[0], len(live.bought())) == (0, 1)


@only_v3
def test_of_two_processes_with_one_output_the_later_one_is_told(live):
    live.box.render_seconds = 1e6
    flags = ("--img", "friend.png", "--out", "output/x.mp4", *QUICK)
    first = start(live, "run", "--wav", "hello.wav", *flags)
    until(lambda: live.bought())
    live.fill("other", where=".")
    status, _, err = finish(start(live, "run", "--wav", "other.wav", *flags))
    assert (status, "output/x.mp4" in err, len(live.bought())) == (1, True, 1), err
    live.box.render_seconds = 0.0
    assert (finish(first)[0], live.outputs()) == (0, {"x": live.videos()[0]})


@pytest.mark.parametrize(("version", "number", "command"), [
    ("v2", signal.SIGINT, "run --wav batch/hello.wav"), ("v2", signal.SIGHUP, "batch"),
    ("v3", signal.SIGTERM, "run --wav batch/hello.wav"),
])
def test_a_signal_ends_a_command_quickly_and_loses_nothing(live, number, command):
    live.box.render_seconds, waiting = 600.0, threading.Event()
    live.fill("hello")
    live.after.append(lambda n: (
        live.box.paid and live.sent[n - 1].path.endswith(("/status", "/stream")) and waiting.set()
    ))
    process = start(live, *command.split(), "--img", "friend.png", "--json")
    assert waiting.wait(60)
    status, out, err = finish(process, number)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["name"], row["path"], row["paid"]) for row in rows] == [("hello", None, True)]
    assert ("Traceback" in err, "again" in err.splitlines()[-1]) == (False, True)
    assert (status, err.count("hedra_avatar: ")) == (128 + number, 1)
    live.box.render_seconds = 0.0
    with frozen():
        assert live.batch().status == 0
    live.check_paid()


@only_v2
def test_ctrl_c_waits_for_no_upload_and_no_name_and_force_costs_nothing_by_it(live):
    uploading, over = threading.Event(), threading.Event()

    def hold(number):
        if live.sent[number - 1].path.endswith("/upload"):
            uploading.set()
            over.wait(30)
            raise sandbox.Drop

    live.before.append(hold)
    process = start(live, "run", "--wav", "hello.wav", "--img", "friend.png", "--force")
    assert uploading.wait(60)
    status, _, err = finish(process, signal.SIGINT)
    over.set()
    assert (status, "without --force" in err) == (130, True)
    code = "import socket, time\nsocket.getaddrinfo = lambda *w, **m: print(flush=True) or time.%s"
    Path("sitecustomize.py").write_text(code % "sleep(60)")
    paths = {"HEDRA_BASE_URL": "https://api.x.test", "PYTHONPATH": f"{live.folder}:{HERE}"}
    process = start(live, "credits", **paths)
    assert (process.stdout.readline(), finish(process, signal.SIGINT)[0]) == ("\n", 130)


@only_v3
def test_a_watcher_that_is_stopped_ends_in_time_and_the_next_one_takes_up(live):
    live.box.render_seconds = 600.0
    live.fill("anna", "ben", "cleo", where="incoming")
    with tempfile.TemporaryDirectory() as short, socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM
    ) as systemd:
        systemd.bind(f"{short}/n")
        systemd.settimeout(60)
        words = ("watch", "--img", "friend.png", *QUICK, "--jobs", "2", "--polling")
        process, told = start(live, *words, NOTIFY_SOCKET=f"{short}/n"), []
        while "WATCHDOG=1" not in told:
            told.append(systemd.recv(100).decode().strip())
        until(lambda: len(live.box.paid) == 2)
        ended = finish(process, signal.SIGTERM)
        assert (*ended[:2], "Traceback" in ended[2]) == (0, "", False)
        while "STOPPING=1" not in told:
            told.append(systemd.recv(100).decode().strip())
        assert told.count("READY=1") == 1
    live.box.render_seconds = 0.0
    with frozen():
        assert live.batch("incoming").status == 0
    live.check_all_paid("anna", "ben", "cleo")


@only_v2
def test_a_cron_job_that_finds_nothing_new_writes_nothing_to_its_log(live):
    live.fill("anna")
    assert live.batch(*QUICK).status == 0
    (line,) = re.findall(r"(?m)^\*/15 .*hedra_avatar (.*)$", README)
    Path(".env").write_text("FRIEND_IMG=friend.png\n")
    command = f"exec {sys.executable} -m hedra_avatar {line}"
    environ = {**live.environ, "PYTHONPATH": str(HERE), "PATH": TOOLS}
    assert subprocess.run(command, shell=True, env=environ, cwd=live.folder).returncode == 0
    assert Path("batch.log").read_text() == ""


# ---- Makefile -----------------------------------------------------------------------------------

MAKE = shutil.which("make", path=TOOLS) or ""
needs_make = pytest.mark.skipif(not MAKE, reason="make is not installed")


@pytest.fixture
def shop(live: World) -> World:
    for name in ("Makefile", "hedra_avatar.py", ".env.example"):
        shutil.copy2(HERE / name, live.folder)
    for name in ("batch", "incoming", "output", "bin"):
        (live.folder / name).mkdir()
    programs = {"python": f'exec "{sys.executable}" "$@"', "python3": 'exec python "$@"'}
    programs["runner"] = 'echo "$*" >>started.log; exec "$@"'
    for name, script in programs.items():
        file = live.folder / "bin" / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    live.environ |= {"PATH": f"{live.folder / 'bin'}:{TOOLS}"}
    return live


def make(world: World, *words: str, quick: bool = True, **environ: str) -> tuple[int, str, int]:
    log = world.folder / "started.log"
    log.unlink(missing_ok=True)
    options = ["RUNNER=runner", *(["ARGS=--poll-interval 0.05"] if quick else [])]
    done = subprocess.run(
        [MAKE, *options, *words], cwd=world.folder, env={**world.environ, **environ}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )
    assert world.key not in done.stdout
    return done.returncode, done.stdout, len(log.read_text().splitlines()) if log.exists() else 0


@needs_make
@only_v2
def test_make_builds_every_kind_of_clip_once_and_then_only_what_changed(shop):
    anna, ben = shop.fill("anna", "ben")
    own, prompt = write_png(anna.with_suffix(".PNG"), 99), ben.with_suffix(".TXT")
    prompt.write_text("waves")
    (anna.parent / "memo.m4a").write_bytes(SOUNDS["m4a"])
    (anna.parent / "news.say.txt").write_text(TEXT)
    (anna.parent / "ben.say.txt").write_text("A recording wins.")
    status, out, asked = make(shop, "-j4", "IMG=friend.png", "VOICE=Otis")
    assert (status, asked, "ignored" in out) == (0, 4, False), out
    assert set(shop.outputs()) == {"anna", "ben", "memo", "news"}
    assert (len(shop.bought()), len(shop.bought("text_to_speech"))) == (4, 1)
    images = [(one.prompt, one.sources[0].read_bytes()) for one in shop.bought()]
    assert ("waves", shop.img.read_bytes()) in images
    assert own.read_bytes() in [image for _, image in images]
    again = ("IMG=friend.png", "VOICE=Otis")
    assert make(shop, "-j4", *again)[::2] == (0, 0)
    os.utime(anna)  # touched, and the same
    assert (make(shop, *again)[::2], make(shop, *again)[::2]) == ((0, 1), (0, 0))
    assert len(shop.bought()) == 4
    write_png(own, 98)
    prompt.write_text("nods")
    assert (make(shop, *again)[::2], len(shop.bought())) == ((0, 2), 6)


@needs_make
@only_v2
def test_make_notices_the_settings_and_asking_again_is_free_where_nothing_changed(shop):
    shop.fill("anna")
    write_png(shop.folder / "other.png", 5)
    assert make(shop, "IMG=friend.png")[::2] == (0, 1)
    hd = "ARGS=--poll-interval 0.05 --resolution 720p"
    for paid, words in ((2, ["IMG=friend.png", hd]), (3, ["IMG=other.png", hd])):
        assert make(shop, "-n", *words, quick=False)[1].count("runner") == 1
        assert make(shop, *words, quick=False)[::2] == (0, 1)
        assert (make(shop, *words, quick=False)[::2], len(shop.bought())) == ((0, 0), paid)
    assert make(shop, hd, quick=False, FRIEND_IMG="other.png", HEDRA_VOICE="Otis")[::2] == (0, 1)
    shop.fill("anna", where="else")
    assert make(shop, hd, "IN=else", "IMG=other.png", quick=False)[::2] == (0, 1)
    assert len(shop.bought()) == 3


@needs_make
@only_v3
def test_make_never_deletes_a_video_and_leaves_nothing_half_done(shop):
    anna, *_ = shop.fill("anna", "ben")
    anna.write_bytes(anna.read_bytes()[:-100])
    status, out, _ = make(shop, "-k", "IMG=friend.png")
    assert (status, "anna.wav" in out, "Traceback" in out) == (2, True, False)
    shop.check_all_paid("ben")
    os.utime(shop.folder / "batch/ben.wav")
    words = [MAKE, "-k", "IMG=friend.png", "ARGS=--poll-interval 0.05"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, env=shop.environ, stdout=full, stderr=full).returncode
    shop.check_all_paid("ben")
    shop.fill("anna")
    shop.box.render_seconds = 600.0
    process = subprocess.Popen(
        words, env=shop.environ, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: len(shop.box.paid) == 2)
    os.killpg(process.pid, signal.SIGINT)
    assert (process.wait(20) != 0, set(shop.outputs())) == (True, {"ben"})
    shop.box.render_seconds = 0.0
    assert make(shop, "IMG=friend.png")[0] == 0
    shop.check_all_paid("anna", "ben")


@needs_make
@only_v2
def test_names_that_make_cannot_take_are_told_and_left_to_batch(shop):
    names = ["with blank", "semi;colon", "#1 b", "per%cent", "co:lon", "st*r", "d$(x)", "it's"]
    names.append("line\ntouch evil")
    shop.fill("anna", *names)
    (shop.folder / "batch/UP.MP3").write_bytes(SOUNDS["mp3"])
    (shop.folder / "batch/x.wma").write_bytes(b"?")
    status, out, asked = make(shop, "-i", "-j4", "IMG=friend.png")
    assert status == 0, out
    (told,) = [line for line in out.splitlines() if "batch" in line and "with blank" in line]
    built = set(shop.outputs())
    assert "anna" in built
    assert asked == len(built) == len(shop.bought())
    for name in {*names, "UP"} - built:
        assert name.replace("\n", " ") in told
    assert "x.wma" in out
    assert not Path("evil").exists()
    assert shop.batch(*QUICK).status == 0
    shop.check_all_paid("anna", "UP", *names)
    (shop.folder / "batch/anna.mp3").write_bytes(SOUNDS["mp3"])
    status, out, _ = make(shop, "IMG=friend.png")
    assert (status, "two recordings of one name" in out) == (2, True)
    for folder in ("OUT=a b", "OUT=a%b", "IN=a:b", "IN="):
        status, out, _ = make(shop, folder)
        assert (status, "batch" in out) == (2, True)


@needs_make
@only_v3
def test_the_targets_for_one_clip_and_the_account_call_the_program_and_help_lists_all(shop):
    for words in (["WAV=hello.wav"], ["SAY=It costs $$5, she's told", "VOICE=Otis"]):
        status, out, _ = make(shop, "run", *words, "IMG=friend.png", "OUT=else")
        assert (status, "else/" in out) == (0, True), out
    assert shop.bought("text_to_speech")[0].prompt.startswith("It costs $")
    assert "Otis" in make(shop, "voices", quick=False)[1]
    assert make(shop, "credits", "ARGS=--min 1000")[0] == 2
    kept = (".cache/clips/x.json", "batch/x.wav", "output/x.mp4", "else/hello.mp4")
    for name in (*kept[:3], ".mypy_cache/x"):
        (shop.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shop.folder / name).touch()
    assert make(shop, "clean")[0] == 0
    assert [Path(name).exists() for name in (*kept, ".mypy_cache")] == [True] * 4 + [False]
    told = set(re.findall(r"(?m)^  make (\S+) +\S", make(shop, "help")[1]))
    assert told == set(re.findall(r"(?m)^([a-z-]+):.*## ", (HERE / "Makefile").read_text()))
    wanted = "all help install run watch credits voices demo sandbox bench lint test clean"
    assert told >= set(wanted.split())


# ---- README -------------------------------------------------------------------------------------

def readme_commands() -> Iterator[tuple[str, list[str]]]:
    """The commands of the README's indented blocks, in order, and what is shown behind each."""
    for block in re.findall(r"(?m)(?:^    .*\n)+", re.sub(r"(?s)```.*?```", "", README)):
        lines = [line[4:] for line in block.splitlines()]
        if not any(line.startswith("$ ") for line in lines):
            yield from ((line, []) for line in lines)
            continue
        for line in lines:
            if line.startswith("$ "):
                shown = list[str]()
                yield line[2:], shown
            else:
                shown.append(line)


@needs_make
@only_v2
def test_the_readmes_sequences_of_commands_run_as_they_stand_in_order(shop):
    """Those that make an environment of its own are run by CI."""
    made_before = re.compile(r"make (demo|test|install)|\. \.venv/bin/activate")
    digits, ran, paid = re.compile(r"[\d.]+"), [], dict[str, int]()
    environ = {**shop.environ, "PYTHONPATH": str(HERE)}
    (code,) = re.findall(r"(?s)```python\n(.*?)```", README)
    for command, shown in [*readme_commands(), (f"python -c {shlex.quote(code)}", [])]:
        if made_before.match(command):
            continue
        done = subprocess.run(
            ["sh", "-c", command.replace("python hedra", "python -u hedra")], cwd=shop.folder,
            env=environ, capture_output=True, text=True, timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        results = [line for line in shown if not re.match(r"\d{4}-\d\d-\d\d ", line)]
        if results:
            found = [digits.sub("9", line).split() for line in done.stdout.splitlines()]
            assert found == [digits.sub("9", line).split() for line in results], command
        ran.append(command)
        paid[command] = len(shop.box.paid)
    assert len(ran) > 15
    (plain, dry, hd) = [number for line, number in paid.items() if line.startswith("make -")]
    before = next(number for line, number in paid.items() if "--max-credits" in line)
    assert (plain, dry, hd) == (before, before, before + 2), "as the README says"
    assert "failed:" not in done.stdout


def test_every_flag_variable_status_and_target_that_is_documented_exists_and_the_reverse():
    parser = hedra.build_parser()
    (commands,) = (a for a in parser._actions if a.choices)
    flags = {f for one in commands.choices.values() for f in one._option_string_actions}
    code, example = ((HERE / name).read_text() for name in ("hedra_avatar.py", ".env.example"))
    for text in (README, example, str(hedra.__doc__)):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags | {"--now", "--user"}
    name, texts = r"\b(?:HEDRA_[A-Z_]+|FRIEND_IMG)\b", (code, README, example)
    assert len({frozenset(re.findall(name, text)) for text in texts}) == 1
    shown = "".join(one.format_help() for one in commands.choices.values())
    assert [flag for flag in flags if flag not in shown] == []
    assert shown.count("example") >= len(commands.choices)
    told = set(re.findall(r"(?m)^\| (\d+) \|", README))
    assert told == {"0", "1", "2", "129", "130", "143"} <= set(re.findall(r"\d+", parser.epilog))
    targets = set(re.findall(r"(?m)^([a-z][a-z-]*):", (HERE / "Makefile").read_text()))
    lines = re.findall(r"(?m)(?:^ {4}|`)make((?: +[^\s`#]+)*)", README)
    words = {w for line in lines for w in line.split() if re.fullmatch("[a-z][a-z-]+", w)}
    assert {"demo", "test", "install", "run"} <= words <= targets | {"there", "at", "morning"}
    for line in re.findall(r"hedra_avatar\.py +([a-z][^\n`|>#]*)", README):
        parser.parse_args(shlex.split(line))


# ---- the sandbox's videos -----------------------------------------------------------------------

FFMPEG = shutil.which("ffmpeg", path=TOOLS)
needs_ffmpeg = pytest.mark.skipif(not FFMPEG, reason="ffmpeg is not installed")
RENDER = """
import os, sys, sandbox.render as r
os.nice(5)
from pathlib import Path
for resolution in r.RESOLUTIONS:
    for ratio in r.ASPECT_RATIOS:
        out = Path(sys.argv[1], f"{resolution} {ratio}.mp4")
        size = r.frame_size(resolution, ratio)
        r.render_mp4(r.FRIEND, r.HELLO, out, *size, seconds=0.04)
        print(out.name, *size, flush=True)
import sandbox.__main__
words = ["demo", "--api", "both", "--say", "Hello there", "--out-dir", sys.argv[1]]
raise SystemExit(sandbox.__main__.main(words))
"""


@pytest.fixture(scope="session", autouse=True)
def renders(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Any]:
    wanted = any("resolution_and_ratio" in item.name for item in request.session.items)
    if not (wanted and FFMPEG):
        yield None
        return
    environ = {"PATH": TOOLS, "PYTHONPATH": str(HERE)}
    words = [sys.executable, "-c", RENDER, str(tmp_path_factory.mktemp("renders"))]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@needs_ffmpeg
def test_every_resolution_and_ratio_is_rendered_and_the_demo_speaks_over_either_api(renders):
    *sizes, demo, demo_v3 = renders.communicate(timeout=300)[0].splitlines()
    assert (renders.returncode, len(sizes)) == (0, 21)
    folder = Path(renders.args[-1])
    for line in sizes:
        resolution, ratio, width, height = line.replace(".mp4", "").split()
        across, down = map(int, ratio.split(":"))
        assert min(int(width), int(height)) == int(resolution[:-1])
        assert int(width) / int(height) == pytest.approx(across / down, rel=0.01)
        assert hedra.inspect_film(folder / f"{resolution} {ratio}.mp4").has_sound
    assert [demo, demo_v3] == [str(folder / name) for name in ("demo.mp4", "demo-v3.mp4")]
    assert all(hedra.inspect_film(Path(name)).has_sound for name in (demo, demo_v3))


for case in [c for n, c in globals().items() if n[:5] == "test_" and n not in FIRST_HALF]:
    pytest.mark.second_half(case)
