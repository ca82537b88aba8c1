#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["urllib3>=2.2,<3", "tqdm", "watchdog", "python-dotenv"]
# ///
"""Turn a portrait and a voice recording into a talking-avatar video, and never pay twice for it.

From a shell:

    export HEDRA_API_KEY=...                # either kind of key; a .env file will do as well
    python hedra_avatar.py run --wav hello.wav --img friend.png       # -> output/hello.mp4
    python hedra_avatar.py credits

From Python:

    import hedra_avatar as hedra
    image = hedra.upload(Path("friend.png"), "image", key)
    audio = hedra.upload(Path("hello.wav"), "audio", key)
    generation = hedra.start_generation(image, audio, "A person talks to the camera.", key)
    video = hedra.wait_and_download(generation, Path("output"), key)

A clip is its content: the bytes of portrait and recording, the prompt, resolution, aspect ratio,
model and account. The ledger under `.cache/` remembers by it what was asked of Hedra and what came
back, so whatever fails, is killed, is rerun or races, a clip is paid for once. Run the same command
again and it takes up where the last one stopped; `--force` pays for a new take.

Hedra has two APIs. A key with a colon belongs to the jobs API (v3, US dollars), any other to the
web API (v2, credits); nothing else needs to be said. Facts about them are from Hedra's OpenAPI
documents unless a comment says otherwise. Linux and macOS (the ledger's locks are flock's).

Read it from top to bottom: every name is defined before it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, ParamSpec, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit

if TYPE_CHECKING:
    import urllib3

__version__ = "1.0.0"


# -----------------------------------------------------------------------------
# settings
# -----------------------------------------------------------------------------


BASE_URLS = {"v2": "https://api.hedra.com/web-app/public", "v3": "https://api.hedra.com/v3"}
DEFAULT_PROMPT = "A person talks to the camera, natural expression, gentle movement of the head."
RESOLUTIONS = ("540p", "720p", "1080p")
ASPECT_RATIOS = ("9:16", "16:9", "1:1", "4:3", "3:4", "9:21", "21:9")

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 60.0  # without a byte
TRIES = 5  # of one request, the first included
PATIENCE = 40  # refusals for rate in a row before a request is given up
POLL_FAILURES = 15  # in a row, before waiting for a generation is given up
SUBMIT_TRIES = 4
GRACE_S = 30.0  # after a submit, a status of 404 may still mean "not yet"
MAX_RETRY_AFTER_S = 300.0  # a server that asks for more is not waited for
MODEL_AGE_S = 86_400.0  # then the catalogue is asked again, for the price
AHEAD = 2  # clips that upload while all places for generations are taken
BLOCK_BYTES = 1 << 20
LONG_HASH_BYTES = 16 << 20  # a file of this size takes as long to hash as a request


# -----------------------------------------------------------------------------
# errors: HedraError, and those of its children that somebody catches
# -----------------------------------------------------------------------------


class HedraError(Exception):
    """Whatever this module has to report: what happened, to what, and what to do next."""

    retryable = False


class InputError(HedraError):
    """Refused before anything was sent: a file, a setting or a flag is not right."""


class Unfinished(InputError):
    """A recording that is not all there: cut short, or still being written."""


class Stopped(HedraError):
    """The program is ending, or sends nothing more; the clip itself is all right."""


class ApiError(HedraError):
    """A request that did not get the answer it should have.

    `status` is of HTTP (None: no answer), `code` and `words` are the server's own, `trace_id` is
    what Hedra's support asks for, `retry_after` is in seconds. `retryable`: the same request may
    succeed later; `ambiguous`: it may have been carried out all the same.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str = "", words: str = "",
        trace_id: str = "", retry_after: float | None = None, retryable: bool = False,
        ambiguous: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.words, self.trace_id = status, code, words, trace_id
        self.retry_after, self.retryable, self.ambiguous = retry_after, retryable, ambiguous
        self.sent_at = 0.0  # of a refused request, by time.monotonic()


class RateLimited(ApiError):
    """429: too many requests, or too many generations at once. Nothing was done."""


class OutOfCredits(ApiError):
    """The balance does not cover the price. Nothing was paid."""


class ModelGone(HedraError):
    """Hedra no longer knows the model that was remembered."""


class GenerationFailed(HedraError):
    """Hedra ended `generation_id` without a video; `transient`: it says that may pass by itself."""

    def __init__(self, message: str, *, generation_id: str, transient: bool = False) -> None:
        super().__init__(message)
        self.generation_id, self.transient = generation_id, transient


class StillRunning(HedraError, TimeoutError):
    """The deadline passed first. `generation_id` goes on at Hedra and is not lost."""

    def __init__(self, message: str, *, generation_id: str = "") -> None:
        super().__init__(message)
        self.generation_id = generation_id


def printable(text: object) -> str:
    """Text for one line of a log: file names are data and may hold line breaks and escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def explain(error: BaseException) -> str:
    """An error as one line for a person."""
    if isinstance(error, HedraError):
        return str(error)
    if isinstance(error, OSError):
        name = f"{printable(error.filename)}: " if error.filename else ""
        return f"{name}{error.strerror or error}; nothing that was paid for is lost"
    return f"{type(error).__name__}: {error} (a bug in hedra_avatar; -v shows where)"


def need(package: str) -> Any:
    """Import a package where it is first used, or say in one line what to install."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"the package {error.name or package} is missing: python -m pip install "
            "'urllib3>=2.2,<3' tqdm watchdog python-dotenv (in the repository: make install)"
        ) from error


# -----------------------------------------------------------------------------
# account: Account, open_account
# -----------------------------------------------------------------------------


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


def mismatch(account: Account) -> str:
    """What to say where the base URL is plainly of the API that the key is not of."""
    mine, other = ("v3", "v2") if ":" in account.key else ("v2", "v3")
    if not account.base_url.endswith(urlsplit(BASE_URLS[other]).path):
        return ""
    return f"HEDRA_BASE_URL is of the {other} API and this key of {mine}: unset it or use its key"


def clean_key(raw: str) -> str:
    """The key without what pasting adds; raises InputError, never showing it."""
    key = raw.strip().strip("\ufeff").strip()
    if not key:
        raise InputError(
            "no API key: set HEDRA_API_KEY, or write HEDRA_API_KEY=... into a file named .env "
            "(without a key, `make demo` shows the whole thing in a sandbox)"
        )
    if key.isascii() and key.isprintable():
        return key
    raise InputError(
        "HEDRA_API_KEY has a line break or another character in it that no key has: copy it again "
        "from Hedra's console, as one line"
    )


def clean_url(raw: str) -> str:
    """A web address without its last slash; raises InputError for plain http, except to this very
    machine, as it would carry key and video over the network in clear text."""
    url = raw.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:  # the port is no port
        wrong = True
    if wrong or "@" in parts.netloc:
        raise InputError(f"not a web address: {printable(url)!r} (is HEDRA_BASE_URL right?)")
    if parts.scheme == "http" and not re.fullmatch(
        r"localhost|::1|127(\.\d{1,3}){3}", parts.hostname or ""
    ):
        raise InputError(f"refused: http://{parts.netloc} is not encrypted; use https://")
    return url


def open_account(api_key: str, environ: Mapping[str, str] | None = None) -> Account:
    """The account behind a key, with HEDRA_BASE_URL, HEDRA_WORKSPACE_ID, HEDRA_CACHE_DIR and
    HEDRA_HTTP_TIMEOUT (seconds) read from `environ` (default: os.environ). Raises InputError."""
    environ, key = os.environ if environ is None else environ, clean_key(api_key)
    url = environ.get("HEDRA_BASE_URL") or BASE_URLS["v3" if ":" in key else "v2"]
    cache, silence = environ.get("HEDRA_CACHE_DIR"), environ.get("HEDRA_HTTP_TIMEOUT")
    try:
        silence_s = float(silence or SILENCE_TIMEOUT_S)
    except ValueError:
        silence_s = 0.0
    if not 0 < silence_s < math.inf:
        raise InputError(f"HEDRA_HTTP_TIMEOUT is {printable(silence)!r}: give seconds, as in 60")
    workspace = environ.get("HEDRA_WORKSPACE_ID") or ""
    if "?" in url or "#" in url:
        raise InputError("HEDRA_BASE_URL takes no ? and no #: it is the start of every address")
    return Account(key, clean_url(url), workspace, Path(cache or ".cache"), silence_s)


# -----------------------------------------------------------------------------
# data: what files and replies hold; inspect_file, parse_status, parse_price, choose_model,
#       parse_error
# -----------------------------------------------------------------------------


Kind = Literal["image", "audio"]

QUEUED, PROCESSING, FINALIZING = "queued", "processing", "finalizing"
COMPLETE, FAILED = ENDED = ("complete", "failed")
STATES = {
    "queued": QUEUED, "in_queue": QUEUED, "pending": QUEUED,
    "processing": PROCESSING, "in_progress": PROCESSING, "finalizing": FINALIZING,
    "complete": COMPLETE, "completed": COMPLETE, "succeeded": COMPLETE,
    "error": FAILED, "failed": FAILED,
}
LIMITS = {
    "image": (10_485_760, "a PNG, JPEG or WebP image"),
    "audio": (104_857_600, "a WAV, MP3, M4A, FLAC, Ogg or AIFF recording"),
}
MIN_SECONDS, MAX_SECONDS = 0.5, 600.0
SIGNATURES = (  # of the first bytes: start, where, what, type
    (b"\x89PNG", 0, b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff", 0, b"\xff\xd8\xff", "image/jpeg"),
    (b"RIFF", 8, b"WEBP", "image/webp"), (b"RIFF", 8, b"WAVE", "audio/wav"),
    (b"FORM", 8, b"AIF", "audio/aiff"), (b"fLaC", 0, b"fLaC", "audio/flac"),
    (b"OggS", 0, b"OggS", "audio/ogg"), (b"", 4, b"ftypM4A", "audio/mp4"),
    (b"", 4, b"ftypmp42", "audio/mp4"), (b"", 4, b"ftypisom", "audio/mp4"),
    (b"ID3", 0, b"ID3", "audio/mpeg"), (b"\xff", 1, b"\xfb", "audio/mpeg"),
    (b"\xff", 1, b"\xf3", "audio/mpeg"), (b"\xff", 1, b"\xf2", "audio/mpeg"),
    (b"\xff", 1, b"\xfa", "audio/mpeg"),
)


class Media(NamedTuple):
    """What a file is: `seconds` is known of WAV only."""

    content_type: str
    size_bytes: int
    seconds: float | None = None


class Status(NamedTuple):
    """One look at a generation. `progress` is 0..1; `eta_s` is seconds from now."""

    state: str
    progress: float | None = None
    url: str = ""
    asset_id: str = ""
    failure: str = ""
    transient: bool = False
    eta_s: float | None = None
    cost: float | None = None


class Job(NamedTuple):
    """A generation that Hedra has accepted; `eta_s` is seconds from now."""

    id: str
    eta_s: float | None = None


class Asset(NamedTuple):
    """What a submit names a file by; `expires_at` is seconds since the epoch, None for never."""

    ref: str
    expires_at: float | None = None

    def is_usable(self) -> bool:
        """Whether a submit may name it, with five minutes left to send it."""
        return bool(self.ref) and (self.expires_at is None or time.time() < self.expires_at - 300)


class Model(NamedTuple):
    """An entry of the catalogue, as far as a clip needs it; `price` in the entry's own wording."""

    id: str
    slug: str = ""
    name: str = ""
    resolutions: tuple[str, ...] = ()
    aspect_ratios: tuple[str, ...] = ()
    max_seconds: float | None = None
    price: dict[str, Any] | None = None


class Balance(NamedTuple):
    """What an account can spend; `unit` is "credits" or "USD"."""

    remaining: float
    unit: str
    more: dict[str, Any] = {}


class Order(NamedTuple):
    """All that a submit says. `reserved`: the generation id (v2), the idempotency key (v3)."""

    image: str
    audio: str
    prompt: str
    model: Model
    resolution: str = "540p"
    aspect_ratio: str = "9:16"
    reserved: str = ""


def amount(value: float, unit: str) -> str:
    """An amount of money to read: `12 credits`, `$1.20`."""
    if unit == "USD":
        return f"${value:.2f}"
    return f"{value:.10g} {unit}" if value != 1 else f"1 {unit.removesuffix('s')}"


def sniff(head: bytes, kind: str) -> str:
    """The content type that a file's first bytes show, "" where it is not of that kind."""
    for start, offset, mark, content_type in SIGNATURES:
        matches = head.startswith(start) and head[offset:].startswith(mark)
        if matches and content_type.startswith(kind):
            return content_type
    return ""


def wav_seconds(file: Path, size: int) -> float:
    """The duration that a WAV header promises; raises Unfinished unless the file holds it all."""
    rate, promised, there = 0, 0, 0
    with file.open("rb") as stream:
        stream.seek(12)
        while len(header := stream.read(8)) == 8:
            name, length = header[:4], int.from_bytes(header[4:], "little")
            if name == b"data":
                promised, there = length, size - stream.tell()
                break
            body = stream.read(min(16, length)) if name == b"fmt " else b""
            rate = int.from_bytes(body[8:12], "little") if body else rate
            stream.seek(length + length % 2 - len(body), os.SEEK_CUR)
    if len(header) < 8 or not promised or promised > there:
        raise Unfinished(
            f"{printable(file)} is cut short or still being written: its header promises "
            f"{promised:,} bytes of sound and {there:,} are there; export or copy it again"
            + (" (to a file, not to a pipe)" if promised > 0xFFFF_0000 else "")
        )
    if not rate:
        raise InputError(f"{printable(file)} is a damaged WAV: its header has no byte rate")
    return promised / rate


def inspect_file(file: Path, kind: Kind) -> Media:
    """Look at a file before anything is sent; raises InputError that names it."""
    name, (limit, wanted) = printable(file), LIMITS[kind]
    try:
        if not file.is_file():
            problem = "is not a file" if file.exists() else "does not exist"
            raise InputError(f"{name} {problem}: give the path of {wanted}")
        with file.open("rb") as stream:
            size, head = os.fstat(stream.fileno()).st_size, stream.read(16)
        content_type, seconds = sniff(head, kind), None
        if not content_type:
            short = size < 44 and (not size or head.startswith(b"RIFF"[:size]))
            problem = "is empty or cut short" if short else "is something else"
            raise (Unfinished if short else InputError)(f"{name} {problem}: give {wanted}")
        if size > limit:
            raise InputError(f"{name} has {size:,} bytes; Hedra takes at most {limit:,}")
        if content_type == "audio/wav":
            seconds = wav_seconds(file, size)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from error
    if seconds is not None and not MIN_SECONDS <= seconds <= MAX_SECONDS:
        limits = f"{MIN_SECONDS} to {MAX_SECONDS:.0f} s"
        raise InputError(f"{name} lasts {seconds:.2f} s; Hedra takes {limits}")
    return Media(content_type, size, seconds)


def field(data: Any, name: str, where: str, kind: type | tuple[type, ...] = object) -> Any:
    """A field that must be there; raises ApiError that names it where it is not."""
    value = data.get(name) if isinstance(data, dict) else None
    if value in (None, "") or not isinstance(value, kind):
        text = f"Hedra's answer to {where} has no {name!r}: its API may have changed"
        raise ApiError(text, ambiguous=True, retryable=True)
    return value


def parse_time(text: Any) -> float | None:
    """Seconds since the epoch from an ISO-8601 instant, or None."""
    import datetime

    try:
        moment = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def seconds_until(text: Any) -> float | None:
    """Seconds from now to an ISO-8601 instant, at least 0, or None."""
    moment = parse_time(text)
    return None if moment is None else max(0.0, moment - time.time())


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait from a Retry-After header: a number or an HTTP date, else None."""
    try:
        seconds = float(value or "")
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            seconds = max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < math.inf else None


def parse_failure(error: Any, message: Any = None) -> tuple[str, bool]:
    """Why a generation failed, in Hedra's words, and whether Hedra says that may pass."""
    error = error if isinstance(error, dict) else {"message": error}
    code, reason = str(error.get("type") or error.get("code") or ""), error.get("reason_code") or ""
    # gRPC, which the codes are modelled on, calls UNAVAILABLE alone a transient condition.
    transient = "TRANSIENT" in reason or code == "UNAVAILABLE" or error.get("retryable") is True
    labels = ", ".join(word for word in (code, reason) if word)
    text = str(error.get("message") or message or "no reason given")
    return (f"{text} ({labels})" if labels else text), transient


def parse_status(data: Any, where: str) -> Status:
    """A status reply of either API. A word that nobody knows counts as work in progress."""
    state = STATES.get(str(field(data, "status", where)).lower(), PROCESSING)
    progress = data.get("progress")
    failed = (data.get("error"), data.get("error_message"))
    failure, transient = parse_failure(*failed) if state == FAILED else ("", False)
    return Status(
        state, min(1.0, max(0.0, progress)) if isinstance(progress, int | float) else None,
        str(data.get("download_url") or data.get("url") or ""), str(data.get("asset_id") or ""),
        failure, transient, seconds_until(data.get("estimated_completion_at")),
    )


def parse_model(entry: dict[str, Any]) -> Model:
    """One row of the v2 catalogue; ids may be null there, then the slug is the id."""
    slug, limit = str(entry.get("slug") or ""), entry.get("max_duration_ms")
    return Model(
        str(entry.get("id") or slug), slug, str(entry.get("name") or slug),
        tuple(entry.get("resolutions") or ()), tuple(entry.get("aspect_ratios") or ()),
        limit / 1000 if limit else None,
        {name: entry.get(name) for name in ("pricing", "price_details")},
    )


def parse_price(price: Mapping[str, Any], seconds: float, resolution: str) -> int | None:
    """Credits for a clip by a v2 catalogue entry, or None where it does not tell."""
    if pricing := price.get("pricing"):
        modifier = (pricing.get("modifiers") or {}).get("resolution", {}).get(resolution, 1.0)
        base, rate = pricing.get("base_cost") or 0, pricing.get("credits_per_second") or 0
        return math.ceil((base + rate * seconds) * float(modifier) - 1e-6)
    details = price.get("price_details") or {}
    units = {"second": seconds, "minute": seconds / 60, "generation": 1.0}
    count = units.get(str(details.get("billing_unit")).lower().rstrip("s"))
    cost, scale = details.get("credit_cost"), details.get("unit_scale") or 1
    return None if count is None or cost is None else math.ceil(cost * count / scale - 1e-6)


def takes_portrait_and_audio(entry: dict[str, Any]) -> bool:
    """Whether a catalogue row is of a model that could make an avatar."""
    slots = [slot for mode in entry.get("inputs") or () for slot in mode.get("slots") or ()]
    kinds = {slot.get("type") for slot in slots}
    image = entry.get("requires_start_frame") or "image" in kinds
    return bool(image and (entry.get("requires_audio_input") or "audio" in kinds))


def choose_model(entries: Sequence[dict[str, Any]], asked: str = "") -> Model | None:
    """The row that was asked for by id or slug, else Character 3, else None. Rows once had
    `ai_model_type` and `status`; today's have neither and are told by slug or name."""
    if asked:
        rows = [e for e in entries if asked in (e.get("id"), e.get("slug"))]
        return parse_model(rows[0]) if rows else None
    active = [e for e in entries if str(e.get("status") or "ACTIVE").upper() == "ACTIVE"]
    for name in ("ai_model_type", "slug", "name"):
        for entry in active:
            text = re.sub(r"[\s_]+", "-", str(entry.get(name) or "").lower())
            if re.search(r"\bcharacter-3$", text):
                return parse_model(entry)
    return None


def error_words(body: Any) -> tuple[dict[str, Any], str]:
    """The error object and the words in it, from any of the shapes that Hedra answers with."""
    if isinstance(body, str):  # the page of a proxy
        return {}, " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", body).split())[:200]
    if not isinstance(body, dict):
        return {}, ""
    error = body["error"] if isinstance(body.get("error"), dict) else body
    parts = [error.get("message"), body.get("error") if error is body else None]
    rows = error.get("details") or body.get("detail") or error.get("messages") or ()
    for row in [rows] if isinstance(rows, str) else rows:
        if isinstance(row, dict):
            where = row.get("field") or ".".join(str(step) for step in row.get("loc") or ())
            row = f"{where}: {row.get('message') or row.get('msg')}"
        parts.append(row)
    if isinstance(billing := error.get("billing"), dict):
        parts.append(billing_words(billing))
    return error, "; ".join(dict.fromkeys(str(part) for part in parts if part))


def billing_words(billing: dict[str, Any]) -> str:
    """Balance, price and where to add funds, from a 402 of the jobs API."""
    unit, price = billing.get("currency") or "USD", billing.get("required")
    text = f"balance {amount(float(billing.get('balance') or 0), unit)}, "
    text += f"price {amount(float(price), unit)}, " if price is not None else ""
    return f"{text}add funds at {billing.get('funding_url')}"


HINTS = (  # status, a pattern of the server's words, what a person can do
    (401, "", "check HEDRA_API_KEY: a v3 key is id:secret, a v2 key has no colon"),
    (402, "available: 0", "nothing was paid; with credits on the dashboard set HEDRA_WORKSPACE_ID"),
    (402, "", "nothing was paid; add funds and run the same command again"),
    (403, "scope", "make a key with that scope in Hedra's developer console"),
    (403, "plan", "the plan of this account has no API access: change it at Hedra"),
    (403, "", "if the account has moved to the new API, make a key with a colon (id:secret) there"),
    (413, "", "the file is too large for Hedra"),
)
LATER = "run the same command again later; what was paid for by then is not lost"


def parse_error(status: int, headers: Mapping[str, str], body: Any, where: str) -> ApiError:
    """An error answer as an exception that carries Hedra's own words."""
    error, words = error_words(body)
    code = str(error.get("error_code") or error.get("code") or "")
    trace = str(body.get("trace_id") or "") if isinstance(body, dict) else ""
    after = parse_retry_after(str(error.get("retry_after") or headers.get("Retry-After") or ""))
    broke = status == 402 or code in ("MISSING_CREDITS", "INSUFFICIENT_BALANCE")
    text = f"Hedra answered {status} to {where}: {words or 'no reason given'}"
    text += f" [trace id {trace}]" if trace else ""
    known = (402 if broke else status, words.lower())
    hints = [hint for at, pattern, hint in HINTS if at == known[0] and pattern in known[1]]
    if 300 <= status < 400:
        hints = ["redirects are not followed with a key; check HEDRA_BASE_URL"]
    hints += [LATER] if status in (408, 425, 429) or status >= 500 else []
    return (RateLimited if status == 429 else OutOfCredits if broke else ApiError)(
        "; ".join([text, *hints[:1]]), status=status, code=code, words=words, trace_id=trace,
        retry_after=after, ambiguous=status in (408, 409) or status >= 500,
        # A 5xx is worth another try whatever it says of itself: the document's own example of a
        # 500 says that it is not, and the page of a proxy says nothing.
        retryable=status in (408, 425, 429) or status >= 500 or error.get("retryable") is True,
    )


# -----------------------------------------------------------------------------
# retry: retry, backoff_s
# -----------------------------------------------------------------------------


P = ParamSpec("P")
T = TypeVar("T")
Sleep = Callable[[float], object]
Advance = Callable[[int], object]  # told of bytes that have moved


def backoff_s(failures: int, base: float, factor: float = 2.0, cap: float = 30.0) -> float:
    """Full jitter: a random wait in seconds, up to base * factor ** failures and to the cap.

    So that many clients that failed together do not come back together.
    """
    import random

    return random.uniform(0.0, min(cap, base * factor ** min(failures, 60)))


def retry(
    exceptions: type[BaseException] | tuple[type[BaseException], ...],
    tries: int = 3,
    delay: float = 2,
    backoff: float = 2,
    *,
    max_delay: float = 30.0,
    sleep: Sleep | None = None,
    on_retry: Callable[[BaseException], object] | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: call again, up to `tries` times in all, when one of `exceptions` is raised.

    Waits a random time of up to min(max_delay, delay * backoff ** n) seconds before try n + 2, or
    what the exception's `retry_after` asks for. An exception whose `retryable` is False, or whose
    `retry_after` is over MAX_RETRY_AFTER_S, is raised at once; the last one always is.
    """
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
                    if not getattr(error, "retryable", True) or (after or 0) > MAX_RETRY_AFTER_S:
                        raise
                    if on_retry:
                        on_retry(error)
                    wait = backoff_s(failures, delay, backoff, max_delay)
                (sleep or time.sleep)(wait if after is None else after)
            return function(*args, **kwargs)

        return wrapper

    return decorate


# -----------------------------------------------------------------------------
# files: locked, write_durably
# -----------------------------------------------------------------------------


def try_lock(path: Path) -> int | None:
    """The descriptor of a lock file if it could be locked now. The kernel drops the lock with
    its process. Raises HedraError where locks do not work."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have removed or renamed the file between our open and our lock.
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def locked(path: Path, sleep: Sleep, waiting: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Hold the lock `path`; `waiting` is called once, if somebody else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tries = 0
    while (descriptor := try_lock(path)) is None:
        if tries == 1:
            waiting()
        tries += 1
        sleep(min(0.5, 0.02 * tries))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str, *, sync: bool = True) -> None:
    """Replace a small file in one step: whoever reads it sees the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        # In JSON a backslash escape stands for the bytes of a file name that are no UTF-8.
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


# -----------------------------------------------------------------------------
# transport: Governor, Transport, iter_polls
# -----------------------------------------------------------------------------


class Governor:
    """How much at once, for one process: additive increase, multiplicative decrease.

    Two things are kept apart: the pace of requests (`gap_s` between two of them), which a refusal
    for rate slows down, and the generations in flight (`limit`), which a refusal for concurrency
    lowers to what is running. Both grow again with every request that is accepted. Only AHEAD more
    clips than that upload already, so that what is ready is not queued behind what is not.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.place_free, self.turn = (threading.Condition(self.lock) for _ in range(2))
        self.gap_s, self.next_at, self.slowed_at = 0.0, 0.0, -math.inf
        self.refusals, self.accepted_at = 0, [-math.inf] * 32
        self.limit, self.refused, self.stopped = 4.0, False, False
        self.ready, self.active, self.running = 0, 0, 0  # to be submitted, with a place, accepted
        self.told = -math.inf
        self.notice: Callable[[str], object] = lambda text: None  # of long waits

    def pace(self, sleep: Sleep) -> float:
        """Wait until a request may go out; the moment at which it does."""
        with self.lock:
            now = time.monotonic()
            at = max(now, self.next_at)
            self.next_at = at + self.gap_s
            if at - now > 5 and now > self.told:
                self.notice(f"waiting {at - now:.0f} s, as Hedra asks for it")
                self.told = at
        if at > now:
            sleep(at - now)
        return at

    def accepted(self) -> None:
        """A request was not refused: a little faster from now on."""
        with self.lock:
            self.refusals = 0
            self.accepted_at = [*self.accepted_at[1:], time.monotonic()]
            if self.gap_s:
                rate = 1 / self.gap_s + 0.02
                self.gap_s = 1 / rate if rate < 100 else 0.0

    def too_fast(self, error: RateLimited) -> None:
        """A request was refused for rate: slower, and nothing before Hedra wants it."""
        with self.lock:
            now = time.monotonic()
            if error.sent_at >= self.slowed_at:  # else the echo of a burst that was answered for
                lately = max(1, sum(now - at < 1.0 for at in self.accepted_at))
                self.gap_s = min(5.0, 1.2 * self.gap_s or 1.1 / lately)
                self.slowed_at, self.refusals = now, self.refusals + 1
            after = error.retry_after
            pause = backoff_s(self.refusals, 0.5, cap=8.0) if after is None else after
            self.next_at = max(self.next_at, now + pause)

    def begin(self) -> None:
        """Wait until it is this clip's turn to upload."""
        with self.lock:
            while self.active + self.ready >= self.limit + AHEAD and not self.stopped:
                self.turn.wait()
            if self.stopped:
                raise Stopped("not submitted, as the program stops; nothing was paid for it")
            self.ready += 1

    def take(self, *, resumed: bool = False) -> None:
        """Take a place among the generations in flight; a resumed one has its place already."""
        with self.lock:
            while not resumed and self.active >= self.limit and not self.stopped:
                self.place_free.wait()
            if self.stopped and not resumed:
                raise Stopped("not submitted, as the program stops; nothing was paid for it")
            self.active += 1
            self.running += resumed
            self.ready -= not resumed

    def leave(self) -> None:
        """A clip that had its turn is not submitted after all."""
        with self.lock:
            self.ready -= 1
            self.turn.notify()

    def give(self, *, running: bool) -> None:
        """Give a place back: the generation has ended, or the submit failed and may come again."""
        with self.lock:
            self.active -= 1
            self.running -= running
            self.ready += not running
            self.wake()

    def too_many(self) -> None:
        """The account would not have one more generation at once."""
        with self.lock:
            self.limit, self.refused = float(max(1, self.running)), True

    def grow(self) -> None:
        """A submit was accepted: one place more, or, after a refusal, one more a round."""
        with self.lock:
            self.running += 1
            self.limit += 1 / self.limit if self.refused else 1
            self.wake()

    def wake(self) -> None:
        """There may be a place more, and one that growing has made."""
        self.place_free.notify(2)
        self.turn.notify(2)

    def stop(self) -> None:
        """Let nobody wait for a place any more."""
        with self.lock:
            self.stopped = True
            self.place_free.notify_all()
            self.turn.notify_all()

    def poll_interval(self, asked_s: float, gap_s: float) -> float:
        """Seconds between two polls of a clip, so that all in flight leave requests for the rest:
        `gap_s` is what the API allows between any two polls."""
        return max(asked_s, self.running * max(gap_s, 1.5 * self.gap_s))


def lost(error: Exception, where: str, silence_s: float) -> ApiError:
    """What became of a request that got no answer, as an exception to retry or to look into."""
    from urllib3 import exceptions as u

    unsent = isinstance(error, u.NewConnectionError | u.ConnectTimeoutError)
    if unsent:
        what = "the server cannot be reached"
    elif isinstance(error, u.SSLError):
        what = f"the secure connection failed ({error})"
    else:
        silent = isinstance(error, u.TimeoutError)
        what = f"no byte came for {silence_s:g} s" if silent else "the connection broke"
    text = f"no answer to {where}: {what}; {LATER}"
    return ApiError(text, retryable=True, ambiguous=not unsent)


class Transport:
    """One account's way to Hedra: a keep-alive pool, the pace, and every fault as an ApiError.

    Safe for threads. `tally` counts requests, retries and bytes; `for_clip()` is the same pool
    with a tally of its own.
    """

    def __init__(
        self, account: Account, *, connections: int = 3, sleep: Sleep | None = None
    ) -> None:
        self.account, self.connections = account, connections
        self.sleep: Sleep = sleep or (lambda seconds: time.sleep(seconds))
        self.governor = Governor()
        self.opening, self.looking_up = threading.Lock(), threading.Lock()
        self.pools: list[urllib3.PoolManager] = []
        self.tally = dict.fromkeys(("requests", "retries", "bytes_up", "bytes_down"), 0)

    def for_clip(self) -> Transport:
        """The same connections and pace, with a tally of its own."""
        from copy import copy

        twin = copy(self)
        twin.tally = dict.fromkeys(self.tally, 0)
        return twin

    def pool(self) -> urllib3.PoolManager:
        """The connection pool, opened at the first request: a finished clip needs none."""
        with self.opening:
            if not self.pools:
                pool = need("urllib3").PoolManager
                self.pools.append(pool(maxsize=self.connections, block=True, retries=False))
            return self.pools[0]

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: Any = None,
        silence_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """One request; the answer with its body unread. Redirects are never followed: urllib3
        would forward X-API-Key to another host."""
        pool, silence_s = self.pool(), silence_s or self.account.silence_s
        import urllib3

        self.tally["requests"] += 1
        try:
            return pool.request(
                method, url, body=body, preload_content=False, redirect=False, retries=False,
                headers={"User-Agent": f"hedra_avatar/{__version__}", **headers},
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=silence_s),
            )
        except urllib3.exceptions.HTTPError as error:
            where = f"{method} {urlsplit(url).hostname}{urlsplit(url).path}"
            raise lost(error, where, silence_s) from None

    def open(
        self, method: str, path: str, headers: Mapping[str, str], body: Any = None,
        silence_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """One request to the API, with the key; raises ApiError for any answer but 2xx."""
        key = self.account.key
        mine = {"Authorization": f"Bearer {key}"} if ":" in key else {"X-API-Key": key}
        headers = {"Accept": "application/json", **mine, **headers}
        sent_at = self.governor.pace(self.sleep)
        response = self.send(method, self.account.base_url + path, headers, body, silence_s)
        if response.status != 429:
            self.governor.accepted()
        if 200 <= response.status < 300:
            return response
        where, text = f"{method} {path}".split("?")[0], ""
        with contextlib.suppress(ApiError):  # a body that is cut takes nothing from the status
            text = self.text(response, where)
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        error = parse_error(response.status, response.headers, body, where)
        error.sent_at = sent_at
        if response.status in (401, 403, 404) and (note := mismatch(self.account)):
            error.args = (f"{error}; {note}",)
        raise error

    def text(self, response: urllib3.BaseHTTPResponse, where: str) -> str:
        """The whole body, without the key should the server echo it."""
        import urllib3

        try:
            text = response.read().decode("utf-8", "replace")
        except urllib3.exceptions.HTTPError as error:
            raise lost(error, where, self.account.silence_s) from None
        finally:
            response.release_conn()
        self.tally["bytes_down"] += len(text)
        for secret in (self.account.key, self.account.key.partition(":")[2]):
            text = text.replace(secret, "[key]") if len(secret) > 3 else text
        return text

    def api(
        self, method: str, path: str, *, send: Any = None, body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """One API request: `send` goes out as JSON (or `body` as it is), JSON comes back."""
        headers, where = dict(headers or {}), f"{method} {path}".split("?")[0]
        if send is not None:
            body, headers["Content-Type"] = json.dumps(send).encode(), "application/json"
        text = self.text(self.open(method, path, headers, body), where)
        try:
            return json.loads(text)
        except ValueError:
            text = f"Hedra's answer to {where} is no JSON: {error_words(text)[1][:80]!r}; {LATER}"
            raise ApiError(text, retryable=True, ambiguous=True) from None

    def persist(self, attempt: Callable[[], T]) -> T:
        """Repeat a harmless request: a few times after faults, patiently while refused for rate."""
        refusals = 0

        def paced() -> T:
            nonlocal refusals
            while True:
                try:
                    return attempt()
                except RateLimited as error:
                    refusals += 1
                    if refusals > PATIENCE or (error.retry_after or 0) > MAX_RETRY_AFTER_S:
                        raise
                    self.count_retry(error)
                    self.governor.too_fast(error)

        return retry(ApiError, TRIES, 1, sleep=self.sleep, on_retry=self.count_retry)(paced)()

    def count_retry(self, error: BaseException) -> None:
        """For the tally."""
        self.tally["retries"] += 1

    def call(self, method: str, path: str, *, send: Any = None) -> Any:
        """An API request that may be repeated without harm."""
        return self.persist(lambda: self.api(method, path, send=send))

    def upload(self, path: str, file: Path, advance: Advance) -> Any:
        """Send a file as the multipart field `file`, streamed and with an exact length."""
        sent = 0

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            self.tally["bytes_up"] += size
            advance(size)

        def attempt() -> Any:
            nonlocal sent
            advance(-sent)
            sent = 0
            headers, body = multipart(file, count)
            return self.api("POST", path, headers=headers, body=body)

        return self.persist(attempt)

    def fetch(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """GET a file from another host: without the key, and only over an encrypted line."""
        for _ in range(5):
            plain = {"Accept-Encoding": "identity", **headers}
            response = self.send("GET", clean_url(url), plain)
            target = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not target:
                return response
            response.drain_conn()
            url = urljoin(url, target)
        raise ApiError("the video's address redirects in a circle", retryable=True)


def multipart(file: Path, count: Advance) -> tuple[dict[str, str], Iterator[bytes]]:
    """Headers and body of an upload. The name in it is ours: a file's own may break a header."""
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InputError(f"{printable(file)} cannot be read: {error.strerror}") from error
    size, head = os.fstat(stream.fileno()).st_size, stream.read(16)
    content_type = sniff(head, "") or "application/octet-stream"
    boundary = f"hedra-avatar-{os.urandom(12).hex()}"
    opening = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
        f'filename="file.{content_type.rpartition("/")[2]}"\r\n'
        f"Content-Type: {content_type}\r\n\r\n"
    ).encode()
    closing = f"\r\n--{boundary}--\r\n".encode()

    def body() -> Iterator[bytes]:
        with stream:
            yield opening
            stream.seek(0)
            left = size
            while left and (block := stream.read(min(BLOCK_BYTES, left))):
                yield block
                left -= len(block)
                count(len(block))
            if left:
                raise InputError(f"{printable(file)} shrank while it was sent; run it again")
            yield closing

    return {
        "Content-Type": f"multipart/form-data; boundary={boundary}",
        "Content-Length": str(len(opening) + size + len(closing)),
    }, body()


@contextlib.contextmanager
def given_back(response: urllib3.BaseHTTPResponse) -> Iterator[None]:
    """Give the connection of an answer back to the pool, which counts them: open if the body was
    read to its end, else closed."""
    try:
        yield
    finally:
        response.close()
        response.release_conn()


class Wait(NamedTuple):
    """How to wait for a generation: seconds between polls, and when to stop (time.monotonic)."""

    interval_s: float
    deadline: float
    eta_s: float | None = None


def poll_wait_s(interval: float, elapsed: float, polls: int, left: float | None) -> float:
    """Seconds to the next poll, `left` before the expected end (None: nobody knows it).

    Never more polls than one each interval would have made by then: what is saved early, when a
    look tells little, is spent after the expected end, where it matters.
    """
    if left is None:
        return interval if polls else 0.0
    if left > interval:
        return min(2 * interval, left / 2)
    return max(left, 0.0 if not polls else interval / 4, polls * interval - elapsed)


def iter_polls(
    http: Transport, look: Callable[[], Status], wait: Wait, gap_s: float
) -> Iterator[Status]:
    """Look at a generation until it has ended; raises StillRunning at the deadline.

    Polls that fail are only failed polls: the generation is paid for and goes on. A 404 within
    GRACE_S means that Hedra has not caught up with its own submit yet.
    """
    started, failures, polls, pause = time.monotonic(), 0, 0, 0.0
    due = None if wait.eta_s is None else started + wait.eta_s
    while True:
        now, interval = time.monotonic(), http.governor.poll_interval(wait.interval_s, gap_s)
        left = None if due is None else due - now
        pause = max(pause, poll_wait_s(interval, now - started, polls, left))
        if polls and now >= wait.deadline:
            raise StillRunning("the time given for it has passed")
        http.sleep(max(0.0, min(pause, wait.deadline - now)))
        polls, pause = polls + 1, 0.0
        try:
            status = look()
        except ApiError as error:
            early = error.status == 404 and time.monotonic() - started < GRACE_S
            if isinstance(error, RateLimited):
                http.governor.too_fast(error)
            elif early or (error.retryable and failures < POLL_FAILURES - 1):
                failures += 1
            else:
                raise
            http.count_retry(error)
            pause = backoff_s(failures, 0.5, cap=10.0)
            continue
        yield status
        if status.state in ENDED:
            return
        failures = 0
        due = due if status.eta_s is None else time.monotonic() + status.eta_s


# -----------------------------------------------------------------------------
# web API v2: WebApi
# -----------------------------------------------------------------------------


UUID_SHAPE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def api_name(file: Path) -> str:
    """A file's name as an asset's name: what cannot be sent as UTF-8 is replaced."""
    return file.name.encode("utf-8", "replace").decode()[:255]


class WebApi:
    """Hedra's web API, v2: assets, generations named by an id of ours, credits."""

    unit = "credits"
    looks_up = True  # a lost submit can be looked for
    poll_gap_s = 0.01  # of all clips in flight together

    def __init__(self, http: Transport) -> None:
        self.http = http

    def over(self, http: Transport) -> WebApi:
        """The same API over another view of the transport."""
        return WebApi(http)

    def mine(self, **values: Any) -> dict[str, Any]:
        """A request body, with the workspace where one is set."""
        workspace = self.http.account.workspace
        return {**values, "workspace_id": workspace} if workspace else values

    def create_asset(self, name: str, kind: Kind) -> str:
        """Make the record that a file is uploaded to; its id."""
        body = self.mine(name=name, type=kind)
        return str(field(self.http.call("POST", "/assets", send=body), "id", "POST /assets"))

    def upload_asset(self, asset_id: str, file: Path, advance: Advance) -> None:
        """Send the bytes of an asset."""
        try:
            self.http.upload(f"/assets/{quote(asset_id, safe='')}/upload", file, advance)
        except ApiError as error:
            if error.status != 409:  # it has the bytes from a try whose answer was lost
                raise

    def upload(self, file: Path, kind: Kind, advance: Advance) -> Asset:
        """Hand a file to Hedra; what a submit names it by."""
        asset_id = self.create_asset(api_name(file), kind)
        self.upload_asset(asset_id, file, advance)
        return Asset(asset_id)

    def model(self, asked: str) -> Model:
        """The model asked for by id or slug, or Character 3, from the catalogue."""
        entries = self.http.call("GET", "/models")
        entries = field({"models": entries}, "models", "GET /models", list)
        if model := choose_model(entries, asked):
            return model
        if asked:  # the catalogue does not list all that works: the submit has the last word
            return Model(asked, "" if UUID_SHAPE.fullmatch(asked) else asked)
        names = [parse_model(e) for e in entries if takes_portrait_and_audio(e)]
        listed = ", ".join(f"{m.slug or m.id} ({m.name})" for m in names) or "none at all"
        raise HedraError(
            "this account has no Character 3 model; set HEDRA_MODEL_ID (or give --model) to one "
            f"that takes a portrait and audio: {listed}"
        )

    def submit(self, order: Order) -> Job:
        """Start, and pay for, a generation. One request, never repeated here."""
        name = order.model.slug or order.model.id
        by_id = not order.model.slug and UUID_SHAPE.fullmatch(order.model.id)
        body = self.mine(
            type="video",
            start_keyframe_id=order.image,
            audio_id=order.audio,
            generated_video_inputs={  # no duration_ms: it follows the audio, and is billed by it
                "text_prompt": order.prompt,
                "resolution": order.resolution,
                "aspect_ratio": order.aspect_ratio,
            },
        )
        body["ai_model_id" if by_id else "model_slug"] = name
        if order.reserved:
            body["generation_id"] = order.reserved
        reply = self.http.api("POST", "/generations", send=body)
        return Job(str(field(reply, "id", "POST /generations")), reply.get("eta_sec"))

    def look(self, generation_id: str) -> Status:
        """One look at a generation."""
        path = f"/generations/{quote(generation_id, safe='')}/status"
        return parse_status(self.http.api("GET", path), f"GET {path}")

    def find(self, reserved: str, audio: str = "", since: float = 0.0) -> str:
        """The id of a generation that was submitted as `reserved` or with the asset `audio`, or
        "": a server may have ignored the reserved id, and an asset belongs to one take."""
        try:
            self.http.persist(lambda: self.look(reserved))
            return reserved
        except ApiError as error:
            if error.status != 404:
                raise
        rows = self.iter_rows(created_after=iso_time(since - 86400)) if audio else ()
        return next((str(row["id"]) for row in rows if audio in audio_ids(row)), "")

    def find_all(self, reserved: Sequence[str]) -> set[str]:
        """Which of many reserved ids exist: a folder's worth of `find` in a few requests."""
        found: set[str] = set()
        for start in range(0, len(reserved), 50):
            rows = self.iter_rows(ids=",".join(reserved[start : start + 50]))
            found.update(str(row.get("id")) for row in rows)
        return found & set(reserved)

    def iter_rows(self, **query: str) -> Iterator[dict[str, Any]]:
        """The rows of the list of generations, page by page."""
        seen: set[str] = set()
        while True:
            page = {**query, "type": "video", "limit": "100", "offset": str(len(seen))}
            reply = self.http.call("GET", f"/generations?{urlencode(page)}")
            rows = field(reply, "data", "GET /generations", list)
            fresh = [row for row in rows if str(row.get("id")) not in seen]
            yield from fresh
            seen.update(str(row.get("id")) for row in fresh)
            if not fresh or len(rows) < 100:
                return

    def iter_status(self, generation_id: str, wait: Wait) -> Iterator[Status]:
        """Looks at a generation until it has ended; raises StillRunning at the deadline."""
        return iter_polls(self.http, lambda: self.look(generation_id), wait, self.poll_gap_s)

    def result(self, generation_id: str) -> Status:
        """A fresh address of the video: from the status or, where that has none, the asset."""
        status = self.http.persist(lambda: self.look(generation_id))
        if status.url or not status.asset_id:
            return status
        query = urlencode({"type": "video", "ids": status.asset_id})
        for row in self.http.call("GET", f"/assets?{query}") or ():
            asset = row.get("asset") or {}
            if row.get("id") == status.asset_id and (asset.get("download_url") or asset.get("url")):
                return status._replace(url=asset.get("download_url") or asset["url"])
        return status

    def price(self, order: Order, seconds: float | None) -> float | None:
        """Credits for a clip, or None where the catalogue does not tell. [Real bills have run up
        to 17 % over it.]"""
        known = order.model.price if seconds is not None else None
        return parse_price(known, seconds or 0, order.resolution) if known else None

    def balance(self) -> Balance:
        """What is left, of the workspace where one is set."""
        reply = self.http.call("GET", "/billing/credits")
        left = field(reply, "remaining", "GET /billing/credits", (int, float))
        pools = reply.get("workspace_credit_pool") or {}
        if pool := pools.get(self.http.account.workspace):
            left = field(pool, "available", "GET /billing/credits", (int, float))
        more = {name: reply[name] for name in ("used", "expiring") if name in reply}
        return Balance(left, self.unit, more)


def audio_ids(row: dict[str, Any]) -> list[str]:
    """The recordings that a row of the list of generations was made with."""
    used = (row.get("input") or {}).get("audio_id") or []
    return used if isinstance(used, list) else [used]


def iso_time(moment: float) -> str:
    """An instant as Hedra reads it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, moment)))


# -----------------------------------------------------------------------------
# jobs API v3: JobsApi, iter_events
# -----------------------------------------------------------------------------


STREAM_TRIES = 3
FIRST_FRAME_S = 10.0  # a stream silent from its start is being buffered by somebody


class Event(NamedTuple):
    """A frame of a stream; a comment is an Event with no name and no data."""

    name: str = ""
    data: str = ""
    id: str = ""
    retry_s: float | None = None


def iter_events(blocks: Iterable[bytes]) -> Iterator[Event]:
    """Server-sent events from a body that arrives in arbitrary pieces (WHATWG HTML, 9.2.6).

    A frame is complete at its blank line; one that was cut is dropped.
    """
    buffer, name, data, last_id = b"", "", list[str](), ""
    for block in blocks:
        lines = re.split(rb"\r\n|\n|\r(?!$)", buffer + block)
        buffer = lines.pop()
        for raw in lines:
            line = raw.decode("utf-8", "replace")
            key, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                if data or name:
                    yield Event(name or "message", "\n".join(data), last_id)
                name, data = "", []
            elif not key:
                yield Event()
            elif key == "event":
                name = value
            elif key == "data":
                data.append(value)
            elif key == "id":
                last_id = value
            elif key == "retry" and value.isdigit():
                yield Event(retry_s=int(value) / 1000)


class JobsApi:
    """Hedra's jobs API, v3: files by handles that lapse, jobs named by an idempotency key, dollars.

    The same verbs as WebApi's, in the same order.
    """

    unit = "USD"
    looks_up = False  # a submit with the same idempotency key is the look: it replays the first
    poll_gap_s = 1.25  # 60 requests a minute and key, a fifth of them kept for the rest

    def __init__(self, http: Transport) -> None:
        self.http = http
        self.quoted: dict[tuple[str, ...], dict[float, float]] = {}

    def over(self, http: Transport) -> JobsApi:
        """The same API over another view of the transport."""
        return JobsApi(http)

    def create_asset(self, name: str, kind: Kind) -> str:
        """The jobs API has no such step; always raises InputError."""
        raise InputError(
            "create_asset and upload_asset are of the web API (v2), and this key belongs to the "
            "jobs API (v3): call upload(file, kind, api_key), which serves both"
        )

    def upload_asset(self, asset_id: str, file: Path, advance: Advance) -> None:
        """The jobs API has no such step; always raises InputError."""
        self.create_asset("", "image")

    def upload(self, file: Path, kind: Kind, advance: Advance) -> Asset:
        """Hand a file to Hedra; its handle, which lapses after an hour."""
        reply = self.http.upload("/files", file, advance)
        handle = str(field(reply, "url", "POST /files"))
        return Asset(handle, parse_time(reply.get("expires_at")) or time.time() + 3600)

    def model(self, asked: str) -> Model:
        """The model asked for, or Character 3. A v2 slug ends in the v3 id."""
        name = asked.rpartition("/")[2] or "hedra-character-3"
        return Model(name, name, name, RESOLUTIONS, ASPECT_RATIOS, MAX_SECONDS)

    def submit(self, order: Order) -> Job:
        """Start, and pay for, a job; the same `reserved` replays the first answer."""
        body: dict[str, Any] = {
            "input": {
                **self.wishes(order),
                "start_image": {"source": "url", "url": order.image},
                "audio": {"source": "url", "url": order.audio},
            }
        }
        if order.reserved:
            body["idempotency_key"] = order.reserved
        reply = self.http.api("POST", self.path(order), send=body)
        job_id = str(field(reply, "job_id", "the submit"))
        return Job(job_id, seconds_until(reply.get("estimated_completion_at")))

    def path(self, order: Order) -> str:
        """Where a model is run."""
        return f"/models/{quote(order.model.id.rpartition('/')[2], safe='')}"

    def wishes(self, order: Order) -> dict[str, Any]:
        """The part of a submit's input that is not a file."""
        return {
            "prompt": order.prompt,
            "aspect_ratio": order.aspect_ratio,
            "resolution": order.resolution,
        }

    def look(self, job_id: str) -> Status:
        """One look at a job."""
        path = f"/jobs/{quote(job_id, safe='')}/status"
        return parse_status(self.http.api("GET", path), f"GET {path}")

    def find(self, reserved: str, audio: str = "", since: float = 0.0) -> str:
        """Nothing to look for: no list tells a job by its key, and a repeated submit is safe."""
        return ""

    def find_all(self, reserved: Sequence[str]) -> set[str]:
        """Nothing to look for, see `find`."""
        return set()

    def iter_status(self, job_id: str, wait: Wait) -> Iterator[Status]:
        """Changes of a job from its stream; where that does not answer, by polling. Raises
        StillRunning at the deadline."""
        with contextlib.closing(self.iter_looks(job_id, wait)) as looks:
            status = Status(QUEUED)
            while status.state not in ENDED:
                status = next(looks)
                if status.state not in ENDED:
                    yield status
        result = self.result(job_id)  # the stream's connection is free by now
        yield result if result.state in ENDED else result._replace(state=status.state)

    def iter_looks(self, job_id: str, wait: Wait) -> Generator[Status, None, None]:
        """Frames of the stream, reopened where it is cut; after STREAM_TRIES in vain, polls."""
        vain, last_id = 0, ""
        polls = iter_polls(self.http, lambda: self.look(job_id), wait, self.poll_gap_s)
        while vain < STREAM_TRIES:
            vain, pause_s = vain + 1, wait.interval_s
            try:
                with contextlib.closing(self.iter_stream(job_id, last_id, wait)) as events:
                    for event in events:
                        last_id, pause_s = event.id or last_id, event.retry_s or pause_s
                        if event.name == "status":
                            vain = 0
                            yield parse_event(event)
            except ApiError as error:
                if isinstance(error, RateLimited):
                    self.http.governor.too_fast(error)
                vain = STREAM_TRIES if error.code == "BUFFERED" else vain
            yield next(polls)  # what has been missed
            if vain < STREAM_TRIES:
                self.http.sleep(min(pause_s, max(0.0, wait.deadline - time.monotonic())))
        yield from polls

    def iter_stream(self, job_id: str, last_id: str, wait: Wait) -> Generator[Event, None, None]:
        """The events of one connection to a job's stream; ends where the stream does."""
        path = f"/jobs/{quote(job_id, safe='')}/stream"
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if last_id:
            headers["Last-Event-Id"] = last_id
        first_s = min(FIRST_FRAME_S, self.http.account.silence_s)
        response = self.http.open("GET", path, headers, silence_s=first_s)
        with given_back(response):
            if "text/event-stream" not in response.headers.get("Content-Type", ""):
                raise ApiError("the stream is none", code="BUFFERED", retryable=True)
            events = iter_events(self.iter_blocks(response, f"GET {path}"))
            for event in events:
                if time.monotonic() > wait.deadline:
                    raise StillRunning("the time given for it has passed")
                if event.name == "done":
                    return
                if event.name == "status" and is_last(event):
                    drain(response, events)
                yield event

    def iter_blocks(self, response: urllib3.BaseHTTPResponse, where: str) -> Iterator[bytes]:
        """The body of a stream as it arrives. Silence before the first byte means that something
        on the way holds it back; later, only that nothing has happened."""
        import urllib3

        patient = False
        try:
            while block := response.read1(BLOCK_BYTES, decode_content=False):
                self.http.tally["bytes_down"] += len(block)
                yield block
                if not patient:
                    patient = be_silent_for(response, self.http.account.silence_s)
        except urllib3.exceptions.HTTPError as error:
            broken = lost(error, where, FIRST_FRAME_S)
            broken.code = "" if patient else "BUFFERED"
            raise broken from None

    def result(self, job_id: str) -> Status:
        """The end of a job: address of the video, cost in dollars, or why there is none."""
        path = f"/jobs/{quote(job_id, safe='')}"
        reply = self.http.call("GET", path)
        status = parse_status(reply, f"GET {path}")
        output = (reply.get("outputs") or [{}])[0]
        if output.get("status") == "EXPIRED":
            raise HedraError(
                f"the video of {job_id} has expired: Hedra keeps outputs for 48 hours; "
                "--force pays for a new take"
            )
        if output.get("status") == "FAILED":
            failure, transient = parse_failure(output.get("error"))
            status = status._replace(state=FAILED, failure=failure, transient=transient)
        return status._replace(url=str(output.get("url") or ""), cost=reply.get("cost"))

    def price(self, order: Order, seconds: float | None) -> float | None:
        """Dollars for a clip, or None where Hedra does not tell before it has the files. Between
        two durations that were asked for the price is interpolated: a folder would else use up
        the minute's requests."""
        if seconds is None:
            return None
        known = self.quoted.setdefault((order.model.id, order.resolution, order.aspect_ratio), {})
        if (price := interpolate(known, seconds)) is not None:
            return price
        wishes = {**self.wishes(order), "duration_ms": round(seconds * 1000)}
        try:
            reply = self.http.call("POST", f"{self.path(order)}/estimate", send={"input": wishes})
        except ApiError as error:
            if error.status in (400, 404, 422):
                return None
            raise
        known[seconds] = float(field(reply, "cost", "the estimate", (int, float)))
        return known[seconds]

    def balance(self) -> Balance:
        """What is left in the wallet, in US dollars."""
        reply = self.http.call("GET", "/balance")
        left = float(field(reply, "balance", "GET /balance", (int, float)))
        return Balance(left, str(reply.get("currency") or self.unit))


def interpolate(known: Mapping[float, float], x: float) -> float | None:
    """The value at x between the two nearest known ones, None where x is not between any."""
    low = max((at for at in known if at <= x), default=None)
    high = min((at for at in known if at >= x), default=None)
    if low is None or high is None:
        return None
    share = (x - low) / (high - low) if high > low else 0.0
    return round(known[low] + share * (known[high] - known[low]), 4)


def be_silent_for(response: urllib3.BaseHTTPResponse, seconds: float) -> bool:
    """Let the rest of a body come with pauses of so many seconds; whether that could be set."""
    socket = getattr(getattr(response, "connection", None), "sock", None)
    if socket is not None:
        socket.settimeout(seconds)
    return socket is not None


def drain(response: urllib3.BaseHTTPResponse, events: Iterator[Event]) -> None:
    """Read what comes after the last status, for the next request to have the connection; not
    for long, as nothing depends on it."""
    if be_silent_for(response, 1.0):
        with contextlib.suppress(ApiError):
            for _ in zip(range(8), events, strict=False):
                continue


def parse_event(event: Event) -> Status:
    """What a status frame says."""
    try:
        return parse_status(json.loads(event.data), "its stream")
    except ValueError:
        raise ApiError("a frame of the stream is no JSON", retryable=True) from None


def is_last(event: Event) -> bool:
    """Whether a status frame is of a job that has ended."""
    return parse_event(event).state in ENDED


Api = WebApi | JobsApi


def api_for(http: Transport) -> Api:
    """The API that a key belongs to: the one place where the two are told apart."""
    return JobsApi(http) if ":" in http.account.key else WebApi(http)


# -----------------------------------------------------------------------------
# reporting: View, Lines, Bars, open_view
# -----------------------------------------------------------------------------


def written(stream: Any, text: str) -> bool:
    """Write a line in one piece, as others write, too; whether that worked. A pipe or a disk that
    takes no more words must not stop a clip."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: it is closed
        stream.write(f"{text}\n")
        stream.flush()
        return True
    return False


class View:
    """Where progress goes; this one shows nothing but results. `what` is a piece of a clip's
    work: its portrait, recording, generation or download."""

    verbose = 0
    mute = False  # while an outage has been told of
    deaf = False  # a result could not be written

    def say(self, text: str) -> None:
        """A line that belongs to no clip's progress."""

    def state(self, clip: str, state: str, detail: str = "") -> None:
        """A clip has changed its state."""

    def start(self, clip: str, what: str, total: int) -> None:
        """The bytes of `what` begin to move, `total` of them."""

    def advance(self, clip: str, what: str, count: int) -> None:
        """Bytes of `what` have moved."""

    def finish(self, clip: str, what: str) -> None:
        """`what` is over."""

    def progress(self, clip: str, state: str, fraction: float | None) -> None:
        """The generation is in `state`, this far (0..1)."""

    def expect(self, clips: int) -> None:
        """A batch of so many clips begins."""

    def done(self, clip: str, failed: bool, spent: str) -> None:
        """A clip of the batch is over; what the batch has cost by now."""

    def result(self, text: str) -> None:
        """A result, on standard output."""
        self.deaf |= not written(sys.stdout, text)

    def close(self) -> None:
        """Leave the terminal as it was."""


class Lines(View):
    """For logs: one plain line a change of state."""

    def __init__(self, verbose: int = 0) -> None:
        self.verbose, self.lock, self.states = verbose, threading.Lock(), dict[str, str]()

    def say(self, text: str) -> None:
        with self.lock:
            if not self.mute:
                written(sys.stderr, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}")

    def state(self, clip: str, state: str, detail: str = "") -> None:
        with self.lock:
            same = self.states.get(clip) == state
            self.states[clip] = state
        if not same:
            self.say(f"{clip}: {state}" + (f" ({detail})" if detail else ""))

    def progress(self, clip: str, state: str, fraction: float | None) -> None:
        if state != FAILED:  # that line comes with the reason
            self.state(clip, state)

    def done(self, clip: str, failed: bool, spent: str) -> None:
        with self.lock:
            self.states.pop(clip, None)


class Bars(View):
    """For a terminal: a bar for each thing that moves, or, in a batch, one for the whole."""

    def __init__(self, verbose: int = 0) -> None:
        self.verbose, self.lock, self.bars = verbose, threading.RLock(), dict[str, Any]()
        self.overall: Any = None
        self.tqdm = need("tqdm").tqdm
        self.tqdm.monitor_interval = 0  # no thread of tqdm's own

    def say(self, text: str) -> None:
        with self.lock:
            self.tqdm.write(printable(text), file=sys.stderr)

    def state(self, clip: str, state: str, detail: str = "") -> None:
        if self.verbose or (self.overall is not None and state == "failed"):
            self.say(f"{clip}: {state}" + (f" ({detail})" if detail else ""))

    def start(self, clip: str, what: str, total: int) -> None:
        with self.lock:
            if what not in self.bars and self.overall is None:
                units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
                self.bars[what] = self.tqdm(desc=what, total=total, file=sys.stderr, **units)

    def advance(self, clip: str, what: str, count: int) -> None:
        with self.lock:
            if what in self.bars:
                self.bars[what].update(count)

    def finish(self, clip: str, what: str) -> None:
        with self.lock:
            if what in self.bars:
                self.bars.pop(what).close()

    def progress(self, clip: str, state: str, fraction: float | None) -> None:
        with self.lock:
            if self.overall is None:
                shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
                if "generation" not in self.bars:
                    name = f"{printable(clip)}: {state}"
                    new = self.tqdm(desc=name, total=100, bar_format=shape, file=sys.stderr)
                    self.bars["generation"] = new
                bar = self.bars["generation"]
                bar.set_description_str(f"{printable(clip)}: {state}", refresh=False)
                bar.n = 100 if state == COMPLETE else round(100 * (fraction or 0))
                bar.refresh()

    def expect(self, clips: int) -> None:
        with self.lock:
            self.overall = self.tqdm(desc="clips", total=clips, unit="clip", file=sys.stderr)
            self.bars["overall"] = self.overall

    def done(self, clip: str, failed: bool, spent: str) -> None:
        with self.lock:
            if self.overall is not None:
                self.overall.set_postfix_str(spent, refresh=False)
                self.overall.update()

    def result(self, text: str) -> None:
        with self.lock, self.tqdm.external_write_mode(file=sys.stdout):
            super().result(text)

    def close(self) -> None:
        with self.lock:
            while self.bars:
                self.bars.popitem()[1].close()


def open_view(quiet: bool = False, verbose: int = 0) -> View:
    """Bars on a terminal, lines in a log, nothing where nothing is wanted."""
    if quiet:
        return View()
    columns = 80
    with contextlib.suppress(OSError, ValueError, AttributeError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    return Bars(verbose) if sys.stderr and sys.stderr.isatty() and columns else Lines(verbose)


# -----------------------------------------------------------------------------
# waiting and downloading: await_end, fresh_address, Part, download
# -----------------------------------------------------------------------------


def await_end(api: Api, generation_id: str, wait: Wait, view: View, name: str) -> Status:
    """Wait until a generation has ended; raises GenerationFailed or StillRunning."""
    started, status = time.monotonic(), Status(QUEUED)
    try:
        for status in api.iter_status(generation_id, wait):
            view.progress(name, status.state, status.progress)
    except StillRunning:
        raise StillRunning(
            f"generation {generation_id} is still {status.state} after "
            f"{time.monotonic() - started:.0f} s; it goes on at Hedra and is not lost: "
            "run the same command again to fetch it",
            generation_id=generation_id,
        ) from None
    finally:
        view.finish(name, "generation")
    if status.state == FAILED:
        raise GenerationFailed(
            f"Hedra could not make it: {status.failure} [generation {generation_id}]",
            generation_id=generation_id,
            transient=status.transient,
        )
    return status


def fresh_address(api: Api, generation_id: str, interval_s: float) -> str:
    """A new address of a finished video; Hedra may need a moment to have one."""
    for _ in range(10):
        if url := api.result(generation_id).url:
            return url
        api.http.sleep(interval_s)
    raise ApiError(
        f"generation {generation_id} is complete but Hedra gives no address for the video; "
        "it is not lost: run the same command again later",
        retryable=True,
    )


class Part:
    """The hidden file that a video grows in, `.x.mp4.part`, and the ETag that it began with.

    Only the owner of the file's lock may use it; it holds one generation's bytes.
    """

    def __init__(self, path: Path, descriptor: int, generation_id: str) -> None:
        self.path, self.generation_id = path, generation_id
        self.tag_path = path.with_name(f"{path.name}.json")
        self.file = os.fdopen(descriptor, "r+b", buffering=0, closefd=False)
        self.etag = ""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            tag = json.loads(self.tag_path.read_text())
            self.etag = tag.get("etag", "") if tag.get("generation") == generation_id else ""

    def restart(self, etag: str | None) -> None:
        """Begin again from nothing, with a strong ETag or none."""
        self.tag_path.unlink(missing_ok=True)
        self.file.seek(0)
        self.file.truncate()
        self.etag = etag if etag and not etag.startswith("W/") else ""
        if self.etag:
            tag = {"generation": self.generation_id, "etag": self.etag}
            write_durably(self.tag_path, json.dumps(tag), sync=False)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.file.seek(0, os.SEEK_END)

    def become(self, target: Path) -> None:
        """Take the video's own name, now that it is whole."""
        os.fsync(self.file.fileno())
        os.replace(self.path, target)
        self.tag_path.unlink(missing_ok=True)
        sync_folder(target.parent)


HEAD_BYTES = 8  # of an MP4: the length of its first box, and `ftyp`


def total_of(response: urllib3.BaseHTTPResponse, part: Part) -> int | None:
    """Get `part` ready for an answer's body: how long the video is in all, None if unknown.

    Raises ApiError for an answer that is no piece of this video.
    """
    content_range = response.headers.get("Content-Range", "")
    piece = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range)
    if response.status == 206 and piece and int(piece[1]) == part.size > 0:
        return int(piece[2])
    if response.status == 416 and content_range == f"bytes */{part.size}" and part.size:
        return part.size
    if response.status in (206, 416):
        part.restart("")
        raise ApiError("the server sent another piece than was asked for", retryable=True)
    if response.status != 200:
        raise ApiError(
            f"the video's address answered {response.status}",
            status=response.status,
            retry_after=parse_retry_after(response.headers.get("Retry-After")),
            retryable=True,  # with a fresh address: this one may have expired
        )
    part.restart(response.headers.get("ETag"))
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def fetch_into(http: Transport, url: str, part: Part, count: Callable[[int, int], object]) -> None:
    """One request for what `part` lacks; raises ApiError where it is not whole afterwards."""
    import urllib3

    if not part.etag:  # nothing would tell that the rest fits
        part.restart("")
    headers = {"Range": f"bytes={part.size}-", "If-Range": part.etag} if part.size else {}
    response = http.fetch(url, headers)
    with given_back(response):
        total = total_of(response, part)
        begun = part.size >= HEAD_BYTES
        try:
            while response.status != 416 and (block := response.read1(BLOCK_BYTES)):
                write_all(part, block)
                http.tally["bytes_down"] += len(block)
                count(len(block), total or 0)
                begun = begun or check_head(part)
        except urllib3.exceptions.HTTPError as error:
            raise lost(error, "the download", http.account.silence_s) from None
        if not begun or part.size < (total or 0) or (total is None and is_cut(part)):
            raise ApiError(f"the video was cut at {part.size:,} bytes", retryable=True)
        if total is not None and part.size > total:
            part.restart("")
            raise ApiError(f"more came than the {total:,} bytes promised", retryable=True)


def check_head(part: Part) -> bool:
    """Whether the video has begun; raises ApiError where what came is something else."""
    part.file.seek(0)
    head = part.file.read(HEAD_BYTES)
    part.file.seek(0, os.SEEK_END)
    if len(head) == HEAD_BYTES and head[4:] != b"ftyp":
        part.restart("")
        raise ApiError("what came from the video's address is no MP4", retryable=True)
    return len(head) == HEAD_BYTES


def is_cut(part: Part) -> bool:
    """Whether a video that came without its length ends within one of its boxes."""
    at, size = 0, part.size
    while at < size:
        part.file.seek(at)
        head = part.file.read(16)
        length = int.from_bytes(head[:4], "big")
        if not re.fullmatch(rb"ftyp|moov|mdat|free|skip|wide|moof|mfra|sidx|uuid", head[4:8]):
            return len(head) < 8  # nothing that could be told by its boxes
        if length == 0:  # the box goes on to the end of the file, wherever that is
            return False
        at += int.from_bytes(head[8:], "big") if length == 1 else max(length, 8)
    return at > size


def write_all(part: Part, block: bytes) -> None:
    """Write a block to its last byte: an unbuffered write may take only a part of it."""
    view = memoryview(block)
    while view:
        view = view[part.file.write(view) :]


def download(api: Api, generation_id: str, url: str, target: Path, wait: Wait, view: View) -> None:
    """Bring a finished video to `target`: whole and synced to disk, or not there at all.

    Takes up a download that was cut, asks for a fresh address where one has expired, and gives up
    after TRIES in a row that got no further (ApiError). Raises HedraError on a full disk.
    """
    http, name = api.http, target.stem
    hidden = target.with_name(f".{target.name}.part")

    def count(size: int, total: int) -> None:
        view.start(name, "download", total)
        view.advance(name, "download", size)

    with locked(hidden, http.sleep) as descriptor, contextlib.ExitStack() as stack:
        stack.callback(view.finish, name, "download")
        part, failures = Part(hidden, descriptor, generation_id), 0
        furthest = part.size
        while True:
            try:
                url = url or fresh_address(api, generation_id, wait.interval_s)
                fetch_into(http, url, part, count)
                return part.become(target)
            except ApiError as error:
                failures = 1 if part.size > furthest else failures + 1
                furthest = max(furthest, part.size)
                if failures >= TRIES or not error.retryable:
                    raise
                http.count_retry(error)
                after = min(error.retry_after or 0.0, MAX_RETRY_AFTER_S)
                http.sleep(after or backoff_s(failures - 1, 1.0, cap=8.0))
                url = "" if error.status else url  # it has answered, but not with the video


# -----------------------------------------------------------------------------
# ledger: Record, Ledger, Digests
# -----------------------------------------------------------------------------


class Record(dict[str, Any]):
    """A small JSON file, readable by a person; only the owner of its lock may save it."""

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.path = path

    def save(self, *, sync: bool = False, **changes: Any) -> None:
        """Change some values, for every process to see; with `sync` a power cut spares them."""
        self.update(changes)
        write_durably(self.path, json.dumps(self, indent=1, ensure_ascii=False) + "\n", sync=sync)


class Ledger:
    """What is known of clips and assets: a record each, a lock each, shared by all processes."""

    def __init__(self, folder: Path, sleep: Sleep, view: View) -> None:
        self.folder, self.sleep, self.view = folder, sleep, view

    def load(self, kind: str, key: str, *, owned: bool = False) -> Record:
        """The record, empty if there is none. A damaged one is set aside by its owner, and what
        can still be read of it (which take it was) is kept: forgetting that could pay again."""
        path = self.folder / kind / f"{key}.json"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return Record(path)
        with contextlib.suppress(ValueError):
            values = json.loads(raw)
            if isinstance(values, dict):
                return Record(path, values)
        text = raw.decode("utf-8", "replace")
        kept = dict(re.findall(r'"(take|audio|generation_id)": "([^"\\]+)"', text))
        record = Record(path, {**kept, "state": "intent"} if kept else {})
        if owned:
            aside = path.with_name(f"{key}.damaged-{time.time_ns()}")
            self.view.say(f"warning: {path} is damaged, set aside as {aside.name}; Hedra is asked")
            os.replace(path, aside)
            record.save(sync=True)
        return record

    @contextlib.contextmanager
    def own(
        self, kind: str, key: str, waiting: Callable[[], object] = lambda: None
    ) -> Iterator[Record]:
        """The record while nobody else has it; waits for the one who has."""
        lock = self.folder / kind / f"{key}.lock"
        with locked(lock, self.sleep, waiting):
            try:
                yield self.load(kind, key, owned=True)
            finally:
                lock.unlink(missing_ok=True)


def signature(file: Path) -> str:
    """What changes when a file does: size, time and inode."""
    stat = os.stat(file)
    return f"{stat.st_size}.{stat.st_mtime_ns}.{stat.st_ino}"


def content_digest(file: Path) -> str:
    """The digest of a whole file. Of the standard library's hashes blake2b is the one that is
    fast on every processor."""
    import hashlib

    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def video_digest(file: Path) -> str:
    """The digest of sixteen samples and the size: tells one take from another at any size."""
    import hashlib

    digest, size = hashlib.blake2b(digest_size=16), file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb", buffering=0) as stream:
        for n in range(16):
            stream.seek(max(0, size - 65536) * n // 15)
            digest.update(stream.read(65536))
    return digest.hexdigest()


class Digests:
    """Digests of files, remembered by path and signature in one text file that only grows.

    It is a cache: lines may be torn or lost, then a file is read again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.RLock()
        self.descriptor = -1

    @functools.cached_property
    def known(self) -> dict[str, list[str]]:
        """By path: signature and digest, the last line of a path counting."""
        try:
            lines = self.path.read_text("utf-8", "replace").split("\n")
        except OSError:
            return {}
        known = {p[2]: p[:2] for line in lines if len(p := line.split(" ", 2)) == 3}
        if len(lines) > 2 * len(known) + 1000:
            text = "".join(f"{sign} {digest} {path}\n" for path, (sign, digest) in known.items())
            write_durably(self.path, text, sync=False)
        return known

    def get(self, file: Path) -> str:
        """The digest of a file that has not changed since it was read, else ""."""
        with self.lock, contextlib.suppress(OSError):
            sign, digest = self.known.get(self.name(file), ("", ""))
            return digest if sign == signature(file) else ""
        return ""

    def of(self, file: Path, read: Callable[[Path], str] = content_digest) -> str:
        """The digest of a file, read only if it must be; raises InputError if it changes."""
        if known := self.get(file):
            return known
        sign = signature(file)
        digest = read(file)
        if sign != signature(file):
            raise InputError(f"{printable(file)} changes while it is read; run it again later")
        self.keep(file, digest)
        return digest

    def name(self, file: Path) -> str:
        """A path as it stands in the text file: absolute, and on one line."""
        return json.dumps(os.path.abspath(file))

    def keep(self, file: Path, digest: str) -> None:
        """Remember the digest of a file as it is now."""
        with self.lock:
            line = (signature(file), digest)
            self.known[self.name(file)] = list(line)
            if self.descriptor < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self.descriptor = os.open(self.path, flags, 0o644)
            os.write(self.descriptor, f"{line[0]} {line[1]} {self.name(file)}\n".encode())


def remembered_model(api: Api, asked: str, *, max_age_s: float = math.inf) -> Model | None:
    """The model this account was last told of, from `.cache/model_id`."""
    account = api.http.account
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        entries = json.loads((account.cache / "model_id").read_text())
        entry = entries[f"{account.id} {asked}".strip()]
        if time.time() - entry["at"] < max_age_s:
            return Model(**entry["model"])
    return None


def remember_model(api: Api, asked: str, model: Model) -> None:
    """Write the choice down."""
    account, entries = api.http.account, dict[str, Any]()
    path = account.cache / "model_id"
    with contextlib.suppress(OSError, ValueError, TypeError):
        entries.update(json.loads(path.read_text()))
    name = f"{account.id} {asked}".strip()
    entries[name] = {"at": int(time.time()), "model": model._asdict()}
    write_durably(path, json.dumps(entries, indent=1), sync=False)


def find_model(api: Api, asked: str = "", *, max_age_s: float = math.inf) -> Model:
    """The model asked for, or Character 3: remembered, else looked up, once, and remembered."""
    with api.http.looking_up:
        if model := remembered_model(api, asked, max_age_s=max_age_s):
            return model
        old = remembered_model(api, asked)  # its price is old; the choice itself stays
        model = api.model(old.slug or old.id if old else asked)
        remember_model(api, asked, model)
    return model


def named_model(api: Api, name: str) -> Model:
    """A model by its id or slug, without asking; with both where the remembered choice has them."""
    known = remembered_model(api, "")
    if known and name in (known.id, known.slug):
        return known
    return Model(name, "" if UUID_SHAPE.fullmatch(name) else name)


# -----------------------------------------------------------------------------
# library: connect, create_asset, upload_asset, upload, get_default_model_id, start_generation,
#          wait_and_download, get_balance, get_credit_balance
# -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def connected(account: Account) -> Api:
    """One connection pool an account."""
    return api_for(Transport(account))


def connect(api_key: str, environ: Mapping[str, str] | None = None) -> Api:
    """The API that a key belongs to. Raises InputError for a key or setting that cannot be right.

    `environ` is where the HEDRA_ variables are read, os.environ unless given: so for every
    function of this section.
    """
    return connected(open_account(api_key, environ))


def create_asset(
    name: str, kind: Literal["image", "audio"], api_key: str, *,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Make the record that a file is then uploaded to; its id. Web API (v2). Raises ApiError."""
    return connect(api_key, environ).create_asset(name, kind)


def upload_asset(
    asset_id: str, file: Path, api_key: str, *, environ: Mapping[str, str] | None = None
) -> None:
    """Send a file's bytes to an asset, streamed. Web API (v2). Raises ApiError, InputError."""
    connect(api_key, environ).upload_asset(asset_id, Path(file), lambda count: None)


def upload(
    file: Path, kind: Literal["image", "audio"], api_key: str, *,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Hand a file to Hedra; the reference that start_generation takes, with either kind of key:
    an asset's id (v2), or a handle that lapses after an hour (v3). Raises ApiError, InputError."""
    inspect_file(Path(file), kind)
    return connect(api_key, environ).upload(Path(file), kind, lambda count: None).ref


def get_default_model_id(api_key: str, *, environ: Mapping[str, str] | None = None) -> str:
    """HEDRA_MODEL_ID if set, else Character 3: as remembered in `.cache/model_id` for this account,
    else looked up. An id, or the slug where Hedra has no id for it. Raises HedraError with the
    models that would do where there is no Character 3."""
    environ = os.environ if environ is None else environ
    return environ.get("HEDRA_MODEL_ID") or find_model(connect(api_key, environ)).id


def start_generation(
    image_id: str, audio_id: str, prompt: str, api_key: str, model_id: str | None = None, *,
    resolution: str = "540p", aspect_ratio: str = "9:16", generation_id: str = "",
    environ: Mapping[str, str] | None = None,
) -> str:
    """Start a generation and pay for it; its id. The bare call: twice is two generations, unless
    `generation_id` is given (v2: a UUID that becomes the id; v3: an idempotency key). Raises
    ApiError (`ambiguous` where it may have been carried out all the same), OutOfCredits."""
    api = connect(api_key, environ)
    if not prompt.strip():
        raise InputError("the prompt is blank: say in a few words what the person does")
    model = named_model(api, model_id or get_default_model_id(api_key, environ=environ))
    order = Order(image_id, audio_id, prompt, model, resolution, aspect_ratio, generation_id)
    return api.submit(order).id


def wait_and_download(
    generation_id: str, out_dir: Path, api_key: str, timeout: int = 300, *,
    poll_interval: float = 5.0, name: str = "", view: View | None = None,
    environ: Mapping[str, str] | None = None,
) -> Path:
    """Wait for a generation, up to `timeout` seconds with a look every `poll_interval` seconds,
    and download its video to `out_dir`/`name` (default: the id).mp4; the path. On a terminal tqdm
    shows how far it is. Raises GenerationFailed, StillRunning (a TimeoutError: nothing is lost),
    ApiError."""
    api = connect(api_key, environ)
    target = Path(out_dir) / ((name or re.sub(r"[^\w.-]", "_", generation_id)) + ".mp4")
    view = view or open_view(quiet=not (sys.stderr and sys.stderr.isatty()))
    wait = Wait(poll_interval, time.monotonic() + timeout)
    try:
        status = await_end(api, generation_id, wait, view, target.stem)
        download(api, generation_id, status.url, target, wait, view)
    finally:
        view.close()
    return target


def get_balance(api_key: str, *, environ: Mapping[str, str] | None = None) -> Balance:
    """What the account can spend, in its unit: credits (v2), US dollars (v3). Raises ApiError."""
    return connect(api_key, environ).balance()


def get_credit_balance(api_key: str, *, environ: Mapping[str, str] | None = None) -> int:
    """Credits left (v2); with a v3 key the whole dollars in the wallet: see get_balance."""
    return int(get_balance(api_key, environ=environ).remaining)


# -----------------------------------------------------------------------------
# pipeline: Clip, Studio, Work
# -----------------------------------------------------------------------------


class Clip(NamedTuple):
    """What is to be made, and where the video goes."""

    name: str
    audio: Path
    image: Path
    prompt: str
    target: Path
    resolution: str = "540p"
    aspect_ratio: str = "9:16"


class Result(NamedTuple):
    """What became of a clip. `price` is as quoted, in `unit`; seconds are of wall time."""

    name: str
    status: str
    path: str = ""
    generation_id: str = ""
    price: float | None = None
    unit: str = ""
    seconds: float = 0.0
    error: str = ""
    effort: dict[str, float] = {}


class Later:
    """A call that runs in a thread of its own, which does not keep the program from ending."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.value = call, None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        """In the thread."""
        try:
            self.value = self.call()
        except BaseException as error:  # handed to whoever asks for the value
            self.error = error

    def get(self) -> Any:
        """Wait for the value, or raise what the call raised."""
        self.thread.join()
        if self.error:
            raise self.error
        return self.value


class Quote(NamedTuple):
    """A price, None where nobody can tell, and the balance it is to be held against, if any."""

    price: Callable[[], float | None]
    balance: Callable[[], Balance | None] = lambda: None


class Studio:
    """All that the clips of a command have in common: account, ledger, limits, view."""

    def __init__(
        self, account: Account, view: View, *, model: str = "", timeout_s: float = 1800.0,
        interval_s: float = 5.0, connections: int = 3, sleep: Sleep | None = None,
    ) -> None:
        self.view, self.asked, self.timeout_s, self.interval_s = view, model, timeout_s, interval_s
        self.api = api_for(Transport(account, connections=connections, sleep=sleep))
        self.http, self.account = self.api.http, account
        self.http.governor.notice = view.say
        self.ledger = Ledger(account.cache, self.http.sleep, view)
        self.digests = Digests(account.cache / "digests")
        self.warned: set[str] = set()
        self.absent: set[str] = set()  # reserved ids that Hedra was asked for and does not have

    def model(self) -> Model:
        """The model of this command's clips."""
        return find_model(self.api, self.asked)

    def key(self, clip: Clip, model: Model, image: str, audio: str) -> str:
        """The name of a clip: a digest of all that it is made of."""
        name = model.slug or model.id
        wishes = (clip.prompt, clip.resolution, clip.aspect_ratio)
        return digest_of(image, audio, *wishes, name, self.account.id)

    def peek(self, clip: Clip) -> tuple[str, Record] | None:
        """Key and record of a clip whose files are known, without a request or a read of them."""
        model = remembered_model(self.api, self.asked)
        image, audio = self.digests.get(clip.image), self.digests.get(clip.audio)
        if not (model and image and audio):
            return None
        key = self.key(clip, model, image, audio)
        return key, self.ledger.load("clips", key)

    def finished(self, record: Record, clip: Clip) -> bool:
        """Whether the clip's video is there, whole and of this take; its time is then renewed, so
        that make is satisfied."""
        target = Path(os.path.abspath(clip.target))
        digest = (record.get("videos") or {}).get(str(target))
        if not digest or not target.is_file():
            return False
        if self.digests.of(target, video_digest) != digest:
            return False
        os.utime(target)
        self.digests.keep(target, digest)
        return True

    def price(self, clip: Clip, media: Media) -> float | None:
        """What a clip will cost, in the API's unit; None where nobody can tell."""
        model = find_model(self.api, self.asked, max_age_s=MODEL_AGE_S)
        check_wishes(clip, media, model)
        order = Order("", "", clip.prompt, model, clip.resolution, clip.aspect_ratio)
        return self.api.price(order, media.seconds)

    def afford(self, price: float | None, balance: Balance | None) -> None:
        """Raise OutOfCredits, with both figures, where the balance does not cover the price."""
        if price is None or balance is None or price <= balance.remaining:
            return
        raise OutOfCredits(
            f"this costs about {amount(price, balance.unit)} and the account has "
            f"{amount(balance.remaining, balance.unit)}: add funds and run the same command again; "
            "nothing was uploaded or paid"
        )

    def tolerant(self, call: Callable[[], Any], what: str) -> Any:
        """The value of a request that is good to have: a fault is a warning, as the server has
        the last word. A key that is not accepted stops all the same."""
        try:
            return call()
        except ApiError as error:
            if error.status == 401:
                raise
            if what not in self.warned:
                self.view.say(f"warning: {what} could not be read: {error}")
            self.warned.add(what)
            return None

    def make(self, clip: Clip, *, force: bool = False, quote: Quote | None = None) -> Result:
        """The product: one clip from its files to its video, free if it was paid for before.

        With a `quote` the price has been held against the balance already. Raises HedraError;
        whatever was paid for by then is in the ledger.
        """
        try:
            return Work(self, clip).run(force, quote)
        except ModelGone:  # another is remembered by now
            return Work(self, clip).run(force, quote)


def check_wishes(clip: Clip, media: Media, model: Model) -> None:
    """Raise InputError for what the catalogue says the model cannot do."""
    for wish, offered, flag in (
        (clip.resolution, model.resolutions, "--resolution"),
        (clip.aspect_ratio, model.aspect_ratios, "--aspect-ratio"),
    ):
        if offered and wish not in offered:
            name = model.name or model.id
            raise InputError(f"{name} has no {flag} {wish}: choose one of {', '.join(offered)}")
    if model.max_seconds and (media.seconds or 0) > model.max_seconds:
        raise InputError(
            f"{printable(clip.audio)} lasts {media.seconds:.1f} s; {model.name or model.id} takes "
            f"at most {model.max_seconds:g} s"
        )


def reserved_id(key: str, take: str) -> str:
    """The id that a take of a clip is submitted under: it follows from the clip, so that even a
    lost ledger finds the generation."""
    import uuid

    return str(uuid.UUID(hex=digest_of(key, take), version=5))


class Work:
    """One clip on its way. The steps are in the order in which `run` takes them."""

    def __init__(self, studio: Studio, clip: Clip) -> None:
        self.studio, self.clip, self.view = studio, clip, studio.view
        self.api = studio.api.over(studio.http.for_clip())
        self.governor, self.sleep = studio.http.governor, studio.http.sleep
        self.started = time.monotonic()
        self.spent = dict.fromkeys(("hashing", "uploading", "waiting", "downloading"), 0.0)
        self.record, self.media, self.job = Record(Path()), Media("", 0), Job("")
        self.price: float | None = None
        self.new: set[str] = set()  # assets uploaded by this very work
        self.stale: set[str] = set()  # assets that Hedra no longer knows
        self.place = ""  # ready, then active, then running: see Governor
        self.faults, self.refusals = 0, 0  # of the submit

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add to the seconds spent on `what`."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] += time.monotonic() - before

    def run(self, force: bool, quote: Quote | None) -> Result:
        """From files to video."""
        known = self.studio.peek(self.clip)
        if known and not force and self.studio.finished(known[1], self.clip):
            return self.result("done", known[1])
        self.check()
        if not known and self.clip.audio.stat().st_size > LONG_HASH_BYTES:
            quote = quote or self.ask()  # while the files are hashed, where that takes a while
        key = self.identify()
        with self.studio.ledger.own("clips", key, self.wait_for_owner) as self.record:
            if self.studio.finished(self.record, self.clip) and not force:
                return self.result("done", self.record)
            self.choose_take(force)
            try:
                if not self.record.get("generation_id"):
                    quote = quote or self.ask()
                    self.accept(self.lookup() or self.submit(quote))
                self.collect()
            finally:
                self.leave_place()
            return self.result("done", self.record)

    def check(self) -> None:
        """Rule 1: nothing is sent for a clip that cannot work."""
        inspect_file(self.clip.image, "image")
        self.media = inspect_file(self.clip.audio, "audio")
        check_target(self.clip.target, (self.clip.image, self.clip.audio))

    def ask(self) -> Quote:
        """Price and balance, asked for while the files are hashed."""
        studio = self.studio
        price = functools.partial(studio.price, self.clip, self.media)
        asked = ((price, "the price"), (self.api.balance, "the balance"))
        return Quote(*(Later(functools.partial(studio.tolerant, *ask)).get for ask in asked))

    def identify(self) -> str:
        """The clip's key, for which its files are read."""
        with self.timed("hashing"):
            digests = [self.studio.digests.of(file) for file in (self.clip.image, self.clip.audio)]
        model = self.studio.model()
        self.model, (self.image_digest, self.audio_digest) = model, digests
        self.key = self.studio.key(self.clip, model, *digests)
        return self.key

    def wait_for_owner(self) -> None:
        """Somebody else works on this clip; its result will be ours."""
        self.view.state(self.clip.name, "waiting", "another process works on this clip")

    def choose_take(self, force: bool) -> None:
        """Which take this is: the one in the ledger, or a new one where that is asked for or was
        refused for a reason that passes."""
        refused = self.record.get("state") == "refused"
        if force or (refused and self.record.get("transient")):
            past = [*self.record.get("past", []), self.record.get("generation_id")]
            kept = {"take": os.urandom(8).hex(), "past": [p for p in past if p]}
            self.record = Record(self.record.path, kept)
            self.record.save(**self.about())
        elif refused:
            raise GenerationFailed(
                f"refused before, and not paid again: {self.record.get('reason')} (change "
                "portrait, recording or prompt; --force pays for a new take)",
                generation_id=str(self.record.get("generation_id")),
            )

    def about(self) -> dict[str, Any]:
        """For the person who reads the ledger."""
        clip, model = self.clip, self.model.slug or self.model.id
        files = {"clip": printable(clip.audio), "portrait": printable(clip.image)}
        return {"state": "new", **files, "prompt": clip.prompt, "model": model}

    @property
    def reserved(self) -> str:
        """The id that this take is submitted under."""
        return reserved_id(self.key, str(self.record.get("take") or ""))

    def lookup(self) -> Job | None:
        """Rule 4, before any submit: is there a generation that the ledger does not know of? Its
        answer may have been lost with the process, or the ledger with its folder."""
        if self.record.get("state") == "intent":
            return self.look()
        if self.record.get("state") or self.reserved in self.studio.absent:
            return None
        found = self.api.find(self.reserved)
        return Job(found) if found else None

    def look(self) -> Job | None:
        """Whether a submit whose answer was lost was carried out. None once Hedra, GRACE_S after
        it, still knows of nothing."""
        first = time.monotonic()
        submitted_at, pause = float(self.record.get("submitted_at") or 0), 0.25
        while self.api.looks_up:
            audio = str(self.record.get("audio") or "")
            if found := self.api.find(self.reserved, audio, submitted_at):
                return Job(found)
            if max(time.monotonic() - first, time.time() - submitted_at) >= GRACE_S:
                break
            self.view.state(self.clip.name, "looking", "was the submit carried out?")
            self.sleep(pause)
            pause = min(3.0, 2 * pause)
        return None

    def submit(self, quote: Quote) -> Job:
        """Rules 3 and 4: the intent is on disk before the request; after an answer that leaves
        open what happened, look before another."""
        self.price, balance = quote.price(), quote.balance()  # rule 2, before any upload
        self.studio.afford(self.price, balance)
        if self.price is None:
            self.view.say(f"warning: {self.clip.name}: no price is known of {self.model.id}")
        self.governor.begin()
        while True:
            self.place = "ready"
            order = self.prepare()
            self.governor.take()
            self.place = "active"
            try:
                return self.api.submit(order)
            except ApiError as error:
                if error.ambiguous and (job := self.look()):
                    return job
                self.governor.give(running=False)
                self.place = "ready"
                self.endure(error)

    def endure(self, error: ApiError) -> None:
        """After a submit that Hedra has nothing of: wait and return if it may be sent again."""
        if isinstance(error, RateLimited):
            self.refusals += 1
            if self.governor.running and not re.search(r"\brate\b", error.words.lower()):
                self.governor.too_many()
            else:  # alone, and refused: it is the rate
                self.governor.too_fast(error)
            again = time.monotonic() - self.started < self.studio.timeout_s
        else:
            self.faults += 1
            again = (error.retryable or error.ambiguous) and self.faults < SUBMIT_TRIES
        after = error.retry_after or 0.0
        if not (self.renew(error) or again) or after > MAX_RETRY_AFTER_S:
            self.give_up(error)
        self.api.http.count_retry(error)
        self.view.state(self.clip.name, "submitting again", f"after: {error.words or error}")
        self.sleep(after or backoff_s(self.faults + self.refusals, 0.5, cap=8.0))

    def give_up(self, error: ApiError) -> NoReturn:
        """Raise an error of the submit, saying where the money is."""
        if not error.ambiguous:
            self.record.save(state="new")
            raise error
        text = "whether it was carried out is not known; nothing is lost: run the same command"
        error.args = (f"{error}; {text} again, and it looks before it pays",)
        raise error

    def renew(self, error: ApiError) -> bool:
        """Whether the refusal is of assets that were there before and can be uploaded again, once.
        Raises ModelGone where it is of a remembered model."""
        if error.status not in (400, 404, 410, 422) or error.retryable:
            return False
        words = f"{error.code} {error.words}".lower()
        if "model" in words and not self.studio.asked:
            model = self.api.model("")
            if model != self.model:
                remember_model(self.api, "", model)
                self.record.save(state="new")
                raise ModelGone(str(error)) from error
        old = {str(self.record.get("audio")), str(self.record.get("image"))} - self.new - self.stale
        self.stale |= old
        about = re.search("asset|image|audio|keyframe|file|expired|not.?found", words)
        return bool(about and old)

    def prepare(self) -> Order:
        """Upload what Hedra has not got, side by side, and write down what will be asked of it."""
        with self.timed("uploading"):
            recording = Later(self.recording)
            try:
                image = self.portrait()
            except Exception:  # Ctrl-C does not wait
                recording.thread.join()
                raise
            audio = recording.get()
        self.record.save(sync=True, **{
            **self.about(), "state": "intent", "reserved": self.reserved, "image": image,
            "audio": audio, "submitted_at": time.time(),
        })
        clip = self.clip
        wishes = (clip.prompt, self.model, clip.resolution, clip.aspect_ratio)
        return Order(image, audio, *wishes, self.reserved)

    def portrait(self) -> str:
        """The portrait's asset, shared by all clips and processes: the first one uploads it."""
        key = digest_of(self.image_digest, self.studio.account.id)
        with self.studio.ledger.own("assets", key) as record:
            asset = Asset(str(record.get("ref") or ""), record.get("expires_at"))
            if not asset.is_usable() or asset.ref in self.stale:
                asset = self.send(self.clip.image, "image", self.image_digest)
                record.save(**asset._asdict(), file=printable(self.clip.image))
        return asset.ref

    def recording(self) -> str:
        """The recording's asset: of this clip and this take alone, so that it tells them apart."""
        asset = Asset(str(self.record.get("audio") or ""), self.record.get("audio_expires_at"))
        if not asset.is_usable() or asset.ref in self.stale:
            asset = self.send(self.clip.audio, "audio", self.audio_digest)
            known = {"audio": asset.ref, "audio_expires_at": asset.expires_at}
            self.record.save(**{**self.about(), **known})
        return asset.ref

    def send(self, file: Path, kind: Kind, digest: str) -> Asset:
        """Upload a file, and make sure that it was the one that was hashed."""
        name, size = self.clip.name, file.stat().st_size
        what = "portrait" if kind == "image" else "recording"
        self.view.state(name, f"uploading {what}", f"{size / 1e6:.1f} MB")
        self.view.start(name, what, size)
        try:
            asset = self.api.upload(file, kind, lambda count: self.view.advance(name, what, count))
        finally:
            self.view.finish(name, what)
        if self.studio.digests.of(file) != digest:
            raise InputError(f"{printable(file)} changed while it was sent; nothing was paid")
        self.new.add(asset.ref)
        return asset

    def accept(self, job: Job) -> None:
        """Hedra has the generation: from here on it is paid for, and must not be forgotten."""
        self.record.save(sync=True, state="submitted", generation_id=job.id, price=self.price)
        self.job = job
        if self.place == "active":  # else it was found, not submitted
            self.place = "running"
            self.governor.grow()
        cost = f", about {amount(self.price, self.api.unit)}" if self.price is not None else ""
        self.view.state(self.clip.name, "submitted", f"generation {job.id}{cost}")

    def leave_place(self) -> None:
        """No longer on the way to Hedra, or among the generations in flight."""
        place, self.place = self.place, ""
        if place in ("active", "running"):
            self.governor.give(running=place == "running")
        if place in ("active", "ready"):
            self.governor.leave()

    def collect(self) -> None:
        """Wait for the generation and fetch its video. What goes wrong here loses nothing."""
        generation_id, target = str(self.record["generation_id"]), self.clip.target
        if not self.place:
            self.governor.take(resumed=True)
            self.place = "running"
        studio = self.studio
        wait = Wait(studio.interval_s, time.monotonic() + studio.timeout_s, self.job.eta_s)
        try:
            with self.timed("waiting"):
                status = await_end(self.api, generation_id, wait, self.view, self.clip.name)
        except GenerationFailed as error:
            self.record.save(state="refused", reason=str(error), transient=error.transient)
            raise
        except ApiError as error:
            if error.status == 404:
                error.args = (f"{error}; Hedra no longer has it: --force pays for a new take",)
            raise
        finally:
            self.leave_place()
        self.view.state(self.clip.name, "downloading", printable(target))
        with self.timed("downloading"):
            self.fetch(generation_id, status.url, target, wait)
        digest = studio.digests.of(target, video_digest)
        videos = {**(self.record.get("videos") or {}), os.path.abspath(target): digest}
        self.record.save(state="done", videos=videos, cost=status.cost)

    def fetch(self, generation_id: str, url: str, target: Path, wait: Wait) -> None:
        """Download; a full or read-only disk is told as what it is."""
        try:
            download(self.api, generation_id, url, target, wait, self.view)
        except OSError as error:
            raise HedraError(
                f"{printable(target)} cannot be written: {error.strerror}; the clip is paid for "
                f"and safe at Hedra [generation {generation_id}]: make room and run it again"
            ) from error

    def result(self, status: str, record: Record) -> Result:
        """What to report."""
        effort = {f"{name}_s": round(value, 3) for name, value in self.spent.items() if value}
        return Result(
            self.clip.name, status, str(self.clip.target), str(record.get("generation_id") or ""),
            record.get("cost") or record.get("price"), self.api.unit,
            round(time.monotonic() - self.started, 3), effort={**effort, **self.api.http.tally},
        )


def check_target(target: Path, inputs: Sequence[Path]) -> None:
    """Raise InputError where the video could not, or must not, be written; makes its folder."""
    try:
        if target.is_dir():
            raise InputError(f"{printable(target)} is a folder: --out takes the video's file name")
        if target.exists() and any(target.samefile(file) for file in inputs):
            raise InputError(f"{printable(target)} is an input: the video needs a name of its own")
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.part.json.{os.getpid()}")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{printable(target)} cannot be written: {error.strerror}; choose another place for it"
        ) from error


# -----------------------------------------------------------------------------
# batch: find_clips, survey, Crew, run_batch
# -----------------------------------------------------------------------------


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Wishes(NamedTuple):
    """What the flags say of every clip of a command."""

    image: str = ""  # --img
    fallback: str = ""  # FRIEND_IMG
    prompt: str = ""
    resolution: str = "540p"
    aspect_ratio: str = "9:16"


class Row(NamedTuple):
    """A clip before any work: `state` is new, in flight, done, refused, or bad with an `error`;
    `reserved` is set while Hedra may have it without our knowing."""

    clip: Clip
    state: str
    media: Media = Media("", 0)
    price: float | None = None
    error: str = ""
    reserved: str = ""
    generation_id: str = ""


def folder_names(folder: Path) -> dict[str, str]:
    """The names in a folder, by themselves and in lower case, for cameras write X.JPG. Raises
    InputError that names the folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{printable(folder)} cannot be listed: {error.strerror}") from error
    return {name.lower(): name for name in names} | {name: name for name in names}


def beside(audio: Path, suffixes: Sequence[str], names: Mapping[str, str]) -> list[Path]:
    """The files beside a recording that have its name and one of some suffixes."""
    wanted = [audio.stem + suffix for suffix in suffixes]
    found = [names.get(name) or names.get(name.lower()) for name in wanted]
    return [audio.parent / name for name in found if name]


def wav_names(names: Mapping[str, str]) -> list[str]:
    """The recordings among a folder's names, without hidden and temporary ones."""
    return sorted({n for n in names.values() if n.lower().endswith(".wav") and n[0] not in ".~#"})


def read_prompt(file: Path) -> str:
    """The prompt in a text file, "" if it is blank."""
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(file)} is no readable UTF-8 text: {error}") from error


def clip_of(
    audio: Path, target: Path, wishes: Wishes, names: Mapping[str, str], *, flags_win: bool
) -> Clip:
    """A clip from its recording and what lies beside it; raises InputError without a portrait."""
    own = beside(audio, IMAGE_SUFFIXES, names)
    given = [Path(wishes.image)] if wishes.image else []
    images = given + own if flags_win else own + given
    images += [Path(wishes.fallback)] if wishes.fallback else []
    if not images:
        raise InputError(
            f"{printable(audio)} has no portrait: put {printable(audio.stem)}.png beside it, give "
            "--img FILE, or set FRIEND_IMG"
        )
    prompts = [read_prompt(file) for file in beside(audio, (".txt",), names)]
    prompts = [wishes.prompt, *prompts] if flags_win else [*prompts, wishes.prompt]
    prompt = next((text for text in prompts if text.strip()), DEFAULT_PROMPT)
    if re.search("[\ud800-\udfff]", prompt):
        raise InputError(f"the prompt of {printable(audio)} is not UTF-8 text")
    return Clip(audio.stem, audio, images[0], prompt.strip(), target, *wishes[-2:])


def find_clips(folder: Path, out_dir: Path, wishes: Wishes) -> tuple[list[Clip], list[Result]]:
    """The clips of a folder, one a wav, and those that have no portrait or no readable prompt."""
    clips, bad, names = [], [], folder_names(folder)
    taken: dict[str, str] = {}
    for name in wav_names(names):
        audio = folder / name
        try:
            target = out_dir / f"{audio.stem}.mp4"
            if (other := taken.setdefault(audio.stem, name)) != name:
                raise InputError(f"{name} would be the same video as {other}: rename one of them")
            clips.append(clip_of(audio, target, wishes, names, flags_win=False))
        except InputError as error:
            bad.append(Result(audio.stem, "failed", error=str(error)))
    return clips, bad


def row_of(state: str, clip: Clip, record: Record, media: Media | None = None) -> Row:
    """A clip that the ledger knows."""
    row = Row(clip, state, media or Media("", 0), record.get("cost") or record.get("price"))
    return row._replace(generation_id=str(record.get("generation_id") or ""))


def look_up(studio: Studio, clip: Clip, *, force: bool = False) -> Row:
    """What a clip needs, by the ledger; raises InputError for a bad one."""
    known = studio.peek(clip)
    if known and not force and studio.finished(known[1], clip):
        return row_of("done", clip, known[1])
    inspect_file(clip.image, "image")
    media = inspect_file(clip.audio, "audio")
    if not known:
        digests = studio.digests.of(clip.image), studio.digests.of(clip.audio)
        key = studio.key(clip, studio.model(), *digests)
        known = key, studio.ledger.load("clips", key)
    key, record = known
    state = record.get("state")
    if force or (state == "refused" and record.get("transient")):
        return Row(clip, "new", media)
    if studio.finished(record, clip):
        return row_of("done", clip, record, media)
    if state == "refused" or record.get("generation_id"):
        states = {"refused": "refused", "done": "done, to be fetched"}
        return row_of(states.get(str(state), "in flight"), clip, record, media)
    reserved = "" if state else reserved_id(key, str(record.get("take") or ""))
    return Row(clip, "new", media, reserved=reserved)


def survey(studio: Studio, clips: Sequence[Clip], *, force: bool) -> list[Row]:
    """What all clips need, and the price of those that are new."""
    rows = []
    for clip in clips:
        try:
            rows.append(look_up(studio, clip, force=force))
        except InputError as error:
            rows.append(Row(clip, "bad", error=str(error)))
    fresh = [row.reserved for row in rows if row.reserved]
    found = studio.api.find_all(fresh) if fresh else set()
    studio.absent.update(set(fresh) - found)
    rows = [row._replace(state="in flight") if row.reserved in found else row for row in rows]
    new = sorted((row.media.seconds or 0, n) for n, row in enumerate(rows) if row.state == "new")
    for _, n in new[-1:] + new[:-1]:  # the longest and the shortest first: see JobsApi.price
        try:
            price = functools.partial(studio.price, rows[n].clip, rows[n].media)
            rows[n] = rows[n]._replace(price=studio.tolerant(price, "the price"))
        except InputError as error:
            rows[n] = rows[n]._replace(state="bad", error=str(error))
    return rows


def table(rows: Sequence[Row], balance: Balance | None, unit: str) -> str:
    """The answer to --dry-run."""
    width = max(len("total"), *(len(printable(row.clip.name)) for row in rows)) if rows else 5
    lines = [f"{'clip':{width}}  {'seconds':>8}  {unit:>10}  state"]
    for row in rows:
        seconds = "" if row.media.seconds is None else f"{row.media.seconds:.1f}"
        price = "" if row.price is None else f"{row.price:g}"
        state = row.state + (f": {row.error}" if row.error else "")
        lines.append(f"{printable(row.clip.name):{width}}  {seconds:>8}  {price:>10}  {state}")
    new = [row for row in rows if row.state == "new"]
    seconds = f"{sum(row.media.seconds or 0 for row in new):.1f}"
    left = "unknown" if balance is None else amount(balance.remaining, balance.unit)
    end = f"{len(new)} new; balance: {left}"
    lines.append(f"{'total':{width}}  {seconds:>8}  {total_price(rows):>10g}  {end}")
    return "\n".join(lines)


def table_json(rows: Sequence[Row], balance: Balance | None, unit: str) -> str:
    """The answer to --dry-run --json: an object a clip."""
    return "\n".join(
        json.dumps({
            "name": row.clip.name, "state": row.state, "seconds": row.media.seconds,
            "credits": row.price, "unit": unit, "error": row.error or None,
            "balance": balance and balance.remaining,
        }) for row in rows
    )


Show = Callable[[Sequence[Row], "Balance | None", str], str]


def total_price(rows: Sequence[Row]) -> float:
    """What the new ones among the rows cost, as far as prices are known."""
    return round(sum(row.price or 0 for row in rows if row.state == "new"), 6)


def attempt(
    studio: Studio, clip: Clip, *, force: bool = False, quote: Quote | None = None
) -> tuple[Result, Exception | None]:
    """Make a clip; what goes wrong becomes the result, for the others to go on."""
    started = time.monotonic()
    try:
        return studio.make(clip, force=force, quote=quote), None
    except Exception as error:  # a worker outlives whatever a clip does to it
        which, seconds = str(getattr(error, "generation_id", "")), time.monotonic() - started
        result = Result(clip.name, "failed", "", which, None, studio.api.unit, round(seconds, 3))
        return result._replace(error=explain(error)), error


def allow_files(count: int) -> None:
    """Let this process open so many files, where the system does: each clip at work has a lock
    and may have a connection."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def tell_traceback(view: View, error: Exception) -> None:
    """Where an error came from, line by line."""
    import traceback

    for line in "".join(traceback.format_exception(error)).splitlines():
        view.say(line)


class Crew:
    """Up to `jobs` threads that make clips; `report` is called in them. Daemons: none of them
    keeps a program from ending, as whatever they do is in the ledger."""

    def __init__(
        self, studio: Studio, jobs: int, report: Callable[[Clip, Result, Any], object]
    ) -> None:
        import queue

        self.studio, self.jobs, self.report = studio, jobs, report
        self.queue: queue.SimpleQueue[tuple[Clip, bool, Quote | None] | None] = (
            queue.SimpleQueue()
        )
        self.threads: list[threading.Thread] = []
        self.waiting, self.idle = 0, threading.Condition()
        allow_files(3 * jobs + 100)

    def add(self, clip: Clip, *, force: bool = False, quote: Quote | None = None) -> None:
        """One more clip to make."""
        with self.idle:
            self.waiting += 1
            self.queue.put((clip, force, quote))
            if len(self.threads) < min(self.jobs, self.waiting):
                self.threads.append(threading.Thread(target=self.run, daemon=True))
                self.threads[-1].start()

    def run(self) -> None:
        """In a thread."""
        while item := self.queue.get():
            clip, force, quote = item
            try:
                result, error = attempt(self.studio, clip, force=force, quote=quote)
                if error and self.studio.view.verbose:
                    tell_traceback(self.studio.view, error)
                self.report(clip, result, error)
            finally:  # whatever happens, `join` must not wait for this clip
                with self.idle:
                    self.waiting -= 1
                    self.idle.notify_all()

    def join(self) -> None:
        """Wait until every clip is done."""
        with self.idle:
            while self.waiting:
                self.idle.wait(0.5)  # Ctrl-C is not heard in a wait without end

    def stop(self, timeout_s: float) -> None:
        """End the threads that end in time."""
        for _ in self.threads:
            self.queue.put(None)
        until = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))


class Totals:
    """What a batch has come to; its `report` is called by the crew's threads."""

    def __init__(self, studio: Studio, emit: Callable[[Result], object]) -> None:
        self.studio, self.emit, self.lock = studio, emit, threading.Lock()
        self.failed: list[Result] = []
        self.unsent: set[str] = set()
        self.spent = 0.0

    def report(self, clip: Clip, result: Result, error: Exception | None = None) -> None:
        """One clip is done or has failed. Without credits nothing more is sent; what runs, runs."""
        with self.lock:
            if isinstance(error, OutOfCredits):
                self.studio.http.governor.stop()
            if isinstance(error, OutOfCredits | Stopped):
                self.unsent.add(clip.name)
            if result.error:
                self.failed.append(result)
            elif result.effort:  # else it was there already
                self.spent = round(self.spent + (result.price or 0), 6)
            self.emit(result)
            spent = f"{amount(self.spent, self.studio.api.unit)}, {len(self.failed)} failed"
            self.studio.view.done(clip.name, bool(result.error), spent)


def run_batch(
    studio: Studio, clips: Sequence[Clip], bad: Sequence[Result], emit: Callable[[Result], object],
    *, jobs: int, max_price: float | None, force: bool, show: Show | None = None,
) -> int:
    """Make all clips of a folder, or `show` what that would cost; the exit status. The whole is
    priced before the first upload."""
    ask = functools.partial(studio.tolerant, studio.api.balance, "the balance")
    balance = Later(ask) if clips else None
    rows = survey(studio, clips, force=force)
    nothing = Clip("", Path(), Path(), "", Path())
    rows += [Row(nothing._replace(name=r.name), "bad", error=r.error) for r in bad]
    if show:
        studio.view.result(show(rows, balance.get() if balance else None, studio.api.unit))
        return int(any(row.state == "bad" for row in rows))
    check_budget(studio, rows, balance, max_price)
    studio.view.expect(len(rows))
    totals = Totals(studio, emit)
    crew = Crew(studio, jobs, totals.report)
    for row in rows:
        if row.state == "done":
            result = Result(row.clip.name, "done", str(row.clip.target), row.generation_id)
            totals.report(row.clip, result._replace(price=row.price, unit=studio.api.unit))
        elif row.state == "bad":
            totals.report(row.clip, Result(row.clip.name, "failed", error=row.error))
        else:
            crew.add(row.clip, force=force, quote=Quote(functools.partial(getattr, row, "price")))
    crew.join()
    crew.stop(5.0)
    return summary(studio, rows, totals)


def check_budget(
    studio: Studio, rows: Sequence[Row], balance: Later | None, max_price: float | None
) -> None:
    """Raise OutOfCredits where the new clips cost more than the balance or --max-credits."""
    new = [row for row in rows if row.state == "new"]
    total, unit = total_price(new), studio.api.unit
    if not new or balance is None:
        return
    if any(row.price is None for row in new):
        studio.view.say("warning: not all prices are known; the server has the last word")
    if max_price is not None and total > max_price:
        raise OutOfCredits(
            f"clips to make: {len(new)}, for about {amount(total, unit)}; --max-credits is "
            f"{amount(max_price, unit)}; nothing was uploaded or paid"
        )
    studio.afford(total, balance.get())


def summary(studio: Studio, rows: Sequence[Row], totals: Totals) -> int:
    """Say what failed, last; the exit status."""
    studio.view.close()
    if totals.unsent:
        prices = [row.price or 0 for row in rows if row.clip.name in totals.unsent]
        missing = amount(round(sum(prices), 6), studio.api.unit)
        complain(f"out of funds; clips not sent: {len(prices)}, they need about {missing}")
    for result in totals.failed:
        complain(f"{result.name}: {result.error}")
    return int(bool(totals.failed))


def complain(text: str) -> None:
    """What a person must read, on stderr, however quiet it is there."""
    written(sys.stderr, f"hedra_avatar: {printable(text)}")


# -----------------------------------------------------------------------------
# watch: Watcher, notify_systemd
# -----------------------------------------------------------------------------


STILL_S = 1.0  # without a change: a file whose writer sent no close event is whole
STUCK_S = 10.0  # without a change: a file that is not whole is worth a line
RESCAN_S = 60.0  # events can be lost
OUTAGE_S = (15.0, 300.0)  # between two tries while Hedra, the disk or the funds are not there


class Watcher:
    """Makes a clip of every whole recording that lies in a folder or comes into it.

    Events only wake the loop; what counts is what the folder holds. `seen` has the signature of
    every recording that was taken or refused, so that it is looked at again when it changes.
    """

    def __init__(
        self, studio: Studio, folder: Path, out_dir: Path, wishes: Wishes, jobs: int
    ) -> None:
        self.studio, self.folder, self.out_dir, self.wishes = studio, folder, out_dir, wishes
        self.view, self.crew = studio.view, Crew(studio, jobs, self.report)
        self.emit: Callable[[Result], object] = lambda result: None
        self.lock, self.wake = threading.RLock(), threading.Event()
        self.touched: set[str] = set()
        self.closed: set[str] = set()
        self.seen: dict[str, str] = {}
        self.still: dict[str, tuple[str, float]] = {}
        self.busy: dict[str, Clip] = {}
        self.held: list[Clip] = []  # while there is an outage
        self.outage, self.outage_s, self.probe_at = "", OUTAGE_S[0], 0.0

    def dispatch(self, event: Any) -> None:
        """An event of watchdog's, in its thread."""
        if event.event_type not in ("created", "modified", "moved", "closed", "deleted"):
            return
        paths = [Path(os.fsdecode(p)) for p in (event.src_path, event.dest_path) if p]
        names = {path.name for path in paths if path.parent == self.folder}
        with self.lock:
            self.touched |= names
            if event.event_type in ("closed", "moved"):
                self.closed |= names
        self.wake.set()

    def look_round(self, everything: bool) -> None:
        """Consider what has been touched, what is being waited for, or the whole folder."""
        with self.lock:  # before the folder is listed: what comes meanwhile is for the next turn
            touched, self.touched = self.touched, set()
            closed, self.closed = self.closed, set()
        names = folder_names(self.folder)
        stems = {Path(name).stem.lower() for name in (*touched, *self.still)}
        for name in wav_names(names):
            if everything or Path(name).stem.lower() in stems:
                self.consider(name, names, name in closed)

    def consider(self, name: str, names: Mapping[str, str], closed: bool) -> None:
        """Take a recording if it is new and whole; say once what is wrong with it."""
        audio = self.folder / name
        try:
            parts = [audio, *beside(audio, (*IMAGE_SUFFIXES, ".txt"), names)]
            sign = " ".join(signature(part) for part in parts)
            times = [part.stat().st_mtime for part in parts]
        except OSError:  # gone, or being replaced: there will be another event
            return
        if self.seen.get(name) == sign or name in self.busy:
            return
        since = self.still.get(name, ("", 0.0))
        if since[0] != sign:
            since = self.still[name] = (sign, time.monotonic())
        quiet_s = max(time.monotonic() - since[1], min(time.time() - max(times), STILL_S))
        # The portrait beside it may have come a moment ago, and not yet in full.
        closed = closed and all(time.time() - moment > STILL_S for moment in times[1:])
        if not closed and quiet_s < STILL_S:
            return
        try:
            inspect_file(audio, "audio")
            target = self.out_dir / f"{audio.stem}.mp4"
            self.take(clip_of(audio, target, self.wishes, names, flags_win=False), sign)
        except Unfinished as error:
            if quiet_s >= STUCK_S:
                self.refuse(name, sign, error)
        except InputError as error:
            self.refuse(name, sign, error)

    def refuse(self, name: str, sign: str, error: InputError) -> None:
        """Leave a recording where it is until it changes."""
        self.seen[name] = sign
        self.still.pop(name, None)
        self.view.say(f"{name}: not taken: {error}")

    def take(self, clip: Clip, sign: str) -> None:
        """Hand a clip to the crew, unless its video is there already."""
        self.seen[clip.audio.name] = sign
        self.still.pop(clip.audio.name, None)
        known = self.studio.peek(clip)
        if known and self.studio.finished(known[1], clip):
            return
        with self.lock:
            self.busy[clip.audio.name] = clip
            if self.outage:
                self.held.append(clip)
                return
        self.crew.add(clip)

    def report(self, clip: Clip, result: Result, error: Exception | None) -> None:
        """A clip is done, in a thread of the crew: what passes by itself is tried again."""
        if isinstance(error, Stopped):
            return
        if isinstance(error, StillRunning):
            self.view.say(f"{clip.name}: {error}")
            self.crew.add(clip)
            return
        with self.lock:
            if error and passes(error):
                self.hold(clip, result.error)
                return
            self.busy.pop(clip.audio.name, None)
            self.touched.add(clip.audio.name)  # it may have changed meanwhile
            if not error:
                self.resume()
        self.emit(result)
        self.wake.set()

    def hold(self, clip: Clip, why: str) -> None:
        """An outage: one line, and one clip at a time to see whether it is over."""
        if not self.outage:
            self.view.say(f"{clip.audio.name}: {why}")
            self.view.say("waiting until that is over; clips that come meanwhile are kept")
            self.outage_s = OUTAGE_S[0]
        else:
            self.outage_s = min(OUTAGE_S[1], 2 * self.outage_s)
        self.outage, self.view.mute = why, True
        self.held.append(clip)
        self.probe_at = time.monotonic() + self.outage_s

    def resume(self) -> None:
        """A clip went through: the outage, if there was one, is over."""
        if self.outage:
            self.outage, self.view.mute = "", False
            self.view.say(f"going on, with {len(self.held)} more clips")
            for clip in self.held:
                self.crew.add(clip)
            self.held.clear()

    def probe(self) -> None:
        """In an outage, try one clip now and then."""
        with self.lock:
            if self.outage and self.held and time.monotonic() >= self.probe_at:
                self.probe_at = time.monotonic() + self.outage_s
                self.crew.add(self.held.pop(0))

    def run(self, observer: Any, stop: threading.Event) -> None:
        """Until `stop` is set."""
        inode, scanned = -1, -math.inf
        notify_systemd("READY=1")
        while not stop.is_set():
            self.wake.clear()
            there = self.folder.stat().st_ino if self.folder.is_dir() else 0
            if there != inode:
                inode, scanned = self.attach(observer, there), -math.inf
            due = time.monotonic() - scanned > RESCAN_S
            if inode > 0:
                with contextlib.suppress(InputError):  # the folder went away just now
                    self.look_round(everything=due)
                    scanned = time.monotonic() if due else scanned
            self.probe()
            notify_systemd("WATCHDOG=1")
            self.wake.wait(0.2 if self.still else 1.0)

    def end(self, stop: threading.Event) -> None:
        """Let `run` return at once."""
        stop.set()
        self.wake.set()

    def attach(self, observer: Any, inode: int) -> int:
        """Watch the folder that is there now, or say that none is; its inode."""
        observer.unschedule_all()
        if inode:
            with contextlib.suppress(OSError):  # gone again: the next turn sees it
                observer.schedule(self, str(self.folder), recursive=False)
                self.view.say(f"watching {self.folder} for .wav files")
                return inode
        self.view.say(f"{self.folder} is not there; waiting for it")
        return 0


def passes(error: Exception) -> bool:
    """Whether a clip may be made later as it is: Hedra, the funds or the disk were not there."""
    disk = isinstance(error.__cause__, OSError) and not isinstance(error, InputError)
    passing = isinstance(error, OutOfCredits | OSError) or getattr(error, "retryable", False)
    return disk or bool(passing)


def notify_systemd(message: str) -> None:
    """Tell systemd, where it wants to know (sd_notify(3): a datagram to NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.send(message.encode())


# -----------------------------------------------------------------------------
# command line: build_parser, cmd_run, cmd_batch, cmd_watch, cmd_credits, main
# -----------------------------------------------------------------------------


def positive(text: str) -> float:
    """An argparse type."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def count(text: str) -> int:
    """An argparse type."""
    if text.isdecimal() and 1 <= int(text) <= 10_000:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 10,000")


def money(text: str) -> float:
    """An argparse type."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not an amount of credits or dollars")


def add_every_flag(parser: argparse.ArgumentParser) -> None:
    """The flags of every command."""
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object a result")
    add("-q", "--quiet", action="store_true", help="errors only on stderr")
    add("-v", "--verbose", action="count", default=0, help="say more (-vv: effort)")


def add_clip_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that makes clips."""
    add = parser.add_argument
    add("--img", metavar="FILE", default="", help="the portrait (else beside the wav, FRIEND_IMG)")
    add("--prompt", metavar="TEXT", default="", help="what the person does")
    add("--resolution", choices=RESOLUTIONS, default="540p", help="default %(default)s")
    add("--aspect-ratio", choices=ASPECT_RATIOS, default="9:16", help="default %(default)s")
    add("--model", metavar="ID", default="", help="id or slug (default: Character 3)")
    add("--workspace", metavar="ID", default="", help="the workspace that pays (v2)")
    add("--timeout", metavar="SECONDS", type=positive, default=1800.0, help="%(default)g")
    add("--poll-interval", metavar="SECONDS", type=positive, default=5.0, help="%(default)g")
    add("--force", action="store_true", help="a new take, always paid for")
    add("--out-dir", metavar="DIR", default="output", help="default %(default)s")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of run alone."""
    parser.add_argument("--wav", metavar="FILE", required=True, help="the recording")
    parser.add_argument("--out", metavar="FILE", default="", help="default: output/x.mp4")
    parser.add_argument("--dry-run", action="store_true", help="price against balance, and stop")


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of batch alone."""
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", default="batch", help="default %(default)s")
    add("--jobs", metavar="N", type=count, default=4, help="clips at once (%(default)s)")
    add("--max-credits", metavar="N", type=money, help="spend no more (v3: dollars)")
    add("--dry-run", action="store_true", help="print the price list, and stop")


def add_watch_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of watch alone."""
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", default="incoming", help="default %(default)s")
    add("--jobs", metavar="N", type=count, default=4, help="clips at once (%(default)s)")
    add("--once", action="store_true", help="do what is there, and exit")
    add("--polling", action="store_true", help="look instead of listening (network shares)")


def add_credits_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of credits alone."""
    parser.add_argument("--min", metavar="N", type=money, default=0.0, help="exit 1 if less")
    parser.add_argument("--workspace", metavar="ID", default="", help="whose balance (v2)")


FLAGS = {  # of each command: what it is for, and what adds its flags
    "run": ("make one clip", (add_run_flags, add_clip_flags, add_every_flag)),
    "batch": ("make a folder of clips", (add_batch_flags, add_clip_flags, add_every_flag)),
    "watch": ("watch a drop folder", (add_watch_flags, add_clip_flags, add_every_flag)),
    "credits": ("what the account can spend", (add_credits_flags, add_every_flag)),
}


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Every command; given `argv`, with flags for the one named there, which saves time."""
    parser = argparse.ArgumentParser(
        prog="hedra_avatar",
        description="Turn a portrait and a voice recording into a talking-avatar video with Hedra.",
        epilog="Exit status: 0 done, 1 something failed, 2 wrong usage, 130 Ctrl-C. "
        "A clip is paid for once: run a command again and it takes up where the last one stopped.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, adders) in FLAGS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        for add in adders if argv is None or name in argv else ():
            add(command)
    return parser


def read_environment(environ: Mapping[str, str], args: argparse.Namespace) -> dict[str, str]:
    """Flag over environment over .env in the working directory."""
    values: dict[str, str] = {}
    if Path(".env").is_file():
        try:
            found = need("dotenv").dotenv_values(".env", interpolate=False, encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f".env is no readable UTF-8 text: {error}") from error
        values = {name: value for name, value in found.items() if value is not None}
    values.update(environ)
    flags = {"model": "HEDRA_MODEL_ID", "workspace": "HEDRA_WORKSPACE_ID"}
    values.update({n: getattr(args, f) for f, n in flags.items() if getattr(args, f, "")})
    return values


def open_studio(
    args: argparse.Namespace, environ: Mapping[str, str], view: View, sleep: Sleep | None = None
) -> Studio:
    """What the flags ask for, on the account of the environment."""
    account = open_account(environ.get("HEDRA_API_KEY") or "", environ)
    jobs = getattr(args, "jobs", 1)
    return Studio(
        account, view, model=environ.get("HEDRA_MODEL_ID") or "", timeout_s=args.timeout,
        interval_s=args.poll_interval, connections=max(3, jobs), sleep=sleep,
    )


def wishes_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Wishes:
    """What the flags say of every clip."""
    fallback = environ.get("FRIEND_IMG") or ""
    return Wishes(args.img, fallback, args.prompt, args.resolution, args.aspect_ratio)


def emitter(args: argparse.Namespace, view: View) -> Callable[[Result], object]:
    """Results on standard output, as paths or as JSON."""

    def emit(result: Result) -> None:
        detail = f"in {result.seconds:.1f} s" if not result.error else result.error
        view.state(result.name, result.status, detail if result.effort else result.error)
        if args.verbose > 1 and result.effort:
            effort = ", ".join(f"{name} {value:g}" for name, value in result.effort.items())
            view.say(f"{result.name}: {effort}")
        if args.json:
            view.result(json.dumps(as_json(result)))
        elif not result.error:
            view.result(result.path)

    return emit


def as_json(result: Result) -> dict[str, Any]:
    """A result as --json prints it."""
    values = result._asdict()
    effort = values.pop("effort")
    price = values.pop("price")
    return {**values, "credits": price, "error": result.error or None, **effort}


def shown(args: argparse.Namespace) -> Show | None:
    """How --dry-run shows its rows, if it was asked for."""
    return (table_json if args.json else table) if args.dry_run else None


def cmd_run(args: argparse.Namespace, environ: Mapping[str, str], view: View) -> int:
    """One clip."""
    audio = Path(args.wav)
    target = Path(args.out) if args.out else Path(args.out_dir) / f"{audio.stem}.mp4"
    names = folder_names(audio.parent) if audio.parent.is_dir() else {}
    clip = clip_of(audio, target, wishes_of(args, environ), names, flags_win=True)
    inspect_file(clip.image, "image")
    inspect_file(clip.audio, "audio")
    studio, emit = open_studio(args, environ, view), emitter(args, view)
    if args.dry_run:
        return run_batch(
            studio, [clip], [], emit, jobs=1, max_price=None, force=args.force, show=shown(args)
        )
    result, error = attempt(studio, clip, force=args.force)
    if error and not args.json:
        raise error
    emit(result)
    if error:
        raise error
    return 0


def cmd_batch(args: argparse.Namespace, environ: Mapping[str, str], view: View) -> int:
    """A folder of clips."""
    clips, bad = find_clips(Path(args.folder), Path(args.out_dir), wishes_of(args, environ))
    if not clips and not bad:
        view.say(f"{printable(args.folder)} holds no .wav files: nothing to do")
    studio = open_studio(args, environ, view)
    return run_batch(
        studio, clips, bad, emitter(args, view), jobs=args.jobs, max_price=args.max_credits,
        force=args.force, show=shown(args),
    )


def cmd_credits(args: argparse.Namespace, environ: Mapping[str, str], view: View) -> int:
    """The balance."""
    balance = get_balance(environ.get("HEDRA_API_KEY") or "", environ=environ)
    shown = {"remaining": balance.remaining, "unit": balance.unit, **balance.more}
    view.result(json.dumps(shown) if args.json else amount(balance.remaining, balance.unit))
    if balance.remaining >= args.min:
        return 0
    asked, left = amount(args.min, balance.unit), amount(balance.remaining, balance.unit)
    raise OutOfCredits(f"the account has {left}, less than the {asked} asked for: add funds")


def cmd_watch(args: argparse.Namespace, environ: Mapping[str, str], view: View) -> int:
    """A folder that is watched, until Ctrl-C or SIGTERM."""
    folder, wishes = Path(args.folder), wishes_of(args, environ)
    if not (wishes.image or wishes.fallback):
        view.say("warning: no --img and no FRIEND_IMG: only recordings with a portrait beside them")
    if args.once:
        args.max_credits, args.dry_run = None, False
        return cmd_batch(args, environ, view)
    from signal import SIGTERM, signal

    stop = threading.Event()
    studio = open_studio(args, environ, view, sleep=until(stop))
    watcher = Watcher(studio, folder, Path(args.out_dir), wishes, args.jobs)
    watcher.emit = emitter(args, view)
    observer = need("watchdog.observers" + (".polling" if args.polling else ""))
    observer = observer.PollingObserver() if args.polling else observer.Observer()
    if threading.current_thread() is threading.main_thread():
        signal(SIGTERM, lambda *_: watcher.end(stop))
    observer.start()
    try:
        watcher.run(observer, stop)
    finally:
        notify_systemd("STOPPING=1")
        stop.set()
        studio.http.governor.stop()
        observer.stop()
        watcher.crew.stop(0.5)
        observer.join(1.0)
    view.say("stopped; generations in flight are in the ledger and taken up by the next start")
    return 0


def until(stop: threading.Event) -> Sleep:
    """A sleep that ends, with Stopped, when the program does."""

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped("the watcher was stopped; the next start takes this clip up")

    return sleep


COMMANDS = {"run": cmd_run, "batch": cmd_batch, "watch": cmd_watch, "credits": cmd_credits}


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """The command line; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    view = View()
    with contextlib.suppress(AttributeError):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        need_packages(args.command)
        environ = read_environment(os.environ if environ is None else environ, args)
        view = open_view(args.quiet, args.verbose)
        status = COMMANDS[args.command](args, environ, view)
        if view.deaf:
            raise HedraError("standard output took no more; what was made is in its place")
        return status
    except KeyboardInterrupt:
        view.close()
        complain("stopped; nothing that was paid for is lost: run the same command again to go on")
        return 130
    except Exception as error:  # the last line of defence: a person reads this
        view.close()
        if args.verbose:
            import traceback

            traceback.print_exc()
        complain(explain(error))
        return 1
    finally:
        view.close()


def need_packages(command: str) -> None:
    """Say at once, in one line, if what a command may need is not installed."""
    from importlib.util import find_spec

    wanted = ["urllib3", "tqdm", "dotenv"] + ["watchdog"] * (command == "watch")
    for package in wanted:
        if find_spec(package) is None:
            need(package)


if __name__ == "__main__":
    STATUS = main()
    for STREAM in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            STREAM.flush()
    # Threads that still wait for Hedra are no reason to wait, and may crash an interpreter that
    # takes itself apart around them; what they do is in the ledger.
    os._exit(STATUS)
