"""The verbs evaluate, score and overlap."""

from pathlib import Path
from typing import Annotated

from core.config import check
from core.files.out_folder import refuse_others_folder
from core.flags import FLAT, PositionalText, parse, print_json
from core.log import LOG
from core.storage.store import open_store
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
            data: where `tapir pack` wrote
            out: folder for the pictures and figures
            models: where the models lie
            config: settings
        """
        from generation.evaluation import evaluate as evaluation  # noqa: PLC0415
        from generation.text_to_image import open_studio  # noqa: PLC0415
        from parallel.mesh import own_mesh  # noqa: PLC0415

        check(config.problems())
        refuse_others_folder(out, "evaluate")
        out.mkdir(parents=True, exist_ok=True)
        studio = open_studio(models, config.precision, own_mesh())
        figures = evaluation.evaluate(studio, data, out, config)
        print_json({"caption_accuracy": figures})

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
        """FID and IS of pictures drawn for an evaluation set's captions; goes on where it stopped.

        Args:
            data: coco:DIR or cub:DIR, their public layouts; or where `tapir pack` wrote
            out: folder for the pictures, their features and scores.json; workers share it
            models: where the models lie
            inception: Inception's weights as safetensors; without them, a proxy is computed from
                CLIP's features, which no published figure can be compared with
            overlap: overlap.json of `tapir overlap RAW DATA`: a second score without those pictures
            worker: which part of the blocks this process does, i/n with i from 0; by default what
                a Slurm array, a Kubernetes indexed job, MPI or torchrun says
            config: settings
        """
        from core.workers import job_worker_of  # noqa: PLC0415
        from generation.evaluation.score_job import open_job  # noqa: PLC0415
        from generation.evaluation.score_rows import table  # noqa: PLC0415
        from generation.text_to_image import open_studio  # noqa: PLC0415
        from parallel.mesh import own_mesh  # noqa: PLC0415

        check(config.problems())
        refuse_others_folder(out, "score")
        member = job_worker_of(worker)
        mesh = own_mesh(member.number)
        job = open_job(data, models, inception, overlap, config, out, mesh.world.device)
        scores = job.run(lambda: open_studio(models, config.precision, mesh), member)
        if scores is not None:
            LOG.info("%s", table(scores))
        print_json(scores or {"finished": False})

    parse(run, arguments, "score")


def overlap(arguments: list[str]) -> None:
    """`tapir overlap RAW EVAL`."""

    def run(
        raw: PositionalText,
        evaluation: PositionalText,
        dest: str = "",
        clip: Path = Path("runs/clip"),
        out: Path = Path("runs/overlap"),
        config: Annotated[OverlapConfig, FLAT] = OverlapConfig(),  # noqa: B008
    ) -> None:
        """Find pairs whose picture an evaluation set has, too; with --dest, write the others there.

        Args:
            raw: where `tapir pack` wrote
            evaluation: the evaluation set: coco:DIR, cub:DIR or where `tapir pack` wrote
            dest: s3://bucket/prefix or a folder for the pairs below the threshold; without it, only
                examples at rising likeness are written, to choose the threshold by
            clip: run folder of a finished CLIP
            out: folder for overlap.json and the examples
            config: settings
        """
        from data_pipeline.evaluation_sets import open_evaluation  # noqa: PLC0415
        from data_pipeline.formats.manifest import SPLITS  # noqa: PLC0415
        from generation.evaluation.overlap import remove_overlap, write_likeness  # noqa: PLC0415
        from parallel.mesh import own_mesh  # noqa: PLC0415
        from training.export.weights import build_model, open_model  # noqa: PLC0415

        check(config.problems())
        refuse_others_folder(out, "overlap")
        ranker = open_model(clip, "clip")
        theirs = open_evaluation(evaluation, SPLITS)
        place = open_store(dest) if dest else None
        model = build_model(ranker).to(own_mesh().world.device)
        found = remove_overlap(open_store(raw), theirs, place, model, ranker.digest, config)
        print_json(write_likeness(found, out))

    parse(run, arguments, "overlap")
