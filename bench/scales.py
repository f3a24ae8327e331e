"""Gradient values that fp16 flushes to zero: a scale for each resblock against one for all.

A deep prior is trained in fp32 on shapes; then gradients of some batches are taken in emulated fp16
under every global scale of a sweep of powers of two, and under one scale for each resblock: the
largest that keeps it finite, to which the rules of appendix D converge.
"""

import sys
from typing import Any

import torch

from bench.support.rows import bench_row
from bench.support.sizes import cache, sized
from bench.support.tokens import DATA, make_tokens
from core.storage.store import open_store
from data_pipeline.formats.tokens import TokenSource
from models.config import PriorConfig
from models.prior import prior_loss, prior_program
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.device import CPU
from parallel.engines.protocol import Batch, EngineSettings, Stage
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh
from parallel.scales import MOST, Branch, Counters, Scale
from training.tasks.prior import token_batch

DEPTH, STEPS, BATCH = sized(48, 2), sized(1000, 2), 16
SEARCHED, COUNTED = sized(4, 1), sized(60, 2)
"""Batches of the sweep, and those of the final count."""
SWEEP = tuple(2.0**k for k in range(0, 41, sized(2, 8)))
FOLDER = cache("scales")


def run() -> list[dict[str, Any]]:
    """One row; ratio = share flushed by the best global scale over the resblocks' own."""
    tokens = make_tokens(FOLDER / "data", *DATA)
    source = TokenSource(open_store(tokens), "train")
    facts = source.manifest.facts
    config = PriorConfig(
        dim=64,
        heads=4,
        layers=DEPTH,
        text_length=24,
        text_vocabulary=facts["text_vocabulary"],
        image_vocabulary=facts["image_vocabulary"],
        grid=facts["grid"],
    )
    records = [record for block in range(sized(40, 12)) for record in source.read(block)]
    batches = [
        token_batch(records[i : i + BATCH], config.text_length)
        for i in range(0, len(records) - BATCH, BATCH)
    ]
    stage = _trained(config, batches)
    few, many = batches[:SEARCHED], batches[-COUNTED:]
    shares = {}
    for value in SWEEP:
        finite, share, _ = _pass(stage, few, dict.fromkeys(stage.scales, value))
        if all(finite.values()):
            shares[value] = share
            print(f"global scale {value:g}: {share:.3e} flushed", file=sys.stderr)
    best = min(shares, key=lambda value: (shares[value], -value))
    globally, flushed = _search(stage, many, dict.fromkeys(stage.scales, 2 * best), together=True)
    own, share = _search(stage, many, _search(stage, few, dict.fromkeys(stage.scales, MOST))[0])
    best = next(iter(globally.values()))
    spread = list(own.values())
    print(f"best global scale {best:g}: {flushed:.3e} flushed", file=sys.stderr)
    print(f"own scales {min(spread):g} to {max(spread):g}: {share:.3e}", file=sys.stderr)
    ratio = flushed / max(share, 1e-12)
    return [
        bench_row(
            f"fp16 gradients flushed, {DEPTH} layers, own scales",
            share,
            "share",
            f"best global scale {best:g}: {flushed:.3e}",
            [ratio],
        )
    ]


def _trained(config: PriorConfig, batches: list[Batch]) -> Stage:
    """Train in fp32, then move the weights into a stage with gradient scales."""
    program = prior_program(config, 0)
    settings = EngineSettings(
        optim=OptimConfig(lr=1e-3),
        engine=EngineConfig(),
        compress=CompressConfig(),
        seed=0,
    )
    engine = ReferenceEngine(program, settings, Mesh())
    for step in range(STEPS):
        result = engine.step([batches[step % (len(batches) - COUNTED)]], 1e-3 * min(1, step / 50))
        if step % 100 == 0:
            print(f"step {step}: loss {result.losses['loss']:.3f}", file=sys.stderr)
    stage = Stage(program.layers, EngineConfig(precision="fp16"), CPU)
    trained = engine.layers()
    for name, layer in stage.layers.items():
        layer.load_state_dict(trained[name].state_dict())
    for module in stage.modules():
        if isinstance(module, Branch):
            module.count = True
    return stage


def _search(
    stage: Stage, probes: list[Batch], values: dict[str, float], together: bool = False
) -> tuple[dict[str, float], float]:
    """Halve scales until every branch stays finite; `together` halves all. Also returns the
    share of values that they flush."""
    while True:
        finite, share, _ = _pass(stage, probes, values)
        if all(finite.values()):
            return values, share
        values = {
            name: value / 2 if together or not finite[name] else value
            for name, value in values.items()
        }


def _pass(
    stage: Stage, probes: list[Batch], values: dict[str, float]
) -> tuple[dict[str, bool], float, int]:
    """One backward pass a batch: which branches stayed finite, the share flushed, values seen."""
    for name, scale in stage.scales.items():
        scale.value, scale.counters = values[name], Counters()
        scale.flags.clear()
    for batch in probes:
        stage.zero_grad(set_to_none=True)
        prior_loss(stage(batch), batch, 0.125)["loss"].backward()
    scales: list[Scale] = list(stage.scales.values())
    seen = sum(scale.counters.seen for scale in scales)
    flushed = sum(scale.counters.flushed for scale in scales)
    return {name: bool(scale.finite) for name, scale in stage.scales.items()}, flushed / seen, seen


def main() -> None:
    torch.set_num_threads(1)
    print(run())


if __name__ == "__main__":
    main()
