"""The verbs demo, sample, evaluate, overlap and report."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from cluster.jobs import CHAIN
from core.cli import parse, print_json
from core.errors import ConfigError
from core.files import refuse_folder, write_atomic
from core.log import LOG
from core.settings import check
from core.store import open_store
from data_pipeline.captions import clean_caption
from data_pipeline.images import encode_png
from generation.config import DemoConfig, EvaluateConfig, OverlapConfig, SampleConfig

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
        image: Path | None = None,
        show: int = 8,
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
            image: an image prompt: its first --keep-rows rows of tokens are kept
            show: how many of the best candidates the grid holds
            config: settings
        """
        from generation.pictures import open_studio, picture_grid  # noqa: PLC0415

        if not captions or show < 1:
            raise ConfigError("give at least one caption in quotes, and a --show of at least 1")
        if (image is None) != (config.keep_rows == 0):
            raise ConfigError("--image and --keep-rows belong together: give both, or neither")
        studio = open_studio(prior, dvae, clip, bpe, step)
        check(config.problems(studio.sampler.config.grid))
        refuse_folder(out)
        prompt = studio.codes_of_file(image) if image else None
        texts = [clean_caption(os.fsencode(caption), repr(caption)) for caption in captions]
        drawn = studio.draw(texts, config, prompt)
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

        if config.prompts < 1:
            raise ConfigError("--prompts must be at least 1")
        out.mkdir(parents=True, exist_ok=True)
        studio = open_studio(prior, dvae, clip, bpe, step)
        settings = replace(config, keep_rows=0)
        figures = evaluation.evaluate(studio, data, out, config.prompts, settings)
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
        from training.export import build_model, open_model  # noqa: PLC0415

        check(config.problems())
        found = open_model(clip, "clip")
        stores = open_store(raw), open_store(evaluation), open_store(dest) if dest else None
        likeness = remove_overlap(*stores, build_model(found), found.digest, config)
        print_json(write_likeness(likeness, out))

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
