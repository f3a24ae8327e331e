"""The verbs evaluate, score and overlap."""

import json
from pathlib import Path
from typing import Annotated

from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from generation.config import (
    EvaluateConfig,
    ModelPaths,
    OverlapConfig,
    SampleConfig,
    ScoreConfig,
)
from generation.evaluation.suites.config import FidConfig
from generation.evaluation.suites.record import FILE, Recorded, read_recorded
from generation.evaluation.suites.registry import SUITES, suite_called, suite_of

SUITE = "--suite"


def evaluate(arguments: list[str]) -> None:
    """`tapir evaluate DATA`, or one suite."""
    given, others = suite_flag(arguments)
    if given is not None:
        evaluate_suite(given, others)
        return

    def run(
        data: PositionalText,
        suite: str = "",
        out: Path = Path("runs/samples"),
        models: Annotated[ModelPaths, FLAT] = ModelPaths(),  # noqa: B008
        config: Annotated[EvaluateConfig, FLAT] = EvaluateConfig(),  # noqa: B008
    ) -> None:
        """Draw pictures for held-out captions; on shapes, check all attributes for best-of-N.

        Args:
            data: the data set that `tapir pack` wrote
            suite: measure one suite instead, with flags of its own (`--suite NAME --help`): shapes,
                geneval-style, clipscore, coco, cub, pairs, best-of-n, panels; or the path of a
                suite.json, whose figures are measured again
            out: folder for the pictures and figures
            models: run folders of the models
            config: settings
        """
        from generation.evaluation.evaluate import evaluate_models  # noqa: PLC0415

        print_json({"caption_accuracy": evaluate_models(models, data, out, config)})

    parse(run, arguments, "evaluate")


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


def _recorded(given: str) -> Recorded:
    if "/" not in given and not given.endswith(".json") and not Path(given).is_file():
        suite_called(given)
    return read_recorded(Path(given))


def score(arguments: list[str]) -> None:
    """`tapir score DATA`."""

    def run(
        data: PositionalText,
        out: Path = Path("runs/scores"),
        models: Annotated[ModelPaths, FLAT] = ModelPaths(),  # noqa: B008
        inception: Path | None = None,
        overlap: Path | None = None,
        worker: str = "",
        config: Annotated[ScoreConfig, FLAT] = ScoreConfig(),  # noqa: B008
    ) -> None:
        """FID and IS of pictures drawn for an evaluation set; resumes by itself.

        The same as `tapir evaluate DATA --suite coco`, `cub` or, for a packed set, `pairs`.

        Args:
            data: coco:DIR or cub:DIR, their public layouts; or where `tapir pack` wrote
            out: folder for the pictures, their features and scores.json; workers share it
            models: run folders of the models
            inception: Inception's weights as safetensors; without them, a proxy is computed from
                CLIP's features, which is not comparable with published figures
            overlap: overlap.json of `tapir overlap RAW DATA`; adds a score without those pictures
            worker: this process's part of the job, i/n with i from 0; by default set by a Slurm
                array, a Kubernetes indexed job, MPI or torchrun
            config: settings
        """
        from generation.evaluation.score_job import SCORES  # noqa: PLC0415
        from generation.evaluation.score_rows import table  # noqa: PLC0415
        from generation.evaluation.suites.run import run_suite  # noqa: PLC0415

        settings = FidConfig(**{**vars(config), "inception": inception, "overlap": overlap})
        run_suite(suite_of(data), data, models, settings, out, worker)
        scores = json.loads((out / SCORES).read_bytes())
        LOG.info("%s", table(scores))
        print_json(scores)

    parse(run, arguments, "score")


def overlap(arguments: list[str]) -> None:
    """`tapir overlap RAW EVAL`."""

    def run(
        raw: PositionalText,
        evaluation: PositionalText,
        dest: str = "",
        clip: Path = Path("runs/clip"),
        out: Path = Path("runs/overlap"),
        worker: str = "",
        config: Annotated[OverlapConfig, FLAT] = OverlapConfig(),  # noqa: B008
    ) -> None:
        """Find pairs whose picture is also in an evaluation set; with --dest, write the others.

        Args:
            raw: the data set that `tapir pack` wrote
            evaluation: the evaluation set: coco:DIR, cub:DIR or where `tapir pack` wrote
            dest: s3://bucket/prefix or a folder for a view of RAW with the pairs below the
                threshold; without it, only examples by likeness are written, which help to choose
                the threshold
            clip: run folder of a finished CLIP
            out: folder for overlap.json and the examples; workers share it
            worker: this process's part of the job, i/n with i from 0; by default set by a Slurm
                array, a Kubernetes indexed job, MPI or torchrun
            config: settings
        """
        from generation.evaluation.overlap import find_overlap  # noqa: PLC0415

        print_json(find_overlap(raw, evaluation, dest, clip, out, config, worker))

    parse(run, arguments, "overlap")
