"""Pixels, codes, widths and steps for a set of pairs, a machine and a time; imports no torch.

The largest size is taken of which LEAST steps of each stage fit the time. The steps then fill the
time, up to MOST_EPOCHS passes over the pairs: more would only learn them by heart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.config import ClipConfig, PriorConfig
from parallel.config import EngineConfig, MeshConfig
from training.config import StageConfig
from training.presets import clip_tiny, dvae_tiny, prior_tiny
from workflow.run_flags import Value

Flags = dict[str, Value]
SHARES = {"dvae": 0.3, "clip": 0.12, "prior": 0.58}
"""Of the time for training."""
LEAST = {"dvae": 800, "clip": 150, "prior": 600}
"""Steps below which a smaller size makes better pictures."""
MOST_EPOCHS = {"dvae": 400, "clip": 40, "prior": 60}
LEAST_PAIRS, LEAST_HELD_OUT = 64, 8
"""Pairs below which nothing is trained: a batch, and one for each of order.lanes."""
HELD_OUT, BLOCK, LEAST_SIDE = 0.1, 8, 32
"""Of packing: validation fraction, pairs in a block, pixels of a picture's shorter side."""
PACK: Flags = {
    "validation": HELD_OUT,
    "block": BLOCK,
    "max_rejects": 0.5,
    "min_side": LEAST_SIDE,
}
_TOKENS_PER_CODE = 200
"""Training tokens of each code, on average, at least."""
_MOST_REPLICAS = 8
"""order.lanes of the presets."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the three networks."""

    pixels: int
    groups: int
    codebook: int
    width: int
    dim: int
    heads: int
    layers: int
    patch: int
    lr: float
    """Of the prior."""

    @property
    def grid(self) -> int:
        return self.pixels >> (self.groups - 1)

    @property
    def text(self) -> str:
        return (
            f"{self.pixels} pixels, {self.grid} x {self.grid} of {self.codebook} codes, prior of "
            f"{self.layers} layers {self.dim} wide"
        )


SMALL = Size(
    pixels=32, groups=3, codebook=64, width=16, dim=192, heads=6, layers=4, patch=8, lr=2e-3
)
SIZES = (
    SMALL,
    replace(SMALL, pixels=64, codebook=256),
    replace(SMALL, pixels=64, codebook=512, width=32, dim=256, heads=8, layers=6, lr=1.5e-3),
    Size(
        pixels=128, groups=4, codebook=1024, width=32, dim=384, heads=6, layers=8, patch=16, lr=1e-3
    ),
)
"""From the smallest to the largest."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What sizes depend on, of a packed set and this machine."""

    train: int
    held_out: int
    side: int
    """Pixels of the shorter side that 99% of the pictures have at least."""
    text_length: int
    """Tokens that 99% of the captions have at most."""
    vocabulary: int
    decode_seconds: float
    """CPU seconds to decode and crop a picture."""
    replicas: int
    """Data-parallel ranks."""

    def problems(self, place: str) -> list[str]:
        if self.train >= LEAST_PAIRS and self.held_out >= LEAST_HELD_OUT:
            return []
        return [
            f"{place} has {self.train + self.held_out} usable pairs, and a demo needs about "
            f"{round(1.5 * LEAST_HELD_OUT / HELD_OUT)} at least; add pictures with captions "
            "(rejected pairs, with reasons: the log of the stage pack)"
        ]


def replicas(cores: int, gpus: int) -> int:
    """Data-parallel ranks of a machine: a power of two, a core or a GPU for each."""
    return 1 << int(math.log2(max(1, min(gpus or cores, _MOST_REPLICAS))))


def fitting(pairs: Pairs) -> list[Size]:
    """Sizes whose pixels the pictures have, with as many codes as the pairs can train."""
    sizes = []
    for size in SIZES:
        if size.pixels <= max(pairs.side, SMALL.pixels):
            most = pairs.train * size.grid**2 // _TOKENS_PER_CODE
            codes = 1 << int(math.log2(max(32, min(size.codebook, most))))
            sizes.append(replace(size, codebook=codes))
    return sizes


def settings_of(size: Size, pairs: Pairs) -> dict[str, StageConfig]:
    """Stage -> settings whose step is timed."""
    mesh, one = MeshConfig(data=pairs.replicas), EngineConfig(precision="auto")
    engine = prior_tiny().engine if pairs.replicas > 1 else one
    dvae, clip, prior = dvae_tiny(), clip_tiny(), prior_tiny()
    text: dict[str, Any] = {
        "text_length": pairs.text_length,
        "text_vocabulary": pairs.vocabulary,
    }
    look = ClipConfig(pixels=size.pixels, patch=size.patch, **text)
    model = PriorConfig(
        dim=size.dim,
        heads=size.heads,
        layers=size.layers,
        image_vocabulary=size.codebook,
        grid=size.grid,
        **text,
    )
    sizes: dict[str, Any] = {
        name: getattr(size, name) for name in ("pixels", "groups", "codebook", "width")
    }
    loop = replace(clip.loop, global_batch_size=clip_batch(pairs))
    return {
        "dvae": replace(dvae, model=replace(dvae.model, **sizes), mesh=mesh),
        "clip": replace(clip, model=look, mesh=mesh, loop=loop),
        "prior": replace(prior, model=model, mesh=mesh, engine=engine),
    }


def clip_batch(pairs: Pairs) -> int:
    """Pairs that are contrasted together: fewer of a small set."""
    return min(128, 1 << int(math.log2(max(LEAST_PAIRS, pairs.train // 4))))


def step_seconds(size: Size, pairs: Pairs, measured: dict[str, float]) -> dict[str, float]:
    """Measured steps, and the decoding of their pictures by the same cores."""
    batches = {name: each.loop.global_batch_size for name, each in settings_of(size, pairs).items()}
    read = {n: pairs.decode_seconds * batches[n] / pairs.replicas for n in ("dvae", "clip")}
    return {name: seconds + read.get(name, 0.0) for name, seconds in measured.items()}


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The chosen size, and seconds of its steps."""

    size: Size
    seconds: dict[str, float]
    """Of a step, by stage."""


def choose(
    sizes: Sequence[Size], pairs: Pairs, measured: Sequence[dict[str, float]], seconds: float
) -> Sizing:
    """The largest measured size of which LEAST steps fit; the first if none does."""
    rows = [step_seconds(s, pairs, row) for s, row in zip(sizes, measured, strict=False)]
    fit = [i for i, row in enumerate(rows) if all(_fits(n, row, seconds) for n in SHARES)]
    best = max(fit, default=0)
    return Sizing(size=sizes[best], seconds=rows[best])


def _fits(name: str, row: dict[str, float], seconds: float) -> bool:
    return LEAST[name] * row[name] <= SHARES[name] * seconds


def steps_of(name: str, pairs: Pairs, each: float, seconds: float) -> int:
    """Steps of a stage that take `seconds` at `each` seconds a step, up to MOST_EPOCHS."""
    batch = clip_batch(pairs) if name == "clip" else 32
    most = max(LEAST[name], MOST_EPOCHS[name] * pairs.train // batch)
    return max(8, min(most, int(seconds / max(each, 1e-6))))


def stage_flags(sizing: Sizing, pairs: Pairs, steps: dict[str, int], seed: int) -> dict[str, Flags]:
    """Flags of the stages after packing, by stage."""
    size, held_out = sizing.size, pairs.held_out
    models: dict[str, Flags] = {
        "dvae": {
            **{f"model.{n}": getattr(size, n) for n in ("pixels", "groups", "codebook", "width")},
            "optim.lr": 3e-3 if size.width == SMALL.width else 2e-3,
        },
        "clip": {
            "model.pixels": size.pixels,
            "model.patch": size.patch,
            "model.text_length": pairs.text_length,
            "loop.global_batch_size": clip_batch(pairs),
        },
        "prior": {
            **{f"model.{n}": getattr(size, n) for n in ("dim", "heads", "layers")},
            "model.text_length": pairs.text_length,
            "optim.lr": size.lr,
            "caption_dropout": 0.1,
        },
    }
    if pairs.replicas == 1:
        models["prior"]["engine.name"] = "reference"
    loops = {name: _loop(steps[name], held_out, pairs.replicas, seed) for name in models}
    return {
        **{name: {**flags, **loops[name]} for name, flags in models.items()},
        "tokenize": {"block": BLOCK, "max_rejects": 0.1},
    }


def _loop(steps: int, held_out: int, ranks: int, seed: int) -> Flags:
    return {
        "loop.steps": steps,
        "loop.seed": seed,
        "loop.validate_every": -(-steps // 4),
        "loop.validation_samples": min(256, held_out),
        "checkpoint.every": -(-steps // 4),
        "optim.warmup": warmup(steps),
        "mesh.data": ranks,
    }


def warmup(steps: int) -> int:
    """Steps of warm-up of a stage that is to take `steps`."""
    return max(1, min(50, steps // 10))


def draw_flags(sizing: Sizing, pairs: Pairs, seconds: float, seed: int) -> Flags:
    """Flags of `tapir evaluate`: as many captions as about `seconds` draw."""
    candidates, guided = 8, 2 * picture_seconds(sizing, pairs)  # guidance decodes two rows
    prompts = int(seconds / (candidates * guided))
    return {
        "prompts": max(8, min(48, pairs.held_out, prompts)),
        "candidates": candidates,
        "temperature": 0.9,
        "guidance": 1.5,
        "seed": seed,
    }


def captions_in(sizing: Sizing, pairs: Pairs, seconds: float) -> int:
    """Held-out captions, and as many of training, that are drawn 4 times in about `seconds`."""
    most = int(seconds / (2 * 4 * picture_seconds(sizing, pairs)))
    return max(4, min(pairs.held_out, most))


def picture_seconds(sizing: Sizing, pairs: Pairs) -> float:
    """Seconds to draw a picture, from those of a step of the prior."""
    prior: Any = settings_of(sizing.size, pairs)["prior"]
    tokens: int = prior.loop.global_batch_size * prior.model.length
    each = sizing.seconds["prior"] / tokens  # a forward pass is a third of a step; half as fast
    return max(each * int(prior.model.image_length), 1e-9)
