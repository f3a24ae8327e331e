"""The verb evaluate with --suite."""

from pathlib import Path
from typing import Annotated

from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from generation.config import ModelPaths, SampleConfig
from generation.evaluation.suites.record import FILE, Recorded, read_recorded
from generation.evaluation.suites.registry import SUITES, suite_called

SUITE = "--suite"


def suite_flag(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --suite, None if it is not given, and the other arguments."""
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--":
            break
        if name == SUITE and (equals or at + 1 < len(arguments)):
            end = at + 1 if equals else at + 2
            return value if equals else arguments[at + 1], arguments[:at] + arguments[end:]
    return None, arguments


def evaluate_suite(given: str, arguments: list[str]) -> None:
    """`tapir evaluate [DATA] --suite NAME`, or a suite.json to repeat."""
    recorded = None if given in SUITES else _recorded(given)
    name = recorded.name if recorded else given
    settings = recorded.settings if recorded else suite_called(name).settings()

    def run(
        data: PositionalText = "",
        out: Path = Path("runs/suites") / name,
        models: Annotated[ModelPaths, FLAT] = ModelPaths(),  # noqa: B008
        worker: str = "",
        config: Annotated[SampleConfig, FLAT] = settings,
    ) -> None:
        """Measure one suite, and write its prompts, keys, models, settings and figures to OUT.

        Args:
            data: coco:DIR or cub:DIR, their public layouts, or where `tapir pack` wrote; not needed
                by geneval-style, nor to repeat shapes, clipscore and panels from a suite.json
            out: folder for suite.json
            models: run folders of the models
            worker: this process's part of coco, cub or pairs, i/n with i from 0; by default set by
                a Slurm array, a Kubernetes indexed job, MPI or torchrun
            config: settings
        """
        from generation.evaluation.suites.run import run_suite  # noqa: PLC0415 - keeps --help fast

        body = run_suite(name, data, models, config, out, worker, recorded)
        figures = ", ".join(f"{row['name']} {row['value']:.4g}" for row in body["headline"])
        LOG.info("%s: %s", out / FILE, figures)
        shown = ("suite", "models", "facts", "headline", "results")
        print_json({"file": str(out / FILE), **{key: body[key] for key in shown}})

    run.__annotations__["config"] = Annotated[type(settings), FLAT]
    parse(run, arguments, f"evaluate --suite {given}")


def suites_help() -> str:
    """A line for each suite."""
    return "\n".join(f"  {name:<14} {suite.text}" for name, suite in SUITES.items())


def _recorded(given: str) -> Recorded:
    if "/" not in given and not given.endswith(".json") and not Path(given).exists():
        suite_called(given)
    return read_recorded(Path(given))
