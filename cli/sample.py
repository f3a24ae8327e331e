"""The verbs demo, sample, report and serve."""

from pathlib import Path
from typing import Annotated

from cluster.chain import CHAIN
from core.flags import FLAT, PositionalText, parse
from core.log import LOG
from generation.config import (
    DemoConfig,
    SampleRun,
)
from serving.config import ServeConfig


def demo(arguments: list[str]) -> None:
    """`tapir demo`."""

    def run(config: Annotated[DemoConfig, FLAT] = DemoConfig()) -> None:  # noqa: B008
        """Run all stages on this machine, from pairs to ranked pictures; ends with report.html.

        The same command resumes an interrupted demo.

        Args:
            config: settings
        """
        from workflow.demo import run_demo  # noqa: PLC0415 - keeps --help fast

        LOG.info("report: %s", run_demo(config))

    parse(run, arguments, "demo")


def sample(arguments: list[str]) -> None:
    """`tapir sample CAPTION ...`."""

    def run(config: Annotated[SampleRun, FLAT]) -> None:
        """Draw candidates for captions, rank them by CLIP and write a PNG grid with a row each.

        Args:
            config: settings
        """
        from generation.sample import sample as draw_and_rank  # noqa: PLC0415

        draw_and_rank(config)

    parse(run, arguments, "sample")


def report(arguments: list[str]) -> None:
    """`tapir report DIR`."""

    def run(folder: PositionalText = "runs/demo") -> None:
        """Write report.html of a finished demo or submitted run, and leaderboard.md of its suites.

        Args:
            folder: the --out of `tapir demo`, the `out` of a run file, or a folder in which
                `tapir evaluate --suite` wrote
        """
        from workflow.report import write_report  # noqa: PLC0415
        from workflow.summary import summarise_chain  # noqa: PLC0415

        if (Path(folder) / CHAIN).exists():
            summarise_chain(Path(folder))
        LOG.info("report: %s", write_report(Path(folder)))

    parse(run, arguments, "report")


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
