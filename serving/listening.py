"""The socket that a server listens on, and an HTTP server that ends with exit code 0."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from core.errors import ConfigError

_BACKLOG = 1024


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a listening socket; port 0 is a free one.

    Raises: ConfigError if the address cannot be taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port (0 = a "
            "free one) or --host"
        ) from error
    with listener:
        yield listener


def address_of(host: str, listener: socket.socket) -> str:
    """The http address of a listening socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


class StoppableServer(uvicorn.Server):
    """Ends on SIGINT and SIGTERM with exit code 0, as a service that was asked to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
