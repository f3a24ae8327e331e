"""`tapir serve`: the ranks, the socket and the HTTP server, from start to clean shutdown."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn

from core.config import check
from core.errors import ConfigError
from core.log import LOG
from serving.app import make_app
from serving.config import ServeConfig, token_of
from serving.ranks.group import RankGroup

_BACKLOG, _LOOK = 1024, 0.1
_GRACE = 20
"""Seconds for running requests after a stop was asked for."""
_CONNECTIONS = 1024
"""Open connections; further ones are answered 503."""


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; running requests are finished first.

    Raises: ConfigError with every problem of the settings; InputError without a token that is
    needed; the error of a model that cannot be started at all.
    """
    check(config.problems())
    token = token_of(config.host, config.token_file)
    with _listening(config) as listener:
        asyncio.run(_serve(config, token, listener))


async def _serve(config: ServeConfig, token: str | None, listener: socket.socket) -> None:
    groups = {
        name: RankGroup(config, name, models, number)
        for number, (name, models) in enumerate(config.paths().items())
    }
    server = _Server(
        uvicorn.Config(
            make_app(config, groups, token),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE,
        )
    )
    try:
        for group in groups.values():
            await group.start()
        _tell(config, listener, token)
        watching = asyncio.create_task(_watch(list(groups.values()), server))
        await server.serve([listener])
        watching.cancel()
    finally:
        await asyncio.gather(*(group.stop() for group in groups.values()))
    for group in groups.values():
        if group.error is not None:
            raise group.error
    LOG.info("stopped; all ranks have ended")


async def _watch(groups: list[RankGroup], server: "_Server") -> None:
    """Log states, and end the server if a model cannot be started at all."""
    states = {group.name: group.state for group in groups}
    while not server.should_exit:
        for group in groups:
            if group.state != states[group.name]:
                states[group.name] = group.state
                LOG.info("%s: %s", group.name, group.state)
            if group.state == "failed" and group.facts is None:
                server.should_exit = True
        await asyncio.sleep(_LOOK)


class _Server(uvicorn.Server):
    """Ends on SIGINT and SIGTERM with exit code 0, as a service that was asked to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A listening socket. Raises: ConfigError if the address cannot be taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another "
            "--port (0 = a free one) or --host"
        ) from error
    with listener:
        yield listener


def _tell(config: ServeConfig, listener: socket.socket, token: str | None) -> None:
    name = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{name}:{listener.getsockname()[1]}"
    LOG.info("page: %s/", address)
    LOG.info(
        "images API: %s/v1 (%s); models: %s",
        address,
        "no API key is needed" if token is None else "the token is the API key",
        ", ".join(config.paths()),
    )
