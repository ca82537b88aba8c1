"""The command line: serve, demo, sample, bench."""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from sandbox.render import FRIEND, HELLO, RenderError, find_ffmpeg
from sandbox.server import Sandbox, serve

HOME = Path(__file__).resolve().parents[1]
KEYS = {"v2": "sandbox", "v3": "sandbox:secret"}
EXPORTS = """Hedra's sandbox is up; Ctrl-C ends it. In another terminal, for the web API (v2):
  export HEDRA_BASE_URL={v2} HEDRA_API_KEY=sandbox
or, for the jobs API (v3):
  export HEDRA_BASE_URL={v3} HEDRA_API_KEY=sandbox:secret
then, with the sample or with files of your own:
  {run} --img {image} --wav {audio}
  {run} --img {image} --say 'Hello there' --voice Maya
Each request is told here: method, path, status, milliseconds."""
NOTE = "The sandbox draws this video itself; in Hedra's own the whole face moves."


def tell(line: str) -> None:
    """One line on stderr, whatever a client wrote into its path."""
    shown = "".join(char if char.isprintable() else "?" for char in line)
    print(shown, file=sys.stderr, flush=True)


def shown(path: Path) -> str:
    """A path as one types it from here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def cmd_serve(arguments: argparse.Namespace) -> int:
    """Answer until Ctrl-C or SIGTERM."""
    try:
        find_ffmpeg()
    except RenderError as error:
        tell(f"sandbox: generations will fail: {error}")
    names = ("render_seconds", "rate", "concurrency")
    sandbox = Sandbox(**{name: getattr(arguments, name) for name in names})
    python = HOME / ".venv" / "bin" / "python"
    chosen = python if python.exists() else Path(sys.executable)
    run = f"{shown(chosen)} {shown(HOME / 'hedra_avatar.py')} run"
    with sandbox, serve(sandbox, arguments.port, tell=tell) as server:
        words = {"run": run, "image": shown(FRIEND), "audio": shown(HELLO)}
        print(EXPORTS.format(v2=server.url_v2, v3=server.url_v3, **words), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


def cmd_sample(arguments: argparse.Namespace) -> int:
    """Write the portrait and the recording, but not over what is there."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for source in (FRIEND, HELLO):
        target = arguments.folder / source.name
        if not target.exists():
            shutil.copyfile(source, target)
        print(target)
    return 0


def cmd_demo(arguments: argparse.Namespace) -> int:
    """From nothing to a video, by the real program over the real protocol."""
    find_ffmpeg()
    tell(NOTE)
    names = {"v2": "demo.mp4", "v3": "demo-v3.mp4"}
    chosen = list(names) if arguments.api == "both" else [arguments.api]
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Sandbox(render_seconds=1.0) as sandbox:
        words = ["--img", str(FRIEND), "--poll-interval", "1", *arguments.more]
        spoken = ["--say", arguments.say, "--voice", arguments.voice or sandbox.voices[0]["name"]]
        words += ["--wav", str(HELLO)] if arguments.say is None else spoken
        with serve(sandbox) as server:
            urls = {"v2": server.url_v2, "v3": server.url_v3}
            for api in chosen:
                settings = {"HEDRA_BASE_URL": urls[api], "HEDRA_API_KEY": KEYS[api]}
                settings["HEDRA_CACHE_DIR"] = str(Path(folder, api))
                if status := run_client([*words, "--out", names[api]], settings, folder):
                    return status
                shutil.move(Path(folder, names[api]), arguments.out_dir / names[api])
    print(*(arguments.out_dir / names[api] for api in chosen), sep="\n")
    return 0


def run_client(words: list[str], settings: dict[str, str], folder: str) -> int:
    """Run the program in a folder without a .env; its exit status. Ends it if we are ended."""
    names = ("HEDRA_MODEL_ID", "HEDRA_WORKSPACE_ID", "HEDRA_VOICE", "FRIEND_IMG")
    settings |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1") | dict.fromkeys(names, "")
    command, null = [sys.executable, f"{HOME}/hedra_avatar.py", "run", *words], subprocess.DEVNULL
    # Its result lines are ours to print, when all is done.
    with subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=null) as client:
        try:
            return client.wait()
        except KeyboardInterrupt:
            client.terminate()
            client.wait()
            raise


def cmd_bench(arguments: argparse.Namespace) -> int:
    """What hedra_avatar.py costs; loaded only here, for it is as long as all the rest."""
    from sandbox import bench

    return int(bench.main(arguments.more))


def rate(text: str) -> tuple[int, float]:
    """`60/60` is sixty requests a minute."""
    most, _, seconds = text.partition("/")
    return int(most), float(seconds)


def build_parser() -> argparse.ArgumentParser:
    """The options; `serve` is what happens without a command."""
    about = "Hedra on your own machine: both of its APIs over loopback, no key, no credits."
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=about)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    server = commands.add_parser("serve", help="answer on loopback until Ctrl-C (the default)")
    server.add_argument("--port", type=int, metavar="N", default=8321, help="by default 8321")
    server.add_argument(
        "--render-seconds", type=float, metavar="S", default=3.0, help="of each clip, by default 3"
    )
    server.add_argument("--rate", type=rate, metavar="N/S", help="N requests in S seconds (60/60)")
    server.add_argument("--concurrency", type=int, metavar="N", help="generations at once")
    server.set_defaults(run=cmd_serve)
    files = commands.add_parser("sample", help="write friend.png and hello.wav")
    files.add_argument("folder", type=Path, metavar="DIR")
    files.set_defaults(run=cmd_sample)
    demo = commands.add_parser("demo", help="make a clip with hedra_avatar.py, from nothing")
    demo.add_argument("--api", choices=("v2", "v3", "both"), default="v2")
    demo.add_argument("--out-dir", type=Path, metavar="DIR", default=Path("output"))
    demo.add_argument("--say", metavar="TEXT", help="what is said, in place of the recording")
    demo.add_argument("--voice", metavar="NAME", help="who says it; other flags are passed on")
    demo.set_defaults(run=cmd_demo)
    bench = commands.add_parser("bench", help="what hedra_avatar.py costs", add_help=False)
    bench.set_defaults(run=cmd_bench)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["serve", *words]
    parser = build_parser()
    arguments, more = parser.parse_known_args(words)
    if more and arguments.run not in (cmd_demo, cmd_bench):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    arguments.more = more
    # As Ctrl-C, so that folders and processes are cleaned up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(arguments.run(arguments))
    except (RenderError, OSError, OverflowError) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
