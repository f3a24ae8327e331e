"""Object stores with nonconforming answers: the result is right or the cause is named soon."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from botocore.exceptions import ClientError

from core.errors import AbsentError, StoreError, StoreInputError
from core.storage.s3 import S3Store
from core.storage.s3_answers import is_page
from tests.odd_store import Answer, Bend, OddServer, error, odd_store

pytestmark = pytest.mark.seconds

Open = Callable[[Bend], tuple[S3Store, OddServer]]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a bucket of a store whose answers `bend` changes."""
    contexts = []
    names = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "AWS_PROFILE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")

    def make(bend: Bend) -> tuple[S3Store, OddServer]:
        contexts.append(odd_store(bend))
        server = contexts[-1].__enter__()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        return S3Store("b", "p", attempts=1, patience=20), server

    yield make
    for context in contexts:
        context.__exit__(None, None, None)


def first(times: int, odd: Callable[[BaseHTTPRequestHandler], Answer | None]) -> Bend:
    """Gives `odd`'s answer to the first `times` requests that it matches; to all if negative."""
    left = [times]

    def bend(request: BaseHTTPRequestHandler, right: Answer) -> Answer:
        answer = odd(request) if left[0] else None
        left[0] -= answer is not None
        return answer or right

    return bend


def on(method: str, answer: Answer, header: str = "") -> Callable[..., Answer | None]:
    """Answers requests with this method, and with this header if one is given."""

    def odd(request: BaseHTTPRequestHandler) -> Answer | None:
        told = not header or any(name.lower().startswith(header) for name in request.headers)
        return answer if request.command == method and told else None

    return odd


@pytest.mark.parametrize("answer", [error(409, "ConditionalRequestConflict"), Answer(409)])
def test_a_conflict_is_tried_again_at_once(opened: Open, answer: Answer) -> None:
    store, server = opened(first(3, on("PUT", answer, "if-none-match")))
    assert store.put("lease", b"mine", if_absent=True)
    assert len(server.asked) == 4
    assert not store.put("lease", b"other", if_absent=True)
    assert server.objects == {"b/p/lease": b"mine"}


def test_a_conflict_for_ever_ends(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.storage.s3_retry._CONFLICTS", 3)
    store, server = opened(first(-1, on("PUT", error(409, "OperationAborted"))))
    with pytest.raises(StoreError, match="another writer was at it at each try") as raised:
        store.put("lease", b"mine", if_absent=True)
    assert raised.value.exit_code == 1 and len(server.asked) == 4


@pytest.mark.parametrize(
    "answer",
    [error(501, "NotImplemented"), Answer(501), Answer(405), error(400, "InvalidArgument")],
)
def test_a_store_without_conditional_writes_is_named_at_once(opened: Open, answer: Answer) -> None:
    store, server = opened(first(-1, on("PUT", answer, "if-none-match")))
    store.put("x", b"1")
    with pytest.raises(StoreInputError, match="does not implement conditional writes"):
        store.put("lease", b"mine", if_absent=True)
    assert len(server.asked) <= 3, "the object, the condition, and the same without checksums"


@pytest.mark.parametrize("answer", [error(501, "NotImplemented"), Answer(400), Answer(411)])
@pytest.mark.parametrize("header", ["x-amz-checksum-", "x-amz-sdk-checksum"])
def test_a_store_without_checksums_gets_none(
    opened: Open, answer: Answer, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, server = opened(first(-1, on("PUT", answer, header)))
    store.put_parts("whole", [b"12", memoryview(b"345")])
    assert store.put("lease", b"mine", if_absent=True)
    assert server.objects == {"b/p/whole": b"12345", "b/p/lease": b"mine"}
    assert len(server.asked) == 3, "it is asked without checksums from then on"


def test_a_store_without_checksums_of_answers_is_not_asked_for_them(opened: Open) -> None:
    store, _ = opened(first(-1, on("GET", error(501, "NotImplemented"), "x-amz-checksum-mode")))
    store.put("x", b"123")
    assert store.get("x") == b"123"


REFUSED = [
    (Answer(400), "400.*check AWS_DEFAULT_REGION", 1),
    (Answer(400, b"<html><p>no XML"), "400", 1),
    (error(400, "ExpiredToken"), "have expired", 2),
    (error(403, "RequestTimeTooSkewed"), "this machine's clock", 2),
    (Answer(401), "access denied", 2),
    (Answer(403), "access denied", 2),
    (Answer(405), r"does not implement PutObject \(405", 2),
    (Answer(411), "does not implement PutObject", 2),
    (Answer(412), "412", 1),
    (error(413, "EntityTooLarge"), "EntityTooLarge", 1),
    (Answer(417), "does not implement PutObject", 2),
    (Answer(418, b"{}", {"Content-Type": "application/json"}), "418", 1),
    (Answer(307), "elsewhere", 2),
    (Answer(501, b"<!DOCTYPE HTML><p>Unsupported method"), "does not implement PutObject", 2),
    (error(507, "XMinioStorageFull"), "is full", 1),
]


def test_a_refused_write_says_why_at_once(opened: Open) -> None:
    told = [Answer()]
    store, server = opened(lambda request, right: told[0] if request.command == "PUT" else right)
    for answer, text, code in REFUSED:
        told[0] = answer
        server.asked.clear()
        with pytest.raises(StoreError, match=text) as raised:
            store.put("x", b"1")
        assert raised.value.exit_code == code, text
        assert len(server.asked) <= 2, "once more without checksums"


@pytest.mark.parametrize(
    "answer", [error(503, "SlowDown"), error(400, "RequestTimeout"), Answer(429), Answer(408)]
)
def test_transient_errors_are_waited_out(opened: Open, answer: Answer) -> None:
    store, server = opened(first(3, on("PUT", answer)))
    store.put("x", b"1")
    assert server.objects == {"b/p/x": b"1"}


def bent(change: Callable[[BaseHTTPRequestHandler, Answer], None], method: str = "GET") -> Bend:
    """Changes the correct answer to a method."""

    def bend(request: BaseHTTPRequestHandler, right: Answer) -> Answer:
        if request.command == method:
            change(request, right)
        return right

    return bend


RANGES = [(0, None), (3, 4), (3, None), (8, 50), (0, 10), (10, 3)]


def test_bodies_without_length_ranges_or_place(opened: Open) -> None:
    body, odd = b"0123456789", [""]

    def change(request: BaseHTTPRequestHandler, right: Answer) -> None:
        if odd[0] == "no length":
            right.headers["Content-Length"] = None
            return
        right.headers.pop("Content-Range", None)
        if odd[0] == "no ranges" and right.status in (206, 416):
            right.status, right.body = 200, body

    store, _ = opened(bent(change))
    store.put("x", body)
    for odd[0] in ("no length", "no ranges", "no place"):
        for start, length in RANGES:
            end = None if length is None else start + length
            assert store.get("x", start, length) == body[start:end], (odd[0], start, length)


def test_a_body_that_is_cut_without_a_length_goes_on(opened: Open) -> None:
    cuts = [3]

    def change(request: BaseHTTPRequestHandler, right: Answer) -> None:
        right.headers["Content-Length"] = None
        if cuts[0] and right.body:
            cuts[0] -= 1
            right.body = right.body[:2]

    store, _ = opened(bent(change))
    store.put("x", b"0123456789")
    assert store.get("x", 1, 8) == b"12345678"


def test_another_range_than_asked_is_an_error(opened: Open) -> None:
    def change(request: BaseHTTPRequestHandler, right: Answer) -> None:
        right.headers["Content-Range"] = "bytes 0-3/10"

    store, _ = opened(bent(change))
    store.put("x", b"0123456789")
    with pytest.raises(StoreError, match="asked from byte 3, the store answers from 0"):
        store.get("x", 3, 4)


def test_etags_are_opaque_and_may_be_missing(opened: Open) -> None:
    tags: list[str | None] = ['"wrong-2"', None]

    def change(request: BaseHTTPRequestHandler, right: Answer) -> None:
        right.headers["ETag"] = tags[0]

    store, _ = opened(bent(change, "HEAD"))
    store.put("x", b"1")
    assert store.head("x") == (1, "wrong-2")
    tags.pop(0)
    assert store.head("x") == (1, "")


def test_malformed_headers_are_named(opened: Open) -> None:
    headers: dict[str, str | None] = {"Last-Modified": "yesterday"}
    store, _ = opened(bent(lambda _, right: right.headers.update(headers), "HEAD"))
    store.put("x", b"1")
    with pytest.raises(StoreError, match="no S3 store answers so"):
        store.exists("x")


def listing(rows: str, truncated: str = "false") -> bytes:
    text = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{rows}</ListBucketResult>"
    return f"<?xml version='1.0'?>{text}".encode()


LISTS: list[tuple[bytes, str | None]] = [
    (listing("<Contents><Key>p/b</Key></Contents><Contents><Key>p/a</Key></Contents>"), "a b"),
    (listing("<Contents><Key>p/</Key></Contents><Contents><Key>p/a/</Key></Contents>"), ""),
    (listing("<Contents><Key>p/a</Key></Contents><Contents><Key>q/a</Key></Contents>"), "a"),
    (listing("<Contents><Key>p/a</Key></Contents>", "true"), None),
    (listing("<Contents><Size>1</Size></Contents>"), None),
    (b"<html><body>Welcome to nginx!<br></body></html>", None),
    (b"not even that", None),
    (b"{}", None),
]


def test_lists_are_whole_sorted_and_of_the_prefix(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nonconforming lists: unsorted, folder markers, other prefixes, truncated, an HTML page."""
    monkeypatch.setattr("core.storage.s3_retry.FIRST_PATIENCE", 0.1)
    told = [b""]

    def bend(request: BaseHTTPRequestHandler, right: Answer) -> Answer:
        return Answer(200, told[0]) if "list-type" in request.path else right

    store, _ = opened(bend)
    for told[0], names in LISTS:
        if names is not None:
            assert store.names() == names.split()
            continue
        with pytest.raises(StoreError):
            store.names()


def test_deleting_what_is_not_there_is_no_error(opened: Open) -> None:
    for answer in (error(404, "NoSuchKey"), Answer(404)):
        store, _ = opened(first(-1, on("DELETE", answer)))
        store.delete("x")
        with pytest.raises(AbsentError):
            store.get("x")


def test_an_html_error_page_is_told_from_a_bare_error() -> None:
    """An HTML page is named after half a minute; a bare error is waited out as an outage."""
    for length, page in (("0", False), ("45", True), (None, True)):
        headers = {} if length is None else {"content-length": length}
        answer: Any = {"Error": {"Code": "500"}, "ResponseMetadata": {"HTTPHeaders": headers}}
        assert is_page(ClientError(answer, "GetObject")) is page
    named: Any = {"Error": {"Code": "InternalError"}}
    assert not is_page(ClientError(named, "GetObject"))
