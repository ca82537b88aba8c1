"""The jobs API, v3: Authorization, a wallet in dollars, file handles, strict inputs, a stream."""

import itertools
import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from sandbox.books import OUTPUTS, SPEECH, VIDEO, Asset, Books, Desk, Generation, iso, read_data
from sandbox.faults import Json, Place, Problem, Refusal, Reply, Request, check, json_reply, refuse
from sandbox.files import keep, preview_url
from sandbox.render import FPS

PREFIX_V3 = "/v3"
SCHEMAS: Json = read_data("jobs_schemas")
WORDS = {"queued": "IN_QUEUE", "processing": "IN_PROGRESS", "finalizing": "IN_PROGRESS"}
WORDS |= {"complete": "COMPLETED", "error": "FAILED"}
EVENTS = ((0.0, "queued"), (0.1, "started"), (0.9, "finalizing"))  # from which share on
USD_PER_SECOND = {"540p": 0.03, "720p": 0.06, "1080p": 0.12}
USD_PER_CHARACTER = 0.0001
FUNDING_URL = "https://www.hedra.com/develop/billing?add_funds=true"
MEDIA = {"start_image": ("image/", 10_485_760), "audio": ("audio/", 104_857_600)}
AUDIO_SECONDS = (0.5, 600.0)


def dotted(place: Place) -> str:
    """A place in the words of v3: `input.audio[0]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def details(problems: list[Problem]) -> Json:
    """What an error says of the fields that are wrong."""
    rows: list[Json] = []
    for place, words, reason, allowed in problems:
        name = dotted(place)
        row = {"field": name, "message": f"{name}: {words}", "reason": reason}
        rows.append({**row, "allowed": allowed})
    text = f"{len(rows)} input fields are invalid; see details."
    text = text if len(rows) > 1 else rows[0]["message"]
    return {"message": text, "param": rows[0]["field"], "details": rows}


class JobsApi(Desk):
    """v3; the handlers stand in the order of the routes."""

    name = "v3"
    prefix = PREFIX_V3
    public = frozenset({"models", "model", "voices"})

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.acks: dict[str, Json] = {}
        self.issued: set[str] = set()
        job = "/jobs/(job_[0-9a-f-]{36})"
        self.routes = [
            ("GET", "/balance", "balance", self.balance),
            ("GET", "/models", "models", self.models),
            ("GET", "/models/([^/]+)", "model", self.model),
            ("GET", "/models/([^/]+)/voices", "voices", self.voices),
            ("POST", "/models/([^/]+)/estimate", "price", self.estimate),
            ("POST", "/models/([^/]+)", "submit", self.submit),
            ("POST", "/files", "upload", self.upload),
            ("GET", job + "/status", "status", self.status),
            ("GET", job + "/stream", "stream", self.stream),
            ("GET", job, "result", self.result),
        ]

    def key(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return key.strip() if scheme.lower() in ("bearer", "key") else ""

    def admit(self, request: Request) -> None:
        key = self.key(request)
        if not key:
            raise Refusal(401, "UNAUTHORIZED", "Missing credentials: send Authorization: Bearer")
        if ":" not in key or not self.books.is_good(key):
            raise Refusal(401, "UNAUTHORIZED", "Invalid API key.")

    def refuse(self, refusal: Refusal) -> Reply:
        trace, status = uuid.uuid4().hex, refusal.status
        error: Json = {"code": refusal.code or "NOT_FOUND", "message": refusal.message}
        error |= {"retryable": status in (408, 429) or status >= 500}
        told = {name: refusal.extra.get(name) for name in ("retry_after", "billing")}
        error |= {name: value for name, value in told.items() if value is not None}
        if problems := refusal.extra.get("problems"):
            status = 400
            error |= details(problems)
        headers = {"X-Trace-Id": trace, **refusal.headers}
        return json_reply(status, {"error": error, "trace_id": trace}, headers)

    def balance(self, request: Request, arg: str) -> Reply:
        self.books.check_balance()
        left = round(self.books.usd, 4)
        return json_reply(200, {"balance": left, "spent": None, "currency": "USD"})

    # Models.

    def _rows(self) -> dict[str, tuple[str, Json]]:
        """The models that can be run here: kind and row by public id, the slug's last part."""
        found = {}
        for row in self.books.catalogue:
            kind = SPEECH if row["type"] == "text_to_speech" else VIDEO
            if kind == SPEECH or row.get("requires_audio_input"):
                found[row["slug"].rpartition("/")[2]] = (kind, row)
        return found

    def _row(self, model: str) -> tuple[str, Json]:
        if found := self._rows().get(model):
            return found
        if any(row["slug"].endswith("/" + model) for row in self.books.catalogue):
            raise Refusal(400, "FAILED_PRECONDITION", f"The sandbox cannot run '{model}'.")
        raise Refusal(404, "NOT_FOUND", f"Model '{model}' not found.")

    def _summary(self, model: str, kind: str, row: Json) -> Json:
        told = {"name": row["name"], "description": row["description"]}
        return {"id": model, "modality": OUTPUTS[kind], **told}

    def models(self, request: Request, arg: str) -> Reply:
        wanted = request.query.get("modality")
        rows = [self._summary(model, *found) for model, found in self._rows().items()]
        rows = [row for row in rows if wanted in (None, row["modality"])]
        return json_reply(200, {"data": rows, "next_cursor": None})

    def model(self, request: Request, arg: str) -> Reply:
        kind, row = self._row(arg)
        schemas = {"input_schema": self._schema(kind, row), "output_schema": {"type": "object"}}
        return json_reply(200, {**self._summary(arg, kind, row), **schemas})

    def _schema(self, kind: str, row: Json) -> Json:
        """The schema of a model's input; how long a text may be is in the catalogue."""
        schema: Json = SCHEMAS[kind]
        if kind == VIDEO:
            return schema
        rules = schema["properties"]
        text = {**rules["text"], "maxLength": row["max_prompt_length"]}
        return {**schema, "properties": {**rules, "text": text}}

    def voices(self, request: Request, arg: str) -> Reply:
        kind, _ = self._row(arg)
        if kind != SPEECH:
            raise Refusal(400, "FAILED_PRECONDITION", f"Model '{arg}' takes no voice.")
        limit = request.number("limit", self.books.voices_per_page, 1, 100)
        start = request.number("cursor", 0, 0, 10**9)
        preview = {"preview_url": preview_url(self.books)}
        rows = [{**one, **preview, "id": f"voice_{one['id']}"} for one in self.books.voices]
        following = str(start + limit) if start + limit < len(rows) else None
        return json_reply(200, {"data": rows[start : start + limit], "next_cursor": following})

    # Files, and what an input says of them.

    def upload(self, request: Request, arg: str) -> Reply:
        asset = Asset(uuid.uuid4().hex, "file", "file", time.time())
        keep(self.books, request, asset)
        kind = asset.content_type or "application/octet-stream"
        asset.expires = time.time() + self.books.handle_seconds
        asset.name = handle = self.books.presigned(asset.id, self.books.handle_seconds)
        with self.books.lock:
            self.books.assets[handle] = asset
            self.issued.add(handle)
        body = {"url": handle, "content_type": kind, "expires_at": iso(asset.expires)}
        return json_reply(201, body)

    def _uploads(self, data: Json) -> dict[str, list[Asset]]:
        """The files that an input names, by field; refuses with all that is wrong with them."""
        found: dict[str, list[Asset]] = {name: [] for name in MEDIA}
        wrong: list[Problem] = []
        for name in found:
            refs = data.get(name, [])
            for at, ref in enumerate(refs if isinstance(refs, list) else [refs]):
                place = ("input", name, at) if isinstance(refs, list) else ("input", name)
                try:
                    found[name].append(self._file(place, ref))
                    check_file(found[name][-1], name, place)
                except Refusal as refusal:
                    wrong += refusal.extra["problems"]
        if wrong:
            raise Refusal(422, "INVALID_ARGUMENT", wrong[0].message, problems=wrong)
        return found

    def _file(self, place: Place, ref: Json) -> Asset:
        """An upload by its handle, or an output by its id, unless they are gone."""
        if ours := ref["source"] == "asset":
            asset = self.books.made(self.name, ref["asset_id"])
        else:
            asset = self.books.assets.get(ref["url"])
        if asset is None and ours:
            raise refuse(place, "is not an asset of yours", "not_found")
        if asset is None and ref["url"] not in self.issued:
            raise refuse(place, "is not a url that POST /v3/files returned", "external_url")
        if asset is None or asset.expires <= time.time():
            raise refuse(place, "has expired. Upload it again and submit the fresh url.", "expired")
        return asset

    # Orders.

    def _draft(self, model: str, data: Json, needed: list[str] | None = None) -> Generation:
        """The checked and priced job that an `input` asks for; an estimate needs less of it."""
        kind, row = self._row(model)
        schema = self._schema(kind, row)
        check(data, schema if needed is None else {**schema, "required": needed}, ("input",))
        facts = self._speech(data) if kind == SPEECH else self._video(data)
        facts |= {"id": f"job_{uuid.uuid4()}", "asset_id": f"asset_{uuid.uuid4()}"}
        return Generation(api=self.name, kind=kind, model=model, request=data, **facts)

    def _video(self, data: Json) -> Json:
        uploads = self._uploads(data)
        length = data["duration_ms"] / 1000 if "duration_ms" in data else None
        if not (seconds := length or sum(one.seconds for one in uploads["audio"])):
            raise refuse(("input", "audio"), "is required, or duration_ms", "required")
        image, audio = (next(iter(uploads[name]), Asset("", "", "", 0.0)) for name in MEDIA)
        resolution, ratio = data.get("resolution", "540p"), data.get("aspect_ratio", "9:16")
        sources = (image.path or Path(), audio.path or Path())
        files = {"image": image.name, "audio": audio.name, "sources": sources}
        shape = {"resolution": resolution, "aspect_ratio": ratio, "length": length}
        told = {"prompt": data.get("prompt", ""), "seconds": seconds}
        return {**files, **shape, **told, "cost": round(USD_PER_SECOND[resolution] * seconds, 4)}

    def _speech(self, data: Json) -> Json:
        known = {f"voice_{one['id']}": one["name"] for one in self.books.voices}
        wish, text = data.get("voice_id", ""), data["text"]
        if wish not in known and "voice_id" in data:
            raise refuse(("input", "voice_id"), "is not one of this model's", "not_found")
        cost = round(USD_PER_CHARACTER * len(text), 4)
        return {"prompt": text, "voice": known.get(wish, ""), "cost": cost}

    def estimate(self, request: Request, arg: str) -> Reply:
        data = request.json(SCHEMAS["estimate"]).get("input", {})
        with self.books.lock:
            one = self._draft(arg, data, ["text"] if self._row(arg)[0] == SPEECH else [])
        return json_reply(200, {"model": one.model, "cost": one.cost, "currency": "USD"})

    def _idempotency_keys(self, request: Request, body: Json) -> list[str]:
        """Those that are read, by the rule of the day."""
        rule, field = self.books.idempotency, "idempotency_key"
        if rule == "header-only" and field in body:
            raise refuse((field,), "is not known: send it as a header", "extra")
        found = [] if rule == "body" else [request.headers.get("idempotency-key")]
        found += [body.get(field)] if rule in ("both", "body") else []
        return [key for key in found if key]

    def submit(self, request: Request, arg: str) -> Reply:
        body = request.json(SCHEMAS["order"])
        with self.books.lock:
            keys = self._idempotency_keys(request, body)
            if ack := next((self.acks[key] for key in keys if key in self.acks), None):
                return json_reply(202, ack, {"Location": ack["result_url"]})
            one = self._draft(arg, body["input"])
            self._pay(one)
            ack = self._ack(one)
            self.acks |= dict.fromkeys(keys, ack)
        self.books.start(one)
        return json_reply(202, ack, {"Location": ack["result_url"]})

    def _pay(self, one: Generation) -> None:
        left = round(self.books.usd, 4)
        if one.cost > left:
            text = f"Your API wallet balance is ${left:.2f} and this costs ${one.cost:.2f}."
            need = {"balance": left, "required": one.cost, "currency": "USD"}
            billing = {**need, "funding_url": FUNDING_URL}
            raise Refusal(402, "INSUFFICIENT_BALANCE", text, billing=billing)
        self.books.order(one)
        one.bill = round(one.bill, 4)
        self.books.usd -= one.bill

    # Jobs.

    def _ack(self, one: Generation) -> Json:
        path = f"{PREFIX_V3}/jobs/{one.id}"
        row = {"job_id": one.id, "model": one.model, "status": "IN_QUEUE"}
        row |= {"status_url": path + "/status", "result_url": path}
        return {**row, "estimated_completion_at": iso(one.at + self.books.render_seconds)}

    def _status(self, one: Generation) -> Json:
        state, progress = self.books.state(one), self.books.progress(one)
        end = None if self.books.is_over(one) else iso(one.at + self.books.render_seconds)
        row = {"job_id": one.id, "status": WORDS[state], "progress": progress}
        return {**row, "estimated_completion_at": end}

    def _events(self, one: Generation, after: int) -> list[Json]:
        """The lifecycle of a job so far, from what the clock says; ids count from 1."""
        state, share = self.books.state(one), self.books.share(one)
        past = [event for part, event in EVENTS if share >= part]
        past += {"complete": ["completed"], "error": ["failed"]}.get(state, [])
        told = {"timestamp": iso(one.at), "level": "info", "source": "worker", "data": {}}
        rows = [{**told, "event": event, "message": f"It is {event}."} for event in past]
        return [{"id": at, **row} for at, row in enumerate(rows, 1)][after:]

    def status(self, request: Request, arg: str) -> Reply:
        with self.books.lock:
            return json_reply(200, self._status(self.books.find(self.name, arg)))

    def stream(self, request: Request, arg: str) -> Reply:
        last = request.headers.get("last-event-id", "")
        with self.books.lock:
            one = self.books.find(self.name, arg)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        seen = int(last) if re.fullmatch(r"\d{1,9}", last) else 0
        return Reply(200, headers, self._frames(one, seen))

    def _frames(self, one: Generation, seen: int) -> Iterator[bytes]:
        """The event stream: a snapshot, then each change; looks ten times a real second."""

        def frame(event: str, value: Json) -> bytes:
            return f"id: {seen}\nevent: {event}\ndata: {json.dumps(value)}\n\n".encode()

        told = ""
        for tick in itertools.count():
            over, status = self.books.is_over(one), self._status(one)
            if status["status"] != told or tick % 10 == 0:
                told = status["status"]
                yield frame("status", status)
            for entry in self._events(one, seen):
                seen = entry["id"]
                yield frame("log", entry)
            if over:
                break
            if tick % 10 == 9:
                yield b": keep-alive\n\n"
            time.sleep(0.1)
        yield b"event: done\ndata: [STREAM_DONE]\n\n"

    def result(self, request: Request, arg: str) -> Reply:
        with self.books.lock:
            one = self.books.find(self.name, arg)
            state = self.books.state(one)
            body: Json = {"job_id": one.id, "model": one.model, "status": WORDS[state]}
            body |= {"outputs": [], "error": None, "metrics": None, "logs": self._events(one, 0)}
            if one.kind == VIDEO:
                body["prompt"] = one.prompt
            one.looks += 1  # money is taken when the work begins, and may be told later
            if state != "queued" and one.looks > self.books.costless_looks:
                body |= {"cost": one.bill, "currency": "USD"}
            if state == "complete":
                body["outputs"] = [self._output(one)]
                spent = round(self.books.render_seconds * 900)
                body["metrics"] = {"processing_time_ms": spent}
            elif one.refused and state == "error":
                # v3 has no reason codes, but says what may be retried.
                retryable = one.refused.get("reason_code") == "MODERATION_OUTPUT_TRANSIENT"
                told = {"code": one.refused["type"], "message": one.refused["message"]}
                body["error"] = {**told, "retryable": retryable}
        return json_reply(200, body)

    def _output(self, one: Generation) -> Json:
        gone, video = self.books.is_gone(one), one.kind == VIDEO
        width, height = one.size if video else (None, None)
        return {
            "status": "EXPIRED" if gone else "COMPLETED",
            "asset_id": None if gone else one.asset_id,
            "url": None if gone else self.books.output_url(one),
            "content_type": "video/mp4" if video else "audio/wav",
            "width": width,
            "height": height,
            "duration_ms": round(one.seconds * 1000),
            "fps": FPS if video else None,
            "error": None,
        }


def check_file(asset: Asset, name: str, place: Place) -> None:
    """Refuse a file that is there, but is not what that field takes."""
    kind, most = MEDIA[name]
    low, high = AUDIO_SECONDS
    if not asset.content_type.startswith(kind):
        raise refuse(place, f"{asset.content_type or 'this'} is not taken here", "content_type")
    if asset.size > most:
        raise refuse(place, f"must be at most {most} bytes", "max_file_size")
    if name == "audio" and not low <= asset.seconds <= high:
        raise refuse(place, f"must last from {low} to {high} seconds", "duration")
