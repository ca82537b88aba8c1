"""What hedra_avatar.py costs beyond what nobody can avoid, as ratios of one run.

With `--module` another copy of it is measured as well. The sandbox is in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import wave
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sandbox import Asset, Sandbox, png, serve

HOME = Path(__file__).resolve().parents[1]
KEYS = {"v2": "sandbox", "v3": "sandbox:secret"}
MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


class Score(NamedTuple):
    """A row of the table for one program; `asked` is what the ratio shall not exceed."""

    what: str
    against: str
    ours: float
    floor: float
    unit: str
    asked: float = math.inf

    def cell(self) -> str:
        """The ratio, whether it is too much, and what it is made of."""
        if not self.floor:
            return "n/a"
        ratio = self.ours / self.floor
        missed = " missed" if ratio > self.asked else ""
        return f"{ratio:.2f}{missed} ({self.ours:.3g} / {self.floor:.3g} {self.unit})"


def table(names: list[str], columns: list[list[Score]]) -> str:
    """The rows as Markdown, a column for each program."""
    rows = [["what", "against", *names, "asked"], ["---"] * (len(names) + 3)]
    for scores in zip(*columns, strict=True):
        one = scores[0]
        asked = f"{one.asked:g}".replace("inf", "")
        rows.append([one.what, one.against, *(score.cell() for score in scores), asked])
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(map(str.ljust, row, wide)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def film(size: int) -> bytes:
    """What passes for a video of 0.6 s with sound, `size` bytes long."""

    def box(name: bytes, body: bytes) -> bytes:
        return (8 + len(body)).to_bytes(4) + name + body

    length = box(b"mvhd", bytes(12) + (1000).to_bytes(4) + (600).to_bytes(4) + bytes(80))
    sound = box(b"trak", box(b"mdia", box(b"hdlr", bytes(8) + b"soun" + bytes(13))))
    start = box(b"ftyp", b"mp42\0\0\0\0mp42isom") + box(b"moov", length + sound)
    return start + box(b"mdat", bytes(size - len(start) - 8))


class Playground(Sandbox):
    """A sandbox that keeps nothing of big uploads, or fresh pages would be what is measured."""

    def store(self, asset: Asset, part: Path, size: int) -> None:
        super().store(asset, part, size)
        if asset.path and size > MIB:
            os.truncate(asset.path, 0)


def host(pipe: Any, size: int, rules: dict[str, Any]) -> None:
    """The body of a Host's process: counts calls of a verb until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 10_240), most))  # a socket a clip
    sandbox = Playground(eager=True, credits=10**9, usd=1e9, **rules)
    # All videos are this one file, in memory already: whoever reads one first would pay for that.
    video = sandbox.root / "film"
    video.write_bytes(film(size))
    sandbox.render = lambda image, audio, out, *_, **__: out.hardlink_to(video)
    with sandbox, serve(sandbox) as server:
        pipe.send({"v2": server.url_v2, "v3": server.url_v3})
        with contextlib.suppress(EOFError):
            while True:
                pipe.send(sandbox.count(pipe.recv()))


class Host:
    """A sandbox in a process of its own, so that time and memory of a client are its own."""

    def __init__(self, size: int = 50_000, **rules: Any) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=host, args=(theirs, size, rules), daemon=True)
        self.process.start()
        theirs.close()
        self.urls: dict[str, str] = self.pipe.recv()

    def wait_for(self, verb: str, count: int) -> None:
        """Until a verb was called so often, for two minutes at most."""
        for _ in range(240):
            self.pipe.send(verb)
            if self.pipe.recv() >= count:
                return
            time.sleep(0.5)
        sys.exit(f"bench: {verb} was not called {count} times")

    def close(self) -> None:
        """End it."""
        self.pipe.close()
        self.process.join(10)


class Client:
    """A process that is measured. Its peak counts from that of this process, which is small."""

    def __init__(self, command: list[Any], environ: dict[str, str], folder: Path) -> None:
        self.started, words = time.perf_counter(), list(map(str, command))
        self.said, null = folder / f"said-{uuid.uuid4()}", subprocess.DEVNULL
        with self.said.open("wb") as out:
            self.process = subprocess.Popen(
                words, env=environ, cwd=folder, stdin=null, stdout=out, stderr=null
            )

    def end(self, kill: bool = False) -> Client:
        """Wait for it, or kill it; a failure ends the bench."""
        if kill:
            self.process.kill()
        try:
            _, status, used = os.wait4(self.process.pid, 0)
        except BaseException:
            self.process.kill()
            raise
        self.seconds = time.perf_counter() - self.started
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode and not kill:
            sys.exit(f"bench: {self.process.args!r} ended with {self.process.returncode}")
        # In KiB on Linux, in bytes on macOS.
        self.peak_mib = used.ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
        return self

    def cpu(self) -> float:
        """Seconds of CPU so far; 0 where there is no /proc."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        ticks = stat.read_text().rpartition(")")[2].split()[11:13] if stat.exists() else []
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


class Program:
    """A copy of hedra_avatar.py in a folder of its own, where everything happens."""

    def __init__(self, module: Path, folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(module, folder / "hedra_avatar.py")
        self.folder, self.image = folder, write_portrait(folder / "portrait.png")

    def environ(self, server: Host, api: str = "v2") -> dict[str, str]:
        """The environment of a client that knows nothing yet."""
        mine = {"HEDRA_BASE_URL": server.urls[api], "HEDRA_API_KEY": KEYS[api]}
        mine |= {"HEDRA_CACHE_DIR": f"cache-{uuid.uuid4()}", "NO_PROXY": "*", "no_proxy": "*"}
        mine |= dict.fromkeys(("HEDRA_MODEL_ID", "HEDRA_WORKSPACE_ID", "FRIEND_IMG"), "")
        # Byte-compiled modules are kept, as they are unless somebody forbids it.
        mine |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": f"{self.folder}{os.pathsep}{HOME}"}
        return {**os.environ, **mine}

    def start(self, environ: dict[str, str], *words: object) -> Client:
        """Run Python beside the program."""
        return Client([sys.executable, *words], environ, self.folder)

    def batch(self, environ: dict[str, str], clips: Path, *words: object) -> Client:
        """Start a batch over a folder."""
        command = ("-m", "hedra_avatar", "batch", clips, "--out-dir", f"{clips}.out", "--json")
        return self.start(environ, *command, "--img", self.image, *words)


def write_portrait(path: Path) -> Path:
    """A portrait like no other: what follows the end of a PNG is not looked at."""
    path.write_bytes(png(2, 2, 2, [bytearray(6), bytearray(6)]) + uuid.uuid4().bytes)
    return path


def write_voice(path: Path, size: int = 4844, rate: int = 8000) -> Path:
    """A recording of `size` bytes like no other; without that of 0.6 s."""
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 1, rate, 0, "NONE", ""))
        sound.writeframes(uuid.uuid4().bytes)
        for at in range(60, size, MIB):
            sound.writeframesraw(bytes(min(MIB, size - at)))
    return path


def write_voices(folder: Path, first: int, last: int) -> Path:
    """A folder of recordings, numbered."""
    folder.mkdir(exist_ok=True)
    for number in range(first, last):
        write_voice(folder / f"clip-{number:05}.wav")
    return folder


def in_turns(times: int, *calls: Callable[[], object]) -> list[float]:
    """Seconds of each call, the median; taken in turns, so that a busy moment hits all."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(times):
        for call, seconds in zip(calls, took, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in took]


def bench_start(program: Program, quick: bool) -> list[Score]:
    """A start against the least that a script of this size can do."""
    floor = "import argparse, json, pathlib, re; "
    floor += "compile(open('hedra_avatar.py', 'rb').read(), 'hedra_avatar.py', 'exec')"
    ours, bare = in_turns(
        5 if quick else 25,
        lambda: program.start({**os.environ}, "hedra_avatar.py", "--help").end(),
        lambda: program.start({**os.environ}, "-c", floor).end(),
    )
    return [Score("--help", "a bare start that compiles it", ours, bare, "s", 1.3)]


def request(base: str, method: str, path: str, value: Any = None) -> Any:
    """One request, as small as can be; what the JSON of the answer says."""
    line, parts = HTTPConnection(urlsplit(base).netloc), urlsplit(base)
    headers = {"X-API-Key": KEYS["v2"], "Content-Type": "application/json"}
    with contextlib.closing(line):
        line.request(method, parts.path + path, value and json.dumps(value), headers)
        return json.loads(line.getresponse().read())


def race(times: int) -> None:
    """Clips by the program, loaded already, and their round trips; prints the medians."""
    hedra = importlib.import_module("hedra_avatar")

    def clip() -> None:
        files = write_portrait(Path("race.png")), write_voice(Path("race.wav"))
        words = ["--img", files[0], "--wav", files[1], "--out", f"{uuid.uuid4()}.mp4", "-q"]
        with contextlib.redirect_stdout(sys.stderr):
            if hedra.main(["run", *map(str, words)]):
                sys.exit("hedra_avatar run has failed")

    clip()  # from now on the model is known
    # Create, upload (of both files at once), submit, look, download.
    look = partial(request, os.environ["HEDRA_BASE_URL"], "GET", "/billing/credits")
    print(json.dumps(in_turns(times, clip, lambda: [look() for _ in range(5)])))


def bench_warm(program: Program, quick: bool) -> list[Score]:
    """One clip where every answer takes 50 ms, the model being known."""
    text = f"from sandbox.bench import race; race({3 if quick else 9})"
    with contextlib.closing(Host(render_seconds=0, latency=0.05)) as server:
        used = program.start(program.environ(server), "-c", text).end()
    ours, floor = json.loads(used.said.read_text())
    return [Score("one warm clip, 50 ms a request", "its round trips", ours, floor, "s", 1.25)]


TRANSFER = """
import json, sys, time
from pathlib import Path
import hedra_avatar as hedra
(image, audio), key = map(Path, sys.argv[1:3]), sys.argv[3]
ids = hedra.create_asset("i", "image", key), hedra.create_asset("a", "audio", key)
hedra.upload_asset(ids[0], image, key)
started = time.perf_counter()
hedra.upload_asset(ids[1], audio, key)
made = hedra.start_generation(*ids, "A person talks.", key)
video = hedra.wait_and_download(made, Path(), key)
print(json.dumps([time.perf_counter() - started, made]))
video.unlink()
"""


def curl_seconds(base: str, program: Program, audio: Path, made: str) -> float:
    """A big recording up and a big video down by curl."""
    asset = request(base, "POST", "/assets", {"name": "b", "type": "audio"})["id"]
    url = request(base, "GET", f"/generations/{made}/status")["url"]
    up = ["-H", f"X-API-Key: {KEYS['v2']}", "-o", os.devnull, "-F", f"file=@{audio}"]
    words = [[*up, f"{base}/assets/{asset}/upload"], ["-o", program.folder / "curl.mp4", url]]
    calls = [["curl", "-sSf", "--noproxy", "*", *more] for more in words]
    return sum(Client(call, {**os.environ}, program.folder).end().seconds for call in calls)


def bench_files(program: Program, quick: bool) -> list[Score]:
    """Big files against curl; memory must not know their size."""
    audio = write_voice(program.folder / "big.wav", 100 * MIB, 200_000)
    used, floor = list[Client](), list[float]()
    with contextlib.closing(Host(200_000_000, render_seconds=0)) as server:
        environ, words = program.environ(server), (program.image, audio, KEYS["v2"])
        for _ in range(1 if quick else 5):
            used.append(program.start(environ, "-c", TRANSFER, *words).end())
            _, made = json.loads(used[-1].said.read_text())
            if shutil.which("curl"):
                floor.append(curl_seconds(server.urls["v2"], program, audio, made))
    ours = statistics.median(json.loads(one.said.read_text())[0] for one in used)
    curl = statistics.median(floor or [0.0])
    peak = max(one.peak_mib for one in used)
    both = Score("100 MiB up, 200 MB down", "curl", ours, curl, "s", 1.25)
    return [both, Score("  peak memory", "56 MiB", peak, 56, "MiB", 1)]


READ = """
import json, os, sys
for entry in os.scandir(sys.argv[1]):
    entry.stat()
    with open("record.json") as file: json.load(file)
"""


def bench_finished(program: Program, quick: bool) -> list[Score]:
    """A batch again over what it has finished, beside the reading of so many small files."""
    clips, scores, done = program.folder / "finished", [], 0
    (program.folder / "record.json").write_text(json.dumps(dict.fromkeys(range(20), "x" * 40)))
    with contextlib.closing(Host(render_seconds=0)) as server:
        environ = program.environ(server)
        for count in (300, 1000) if quick else (1000, 10_000):
            write_voices(clips, done, count)
            program.batch(environ, clips, "--jobs", 50).end()
            ours, floor = in_turns(
                3,
                lambda: program.batch(environ, clips).end(),
                lambda: program.start(environ, "-c", READ, clips).end(),
            )
            what, done = f"{count:,} finished clips again", count
            scores.append(Score(what, "reading a record for each", ours, floor, "s"))
    return scores


def bench_waiting(program: Program, quick: bool, api: str) -> list[Score]:
    """Clips that all wait: their memory, and the CPU of ten seconds in which nothing ends."""
    count = 200 if quick else 1000
    clips = write_voices(program.folder / f"waiting-{api}", 0, count)
    with contextlib.closing(Host(render_seconds=600)) as server:
        environ = program.environ(server, api)
        client = program.batch(environ, clips, "--jobs", count, "--timeout", 900)
        try:
            server.wait_for("submit", count)
            time.sleep(2)
            before, started = client.cpu(), time.monotonic()
            time.sleep(10)
            share = 100 * (client.cpu() - before) / (time.monotonic() - started)
        finally:
            used = client.end(kill=True)
    return [
        Score(f"{count:,} clips waiting, {api}: memory", "200 MiB", used.peak_mib, 200, "MiB", 1),
        Score("  share of a core", "a fifth of one", share, 20 if before else 0, "%", 1),
    ]


def bench_limits(program: Program, quick: bool) -> list[Score]:
    """Clips on an account that runs three at once and takes ten requests a second."""
    count, render = (8, 2.0) if quick else (20, 3.0)
    clips = write_voices(program.folder / "limits", 0, count)
    with contextlib.closing(Host(render_seconds=render, concurrency=3, rate=(10, 1.0))) as server:
        words = (program.environ(server), clips, "--jobs", count, "--poll-interval", 1)
        seconds = program.batch(*words).end().seconds
    floor, what = math.ceil(count / 3) * render, f"{count} clips, 3 at once, 10 requests a second"
    return [Score(what, "their rendering", seconds, floor, "s", 1.5)]


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parts: list[Callable[[Program, bool], list[Score]]] = [
        *(bench_start, bench_warm, bench_files, bench_finished, bench_limits),
        *(partial(bench_waiting, api=api) for api in KEYS),
    ]
    parser = argparse.ArgumentParser(prog="python -m sandbox bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, fewer clips")
    parser.add_argument("--module", type=Path, metavar="FILE", help="another copy to measure")
    arguments = parser.parse_args(argv)
    modules = [HOME / "hedra_avatar.py", *filter(None, [arguments.module])]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        programs = [Program(file, Path(folder, str(at))) for at, file in enumerate(modules)]
        columns: list[list[Score]] = [[] for _ in programs]
        for part in parts:
            for program, column in zip(programs, columns, strict=True):
                column += part(program, arguments.quick)
    print(table([file.name for file in modules], columns))
    print(f"\nOne run on {os.cpu_count()} CPUs; load {os.getloadavg()[0]:.1f}")
    return 0
