"""A proxy before a real S3 server that fails on purpose: status, reset, delay, half a body."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from urllib.parse import urlsplit

Plan = Callable[[int, str, str], str]
"""(number of the request, method, path) -> nothing, a status, "cut", "reset", "wait SECONDS"."""


_OWN = ("content-length", "transfer-encoding", "connection")


class _Server(ThreadingHTTPServer):
    """Counts the requests and asks the plan for the fault of each."""

    def __init__(self, endpoint: str, plan: Plan) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self._plan = urlsplit(endpoint), plan
        self._lock, self._count = threading.Lock(), 0

    def planned(self, method: str, path: str) -> str:
        """The fault of the next request."""
        with self._lock:
            self._count += 1
            return self._plan(self._count, method, path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _any(self) -> None:
        what = self.server.planned(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if what.isdigit():
            self._answer(int(what), {}, b"", 0)
            return
        if what == "reset":
            off = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off)
            self.close_connection = True
            return
        if what.startswith("wait"):
            sleep(float(what.split()[1]))
        target = self.server.target
        link = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
        link.request(self.command, self.path, body, dict(self.headers))
        response = link.getresponse()
        data = response.read()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in _OWN}
        size = int(response.getheader("Content-Length") or len(data))
        sent = data[: len(data) // 2] if what == "cut" else data
        self._answer(response.status, headers, sent, size)
        link.close()
        if what == "cut":
            self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str], data: bytes, size: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any


@contextmanager
def faulty_proxy(endpoint: str, plan: Plan) -> Iterator[str]:
    """Serve the endpoint on a free loopback port, with faults; yields the address."""
    server = _Server(endpoint, plan)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
