"""Who may call a server: its Host, Origin and token, and how much a request may send.

Host is checked against DNS rebinding: a foreign page whose name resolves to this machine. Origin is
checked against foreign pages that send requests to it. Imports no torch.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

from serving.config import is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
RESPONSE_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
"""Of every answer: pages run our own scripts alone, nobody frames them, links tell no address."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a request is not served."""

    status: int
    message: str
    code: str


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a request must show to be served."""

    host: str
    """The address that the server listens on."""
    hosts: tuple[str, ...] = ()
    """Names of the server beside localhost."""
    token: str | None = None
    """Clients send it as `Authorization: Bearer TOKEN`; None: there is none."""

    def refusal(self, headers: Headers, needs_token: bool = True) -> Refusal | None:
        """None if the request may be served."""
        by_name: dict[bytes, list[str]] = {}
        for name, value in headers:
            by_name.setdefault(name.lower(), []).append(value.decode("latin-1"))
        hosts, origins = by_name.get(b"host", []), by_name.get(b"origin", [])
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return Refusal(
                status=421,
                message="this server does not have the name in the Host header; start it with "
                "--hosts NAME to give it that name",
                code="wrong_host",
            )
        foreign = [x for x in origins if not _same_origin(x, hosts[0])]
        crossing = "cross-site" in by_name.get(b"sec-fetch-site", [])
        crossing &= by_name.get(b"sec-fetch-mode") != ["navigate"]
        if foreign or crossing or len(origins) > 1:
            return Refusal(
                status=403,
                message="a page of another origin may not call this server",
                code="wrong_origin",
            )
        if needs_token and not self.has_token(by_name.get(b"authorization", [])):
            return Refusal(
                status=401,
                message="wrong or missing token: send it as the API key (Authorization: Bearer)",
                code="invalid_api_key",
            )
        return None

    def has_token(self, values: list[str]) -> bool:
        """True if the Authorization header carries the token, or none is needed."""
        if self.token is None:
            return True
        scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
        return scheme.lower() == "bearer" and same

    def _is_own(self, host: str) -> bool:
        """A name that was given to the server, localhost, or an address: those cannot be rebound.

        A server on loopback has the addresses of loopback alone.
        """
        name = _host_name(host)
        if name is None:
            return False
        if name in {"localhost", self.host.lower(), *(x.lower() for x in self.hosts)}:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.host)


class Guard:
    """ASGI middleware: refuses requests that Access does not allow, or that send too much."""

    def __init__(
        self,
        app: App,
        *,
        access: Access,
        most_bytes: int,
        seconds: float,
        is_open: Callable[[str], bool],
        reading: float = 300.0,
    ) -> None:
        """`most_bytes`, `seconds`: of a request's body; `reading`: seconds in which a client must
        read each part of an answer; `is_open`: paths that need no token."""
        self._app, self._access, self._is_open = app, access, is_open
        self._most_bytes, self._seconds, self._reading = most_bytes, seconds, reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        respond = _with_headers(send)
        refusal = self._access.refusal(scope["headers"], not self._is_open(scope["path"]))
        refusal = refusal or await self._too_large(scope["headers"], receive)
        if refusal is not None:
            await send_refusal(respond, refusal)
            return
        body = _Body(receive, self._most_bytes, self._seconds)
        answer = _Answer(respond, body, self._reading)
        with contextlib.suppress(_BodyRefusedError, _NotReadError):
            await self._app(scope, body.receive, answer.send)
        if body.refusal is not None and not answer.started:
            await send_refusal(respond, body.refusal)

    async def _too_large(self, headers: Headers, receive: Receive) -> Refusal | None:
        """Refuse a stated length; a body that is not much larger is read, so that its sender, who
        may not look at an answer before, gets it."""
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        if not any(not x.isdigit() or int(x[:20]) > self._most_bytes for x in lengths):
            return None
        body = _Body(receive, 2 * self._most_bytes, self._seconds)
        with contextlib.suppress(_BodyRefusedError):
            while lengths[0].isdigit() and not body.whole:
                if (await body.receive())["type"] == "http.disconnect":
                    break
        return _size_refusal(self._most_bytes)


class _Body:
    """Counts the bytes of a body, and ends one that is too large or does not arrive."""

    def __init__(self, receive: Receive, most_bytes: int, seconds: float) -> None:
        self.refusal: Refusal | None = None
        self.whole = False
        self._receive, self._most_bytes, self._seconds = receive, most_bytes, seconds
        self._until = asyncio.get_running_loop().time() + seconds
        self._received = 0

    async def receive(self) -> Message:
        """The next message. Raises: _BodyRefusedError."""
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            slow = f"the request did not arrive within {self._seconds:g} s"
            self._refuse(Refusal(status=408, message=slow, code="too_slow"))
        self._received += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self._received > self._most_bytes:
            self._refuse(_size_refusal(self._most_bytes))
        return message

    def _refuse(self, refusal: Refusal) -> NoReturn:
        self.refusal = refusal
        raise _BodyRefusedError


class _Answer:
    """Passes on an answer, but not that of an application to a failure of ours."""

    def __init__(self, send: Send, body: _Body, seconds: float) -> None:
        self.started = False
        self._send, self._body, self._seconds, self._unread = send, body, seconds, False

    async def send(self, message: Message) -> None:
        """Send a part. Raises: _NotReadError if the client does not read it in time."""
        if self._unread or (self._body.refusal is not None and not self.started):
            return
        self.started = True
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self._unread = True
            raise _NotReadError from None


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Answer with the error body of the images API, and close the connection."""
    body = json.dumps(
        {
            "error": {
                "message": refusal.message,
                "type": "invalid_request_error",
                "param": None,
                "code": refusal.code,
            }
        }
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _BodyRefusedError(Exception):
    """Ends the application's reading of a body."""


class _NotReadError(Exception):
    """Ends an answer that its client does not read."""


def _size_refusal(most_bytes: int) -> Refusal:
    message = f"a request may have {most_bytes / 1e6:g} MB at most"
    return Refusal(status=413, message=message, code="too_large")


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            more = [pair for pair in RESPONSE_HEADERS if pair[0] not in given]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sending


def _host_name(host: str) -> str | None:
    """The name in a Host header, without port and brackets; None if it is malformed."""
    if any(c in host for c in "/@\\?# "):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def _same_origin(origin: str, host: str) -> bool:
    """True if an Origin header names the host and port that the request was sent to."""
    scheme, separator, place = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and place.lower() == host.lower()
