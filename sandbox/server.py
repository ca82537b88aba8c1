"""The sandbox itself, which knows no sockets, and the two ports of 127.0.0.1 that it is put on."""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, BinaryIO, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from sandbox.books import Books, Desk
from sandbox.faults import ERRORS, Drop, Fault, FileSlice, Refusal, Reply, Request, html
from sandbox.files import CHUNK, FileHost
from sandbox.jobs_api import PREFIX_V3, JobsApi
from sandbox.web_api import PREFIX_V2, WebApi

Tell: TypeAlias = Callable[[str], object]  # what is done with the line of a request


class Call(NamedTuple):
    """A line of the log; a call that was reset has no status."""

    api: str
    verb: str
    status: int | None
    at: float


@dataclass(kw_only=True, eq=False)
class Sandbox(Books):
    """Hedra: `api` answers both APIs, `files` the host of the videos."""

    rate: tuple[int, float] | None = None  # requests in seconds, for each key
    latency: float = 0.0  # seconds before each answer
    log: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._web, self._jobs, self._host = WebApi(self), JobsApi(self), FileHost(self)
        self._recent: dict[str, deque[float]] = {}

    def count(self, verb: str, api: str | None = None) -> int:
        """How often a verb was called."""
        with self.lock:
            return sum(call.verb == verb and api in (None, call.api) for call in self.log)

    def api(self, request: Request) -> Reply:
        """Answer a request to the API port; may raise Drop."""
        jobs = request.path.startswith(PREFIX_V3 + "/")
        return self._answer(self._jobs if jobs else self._web, request)

    def files(self, request: Request) -> Reply:
        """Answer a request to the files port; may raise Drop."""
        return self._answer(self._host, request)

    def _answer(self, desk: Desk, request: Request) -> Reply:
        at = time.monotonic()
        time.sleep(self.latency)
        verb, handler, arg = desk.find(request)
        fault = self._next_fault(verb) or Fault(verb, "none")
        reply = None
        if fault.kind != "reset":
            reply = self._handle(desk, request, fault, lambda: handler(request, arg))
        heard = None if fault.kind == "reset-after" else reply
        with self.lock:
            self.log.append(Call(desk.name, verb, heard.status if heard else None, at))
        if heard is None:
            raise Drop
        if fault.kind == "stall":
            time.sleep(fault.value)
        return heard

    def _handle(
        self, desk: Desk, request: Request, fault: Fault, handle: Callable[[], Reply]
    ) -> Reply:
        note = f" (key: {desk.key(request)})" if self.echo_key else ""
        try:
            if early := fault.before(note):
                return early
            if fault.kind == "ignore-range":
                request.headers.pop("range", None)
            if fault.verb not in desk.public:
                desk.admit(request)
            if desk is not self._host:
                self._check_rate(desk.key(request))
            reply = handle()
            if fault.kind == "500-after":
                raise Refusal(*ERRORS["500"])
        except Refusal as refusal:
            refusal.message += note
            reply = desk.refuse(refusal)
            if refusal.status == 429:
                reply.headers.update(self._rate_headers(refusal.extra.get("retry_after")))
        return fault.after(reply)

    def _next_fault(self, verb: str) -> Fault | None:
        """The fault that this call meets, None if all is well."""
        with self.lock:
            for fault in self.faults:
                if fault.verb == verb and fault.skip > 0:
                    fault.skip -= 1
                elif fault.verb == verb and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _check_rate(self, key: str) -> None:
        """Refuse a request beyond the rate; the window slides."""
        if self.rate is None:
            return
        most, window = self.rate
        now = time.monotonic()
        with self.lock:
            recent = self._recent.setdefault(key, deque())
            while recent and recent[0] <= now - window:
                recent.popleft()
            if len(recent) < most:
                recent.append(now)
                return
            left = recent[0] + window - now
        text = f"Request rate limit exceeded: {most} requests per {window:g}s."
        raise Refusal(429, "RESOURCE_EXHAUSTED", text, retry_after=max(1, math.ceil(left)))

    def _rate_headers(self, after: object) -> dict[str, str]:
        """What every 429 tells besides Retry-After, which a fault may have made no number."""
        left = after if isinstance(after, int | float) else 1
        most, reset = self.rate[0] if self.rate else 60, math.ceil(time.time() + left)
        told = {"Limit": most, "Remaining": 0, "Reset": reset}
        return {f"X-RateLimit-{name}": str(value) for name, value in told.items()}


class Body:
    """The body of a request: a stream that ends where Content-Length says."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self.stream, self.left = stream, length

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(self.left if size < 0 else min(size, self.left))
        # A client that went away sends nothing more, whatever it promised.
        self.left = self.left - len(data) if data else 0
        return data


class Connection(BaseHTTPRequestHandler):
    """Turns HTTP into a Request, and a Reply into HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Port

    def do_GET(self) -> None:
        started, said = time.perf_counter(), "reset"
        length = self.headers.get("Content-Length") or "0"
        sized = re.fullmatch(r"\d{1,18}", length) and "Transfer-Encoding" not in self.headers
        body = Body(self.rfile, int(length) if sized else 0)  # type: ignore[arg-type]
        self.close_connection |= not sized
        try:
            request = self._request(body)
            reply = self.server.answer(request) if sized else html(411, "411 Length Required")
            said = str(reply.status)
            self._send(reply)
        except Drop:
            self._reset()
        finally:
            took = 1000 * (time.perf_counter() - started)
            self.server.tell(f"{self.command} {self.path.partition('?')[0]} {said} {took:.0f} ms")
        # Left unread it would be taken for the next request, or reset the answer on its way.
        while body.read(CHUNK):
            pass

    do_POST = do_GET

    def _request(self, body: Body) -> Request:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return Request(self.command, parts.path, query, headers, body)  # type: ignore[arg-type]

    def _send(self, reply: Reply) -> None:
        sized = "Content-Length" in reply.headers
        framing = {} if sized else {"Transfer-Encoding": "chunked"}
        lines = [f"{name}: {value}" for name, value in (reply.headers | framing).items()]
        reason = http.client.responses.get(reply.status, "Unknown")
        text = "\r\n".join([f"HTTP/1.1 {reply.status} {reason}", *lines, "", ""])
        head, most, body = text.encode("latin-1"), reply.cut_after, reply.body
        self.wfile.write(head + body[:most] if isinstance(body, bytes) else head)
        if isinstance(body, FileSlice):
            if length := body.length if most is None else most:
                with body.path.open("rb") as file:
                    self.connection.sendfile(file, body.offset, length)
        elif not isinstance(body, bytes):
            self._send_chunks(body, math.inf if most is None else most)
        if most is not None:
            time.sleep(0.05)  # a reset overtakes bytes that are still on their way
            raise Drop

    def _send_chunks(self, chunks: Iterable[bytes], most: float) -> None:
        for chunk in chunks:
            part = chunk[: min(len(chunk), int(min(most, 1 << 40)))]
            most -= len(part)
            if part:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if most <= 0:
                return
        self.wfile.write(b"0\r\n\r\n")

    def _reset(self) -> None:
        """Close with RST: what is said so far may arrive, that it was all may not."""
        self.close_connection = True
        self.server.resets.add(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        """Quiet: `tell` says it better."""


class Port(socketserver.ThreadingTCPServer):
    """A listening port; knows its connections, so that it can count and close them."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, answer: Callable[[Request], Reply], tell: Tell) -> None:
        self.answer, self.tell = answer, tell
        self.accepted, self.peak = 0, 0
        self.open: set[Any] = set()
        self.resets: set[Any] = set()
        try:
            super().__init__(("127.0.0.1", port), Connection)
        except OSError as error:
            raise OSError(f"port {port}: {error.strerror}; choose another") from None
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        self.accepted += 1
        self.peak = max(self.peak, len(self.open))
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        if request in self.resets:
            # Not the polite shutdown, which would send FIN before the RST.
            self.resets.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away as they like; anything else is a bug and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):  # it may be closing by itself
                connection.shutdown(socket.SHUT_RDWR)


class Server(NamedTuple):
    """Where a sandbox is: what HEDRA_BASE_URL is for either API, and their port."""

    url_v2: str
    url_v3: str
    port: Port

    @property
    def connections(self) -> int:
        """How many connections the API port has accepted."""
        return self.port.accepted

    @property
    def peak_connections(self) -> int:
        """How many of them were open at once, at most."""
        return self.port.peak


@contextlib.contextmanager
def serve(
    sandbox: Sandbox, port: int = 0, files_port: int = 0, tell: Tell = str
) -> Iterator[Server]:
    """Answer on two ports of 127.0.0.1, in the background; 0 is any free port.

    `tell` is given a line for each request: method, path, status and milliseconds, never a key;
    by default nobody sees it. The sandbox itself stays open.
    """
    with Port(port, sandbox.api, tell) as api, Port(files_port, sandbox.files, tell) as files:
        sandbox.files_url = files.url
        yield Server(api.url + PREFIX_V2, api.url + PREFIX_V3, api)
