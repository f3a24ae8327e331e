"""The verbs demo, sample, evaluate, overlap and report."""

import os
from pathlib import Path
from typing import Annotated

import tyro

from cluster.jobs import CHAIN
from core.cli import parse, print_json
from core.errors import ConfigError
from core.files import refuse_folder, write_atomic
from core.log import LOG, progress
from core.settings import check
from core.store import open_store
from data_pipeline.captions import clean_caption
from data_pipeline.images import encode_png
from generation.config import (
    DemoConfig,
    EvaluateConfig,
    OverlapConfig,
    PromptConfig,
    SampleConfig,
)

Text = Annotated[str, tyro.conf.Positional]
_FLAT = tyro.conf.OmitArgPrefixes


def demo(arguments: list[str]) -> None:
    """`tapir demo`."""

    def run(config: Annotated[DemoConfig, _FLAT] = DemoConfig()) -> None:  # noqa: B008
        """Walk the whole way on this machine, from pairs to ranked pictures; ends with report.html.

        The same command goes on where an interrupted one stopped.

        Args:
            config: settings
        """
        from generation.demo import run_demo  # noqa: PLC0415 - keeps --help fast

        LOG.info("report: %s", run_demo(config))

    parse(run, arguments, "demo")


def sample(arguments: list[str]) -> None:
    """`tapir sample CAPTION ...`."""

    def run(
        captions: tyro.conf.Positional[tuple[str, ...]],
        out: Path = Path("samples.png"),
        prior: Path = Path("runs/prior"),
        dvae: Path = Path("runs/dvae"),
        clip: Path = Path("runs/clip"),
        bpe: Path = Path("runs/bpe"),
        step: int | None = None,
        show: int = 8,
        pictures: Path | None = None,
        keep: Annotated[PromptConfig, _FLAT] = PromptConfig(),  # noqa: B008
        config: Annotated[SampleConfig, _FLAT] = SampleConfig(),  # noqa: B008
    ) -> None:
        """Draw candidates for captions, rank them by CLIP and write a PNG grid, a row a caption.

        Args:
            captions: one or more captions, each in quotes
            out: PNG to write
            prior: run folder of a prior; one that has not ended gives its newest checkpoint
            dvae: run folder of the dVAE that it was trained on
            clip: run folder of a CLIP, or a folder with an open_clip checkpoint
                (open_clip_config.json and open_clip_model.safetensors)
            bpe: folder of tokenizer.json
            step: take the prior's checkpoint of this step
            show: how many of the best candidates the grid holds
            pictures: a folder for each candidate as a PNG of its own, as soon as it is finished
            keep: what is kept of an image prompt
            config: settings
        """
        from generation.pictures import Arrivals, open_studio, picture_grid  # noqa: PLC0415
        from generation.prompts import prompt_of  # noqa: PLC0415

        if not captions or show < 1:
            raise ConfigError("give at least one caption in quotes, and a --show of at least 1")
        check([*config.problems(), *keep.problems()])
        refuse_folder(out)
        studio = open_studio(prior, dvae, clip, bpe, config.precision, step)
        prompt = None
        if keep.image is not None:
            grid = studio.sampler.config.grid
            prompt = prompt_of(studio.codes_of_file(keep.image), keep, grid)
        texts = [clean_caption(os.fsencode(caption), repr(caption)) for caption in captions]
        with progress("sample", len(texts) * config.candidates) as meter:
            drawn = studio.draw(texts, config, prompt, Arrivals(meter, pictures))
        grid = picture_grid([row.pictures[:show] for row in drawn], 4)
        write_atomic(out, encode_png(grid))
        print_json({row.caption: row.scores[:show].tolist() for row in drawn})

    parse(run, arguments, "sample")


def evaluate(arguments: list[str]) -> None:
    """`tapir evaluate DATA`."""

    def run(
        data: Text,
        out: Path = Path("runs/samples"),
        prior: Path = Path("runs/prior"),
        dvae: Path = Path("runs/dvae"),
        clip: Path = Path("runs/clip"),
        bpe: Path = Path("runs/bpe"),
        step: int | None = None,
        config: Annotated[EvaluateConfig, _FLAT] = EvaluateConfig(),  # noqa: B008
    ) -> None:
        """Draw pictures for held-out captions; on shapes, check all attributes for best-of-N.

        Args:
            data: where `tapir pack` wrote
            out: folder for the pictures and figures
            prior: run folder of a prior; one that has not ended gives its newest checkpoint
            dvae: run folder of the dVAE that it was trained on
            clip: run folder of a CLIP, or a folder with an open_clip checkpoint
                (open_clip_config.json and open_clip_model.safetensors)
            bpe: folder of tokenizer.json
            step: take the prior's checkpoint of this step
            config: settings
        """
        from generation import evaluate as evaluation  # noqa: PLC0415
        from generation.pictures import open_studio  # noqa: PLC0415

        check(config.problems())
        out.mkdir(parents=True, exist_ok=True)
        studio = open_studio(prior, dvae, clip, bpe, config.precision, step)
        figures = evaluation.evaluate(studio, data, out, config)
        print_json({"caption_accuracy": figures})

    parse(run, arguments, "evaluate")


def overlap(arguments: list[str]) -> None:
    """`tapir overlap RAW EVAL`."""

    def run(
        raw: Text,
        evaluation: Text,
        dest: str = "",
        clip: Path = Path("runs/clip"),
        out: Path = Path("runs/overlap"),
        config: Annotated[OverlapConfig, _FLAT] = OverlapConfig(),  # noqa: B008
    ) -> None:
        """Find pairs whose picture an evaluation set has, too; with --dest, write the others there.

        Args:
            raw: where `tapir pack` wrote
            evaluation: the evaluation set, packed by `tapir pack`
            dest: s3://bucket/prefix or a folder for the pairs below the threshold; without it, only
                examples at rising likeness are written, to choose the threshold by
            clip: run folder of a finished CLIP
            out: folder for overlap.json and the examples
            config: settings
        """
        from generation.overlap import remove_overlap, write_likeness  # noqa: PLC0415
        from training.export import load_clip, read_model  # noqa: PLC0415

        check(config.problems())
        model, _ = load_clip(clip)
        digest = str(read_model(clip, "clip")[0]["sha256"])
        stores = open_store(raw), open_store(evaluation), open_store(dest) if dest else None
        found = remove_overlap(*stores, model, digest, config)
        print_json(write_likeness(found, out))

    parse(run, arguments, "overlap")


def report(arguments: list[str]) -> None:
    """`tapir report DIR`."""

    def run(folder: Text = "runs/demo") -> None:
        """Write report.html of a demo, or of a submitted run, whose stages have ended.

        Args:
            folder: what `tapir demo --out` was given, or the `out` of a run file
        """
        from generation.report import write_report  # noqa: PLC0415
        from generation.summary import summarise_chain  # noqa: PLC0415

        if (Path(folder) / CHAIN).exists():
            summarise_chain(Path(folder))
        LOG.info("report: %s", write_report(Path(folder)))

    parse(run, arguments, "report")
