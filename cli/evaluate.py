"""The verbs evaluate, score and overlap."""

from pathlib import Path
from typing import Annotated

from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from generation.config import (
    EvaluateConfig,
    ModelPaths,
    OverlapConfig,
    ScoreConfig,
)


def evaluate(arguments: list[str]) -> None:
    """`tapir evaluate DATA`."""

    def run(
        data: PositionalText,
        out: Path = Path("runs/samples"),
        models: Annotated[ModelPaths, FLAT] = ModelPaths(),  # noqa: B008
        config: Annotated[EvaluateConfig, FLAT] = EvaluateConfig(),  # noqa: B008
    ) -> None:
        """Draw pictures for held-out captions; on shapes, check all attributes for best-of-N.

        Args:
            data: the data set that `tapir pack` wrote
            out: folder for the pictures and figures
            models: run folders of the models
            config: settings
        """
        from generation.evaluation.evaluate import evaluate_models  # noqa: PLC0415

        print_json({"caption_accuracy": evaluate_models(models, data, out, config)})

    parse(run, arguments, "evaluate")


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
        """Compute FID and IS of pictures drawn for an evaluation set; resumes by itself.

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
        from generation.evaluation.open_score import score_models  # noqa: PLC0415
        from generation.evaluation.score_rows import table  # noqa: PLC0415

        scores = score_models(models, data, inception, overlap, config, out, worker)
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
