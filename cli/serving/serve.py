"""The verb serve."""

from typing import Annotated

from core.flags import FLAT, parse
from serving.config import ServeConfig


def serve(arguments: list[str]) -> None:
    """`tapir serve [NAME=FOLDER ...]`."""

    def run(config: Annotated[ServeConfig, FLAT] = ServeConfig()) -> None:  # noqa: B008
        """Serve models by a page and by the images API that tools know; Ctrl-C ends it.

        Args:
            config: settings
        """
        from serving.server import serve as serve_until_stopped  # noqa: PLC0415 - keeps --help fast

        serve_until_stopped(config)

    parse(run, arguments, "serve")
