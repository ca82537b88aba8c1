"""Hedra on your own machine: both of its APIs over loopback, no key, no credits, a real MP4 back.

`python -m sandbox serve | demo | sample | bench`, each with its own --help, is the command line.
In a program the parts are: `Sandbox`, the rules and the books, which turns a `Request` into a
`Reply` and knows no sockets; and `serve`, which puts it on two ports:

    with Sandbox(render_seconds=1) as sandbox, serve(sandbox) as server:
        sandbox.faults.append(Fault("submit", "reset-after"))   # paid, but nobody hears of it
        ...                                                     # talk to server.url_v2 or url_v3
        assert len(sandbox.paid) == 1

Verbs, in `Sandbox.log` and for `Fault`: balance price voices create upload assets submit status
list stream result download models model. Fault kinds that replace the call: 500 502-html 503 429
408 404 302 refused reset; that spoil its answer: 500-after reset-after html-after not-json cut
stall; for download also html ignore-range expired; for stream also buffer no-done.
"""

from sandbox.books import Asset, Generation, catalogue
from sandbox.faults import Drop, Fault, Refusal, Reply, Request
from sandbox.jobs_api import FUNDING_URL, PREFIX_V3
from sandbox.render import png
from sandbox.server import Call, Sandbox, Server, serve
from sandbox.web_api import PREFIX_V2, WORKSPACE

__all__ = [
    "FUNDING_URL", "PREFIX_V2", "PREFIX_V3", "WORKSPACE", "Asset", "Call", "Drop", "Fault",
    "Generation", "Refusal", "Reply", "Request", "Sandbox", "Server", "catalogue", "png", "serve",
]
