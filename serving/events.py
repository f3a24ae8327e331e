"""Server-sent events, and error bodies of the images API."""

import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse

from serving.ranks.group import JobError
from serving.security import Receive, Scope, Send


class EventStream(StreamingResponse):
    """Events until their generator ends, which is closed when the client has left."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def event(kind: str, body: dict[str, Any]) -> bytes:
    """One event."""
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()


def error_event(error: JobError) -> bytes:
    """The event that ends a stream without all of its pictures."""
    return event("error", {"type": "error", **error_body(error)})


def error_body(error: JobError) -> dict[str, Any]:
    """A body as clients of the images API read it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}
