"""The loss that each option of the prior reaches in equal time, on shapes and on emoji.

The tiny prior is trained on one process with each option alone and with all of them, from SEEDS
seeds, for the CPU time of STEPS steps of the paper. Steps of all options are timed in turns first.
The learning rate decays over as many steps as fit. The figure is the loss on the validation split.
What was timed and trained is kept in .cache under the tokens' fingerprint, so that an interrupted
benchmark goes on. Tokens that TAPIR_BENCH_TOKENS names replace both sets.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import GIVEN, make_tokens
from core.files.atomic import write_atomic
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

T = TypeVar("T")
STEPS, SEEDS, ROUNDS = sized((240, 3, 10), (3, 2, 1))
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
    for source, tokens in _tokens():
        train, held_out = (TokenSource(open_store(tokens), split) for split in _SPLITS)
        folder = cache(f"prior-options-{train.fingerprint[:12]}")
        config = _config(train)
        records, held = _records(train), _records(held_out)
        configs = {name: replace(config, **options) for name, options in OPTIONS.items()}
        seconds = _kept(folder / "seconds.json", partial(_seconds, configs, records))
        paper: list[float] = []
        for name, model in configs.items():
            steps = round(STEPS * seconds["paper"] / seconds[name])
            losses = [
                _kept(
                    folder / f"{name}-{steps}-{seed}.json",
                    partial(_trained, model, records, held, seed, steps),
                )
                for seed in range(SEEDS)
            ]
            paper = paper or losses
            value = statistics.mean(losses)
            print(f"{source}, {name}: {value:.4f} after {steps} steps", file=sys.stderr)
            rows.append(
                bench_row(
                    f"{source}: {name}, {steps} steps in the time of {STEPS}",
                    value,
                    "validation loss, nats per token",
                    f"the paper's {statistics.mean(paper):.4f}",
                    [a / b for a, b in zip(paper, losses, strict=True)],
                )
            )
    return rows


def _tokens() -> Iterator[tuple[str, str]]:
    """Name and place of each token set."""
    if given := os.environ.get(GIVEN):
        yield given, given
        return
    for source, (pairs, steps) in SETS.items():
        yield source, make_tokens(cache(f"prior-options-{source}"), pairs, steps, source)


def _kept(path: Path, make: Callable[[], T]) -> T:
    """What a file holds, made first if it is missing."""
    if not path.exists():
        write_atomic(path, json.dumps(make()).encode())
    kept: T = json.loads(path.read_text())
    return kept


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


def _engine(config: PriorConfig, seed: int) -> ReferenceEngine:
    settings = EngineSettings(
        optim=TINY.optim, engine=EngineConfig(), compress=CompressConfig(), seed=seed
    )
    return ReferenceEngine(prior_program(config, seed), settings, Mesh())


def _seconds(configs: dict[str, PriorConfig], records: list[TokenRecord]) -> dict[str, float]:
    """CPU seconds of a step of each, in turns; medians over ROUNDS, after one that is not timed."""
    engines = {name: _engine(config, 0) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(ROUNDS + 1):
        for name, engine in engines.items():
            batch = token_batch(records[:BATCH], configs[name].text_length)
            began = time.process_time()
            engine.step([batch], learning_rate(TINY.optim, number, 10**9))
            times[name].append(time.process_time() - began)
    for engine in engines.values():
        engine.close()
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def _trained(
    config: PriorConfig,
    records: list[TokenRecord],
    held_out: list[TokenRecord],
    seed: int,
    steps: int,
) -> float:
    """Train for some steps; returns the loss on `held_out`."""
    engine = _engine(config, seed)
    samples = _endless(records, seed)
    for step in range(steps):
        chosen = list(islice(samples, BATCH))
        engine.step(
            [token_batch(chosen, config.text_length)], learning_rate(TINY.optim, step, steps)
        )
    losses = [
        float(engine.evaluate(token_batch(held_out[i : i + BATCH], config.text_length))["loss"])
        for i in range(0, len(held_out) - BATCH + 1, BATCH)
    ]
    engine.close()
    return statistics.mean(losses)
