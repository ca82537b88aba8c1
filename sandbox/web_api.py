"""The web API, v2: X-API-Key, credits, assets that are created and then filled."""

import math
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sandbox.books import OUTPUTS, SPEECH, VIDEO, Asset, Books, Desk, Generation, iso, read_data
from sandbox.faults import UUID, Json, Refusal, Reply, Request, check, json_reply, refuse
from sandbox.files import keep, preview_url
from sandbox.render import image_size

PREFIX_V2 = "/web-app/public"
WORKSPACE = "sandbox-workspace"
SCHEMAS: Json = read_data("web_schemas")
ASSET_TYPES = SCHEMAS["asset"]["properties"]["type"]["enum"]


def parse_time(request: Request, name: str, default: float) -> float:
    """The inverse of `iso`; a time without a zone is UTC, and a blank was a plus sign."""
    if name not in request.query:
        return default
    try:
        moment = datetime.fromisoformat(request.query[name].replace(" ", "+"))
    except ValueError:
        raise refuse(("query", name), "is no time", "format") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def credit_cost(row: Json, resolution: str, seconds: float) -> int:
    """The formula of the document: base and seconds, times the modifiers, rounded up."""
    pricing = row["pricing"]
    flat = (pricing.get("base_cost") or 0) + (pricing.get("credits_per_second") or 0) * seconds
    factor = float(pricing["modifiers"].get("resolution", {}).get(resolution, 1.0))
    return math.ceil(flat * factor)


def row(asset_id: str, kind: str, name: str, created: float, content: Json) -> Json:
    """An asset, as the API shows it."""
    told = {"id": asset_id, "type": kind, "name": name, "created_at": iso(created)}
    return {**told, "asset": content}


class WebApi(Desk):
    """v2; the handlers stand in the order of the routes."""

    name = "v2"
    prefix = PREFIX_V2

    def __init__(self, books: Books) -> None:
        super().__init__(books)
        self.routes = [
            ("GET", "/billing/credits", "balance", self.balance),
            ("GET", "/models", "price", self.models),
            ("GET", "/voices", "voices", self.voices),
            ("POST", "/assets", "create", self.create),
            ("POST", f"/assets/({UUID})/upload", "upload", self.upload),
            ("GET", "/assets", "assets", self.assets),
            ("POST", "/generations", "submit", self.submit),
            ("GET", f"/generations/({UUID})/status", "status", self.status),
            ("GET", "/generations", "list", self.generations),
        ]

    def key(self, request: Request) -> str:
        return request.headers.get("x-api-key", "")

    def admit(self, request: Request) -> None:
        key = self.key(request)
        if ":" in key:
            text = "This account has moved to the v3 API: use https://api.hedra.com/v3"
            raise Refusal(403, "PERMISSION_DENIED", text)
        if not self.books.is_good(key):
            raise Refusal(401, "", "Invalid API key" if key else "Not authenticated")

    def refuse(self, refusal: Refusal) -> Reply:
        """Four of the five shapes that are seen; the fifth, HTML, is a fault."""
        code, message = refusal.code, refusal.message
        body: Json = {"code": code, "messages": [message]}
        if problems := refusal.extra.get("problems"):
            rows = [{"loc": one.place, "msg": one.message, "type": one.reason} for one in problems]
            body = {"detail": rows}
        elif not code:
            body = {"detail": message}
        elif refusal.status in (408, 409, 429) or refusal.status >= 500:
            body["error_code"] = code
        return json_reply(refusal.status, body, refusal.headers)

    def balance(self, request: Request, arg: str) -> Reply:
        self.books.check_balance()
        left = self.books.credits
        used = int(sum(one.bill for one in self.books.paid if one.api == self.name))
        pool = {WORKSPACE: {"used": used, "allocated": left + used, "available": left}}
        body = {"remaining": left, "expiring": 0, "used": used, "workspace_credit_pool": pool}
        return json_reply(200, body)

    def models(self, request: Request, arg: str) -> Reply:
        kind = request.query.get("types")
        rows = [row for row in self.books.catalogue if kind in (None, row.get("type"))]
        return json_reply(200, rows)

    def voices(self, request: Request, arg: str) -> Reply:
        return json_reply(200, self._voice_rows())

    # Assets.

    def create(self, request: Request, arg: str) -> Reply:
        body = request.json(SCHEMAS["asset"], ("body",))
        new_id = (body.get("reserved_asset_id") or str(uuid.uuid4())).lower()
        asset = Asset(new_id, body["type"], body["name"], time.time())
        with self.books.lock:
            self.books.assets[asset.id] = asset
        row = {"id": asset.id, "name": asset.name, "type": asset.kind}
        return json_reply(200, {**row, "workspace_id": body.get("workspace_id")})

    def upload(self, request: Request, arg: str) -> Reply:
        asset = self.books.assets.get(arg.lower())
        if asset is None:
            raise Refusal(404, "NOT_FOUND", f"Asset {arg} not found")
        keep(self.books, request, asset)
        return json_reply(200, self._upload_row(asset))

    def assets(self, request: Request, arg: str) -> Reply:
        kind, ids = request.query.get("type", ""), request.query.get("ids")
        if kind not in ASSET_TYPES:
            raise refuse(("query", "type"), f"must be one of {', '.join(ASSET_TYPES)}", "enum")
        with self.books.lock:
            ours = [one for one in self.books.assets.values() if one.kind == kind]
            # Those of v3 lapse, those of v2 do not.
            rows = [self._upload_row(one) for one in ours if one.path and one.expires == math.inf]
            made = (one for one in self.books.listed(self.name) if OUTPUTS[one.kind] == kind)
            rows += [self._made_row(one) for one in made if self.books.state(one) == "complete"]
        rows += self._voice_rows() if kind == "voice" else []
        wanted = ids.lower().split(",") if ids else None
        return json_reply(200, [row for row in rows if wanted is None or row["id"] in wanted])

    def _voice_rows(self) -> list[Json]:
        rows, common = [], {"type": "voice", "preview_url": preview_url(self.books)}
        for voice in self.books.voices:
            labels = [{"name": name, "value": value} for name, value in voice["labels"].items()]
            rows.append(row(voice["id"], "voice", voice["name"], 0, {**common, "labels": labels}))
        return rows

    def _upload_row(self, asset: Asset) -> Json:
        content: Json = {"url": self.books.presigned(asset.id, self.books.url_seconds)}
        if asset.kind == "image" and asset.path:
            width, height = image_size(asset.path)
            content |= {"type": "uploaded_image", "width": width, "height": height}
        else:
            content |= {"type": "uploaded_audio", "duration_ms": round(asset.seconds * 1000)}
        return row(asset.id, asset.kind, asset.name, asset.created, content)

    def _made_row(self, one: Generation) -> Json:
        url, lasts = self.books.output_url(one), round(one.seconds * 1000)
        content: Json = {"type": "generated_audio", "duration_ms": lasts, "url": url}
        if one.kind == VIDEO:
            width, height = one.size
            content |= {"type": "generated_video", "width": width, "height": height}
            content |= {"download_url": url, "preview_url": url}
            content |= {"keyframe_start": None, "audio": None}
            content["generated_video_inputs"] = one.request["generated_video_inputs"]
        else:
            told = {"text_prompt": one.prompt, "voice_name": one.voice, "model_slug": one.model}
            content["generated_audio_inputs"] = told
        name = one.request.get("name") or one.prompt
        return row(one.asset_id, OUTPUTS[one.kind], name, one.at, content)

    # Generations.

    def submit(self, request: Request, arg: str) -> Reply:
        body = request.json(SCHEMAS["order"], ("body",))
        check(body, SCHEMAS[body["type"]], ("body",))
        with self.books.lock:
            wish = str(body.get("generation_id") or "").lower()
            old = None if self.books.ignore_reserved_id else self.books.generations.get(wish)
            if old and self.books.repeat_is_conflict:
                raise Refusal(409, "ALREADY_EXISTS", f"Generation {wish} already exists")
            one = old or self._draft(body)
            if not old:
                self._pay(one)
        if not old:
            self.books.start(one)
        ack = {**self._progress(one), "eta_sec": math.ceil(self.books.seconds_left(one))}
        return json_reply(200, {**one.request, **ack})

    def _draft(self, body: Json) -> Generation:
        """What is ordered, under the ids that were reserved for it, or new ones; not yet paid."""
        facts = self._video(body) if body["type"] == VIDEO else self._speech(body)
        wish = None if self.books.ignore_reserved_id else body.get("generation_id")
        for name, reserved in (("id", wish), ("asset_id", body.get("reserved_asset_id"))):
            facts[name] = (reserved or str(uuid.uuid4())).lower()
        return Generation(api=self.name, kind=body["type"], request=body, **facts)

    def _video(self, body: Json) -> Json:
        row = self._model(body, "ai_model_id", lambda row: row.get("requires_audio_input"))
        inputs = body["generated_video_inputs"]
        resolution, ratio = inputs.get("resolution") or "540p", inputs.get("aspect_ratio") or "9:16"
        if resolution not in row["resolutions"] or ratio not in row["aspect_ratios"]:
            text = f"{row['name']} does not offer {resolution} at {ratio}"
            raise Refusal(400, "INVALID_ARGUMENT", text)
        image = self._asset(body.get("start_keyframe_id"), "image")
        refs = body.get("audio_id")
        heard = [self._asset(ref, "audio") for ref in (refs if isinstance(refs, list) else [refs])]
        length = (inputs.get("duration_ms") or 0) / 1000 or None
        seconds = length or sum(one.seconds for one in heard)
        sources = (image.path or Path(), heard[0].path or Path())
        files = {"image": image.id, "audio": heard[0].id, "sources": sources}
        shape = {"resolution": resolution, "aspect_ratio": ratio, "length": length}
        told = {"model": row["slug"], "prompt": inputs["text_prompt"], "seconds": seconds}
        return {**files, **shape, **told, "cost": credit_cost(row, resolution, seconds)}

    def _speech(self, body: Json) -> Json:
        row = self._model(body, "model_id", lambda row: row["type"] == SPEECH)
        text, wish = body["text"], body["voice_id"].lower()
        check(text, {"type": "string", "maxLength": row["max_prompt_length"]}, ("body", "text"))
        voice = next((one["name"] for one in self.books.voices if one["id"] == wish), None)
        if voice is None:
            raise Refusal(404, "NOT_FOUND", f"Voice {wish} not found")
        cost = credit_cost(row, "", 0)  # whatever its length
        return {"model": row["slug"], "prompt": text, "voice": voice, "cost": cost}

    def _model(self, body: Json, id_field: str, fits: Callable[[Json], object]) -> Json:
        slug, model_id = body.get("model_slug"), body.get(id_field)
        wish, key = slug or model_id, "slug" if slug else "id"
        if not wish and body["type"] == "video":
            raise Refusal(400, "INVALID_ARGUMENT", "One of model_slug and ai_model_id is required")
        rows = (row for row in self.books.catalogue if row.get(key) == wish or not wish)
        row = next((row for row in rows if wish or fits(row)), None)
        if row is None:
            raise Refusal(404, "NOT_FOUND", f"Model {wish} not found")
        if not fits(row):
            raise Refusal(400, "INVALID_ARGUMENT", f"Model {wish} cannot do that")
        return row

    def _asset(self, ref: str | None, kind: str) -> Asset:
        if not ref:
            raise Refusal(400, "INVALID_ARGUMENT", f"This model needs an {kind} asset")
        asset = self.books.assets.get(ref.lower()) or self.books.made(self.name, ref.lower())
        if asset is None or asset.kind != kind:
            raise Refusal(404, "NOT_FOUND", f"Asset {ref} not found")
        if asset.path is None:
            raise Refusal(400, "FAILED_PRECONDITION", f"Asset {ref} has not been uploaded yet")
        return asset

    def _pay(self, one: Generation) -> None:
        if one.cost > self.books.credits:
            text = f"Insufficient credits. Required: {one.cost}. Available: {self.books.credits}"
            raise Refusal(402, "MISSING_CREDITS", text)
        self.books.order(one)
        bill = math.ceil(round(one.bill, 6))
        one.bill = bill
        self.books.credits -= bill

    def _progress(self, one: Generation) -> Json:
        state, progress = self.books.state(one), self.books.progress(one)
        row = {"id": one.id, "asset_id": one.asset_id, "status": state, "progress": progress}
        return {**row, "created_at": iso(one.at)}

    def status(self, request: Request, arg: str) -> Reply:
        with self.books.lock:
            one = self.books.find(self.name, arg)
            body = {**self._progress(one), "type": OUTPUTS[one.kind]}
            if body["status"] == "error":
                body["error"] = one.refused
            elif body["status"] == "complete":
                url = self.books.output_url(one)
                body |= {"url": url, "download_url": url}
        return json_reply(200, body)

    def generations(self, request: Request, arg: str) -> Reply:
        query = request.query
        limit = request.number("limit", 100, 0, 1000)
        offset = request.number("offset", 0, 0, 10**9)
        after = parse_time(request, "created_after", -math.inf)
        before = parse_time(request, "created_before", math.inf)
        kind, ids = query.get("type"), query.get("ids", "").lower().split(",")
        with self.books.lock:
            ones = [one for one in self.books.listed(self.name) if after <= one.at <= before]
            found = [one for one in ones if ids == [""] or one.id in ids]
            # By the name of the order or of its asset.
            found = [o for o in found if kind in (None, o.kind, OUTPUTS[o.kind])]
            rows = [self._generation_row(one) for one in found[offset : offset + limit]]
        return json_reply(200, {"page_info": {"limit": limit, "offset": offset}, "data": rows})

    def _generation_row(self, one: Generation) -> Json:
        row = {**self._progress(one), "type": OUTPUTS[one.kind], "input": one.request}
        row |= {"credit_cost": int(one.bill), "asset": None}
        del row["asset_id"]  # not in the document here, so clients cannot count on it
        if row["status"] == "complete":
            row["asset"] = self._made_row(one)
        elif row["status"] == "error":
            row["error"] = one.refused
        return row
