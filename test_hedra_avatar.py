"""Tests of hedra_avatar: real HTTP over loopback, and time that moves by freezegun.

Single calls meet answers scripted with pytest-httpserver; whole flows meet `sandbox.Sandbox`,
mounted on the same server, whose books say what was paid. Everything that can be told of both APIs
is told once, over the fixture `version`. The sections are those of the module, in its order.

Fixtures: `clock` freezes time, and every sleep of this process moves it; `server` is a scripted
Hedra, `environ` the variables that lead to it; `world` is the sandbox with a portrait and a
recording, under the clock; `live` is the same in real time, for processes and time-outs.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import errno
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import plistlib
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import freezegun
import freezegun.config
import pytest
import tqdm  # noqa: F401  (imported under a frozen clock it would keep it)
import urllib3
import watchdog.observers
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

import hedra_avatar as hedra
import sandbox
from sandbox import Fault, Sandbox

pytestmark = pytest.mark.filterwarnings("error")

HERE = Path(__file__).resolve().parent
KEYS = {"v2": "sk_hedra_0123456789abcdef", "v3": "kid0123456789:shh-abcdef0123456789"}
PREFIXES = {"v2": sandbox.PREFIX_V2, "v3": sandbox.PREFIX_V3}
UUID = "6f1c2b3a-4d5e-4f60-8a7b-9c0d1e2f3a4b"
CHARACTER_3 = "d1dd37a3-e39a-4854-a298-6510289f9cf2"
VIDEO_BYTES = 50_000

# What is frozen must be frozen in threads as well, but not for pytest's own stopwatch.
freezegun.configure(  # type: ignore[attr-defined]
    default_ignore_list=[
        *(set(freezegun.config.DEFAULT_IGNORE_LIST) - {"threading", "queue"}),
        "_pytest.timing",
    ]
)
logging.getLogger("werkzeug").setLevel(logging.ERROR)


# -----------------------------------------------------------------------------
# fixtures
# -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty working directory, no variables of the developer's, no connections left over."""
    for name in list(os.environ):
        if name.startswith("HEDRA_") or name in ("FRIEND_IMG", "NO_COLOR", "NOTIFY_SOCKET"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
    hedra.connected.cache_clear()
    pools: list[Any] = []
    opened = urllib3.PoolManager.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        opened(self, *args, **options)
        pools.append(self)

    monkeypatch.setattr(urllib3.PoolManager, "__init__", init)
    yield
    for one in pools:
        one.clear()


@pytest.fixture(autouse=True)
def no_thread_leaks() -> Iterator[None]:
    """Every thread that a test started has ended, but for those of the http servers."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if "process_request_thread" not in thread.name and "serve_forever" not in thread.name:
            thread.join(2.0)
            assert not thread.is_alive(), f"{thread} is left over"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Frozen time that moves by being slept: any length of waiting costs nothing."""
    with freezegun.freeze_time("2026-01-02 03:04:05") as frozen:
        frozen.start = time.monotonic()
        frozen.naps = []

        def sleep(seconds: float) -> None:
            frozen.naps.append(seconds)
            frozen.tick(seconds)

        monkeypatch.setattr(time, "sleep", sleep)
        yield frozen


@pytest.fixture(scope="session")
def make_httpserver() -> Iterator[HTTPServer]:
    """In place of the plugin's own: one thread a request."""
    with HTTPServer("127.0.0.1", 0, threaded=True) as server:
        yield server


@pytest.fixture(scope="session")
def files_server() -> Iterator[HTTPServer]:
    """Another host, for videos."""
    with HTTPServer("127.0.0.1", 0, threaded=True) as server:
        yield server


@pytest.fixture
def server(httpserver: HTTPServer) -> Iterator[HTTPServer]:
    """A scripted Hedra; that nothing was asked but what the script says is checked at the end."""
    yield httpserver
    httpserver.check()
    assert not httpserver.ordered_handlers, "not all of the script was asked for"


@pytest.fixture
def environ(server: HTTPServer) -> dict[str, str]:
    """The variables that lead to the scripted server."""
    return {"HEDRA_BASE_URL": server.url_for("")}


@pytest.fixture(params=["v2", "v3"])
def version(request: pytest.FixtureRequest) -> str:
    """Which of the two APIs."""
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


def is_submit(sent: Sent) -> bool:
    """Whether a request is the one that costs money."""
    return sent.method == "POST" and sent.path.endswith(
        ("/generations", "/models/hedra-character-3")
    )


class World:
    """Hedra in this process, and somebody who wants a clip of it."""

    def __init__(self, version: str, box: Sandbox, base_url: str, folder: Path) -> None:
        self.version, self.box, self.folder = version, box, folder
        self.key = KEYS[version]
        self.environ = {"HEDRA_API_KEY": self.key, "HEDRA_BASE_URL": base_url}
        self.sent: list[Sent] = []
        self.before: list[Callable[[int], object]] = []  # called with a request's number from 1
        self.after: list[Callable[[int], object]] = []  # the same, when it has been carried out
        self.wav = write_wav(folder / "hello.wav")
        self.img = write_png(folder / "friend.png")
        self.target = folder / "output" / "hello.mp4"

    def words(self, *flags: str, wav: Path | None = None) -> list[str]:
        """The command line for the clip."""
        return ["run", "--wav", str(wav or self.wav), "--img", str(self.img), *flags]

    def run(self, *flags: str, wav: Path | None = None, **environ: str) -> int:
        """Run the command line in this process; its exit status."""
        return hedra.main(self.words(*flags, wav=wav), environ={**self.environ, **environ})

    def fail(self, verb: str, kind: str, times: int = 1, **more: Any) -> None:
        """Let something go wrong."""
        self.box.faults.append(Fault(verb, kind, times, **more))

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        self.box.faults.clear()

    @property
    def verbs(self) -> list[str]:
        """What was asked of Hedra so far."""
        return [call.verb for call in self.box.log]

    def videos(self) -> list[bytes]:
        """The videos that were paid for, oldest first."""
        made = [one.asset_id for one in self.box.paid if one.rendered]
        return [(self.box.root / f"{name}.mp4").read_bytes() for name in made]

    def check_paid(self, times: int = 1) -> None:
        """So many payments, the last video there byte for byte, nothing else beside it, and the
        key not told to the host of the videos."""
        assert len(self.box.paid) == times
        assert self.target.read_bytes() == self.videos()[-1]
        assert os.listdir(self.target.parent) == [self.target.name]
        assert self.box.leaks == []

    def records(self, kind: str = "clips") -> list[Path]:
        """The ledger's records."""
        return sorted((self.folder / ".cache" / kind).glob("*.json"))

    def answer(
        self, port: str, ask: Callable[[sandbox.Request], sandbox.Reply], request: Request
    ) -> Response:
        """Between werkzeug and the sandbox; a reset and a cut are made on the socket."""
        url = urlsplit(request.environ["RAW_URI"])
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = request.get_data()
        self.sent.append(Sent(port, request.method, url.path, dict(headers), body))
        number = len(self.sent)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        try:
            for hook in self.before:
                hook(number)
            reply = ask(sandbox.Request(request.method, url.path, query, headers, io.BytesIO(body)))
        except sandbox.Drop:
            return Response(reset(request.environ["werkzeug.socket"]))
        for hook in self.after:
            hook(number)
        if isinstance(reply.body, bytes):
            blocks: Any = [reply.body]
        else:
            blocks = reply.body
        if reply.cut_after is not None:
            blocks = cut(blocks, reply.cut_after)
        return Response(blocks, reply.status, headers=list(reply.headers.items()))


def reset(connection: socket.socket) -> Iterator[bytes]:
    """A body that ends the connection with RST before anything is said."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    here, there = socket.socketpair()
    there.close()
    os.dup2(here.fileno(), connection.fileno())  # closes the connection, at once
    here.close()
    raise ConnectionResetError
    yield b""


def cut(blocks: Any, length: int) -> Iterator[bytes]:
    """The first bytes of a body, then the end of the connection."""
    for block in blocks:
        yield block[:length]
        length -= len(block)
        if length <= 0:
            raise ConnectionAbortedError


def stub_render(image: Path, audio: Path, out: Path, width: int, height: int) -> None:
    """What passes for an MP4, different each time."""
    seed = image.read_bytes() + audio.read_bytes() + out.name.encode()
    head = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"
    out.write_bytes(head + hashlib.shake_128(seed).digest(VIDEO_BYTES))


def write_wav(file: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    """A recording of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8000)
        sound.writeframes(random.Random(seed).randbytes(round(8000 * seconds)))
    return file


def write_png(file: Path, shade: int = 0) -> Path:
    """A small portrait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(sandbox.png(9, 16, 2, [bytearray([shade] * 27) for _ in range(16)]))
    return file


@pytest.fixture
def box(httpserver: HTTPServer, files_server: HTTPServer) -> Iterator[Sandbox]:
    """The sandbox, whose videos are ready at once."""
    files_server.clear()
    with Sandbox(render_seconds=0.0, render=stub_render, eager=True) as box:
        box.files_url = files_server.url_for("").rstrip("/")
        yield box
    httpserver.check()
    files_server.check()


def mount(world: World, httpserver: HTTPServer, files_server: HTTPServer) -> World:
    """Put a world's sandbox on the two servers."""
    for port, server, ask in (
        ("api", httpserver, world.box.api),
        ("files", files_server, world.box.files),
    ):
        handler = functools.partial(world.answer, port, ask)
        server.expect_request(re.compile(".*")).respond_with_handler(handler)
    return world


@pytest.fixture
def live(
    version: str, box: Sandbox, httpserver: HTTPServer, files_server: HTTPServer, tmp_path: Path
) -> World:
    """The world in real time."""
    world = World(version, box, httpserver.url_for(PREFIXES[version]), tmp_path)
    return mount(world, httpserver, files_server)


@pytest.fixture
def world(clock: Any, live: World) -> World:
    """The world under the clock."""
    return live


# -----------------------------------------------------------------------------
# the module as a whole
# -----------------------------------------------------------------------------

SIGNATURES = {
    "create_asset": ["name", "kind", "api_key"],
    "upload_asset": ["asset_id", "file", "api_key"],
    "upload": ["file", "kind", "api_key"],
    "get_default_model_id": ["api_key"],
    "start_generation": ["image_id", "audio_id", "prompt", "api_key", "model_id"],
    "wait_and_download": ["generation_id", "out_dir", "api_key", "timeout"],
    "get_credit_balance": ["api_key"],
    "get_balance": ["api_key"],
    "retry": ["exceptions", "tries", "delay", "backoff"],
}
DEFAULTS = {"model_id": None, "timeout": 300, "tries": 3, "delay": 2, "backoff": 2}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_leading_parameters_are_those_of_the_contract(name: str) -> None:
    parameters = inspect.signature(getattr(hedra, name)).parameters.values()
    leading = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in leading] == SIGNATURES[name]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p not in leading)
    assert {p.name: p.default for p in leading if p.default is not p.empty} == {
        n: DEFAULTS[n] for n in SIGNATURES[name] if n in DEFAULTS
    }


def python(
    code: str, *words: str, site: bool = True, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own, with no variables but those; without `site`
    it has no packages."""
    path = {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *([] if site else ["-S"]), "-c", code, *words],
        env={**path, **environ},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_importing_has_no_effect(tmp_path: Path) -> None:
    code = """
import sys, os
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
before = dict(os.environ)
os.environ = None
import hedra_avatar
os.environ = before
lazy = {"tqdm", "watchdog", "dotenv", "urllib3", "ssl", "fcntl", "sandbox"} & set(sys.modules)
assert not lazy, lazy
written = [args for args in opened if args[1] not in ("r", "rb", None)]
assert not written, written
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_help_needs_no_package_and_a_command_says_what_to_install() -> None:
    code = "import hedra_avatar, sys; raise SystemExit(hedra_avatar.main(sys.argv[1:]))"
    assert python("import urllib3", site=False).returncode != 0
    shown = python(code, "--help", site=False)
    assert shown.returncode == 0
    assert "run" in shown.stdout
    assert "credits" in shown.stdout
    refused = python(code, "credits", site=False)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert "pip install" in refused.stderr


def test_the_docstring_of_the_module_names_both_keys_and_every_command_is_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        hedra.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("run", "batch", "watch", "credits"))
    assert "HEDRA_API_KEY" in str(hedra.__doc__)


# -----------------------------------------------------------------------------
# account
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ("sk_hedra_1", "sk_hedra_1"),
        ("  sk_hedra_1\n", "sk_hedra_1"),
        ("\ufeffsk_hedra_1", "sk_hedra_1"),
        (" \ufeff sk_hedra_1 \r\n", "sk_hedra_1"),
        ("id:secret", "id:secret"),
    ],
)
def test_a_key_is_stripped_of_what_pasting_adds(raw: str, key: str) -> None:
    assert hedra.clean_key(raw) == key


@pytest.mark.parametrize("raw", ["", " ", "\ufeff", "sk_a\nsk_b", "sk_a\x00b", "sk_ä", "sk_a\tb"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(raw: str) -> None:
    with pytest.raises(hedra.InputError, match="HEDRA_API_KEY") as refused:
        hedra.clean_key(raw)
    assert "sk_" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://api.hedra.com/v3/", "https://api.hedra.com/v3"),
        (" https://api.hedra.com/v3 ", "https://api.hedra.com/v3"),
        ("http://localhost:8321", "http://localhost:8321"),
        ("http://127.0.0.1:1/web-app/public", "http://127.0.0.1:1/web-app/public"),
        ("http://127.9.9.9", "http://127.9.9.9"),
        ("http://[::1]:1", "http://[::1]:1"),
    ],
)
def test_a_base_url_is_https_or_loopback(url: str, clean: str) -> None:
    assert hedra.clean_url(url) == clean


@pytest.mark.parametrize(
    "url",
    [
        "http://api.hedra.com",
        "http://127.evil.com",
        "http://127.0.0.1.evil.com",
        "http://localhost.evil.com",
        "http://127.0.0.1@evil.com",
        "https://user:word@evil.com",
        "http://0.0.0.0",
        "http://192.168.0.1",
        "ftp://127.0.0.1",
        "https://",
        "api.hedra.com",
        "",
    ],
)
def test_a_base_url_that_would_tell_the_key_to_a_network_is_refused(url: str) -> None:
    with pytest.raises(hedra.InputError):
        hedra.clean_url(url)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_timeout_that_is_no_positive_number_is_refused_by_name(value: str) -> None:
    with pytest.raises(hedra.InputError, match="HEDRA_HTTP_TIMEOUT"):
        hedra.open_account("k", {"HEDRA_HTTP_TIMEOUT": value})


def test_the_key_chooses_the_api_and_the_base_url_only_the_host() -> None:
    url = {"HEDRA_BASE_URL": "https://proxy.example/x"}
    assert hedra.open_account("sk").base_url == "https://api.hedra.com/web-app/public"
    assert hedra.open_account("id:secret").base_url == "https://api.hedra.com/v3"
    assert [hedra.connect(k, url).unit for k in ("sk", "id:secret")] == ["credits", "USD"]


def test_accounts_differ_by_key_base_url_and_workspace_and_tell_no_key() -> None:
    variants: list[tuple[str, dict[str, str]]] = [
        ("sk_1", {}),
        ("sk_2", {}),
        ("sk_1", {"HEDRA_BASE_URL": "https://elsewhere.example"}),
        ("sk_1", {"HEDRA_WORKSPACE_ID": "w"}),
    ]
    accounts = [hedra.open_account(key, environ) for key, environ in variants]
    assert len({account.id for account in accounts}) == 4
    assert not any("sk_" in account.id + repr(account) + str(account) for account in accounts)


# -----------------------------------------------------------------------------
# data
# -----------------------------------------------------------------------------


def wav_bytes(promised: int, there: int, rate: int = 8000) -> bytes:
    """A WAV whose header promises other than what is there."""
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8)
    return b"RIFF\0\0\0\0WAVE" + form + b"data" + struct.pack("<I", promised) + bytes(there)


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        pytest.param("audio", b"", "empty", id="empty"),
        pytest.param("audio", b"RIFF\0\0", "cut short", id="cut in its header"),
        pytest.param("audio", b"RIFF\0\0\0\0WAVEfmt ", "cut short", id="no sound yet"),
        pytest.param("audio", wav_bytes(16000, 8000), "16,000", id="less than promised"),
        pytest.param("audio", wav_bytes(0, 8000), "still being written", id="header not final"),
        pytest.param("audio", b"hello, this is text" * 9, "something else", id="text"),
        pytest.param("audio", b"\x89PNG\r\n\x1a\n" + bytes(50), "something else", id="an image"),
        pytest.param("audio", wav_bytes(3999, 3999), "0.50 s", id="too short"),
        pytest.param("audio", wav_bytes(8000, 8000, rate=13), "615.38 s", id="too long"),
        pytest.param("audio", wav_bytes(8000, 8000, rate=0), "damaged", id="no rate"),
        pytest.param("image", b"hello, this is text" * 9, "something else", id="text as image"),
        pytest.param("image", b"GIF89a" + bytes(50), "something else", id="a gif"),
        pytest.param("image", wav_bytes(8000, 8000), "something else", id="a wav as image"),
        pytest.param(
            "image", b"\x89PNG\r\n\x1a\n" + bytes(10_485_753), "10,485,760", id="a byte too big"
        ),
    ],
)
def test_a_file_that_hedra_would_not_take_is_refused_by_name(
    tmp_path: Path, kind: Any, content: bytes, words: str
) -> None:
    file = tmp_path / "the file"
    file.write_bytes(content)
    with pytest.raises(hedra.InputError, match=re.escape(words)) as refused:
        hedra.inspect_file(file, kind)
    assert str(file) in str(refused.value)


def test_audio_over_the_limit_is_refused_whatever_its_format(tmp_path: Path) -> None:
    file = tmp_path / "long.mp3"
    with file.open("wb") as stream:
        stream.write(b"ID3")
        stream.truncate(104_857_601)
    with pytest.raises(hedra.InputError, match="104,857,600"):
        hedra.inspect_file(file, "audio")


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(hedra.InputError, match="is not a file"):
        hedra.inspect_file(tmp_path, "image")
    with pytest.raises(hedra.InputError, match="does not exist"):
        hedra.inspect_file(tmp_path / "x.png", "image")


@pytest.mark.parametrize(
    ("kind", "content", "content_type"),
    [
        ("image", b"\x89PNG\r\n\x1a\n" + bytes(9), "image/png"),
        ("image", b"\xff\xd8\xff\xe0" + bytes(12), "image/jpeg"),
        ("image", b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        ("audio", wav_bytes(8000, 8000), "audio/wav"),
        ("audio", b"ID3\4" + bytes(50), "audio/mpeg"),
        ("audio", b"\xff\xfb\x90\0" + bytes(50), "audio/mpeg"),
        ("audio", b"fLaC" + bytes(50), "audio/flac"),
        ("audio", b"OggS" + bytes(50), "audio/ogg"),
        ("audio", b"\0\0\0\x1cftypM4A " + bytes(50), "audio/mp4"),
        ("audio", b"FORM\0\0\0\0AIFF" + bytes(50), "audio/aiff"),
    ],
)
def test_files_are_known_by_their_first_bytes(
    tmp_path: Path, kind: Any, content: bytes, content_type: str
) -> None:
    file = tmp_path / "anything"
    file.write_bytes(content)
    media = hedra.inspect_file(file, kind)
    assert (media.content_type, media.size_bytes) == (content_type, len(content))
    assert media.seconds == (1.0 if content_type == "audio/wav" else None)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5.0),
        ("0", 0.0),
        ("0.5", 0.5),
        ("Fri, 02 Jan 2026 03:04:35 GMT", 30.0),
        ("Fri, 02 Jan 2026 03:04:00 GMT", 0.0),  # past
        ("Thu, 02 Jan 2026 03:04:35 GMT", 30.0),  # not a Thursday
        ("Fri, 32 Jan 2026 03:04:35 GMT", None),
        ("Fri, 02 Jan 100000 03:04:35 GMT", None),
        ("-3", None),
        ("inf", None),
        ("nan", None),
        ("1e400", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(
    clock: Any, value: str | None, seconds: float | None
) -> None:
    assert hedra.parse_retry_after(value) == seconds


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("queued", hedra.QUEUED),
        ("IN_QUEUE", hedra.QUEUED),
        ("processing", hedra.PROCESSING),
        ("IN_PROGRESS", hedra.PROCESSING),
        ("finalizing", hedra.FINALIZING),
        ("complete", hedra.COMPLETE),
        ("completed", hedra.COMPLETE),
        ("COMPLETED", hedra.COMPLETE),
        ("succeeded", hedra.COMPLETE),
        ("error", hedra.FAILED),
        ("failed", hedra.FAILED),
        ("FAILED", hedra.FAILED),
        ("a_word_of_next_year", hedra.PROCESSING),
    ],
)
def test_the_words_of_both_apis_are_one_set_of_states(word: str, state: str) -> None:
    assert hedra.parse_status({"status": word}, "x").state == state


def test_a_missing_field_is_an_error_that_names_it() -> None:
    with pytest.raises(hedra.ApiError, match="'status'"):
        hedra.parse_status({"progress": 1}, "GET /x")


@pytest.mark.parametrize(
    ("data", "words", "transient"),
    [
        ({"error": {"type": "GONE", "message": "no"}}, "no (GONE)", False),
        ({"error_message": "it broke"}, "it broke", False),
        ({"error": "plain"}, "plain", False),
        ({}, "no reason given", False),
        (
            {"error": {"message": "no", "reason_code": "MODERATION_OUTPUT_TRANSIENT"}},
            "no (MODERATION_OUTPUT_TRANSIENT)",
            True,
        ),
        ({"error": {"type": "UNAVAILABLE", "message": "later"}}, "later (UNAVAILABLE)", True),
        ({"error": {"code": "X", "message": "no", "retryable": True}}, "no (X)", True),
    ],
)
def test_a_failed_generation_says_why_and_whether_it_may_pass(
    data: dict[str, Any], words: str, transient: bool
) -> None:
    status = hedra.parse_status({"status": "error", **data}, "x")
    assert (status.failure, status.transient) == (words, transient)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"code": "NOT_FOUND", "messages": ["a", "b"]}, "NOT_FOUND", "a; b"),
        ({"code": 5, "error_code": "INTERNAL", "messages": ["a"]}, "INTERNAL", "a"),
        (
            {"detail": [{"loc": ["body", "name"], "msg": "too long", "type": "t"}]},
            "",
            "body.name: too long",
        ),
        ({"detail": "Not authenticated"}, "", "Not authenticated"),
        (
            {
                "error": {
                    "code": "INVALID_ARGUMENT",
                    "message": "2 fields are wrong",
                    "details": [{"field": "input.prompt", "message": "is blank"}],
                },
                "trace_id": "t1",
            },
            "INVALID_ARGUMENT",
            "2 fields are wrong; input.prompt: is blank",
        ),
        ("<html><style>b{}</style><h1>Bad\n Gateway</h1></html>", "", "Bad Gateway"),
        ("", "", "no reason given"),
        (None, "", "no reason given"),
        ([1], "", "no reason given"),
    ],
)
def test_an_error_shows_the_servers_own_words_from_any_shape(
    body: Any, code: str, words: str
) -> None:
    error = hedra.parse_error(400, {}, body, "GET /x")
    assert (error.status, error.code) == (400, code)
    assert f"400 to GET /x: {words}" in str(error)
    assert "<" not in str(error)
    assert error.trace_id == ("t1" if "t1" in str(body) else "")
    assert ("t1" in str(error)) == ("t1" in str(body))


@pytest.mark.parametrize(
    ("status", "retryable", "ambiguous", "kind"),
    [
        (400, False, False, hedra.ApiError),
        (402, False, False, hedra.OutOfCredits),
        (404, False, False, hedra.ApiError),
        (408, True, True, hedra.ApiError),
        (409, False, True, hedra.ApiError),
        (425, True, False, hedra.ApiError),
        (429, True, False, hedra.RateLimited),
        (500, True, True, hedra.ApiError),
        (504, True, True, hedra.ApiError),
    ],
)
def test_a_status_says_whether_to_try_again_and_whether_it_may_have_been_done(
    status: int, retryable: bool, ambiguous: bool, kind: type[hedra.ApiError]
) -> None:
    error = hedra.parse_error(status, {}, {}, "x")
    assert (type(error), error.retryable, error.ambiguous) == (kind, retryable, ambiguous)


def test_retry_after_is_taken_from_the_body_before_the_header() -> None:
    body = {"error": {"code": "X", "message": "m", "retry_after": 7}}
    assert hedra.parse_error(429, {"Retry-After": "3"}, body, "x").retry_after == 7
    assert hedra.parse_error(429, {"Retry-After": "3"}, {}, "x").retry_after == 3


def flat(credit_cost: int, billing_unit: str, **more: int) -> dict[str, Any]:
    """A price in the older wording."""
    return {"price_details": {"credit_cost": credit_cost, "billing_unit": billing_unit, **more}}


RATES = {"base_cost": 2, "credits_per_second": 6, "modifiers": {"resolution": {"540p": 0.5}}}


@pytest.mark.parametrize(
    ("price", "seconds", "resolution", "credits"),
    [
        ({"pricing": RATES}, 10.0, "540p", 31),
        ({"pricing": RATES}, 10.1, "540p", 32),
        ({"pricing": RATES}, 10.0, "720p", 62),
        ({"pricing": {**RATES, "modifiers": None, "base_cost": None}}, 2.0, "540p", 12),
        (flat(3, "second", unit_scale=1), 2.1, "", 7),
        (flat(30, "seconds", unit_scale=10), 2, "", 6),
        (flat(9, "generation"), 99, "", 9),
        (flat(9, "furlong"), 99, "", None),
        ({}, 1.0, "540p", None),
    ],
)
def test_a_price_follows_the_catalogues_formula(
    price: Any, seconds: Any, resolution: str, credits: int | None
) -> None:
    assert hedra.parse_price(price, seconds, resolution) == credits


def entry(**more: Any) -> dict[str, Any]:
    """A row of the catalogue."""
    return {"id": None, "slug": None, "name": None, **more}


OLD = entry(id="old", name="n", ai_model_type="character-3", status="DEPRECATED")
NEW = entry(id="new", name="n", ai_model_type="character-3", status="ACTIVE")
SLUGGED = entry(id=CHARACTER_3, slug="together/hedra-character-3", name="Character 3")
OTHER = entry(id="o", slug="together/hedra-avatar", name="Hedra Avatar")


@pytest.mark.parametrize(
    ("rows", "asked", "model"),
    [
        pytest.param([OTHER, OLD, NEW], "", "new", id="the first that is active"),
        pytest.param([OLD, OTHER], "", None, id="none is active"),
        pytest.param([OTHER, SLUGGED], "", CHARACTER_3, id="by slug"),
        pytest.param([entry(slug="x/character-30"), SLUGGED], "", CHARACTER_3, id="the whole slug"),
        pytest.param([entry(id="n3", name="Hedra Character 3")], "", "n3", id="by name"),
        pytest.param(
            [{**SLUGGED, "id": None}], "", "together/hedra-character-3", id="without an id"
        ),
        pytest.param([SLUGGED, OTHER], "o", "o", id="asked for by id"),
        pytest.param([SLUGGED, OTHER], "together/hedra-avatar", "o", id="asked for by slug"),
        pytest.param([SLUGGED], "nobody/nothing", None, id="asked for in vain"),
        pytest.param([], "", None, id="nothing there"),
    ],
)
def test_the_model_is_chosen_on_both_shapes_of_the_catalogue(
    rows: list[dict[str, Any]], asked: str, model: str | None
) -> None:
    chosen = hedra.choose_model(rows, asked)
    assert (chosen.id if chosen else None) == model


# -----------------------------------------------------------------------------
# retry
# -----------------------------------------------------------------------------


class Flaky:
    """Fails with the given errors, one a call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_retry_calls_again_until_it_works_or_its_tries_are_over(clock: Any) -> None:
    good, bad = Flaky(OSError(), OSError()), Flaky(OSError("1"), OSError("2"), OSError("3"))
    assert hedra.retry(OSError)(good)() == "done"
    with pytest.raises(OSError, match="3"):
        hedra.retry(OSError, tries=3)(bad)()
    assert (good.calls, bad.calls) == (3, 3)


def test_retry_waits_with_full_jitter_up_to_a_growing_limit_and_a_cap(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: limits.append((low, high)) or high)
    flaky = Flaky(*[OSError()] * 6)
    assert hedra.retry(OSError, tries=7, delay=2, backoff=2, max_delay=20)(flaky)() == "done"
    assert limits == [(0, 2), (0, 4), (0, 8), (0, 16), (0, 20), (0, 20)]
    assert clock.naps == [2, 4, 8, 16, 20, 20]


def test_retry_draws_its_waits_anew_each_time(clock: Any) -> None:
    for _ in range(40):
        with contextlib.suppress(OSError):
            hedra.retry(OSError, tries=2, delay=10)(Flaky(OSError(), OSError()))()
    assert len(set(clock.naps)) > 30
    assert all(0 <= nap <= 10 for nap in clock.naps)


def test_retry_obeys_retry_after_and_gives_up_where_it_asks_for_too_much(clock: Any) -> None:
    soon = hedra.ApiError("x", retryable=True, retry_after=17.0)
    late = hedra.ApiError("x", retryable=True, retry_after=hedra.MAX_RETRY_AFTER_S + 1)
    assert hedra.retry(hedra.ApiError)(Flaky(soon))() == "done"
    assert clock.naps == [17.0]
    flaky = Flaky(late)
    with pytest.raises(hedra.ApiError):
        hedra.retry(hedra.ApiError)(flaky)()
    assert flaky.calls == 1


@pytest.mark.parametrize(
    ("exceptions", "error"),
    [
        (ValueError, OSError("x")),
        ((ValueError, KeyError), OSError("x")),
        (hedra.HedraError, hedra.ApiError("x", retryable=False)),
    ],
)
def test_retry_leaves_other_errors_and_those_that_say_no_alone(
    clock: Any, exceptions: Any, error: Exception
) -> None:
    flaky = Flaky(error)
    with pytest.raises(type(error)):
        hedra.retry(exceptions)(flaky)()
    assert (flaky.calls, clock.naps) == (1, [])


def test_retry_takes_several_exceptions_a_sleep_of_ones_own_and_keeps_the_functions_name() -> None:
    naps: list[float] = []

    @hedra.retry((ValueError, OSError), tries=3, delay=1, backoff=1, sleep=naps.append)
    def fetch(errors: list[Exception], value: int = 0) -> int:
        """Doc."""
        if errors:
            raise errors.pop()
        return value

    assert fetch([ValueError(), OSError()], value=5) == 5
    assert (fetch.__name__, fetch.__doc__, len(naps)) == ("fetch", "Doc.", 2)


def test_retry_of_no_tries_is_refused() -> None:
    with pytest.raises(ValueError, match="tries"):
        hedra.retry(OSError, tries=0)


# -----------------------------------------------------------------------------
# library, over the web API (v2)
# -----------------------------------------------------------------------------

KEY = KEYS["v2"]


def test_create_asset_names_the_file_and_its_kind(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    script = {"name": "friend.png", "type": "image"}
    server.expect_ordered_request("/assets", "POST", json=script).respond_with_json({"id": "a1"})
    assert hedra.create_asset("friend.png", "image", KEY, environ=environ) == "a1"
    request = server.log[0][0]
    assert request.headers["X-API-Key"] == KEY
    assert "Authorization" not in request.headers


def test_the_workspace_goes_out_with_every_body_that_has_one(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    environ["HEDRA_WORKSPACE_ID"] = "w1"
    script = {"name": "n", "type": "audio", "workspace_id": "w1"}
    server.expect_ordered_request("/assets", "POST", json=script).respond_with_json({"id": "a"})
    pools = {"remaining": 7, "workspace_credit_pool": {"w1": {"available": 1234}}}
    server.expect_ordered_request("/billing/credits").respond_with_json(pools)
    hedra.create_asset("n", "audio", KEY, environ=environ)
    assert hedra.get_credit_balance(KEY, environ=environ) == 1234


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_an_upload_sends_the_exact_bytes_with_an_exact_length(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path, size: int
) -> None:
    file = tmp_path / 'a "quoted"\r\nX-Evil: 1 ü.wav'
    file.write_bytes(random.Random(size).randbytes(size))
    server.expect_ordered_request("/assets/a1/upload", "POST").respond_with_json({})
    hedra.upload_asset("a1", file, KEY, environ=environ)
    request = server.log[0][0]
    assert "Transfer-Encoding" not in request.headers
    assert request.content_length == len(request.get_data())
    with request:
        assert list(request.files) == ["file"]
        assert request.files["file"].read() == file.read_bytes()
        assert "evil" not in str(request.files["file"].headers).lower()


def test_an_upload_whose_answer_was_lost_is_content_with_already_there(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    body = {"code": "ALREADY_EXISTS", "messages": ["has content"]}
    server.expect_ordered_request("/assets/a1/upload").respond_with_json(body, 409)
    hedra.upload_asset("a1", write_wav(tmp_path / "x.wav"), KEY, environ=environ)


START = {
    "type": "video",
    "start_keyframe_id": "img",
    "audio_id": "aud",
    "generated_video_inputs": {
        "text_prompt": "smiles",
        "resolution": "540p",
        "aspect_ratio": "9:16",
    },
}


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (CHARACTER_3, {"ai_model_id": CHARACTER_3}),
        ("together/hedra-avatar", {"model_slug": "together/hedra-avatar"}),
    ],
)
def test_a_generation_is_started_with_just_what_it_needs(
    server: HTTPServer, environ: dict[str, str], model: str, named: dict[str, str]
) -> None:
    script = {**START, **named}
    server.expect_ordered_request("/generations", "POST", json=script).respond_with_json(
        {"id": "g1", "status": "queued"}
    )
    assert hedra.start_generation("img", "aud", "smiles", KEY, model, environ=environ) == "g1"


def test_a_generation_may_be_given_its_id_and_another_shape(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    inputs = {"text_prompt": "smiles", "resolution": "720p", "aspect_ratio": "1:1"}
    script = {**START, "generated_video_inputs": inputs, "model_slug": "m", "generation_id": UUID}
    server.expect_ordered_request("/generations", "POST", json=script).respond_with_json(
        {"id": UUID}
    )
    started = hedra.start_generation(
        "img", "aud", "smiles", KEY, "m",
        resolution="720p", aspect_ratio="1:1", generation_id=UUID, environ=environ,
    )  # fmt: skip
    assert started == UUID


@pytest.mark.parametrize("status", [408, 500, 502, 409])
def test_the_bare_start_is_one_request_and_says_where_it_may_have_been_done(
    server: HTTPServer, environ: dict[str, str], status: int
) -> None:
    server.expect_ordered_request("/generations").respond_with_data("<h1>oh</h1>", status)
    with pytest.raises(hedra.ApiError) as failed:
        hedra.start_generation("i", "a", "p", KEY, "m", environ=environ)
    assert (failed.value.status, failed.value.ambiguous) == (status, True)


def test_a_blank_prompt_is_refused_before_anything_is_sent(environ: dict[str, str]) -> None:
    with pytest.raises(hedra.InputError, match="prompt"):
        hedra.start_generation("i", "a", " \n", KEY, "m", environ=environ)


@pytest.mark.parametrize(
    ("row", "model_id", "named"),
    [
        (SLUGGED, CHARACTER_3, {"model_slug": SLUGGED["slug"]}),
        ({**SLUGGED, "id": None}, SLUGGED["slug"], {"model_slug": SLUGGED["slug"]}),
        ({**NEW, "id": CHARACTER_3}, CHARACTER_3, {"ai_model_id": CHARACTER_3}),
    ],
)
def test_the_default_model_is_looked_up_once_and_then_remembered(
    server: HTTPServer,
    environ: dict[str, str],
    row: dict[str, Any],
    model_id: str,
    named: dict[str, str],
) -> None:
    server.expect_ordered_request("/models").respond_with_json([OTHER, OLD, row])
    script = {**START, **named}
    server.expect_ordered_request("/generations", json=script).respond_with_json({"id": "g"})
    assert hedra.get_default_model_id(KEY, environ=environ) == model_id
    assert Path(".cache/model_id").is_file()
    assert hedra.get_default_model_id(KEY, environ=environ) == model_id
    assert hedra.start_generation("img", "aud", "smiles", KEY, environ=environ) == "g"


def test_the_remembered_model_is_never_that_of_another_account(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    for name in ("one", "two", "three", "four"):
        row = {**NEW, "id": name}
        server.expect_ordered_request(re.compile(r".*/models")).respond_with_json([row])
    elsewhere = {"HEDRA_BASE_URL": server.url_for("/elsewhere")}
    workspace = {**environ, "HEDRA_WORKSPACE_ID": "w"}
    asks = [(KEY, environ), ("sk_other", environ), (KEY, elsewhere), (KEY, workspace)]
    found = [hedra.get_default_model_id(key, environ=values) for key, values in asks * 2]
    assert found == ["one", "two", "three", "four"] * 2
    assert KEY not in Path(".cache/model_id").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", "d1dd37a3", '{"x": 1}'])
def test_a_damaged_memory_of_the_model_is_looked_up_anew(
    server: HTTPServer, environ: dict[str, str], text: str
) -> None:
    server.expect_ordered_request("/models").respond_with_json([SLUGGED])
    Path(".cache").mkdir()
    Path(".cache/model_id").write_text(text)
    assert hedra.get_default_model_id(KEY, environ=environ) == CHARACTER_3
    assert hedra.get_default_model_id(KEY, environ=environ) == CHARACTER_3


def test_the_model_of_the_environment_wins_without_a_request(environ: dict[str, str]) -> None:
    assert hedra.get_default_model_id(KEY, environ={**environ, "HEDRA_MODEL_ID": "mine"}) == "mine"


def test_without_character_3_the_error_lists_what_would_do(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    rows = [row for row in sandbox.catalogue() if "character" not in row["slug"]]
    server.expect_ordered_request("/models").respond_with_json(rows)
    with pytest.raises(hedra.HedraError) as failed:
        hedra.get_default_model_id(KEY, environ=environ)
    assert "HEDRA_MODEL_ID" in str(failed.value)
    assert "together/hedra-avatar" in str(failed.value)
    assert "kling" not in str(failed.value)


MP4 = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40


def video_at(server: HTTPServer, name: str = "v") -> str:
    """An address at which the scripted server has the video."""
    server.expect_request(f"/{name}.mp4").respond_with_data(MP4, content_type="video/mp4")
    return server.url_for(f"/{name}.mp4")


def expect_polls(server: HTTPServer, *replies: Any) -> None:
    """Answers to looks at the generation `g`; a number is an error's status."""
    for reply in replies:
        path = server.expect_oneshot_request("/generations/g/status")
        if isinstance(reply, int):
            path.respond_with_data("<h1>oh</h1>", reply)
        else:
            path.respond_with_json(reply)


def test_waiting_looks_every_five_seconds_until_the_video_is_there(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    going = [{"status": word, "progress": 0.3} for word in ("queued", "processing", "finalizing")]
    expect_polls(server, *going, {"status": "complete", "url": video_at(server)})
    video = hedra.wait_and_download("g", tmp_path / "out", KEY, environ=environ)
    assert video == tmp_path / "out" / "g.mp4"
    assert video.read_bytes() == MP4
    assert time.monotonic() - clock.start == pytest.approx(15)


def test_the_video_is_fetched_without_the_key(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    expect_polls(server, {"status": "complete", "download_url": video_at(server)})
    hedra.wait_and_download("g", tmp_path, KEY, environ=environ, name="mine")
    assert (tmp_path / "mine.mp4").read_bytes() == MP4
    request = server.log[-1][0]
    assert request.path == "/v.mp4"
    assert not {"X-Api-Key", "Authorization"} & set(request.headers.keys())
    assert KEY not in str(request.headers)


def test_eight_failed_looks_are_only_failed_looks(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    bad = [502, 504, 500, 503, 502, 504, 500, 502]
    expect_polls(server, *bad, {"status": "complete", "url": video_at(server)})
    assert hedra.wait_and_download("g", tmp_path, KEY, environ=environ).read_bytes() == MP4


def test_a_404_just_after_the_submit_means_not_yet_and_later_means_unknown(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    expect_polls(server, 404, 404, 404, {"status": "complete", "url": video_at(server)})
    hedra.wait_and_download("g", tmp_path, KEY, environ=environ)
    server.expect_request("/generations/g/status").respond_with_json({"detail": "no"}, 404)
    with pytest.raises(hedra.ApiError) as failed:
        hedra.wait_and_download("g", tmp_path, KEY, environ=environ)
    assert failed.value.status == 404
    assert hedra.GRACE_S <= sum(clock.naps) < 3 * hedra.GRACE_S


def test_a_timeout_is_told_as_one_and_loses_nothing(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    server.expect_request("/generations/g/status").respond_with_json({"status": "queued"})
    with pytest.raises(hedra.StillRunning, match="not lost") as late:
        hedra.wait_and_download("g", tmp_path / "out", KEY, environ=environ)
    assert isinstance(late.value, TimeoutError)
    assert late.value.generation_id == "g"
    assert time.monotonic() - clock.start == pytest.approx(300, abs=6)
    assert not list(tmp_path.glob("out/*"))


def test_a_failed_generation_carries_its_id_and_hedras_reason(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    error = {"type": "MODERATION_FAILED", "message": "The portrait shows a celebrity"}
    expect_polls(server, {"status": "error", "error": error})
    with pytest.raises(hedra.GenerationFailed, match="celebrity") as failed:
        hedra.wait_and_download("g", tmp_path, KEY, environ=environ)
    assert (failed.value.generation_id, failed.value.transient) == ("g", False)
    assert "MODERATION_FAILED" in str(failed.value)


def test_complete_without_an_address_is_asked_again_then_of_the_asset(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    expect_polls(server, *[{"status": "complete", "asset_id": "v1"}] * 3)
    row = {"id": "v1", "asset": {"url": video_at(server)}}
    query = {"type": "video", "ids": "v1"}
    server.expect_oneshot_request("/assets", query_string=query).respond_with_json([])
    server.expect_request("/assets", query_string=query).respond_with_json([row])
    assert hedra.wait_and_download("g", tmp_path, KEY, environ=environ).read_bytes() == MP4


def test_the_balance_has_a_unit_and_the_old_function_keeps_its_integer(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    reply = {"remaining": 321, "used": 5, "expiring": 0}
    server.expect_request("/billing/credits").respond_with_json(reply)
    assert hedra.get_balance(KEY, environ=environ)[:2] == (321, "credits")
    left = hedra.get_credit_balance(KEY, environ=environ)
    assert (left, type(left)) == (321, int)


def test_the_library_reads_the_environment_only_when_it_is_called(
    server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.expect_request("/billing/credits").respond_with_json({"remaining": 1})
    monkeypatch.setenv("HEDRA_BASE_URL", server.url_for(""))
    assert hedra.get_credit_balance(KEY) == 1


def test_an_answer_with_a_field_missing_is_an_error_that_names_it(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    server.expect_request("/billing/credits").respond_with_json({"left": 1})
    with pytest.raises(hedra.ApiError, match="remaining"):
        hedra.get_credit_balance(KEY, environ=environ)


def test_a_redirect_of_an_api_call_is_not_followed_with_the_key(
    server: HTTPServer, files_server: HTTPServer, environ: dict[str, str], version: str
) -> None:
    files_server.clear()
    away = files_server.url_for("/billing/credits")
    for path in ("/billing/credits", "/balance"):
        server.expect_request(path).respond_with_data("", 302, {"Location": away})
    with pytest.raises(hedra.ApiError) as failed:
        hedra.get_balance(KEYS[version], environ=environ)
    assert failed.value.status == 302
    assert "HEDRA_BASE_URL" in str(failed.value)
    assert files_server.log == []


def test_a_video_over_plain_http_from_another_host_is_not_fetched(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    expect_polls(server, {"status": "complete", "url": "http://cdn.example/v.mp4"})
    with pytest.raises(hedra.HedraError, match="not encrypted"):
        hedra.wait_and_download("g", tmp_path, KEY, environ=environ)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_redirect_of_the_download_is_followed_but_not_to_plain_http(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    there = {"Location": video_at(server)}
    server.expect_request("/moved").respond_with_data("", 307, there)
    away = {"Location": "http://cdn.example/v.mp4"}
    server.expect_request("/away").respond_with_data("", 302, away)
    for path in ("/moved", "/away"):
        expect_polls(server, {"status": "complete", "url": server.url_for(path)})
    assert hedra.wait_and_download("g", tmp_path, KEY, environ=environ).read_bytes() == MP4
    with pytest.raises(hedra.HedraError, match="not encrypted"):
        hedra.wait_and_download("g", tmp_path, KEY, environ=environ, name="away")


# -----------------------------------------------------------------------------
# library, over the jobs API (v3)
# -----------------------------------------------------------------------------

KEY3 = KEYS["v3"]
TRANSCRIPTS = [
    pytest.param(b"data: a\n\n", [("message", "a", "")], id="plain"),
    pytest.param(
        b"id: 7\r\nevent: status\r\ndata: a\r\n\r\n", [("status", "a", "7")], id="crlf"
    ),
    pytest.param(b"event: x\ndata: a\ndata: b\n\n", [("x", "a\nb", "")], id="several data lines"),
    pytest.param(b"data:a\ndata:  b\n\n", [("message", "a\n b", "")], id="blank"),
    pytest.param(
        b"id: 1\ndata: a\n\ndata: b\n\n", [("message", "a", "1"), ("message", "b", "1")], id="no id"
    ),
    pytest.param(b"event: status\ndata: {\"cut", [], id="cut in a frame"),
    pytest.param(b"event: status\ndata: {}\n", [], id="cut before the blank line"),
    pytest.param(b"nonsense\nfoo: bar\ndata: a\n\n", [("message", "a", "")], id="unknown fields"),
    pytest.param(
        b"data: \xc3\xa4\n\nevent: done\ndata: [STREAM_DONE]\n\n",
        [("message", "ä", ""), ("done", "[STREAM_DONE]", "")],
        id="done",
    ),
]


@pytest.mark.parametrize(("body", "events"), TRANSCRIPTS)
def test_a_stream_is_read_the_same_however_it_is_cut_into_blocks(
    body: bytes, events: list[tuple[str, str, str]]
) -> None:
    ways = [[body], [bytes([byte]) for byte in body]]
    ways += [[body[:at], body[at:]] for at in range(1, len(body))]
    for blocks in ways:
        found = [event[:3] for event in hedra.iter_events(blocks) if event.name or event.data]
        assert found == events


def test_comments_and_retry_lines_of_a_stream_are_told_at_once() -> None:
    events = list(hedra.iter_events([b": keep-alive\n", b"retry: 2500\n", b"retry: x\n"]))
    assert [event.retry_s for event in events] == [None, 2.5]
    assert not any(event.name or event.data for event in events)


def test_upload_serves_both_apis(
    server: HTTPServer, environ: dict[str, str], tmp_path: Path, version: str
) -> None:
    file = write_wav(tmp_path / "x.wav")
    handle = {"url": "https://h/1?x=y", "content_type": "audio/wav", "expires_at": "2036-01-01"}
    server.expect_request("/assets", "POST").respond_with_json({"id": "a1"})
    server.expect_request("/assets/a1/upload").respond_with_json({})
    server.expect_request("/files").respond_with_json(handle, 201)
    ref = hedra.upload(file, "audio", KEYS[version], environ=environ)
    assert ref == {"v2": "a1", "v3": "https://h/1?x=y"}[version]
    with server.log[-1][0] as sent:
        assert sent.files["file"].read() == file.read_bytes()
        assert sent.content_length == len(sent.get_data())


def test_upload_refuses_what_is_no_recording_before_anything_is_sent(
    environ: dict[str, str], tmp_path: Path, version: str
) -> None:
    file = tmp_path / "x.wav"
    file.write_text("hello" * 20)
    with pytest.raises(hedra.InputError, match="something else"):
        hedra.upload(file, "audio", KEYS[version], environ=environ)


def test_create_asset_with_a_v3_key_says_what_to_call_instead(environ: dict[str, str]) -> None:
    with pytest.raises(hedra.HedraError, match=r"upload\("):
        hedra.create_asset("x", "image", KEY3, environ=environ)
    with pytest.raises(hedra.HedraError, match=r"upload\("):
        hedra.upload_asset("x", Path("x"), KEY3, environ=environ)


def test_a_job_is_started_with_just_what_the_schema_knows(
    server: HTTPServer, environ: dict[str, str]
) -> None:
    script = {
        "input": {
            "prompt": "smiles",
            "aspect_ratio": "9:16",
            "resolution": "540p",
            "start_image": {"source": "url", "url": "https://h/i"},
            "audio": {"source": "url", "url": "https://h/a"},
        }
    }
    reply = {"job_id": "job_1", "status": "IN_QUEUE"}
    path = "/models/hedra-character-3"
    server.expect_ordered_request(path, "POST", json=script).respond_with_json(reply, 202)
    server.expect_ordered_request(
        "/models/hedra-avatar", "POST", json={**script, "idempotency_key": "k1"}
    ).respond_with_json(reply, 202)
    files = ("https://h/i", "https://h/a", "smiles", KEY3)
    assert hedra.start_generation(*files, environ=environ) == "job_1"
    hedra.start_generation(
        *files, "together/hedra-avatar", generation_id="k1", environ=environ
    )
    request = server.log[0][0]
    assert request.headers["Authorization"] == f"Bearer {KEY3}"
    assert "X-Api-Key" not in request.headers


def frame(number: int, status: str, **more: Any) -> str:
    """A status frame of a stream."""
    data = json.dumps({"job_id": "job_1", "status": status, **more})
    return f"id: {number}\nevent: status\ndata: {data}\n\n"


DONE = "event: done\ndata: [STREAM_DONE]\n\n"


def respond_with_stream(server: HTTPServer, *frames: str) -> None:
    """A stream that is cut behind its last frame."""
    script = server.expect_oneshot_request("/jobs/job_1/stream")
    script.respond_with_data("".join(frames), content_type="text/event-stream")


def expect_result(server: HTTPServer, **output: Any) -> None:
    """The end of the job."""
    output = {"status": "COMPLETED", "url": video_at(server), **output}
    reply = {"job_id": "job_1", "status": "COMPLETED", "outputs": [output], "cost": 0.03}
    server.expect_request("/jobs/job_1").respond_with_json(reply)


def test_a_job_takes_one_stream_one_result_and_one_download(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    frames = [frame(1, "IN_QUEUE"), ": keep-alive\n\n", frame(2, "COMPLETED"), DONE]
    respond_with_stream(server, *frames)
    expect_result(server)
    video = hedra.wait_and_download("job_1", tmp_path, KEY3, environ=environ)
    assert video.read_bytes() == MP4
    paths = [request.path for request, _ in server.log]
    assert paths == ["/jobs/job_1/stream", "/jobs/job_1", "/v.mp4"]
    assert not {"X-Api-Key", "Authorization"} & set(server.log[-1][0].headers.keys())


def test_a_stream_that_is_cut_is_taken_up_behind_its_last_event(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    log = "id: 2\nevent: log\ndata: {}\n\n"
    respond_with_stream(server, frame(1, "IN_QUEUE"), log, "id: 3\nev")
    respond_with_stream(server, frame(4, "IN_PROGRESS"), 'event: status\ndata: {"stat')
    respond_with_stream(server, frame(5, "COMPLETED"), DONE)
    still = {"job_id": "job_1", "status": "IN_PROGRESS"}
    server.expect_request("/jobs/job_1/status").respond_with_json(still)
    expect_result(server)
    assert hedra.wait_and_download("job_1", tmp_path, KEY3, environ=environ).read_bytes() == MP4
    streams = [r for r, _ in server.log if r.path.endswith("/stream")]
    assert [r.headers.get("Last-Event-Id") for r in streams] == [None, "2", "4"]


@pytest.mark.parametrize("status", [404, 500, 502, 503, 200])
def test_where_the_stream_does_not_answer_the_job_is_polled(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path, status: int
) -> None:
    server.expect_request("/jobs/job_1/stream").respond_with_data("<h1>no</h1>", status)
    script = [{"status": "IN_QUEUE"}] * 4 + [{"status": "IN_PROGRESS"}] * 4
    for reply in script:
        server.expect_oneshot_request("/jobs/job_1/status").respond_with_json(reply)
    server.expect_request("/jobs/job_1/status").respond_with_json({"status": "COMPLETED"})
    expect_result(server)
    assert hedra.wait_and_download("job_1", tmp_path, KEY3, environ=environ).read_bytes() == MP4
    assert sum(r.path.endswith("/stream") for r, _ in server.log) <= 3
    assert sum(r.path.endswith("/status") for r, _ in server.log) == 9


def test_the_deadline_holds_for_a_stream_that_only_keeps_alive(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    def keep_alive(request: Request) -> Response:
        def blocks() -> Iterator[bytes]:
            yield frame(1, "IN_QUEUE").encode()
            for _ in range(1000):
                clock.tick(1)
                yield b": keep-alive\n\n"

        return Response(blocks(), content_type="text/event-stream")

    server.expect_request("/jobs/job_1/stream").respond_with_handler(keep_alive)
    with pytest.raises(hedra.StillRunning, match="not lost"):
        hedra.wait_and_download("job_1", tmp_path, KEY3, timeout=60, environ=environ)


def test_a_failed_job_says_why(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    respond_with_stream(server, frame(1, "FAILED"), DONE)
    error = {"code": "UNAVAILABLE", "message": "The GPU caught fire", "retryable": True}
    reply = {"job_id": "job_1", "status": "FAILED", "outputs": [], "error": error}
    server.expect_request("/jobs/job_1").respond_with_json(reply)
    with pytest.raises(hedra.GenerationFailed, match="caught fire") as failed:
        hedra.wait_and_download("job_1", tmp_path, KEY3, environ=environ)
    assert (failed.value.generation_id, failed.value.transient) == ("job_1", True)


def test_a_video_that_expired_after_48_hours_is_told_as_such(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    respond_with_stream(server, frame(1, "COMPLETED"), DONE)
    expect_result(server, status="EXPIRED", url=None)
    with pytest.raises(hedra.HedraError, match="48"):
        hedra.wait_and_download("job_1", tmp_path, KEY3, environ=environ)


def test_the_wallet_is_in_dollars(server: HTTPServer, environ: dict[str, str]) -> None:
    server.expect_request("/balance").respond_with_json({"balance": 12.34, "currency": "USD"})
    assert hedra.get_balance(KEY3, environ=environ)[:2] == (12.34, "USD")
    assert hedra.get_credit_balance(KEY3, environ=environ) == 12


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (401, "UNAUTHORIZED", "Invalid API key.", "HEDRA_API_KEY"),
        (403, "PERMISSION_DENIED", "The key lacks the scope jobs:write", "scope"),
        (403, "PERMISSION_DENIED", "Your plan has no API access", "plan"),
        (403, "PERMISSION_DENIED", "This account has moved", "colon"),
    ],
)
def test_a_refusal_shows_hedras_words_the_trace_id_and_a_remedy(
    server: HTTPServer, environ: dict[str, str], status: int, code: str, message: str, hint: str
) -> None:
    body = {"error": {"code": code, "message": message, "retryable": False}, "trace_id": "t-77"}
    server.expect_request("/balance").respond_with_json(body, status)
    with pytest.raises(hedra.ApiError, match=re.escape(message)) as failed:
        hedra.get_balance(KEY3, environ=environ)
    error = failed.value
    assert (error.status, error.code, error.trace_id) == (status, code, "t-77")
    assert "t-77" in str(error)
    assert hint in str(error).partition(message)[2]


# -----------------------------------------------------------------------------
# transport, over both APIs
# -----------------------------------------------------------------------------

BALANCE = {"v2": ("/billing/credits", {"remaining": 5}), "v3": ("/balance", {"balance": 5})}


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_harmless_request_is_repeated_after_a_passing_fault(
    clock: Any, server: HTTPServer, environ: dict[str, str], version: str, status: int
) -> None:
    path, reply = BALANCE[version]
    for _ in range(2):
        script = server.expect_ordered_request(path)
        script.respond_with_data("<h1>busy</h1>", status, {"Retry-After": "11"})
    server.expect_ordered_request(path).respond_with_json(reply)
    assert hedra.get_balance(KEYS[version], environ=environ).remaining == 5
    assert sum(clock.naps) == pytest.approx(22, abs=3)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 410, 422])
def test_a_refusal_is_not_repeated(
    clock: Any, server: HTTPServer, environ: dict[str, str], version: str, status: int
) -> None:
    server.expect_ordered_request(BALANCE[version][0]).respond_with_data("no", status)
    with pytest.raises(hedra.ApiError) as failed:
        hedra.get_balance(KEYS[version], environ=environ)
    assert failed.value.status == status
    assert clock.naps == []


def test_a_server_that_stays_broken_is_given_up_with_its_last_words(
    clock: Any, server: HTTPServer, environ: dict[str, str], version: str
) -> None:
    server.expect_request(BALANCE[version][0]).respond_with_data("<h1>On fire</h1>", 500)
    with pytest.raises(hedra.ApiError, match="On fire"):
        hedra.get_balance(KEYS[version], environ=environ)
    assert len(server.log) == hedra.TRIES


def test_an_answer_that_is_no_json_is_asked_for_again(
    clock: Any, server: HTTPServer, environ: dict[str, str], version: str
) -> None:
    path, reply = BALANCE[version]
    for text in ("<h1>Log in</h1>", "", "{"):
        server.expect_ordered_request(path).respond_with_data(text)
    server.expect_ordered_request(path).respond_with_json(reply)
    assert hedra.get_balance(KEYS[version], environ=environ).remaining == 5


def test_a_retry_after_of_an_hour_is_not_waited_for(
    clock: Any, server: HTTPServer, environ: dict[str, str], version: str
) -> None:
    script = server.expect_ordered_request(BALANCE[version][0])
    script.respond_with_data("", 503, {"Retry-After": "3600"})
    with pytest.raises(hedra.ApiError):
        hedra.get_balance(KEYS[version], environ=environ)
    assert clock.naps == []


def test_a_server_that_cannot_be_reached_is_told_in_words(clock: Any, version: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = {"HEDRA_BASE_URL": f"http://127.0.0.1:{taken.getsockname()[1]}"}
        with pytest.raises(hedra.ApiError, match="cannot be reached") as failed:
            hedra.get_balance(KEYS[version], environ=url)
    assert (failed.value.status, failed.value.ambiguous) == (None, False)


@pytest.mark.parametrize("part", ["key", "secret"])
def test_a_key_that_the_server_echoes_is_shown_to_nobody(
    server: HTTPServer, environ: dict[str, str], version: str, part: str
) -> None:
    key = KEYS[version]
    echo = key if part == "key" else key.partition(":")[2] or key
    body = {"error": {"code": "X", "message": f"bad {echo}!"}, "detail": f"bad {echo}!"}
    server.expect_request(BALANCE[version][0]).respond_with_json(body, 403)
    with pytest.raises(hedra.ApiError, match="bad") as failed:
        hedra.get_balance(key, environ=environ)
    told = f"{failed.value!r} {failed.value} {vars(failed.value)}"
    assert echo not in told


# -----------------------------------------------------------------------------
# pipeline: one clip
# -----------------------------------------------------------------------------

CALLS = {
    "v2": ["balance", "create", "create", "download", "price", "status", "status", "submit"]
    + ["upload", "upload"],
    "v3": ["balance", "download", "price", "result", "stream", "submit", "upload", "upload"],
}


def test_a_clip_takes_just_these_requests_and_one_payment(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run() == 0
    world.check_paid()
    assert sorted(world.verbs) == CALLS[world.version]
    assert capsys.readouterr().out == "output/hello.mp4\n"


def test_hedra_gets_the_files_bytes_the_prompt_and_the_shape(world: World) -> None:
    assert world.run("--prompt", "waves", "--resolution", "720p", "--aspect-ratio", "1:1") == 0
    one = world.box.paid[0]
    assert [path.read_bytes() for path in one.sources] == [
        world.img.read_bytes(),
        world.wav.read_bytes(),
    ]
    assert (one.prompt, one.resolution, one.aspect_ratio) == ("waves", "720p", "1:1")
    assert "character-3" in one.model
    assert "duration_ms" not in json.dumps(one.request)


def test_nothing_is_uploaded_before_price_and_balance_are_known(world: World) -> None:
    world.run()
    first = min(world.verbs.index("upload"), (world.verbs + ["create"]).index("create"))
    assert set(world.verbs[:first]) >= {"price", "balance"}


def test_the_intent_is_on_disk_before_the_submit(world: World) -> None:
    seen: list[dict[str, Any]] = []

    def look(number: int) -> None:
        if is_submit(world.sent[number - 1]):
            seen.extend(json.loads(path.read_text()) for path in world.records())

    world.before.append(look)
    assert world.run() == 0
    body = json.loads(next(sent.body for sent in world.sent if is_submit(sent)))
    reserved = body.get("generation_id") or body.get("idempotency_key")
    assert reserved
    assert reserved in json.dumps(seen[0])


def test_a_second_clip_with_the_same_portrait_looks_nothing_up_and_uploads_it_not_again(
    world: World,
) -> None:
    assert world.run() == 0
    before = len(world.verbs)
    assert world.run(wav=write_wav(world.folder / "again.wav", seed=1)) == 0
    second = world.verbs[before:]
    assert second.count("upload") == 1
    assert "price" not in second or world.version == "v3"
    assert len(world.box.paid) == 2


def test_the_same_content_under_other_names_is_the_same_clip(world: World) -> None:
    assert world.run() == 0
    shutil.copy(world.wav, world.folder / "copy.wav")
    assert world.run("--out", "elsewhere/one.mp4", wav=world.folder / "copy.wav") == 0
    world.check_paid()
    assert Path("elsewhere/one.mp4").read_bytes() == world.videos()[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "another"],
        ["--resolution", "720p"],
        ["--aspect-ratio", "16:9"],
        ["--model", "together/hedra-avatar"],
    ],
)
def test_whatever_makes_another_clip_is_paid_for(world: World, flags: list[str]) -> None:
    assert [world.run(), world.run(*flags)] == [0, 0]
    world.check_paid(2)


@only_v2
@pytest.mark.parametrize("name", [CHARACTER_3, "together/hedra-character-3"])
def test_a_models_id_and_its_slug_are_one_clip(world: World, name: str) -> None:
    assert [world.run(), world.run("--model", name), world.run(HEDRA_MODEL_ID=name)] == [0, 0, 0]
    world.check_paid()


def test_another_account_is_another_clip(world: World) -> None:
    other = {"v2": "sk_other", "v3": "other:secret"}[world.version]
    assert [world.run(), world.run(HEDRA_API_KEY=other)] == [0, 0]
    world.check_paid(2)


def test_too_few_credits_shows_both_figures_and_uploads_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.credits, world.box.usd = 2, 0.02
    assert world.run() == 1
    told = capsys.readouterr().err.splitlines()[-1]
    figures = {"v2": ["3 credits", "2 credits"], "v3": ["$0.03", "$0.02"]}[world.version]
    assert all(figure in told for figure in figures)
    assert not {"upload", "create", "submit"} & set(world.verbs)
    world.box.credits, world.box.usd = 100, 100.0
    assert world.run() == 0
    world.check_paid()


def test_a_402_of_the_submit_is_told_in_hedras_figures(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.balance_error = 500
    world.box.credits, world.box.usd = 2, 0.02
    assert world.run() == 1
    told = capsys.readouterr().err
    wanted = {
        "v2": ["Required: 3", "Available: 2"],
        "v3": ["balance $0.02", "price $0.03", sandbox.FUNDING_URL, "trace id"],
    }
    assert [words for words in wanted[world.version] if words not in told] == []
    assert "warning" in told
    assert world.box.paid == []


def test_a_price_or_balance_that_cannot_be_read_is_a_warning(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.balance_error = 404
    assert world.run() == 0
    world.check_paid()
    assert "warning" in capsys.readouterr().err


def test_a_key_that_is_not_accepted_stops_everything_with_one_line(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.keys = {"another"}
    assert world.run() == 1
    assert "HEDRA_API_KEY" in capsys.readouterr().err
    assert not {"upload", "create", "submit"} & set(world.verbs)


def test_a_generation_that_fails_shows_hedras_reason_and_is_not_paid_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.fail_with = {"type": "MODERATION_FAILED", "message": "No celebrities, please"}
    assert world.run() == 1
    first = capsys.readouterr().err.splitlines()[-1]
    world.box.fail_with = None
    before = len(world.verbs)
    assert world.run() == 1
    second = capsys.readouterr().err.splitlines()[-1]
    assert "No celebrities, please" in first
    assert "No celebrities, please" in second
    assert "--force" in second
    assert "submit" not in world.verbs[before:]
    assert len(world.box.paid) == 1
    assert not world.target.exists()
    assert world.run("--force") == 0
    world.check_paid(2)


def test_a_failure_that_hedra_calls_transient_gets_a_new_take(world: World) -> None:
    reason = {"type": "MODERATION_FAILED", "reason_code": "MODERATION_OUTPUT_TRANSIENT"}
    world.box.fail_with, world.box.refund = {**reason, "message": "Try again"}, True
    assert world.run() == 1
    world.box.fail_with = None
    assert world.run() == 0
    assert len(world.box.generations) == 2
    world.check_paid()


def test_force_is_a_new_take_each_time(world: World) -> None:
    assert [world.run(), world.run("--force"), world.run("--force"), world.run()] == [0] * 4
    world.check_paid(3)
    assert len(set(world.videos())) == 3


def test_a_file_that_changes_while_it_is_sent_is_not_paid_for(world: World) -> None:
    def change(number: int) -> None:
        if world.sent[number - 1].path.endswith(("/upload", "/files")):
            write_wav(world.wav, seed=number)

    world.before.append(change)
    assert world.run() == 1
    assert world.box.paid == []
    world.before.clear()
    assert world.run() == 0
    world.check_paid()
    assert world.box.paid[0].sources[1].read_bytes() == world.wav.read_bytes()


# -----------------------------------------------------------------------------
# pay once: faults
# -----------------------------------------------------------------------------

VERBS = {
    "v2": ["balance", "price", "create", "upload", "submit", "status", "download"],
    "v3": ["balance", "price", "upload", "submit", "stream", "status", "result", "download"],
}
FAULTS = ["500", "502-html", "503", "429", "reset", "reset-after", "not-json", "cut"]
MORE = [(version, "submit", kind) for version in VERBS for kind in ("408", "500-after")]


@pytest.mark.parametrize(
    ("version", "verb", "kind"),
    [(version, verb, kind) for version in VERBS for verb in VERBS[version] for kind in FAULTS]
    + MORE,
)
def test_a_fault_of_any_call_pays_once(world: World, verb: str, kind: str) -> None:
    if (world.version, verb) == ("v3", "status"):
        world.fail("stream", "404", 9)
    world.fail(verb, kind)
    assert world.run() == 0
    world.check_paid()
    assert world.box.faults[-1].times == 0, "the fault was not met"


@pytest.mark.parametrize("kinds", [("429", "reset"), ("reset-after", "502-html")])
@pytest.mark.parametrize(
    ("version", "verb"), [(version, verb) for version in VERBS for verb in VERBS[version]]
)
def test_two_faults_in_a_row_pay_once(world: World, verb: str, kinds: tuple[str, str]) -> None:
    if (world.version, verb) == ("v3", "status"):
        world.fail("stream", "404", 9)
    for kind in kinds:
        world.fail(verb, kind)
    assert world.run() == 0
    world.check_paid()


@pytest.mark.parametrize("kind", ["reset-after", "500-after", "not-json", "cut"])
@pytest.mark.parametrize("hidden", [1.0, 20.0])
def test_a_lost_answer_pays_once_though_hedra_does_not_know_of_it_for_a_while(
    world: World, kind: str, hidden: float
) -> None:
    world.box.hidden_seconds = hidden
    world.fail("submit", kind)
    assert world.run() == 0
    world.check_paid()
    assert world.verbs.count("submit") == (1 if world.version == "v2" else 2)


@only_v2
@pytest.mark.parametrize("kind", ["reset-after", "500-after", "not-json", "cut", "408", "reset"])
def test_a_server_that_ignores_the_reserved_id_is_paid_once(world: World, kind: str) -> None:
    world.box.ignore_reserved_id, world.box.hidden_seconds = True, 2.0
    world.fail("submit", kind)
    assert world.run() == 0
    world.check_paid()


@only_v2
def test_a_conflict_on_the_reserved_id_means_found(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run() == 0
    shutil.rmtree(".cache")
    world.target.unlink()
    world.fail("status", "404", skip=0)  # the look before the submit does not see it
    assert world.run() == 0
    world.check_paid()
    assert [call.status for call in world.box.log if call.verb == "submit"] == [200, 409]


def test_a_submit_that_hedra_certainly_did_not_take_is_sent_again(world: World) -> None:
    world.fail("submit", "reset", 3)
    assert world.run() == 0
    world.check_paid()
    assert world.verbs.count("submit") == 4


def test_a_submit_that_is_never_answered_ends_and_the_rerun_finishes_the_clip(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.fail("submit", "reset-after", 99)
    if world.version == "v2":
        world.fail("status", "500", 999)
    assert world.run() == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "again" in told
    world.heal()
    assert world.run() == 0
    world.check_paid()


def test_a_refusal_for_concurrency_is_waited_for(world: World) -> None:
    world.fail("submit", "429", 12)
    assert world.run() == 0
    world.check_paid()


def test_eight_failed_looks_in_a_row_lose_nothing(world: World) -> None:
    for kind in ("500", "502-html", "reset", "not-json", "cut", "503", "reset-after", "500"):
        world.fail("status", kind, skip=1 if world.version == "v2" else 0)
    if world.version == "v3":
        world.fail("stream", "500", 9)
    assert world.run() == 0
    world.check_paid()


@pytest.mark.parametrize("verb", ["balance", "upload", "submit", "status", "download"])
def test_a_server_that_stops_answering_is_left_after_the_timeout(
    live: World, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high / 50)
    verb = "stream" if (live.version, verb) == ("v3", "status") else verb
    live.fail(verb, "stall", value=0.3)
    assert live.run("--poll-interval", "0.05", HEDRA_HTTP_TIMEOUT="0.12") == 0
    live.check_paid()


@only_v3
def test_a_proxy_that_holds_the_stream_back_does_not_hang_the_clip(live: World) -> None:
    live.fail("stream", "buffer", 9, value=0.5)
    assert live.run("--poll-interval", "0.05", HEDRA_HTTP_TIMEOUT="0.2") == 0
    live.check_paid()
    assert live.verbs.count("stream") == 1


def test_assets_that_hedra_forgot_are_uploaded_again_once(world: World) -> None:
    assert world.run() == 0
    world.box.forget_assets()
    before = len(world.verbs)
    assert world.run(wav=write_wav(world.folder / "two.wav", seed=2)) == 0
    assert len(world.box.paid) == 2
    assert world.verbs[before:].count("upload") == 2
    before = len(world.verbs)
    assert world.run(wav=write_wav(world.folder / "three.wav", seed=3)) == 0
    assert world.verbs[before:].count("upload") == 1


def test_assets_that_are_refused_for_ever_are_not_uploaded_for_ever(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(number: int) -> None:
        if is_submit(world.sent[number - 1]):
            world.box.forget_assets()

    world.before.append(forget)
    assert world.run() == 1
    assert world.verbs.count("upload") <= 4
    assert world.box.paid == []
    world.before.clear()
    assert world.run() == 0
    world.check_paid()


@only_v2
def test_a_remembered_model_that_is_gone_is_looked_up_afresh_once(world: World) -> None:
    assert world.run() == 0
    row = next(row for row in world.box.catalogue if row["id"] == CHARACTER_3)
    row.update(id=UUID, slug="together/new-character-3")
    before = len(world.verbs)
    assert world.run(wav=write_wav(world.folder / "two.wav", seed=2)) == 0
    assert len(world.box.paid) == 2
    assert world.box.paid[1].model == "together/new-character-3"
    assert world.verbs[before:].count("price") == 1


@only_v3
def test_handles_that_lapse_are_uploaded_again_and_the_same_key_pays_once(
    world: World, clock: Any
) -> None:
    world.fail("submit", "reset-after", 99)
    assert world.run() == 1
    world.heal()
    clock.tick(2 * 3600)
    before = len(world.verbs)
    assert world.run() == 0
    assert world.verbs[before:].count("upload") == 2
    world.check_paid()
    bodies = [json.loads(sent.body) for sent in world.sent if is_submit(sent)]
    assert len({body["idempotency_key"] for body in bodies}) == 1
    assert len({body["input"]["audio"]["url"] for body in bodies}) == 2


@only_v3
def test_a_handle_is_not_used_when_it_is_about_to_lapse(world: World, clock: Any) -> None:
    assert world.run() == 0
    clock.tick(3590)
    before = len(world.verbs)
    assert world.run(wav=write_wav(world.folder / "two.wav", seed=2)) == 0
    assert world.verbs[before:].count("upload") == 2
    assert world.verbs[before:].count("submit") == 1


@only_v3
def test_field_details_and_trace_id_of_a_refused_submit_are_shown(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.catalogue = [r for r in world.box.catalogue if "character" not in r["slug"]]
    assert world.run() == 1
    told = capsys.readouterr().err
    assert "hedra-character-3' not found" in told
    assert "trace id" in told


# -----------------------------------------------------------------------------
# pay once: reruns
# -----------------------------------------------------------------------------


def test_a_rerun_over_a_finished_clip_asks_nothing_and_renews_the_videos_time(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run() == 0
    os.utime(world.target, (1, 1))
    count = len(world.sent)
    capsys.readouterr()
    assert world.run() == 0
    assert len(world.sent) == count
    assert world.target.stat().st_mtime > 1_000_000
    assert capsys.readouterr().out == "output/hello.mp4\n"
    world.check_paid()


def test_a_video_that_was_deleted_is_downloaded_again(world: World) -> None:
    assert world.run() == 0
    world.target.unlink()
    before = len(world.verbs)
    assert world.run() == 0
    world.check_paid()
    assert not {"upload", "submit", "create"} & set(world.verbs[before:])


@pytest.mark.parametrize("content", [b"", b"\0\0\0\x18ftypmp42" + bytes(VIDEO_BYTES), b"x" * 99])
def test_a_video_that_was_damaged_is_downloaded_again(world: World, content: bytes) -> None:
    assert world.run() == 0
    world.target.write_bytes(content)
    assert world.run() == 0
    world.check_paid()


def test_a_ledger_that_was_deleted_still_finds_the_clip(world: World) -> None:
    assert world.run() == 0
    shutil.rmtree(".cache")
    world.target.unlink()
    assert world.run() == 0
    world.check_paid()


@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "list"])
@pytest.mark.parametrize("video", ["there", "gone"])
def test_a_damaged_record_is_set_aside_with_a_warning_and_pays_nothing(
    world: World, capsys: pytest.CaptureFixture[str], damage: str, video: str
) -> None:
    assert world.run() == 0
    (record,) = world.records()
    raw = record.read_bytes()
    damaged = {"cut": raw[: len(raw) // 2], "empty": b"", "binary": b"\xff\0\xfe", "list": b"[]"}
    record.write_bytes(damaged[damage])
    if video == "gone":
        world.target.unlink()
    capsys.readouterr()
    assert world.run() == 0
    world.check_paid()
    told = capsys.readouterr()
    assert "damaged" in told.err
    assert told.out == "output/hello.mp4\n"
    assert len(list(record.parent.glob("*damaged*"))) == 1


@pytest.mark.parametrize("name", ["digests", "model_id", "assets/*.json"])
@pytest.mark.parametrize("text", ["", "nonsense\n\0 x y z"])
def test_any_other_damage_to_the_cache_pays_nothing(world: World, name: str, text: str) -> None:
    assert world.run() == 0
    for path in Path(".cache").glob(name):
        path.write_text(text)
    assert world.run() == 0
    world.check_paid()
    assert world.run(wav=write_wav(world.folder / "two.wav", seed=2)) == 0
    assert len(world.box.paid) == 2


def test_a_damaged_record_of_a_forced_take_pays_nothing(world: World) -> None:
    assert [world.run(), world.run("--force")] == [0, 0]
    (record,) = world.records()
    raw = record.read_bytes()
    record.write_bytes(raw[: len(raw) - 5])
    world.target.unlink()
    assert world.run() == 0
    world.check_paid(2)


@only_v2
def test_a_damaged_record_pays_nothing_even_where_the_reserved_id_was_ignored(
    world: World,
) -> None:
    world.box.ignore_reserved_id = True
    assert world.run() == 0
    (record,) = world.records()
    record.write_bytes(record.read_bytes()[:-5])
    world.target.unlink()
    assert world.run() == 0
    world.check_paid()


def test_a_clip_in_flight_at_the_timeout_is_waited_for_by_the_rerun(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.render_seconds = 2400.0
    if world.version == "v3":
        world.fail("stream", "404", 99)
    assert world.run() == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "not lost" in told
    assert world.box.paid[0].id in told
    assert not world.target.exists()
    before = len(world.verbs)
    assert world.run() == 0
    world.check_paid()
    assert not {"upload", "submit", "create"} & set(world.verbs[before:])


def test_two_outputs_of_one_clip_pay_once(world: World) -> None:
    assert [world.run("--out", "a.mp4"), world.run("--out", "b.mp4"), world.run()] == [0, 0, 0]
    world.check_paid()
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes() == world.videos()[0]
    count = len(world.sent)
    assert [world.run("--out", "a.mp4"), world.run("--out", "b.mp4"), world.run()] == [0, 0, 0]
    assert len(world.sent) == count


def test_two_clips_into_one_output_do_not_take_each_others_video(world: World) -> None:
    other = write_wav(world.folder / "other.wav", seed=9)
    assert world.run("--out", "a.mp4") == 0
    assert world.run("--out", "a.mp4", wav=other) == 0
    assert Path("a.mp4").read_bytes() == world.videos()[1]
    assert world.run("--out", "a.mp4") == 0
    assert Path("a.mp4").read_bytes() == world.videos()[0]
    assert len(world.box.paid) == 2


def test_the_ledger_is_readable_by_a_person_and_tells_no_key_and_no_address(world: World) -> None:
    assert world.run() == 0
    (record,) = world.records()
    values = json.loads(record.read_text())
    assert values["state"] == "done"
    assert values["generation_id"] == world.box.paid[0].id
    told = "".join(p.read_text(errors="replace") for p in Path(".cache").rglob("*") if p.is_file())
    assert world.key not in told
    assert world.key.partition(":")[2] not in told or world.version == "v2"
    assert "hello.wav" in told
    assert f"{world.box.paid[0].asset_id}.mp4?" not in told


# -----------------------------------------------------------------------------
# transfers
# -----------------------------------------------------------------------------


def ranges(world: World) -> list[tuple[str, str]]:
    """Range and If-Range of the downloads so far."""
    downloads = [s.headers for s in world.sent if s.port == "files"]
    return [(headers.get("range", ""), headers.get("if-range", "")) for headers in downloads]


def statuses(world: World, verb: str) -> list[int | None]:
    """The answers to a verb so far."""
    return [call.status for call in world.box.log if call.verb == verb]


def half_a_video(world: World) -> int:
    """A run that gets no further than half of the video; how many bytes that are."""
    world.fail("download", "cut")
    world.fail("download", "503", 99)
    assert world.run() == 1
    world.heal()
    (part,) = world.target.parent.glob(".*.part")
    assert not world.target.exists()
    return part.stat().st_size


def test_a_download_that_was_cut_is_resumed(world: World) -> None:
    world.fail("download", "cut")
    assert world.run() == 0
    world.check_paid()
    assert statuses(world, "download") == [200, 206]
    (first, second) = ranges(world)
    assert first == ("", "")
    half = (VIDEO_BYTES + 24) // 2
    assert second[0] == f"bytes={half}-"
    assert second[1].startswith('"')


def test_a_download_that_was_cut_again_and_again_goes_on_while_it_gets_further(
    world: World,
) -> None:
    world.fail("download", "cut", 12)
    assert world.run() == 0
    world.check_paid()
    assert world.verbs.count("download") >= 13


def test_the_next_process_takes_up_what_the_last_one_got(world: World) -> None:
    size = half_a_video(world)
    before = len(ranges(world))
    assert world.run() == 0
    world.check_paid()
    assert ranges(world)[before][0] == f"bytes={size}-"
    assert statuses(world, "download")[-1] == 206


@pytest.mark.parametrize("kind", ["ignore-range", "416"])
def test_a_server_that_will_not_go_on_where_we_were_is_begun_with_again(
    world: World, kind: str
) -> None:
    half_a_video(world)
    if kind == "416":
        (part,) = world.target.parent.glob(".*.part")
        with part.open("ab") as stream:
            stream.write(bytes(VIDEO_BYTES))
    else:
        world.fail("download", kind)
    assert world.run() == 0
    world.check_paid()
    assert statuses(world, "download")[-1] == 200


@pytest.mark.parametrize("size", [VIDEO_BYTES + 24, 2 * VIDEO_BYTES, VIDEO_BYTES // 2, 30])
def test_a_video_that_changed_meanwhile_is_never_spliced(world: World, size: int) -> None:
    half_a_video(world)
    new = b"\0\0\0\x18ftypmp42" + random.Random(size).randbytes(size - 12)
    path = world.box.root / f"{world.box.paid[0].asset_id}.mp4"
    path.write_bytes(new)
    os.utime(path, (1, 1))
    assert world.run() == 0
    world.check_paid()
    assert world.target.read_bytes() == new


@pytest.mark.parametrize("lost", ["tag", "part"])
def test_half_a_download_without_its_other_half_is_begun_again(world: World, lost: str) -> None:
    half_a_video(world)
    for path in world.target.parent.glob(".*"):
        if path.name.endswith(".part") == (lost == "part"):
            path.unlink()
    assert world.run() == 0
    world.check_paid()
    assert statuses(world, "download")[-1] == 200


def test_half_a_download_of_another_take_is_not_gone_on_with(world: World) -> None:
    half_a_video(world)
    assert world.run("--force") == 0
    world.check_paid(2)


def test_a_full_disk_keeps_the_part_and_the_rerun_needs_no_byte_more(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".mp4"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert world.run() == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in told
    assert "hello.mp4" in told
    assert "paid" in told
    assert not world.target.exists()
    assert world.run() == 0
    world.check_paid()
    assert statuses(world, "download") == [200, 416]


def test_an_address_that_expires_in_the_middle_is_replaced_by_a_fresh_one(
    world: World, clock: Any
) -> None:
    def expire(number: int) -> None:
        if len(ranges(world)) == 1:
            clock.tick(2 * world.box.url_seconds)

    world.after.append(expire)
    world.fail("download", "cut")
    assert world.run("--timeout", "99999") == 0
    world.check_paid()
    assert statuses(world, "download") == [200, 403, 206]


def test_an_expired_address_of_the_last_run_is_not_used_by_the_next(
    world: World, clock: Any
) -> None:
    half_a_video(world)
    clock.tick(2 * 3600)
    before = len(statuses(world, "download"))
    assert world.run() == 0
    world.check_paid()
    assert statuses(world, "download")[before:] == [206]


@pytest.mark.parametrize("kind", ["html", "404", "500", "502-html", "expired", "reset"])
def test_what_is_no_video_never_becomes_one(
    world: World, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    world.fail("download", kind, 99)
    assert world.run() == 1
    assert not world.target.exists()
    assert not list(world.target.parent.glob("*.mp4"))
    world.heal()
    assert world.run() == 0
    world.check_paid()


BODIES = [
    pytest.param(200, {}, b"", id="nothing"),
    pytest.param(200, {}, b"\0\0\0\x18ft", id="six bytes"),
    pytest.param(200, {}, b"<html>Just a moment...</html>", id="a page"),
    pytest.param(200, {"Content-Type": "video/mp4"}, b"<Error>no</Error>", id="a page as a video"),
    pytest.param(206, {"Content-Range": "bytes 5-9999/10000"}, MP4[5:], id="another piece"),
    pytest.param(206, {"Content-Range": "bytes 0-99/10000"}, MP4[:100], id="only a piece"),
    pytest.param(204, {}, b"", id="no content"),
    pytest.param(403, {}, MP4, id="refused"),
]


@pytest.mark.parametrize(("status", "headers", "body"), BODIES)
def test_an_answer_that_is_no_whole_video_is_an_error_and_no_file(
    clock: Any,
    server: HTTPServer,
    environ: dict[str, str],
    tmp_path: Path,
    status: int,
    headers: dict[str, str],
    body: bytes,
) -> None:
    asked: list[Request] = []

    def answer(request: Request) -> Response:
        asked.append(request)
        if len(asked) > 60:
            return Response(MP4)
        return Response(body, status, headers=headers)

    server.expect_request("/v.mp4").respond_with_handler(answer)
    reply = {"status": "complete", "url": server.url_for("/v.mp4")}
    server.expect_request("/generations/g/status").respond_with_json(reply)
    with pytest.raises(hedra.ApiError):
        hedra.wait_and_download("g", tmp_path / "out", KEY, environ=environ)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_body_shorter_than_promised_is_an_error_and_no_file(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    def short(request: Request) -> Response:
        return Response(cut([MP4], 5000), headers={"Content-Length": str(len(MP4))})

    server.expect_request("/v.mp4").respond_with_handler(short)
    reply = {"status": "complete", "url": server.url_for("/v.mp4")}
    server.expect_request("/generations/g/status").respond_with_json(reply)
    with pytest.raises(hedra.ApiError):
        hedra.wait_and_download("g", tmp_path / "out", KEY, environ=environ)
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_a_video_without_an_etag_is_never_spliced_of_two(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    """A server that honours Range, has no ETag, and another video at the second request."""
    new = MP4[:12] + bytes(reversed(MP4[12:]))
    asked: list[int] = []

    def change(request: Request) -> Response:
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        asked.append(start)
        body = MP4 if len(asked) == 1 else new[start:]
        headers = {"Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(MP4) - 1}/{len(MP4)}"
        blocks = cut([body], 5000) if len(asked) == 1 else [body]
        return Response(blocks, 206 if start else 200, headers=headers)

    server.expect_request("/v.mp4").respond_with_handler(change)
    expect_polls(server, *[{"status": "complete", "url": server.url_for("/v.mp4")}] * 3)
    assert hedra.wait_and_download("g", tmp_path, KEY, environ=environ).read_bytes() == new
    server.oneshot_handlers.clear()


def test_a_server_that_gives_less_than_was_asked_for_is_asked_for_the_rest(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    def piece(request: Request) -> Response:
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        headers = {"ETag": '"1"', "Content-Length": str(len(MP4))}
        if not start:
            return Response(cut([MP4], 3000), headers=headers)
        body = MP4[start : start + 2000]
        headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(MP4)}"
        return Response(body, 206, headers={**headers, "Content-Length": str(len(body))})

    expect_polls(server, {"status": "complete", "url": server.url_for("/v.mp4")})
    server.expect_request("/v.mp4").respond_with_handler(piece)
    assert hedra.wait_and_download("g", tmp_path, KEY, environ=environ).read_bytes() == MP4


def test_a_video_may_arrive_in_the_smallest_pieces(
    clock: Any, server: HTTPServer, environ: dict[str, str], tmp_path: Path
) -> None:
    def trickle(request: Request) -> Response:
        def blocks() -> Iterator[bytes]:
            yield MP4[:3]
            threading.Event().wait(0.05)
            yield MP4[3:]

        return Response(blocks(), headers={"Content-Length": str(len(MP4))})

    expect_polls(server, {"status": "complete", "url": server.url_for("/v.mp4")})
    server.expect_request("/v.mp4").respond_with_handler(trickle)
    assert hedra.wait_and_download("g", tmp_path, KEY, environ=environ).read_bytes() == MP4


@only_v2
@pytest.mark.parametrize("polls", [1, 3, 999])
def test_complete_without_an_address_still_gets_the_video(world: World, polls: int) -> None:
    world.box.urlless_polls = polls
    assert world.run() == 0
    world.check_paid()


def test_nothing_is_ever_seen_under_the_final_name_but_the_whole(world: World) -> None:
    seen: list[bool] = []
    world.after.append(lambda number: seen.append(world.target.exists()))
    world.fail("download", "cut", 3)
    assert world.run() == 0
    assert not any(seen)
    world.check_paid()


@only_v3
def test_outputs_that_expired_say_so_and_what_to_do(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run() == 0
    world.target.unlink()
    world.box.expired_outputs = True
    assert world.run() == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "48" in told
    assert "--force" in told
    assert len(world.box.paid) == 1


# -----------------------------------------------------------------------------
# command line: run, credits
# -----------------------------------------------------------------------------


def test_json_is_one_object_with_what_became_of_the_clip(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    one = world.box.paid[0]
    wanted = {"name": "hello", "status": "done", "path": "output/hello.mp4", "error": None}
    assert {name: told[name] for name in wanted} == wanted
    assert told["generation_id"] == one.id
    assert told["credits"] == one.cost
    assert told["unit"] == {"v2": "credits", "v3": "USD"}[world.version]


def test_a_log_has_two_to_fifteen_plain_lines_a_clip(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.render_seconds = 60.0
    assert world.run() == 0
    told = capsys.readouterr()
    assert told.out == "output/hello.mp4\n"
    lines = told.err.splitlines()
    assert 2 <= len(lines) <= 15
    assert len(set(lines)) == len(lines)
    assert all("hello" in line and line.isprintable() for line in lines)
    assert "\r" not in told.err


def test_quiet_is_silent_on_stderr_but_for_errors(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("-q") == 0
    assert capsys.readouterr() == ("output/hello.mp4\n", "")
    world.box.fail_with = {"type": "GONE", "message": "Away"}
    assert world.run("-q", "--force") == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_bars_move_and_say_what_they_are(
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_color: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", no_color)
    world.box.render_seconds = 30.0
    assert world.run(NO_COLOR=no_color) == 0
    told = capsys.readouterr()
    assert "output/hello.mp4\n" in told.out
    assert "\r" in told.err
    for words in ("portrait", "recording", "processing", "complete", "download", "100%"):
        assert words in told.err, words
    assert not (no_color and "\x1b[3" in told.err)


def test_a_dry_run_tells_price_and_balance_and_sends_nothing_that_costs(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("--dry-run") == 0
    told = capsys.readouterr().out
    price, left = {"v2": ("3", "10000 credits"), "v3": ("0.03", "$100.00")}[world.version]
    row = next(line.split() for line in told.splitlines() if line.startswith("hello"))
    assert row == ["hello", "1.0", price, "new"]
    assert left in told
    assert not {"upload", "create", "submit"} & set(world.verbs)
    assert not world.target.exists()
    assert world.run() == 0
    capsys.readouterr()
    assert world.run("--dry-run") == 0
    assert re.search(r"(?m)^hello .*done", capsys.readouterr().out)
    world.check_paid()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run"],
        ["nonsense"],
        ["run", "--wav"],
        ["run", "--wav", "x", "--resolution", "8k"],
        ["run", "--wav", "x", "--aspect-ratio", "2:1"],
        ["run", "--wav", "x", "--timeout", "0"],
        ["run", "--wav", "x", "--poll-interval", "-1"],
        ["run", "--wav", "x", "--timeout", "nan"],
        ["credits", "--min", "much"],
    ],
)
def test_wrong_usage_is_exit_status_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        hedra.main(words, environ={})
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "usage" in told.err


def spoil(world: World, what: str) -> list[str]:
    """Make a clip that cannot work; further flags for it."""
    if what == "no wav":
        world.wav.unlink()
    elif what == "empty wav":
        world.wav.write_bytes(b"")
    elif what == "cut wav":
        world.wav.write_bytes(world.wav.read_bytes()[:3000])
    elif what == "wav is text":
        world.wav.write_text("hello" * 99)
    elif what == "wav is a folder":
        world.wav.unlink()
        world.wav.mkdir()
    elif what == "no image":
        world.img.unlink()
    elif what == "image is text":
        world.img.write_text("hello" * 99)
    elif what == "image too big":
        with world.img.open("ab") as stream:
            stream.truncate(10_485_761)
    elif what == "wav too short":
        write_wav(world.wav, 0.4)
    elif what == "output is a folder":
        (world.folder / "there").mkdir()
        return ["--out", "there"]
    elif what == "output below a file":
        (world.folder / "there").write_text("")
        return ["--out", "there/x.mp4"]
    elif what == "no such prompt encoding":
        world.wav.with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    return []


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no wav", "hello.wav does not exist"),
        ("empty wav", "hello.wav is empty"),
        ("cut wav", "hello.wav is cut short"),
        ("wav is text", "hello.wav is something else"),
        ("wav is a folder", "hello.wav is not a file"),
        ("no image", "friend.png does not exist"),
        ("image is text", "friend.png is something else"),
        ("image too big", "friend.png has 10,485,761 bytes"),
        ("wav too short", "hello.wav lasts 0.40 s"),
        ("output is a folder", "there is a folder"),
        ("output below a file", "there/x.mp4 cannot be written"),
        ("no such prompt encoding", "hello.txt"),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_anything_is_sent(
    world: World, capsys: pytest.CaptureFixture[str], what: str, words: str
) -> None:
    assert world.run(*spoil(world, what)) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert words in line
    assert world.sent == []


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"HEDRA_API_KEY": ""}, "HEDRA_API_KEY"),
        ({"HEDRA_API_KEY": "sk_hedra\nsecret"}, "line break"),
        ({"HEDRA_BASE_URL": "http://api.hedra.com/v3"}, "not encrypted"),
        ({"HEDRA_BASE_URL": "nonsense"}, "HEDRA_BASE_URL"),
        ({"HEDRA_HTTP_TIMEOUT": "soon"}, "HEDRA_HTTP_TIMEOUT"),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused_by_name(
    world: World, capsys: pytest.CaptureFixture[str], environ: dict[str, str], words: str
) -> None:
    assert world.run(**environ) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert words in line
    assert "secret" not in line
    assert world.sent == []


def test_a_traceback_is_shown_only_when_asked_for(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.img.unlink()
    assert world.run() == 1
    assert "Traceback" not in capsys.readouterr().err
    assert world.run("-v") == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_key_may_stand_in_a_dotenv_file_and_the_environment_wins(world: World) -> None:
    key = world.environ.pop("HEDRA_API_KEY")
    Path(".env").write_text(f"\ufeffHEDRA_API_KEY={key}\nHEDRA_MODEL_ID=nobody/nothing\n")
    model = "together/hedra-avatar"
    assert world.run(HEDRA_MODEL_ID=model) == 0
    assert world.box.paid[0].model.endswith("hedra-avatar")
    assert world.run("--model", "together/hedra-character-3", HEDRA_MODEL_ID=model) == 0
    assert world.box.paid[1].model.endswith("character-3")


def test_a_key_in_a_dotenv_file_is_taken_as_it_stands(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"v2": "sk$HOME${X}#1", "v3": "id:$HOME${X}#1"}[world.version]
    del world.environ["HEDRA_API_KEY"]
    Path(".env").write_text(f"HEDRA_API_KEY='{odd}'\n")
    world.box.keys = {odd}
    assert world.run() == 0
    world.check_paid()


def sources(world: World) -> tuple[bytes, str]:
    """Portrait and prompt of the last generation."""
    one = world.box.paid[-1]
    return one.sources[0].read_bytes(), one.prompt


def test_portrait_and_prompt_may_lie_beside_the_recording_and_a_flag_wins(world: World) -> None:
    friend = write_png(world.folder / "fallback.png", 50)
    beside = write_png(world.wav.with_suffix(".png"), 99)
    prompt = world.wav.with_suffix(".txt")
    prompt.write_text("\ufeff nods \n")
    words = ["run", "--wav", str(world.wav)]
    environ = {**world.environ, "FRIEND_IMG": str(friend)}
    assert hedra.main(words, environ=environ) == 0
    assert sources(world) == (beside.read_bytes(), "nods")
    flags = ["--img", str(world.img), "--prompt", "waves"]
    assert hedra.main([*words, *flags], environ=environ) == 0
    assert sources(world) == (world.img.read_bytes(), "waves")
    beside.unlink()
    prompt.write_text(" \n")
    assert hedra.main(words, environ=environ) == 0
    assert sources(world) == (friend.read_bytes(), hedra.DEFAULT_PROMPT)


def test_no_portrait_anywhere_is_told_with_the_three_ways_to_give_one(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hedra.main(["run", "--wav", str(world.wav)], environ=world.environ) == 1
    told = capsys.readouterr().err
    assert all(way in told for way in ("hello.png", "--img", "FRIEND_IMG"))
    assert world.sent == []


def test_out_dir_and_out_say_where_the_video_goes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("--out-dir", "a/b") == 0
    assert world.run("--out", "c/other name.mp4") == 0
    assert capsys.readouterr().out == "a/b/hello.mp4\nc/other name.mp4\n"
    assert Path("c/other name.mp4").read_bytes() == world.videos()[0]
    assert len(world.box.paid) == 1


def test_a_cache_of_ones_own_is_used(world: World) -> None:
    assert world.run(HEDRA_CACHE_DIR="elsewhere/cache") == 0
    assert list(Path("elsewhere/cache").rglob("*.json"))
    assert not Path(".cache").exists()
    world.check_paid()


@pytest.mark.parametrize(
    "name",
    [
        'a "b" \'c\'',
        "ä ö 你好 🎬",
        "line\nbreak",
        "-dash",
        "$(touch x);`y`",
        "%s{0}",
        "a.b.c",
        "\x1b[31m",
    ],
)
def test_file_names_are_data(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    wav = write_wav(world.folder / f"{name}.wav")
    assert world.run(wav=wav) == 0
    assert (world.folder / "output" / f"{name}.mp4").read_bytes() == world.videos()[0]
    told = capsys.readouterr()
    assert f"{name}.mp4" in told.out
    assert all(line.isprintable() for line in told.err.splitlines())
    assert not Path("x").exists()


def test_the_key_is_told_to_nobody_else(
    world: World, capsys: pytest.CaptureFixture[str], files_server: HTTPServer
) -> None:
    world.box.echo_key = True
    for verb in ("price", "upload", "submit", "status", "stream", "result", "download"):
        world.fail(verb, "502-html")
    away = files_server.url_for("/away")
    world.fail("balance", "302", value=away)
    assert world.run("-vv") == 0
    world.fail("submit", "404", 9)
    assert world.run("-vv", "--force") == 1
    told = "".join(capsys.readouterr())
    told += "".join(p.read_text(errors="replace") for p in Path().rglob("*") if p.is_file())
    told += "".join(str(sent) for sent in world.sent if sent.port == "files")
    for secret in {world.key, world.key.partition(":")[2] or world.key}:
        assert secret not in told
    assert "/away" not in [sent.path for sent in world.sent]
    assert world.box.leaks == []


@pytest.mark.parametrize(
    ("flags", "status"), [([], 0), (["--min", "50"], 0), (["--min", "1e5"], 1)]
)
def test_credits_tells_the_balance_and_whether_it_is_enough(
    world: World, capsys: pytest.CaptureFixture[str], flags: list[str], status: int
) -> None:
    assert hedra.main(["credits", *flags], environ=world.environ) == status
    told = capsys.readouterr()
    assert told.out == {"v2": "10000 credits\n", "v3": "$100.00\n"}[world.version]
    assert len(told.err.splitlines()) == status
    short = {"v2": "100000 credits", "v3": "$100000.00"}[world.version]
    assert (short in told.err) == bool(status)
    assert world.verbs == ["balance"]


def test_credits_as_json_has_a_number_and_its_unit(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hedra.main(["credits", "--json"], environ=world.environ) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = {"v2": (10_000, "credits"), "v3": (100.0, "USD")}[world.version]
    assert (told["remaining"], told["unit"]) == wanted


def test_credits_shows_the_pool_of_the_workspace(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["credits", "--workspace", sandbox.WORKSPACE]
    assert hedra.main(words, environ=world.environ) == 0
    assert capsys.readouterr().out in ("10000 credits\n", "$100.00\n")


def test_a_key_of_the_other_api_is_told_as_what_it_is(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"v2": KEYS["v3"], "v3": KEYS["v2"]}[world.version]
    base = world.environ["HEDRA_BASE_URL"]
    assert world.run(HEDRA_API_KEY=other, HEDRA_BASE_URL=base) == 1
    told = capsys.readouterr().err
    assert "colon" in told or "HEDRA_BASE_URL" in told
    assert world.box.paid == []


# -----------------------------------------------------------------------------
# processes: kills, races, Ctrl-C
# -----------------------------------------------------------------------------


def spawn(world: World, *flags: str, wav: Path | None = None) -> subprocess.Popen[str]:
    """Run the command line in a process of its own."""
    words = world.words("--poll-interval", "0.05", *flags, wav=wav)
    return subprocess.Popen(
        [sys.executable, str(HERE / "hedra_avatar.py"), *words],
        cwd=world.folder,
        env={**world.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; its exit status, stdout and stderr."""
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def kill_when(world: World, arrives: Callable[[int], bool], *, carried_out: bool) -> None:
    """Run a process that is killed when the request arrives for which that is true, given its
    number; the request is then carried out all the same, or not."""
    started = threading.Event()
    process: list[subprocess.Popen[str]] = []

    def kill(number: int) -> None:
        assert started.wait(10)
        if process[0].returncode is None and arrives(number):
            process[0].kill()
            process[0].wait()
            if not carried_out:
                raise sandbox.Drop

    world.before.append(kill)
    process.append(spawn(world))
    started.set()
    status, out, _ = finish(process[0])
    world.before.clear()
    assert (status, out) == (-signal.SIGKILL, "")


MOMENTS = [("v2", moment) for moment in range(1, 11)] + [("v3", moment) for moment in range(1, 9)]


@pytest.mark.parametrize(("version", "moment"), MOMENTS)
def test_a_process_that_is_killed_has_paid_once_and_the_rerun_finishes(
    live: World, moment: int
) -> None:
    kill_when(live, lambda number: number == moment, carried_out=True)
    assert not live.target.exists()
    assert live.run("--poll-interval", "0.05") == 0
    live.check_paid()


def test_a_process_that_is_killed_before_hedra_had_its_submit_pays_once(
    live: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedra, "GRACE_S", 0.2)
    kill_when(live, lambda number: is_submit(live.sent[number - 1]), carried_out=False)
    assert json.loads(live.records()[0].read_text())["state"] == "intent"
    assert live.box.paid == []
    assert live.run("--poll-interval", "0.05") == 0
    live.check_paid()
    assert live.verbs.count("upload") == 2


@only_v2
def test_a_killed_submit_is_found_by_its_recording_where_the_reserved_id_was_ignored(
    live: World,
) -> None:
    live.box.ignore_reserved_id = True
    kill_when(live, lambda number: is_submit(live.sent[number - 1]), carried_out=True)
    assert live.run("--poll-interval", "0.05") == 0
    live.check_paid()


def test_a_process_that_is_killed_in_a_download_leaves_it_to_be_resumed(live: World) -> None:
    live.fail("download", "cut")
    kill_when(live, lambda number: len(ranges(live)) == 2, carried_out=True)
    assert live.run("--poll-interval", "0.05") == 0
    live.check_paid()
    assert ranges(live)[-1][0] == f"bytes={(VIDEO_BYTES + 24) // 2}-"
    assert statuses(live, "download")[-1] == 206


def test_four_processes_on_one_clip_pay_once_and_all_have_the_video(live: World) -> None:
    live.box.render_seconds = 0.3
    processes = [spawn(live) for _ in range(4)]
    ended = [finish(process) for process in processes]
    assert [(status, out) for status, out, _ in ended] == [(0, "output/hello.mp4\n")] * 4
    live.check_paid()
    assert live.verbs.count("upload") == 2
    assert live.verbs.count("download") == 1


def test_four_processes_with_one_portrait_upload_it_once(live: World) -> None:
    wavs = [write_wav(live.folder / f"{n}.wav", seed=n) for n in range(4)]
    processes = [spawn(live, wav=wav) for wav in wavs]
    ended = [finish(process) for process in processes]
    assert sorted((s, out) for s, out, _ in ended) == [(0, f"output/{n}.mp4\n") for n in range(4)]
    assert len(live.box.paid) == 4
    assert live.verbs.count("upload") == 5
    videos = {(live.folder / f"output/{n}.mp4").read_bytes() for n in range(4)}
    assert videos == set(live.videos())


def test_ctrl_c_exits_130_quickly_and_loses_nothing(live: World) -> None:
    live.box.render_seconds = 600.0
    waiting = threading.Event()

    def look(number: int) -> None:
        if live.box.paid and live.sent[number - 1].path.endswith(("/status", "/stream")):
            waiting.set()

    live.after.append(look)
    # A shell starts what is in its background deaf to Ctrl-C, and that would be inherited.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = spawn(live, "--poll-interval", "0.2")
    finally:
        signal.signal(signal.SIGINT, heard)
    assert waiting.wait(20)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert time.monotonic() - started < 2
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    assert "again" in err.splitlines()[-1]
    live.box.render_seconds = 0.0
    assert live.run("--poll-interval", "0.05") == 0
    live.check_paid()


@pytest.fixture
def ports(box: Sandbox) -> Iterator[sandbox.Server]:
    """The sandbox on its own two ports, which keep connections alive and count them."""
    with sandbox.serve(box) as server:
        yield server


def test_at_most_three_connections_are_open_at_once(
    ports: sandbox.Server, live: World
) -> None:
    url = {"v2": ports.url_v2, "v3": ports.url_v3}[live.version]
    live.box.latency = 0.01
    assert live.run("--poll-interval", "0.05", HEDRA_BASE_URL=url) == 0
    live.check_paid()
    assert 1 <= ports.peak_connections <= 3


def test_a_large_recording_and_a_large_video_do_not_fill_the_memory(
    ports: sandbox.Server, live: World
) -> None:
    def render(image: Path, audio: Path, out: Path, width: int, height: int) -> None:
        stub_render(image, audio, out, width, height)
        with out.open("ab") as stream:
            stream.truncate(40_000_000)

    live.box.render = render
    recording = live.folder / "large.mp3"
    with recording.open("wb") as stream:
        stream.write(b"ID3")
        stream.truncate(40_000_000)
    url = {"v2": ports.url_v2, "v3": ports.url_v3}[live.version]
    code = """
import sys, tracemalloc, hedra_avatar
tracemalloc.start()
status = hedra_avatar.main(sys.argv[1:])
print(tracemalloc.get_traced_memory()[1])
raise SystemExit(status)
"""
    words = live.words("--poll-interval", "0.05", wav=recording)
    done = python(code, *words, **{**live.environ, "HEDRA_BASE_URL": url})
    assert done.returncode == 0, done.stderr
    assert live.box.paid[0].sources[1].stat().st_size == 40_000_000
    assert (live.folder / "output/large.mp4").stat().st_size == 40_000_000
    assert int(done.stdout.splitlines()[-1]) < 12_000_000


# -----------------------------------------------------------------------------
# batch
# -----------------------------------------------------------------------------


def until(met: Callable[[], object], seconds: float = 4.0) -> None:
    """Wait until a condition holds."""
    deadline, tick = time.monotonic() + seconds, threading.Event()
    while not met():
        assert time.monotonic() < deadline, "it did not come to pass"
        tick.wait(0.01)


def fill(world: World, *names: str, where: str = "batch") -> list[Path]:
    """A folder of recordings, no two alike."""
    return [write_wav(world.folder / where / f"{n}.wav", seed=hash(n)) for n in names]


def batch(world: World, *flags: str, **environ: str) -> int:
    """Run `batch` in this process, with a portrait for those that have none; its exit status."""
    words = ["batch", "--img", str(world.img), *flags]
    return hedra.main(words, environ={**world.environ, **environ})


def outputs(world: World) -> dict[str, bytes]:
    """The videos that are there, by name."""
    return {file.stem: file.read_bytes() for file in (world.folder / "output").glob("*.mp4")}


def check_all_paid(world: World, *names: str) -> None:
    """Each of these clips paid for once, no other, and its own video there."""
    bought = {one.sources[1].read_bytes(): one for one in world.box.paid}
    assert len(bought) == len(world.box.paid) == len(names)
    assert set(outputs(world)) == set(names)
    made = [(world.box.root / f"{one.asset_id}.mp4").read_bytes() for one in world.box.paid]
    assert sorted(outputs(world).values()) == sorted(made)
    assert not list((world.folder / "output").glob(".*"))
    assert world.box.leaks == []


def costly(world: World) -> int:
    """Requests that upload something or cost money."""
    return sum(world.box.count(verb) for verb in ("create", "upload", "submit"))


QUICK = ("--poll-interval", "0.05")
ROWS = re.compile(r"(?m)^(\S+) +([\d.]*) +([\d.]*)  (\S.*)$")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_in_a_batch_what_lies_beside_a_recording_wins_over_the_flags(
    tmp_path: Path, suffix: str
) -> None:
    write_wav(tmp_path / "anna.wav")
    write_wav(tmp_path / "Ben.WAV")
    write_png(tmp_path / f"anna{suffix}")
    (tmp_path / "anna.txt").write_text("\ufeff nods\n")
    (tmp_path / "Ben.txt").write_text(" \n")
    wishes = hedra.Wishes("flag.png", "friend.png", "waves")
    (ben, anna), bad = hedra.find_clips(tmp_path, Path("out"), wishes)
    assert (anna.image.name, anna.prompt, anna.target) == (
        f"anna{suffix}",
        "nods",
        Path("out/anna.mp4"),
    )
    assert (ben.image.name, ben.prompt, ben.target) == ("flag.png", "waves", Path("out/Ben.mp4"))
    (ben, anna), _ = hedra.find_clips(tmp_path, Path("out"), hedra.Wishes("", "friend.png"))
    assert (ben.image.name, ben.prompt) == ("friend.png", hedra.DEFAULT_PROMPT)
    (anna,), (told,) = hedra.find_clips(tmp_path, Path("out"), hedra.Wishes())
    assert told.name == "Ben"
    assert all(way in told.error for way in ("Ben.png", "--img", "FRIEND_IMG"))


def test_a_batch_pays_each_clip_once_and_the_next_one_asks_for_nothing_that_costs(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    anna, *_ = fill(world, "anna", "ben", "cleo", "dora", "emil")
    own = write_png(anna.with_suffix(".png"), 99)
    anna.with_suffix(".txt").write_text("nods")
    assert batch(world, "--prompt", "waves") == 0
    names = ("anna", "ben", "cleo", "dora", "emil")
    check_all_paid(world, *names)
    asked = {one.sources[1].read_bytes(): one for one in world.box.paid}
    mine = asked.pop(anna.read_bytes())
    assert (mine.sources[0].read_bytes(), mine.prompt) == (own.read_bytes(), "nods")
    assert {one.prompt for one in asked.values()} == {"waves"}
    assert {one.sources[0].read_bytes() for one in asked.values()} == {world.img.read_bytes()}
    assert world.box.count("upload") == 5 + 2  # what they share is uploaded once
    paths = sorted(f"output/{name}.mp4" for name in names)
    assert sorted(capsys.readouterr().out.splitlines()) == paths
    before, times = costly(world), len(world.box.log)
    assert batch(world, "--prompt", "waves") == 0
    assert sorted(capsys.readouterr().out.splitlines()) == paths
    assert costly(world) == before
    assert len(world.box.log) - times <= 1  # the balance, at most
    check_all_paid(world, *names)


def test_force_pays_every_clip_of_a_batch_again(world: World) -> None:
    fill(world, "anna", "ben")
    assert batch(world) == 0
    assert batch(world, "--force") == 0
    assert len(world.box.paid) == 4
    assert sorted(outputs(world).values()) == sorted(world.videos()[2:])


def test_a_failed_clip_stops_no_other_and_is_listed_last_with_its_reason(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    anna, *_ = fill(world, "anna", "ben", "cleo", "dora", "emil")
    whole = anna.read_bytes()
    anna.write_bytes(whole[:-100])
    (world.folder / "batch/dora.txt").write_bytes(b"\xff\xfe\xfa")
    world.fail("submit", "302", skip=1, value="/elsewhere")
    assert batch(world, "--jobs", "1") == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == ["output/ben.mp4", "output/emil.mp4"]
    last = told.err.splitlines()[-3:]
    reasons = ("hedra_avatar: dora: .*UTF-8", "hedra_avatar: anna: .*cut short")
    reasons = (*reasons, "hedra_avatar: cleo: .*302")
    assert all(any(re.match(reason, line) for line in last) for reason in reasons), last
    assert "Traceback" not in told.err
    check_all_paid(world, "ben", "emil")
    anna.write_bytes(whole)
    (world.folder / "batch/dora.txt").unlink()
    assert batch(world) == 0
    check_all_paid(world, "anna", "ben", "cleo", "dora", "emil")


def test_a_generation_that_fails_stops_no_other_and_is_not_paid_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(world, "anna", "ben", "cleo")

    def refuse(number: int) -> None:
        one = list(world.box.generations.values())[-1:]
        if one and is_submit(world.sent[number - 1]) and len(world.box.generations) == 2:
            one[0].refused = {"type": "BAD_FACE", "message": "No face"}

    world.after.append(refuse)
    assert batch(world, "--jobs", "1") == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == ["output/anna.mp4", "output/cleo.mp4"]
    assert re.match("hedra_avatar: ben: .*No face", told.err.splitlines()[-1])
    assert batch(world) == 1
    assert re.match("hedra_avatar: ben: .*not paid again", capsys.readouterr().err.splitlines()[-1])
    assert len(world.box.paid) == 3


def test_a_batch_as_json_is_one_object_a_clip(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(world, "anna", "ben")[0].write_bytes(b"no sound")
    assert batch(world, "--json") == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    anna, ben = sorted(told, key=lambda row: str(row["name"]))
    (one,) = world.box.paid
    assert (anna["name"], anna["status"], ben["name"], ben["status"]) == (
        *("anna", "failed"),
        *("ben", "done"),
    )
    assert "anna.wav" in anna["error"]
    assert {key: ben[key] for key in ("path", "generation_id", "credits", "error")} == {
        "path": "output/ben.mp4",
        "generation_id": one.id,
        "credits": one.cost,
        "error": None,
    }
    assert ben["seconds"] >= 0
    assert batch(world, "--json") == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    again = next(row for row in told if row["name"] == "ben")
    assert (again["status"], again["generation_id"]) == ("done", one.id)


@pytest.mark.parametrize(
    ("version", "have", "flags", "figures"),
    [
        ("v2", 8, [], ("9 credits", "8 credits")),
        ("v3", 0.08, [], ("$0.09", "$0.08")),
        ("v2", 1000, ["--max-credits", "8"], ("9 credits", "8 credits")),
        ("v3", 1000, ["--max-credits", "0.08"], ("$0.09", "$0.08")),
    ],
)
def test_a_folder_that_costs_too_much_shows_both_figures_and_uploads_nothing(
    world: World,
    capsys: pytest.CaptureFixture[str],
    have: float,
    flags: list[str],
    figures: tuple[str, str],
) -> None:
    fill(world, "anna", "ben", "cleo")
    world.box.credits, world.box.usd = int(have), have
    assert batch(world, *flags) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert all(figure in told.err.splitlines()[-1] for figure in figures)
    assert costly(world) == 0
    assert not (world.folder / "output").exists()


def test_what_is_done_or_in_flight_does_not_count_against_the_limit(world: World) -> None:
    fill(world, "anna", "ben")
    assert batch(world) == 0
    fill(world, "cleo")
    limit = {"v2": "3", "v3": "0.03"}[world.version]
    world.box.credits, world.box.usd = 3, 0.03
    assert batch(world, "--max-credits", limit) == 0
    check_all_paid(world, "anna", "ben", "cleo")


def test_a_dry_run_of_a_folder_tells_each_clips_state_and_the_totals(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(world, "done")
    assert batch(world) == 0
    fill(world, "refused")
    world.box.fail_with = {"type": "GONE", "message": "No face"}
    assert batch(world) == 1
    world.box.fail_with = None
    fill(world, "flies")
    world.box.render_seconds = 900.0
    assert batch(world, "--timeout", "30") == 1
    fill(world, "new1", "new2", "wrong")[-1].write_bytes(b"no sound")
    before = costly(world)
    capsys.readouterr()
    assert batch(world, "--dry-run") == 1
    told = capsys.readouterr().out.partition("\n")[2]
    rows = {row[0]: row[1:] for row in ROWS.findall(told)}
    price, total = {"v2": ("3", "6"), "v3": ("0.03", "0.06")}[world.version]
    assert list(rows) == ["done", "flies", "new1", "new2", "refused", "wrong", "total"]
    assert rows["new1"] == rows["new2"] == ("1.0", price, "new")
    assert rows["done"][2] == "done"
    assert rows["flies"][2] == "in flight"
    assert rows["refused"][2].startswith("refused")
    assert rows["wrong"][2].startswith("bad: ")
    assert rows["total"][:2] == ("2.0", total)
    assert "2 new" in rows["total"][2]
    assert {"v2": "9991 credits", "v3": "$99.91"}[world.version] in rows["total"][2]
    assert costly(world) == before
    assert set(outputs(world)) == {"done"}


def test_credits_that_run_out_stop_new_submits_and_let_what_runs_finish(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"clip{n}" for n in range(9)]
    fill(world, *names)
    world.box.balance_error = 500  # so that nobody can tell before
    world.box.credits, world.box.usd = 7, 0.07
    world.box.render_seconds = 60.0
    assert batch(world, "--jobs", "3") == 1
    told = capsys.readouterr()
    assert len(world.box.paid) == 2
    assert world.box.count("submit") <= 2 + 3
    assert len(told.out.splitlines()) == len(outputs(world)) == 2
    assert "Traceback" not in told.err
    assert re.search(r"clips not sent: 7, they need about (21 credits|\$0.21)", told.err)
    for name in set(names) - set(outputs(world)):
        assert re.search(f"(?m)^hedra_avatar: {name}: ", told.err)
    world.box.credits, world.box.usd = 100, 100
    assert batch(world) == 0
    check_all_paid(world, *names)


def test_the_limits_of_the_account_slow_a_batch_down_and_fail_nothing(live: World) -> None:
    names = [f"{n:02}" for n in range(8)]
    fill(live, *names)
    live.box.render_seconds, live.box.concurrency, live.box.rate = 0.15, 3, (30, 0.3)
    assert batch(live, "--jobs", "8", "-q", *QUICK) == 0
    check_all_paid(live, *names)
    assert sum(c.verb == "upload" and c.status != 429 for c in live.box.log) == 9
    asked = [call for call in live.box.log if call.verb != "download"]
    refused = [call for call in asked if call.status == 429]
    assert refused, "the limits were not met"
    assert 3 * len(refused) < len(asked)


def test_no_thread_of_a_command_is_left_when_it_has_ended(live: World) -> None:
    """A daemon that is still at work when the interpreter ends can crash it: the exit status is
    then that of a signal, and make deletes the video."""
    assert live.run(*QUICK) == 0
    os.utime(live.wav)
    live.box.latency = 0.2
    before = set(threading.enumerate())
    assert live.run(*QUICK) == 0
    left = set(threading.enumerate()) - before
    assert [thread for thread in left if "process_request_thread" not in thread.name] == []


def test_two_recordings_of_the_same_content_are_paid_once(world: World) -> None:
    (anna,) = fill(world, "anna")
    shutil.copy(anna, anna.with_name("ben.wav"))
    assert batch(world) == 0
    assert len(world.box.paid) == 1
    assert outputs(world) == dict.fromkeys(("anna", "ben"), world.videos()[0])


def test_a_batch_takes_every_name(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    names = ['a "b" \'c\'', "ä ö 你好 🎬", "line\nbreak", "-dash", "$(touch x);`y`", "%s{0}", "a.b"]
    fill(world, *names)
    fill(world, ".hidden", "~temporary", "#emacs")
    assert batch(world, "--json") == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert {row["name"]: row["path"] for row in rows} == {n: f"output/{n}.mp4" for n in names}
    assert all(line.isprintable() for line in told.err.splitlines())
    check_all_paid(world, *names)
    assert batch(world, "--dry-run") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(names) + 2


def test_names_that_differ_by_case_are_two_clips(world: World) -> None:
    fill(world, "Hello", "hello")
    if len(os.listdir(world.folder / "batch")) == 1:
        pytest.skip("this file system does not tell them apart")
    write_png(world.folder / "batch/Hello.png", 7)
    write_png(world.folder / "batch/hello.png", 8)
    assert batch(world) == 0
    check_all_paid(world, "Hello", "hello")
    images = {one.sources[1].read_bytes(): one.sources[0] for one in world.box.paid}
    for name in ("Hello", "hello"):
        wav, png = (world.folder / f"batch/{name}{kind}" for kind in (".wav", ".png"))
        assert images[wav.read_bytes()].read_bytes() == png.read_bytes()


@pytest.mark.parametrize(("there", "status"), [(True, 0), (False, 1)])
def test_an_empty_folder_is_nothing_to_do_and_a_missing_one_is_an_error(
    world: World, capsys: pytest.CaptureFixture[str], there: bool, status: int
) -> None:
    (world.folder / "batch").mkdir() if there else None
    assert batch(world) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert "batch" in told.err
    assert world.verbs == []


@only_v3
def test_hundreds_of_jobs_share_one_portrait_and_one_process(
    ports: sandbox.Server, live: World
) -> None:
    names = [f"{n:03}" for n in range(120)]
    for name in names:
        write_wav(live.folder / f"batch/{name}.wav", 0.5, seed=int(name))
    url = {"v2": ports.url_v2, "v3": ports.url_v3}[live.version]
    assert batch(live, "--jobs", "200", "-q", *QUICK, HEDRA_BASE_URL=url) == 0
    check_all_paid(live, *names)
    assert live.box.count("upload") == 121


def test_a_batch_opens_no_more_connections_than_it_has_jobs(
    ports: sandbox.Server, live: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, peak, mine = urllib3.connection.HTTPConnection, 0, set[Any]()
    connect, close = kind.connect, kind.close
    url = {"v2": ports.url_v2, "v3": ports.url_v3}[live.version]

    def connected(self: Any) -> None:
        nonlocal peak
        connect(self)
        if self.port == urlsplit(url).port:
            mine.add(self)
            peak = max(peak, len(mine))

    def closed(self: Any) -> None:
        mine.discard(self)
        close(self)

    monkeypatch.setattr(kind, "connect", connected)
    monkeypatch.setattr(kind, "close", closed)
    names = [f"{n:02}" for n in range(8)]
    fill(live, *names)
    live.box.latency = 0.01
    assert batch(live, "--jobs", "4", "-q", *QUICK, HEDRA_BASE_URL=url) == 0
    check_all_paid(live, *names)
    assert 1 < peak <= 4


def start(world: World, *words: str, **environ: str) -> subprocess.Popen[str]:
    """Start any command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hedra_avatar", *words],
        cwd=world.folder,
        env={**world.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_batches_at_once_pay_each_clip_once(live: World) -> None:
    names = ("anna", "ben", "cleo", "dora")
    fill(live, *names)
    live.box.render_seconds = 0.2
    words = ("batch", "--img", "friend.png", *QUICK)
    ended = [finish(process) for process in (start(live, *words), start(live, *words))]
    for status, out, _ in ended:
        assert status == 0
        assert sorted(out.splitlines()) == [f"output/{name}.mp4" for name in names]
    check_all_paid(live, *names)
    assert live.box.count("upload") == 5
    assert live.box.count("download") == 4


def test_ctrl_c_ends_a_batch_quickly_and_says_that_a_rerun_takes_up(live: World) -> None:
    fill(live, "anna", "ben", "cleo")
    live.box.render_seconds = 600.0
    all_sent = threading.Event()
    live.after.append(lambda number: len(live.box.paid) == 2 and all_sent.set())
    process = start(live, "batch", "--img", "friend.png", "--jobs", "2")
    assert all_sent.wait(20)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert time.monotonic() - started < 2
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    assert "again" in err.splitlines()[-1]
    live.box.render_seconds = 0.0
    assert batch(live, *QUICK) == 0
    check_all_paid(live, "anna", "ben", "cleo")


def test_the_pace_slows_down_when_refused_and_recovers(clock: Any) -> None:
    governor = hedra.Governor()
    for _ in range(10):
        assert governor.pace(time.sleep) == time.monotonic()
        governor.accepted()
    assert clock.naps == []
    sent = governor.pace(time.sleep)
    refused = hedra.RateLimited("slow down", status=429, retry_after=2.0)
    refused.sent_at = sent
    clock.tick(0.1)
    governor.too_fast(refused)
    gap = governor.gap_s
    assert gap == pytest.approx(1.1 / 10)
    governor.too_fast(refused)  # of the same burst
    assert governor.gap_s == gap
    first = governor.pace(time.sleep)
    assert first - sent == pytest.approx(2.1)
    assert governor.pace(time.sleep) - first == pytest.approx(gap)
    refused.sent_at = time.monotonic()
    governor.too_fast(refused)
    assert governor.gap_s == pytest.approx(1.2 * gap)
    for _ in range(20):
        slow = governor.gap_s
        governor.accepted()
        assert governor.gap_s < slow
    for _ in range(5000):
        governor.accepted()
    assert governor.gap_s == 0.0
    for _ in range(99):
        refused.sent_at = time.monotonic()
        governor.too_fast(refused)
        clock.tick(1.0)
    assert governor.gap_s == 5.0


@pytest.mark.parametrize(
    ("steps", "limit"),
    [
        ("begin take grow give-running", 5),
        ("begin take give-refused leave", 4),
        ("begin leave", 4),
        ("resume give-running", 4),
        ("begin take give-refused take grow give-running", 5),
        ("begin begin take grow take grow give-running give-running", 6),
        ("begin take grow begin take too-many give-refused leave give-running", 1),
        ("too-many begin take grow begin take grow give-running give-running", 2.5),
    ],
)
def test_the_places_among_the_generations_in_flight_are_given_back(
    steps: str, limit: float
) -> None:
    governor = hedra.Governor()
    meaning: dict[str, Callable[[], object]] = {
        "begin": governor.begin,
        "take": governor.take,
        "resume": lambda: governor.take(resumed=True),
        "grow": governor.grow,
        "leave": governor.leave,
        "give-running": lambda: governor.give(running=True),
        "give-refused": lambda: governor.give(running=False),
        "too-many": governor.too_many,
    }
    for step in steps.split():
        meaning[step]()
    assert (governor.ready, governor.active, governor.running) == (0, 0, 0)
    assert governor.limit == limit


def test_a_clip_waits_for_a_place_and_stops_waiting_when_the_program_stops() -> None:
    governor = hedra.Governor()
    governor.too_many()
    governor.begin()
    governor.take()
    governor.begin()
    got: list[str] = []

    def wait() -> None:
        try:
            governor.take()
            got.append("a place")
            governor.take()
        except hedra.Stopped:
            got.append("stopped")

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.02)
    assert got == []
    governor.give(running=False)
    until(lambda: got == ["a place"])
    governor.stop()
    thread.join(5)
    assert got == ["a place", "stopped"]
    with pytest.raises(hedra.Stopped):
        governor.begin()


def test_the_records_of_the_governor_are_even_after_a_batch_that_fails_in_all_ways(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[hedra.Governor] = []
    start = hedra.Governor.__init__
    monkeypatch.setattr(
        hedra.Governor, "__init__", lambda self: (made.append(self), start(self))[0]
    )
    fill(world, *(f"{n:02}" for n in range(12)))
    world.box.concurrency, world.box.render_seconds = 3, 20.0
    world.fail("submit", "404", skip=1)
    world.fail("submit", "reset-after", skip=3)
    world.fail("submit", "500", skip=4)
    world.fail("upload", "404", skip=5)
    world.fail("status", "404", skip=30)
    world.fail("download", "404", 9)
    assert batch(world, "--jobs", "6") == 1
    for governor in made:
        assert (governor.ready, governor.active, governor.running) == (0, 0, 0)
    world.heal()
    assert batch(world, "--jobs", "6") == 0
    check_all_paid(world, *(f"{n:02}" for n in range(12)))


# -----------------------------------------------------------------------------
# Makefile
# -----------------------------------------------------------------------------

MAKE = shutil.which("make") or ""
needs_make = pytest.mark.skipif(not MAKE, reason="make is not installed")


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that somebody copies, the module compiled once for all tests."""
    folder = tmp_path_factory.mktemp("kit")
    for name in ("Makefile", "hedra_avatar.py"):
        shutil.copy2(HERE / name, folder)
    py_compile.compile(str(folder / "hedra_avatar.py"), doraise=True)
    (folder / "runner").write_text('#!/bin/sh\necho "$*" >>started.log\nexec "$@"\n')
    (folder / "runner").chmod(0o755)
    return folder


@pytest.fixture
def shop(live: World, kit: Path) -> World:
    """The world in real time, with a Makefile."""
    shutil.copytree(kit, live.folder, dirs_exist_ok=True)
    return live


def make(world: World, *words: str, **environ: str) -> tuple[int, str, list[str]]:
    """Run make; its exit status, all that it printed, and the commands that it started."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS", "COV"))}
    for name in ("IMG", "PYTHON", "ARGS", "OUT", "IN", "RUNNER", "WAV", "GNUMAKEFLAGS"):
        clean.pop(name, None)
    log = world.folder / "started.log"
    log.unlink(missing_ok=True)
    options = [f"PYTHON={sys.executable}", "RUNNER=./runner", "ARGS=--poll-interval 0.05"]
    done = subprocess.run(
        [MAKE, *options, *words],
        cwd=world.folder,
        env={**clean, **world.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert world.key not in done.stdout
    started = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout, started


def age(*files: Path) -> None:
    """Let files be older than whatever is made from now on, on any file system."""
    past = time.time() - 100
    for file in files:
        os.utime(file, (past, past))


@needs_make
def test_make_builds_every_clip_once_and_then_only_what_changed(shop: World) -> None:
    anna, ben, cleo = fill(shop, "anna", "ben", "cleo")
    own = write_png(anna.with_suffix(".png"), 99)
    prompt = ben.with_suffix(".txt")
    prompt.write_text("waves")
    age(anna, ben, cleo, own, prompt, shop.img)
    status, out, started = make(shop, "-j4", "IMG=friend.png")
    assert (status, len(started)) == (0, 3), out
    check_all_paid(shop, "anna", "ben", "cleo")
    assert shop.box.count("upload") == 5  # three recordings, two portraits
    sources = {one.sources[1].read_bytes(): one for one in shop.box.paid}
    assert sources[anna.read_bytes()].sources[0].read_bytes() == own.read_bytes()
    assert sources[cleo.read_bytes()].sources[0].read_bytes() == shop.img.read_bytes()
    assert sources[ben.read_bytes()].prompt == "waves"

    asked = costly(shop)
    assert make(shop, "-j4", "IMG=friend.png")[::2] == (0, [])
    os.utime(cleo)  # touched, and the same
    status, out, started = make(shop, "IMG=friend.png")
    assert (status, len(started)) == (0, 1), out
    assert make(shop, "IMG=friend.png")[::2] == (0, []), out
    assert costly(shop) == asked

    for paid, change in enumerate(
        (
            lambda: write_wav(anna, seed=50),
            lambda: write_png(own, 51),
            lambda: prompt.write_text("nods"),
            lambda: write_png(cleo.with_suffix(".png"), 52),
        ),
        start=4,
    ):
        change()
        status, out, started = make(shop, "IMG=friend.png")
        assert (status, len(started), len(shop.box.paid)) == (0, 1, paid), out
        assert shop.videos()[-1] in outputs(shop).values()


@needs_make
@only_v2
def test_a_changed_shared_portrait_builds_the_clips_that_use_it(shop: World) -> None:
    anna, ben = fill(shop, "anna", "ben")
    age(anna, ben, shop.img, write_png(anna.with_suffix(".png"), 99))
    assert make(shop, FRIEND_IMG="friend.png")[0] == 0
    write_png(shop.img, 33)
    status, _, started = make(shop, FRIEND_IMG="friend.png")
    assert (status, len(started), len(shop.box.paid)) == (0, 1, 3)


@needs_make
@only_v3
def test_make_keeps_going_and_leaves_nothing_half_done(shop: World) -> None:
    anna, ben, *_ = fill(shop, "anna", "ben", "cleo", "d e")
    anna.write_bytes(anna.read_bytes()[:-100])
    shop.fail("submit", "302", value="/elsewhere")
    status, out, _ = make(shop, "-k", "IMG=friend.png")
    assert (status, list(outputs(shop))) == (2, ["cleo"])
    assert "Traceback" not in out
    status, out, started = make(shop, "-k", "-j2", "IMG=friend.png")
    assert (status, len(started)) == (2, 2)
    assert "anna.wav" in out
    odd = next(line for line in out.splitlines() if "d e" in line)
    assert "batch" in odd
    check_all_paid(shop, "ben", "cleo")
    assert sorted(os.listdir(shop.folder / "output")) == ["ben.mp4", "cleo.mp4"]


@needs_make
@only_v2
def test_names_that_make_cannot_take_are_told_and_left_to_batch(shop: World) -> None:
    names = ["with blank", "semi;colon", "a#b", "per%cent", "co:lon", "st*r", "d$(x)", "it's"]
    fill(shop, "anna", *names)
    status, out, started = make(shop, "-j4", "IMG=friend.png")
    assert status == 0, out
    told = next(line for line in out.splitlines() if "batch" in line and "with blank" in line)
    built = set(outputs(shop))
    assert "anna" in built
    assert len(started) == len(built) == len(shop.box.paid)
    for name in set(names) - built:
        assert name in told
    assert batch(shop, *QUICK) == 0
    check_all_paid(shop, "anna", *names)


@needs_make
@only_v2
def test_what_make_shows_holds_no_key_and_does_nothing_by_itself(shop: World) -> None:
    fill(shop, "anna", "ben")
    status, out, started = make(shop, "-n", "IMG=friend.png")  # make() looks for the key
    assert (status, started, shop.sent) == (0, [], [])
    assert out.count("./runner") == 2
    assert not (shop.folder / "output").exists()
    text = (HERE / "Makefile").read_text()
    status, out, _ = make(shop, "help")
    told = set(re.findall(r"(?m)^  make (\S+) +\S", out))
    assert status == 0
    assert told == set(re.findall(r"(?m)^([a-z-]+):.*## ", text))
    wanted = "all help install run watch credits demo sandbox lint test clean"
    assert told >= set(wanted.split())
    assert all(name in out for name in ("IMG", "ARGS", "PYTHON", "OUT", "IN", "RUNNER"))


@needs_make
@only_v3
def test_the_targets_for_one_clip_and_for_the_balance_call_the_program(shop: World) -> None:
    status, out, _ = make(shop, "run", "WAV=hello.wav", "IMG=friend.png", "OUT=else where")
    assert (status, "batch" in out) == (2, True)
    status, out, _ = make(shop, "run", "WAV=hello.wav", "IMG=friend.png", "OUT=elsewhere")
    assert status == 0, out
    assert "elsewhere/hello.mp4" in out.splitlines()
    status, out, _ = make(shop, "credits", "ARGS=--json")
    assert json.loads(out.splitlines()[-1])["unit"] == "USD"
    status, out, _ = make(shop, "credits", "ARGS=--min 1000")
    assert (status, "Traceback" in out) == (2, False)
    for name in ("output/x.mp4", ".cache/clips/x.json", "batch/x.wav", ".mypy_cache/x"):
        (shop.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shop.folder / name).touch()
    assert make(shop, "clean")[0] == 0
    assert not (shop.folder / ".mypy_cache").exists()
    for name in ("output/x.mp4", ".cache/clips/x.json", "batch/x.wav"):
        assert (shop.folder / name).exists()


@needs_make
@only_v2
def test_a_make_that_is_killed_leaves_nothing_half_done_and_goes_on_later(shop: World) -> None:
    (wav,) = fill(shop, "anna")
    age(wav, shop.img)
    shop.box.render_seconds = 600.0
    paid = threading.Event()
    shop.after.append(lambda number: shop.box.paid and paid.set())
    words = [MAKE, f"PYTHON={sys.executable}", "IMG=friend.png", "ARGS=--poll-interval 0.05"]
    environ = {**shop.environ, "PATH": os.environ["PATH"]}
    process = subprocess.Popen(
        words, cwd=shop.folder, env=environ, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert paid.wait(20)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) != 0
    assert not list((shop.folder / "output").glob("*.mp4"))
    shop.box.render_seconds = 0.0
    assert make(shop, "IMG=friend.png")[0] == 0
    check_all_paid(shop, "anna")


# -----------------------------------------------------------------------------
# watch
# -----------------------------------------------------------------------------


class Watch:
    """A watcher with a real Observer on a real folder, in threads; a context."""

    def __init__(self, world: World, told: io.StringIO | None = None) -> None:
        self.world, self.folder = world, world.folder / "incoming"
        self.out, self.told = io.StringIO(), told or io.StringIO()
        self.flags = ["--img", "friend.png", *QUICK]
        self.observer: Any = watchdog.observers.Observer

    def __call__(self, *flags: str) -> Watch:
        self.flags += flags
        return self

    def __enter__(self) -> Watch:
        """As `cmd_watch` does it, with an end that a test can reach."""
        args = hedra.build_parser().parse_args(["watch", *self.flags])
        self.stop, self.view, self.ends = threading.Event(), hedra.Lines(), contextlib.ExitStack()
        self.ends.enter_context(contextlib.redirect_stderr(self.told))
        self.ends.enter_context(contextlib.redirect_stdout(self.out))
        self.studio = hedra.open_studio(
            args, self.world.environ, self.view, sleep=hedra.until(self.stop)
        )
        wishes = hedra.wishes_of(args, self.world.environ)
        where = Path("incoming"), Path("output"), wishes, args.jobs
        self.watcher = hedra.Watcher(self.studio, *where)
        self.watcher.emit = hedra.emitter(args, self.view)
        self.listening = self.observer()
        self.listening.start()
        run = functools.partial(self.watcher.run, self.listening, self.stop)
        self.thread = threading.Thread(target=run)
        self.thread.start()
        try:
            until(lambda: self.lines("watching ", "is not there"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.watcher.end(self.stop)
        self.studio.http.governor.stop()
        self.listening.stop()
        self.watcher.crew.stop(5.0)
        self.thread.join(5.0)
        self.listening.join(5.0)
        self.ends.close()

    def lines(self, *words: str) -> list[str]:
        """The lines of the log that have one of these words in them."""
        said = self.told.getvalue().splitlines()
        return [line for line in said if any(word in line for word in words)]

    def until(self, met: Callable[[], object]) -> None:
        """Wait for a condition, and have the watcher turn round meanwhile."""

        def nudge() -> object:
            self.watcher.wake.set()
            return met()

        until(nudge)

    def wait_for(self, *names: str) -> None:
        """Until these clips are done."""
        self.until(lambda: all(self.lines(f" {name}: done") for name in names))

    def wait_settled(self, name: str) -> None:
        """Until the watcher has made up its mind about a file as it is now."""
        file = self.folder / name
        self.until(lambda: self.watcher.seen.get(name, "").startswith(hedra.signature(file)))
        self.until(lambda: name not in self.watcher.busy)


@pytest.fixture
def watch(live: World, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watcher of an empty folder, and quick about it."""
    monkeypatch.setattr(hedra, "STILL_S", 0.05)
    monkeypatch.setattr(hedra, "OUTAGE_S", (0.02, 0.05))
    (live.folder / "incoming").mkdir()
    return Watch(live)


def drop(world: World, *names: str, seed: int = 0) -> list[Path]:
    """Move whole recordings into the watched folder."""
    files = []
    for name in names:
        made = write_wav(world.folder / "made" / name, seed=hash(name) + seed)
        files.append(world.folder / "incoming" / name)
        made.rename(files[-1])
    return files


@pytest.mark.parametrize("way", ["write", "copy", "rename"])
@only_v3
def test_a_recording_that_was_closed_or_renamed_is_taken_at_once(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(hedra, "STILL_S", 600.0)
    made, there = write_wav(watch.world.folder / "made.wav"), watch.folder / "anna.wav"
    with watch:
        if way == "write":
            write_wav(there)
        elif way == "copy":
            shutil.copy(made, there)
        else:
            hidden = watch.folder / ".anna.wav.x7"
            shutil.copy(made, hidden)
            hidden.rename(there)
        watch.wait_for("anna")
    check_all_paid(watch.world, "anna")


def test_a_dropped_recording_becomes_a_video_and_its_path_is_told(watch: Watch) -> None:
    with watch("--prompt", "waves"):
        write_png(watch.folder / "anna.png", 77)
        (watch.folder / "anna.txt").write_text("nods")
        drop(watch.world, "anna.wav", "Ben.WAV")
        watch.wait_for("anna", "Ben")
    check_all_paid(watch.world, "anna", "Ben")
    assert {one.prompt for one in watch.world.box.paid} == {"nods", "waves"}
    paths = sorted(watch.out.getvalue().splitlines())
    assert paths == ["output/Ben.mp4", "output/anna.mp4"]
    lines = watch.lines("anna: ")
    assert 2 <= len(lines) == len(set(lines)) <= 15


@only_v2
def test_a_slow_writer_that_pauses_is_waited_for_and_said_once(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedra, "STUCK_S", 0.2)
    monkeypatch.setattr(hedra, "RESCAN_S", 0.05)
    whole = write_wav(watch.world.folder / "made.wav").read_bytes()
    slow = watch.folder / "slow.wav"
    with watch, slow.open("wb", buffering=0) as stream:
        stream.write(whole[:30])  # not even a header
        watch.until(lambda: watch.lines("slow.wav: not taken"))
        for start in range(30, 4030, 1000):
            stream.write(whole[start : start + 1000])
        watch.until(lambda: len(watch.lines("slow.wav: not taken")) == 2)
        drop(watch.world, "other.wav")
        watch.wait_for("other")
        assert watch.world.box.count("submit") == 1
        stream.write(whole[4030:])
        watch.wait_for("slow")  # though it has not been closed
    assert len(watch.lines("slow.wav: not taken")) == 2
    check_all_paid(watch.world, "other", "slow")
    assert watch.world.box.paid[1].sources[1].read_bytes() == whole


@only_v3
def test_a_writer_that_is_merely_slow_is_no_news(watch: Watch) -> None:
    whole = write_wav(watch.world.folder / "made.wav").read_bytes()
    slow = watch.folder / "slow.wav"
    with watch:
        with slow.open("wb", buffering=0) as stream:
            for start in range(0, len(whole), 1500):
                stream.write(whole[start : start + 1500])
                threading.Event().wait(0.06)
        watch.wait_for("slow")
    assert watch.lines("not taken") == []
    check_all_paid(watch.world, "slow")
    assert watch.world.box.paid[0].sources[1].read_bytes() == whole


@only_v2
def test_temporary_hidden_and_other_files_and_subfolders_are_left_alone(watch: Watch) -> None:
    odd = (".hidden.wav", "~lock.wav", "#auto#.wav", "a.wav.part", "a.wav~", "a.mp3", "4913")
    sub = watch.folder / "sub.wav"
    sub.mkdir()
    write_wav(watch.folder / "before/x.wav")
    with watch:
        drop(watch.world, *odd)
        shutil.copy(watch.world.wav, sub / "deep.wav")
        write_wav(watch.folder / "during/x.wav")
        drop(watch.world, "z.wav")
        watch.wait_for("z")
    check_all_paid(watch.world, "z")
    assert watch.lines(*odd, "deep", "x.wav") == []


@only_v2
def test_what_lay_there_before_is_done_first(watch: Watch) -> None:
    before = drop(watch.world, "x.wav", "y.wav", "z.wav")
    age(*before)
    with watch("--jobs", "1"):
        last = write_wav(watch.folder / "a.wav", seed=9)
        watch.wait_for("a", "x", "y", "z")
    order = [one.sources[1].read_bytes() for one in watch.world.box.paid]
    assert order == [file.read_bytes() for file in (*before, last)]


def test_events_touches_and_restarts_cost_nothing_and_new_content_is_a_new_clip(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedra, "RESCAN_S", 0.05)
    with watch:
        (anna,) = drop(watch.world, "anna.wav")
        for _ in range(5):
            os.utime(anna)
        watch.wait_for("anna")
        watch.wait_settled("anna.wav")
        for again in (lambda: os.utime(anna), lambda: anna.write_bytes(anna.read_bytes())):
            again()
            watch.wait_settled("anna.wav")
        other = anna.with_name("tmp")
        shutil.copy(anna, other)
        other.rename(anna)
        watch.wait_settled("anna.wav")
    asked = len(watch.world.sent)
    with Watch(watch.world, watch.told) as second:
        second.wait_settled("anna.wav")
        assert costly(watch.world) == 3 + (watch.world.version == "v2") * 2
        assert watch.world.box.count("download") == 1
        assert len(watch.world.sent) == asked
        first = outputs(watch.world)
        drop(watch.world, "anna.wav", seed=1)
        second.until(lambda: len(second.lines("anna: done")) == 2)
    assert len(watch.world.box.paid) == 2
    assert outputs(watch.world) == {"anna": watch.world.videos()[1]} != first


@only_v2
def test_a_bad_file_is_told_once_and_looked_at_again_when_it_changes(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedra, "RESCAN_S", 0.02)
    bad = watch.folder / "bad.wav"
    bad.write_bytes(b"no sound at all" * 9)
    with watch:
        drop(watch.world, "good.wav")
        watch.wait_for("good")
        drop(watch.world, "more.wav")
        watch.wait_for("more")
        (line,) = watch.lines("bad.wav")
        assert "not taken" in line
        assert bad.exists()
        drop(watch.world, "bad.wav")
        watch.wait_for("bad")
    check_all_paid(watch.world, "bad", "good", "more")


@only_v3
def test_a_recording_without_a_portrait_is_told_and_taken_when_it_comes(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedra, "RESCAN_S", 0.02)
    watch.flags = [*QUICK]
    with watch:
        drop(watch.world, "anna.wav")
        watch.until(lambda: watch.lines("anna.png"))
        drop(watch.world, "ben.wav")
        watch.until(lambda: watch.lines("ben.png"))
        assert watch.world.sent == []
        write_png(watch.folder / "anna.png", 55)
        watch.wait_for("anna")
    assert len(watch.lines("anna.png")) == len(watch.lines("ben.png")) == 1
    check_all_paid(watch.world, "anna")


@only_v2
def test_a_portrait_or_prompt_that_changes_makes_a_new_clip(watch: Watch) -> None:
    with watch:
        portrait = write_png(watch.folder / "anna.png", 1)
        drop(watch.world, "anna.wav")
        watch.wait_for("anna")
        write_png(portrait, 2)
        watch.until(lambda: len(watch.lines("anna: done")) == 2)
        (watch.folder / "anna.txt").write_text("nods")
        watch.until(lambda: len(watch.lines("anna: done")) == 3)
    assert len(watch.world.box.paid) == 3
    last = watch.world.box.paid[-1]
    assert (last.sources[0].read_bytes(), last.prompt) == (portrait.read_bytes(), "nods")


def test_a_clip_that_fails_does_not_end_the_watcher(watch: Watch) -> None:
    watch.world.box.fail_with = {"type": "GONE", "message": "No face"}
    with watch:
        drop(watch.world, "anna.wav")
        watch.until(lambda: watch.lines("anna: failed"))
        watch.world.box.fail_with = None
        drop(watch.world, "ben.wav")
        watch.wait_for("ben")
    (line,) = watch.lines("No face")
    assert "anna" in line
    assert set(outputs(watch.world)) == {"ben"}
    assert len(watch.world.box.paid) == 2


@only_v2
def test_a_folder_that_is_removed_and_made_again_is_watched_again(watch: Watch) -> None:
    watch.folder.rmdir()
    with watch:
        assert len(watch.lines("is not there")) == 1
        watch.folder.mkdir()
        watch.until(lambda: watch.lines("watching "))
        drop(watch.world, "anna.wav")
        watch.wait_for("anna")
        shutil.rmtree(watch.folder)
        watch.until(lambda: len(watch.lines("is not there")) == 2)
        watch.folder.mkdir()
        drop(watch.world, "ben.wav")
        watch.wait_for("ben")
    assert len(watch.lines("watching ")) == len(watch.lines("is not there")) == 2
    check_all_paid(watch.world, "anna", "ben")


@pytest.mark.parametrize(
    ("version", "kind"), [("v2", "reset"), ("v3", "503"), ("v2", "credits"), ("v3", "credits")]
)
def test_an_outage_is_outlived_with_a_line_each_way(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(hedra, "TRIES", 1)
    monkeypatch.setattr(hedra, "SUBMIT_TRIES", 1)
    box, names = watch.world.box, ("anna", "ben", "cleo", "dora")
    box.credits, box.usd = (2, 0.02) if kind == "credits" else (100, 100.0)
    if kind != "credits":
        for verb in ("balance", "price", "models", "model", "create", "upload", "list", "status"):
            watch.world.fail(verb, kind, 10**6)
    with watch:
        drop(watch.world, "anna.wav", "ben.wav")
        watch.until(lambda: watch.lines("waiting until"))
        asked = len(watch.world.sent)
        drop(watch.world, "cleo.wav", "dora.wav")
        watch.until(lambda: len(watch.world.sent) >= asked + 4)
        quiet = watch.told.getvalue()
        watch.until(lambda: len(watch.world.sent) >= asked + 8)
        assert watch.told.getvalue() == quiet
        assert outputs(watch.world) == {}
        watch.world.heal()
        box.credits, box.usd = 100, 100.0
        watch.wait_for(*names)
    assert len(watch.lines("waiting until")) == len(watch.lines("going on")) == 1
    check_all_paid(watch.world, *names)


@only_v3
def test_a_generation_that_outlasts_the_timeout_is_waited_for_on(watch: Watch) -> None:
    watch.world.box.render_seconds = 0.3
    with watch("--timeout", "0.1"):
        drop(watch.world, "anna.wav")
        watch.wait_for("anna")
    check_all_paid(watch.world, "anna")


@only_v3
def test_a_burst_is_queued_and_only_so_many_are_worked_on_at_a_time(
    ports: sandbox.Server, watch: Watch
) -> None:
    names = [f"{n:02}" for n in range(50)]
    box = watch.world.box
    box.render_seconds, box.concurrency = 0.001, 2
    watch.world.environ["HEDRA_BASE_URL"] = ports.url_v3
    with watch("--jobs", "2", "--poll-interval", "0.02"):
        drop(watch.world, *(f"{name}.wav" for name in names))
        until(lambda: len(watch.lines(": done")) == 50, 10)
        assert len(watch.watcher.crew.threads) == 2
    check_all_paid(watch.world, *names)
    assert 429 not in [call.status for call in box.log]
    assert box.count("upload") == 51


@only_v3
def test_a_recording_that_comes_while_the_folder_is_being_listed_is_not_lost(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, late = hedra.folder_names, threading.Event()

    def listing(folder: Path) -> dict[str, str]:
        names = real(folder)
        if not late.is_set():
            late.set()
            drop(watch.world, "late.wav")
            until(lambda: "late.wav" in watch.watcher.touched)
        return names

    with watch:
        monkeypatch.setattr(hedra, "folder_names", listing)
        drop(watch.world, "early.wav")
        watch.wait_for("early", "late")
    check_all_paid(watch.world, "early", "late")


@only_v3
def test_a_second_watcher_and_a_batch_on_the_same_folder_are_harmless(watch: Watch) -> None:
    watch.world.box.render_seconds = 0.1
    with watch, Watch(watch.world, watch.told) as second:
        drop(watch.world, "anna.wav", "ben.wav")
        assert batch(watch.world, "incoming", *QUICK) == 0
        for one in (watch, second):
            one.wait_settled("anna.wav")
            one.wait_settled("ben.wav")
    check_all_paid(watch.world, "anna", "ben")


@only_v2
def test_polling_sees_what_comes(watch: Watch) -> None:
    polling = pytest.importorskip("watchdog.observers.polling").PollingObserver
    watch.observer = functools.partial(polling, timeout=0.02)
    with watch:
        drop(watch.world, "anna.wav")
        write_wav(watch.folder / "ben.wav", seed=9)
        watch.wait_for("anna", "ben")
    check_all_paid(watch.world, "anna", "ben")


@pytest.mark.parametrize("bad", [False, True])
def test_once_does_what_is_there_and_ends_as_batch_does(
    world: World, capsys: pytest.CaptureFixture[str], bad: bool
) -> None:
    fill(world, "anna", "ben", where="incoming")
    if bad:
        (world.folder / "incoming/cleo.wav").write_bytes(b"no sound")
    words = ["watch", "--once", "--img", "friend.png"]
    assert hedra.main(words, environ=world.environ) == int(bad)
    told = capsys.readouterr()
    assert sorted(told.out.splitlines()) == ["output/anna.mp4", "output/ben.mp4"]
    assert ("cleo" in told.err.splitlines()[-1]) == bad
    check_all_paid(world, "anna", "ben")


class Unit:
    """A watcher in a process of its own, and what it tells systemd."""

    def __init__(self, world: World, folder: Path, *flags: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(folder / "notify"))
        self.socket.settimeout(10)
        words = ("watch", "--img", "friend.png", *QUICK, *flags)
        self.process = start(world, *words, NOTIFY_SOCKET=str(folder / "notify"))
        self.told: list[str] = []

    def listen_for(self, message: str) -> None:
        """Until it has said that."""
        while message not in self.told:
            self.told += self.socket.recv(100).decode().splitlines()

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        """Send a signal; exit status, stdout and stderr, within three seconds."""
        started = time.monotonic()
        self.process.send_signal(number)
        ended = finish(self.process)
        assert time.monotonic() - started < 3
        assert "Traceback" not in ended[2]
        return ended


@pytest.fixture
def start_unit(live: World) -> Iterator[Callable[..., Unit]]:
    """Start a Unit; the path of its socket is short, as the kernel wants it."""
    units = []
    with tempfile.TemporaryDirectory(prefix="hedra") as folder, contextlib.ExitStack() as ends:

        def begin(*flags: str) -> Unit:
            (Path(folder) / "notify").unlink(missing_ok=True)
            units.append(Unit(live, Path(folder), *flags))
            return units[-1]

        yield begin
        for unit in units:
            unit.process.kill()
            unit.process.communicate()
            ends.callback(unit.socket.close)


@pytest.mark.parametrize(
    ("version", "number", "status", "flags"),
    [("v3", signal.SIGTERM, 0, ()), ("v2", signal.SIGINT, 130, ("--polling",))],
)
def test_a_watcher_that_is_stopped_ends_in_time_and_the_next_one_takes_up(
    live: World,
    start_unit: Callable[..., Unit],
    number: signal.Signals,
    status: int,
    flags: tuple[str, ...],
) -> None:
    live.box.render_seconds = 600.0
    age(*fill(live, "anna", "ben", "cleo", where="incoming"))
    unit = start_unit("--jobs", "2", *flags)
    unit.listen_for("READY=1")
    unit.listen_for("WATCHDOG=1")
    until(lambda: len(live.box.paid) == 2)
    ended = unit.end(number)
    assert ended[:2] == (status, "")
    unit.listen_for("STOPPING=1")
    assert unit.told.count("READY=1") == 1
    live.box.render_seconds = 0.0
    assert batch(live, "incoming", *QUICK) == 0
    check_all_paid(live, "anna", "ben", "cleo")


@only_v2
def test_a_watcher_that_is_killed_and_started_again_pays_once(
    live: World, start_unit: Callable[..., Unit]
) -> None:
    live.box.render_seconds = 600.0
    age(*fill(live, "anna", "ben", where="incoming"))
    unit = start_unit()
    until(lambda: len(live.box.paid) == 2)
    unit.process.kill()
    unit.process.wait()
    live.box.render_seconds = 0.0
    unit = start_unit()
    until(lambda: len(outputs(live)) == 2)
    unit.end(signal.SIGTERM)
    check_all_paid(live, "anna", "ben")


def test_what_systemd_does_not_hear_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("/nowhere/notify", "@nowhere"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        hedra.notify_systemd("READY=1")


# -----------------------------------------------------------------------------
# README
# -----------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (commands,) = (
        action
        for action in hedra.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def command_lines() -> list[list[str]]:
    """The words behind the program's name, wherever the README shows a call of it."""
    text = re.sub(r"(?m)  +#.*$", "", README)
    found = re.findall(r"(?:hedra_avatar\.py|-m hedra_avatar) +([a-z][^\n`'|>]*)", text)
    return [shlex.split(line) for line in found]


def test_every_command_line_in_the_readme_is_one_that_the_program_takes() -> None:
    lines = command_lines()
    assert {words[0] for words in lines} >= {"run", "batch", "watch", "credits"}
    for words in lines:
        hedra.build_parser().parse_args(words)


def test_every_flag_and_variable_that_is_documented_exists_and_the_reverse() -> None:
    code = (HERE / "hedra_avatar.py").read_text()
    flags = {flag for one in parsers().values() for flag in one._option_string_actions}
    foreign = {"--now", "--user"}  # of systemctl
    example = (HERE / ".env.example").read_text()
    for text in (README, example, str(hedra.__doc__)):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags | foreign
    variables = set(re.findall(r"\b(?:HEDRA_[A-Z_]+|FRIEND_IMG)\b", code))
    for text in (README, example):
        told = set(re.findall(r"\b(?:HEDRA_[A-Z_]+|FRIEND_IMG)\b", text))
        assert told == variables
    shown = "".join(one.format_help() for one in parsers().values())
    assert all(flag in shown for flag in flags)


def test_the_exit_statuses_of_the_readme_are_those_of_the_help() -> None:
    told = set(re.findall(r"(?m)^\| (\d+) \|", README))
    assert told == {"0", "1", "2", "130"}
    assert told <= set(re.findall(r"\d+", str(hedra.build_parser().epilog)))


def test_every_make_target_and_variable_in_the_readme_exists() -> None:
    text = (HERE / "Makefile").read_text()
    targets = set(re.findall(r"(?m)^([a-z][a-z-]*):", text))
    shown = re.findall(r"(?m)(?:^ {4}|`)make((?: +[^\s`#]+)*)", README)
    words = {word for line in shown for word in line.split() if re.fullmatch("[a-z-]+", word)}
    assert {"demo", "test", "install", "run"} <= {w for w in words if w[0] != "-"} <= targets
    for variable in re.findall(r"\b([A-Z]+)=", " ".join(shown)):
        assert f"$({variable})" in text, variable


def test_the_service_files_of_the_readme_can_be_read() -> None:
    (unit,) = re.findall(r"(?s)```ini\n(.*?)```", README)
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(unit)
    service = parsed["Service"]
    assert service["Type"] == "notify"
    assert service["Restart"] == "on-failure"
    assert float(service["WatchdogSec"]) > 10
    assert service["WorkingDirectory"].startswith("%h/")
    assert "hedra_avatar watch" in service["ExecStart"]
    (plist,) = re.findall(r"(?s)```xml\n(.*?)```", README)
    agent = plistlib.loads(plist.encode())
    assert agent["ProgramArguments"][-1] == "watch"
    assert agent["ProgramArguments"][0].startswith(agent["WorkingDirectory"])
    assert agent["KeepAlive"] == {"SuccessfulExit": False}


def test_the_python_of_the_readme_names_what_the_module_has() -> None:
    (code,) = re.findall(r"(?s)```python\n(.*?)```", README)
    compile(code, "README.md", "exec")
    names = set(re.findall(r"hedra\.(\w+)\(", code))
    assert names
    assert all(callable(getattr(hedra, name)) for name in names)


# -----------------------------------------------------------------------------
# what an attack found
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_batch_whose_output_nobody_reads_still_makes_every_clip(
    live: World, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed pipe once killed the workers, and the batch waited for them without end."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    names = ("a", "b", "c")
    fill(live, *names)
    with monkeypatch.context() as patch:
        patch.setattr(sys, closed, Full())
        status = batch(live, "--jobs", "2", *QUICK)
    assert status == (1 if closed == "stdout" else 0)
    check_all_paid(live, *names)


def test_ctrl_c_does_not_wait_for_an_upload(live: World) -> None:
    uploading, over = threading.Event(), threading.Event()

    def hold(number: int) -> None:
        if live.sent[number - 1].path.endswith(("/upload", "/files")):
            uploading.set()
            over.wait(10)
            raise sandbox.Drop

    live.before.append(hold)
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = spawn(live)
    finally:
        signal.signal(signal.SIGINT, heard)
    try:
        assert uploading.wait(20)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        status, _, _ = finish(process)
        assert time.monotonic() - started < 2
        assert status == 130
    finally:
        over.set()


@pytest.mark.parametrize("which", ["wav", "img"])
def test_the_video_never_takes_the_place_of_an_input(
    world: World, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file: Path = getattr(world, which)
    before = file.read_bytes()
    assert world.run("--out", str(file)) == 1
    assert "is an input" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert "upload" not in world.verbs


def boxes(*sizes: int) -> bytes:
    """An MP4's top-level boxes: ftyp, moov, then mdat ones."""
    kinds = [b"ftyp", b"moov", *[b"mdat"] * len(sizes)]
    return b"".join(
        size.to_bytes(4, "big") + kind + bytes(size - 8)
        for size, kind in zip(sizes, kinds, strict=False)
    )


@pytest.mark.parametrize(
    ("content", "cut_short"),
    [
        (boxes(24, 100, 4000), False),
        (boxes(24, 100, 4000)[:-1], True),
        (boxes(24, 100, 4000)[:130], True),
        (boxes(24, 100)[:100], True),
        (boxes(24) + b"what no box begins with", False),
    ],
)
def test_a_video_that_came_without_its_length_is_held_to_its_boxes(
    tmp_path: Path, content: bytes, cut_short: bool
) -> None:
    file = tmp_path / ".x.mp4.part"
    file.write_bytes(content)
    descriptor = os.open(file, os.O_RDWR)
    try:
        assert hedra.is_cut(hedra.Part(file, descriptor, "g")) is cut_short
    finally:
        os.close(descriptor)


def test_names_that_are_no_utf_8_are_made_and_remembered(world: World) -> None:
    wav = write_wav(world.folder / os.fsdecode(b"caf\xe9.wav"))
    assert world.run(wav=wav) == 0
    before = len(world.verbs)
    assert world.run(wav=wav) == 0
    assert len(world.verbs) == before
    assert len(world.box.paid) == 1


def test_a_prompt_and_an_env_file_that_are_no_utf_8_are_told_as_that(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("--prompt", os.fsdecode(b"caf\xe9")) == 1
    assert "is not UTF-8" in capsys.readouterr().err
    (world.folder / ".env").write_bytes(b"# caf\xe9\n")
    assert world.run() == 1
    assert ".env is no readable UTF-8" in capsys.readouterr().err
    assert world.verbs == []


def test_two_recordings_that_would_be_one_video_are_not_both_paid(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = fill(world, "x")
    other = write_wav(one.with_name("x.WAV"), seed=5)
    if other.samefile(one):
        pytest.skip("this file system does not tell them apart")
    assert batch(world) == 1
    assert "rename one of them" in capsys.readouterr().err
    assert len(world.box.paid) == 1


def test_the_intent_and_the_generation_are_synced_to_disk_around_the_submit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(len(world.sent)))
    assert world.run() == 0
    submit = next(n for n, sent in enumerate(world.sent, 1) if is_submit(sent))
    assert synced.count(submit - 1) >= 2  # the record and its folder
    assert synced.count(submit) >= 2


def test_a_long_wait_that_hedra_asks_for_is_told(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.fail("upload", "429", value=90)
    assert world.run() == 0
    assert "as Hedra asks for it" in capsys.readouterr().err
    world.check_paid()


@pytest.mark.parametrize(
    ("interval", "elapsed", "polls", "left", "wait"),
    [
        pytest.param(5, 0, 0, None, 0, id="nothing is known: at once"),
        pytest.param(5, 0, 1, None, 5, id="nothing is known: every interval"),
        pytest.param(5, 0, 0, 60, 10, id="far from the end: fewer"),
        pytest.param(5, 46, 3, 14, 7, id="nearer"),
        pytest.param(5, 0, 0, 2, 2, id="not before the end that is expected"),
        pytest.param(5, 2, 1, 0, 3, id="never more than every interval would make"),
        pytest.param(5, 60, 4, -1, 1.25, id="what was saved is spent after the expected end"),
        pytest.param(5, 60, 12, -1, 1.25, id="as long as some is left"),
        pytest.param(5, 60, 13, -1, 5, id="and then every interval"),
    ],
)
def test_polls_are_spent_where_the_end_is_expected(
    interval: float, elapsed: float, polls: int, left: float | None, wait: float
) -> None:
    assert hedra.poll_wait_s(interval, elapsed, polls, left) == wait


@pytest.mark.parametrize("command", ["run", "batch"])
def test_a_traceback_is_told_once_and_line_by_line(
    world: World, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.box.fail_with = {"type": "MODERATION_FAILED", "message": "no"}
    fill(world, "anna")
    assert (world.run("-v") if command == "run" else batch(world, "-v")) == 1
    told = capsys.readouterr().err
    assert told.count("Traceback (most recent call last)") == 1
    assert "\\n" not in told
