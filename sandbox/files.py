"""The files: how an upload is taken in, and the other host, to which no key must come."""

import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sandbox.books import Asset, Books, Desk
from sandbox.faults import FileSlice, Refusal, Reply, Request, page, refuse
from sandbox.render import sniff

CHUNK = 1 << 20
# What every voice's preview sounds like: the sample, which is nobody's upload.
PREVIEW = Path(__file__).with_name("hello.wav")


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


def save(request: Request, out: Path) -> int:
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
        raise refuse(("body", "file"), "is required", "required")
    return size


def keep(books: Books, request: Request, asset: Asset) -> None:
    """Store the multipart body of an upload; called without the lock."""
    part = books.root / f"{uuid.uuid4().hex}.part"
    try:
        books.store(asset, part, save(request, part))
    finally:
        part.unlink(missing_ok=True)


def preview_url(books: Books) -> str:
    """Where one hears what a voice sounds like."""
    return books.presigned(PREVIEW.name, books.url_seconds)


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a Range header, None where there is none that is understood."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


class FileHost(Desk):
    """The second port: presigned URLs that expire, Range and If-Range."""

    name = "files"

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.routes = [("GET", "/([^/]+)", "download", self.download)]

    def key(self, request: Request) -> str:
        return request.headers.get("x-api-key") or request.headers.get("authorization", "")

    def admit(self, request: Request) -> None:
        if self.key(request):
            self.books.leaks.append(f"{request.method} {request.path}")

    def refuse(self, refusal: Refusal) -> Reply:
        text = f"<Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error>"
        return page(refusal.status, text.encode(), "application/xml", refusal.headers)

    def download(self, request: Request, arg: str) -> Reply:
        expires = request.query.get("expires", "")
        good = self.books.sign(arg, int(expires)) if re.fullmatch(r"\d{1,15}", expires) else ""
        if not good or request.query.get("signature") != good:
            raise Refusal(403, "SignatureDoesNotMatch", "The signature does not match")
        if time.time() >= int(expires):
            raise Refusal(403, "AccessDenied", "Request has expired")
        path = PREVIEW if arg == PREVIEW.name else self.books.root / arg
        if not path.is_file():
            raise Refusal(404, "NoSuchKey", "The specified key does not exist")
        return self._content(request, path)

    def _content(self, request: Request, path: Path) -> Reply:
        facts = path.stat()
        size, tag = facts.st_size, f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"'
        kind = "video/mp4" if path.suffix == ".mp4" else sniff(path) or "application/octet-stream"
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
