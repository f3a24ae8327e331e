"""The images API that tools know: POST /v1/images/generations and /v1/images/edits, and the models.

Fields of our own: seed, guidance, temperature, top_k, top_p, and codes (answer the image tokens).
With `stream`, pictures come as server-sent events: image_generation.partial_image and
image_generation.completed (image_edit.* of edits), as OpenAI's API names them.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser

from serving.events import EventStream, error_event, event
from serving.pictures import enlarged
from serving.ranks.group import Drawn, JobError, RankGroup
from serving.requests import ImageRequest, bad_request, parse_request, side_of
from serving.service import Service
from serving.uploads import ImagePrompt

_FILES = ("image", "image[]", "mask")
_MOST_FIELDS, _MOST_FIELD_BYTES = 64, 2**16
_GONE = 499
"""Status in the metrics of a client that left."""


def images_api(service: Service) -> APIRouter:
    """Routes of the images API."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, x) for x in service.groups.values()]}

    @router.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return _model(service, service.group(name))

    @router.post("/images/generations")
    async def generate(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise JobError(415, "send the request as application/json", "unsupported_media_type")
        try:
            fields = await request.json()
        except (ValueError, RecursionError) as error:
            raise bad_request("the body is not JSON") from error
        return await _answer(service, request, parse_request(fields))

    @router.post("/images/edits")
    async def edit(request: Request) -> Response:
        fields, files = await _form(request, service)
        if "image" not in files:
            raise bad_request("image: send the picture to edit as a file")
        return await _answer(service, request, parse_request(fields), files)

    return router


async def _answer(
    service: Service,
    http: Request,
    asked: ImageRequest,
    files: dict[str, bytes] | None = None,
) -> Response:
    group = service.group(asked.model)
    request, facts = service.checked(asked, group), service.facts(group)
    prompt = None
    if files is not None:
        prompt = await service.uploads.prompt(files["image"], files.get("mask"), facts)
    answer = _Answer(service, group, request, prompt, str(http.base_url))
    if request.stream:
        return EventStream(answer.events())
    drawing = asyncio.ensure_future(answer.whole())
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(await drawing) if drawing.done() else Response(status_code=_GONE)
    finally:
        for task in (drawing, leaving):
            task.cancel()


class _Answer:
    """One request's pictures as the API words them."""

    def __init__(
        self,
        service: Service,
        group: RankGroup,
        request: ImageRequest,
        prompt: ImagePrompt | None,
        address: str,
    ) -> None:
        """`address`: of this server as the client wrote it, with a slash at its end."""
        self._service, self._group, self._request, self._prompt = service, group, request, prompt
        self._address = address
        facts = service.facts(group)
        self._facts = facts
        self._side = side_of(request.size, facts.pixels)
        self._kind = "image_generation" if prompt is None else "image_edit"

    async def whole(self) -> dict[str, Any]:
        """The body of an answer, best picture first."""
        drawn = [x async for x in self._drawn() if not x.row]
        if self._facts.ranker:
            drawn.sort(key=lambda x: (-x.score, x.candidate))
        else:
            drawn.sort(key=lambda x: x.candidate)
        data = [await self._picture(each) for each in drawn]
        return {**self._head(drawn[0]), "data": data}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: rows as they are drawn, then the pictures."""
        try:
            async with aclosing(self._drawn()) as pictures:
                async for drawn in pictures:
                    yield await self._event(drawn)
        except JobError as error:
            yield error_event(error)

    async def _event(self, drawn: Drawn) -> bytes:
        kind = f"{self._kind}.{'partial_image' if drawn.row else 'completed'}"
        body = {"type": kind, **self._head(drawn), **await self._picture(drawn)}
        if drawn.row:
            body |= {"partial_image_index": drawn.row - 1, "rows": drawn.row}
        return event(body["type"], body)

    def _drawn(self) -> AsyncGenerator[Drawn, None]:
        return self._service.draw(self._group, self._request, self._prompt)

    def _head(self, drawn: Drawn) -> dict[str, Any]:
        return {
            "created": int(time.time()),
            "model": self._group.name,
            "seed": self._request.seed,
            "output_format": "png",
            "size": f"{self._side}x{self._side}",
            "warnings": drawn.warnings,
        }

    async def _picture(self, drawn: Drawn) -> dict[str, Any]:
        png = drawn.png
        if self._side != self._facts.pixels:
            png = await asyncio.to_thread(enlarged, png, self._side)
        body: dict[str, Any] = {"candidate": drawn.candidate}
        if self._request.stream or self._request.response_format == "b64_json":
            body["b64_json"] = base64.b64encode(png).decode()
        else:
            body["url"] = f"{self._address}pictures/{self._service.pictures.add(png)}.png"
        if self._facts.ranker and not drawn.row:
            body["score"] = drawn.score
        if self._request.codes:
            body["codes"] = drawn.codes
        return body


async def _form(request: Request, service: Service) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fields and files of a multipart body. Raises: JobError."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise JobError(415, "send the edit as multipart/form-data", "unsupported_media_type")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # some codecs take quadratic time
        raise JobError(415, "send the edit in UTF-8", "unsupported_media_type")
    MultiPartParser.spool_max_size = int(service.limits.upload_mb * 1e6)  # in memory, not on disk
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(
            max_files=len(_FILES), max_fields=_MOST_FIELDS, max_part_size=_MOST_FIELD_BYTES
        ) as form:
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields[name] = value
                elif name in _FILES and name.removesuffix("[]") not in files:
                    files[name.removesuffix("[]")] = await value.read()
                else:
                    raise bad_request(f"{name[:80]}: send one file as image and one as mask")
    except (ValueError, KeyError, UnicodeError) as error:
        raise bad_request("the form cannot be read") from error
    return fields, files


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _model(service: Service, group: RankGroup) -> dict[str, Any]:
    facts = group.facts
    more = {} if facts is None else {
        "pixels": facts.pixels,
        "rows": facts.rows,
        "columns": facts.columns,
        "guidance": facts.guidance,
        "ranked": bool(facts.ranker),
    }  # fmt: skip
    return {
        "id": group.name,
        "object": "model",
        "created": service.started,
        "owned_by": "tapir",
        "state": group.state,
        "most_candidates": service.limits.most_candidates,
        **more,
    }
