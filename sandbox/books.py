"""The books: what was uploaded, ordered and paid; both APIs read and write them.

A generation is a video or a speech. What state it is in is computed anew at each look, from the
time that has passed since it was ordered: no timer ever fires.
"""

import hashlib
import hmac
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, Self

from sandbox.faults import Json, Refusal, Reply, Request
from sandbox.render import RenderError, frame_size, media_seconds, render_mp4, sniff, speak

UNKNOWN_SECONDS = 10.0  # what a recording counts as when nobody can tell how long it is
CHARACTERS_PER_SECOND = 15.0  # of a speech that is not there yet
VIDEO, SPEECH = "video", "text_to_speech"
OUTPUTS = {VIDEO: "video", SPEECH: "audio"}  # what comes of them
# The share of the rendering time at which a state ends.
STAGES = ((0.1, "queued"), (0.9, "processing"), (1.0, "finalizing"))


def read_data(name: str) -> Any:
    """A JSON file of this package, read anew, so that whoever gets it may change it."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def catalogue() -> list[Json]:
    """A few of v2's ninety or so models, the avatars not first, so that nobody takes just any."""
    rows: list[Json] = read_data("catalogue")
    return rows


def iso(at: float) -> str:
    """Seconds since 1970 as ISO 8601, UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


@dataclass
class Asset:
    """A file. On v2 it is named by its id and filled later, on v3 by its handle."""

    id: str
    kind: str
    name: str
    created: float
    path: Path | None = None
    size: int = 0
    content_type: str = ""
    seconds: float = 0.0
    expires: float = math.inf


@dataclass(kw_only=True)
class Generation:
    """A video or a speech that was ordered; what was asked for, then what became of it."""

    id: str
    api: str
    kind: str
    model: str
    asset_id: str
    request: Json
    prompt: str  # what a video shall show, what a speech says
    cost: float  # as quoted
    seconds: float = 0.0
    voice: str = ""  # its name
    image: str = ""
    audio: str = ""
    sources: tuple[Path, ...] = ()
    resolution: str = ""
    aspect_ratio: str = ""
    length: float | None = None  # seconds, where they were asked for
    created: float = 0.0  # time.monotonic()
    at: float = 0.0  # time.time()
    bill: float = 0.0  # what it really cost
    charged: bool = True
    refused: Json | None = None
    broken: bool = False
    rendered: bool = False
    looks: int = 0

    def __post_init__(self) -> None:
        if self.kind == SPEECH:  # a guess, until it is there
            self.seconds = max(0.6, len(self.prompt) / CHARACTERS_PER_SECOND)

    @property
    def file(self) -> str:
        """The name of what was made, in the folder of the books."""
        return f"{self.asset_id}.{'mp4' if self.kind == VIDEO else 'wav'}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a video."""
        return frame_size(self.resolution, self.aspect_ratio)


@dataclass(kw_only=True, eq=False)
class Books:
    """Assets, generations and money; every public attribute may be read and set at any time."""

    render_seconds: float = 3.0
    concurrency: int | None = None  # generations that may be unfinished at once
    credits: int = 10_000
    usd: float = 100.0
    keys: set[str] | None = None  # those that are good; None: any that is not empty
    render: Callable[..., None] = render_mp4  # image, audio, out, width, height; seconds if asked
    speak: Callable[[str, Path, str], None] = speak  # text, out, the name and gender of the voice
    eager: bool = False  # render within the submit, not in a thread
    url_seconds: float = 3600.0
    handle_seconds: float = 3600.0
    output_seconds: float = 48 * 3600.0  # v3: how long an output is kept
    folder: Path | None = None  # where files are kept; None: a folder that `close` removes
    files_url: str = "http://127.0.0.1"  # of the second port; set by whoever opens it
    # Quirks, as they are seen from outside. v2 makes an id of its own:
    ignore_reserved_id: bool = False
    repeat_is_conflict: bool = True  # else a repeated id is answered as at first, and unpaid
    # v3 reads the key in the `body`, in the `header`, in `both`; `header-only` refuses the field.
    idempotency: str = "both"
    hidden_seconds: float = 0.0  # so long a new generation is not found
    costless_looks: int = 0  # v3: so many looks at a job tell no cost
    fail_with: Json | None = None  # the v2 error in which the next videos end
    fail_speech_with: Json | None = None  # and the next speeches
    refund: bool = False  # and whether those cost nothing
    refuse_texts: tuple[str, ...] = ()  # what no prompt and no speech may contain: 422, unpaid
    bill_factor: float = 1.0  # what is billed, as a share of what was quoted
    expired_outputs: bool = False  # v3
    voices_per_page: int = 100  # v3
    echo_key: bool = False  # errors repeat the key
    balance_error: int | None = None  # the status that the balance gets
    catalogue: list[Json] = field(default_factory=catalogue)
    voices: list[Json] = field(default_factory=lambda: read_data("voices"))
    assets: dict[str, Asset] = field(default_factory=dict)  # by what a generation names them by
    generations: dict[str, Generation] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)  # requests to the files port that had a key

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.root = self.folder or Path(tempfile.mkdtemp(prefix="sandbox-"))
        self._secret = uuid.uuid4().bytes
        self._by_asset: dict[str, Generation] = {}
        self._unfinished: list[Generation] = []
        self._renders: list[threading.Thread] = []
        self._stoves = threading.Semaphore(os.cpu_count() or 1)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What is being rendered may finish; then what was stored goes.
        self._closed = True
        for thread in self._renders:
            thread.join(timeout=10)
        if self.folder is None:
            shutil.rmtree(self.root, ignore_errors=True)

    def is_good(self, key: str) -> bool:
        """Whether a key is known."""
        return bool(key) if self.keys is None else key in self.keys

    def check_balance(self) -> None:
        """Refuse if the balance shall not be readable."""
        if self.balance_error:
            raise Refusal(self.balance_error, "INTERNAL", "The balance cannot be read now")

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
        asset.seconds = media_seconds(path) or UNKNOWN_SECONDS
        asset.path, asset.size, asset.content_type = path, size, sniff(path)

    def share(self, one: Generation) -> float:
        """How much of the rendering time has passed, from 0 to 1."""
        spent = time.monotonic() - one.created
        return min(1.0, max(0.0, spent / self.render_seconds)) if self.render_seconds > 0 else 1.0

    def state(self, one: Generation) -> str:
        """The v2 word."""
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

    def is_gone(self, one: Generation) -> bool:
        """Whether v3 has deleted what was made."""
        old = time.time() - one.at >= self.output_seconds
        return one.api == "v3" and (self.expired_outputs or old)

    def find(self, api: str, generation_id: str) -> Generation:
        """A generation of that API, else a 404."""
        one = self.generations.get(generation_id.lower())
        if one is None or one.api != api or self.is_hidden(one):
            raise Refusal(404, "NOT_FOUND", f"Generation {generation_id} not found")
        return one

    def made(self, api: str, asset_id: str) -> Asset | None:
        """What was made under that id, as something that a later order may name."""
        one = self._by_asset.get(asset_id)
        if one is None or one.api != api or self.state(one) != "complete":
            return None
        path, expires = self.root / one.file, 0.0 if self.is_gone(one) else math.inf
        asset = Asset(asset_id, OUTPUTS[one.kind], one.prompt, one.at, path, expires=expires)
        asset.size, asset.content_type = path.stat().st_size, sniff(path)
        asset.seconds = one.seconds
        return asset

    def listed(self, api: str) -> list[Generation]:
        """What the list of an API shows, newest first."""
        shown = (one for one in self.generations.values() if not self.is_hidden(one))
        return [one for one in shown if one.api == api][::-1]

    def order(self, one: Generation) -> None:
        """Enter a generation, unless too many are unfinished; whoever calls takes the money."""
        if any(words.lower() in one.prompt.lower() for words in self.refuse_texts):
            raise Refusal(422, "MODERATION_FAILED", "The text was refused by moderation")
        self._unfinished = [other for other in self._unfinished if not self.is_over(other)]
        if self.concurrency is not None and len(self._unfinished) >= self.concurrency:
            text = f"Too many generations at once: {self.concurrency} are allowed"
            raise Refusal(429, "RESOURCE_EXHAUSTED", text, retry_after=1)
        one.created, one.at = time.monotonic(), time.time()
        one.refused = self.fail_with if one.kind == VIDEO else self.fail_speech_with
        one.charged = not (one.refused and self.refund)
        one.bill = one.cost * self.bill_factor if one.charged else 0.0
        self.generations[one.id] = self._by_asset[one.asset_id] = one
        self._unfinished.append(one)

    def start(self, one: Generation) -> None:
        """Make what was ordered; not under the lock, for it takes its time."""
        if self.eager:
            self._make(one)
            return
        thread = threading.Thread(target=self._make, args=(one,), daemon=True, name="render")
        with self.lock:
            self._renders = [*filter(threading.Thread.is_alive, self._renders), thread]
            thread.start()

    def _make(self, one: Generation) -> None:
        with self._stoves:
            if self._closed or one.refused:
                return
            try:
                self._render(one, self.root / one.file)
                one.rendered = True
            except (RenderError, OSError, ValueError) as error:
                one.refused = {"type": "INTERNAL", "message": str(error)}
                one.broken = True

    def _render(self, one: Generation, out: Path) -> None:
        if one.kind == SPEECH:
            who = {row["name"]: row["labels"].get("gender", "") for row in self.voices}
            self.speak(one.prompt, out, f"{one.voice} {who.get(one.voice, '')}")
            one.seconds = media_seconds(out) or one.seconds
        else:
            asked = {} if one.length is None else {"seconds": one.length}
            self.render(*one.sources, out, *one.size, **asked)

    def presigned(self, name: str, seconds: float) -> str:
        """A URL on the files port that is good for so many seconds."""
        expires = math.ceil(time.time() + seconds)
        return f"{self.files_url}/{name}?expires={expires}&signature={self.sign(name, expires)}"

    def output_url(self, one: Generation) -> str:
        """A fresh URL of what was made, another one at each call."""
        return self.presigned(one.file, self.url_seconds)

    def sign(self, name: str, expires: int) -> str:
        """The signature that a URL of the files port must carry."""
        return hmac.new(self._secret, f"{name} {expires}".encode(), hashlib.sha256).hexdigest()


class Desk:
    """One of the three that answer from the books: routes, keys, the shape of its errors."""

    name = ""
    prefix = ""
    public: frozenset[str] = frozenset()  # verbs that need no key

    def __init__(self, books: Books) -> None:
        self.books = books
        self.routes: list[tuple[str, str, str, Callable[[Request, str], Reply]]] = []

    def find(self, request: Request) -> tuple[str, Callable[[Request, str], Reply], str]:
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
