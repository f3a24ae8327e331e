"""A step on the device against the CPU's, and checkpoints from one to the other."""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from bench.gpu.report import GpuReport, Target
from bench.parity import BOUND, MODEL, OPTIM, batch_of
from checkpoint.format import KINDS
from checkpoint.reader import CheckpointReader
from checkpoint.saver import Saver
from core.storage.store import open_store
from models.prior import prior_program
from parallel.config import CompressConfig, EngineConfig
from parallel.device import CPU
from parallel.engines.protocol import EngineSettings, StepResult
from parallel.engines.reference import ReferenceEngine
from parallel.mesh import Mesh
from parallel.precision import set_numerics
from parallel.world import World

STEPS, SEED = 4, 5
Bits = dict[tuple[str, str], torch.Tensor]


def engine_on(device: torch.device, precision: str = "fp32") -> ReferenceEngine:
    """The reference engine of one process, with the small prior of the parity benchmark."""
    set_numerics(device)
    engine = EngineConfig(precision=precision)  # type: ignore[arg-type]
    settings = EngineSettings(optim=OPTIM, engine=engine, compress=CompressConfig(), seed=SEED)
    return ReferenceEngine(prior_program(MODEL, SEED), settings, Mesh(world=World(device=device)))


def train(engine: ReferenceEngine, device: torch.device, steps: Sequence[int]) -> list[StepResult]:
    """Train the given steps of the parity benchmark."""
    results = []
    for step in steps:
        batch = {name: value.to(device) for name, value in batch_of(step, MODEL).items()}
        results.append(engine.step([batch], OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup)))
    return results


def largest_difference(ours: Sequence[StepResult], exact: Sequence[StepResult]) -> float:
    """Largest relative difference of a loss or a gradient norm."""
    pairs = []
    for a, b in zip(ours, exact, strict=True):
        pairs += [(a.grad_norm, b.grad_norm), *((a.losses[k], b.losses[k]) for k in b.losses)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def steps(report: GpuReport) -> None:
    """Losses and norms of some steps in each precision, with clipping and AdamW."""
    for precision, bound in BOUND.items():
        exact = train(engine_on(CPU, precision), CPU, range(STEPS))
        results = train(engine_on(report.device, precision), report.device, range(STEPS))
        worst = largest_difference(results, exact)
        report.row(
            f"{STEPS} steps of the reference engine, {precision}",
            worst,
            "relative difference",
            Target(most=bound),
        )


def save(engine: ReferenceEngine, url: str, name: str, background: bool = True) -> CheckpointReader:
    """Write a checkpoint as a run does, and read it with every digest verified.

    Raises: StoreError if the save failed.
    """
    store = open_store(url)
    saver = Saver(store, 0, lambda text: [text], background)
    saver.save(name, engine.state_slices(), {"step": 1}, lambda: None)
    saver.wait()
    if (failure := saver.failure()) is not None:
        raise failure
    reader = CheckpointReader(store, name)
    reader.verify()
    return reader


def bits(engine: ReferenceEngine) -> Bits:
    """Everything that a checkpoint of an engine holds, copied to the host."""
    return {
        (part.name, part.kind): part.data.detach().to("cpu", copy=True).reshape(-1)
        for part in engine.state_slices()
        if part.kind in KINDS
    }


def unequal(a: Bits, b: Bits) -> int:
    """Tensors that differ in a bit, or that are in only one of the two."""
    return len(a.keys() ^ b.keys()) + sum(not torch.equal(a[k], b[k]) for k in a.keys() & b.keys())


def moved(source: torch.device, target: torch.device, background: bool) -> dict[str, Any]:
    """Train, save and load on another device; continue there, then load and continue again.

    `lost`: tensors that came with another bit. `repeated`: tensors in which two runs from the same
    checkpoint differ. `drift`: largest difference of their losses from the saved run's.
    """
    first = engine_on(source)
    train(first, source, range(2))
    kept = bits(first)
    with tempfile.TemporaryDirectory() as folder:
        reader = save(first, folder, "step-2", background)
        ends, results = [], []
        for _ in range(2):
            again = engine_on(target)
            again.load_slices(reader)
            lost = unequal(bits(again), kept)
            results.append(train(again, target, range(2, STEPS)))
            ends.append(bits(again))
    set_numerics(source)
    unbroken = train(first, source, range(2, STEPS))
    return {
        "lost": lost,
        "repeated": unequal(*ends),
        "unbroken": unequal(ends[0], bits(first)),
        "drift": largest_difference(results[0], unbroken),
    }


def checkpoints(report: GpuReport) -> None:
    """From the CPU to the device, back, and from the device to itself."""
    device = report.device
    moves = {"CPU to GPU": (CPU, device), "GPU to CPU": (device, CPU), "GPU": (device, device)}
    for direction, (source, target) in moves.items():
        figures = moved(source, target, background=direction != "CPU to GPU")
        none = Target(most=0)
        report.row(f"{direction}: tensors with another bit", figures["lost"], "tensors", none)
        report.row(f"{direction}: two runs from it differ in", figures["repeated"], "tensors", none)
        if source == target:
            name = f"{direction}: a resumed run and the unbroken one differ in"
            report.row(name, figures["unbroken"], "tensors", none)
        else:
            name = f"{direction}: losses differ from the unbroken run's"
            report.row(name, figures["drift"], "relative difference", Target(most=BOUND["fp32"]))
