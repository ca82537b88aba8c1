"""Requests and answers, and what can be wrong with either: schemas, refusals, staged faults."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

Json: TypeAlias = dict[str, Any]
Place: TypeAlias = tuple[str | int, ...]

BODY_MAX = 1 << 20
UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


class Request(NamedTuple):
    """One HTTP request; header names in lower case, `body` ends at Content-Length."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: BinaryIO

    def json(self, schema: Json, place: Place = ()) -> Json:
        """The object in the body, which fits the schema; else a Refusal."""
        try:
            value = json.loads(self.body.read(BODY_MAX))
        except (ValueError, RecursionError):
            raise refuse(place or ("body",), "is no JSON", "json") from None
        check(value, schema, place)
        return dict(value)

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number out of the query, else a Refusal."""
        text = self.query.get(name, str(default))
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            raise refuse(("query", name), f"{text!r} is not from {low} to {high}", "range")
        return int(text)


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
        self.headers: dict[str, str] = dict(extra.get("headers", {}))
        if extra.get("retry_after") is not None:
            self.headers["Retry-After"] = str(extra["retry_after"])


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


def page(status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> Reply:
    """An answer with a body that is all there."""
    length = {"Content-Type": kind, "Content-Length": str(len(body))}
    return Reply(status, {**length, **(headers or {})}, body)


def json_reply(status: int, value: Any, headers: dict[str, str] | None = None) -> Reply:
    """A JSON answer."""
    return page(status, json.dumps(value).encode(), "application/json", headers)


def html(status: int, words: str, headers: dict[str, str] | None = None) -> Reply:
    """An answer that no client of an API hopes for."""
    text = f"<html><head><title>{words}</title></head><body><h1>{words}</h1></body></html>\n"
    return page(status, text.encode(), "text/html", headers)


class Problem(NamedTuple):
    """One thing that is wrong with a request: where, what, and why in a word."""

    place: Place
    message: str
    reason: str
    allowed: list[str] | None = None


def refuse(place: Place, message: str, reason: str) -> Refusal:
    """The refusal of one field."""
    problems = [Problem(place, message, reason)]
    return Refusal(422, "INVALID_ARGUMENT", message, problems=problems)


def check(value: Any, schema: Json, place: Place) -> None:
    """Refuse a value for all that is wrong with it."""
    if problems := find_problems(value, schema, place):
        raise Refusal(422, "INVALID_ARGUMENT", problems[0].message, problems=problems)


JSON_TYPES: dict[str, Any] = {"string": str, "integer": int, "number": (int, float)}
JSON_TYPES |= {"array": list, "object": dict, "null": type(None)}
# What a word of JSON Schema asks of a text or a number, and how that is told.
RULES: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "enum": (lambda value, rule: value in rule, "must be one of {}"),
    "pattern": (lambda value, rule: re.search(rule, value), "must not be blank"),
    "format": (lambda value, _: re.fullmatch(UUID, value), "must be a valid {}"),
    "maxLength": (lambda value, rule: len(value) <= rule, "must have at most {} characters"),
    "minimum": (lambda value, rule: value >= rule, "must be at least {}"),
    "maximum": (lambda value, rule: value <= rule, "must be at most {}"),
}


def is_a(value: Any, kind: str) -> bool:
    """Whether a value is of one of JSON's types; True is no number here, nor are NaN and inf."""
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, JSON_TYPES[kind])


def find_problems(value: Any, schema: Json, place: Place) -> list[Problem]:
    """All that is wrong with a value, by the words of JSON Schema that are used here."""
    if "anyOf" in schema:
        # Of several that do not fit, the one that fits best tells most.
        return min((find_problems(value, one, place) for one in schema["anyOf"]), key=len)
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(is_a(value, kind) for kind in kinds):
        return [Problem(place, f"must be of type {' or '.join(kinds)}", "type")]
    if isinstance(value, dict):
        return object_problems(value, schema, place)
    if isinstance(value, list):
        return array_problems(value, schema, place)
    found = None if value is None else scalar_problem(value, schema, place)
    return [found] if found else []


def object_problems(value: Json, schema: Json, place: Place) -> list[Problem]:
    """Fields that are missing or not known, and what is wrong with the others."""
    rules = schema.get("properties", {})
    strict = schema.get("additionalProperties", True) is False
    extra = [name for name in value if strict and name not in rules]
    missing = [name for name in schema.get("required", ()) if name not in value]
    found = [Problem((*place, name), "is not known", "extra") for name in extra]
    found += [Problem((*place, name), "is required", "required") for name in missing]
    for name in (name for name in rules if name in value):
        found += find_problems(value[name], rules[name], (*place, name))
    return found


def array_problems(value: list[Any], schema: Json, place: Place) -> list[Problem]:
    """Too few or too many items, and what is wrong with each."""
    low, high = schema.get("minItems", 0), schema.get("maxItems", 100)
    if not low <= len(value) <= high:
        return [Problem(place, f"takes {low} to {high} items", "items")]
    rule = schema["items"]
    return [one for at, item in enumerate(value) for one in find_problems(item, rule, (*place, at))]


def scalar_problem(value: Any, rule: Json, place: Place) -> Problem | None:
    """What is wrong with a text or a number."""
    for word, (fits, message) in RULES.items():
        if word in rule and not fits(value, rule[word]):
            allowed = [str(item) for item in rule[word]] if word == "enum" else None
            return Problem(place, message.format(rule[word]), word, allowed)
    return None


# Those that are an error answer in the shape of the API, given before anything is done.
ERRORS = {
    "500": (500, "INTERNAL", "An unexpected error occurred"),
    "503": (503, "UNAVAILABLE", "Come back later"),
    "429": (429, "RESOURCE_EXHAUSTED", "Request rate limit exceeded"),
    "408": (408, "DEADLINE_EXCEEDED", "The request took too long"),
    "404": (404, "NOT_FOUND", "Not found for now"),
    "expired": (403, "AccessDenied", "Request has expired"),
    "refused": (422, "MODERATION_FAILED", "The content was refused by moderation"),
}
FAULTS = {*ERRORS, "502-html", "302", "reset", "500-after", "reset-after", "html-after", "not-json"}
FAULTS |= {"cut", "stall", "html", "ignore-range", "buffer", "no-done", "none"}


@dataclass
class Fault:
    """Something that goes wrong for the next `times` calls of `verb`, after `skip` good ones."""

    verb: str
    kind: str
    times: int = 1
    skip: int = 0
    value: Any = None  # seconds (Retry-After, stall, buffer), Location of 302, status of html-after

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"{self.kind!r} is no kind of fault: {' '.join(sorted(FAULTS))}")

    def before(self, note: str) -> Reply | None:
        """The answer of a fault that replaces the call, None for one that lets it happen."""
        if self.kind in ERRORS:
            status, code, message = ERRORS[self.kind]
            default = 1 if status in (429, 503) else None
            after = default if self.value is None else self.value
            raise Refusal(status, code, message, retry_after=after)
        if self.kind == "502-html":
            return html(502, "502 Bad Gateway" + note)
        if self.kind == "302":
            return html(302, "302 Found", {"Location": str(self.value)})
        return None

    def after(self, reply: Reply) -> Reply:
        """The answer as a fault that spoils answers leaves it."""
        if self.kind in ("not-json", "html"):
            return html(200, "Welcome")
        if self.kind == "html-after":
            return html(self.value or 404, "A word from the gateway")
        if self.kind == "cut":
            return reply._replace(cut_after=int(reply.headers.get("Content-Length", 512)) // 2)
        if isinstance(reply.body, bytes):
            return reply
        if self.kind == "no-done":
            return reply._replace(body=itertools.islice(reply.body, 1))
        if self.kind == "buffer":
            return reply._replace(body=itertools.chain(pause(self.value), reply.body))
        return reply


def pause(seconds: float) -> Iterator[bytes]:
    """No bytes, after a while."""
    time.sleep(seconds)
    yield from ()
