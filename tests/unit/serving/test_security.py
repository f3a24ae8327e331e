"""Who may call a server, and how much a request may send."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from serving.config import is_loopback
from serving.security import RESPONSE_HEADERS, Access, Guard, Message, Receive, Scope, Send
from tests.harness import PATIENCE

TOKEN = "0123456789abcdef"


def headers(**given: str) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]


def status(access: Access, needs_token: bool = False, **given: str) -> int:
    """The status of the refusal, 200 if there is none."""
    refusal = access.refusal(headers(**{"host": "localhost:8000", **given}), needs_token)
    return 200 if refusal is None else refusal.status


@pytest.mark.parametrize(
    ("bound", "host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "localhost:8000", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "pictures.example", 200),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "192.168.1.7", 421),
        ("0.0.0.0", "192.168.1.7:8000", 200),
        ("0.0.0.0", "evil.example", 421),
        ("0.0.0.0", "pictures.example:80", 200),
        ("127.0.0.1", "", 421),
        ("127.0.0.1", "localhost/x", 421),
        ("127.0.0.1", "a@localhost", 421),
        ("127.0.0.1", "localhost:x", 421),
    ],
)
def test_only_addresses_and_given_names_are_hosts(bound: str, host: str, expected: int) -> None:
    assert status(Access(host=bound, hosts=("Pictures.example",)), host=host) == expected


def test_no_host_and_two_hosts_are_refused() -> None:
    access = Access(host="127.0.0.1")
    twice = headers(host="localhost") * 2
    assert access.refusal([], False) is not None and access.refusal(twice, False) is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "https://localhost:8000"}, 200),
        ({"origin": "http://localhost:8001"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "file://localhost:8000"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
        ({"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}, 200),
    ],
)
def test_pages_of_other_origins_are_refused(given: dict[str, str], expected: int) -> None:
    assert status(Access(host="127.0.0.1"), **given) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}0", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer ", 401),
    ],
)
def test_the_token_is_needed_where_there_is_one(value: str, expected: int) -> None:
    access = Access(host="127.0.0.1", token=TOKEN)
    assert status(access, needs_token=True, authorization=value) == expected
    assert status(access, needs_token=True) == 401
    assert status(access, needs_token=False, authorization=value) == 200
    assert status(Access(host="127.0.0.1"), needs_token=True) == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", 1), ("127.1.2.3", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0), ("x.y", 0)],
)
def test_loopback_is_this_machine_alone(host: str, expected: int) -> None:
    assert is_loopback(host) == bool(expected)


async def _fail(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 500 whatever happens, as a framework does."""
    try:
        await _echo(scope, receive, send)
    except Exception:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        raise


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def answer(
    parts: Iterable[bytes], path: str = "/closed", *, ends: bool = True, **given: str
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Status, body and headers of a guarded application's answer."""
    guard = Guard(
        _fail,
        access=Access(host="127.0.0.1", token=TOKEN),
        most_bytes=10,
        seconds=0.01 if not ends else 60,
        is_open=lambda path: path == "/open",
    )
    sent: list[Message] = []
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        if not ends:
            await asyncio.Event().wait()
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Any = {
        "type": "http",
        "path": path,
        "headers": headers(**{"host": "localhost", "authorization": f"Bearer {TOKEN}", **given}),
    }
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def test_a_body_within_the_limit_arrives() -> None:
    code, body, told = answer([b"12345", b"67890"])
    assert (code, body) == (200, b"10")
    assert all(told[name] == value for name, value in RESPONSE_HEADERS)


@pytest.mark.parametrize("length", ["11", "9" * 50, "-1", "x"])
def test_a_stated_length_beyond_the_limit_is_refused(length: str) -> None:
    assert answer([b"1"], content_length=length)[0] == 413


def test_a_body_beyond_the_limit_is_refused_while_it_arrives() -> None:
    code, body, _ = answer([b"123456", b"7890", b"1"])
    assert code == 413 and json.loads(body)["error"]["code"] == "too_large"


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    assert answer([b"1"], ends=False)[0] == 408


def test_open_paths_need_no_token() -> None:
    assert answer([], "/open", authorization="")[0] == 200
    code, _, told = answer([], authorization="")
    assert code == 401 and told[b"www-authenticate"] == b"Bearer"
    assert answer([], "/open", authorization="", host="evil.example")[0] == 421


def test_an_answer_that_is_not_read_is_ended() -> None:
    guard = Guard(
        _fail,
        access=Access(host="127.0.0.1"),
        most_bytes=10,
        seconds=60,
        reading=0.01,
        is_open=lambda path: True,
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # its buffer is full

    scope: Any = {"type": "http", "path": "/", "headers": headers(host="localhost")}
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), PATIENCE))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
