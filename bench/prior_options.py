"""The loss that each option of the prior reaches in equal time, on shapes and on emoji.

The tiny prior is trained on one process for SECONDS of its CPU time with each option alone and with
all of them, from SEEDS seeds. A few steps are timed first, so that the learning rate decays over as
many steps as fit. The figure is the loss on the validation split; of emoji, with as few pictures as
there are, also the steps tell how fast an option is.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import make_tokens
from core.keys import keyed_rng
from core.storage.store import open_store
from data_pipeline.formats.tokens import TokenRecord, TokenSource
from models.config import PriorConfig
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig
from parallel.engines.protocol import EngineSettings
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh
from training.presets import prior_tiny
from training.schedules import learning_rate
from training.tasks.prior import token_batch

SECONDS, SEEDS, TIMED = sized((100.0, 3, 12), (0.2, 2, 2))
SETS: dict[str, tuple[int, int]] = {
    "shapes": sized((12_000, 600), (400, 2)),
    "emoji": sized((3_000, 600), (300, 2)),
}
"""Pairs, and steps of their dVAE."""
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "qk_norm": {"qk_norm": True},
    "rotary": {"positions": "rotary"},
    "gated": {"mlp": "gated"},
    "rms": {"norm": "rms"},
    "tied": {"tied": True},
    "rotary, gated, rms, qk_norm": {
        "qk_norm": True, "positions": "rotary", "mlp": "gated", "norm": "rms"
    },
}  # fmt: skip
TINY = prior_tiny()
BATCH = sized(TINY.loop.global_batch_size, 4)


def run() -> list[dict[str, Any]]:
    """A row per set and option; ratio = the paper's validation loss over the option's."""
    torch.set_num_threads(1)
    rows = []
    for source, (pairs, steps) in SETS.items():
        tokens = make_tokens(cache(f"prior-options-{source}"), pairs, steps, source)
        train, held_out = (TokenSource(open_store(tokens), split) for split in _SPLITS)
        config = _config(train)
        records, held = _records(train), _records(held_out)
        paper: list[float] = []
        for name, options in OPTIONS.items():
            trained = [_trained(replace(config, **options), records, held, s) for s in range(SEEDS)]
            losses, steps_done = zip(*trained, strict=True)
            paper = paper or list(losses)
            value, done = statistics.mean(losses), statistics.mean(steps_done)
            print(f"{source}, {name}: {value:.4f} after {done:.0f} steps", file=sys.stderr)
            rows.append(
                bench_row(
                    f"{source}: {name}, {done:.0f} steps in {SECONDS:g} s",
                    value,
                    "validation loss, nats per token",
                    f"the paper's {statistics.mean(paper):.4f}",
                    [a / b for a, b in zip(paper, losses, strict=True)],
                )
            )
    return rows


_SPLITS = ("train", "validation")


def _config(source: TokenSource) -> PriorConfig:
    facts = source.manifest.facts
    return replace(
        TINY.model,
        text_vocabulary=facts["text_vocabulary"],
        image_vocabulary=facts["image_vocabulary"],
        grid=facts["grid"],
        columns=facts.get("columns", 0),
    )


def _records(source: TokenSource) -> list[TokenRecord]:
    return [record for block in range(len(source.sizes)) for record in source.read(block)]


def _endless(records: list[TokenRecord], seed: int) -> Iterator[TokenRecord]:
    """Epochs of the records, each in an order of its own."""
    for epoch in count():
        for i in keyed_rng(seed, epoch, "prior options").permutation(len(records)):
            yield records[i]


def _trained(
    config: PriorConfig, records: list[TokenRecord], held_out: list[TokenRecord], seed: int
) -> tuple[float, int]:
    """Train for SECONDS; returns the loss on `held_out`, and the number of steps."""
    settings = EngineSettings(
        optim=TINY.optim, engine=EngineConfig(), compress=CompressConfig(), seed=seed
    )
    engine = ReferenceEngine(prior_program(config, seed), settings, Mesh())
    samples = _endless(records, seed)
    began, steps, step = time.process_time(), TIMED, 0
    while step < steps:
        chosen = list(islice(samples, BATCH))
        rate = learning_rate(TINY.optim, step, steps if step >= TIMED else 10**9)
        engine.step([token_batch(chosen, config.text_length)], rate)
        step += 1
        if step == TIMED:
            steps = max(TIMED, int(SECONDS * TIMED / (time.process_time() - began)))
    losses = [
        float(engine.evaluate(token_batch(held_out[i : i + BATCH], config.text_length))["loss"])
        for i in range(0, len(held_out) - BATCH + 1, BATCH)
    ]
    engine.close()
    return statistics.mean(losses), steps
