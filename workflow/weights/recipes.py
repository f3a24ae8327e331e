"""How the shipped models are trained; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from generation.shipped import Score
from workflow.run_flags import Value

Flags = Mapping[str, Value]
STAGES = ("pack", "bpe", "dvae", "tokenize", "prior", "clip")
EXACT, COSINE = "exact captions", "CLIP cosine"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One set of shipped models."""

    name: str
    title: str
    source: str
    """Of `tapir pack`."""
    pictures: str
    """Where the pictures are from, for the card."""
    license: str
    flags: Mapping[str, Flags]
    """Changes of each stage's tiny preset."""
    score: Score
    """How the models are scored; its captions are taken from the held-out pairs."""
    scored: int
    """Captions that are scored."""


SHAPES = Recipe(
    name="shapes",
    title="coloured shapes at 32 pixels, and where they are",
    source="shapes",
    pictures="drawn by `tapir pack shapes`",
    license="Apache-2.0, as Tapir",
    flags={
        "pack": {"count": 40_000},
        "dvae": {"loop.steps": 4000, "loop.validate_every": 1000, "checkpoint.every": 500},
        "prior": {
            "loop.steps": 5000,
            "loop.validate_every": 1000,
            "checkpoint.every": 500,
            "model.text_length": 12,
            "model.mlp": "gated",
            "caption_dropout": 0.1,
        },
        "clip": {
            "loop.steps": 2000,
            "loop.validate_every": 500,
            "checkpoint.every": 500,
            "model.text_length": 12,
        },
    },
    score=Score(name=EXACT, captions=(), candidates=16, temperature=0.8, guidance=1.5),
    scored=64,
)
EMOJI = Recipe(
    name="emoji",
    title="emoji at 64 pixels, by their names",
    source="emoji",
    pictures="Noto Emoji by Google, from the npm package emoji-datasource-google 16.0.0",
    license="Apache-2.0",
    flags={
        "pack": {"validation": 0.1, "block": 16},
        "bpe": {"vocabulary": 1024},
        "dvae": {
            "model.pixels": 64,
            "model.width": 24,
            "model.codebook": 256,
            "optim.lr": 2e-3,
            "loop.global_batch_size": 16,
            "loop.steps": 3000,
            "loop.validate_every": 1000,
            "checkpoint.every": 500,
        },
        "tokenize": {"block": 16},
        "prior": {
            "model.dim": 256,
            "model.heads": 8,
            "model.mlp": "gated",
            "optim.lr": 1e-3,
            "loop.global_batch_size": 16,
            "loop.steps": 1500,
            "loop.validate_every": 500,
            "checkpoint.every": 250,
            "caption_dropout": 0.1,
        },
        "clip": {
            "model.pixels": 64,
            "loop.steps": 1000,
            "loop.validate_every": 250,
            "checkpoint.every": 250,
        },
    },
    score=Score(name=COSINE, captions=(), candidates=8, temperature=0.8, guidance=1.5),
    scored=16,
)
RECIPES = {recipe.name: recipe for recipe in (SHAPES, EMOJI)}


def longer(recipe: Recipe, factor: float) -> Recipe:
    """The same with `factor` times the steps of each stage."""
    changed = {
        stage: {
            name: max(1, round(float(value) * factor)) if name in _STEPS else value
            for name, value in flags.items()
        }
        for stage, flags in recipe.flags.items()
    }
    return replace(recipe, flags=changed)


_STEPS = ("loop.steps", "loop.validate_every", "checkpoint.every")


def miniature(recipe: Recipe) -> Recipe:
    """The same stages in seconds: what it draws is noise."""
    flags = {name: dict(each) for name, each in recipe.flags.items()}
    few: dict[str, Value] = {
        "loop.steps": 4,
        "loop.validate_every": 0,
        "checkpoint.every": 4,
        "loop.global_batch_size": 32,
        "loop.validation_samples": 16,
        "optim.warmup": 1,
    }
    for stage in ("dvae", "prior", "clip"):
        flags[stage] = {**flags.get(stage, {}), **few}
    flags["pack"] = {"count": 400, "validation": 0.15, "block": 8}
    flags["tokenize"] = {"block": 8}
    score = replace(recipe.score, candidates=2)
    return replace(recipe, flags=flags, score=score, scored=3)
