"""Count the requests that ranks send to torch's TCPStore, on their way to it."""

import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

HOST = "127.0.0.1"
_CHUNK = 65_536
_PAUSE = 0.05
"""Seconds between two looks for the store, and for the end."""
_REQUESTS = (
    *(("validate", "4"), ("set", "ss"), ("compare_set", "sss"), ("get", "s"), ("add", "s8")),
    *(("check", "*s"), ("wait", "*s"), ("num_keys", ""), ("delete", "s"), ("append", "ss")),
    *(("multi_get", "*s"), ("multi_set", "*ss"), ("cancel_wait", ""), ("ping", "4")),
)
"""Name and fields by number: 4 and 8 are bytes, s is a string with its length, * repeats the rest.

Source: QueryType of torch/csrc/distributed/c10d/TCPStoreBackend.hpp, torch 2.13.
"""


class Unknown(Exception):
    """A client sent something that is no request of the tested TCPStore."""


@dataclass
class Requests:
    """Cuts what one client sends into requests."""

    left: bytes = b""
    """Bytes of an unfinished request."""

    def feed(self, data: bytes) -> Iterator[str]:
        """The names of the requests that are complete with these bytes.

        Raises: Unknown for a number that no request has.
        """
        self.left += data
        while self.left:
            if self.left[0] >= len(_REQUESTS):
                raise Unknown(f"request number {self.left[0]}")
            name, fields = _REQUESTS[self.left[0]]
            end = _end(self.left, 1, fields)
            if end is None:
                return
            self.left = self.left[end:]
            yield name


def _end(data: bytes, at: int, fields: str) -> int | None:
    """Offset after these fields; None if they are not complete."""
    if fields.startswith("*"):
        if at + 8 > len(data):
            return None
        (count,) = struct.unpack_from("<Q", data, at)
        fields, at = fields[1:] * count, at + 8
    for kind in fields:
        if kind == "s":
            if at + 8 > len(data):
                return None
            at += 8 + struct.unpack_from("<Q", data, at)[0]
        else:
            at += int(kind)
        if at > len(data):
            return None
    return at


@dataclass(eq=False)
class _Link:
    """Both sockets of one client."""

    client: socket.socket
    store: socket.socket
    counts: Counter[str]
    requests: Requests = field(default_factory=Requests)


class StoreProxy:
    """Context manager of a port of this machine that leads to the store at another one.

    The store may end and begin anew, as rank 0 does; clients that come between wait.
    """

    def __init__(self, store_port: int) -> None:
        self.stores: list[list[Counter[str]]] = []
        """Requests by name, of each client of each store in turn; valid after the context."""
        self.failure = ""
        """What could not be read; empty if all could."""
        self.store_port, self._ending = store_port, threading.Event()
        self._listener = socket.socket()
        self._listener.bind((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="store proxy", daemon=True)

    @property
    def counts(self) -> Counter[str]:
        """Requests by name, of all clients."""
        return sum((counts for store in self.stores for counts in store), Counter[str]())

    def __enter__(self) -> "StoreProxy":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            while not self._ending.wait(_PAUSE):  # nobody connects before the store is there
                if self._answers():
                    self._listener.listen(4096)
                    self._serve_store(selector)

    def _answers(self) -> bool:
        try:
            socket.create_connection((HOST, self.store_port)).close()
        except OSError:
            return False
        return True

    def _serve_store(self, selector: selectors.BaseSelector) -> None:
        """Relay until the store has ended."""
        self.stores.append([])
        selector.register(self._listener, selectors.EVENT_READ)
        up = True
        while up and not self._ending.is_set():
            for key, _ in selector.select(_PAUSE):
                up = self._handle(selector, key) and up
        selector.unregister(self._listener)
        for key in list(selector.get_map().values()):
            selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]

    def _handle(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> bool:
        """Serve one socket; False if the store has ended."""
        link = key.data
        if link is None:
            return self._accept(selector)
        if link.client.fileno() < 0:
            return True  # the other end closed it in this round
        from_client = key.fileobj is link.client
        try:
            self._relay(link, from_client)
        except (OSError, Unknown) as error:
            if isinstance(error, Unknown):
                self.failure = str(error)
            for end in (link.client, link.store):
                selector.unregister(end)
                end.close()
            return from_client or self._answers()
        return True

    def _accept(self, selector: selectors.BaseSelector) -> bool:
        client, _ = self._listener.accept()
        try:
            link = _Link(client, socket.create_connection((HOST, self.store_port)), Counter())
        except OSError:
            client.close()
            return False
        self.stores[-1].append(link.counts)
        for end in (link.client, link.store):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(end, selectors.EVENT_READ, link)
        return True

    def _relay(self, link: _Link, from_client: bool) -> None:
        source, target = (link.client, link.store) if from_client else (link.store, link.client)
        data = source.recv(_CHUNK)
        if not data:
            raise ConnectionError("closed")
        if from_client:
            link.counts.update(link.requests.feed(data))
        target.sendall(data)
