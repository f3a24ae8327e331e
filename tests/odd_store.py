"""An object store on loopback whose answers a test changes, as no real store allows."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Answer:
    """What is sent back; a header of None is left out."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str | None] = field(default_factory=dict)


Bend = Callable[[BaseHTTPRequestHandler, Answer], Answer]
"""(request, the right answer) -> what is sent."""


def error(status: int, code: str) -> Answer:
    """An error response in S3's format."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told</Message></Error>"
    return Answer(status, body.encode())


class OddServer(ThreadingHTTPServer):
    """Objects in memory."""

    daemon_threads = True

    def __init__(self, bend: Bend) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bend, self.objects, self.asked = bend, dict[str, bytes](), list[str]()
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OddServer

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _any(self) -> None:
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.asked.append(f"{self.command} {self.path}")
            answer = self.server.bend(
                self, Answer()
            )  # first, because a refused request has no effect
            if answer.status < 300:
                answer = self.server.bend(self, self._right())
        size = None if answer.headers.get("Content-Length", "") is None else len(answer.body)
        headers = {"Content-Length": str(size), **answer.headers}
        self.send_response_only(answer.status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self.close_connection = size is None

    def _right(self) -> Answer:
        """What a store answers."""
        url, objects = urlsplit(self.path), self.server.objects
        key = unquote(url.path).strip("/")
        if self.command == "PUT":
            if self.headers.get("If-None-Match") and key in objects:
                return error(412, "PreconditionFailed")
            objects[key] = self.data
            return Answer(headers={"ETag": _etag(self.data)})
        if self.command == "DELETE":
            objects.pop(key, None)
            return Answer(204)
        query = parse_qs(url.query)
        if "list-type" in query:
            return _listed(objects, key, query.get("prefix", [""])[0])
        if "/" not in key:
            return Answer()
        if key not in objects:
            return error(404, "NoSuchKey")
        return _part(objects[key], self.headers.get("Range"))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _part(body: bytes, asked: str | None) -> Answer:
    headers: dict[str, str | None] = {"ETag": _etag(body)}
    if asked is None:
        return Answer(200, body, headers)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    begin, end = int(first), min(int(last or len(body)), len(body) - 1)
    if begin >= len(body):
        return error(416, "InvalidRange")
    headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
    return Answer(206, body[begin : end + 1], headers)


def _listed(objects: dict[str, bytes], bucket: str, prefix: str) -> Answer:
    names = sorted(key.removeprefix(f"{bucket}/") for key in objects)
    rows = "".join(f"<Contents><Key>{n}</Key></Contents>" for n in names if n.startswith(prefix))
    text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
    return Answer(200, f"<?xml version='1.0'?>{text}".encode())


@contextmanager
def odd_store(bend: Bend) -> Iterator[OddServer]:
    """Serve until the context ends."""
    with OddServer(bend) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
