"""`tapir serve`: the ranks, the socket and the HTTP server, from start to clean shutdown."""

import asyncio
import socket
from collections.abc import Mapping

import uvicorn

from core.config import check
from core.log import LOG
from generation.config import ModelPaths
from serving.app import make_app
from serving.config import ServeConfig, token_of
from serving.listening import StoppableServer, address_of, listening
from serving.models import served_models
from serving.ranks.group import RankGroup

_LOOK = 0.1
_GRACE = 20
"""Seconds for running requests after a stop was asked for."""
_CONNECTIONS = 1024
"""Open connections; further ones are answered 503."""


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; running requests are finished first.

    Raises: ConfigError with every problem of the settings and of the models' folders; InputError
    without models or a token that is needed; the error of a model that cannot be started at all.
    """
    check(config.problems())
    token = token_of(config.host, config.token_file)
    models = served_models(config)
    with listening(config.host, config.port) as listener:
        asyncio.run(_serve(config, models, token, listener))


async def _serve(
    config: ServeConfig,
    models: Mapping[str, ModelPaths],
    token: str | None,
    listener: socket.socket,
) -> None:
    groups = {
        name: RankGroup(config, name, paths, number)
        for number, (name, paths) in enumerate(models.items())
    }
    server = StoppableServer(
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
        _tell(config, listener, token, list(groups))
        watching = asyncio.create_task(_watch(list(groups.values()), server))
        await server.serve([listener])
        watching.cancel()
    finally:
        await asyncio.gather(*(group.stop() for group in groups.values()))
    for group in groups.values():
        if group.error is not None:
            raise group.error
    LOG.info("stopped; all ranks have ended")


async def _watch(groups: list[RankGroup], server: StoppableServer) -> None:
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


def _tell(
    config: ServeConfig, listener: socket.socket, token: str | None, names: list[str]
) -> None:
    address = address_of(config.host, listener)
    LOG.info("page: %s/", address)
    LOG.info(
        "images API: %s/v1 (%s); models: %s",
        address,
        "no API key is needed" if token is None else "the token is the API key",
        ", ".join(names),
    )
