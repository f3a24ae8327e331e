"""Train each seed of a recipe, and write the best one's models in 16 bits with a card.

WORK/NAME/seed-N/                 pairs, tokens and run folders; a finished stage is kept
OUT/NAME/                         what is shipped (generation/shipped.py)
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config import to_json
from core.files.atomic import Json, seal, sha256, write_atomic
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.formats.raw import RawSource
from data_pipeline.streaming.stream import first_records
from data_pipeline.text.bpe import FILE as TOKENIZER
from data_pipeline.text.words import FILE as WORDS
from generation.config import ModelPaths
from generation.shipped import CARD, README, Card, paths_of
from training.export.weights import describe
from training.run.folder import read_metrics
from workflow.chain.here import run_stage, stages_of
from workflow.run_file import RunFile, StageSpec
from workflow.weights.half import write_half
from workflow.weights.readme import readme_of
from workflow.weights.recipes import STAGES, Recipe
from workflow.weights.score import scored

HALF = "half"
"""Folder of a seed's models in 16 bits."""
_FIGURES = {
    "prior": ("image_loss", "shuffled_caption_loss"),
    "dvae": ("psnr", "codes_used"),
    "clip": ("accuracy",),
}
"""Held-out figures of each stage that a card gives."""


def make_weights(recipe: Recipe, seeds: Sequence[int], work: Path, out: Path, command: str) -> Card:
    """Train all seeds, write the one with the lowest held-out loss; returns its card.

    Raises: TapirError naming a stage that failed; the same command goes on from there.
    """
    folder = work / recipe.name
    for seed in seeds:
        _train(recipe, seed, folder)
    rows = [{"seed": seed, **_figures(folder / f"seed-{seed}")} for seed in seeds]
    best = min(rows, key=lambda row: row["image_loss"])
    LOG.info("%s: seed %d has the lowest held-out loss", recipe.name, best["seed"])
    captions = _held_out(folder, recipe.scored)
    for row in rows:
        run = folder / f"seed-{row['seed']}"
        row["score"] = scored(write_models(run, run / HALF), recipe.score, captions).value
    target = out / recipe.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / f"seed-{best['seed']}" / HALF, target)
    score = replace(recipe.score, captions=tuple(captions), value=best["score"])
    card = Card(
        name=recipe.name,
        title=recipe.title,
        pixels=int(describe(target / "clip", "clip")["config"]["pixels"]),
        license=recipe.license,
        source=recipe.pictures,
        command=command,
        parameters=sum(_parameters(target / name) for name in ("prior", "dvae", "clip")),
        seed=best["seed"],
        seeds=tuple(rows),
        score=score,
        files={},
    )
    return write_card(card, target)


def write_models(run: Path, out: Path) -> ModelPaths:
    """Write a run's models in 16 bits; they refer to each other by their new digests."""
    for name in (TOKENIZER, WORDS):
        write_atomic(out / "bpe" / name, (run / "bpe" / name).read_bytes())
    digest = write_half(run / "dvae", "dvae", out / "dvae", {})
    write_half(run / "prior", "prior", out / "prior", {"dvae": digest})
    write_half(run / "clip", "clip", out / "clip", {})
    return paths_of(out)


def write_card(card: Card, target: Path) -> Card:
    """Write README.md and card.json of a folder of models; returns the card with all digests."""
    write_atomic(target / README, readme_of(card).encode())
    files = {
        str(path.relative_to(target)): sha256(path.read_bytes())
        for path in sorted(target.rglob("*"))
        if path.is_file() and path.name != CARD
    }
    whole = replace(card, files=files)
    body: Json = to_json(whole)
    write_atomic(target / CARD, seal(body))
    return whole


def _train(recipe: Recipe, seed: int, folder: Path) -> None:
    out = folder / f"seed-{seed}"
    for stage in stages_of(run_of(recipe, seed, folder)):
        run_stage(stage, out, {})


def run_of(recipe: Recipe, seed: int, folder: Path) -> RunFile:
    """The run file of one seed; all seeds have the same pairs."""
    flags: dict[str, dict[str, Any]] = {name: dict(recipe.flags.get(name, {})) for name in STAGES}
    for name in ("dvae", "prior", "clip"):
        flags[name]["loop.seed"] = seed
    return RunFile(
        name=recipe.name,
        out=folder / f"seed-{seed}",
        stages={
            name: StageSpec(source=recipe.source if name == "pack" else "", flags=flags[name])
            for name in STAGES
        },
    )


def _figures(run: Path) -> dict[str, Any]:
    """The last held-out figures of a seed's runs."""
    figures: dict[str, Any] = {}
    for stage, names in _FIGURES.items():
        rows = [row for row in read_metrics(run / stage) if row.get("split") == "validation"]
        figures |= {name: rows[-1][name] for name in names}
    return figures


def _held_out(folder: Path, count: int) -> list[str]:
    """The first distinct captions of held-out pairs."""
    first = sorted(folder.glob("seed-*"))[0]
    records = first_records(RawSource(open_store(str(first / "data" / "raw")), "validation"), 512)
    return list(dict.fromkeys(record.caption for record in records))[:count]


def _parameters(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2
