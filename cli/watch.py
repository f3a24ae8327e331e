"""The verb watch."""

from pathlib import Path
from typing import Annotated

import tyro

from core.flags import parse
from workflow.watch import watch_runs


def watch(arguments: list[str]) -> None:
    """`tapir watch RUN [RUN...]`."""

    def run(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        once: bool = False,
        interval: float = 1.0,
    ) -> None:
        """Watch runs in this terminal until all have ended, or Ctrl-C.

        Args:
            runs: run folders of dVAEs, priors or CLIPs
            once: print one frame and exit, as when standard output is not a terminal
            interval: seconds between two updates, up to 3600
        """
        watch_runs(runs, once, interval)

    parse(run, arguments, "watch")
