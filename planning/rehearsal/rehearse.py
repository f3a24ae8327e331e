"""Prove that all ranks' collectives match, before a cluster is paid for.

One rank of each role is run: every stage, and on the other axes of the mesh the first rank and the
last, which stands for those in between; without a pipeline, the second one too. Each runs the real
loop and engine on fake tensors in a fake process group: steps, a validation, a save, and the end of
a run. Then the recorded calls of all ranks of the world are matched.
"""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from core.config import check
from core.errors import ConfigError
from core.log import progress, slow
from core.memory import size_text
from parallel.config import EngineConfig, MeshConfig
from planning.rehearsal.explain import Mismatch, explain
from planning.rehearsal.matcher import Roles, play
from planning.rehearsal.pool import Pool, Runner
from planning.rehearsal.rank import RankTask, run_rank
from planning.rehearsal.sequence import Grid


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Result of a rehearsal."""

    preset: str
    stage: str
    mesh: MeshConfig
    batch: int
    """Global batch size."""
    micro_batches: int
    steps: int
    """Training steps that were rehearsed; a validation and a save come before the last one."""
    device: str
    """Type of each rank's device."""
    roles: int
    """Number of ranks that were run."""
    calls: dict[str, int] = field(default_factory=dict)
    """Operations of rank 0, by kind."""
    backends: dict[str, int] = field(default_factory=dict)
    """Operations of rank 0, by backend."""
    operations: int
    """Matched operations over all ranks."""
    bytes: int
    """Bytes of the matched operations, as each rank sees them."""
    seconds: float
    mismatch: Mismatch | None

    @property
    def matches(self) -> bool:
        """True if all ranks' sequences match."""
        return self.mismatch is None

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        mesh = self.mesh
        cut = f", {mesh.nodes} nodes" if mesh.nodes > 1 else ""
        calls = ", ".join(f"{kind} {count}" for kind, count in sorted(self.calls.items()))
        carriers = ", ".join(f"{name} {count}" for name, count in sorted(self.backends.items()))
        lines = [
            f"{self.stage} {self.preset}: {mesh.world} ranks = data {mesh.data} x tensor "
            f"{mesh.tensor} x pipeline {mesh.pipeline}{cut}; batch {self.batch:,}, "
            f"{_times(self.micro_batches, 'micro-batch', 'es')} a step",
            f"  {self.roles} roles ran {self.steps} steps with a validation and a save, and the "
            f"end of a run, on {self.device} in {self.seconds:.0f} s; rank 0: {calls}; by "
            f"{carriers}",
        ]
        if self.mismatch is not None:
            return [*lines, self.mismatch.report()]
        done = f"{self.operations:,} calls, {size_text(self.bytes)}"
        return [*lines, f"  all ranks match: {done} over all ranks"]


def rehearse(
    preset: str, stage: str, settings: Any, pool: Pool, runner: Runner = run_rank, jobs: int = 2
) -> Rehearsal:
    """Run each role of the settings' world, on the pool's device, and compare all ranks.

    Raises: RankError if a process of the rehearsal dies.
    """
    began = time.perf_counter()
    grid, ranks = Grid(settings.mesh), roles_of(settings.mesh)
    steps = 2 if settings.engine.zero_stage == 3 else 1  # ZeRO-3 prefetches from step 2
    tasks = [
        RankTask(stage=stage, settings=settings, rank=rank, steps=steps, device=pool.device)
        for rank in ranks
    ]
    name, world = f"rehearse {stage} {preset}", settings.mesh.world
    with (
        progress(f"{name}: ranks", len(tasks)) as meter,
        slow(f"{name}: {len(ranks)} of {world:,} ranks make their groups and steps"),
    ):
        sequences = {
            sequence.rank: sequence for sequence in pool.run(tasks, runner, jobs, meter.update)
        }
    with slow(f"{name}: comparing the calls of {world:,} ranks"):
        roles = Roles(grid, ranks)
        outcome = play(roles, sequences)
        mismatch = explain(roles, sequences, outcome)
    return Rehearsal(
        preset=preset,
        stage=stage,
        mesh=settings.mesh,
        batch=settings.loop.global_batch_size,
        micro_batches=settings.engine.gradient_accumulation_steps,
        steps=steps + 1,
        device=pool.device,
        roles=len(ranks),
        calls=dict(Counter(op.kind for op in sequences[0].operations)),
        backends=dict(Counter(op.backend for op in sequences[0].operations if op.backend)),
        operations=outcome.operations,
        bytes=outcome.bytes,
        seconds=time.perf_counter() - began,
        mismatch=mismatch,
    )


def checked(settings: Any, device: str = "cpu") -> Any:
    """Return the settings if they can be rehearsed on this kind of device.

    Raises: ConfigError with every problem of the settings.
    """
    on_gpus = settings.gpu_problems() if device == "cuda" else []
    check(settings.problems(settings.mesh.world) + on_gpus)
    if settings.mesh.world < 2:
        raise ConfigError("one rank has nobody to communicate with; give --world 2 or more")
    return settings


def roles_of(mesh: MeshConfig) -> list[int]:
    """The ranks to run, in an order that starts all stages together: they exchange shapes."""
    grid = Grid(mesh)
    stages, *sizes = grid.sizes
    second = {1} if stages == 1 else set()
    chosen = [sorted(({0} | second | {size - 1}) & set(range(size))) for size in sizes]
    return [grid.rank((stage, *others)) for others in product(*chosen) for stage in range(stages)]


def scaled(settings: Any, world: int) -> Any:
    """Scale settings to `world` ranks by the data-parallel degree.

    The global batch stays if each replica then has whole micro-batches of the same size; else each
    replica keeps its samples. If that makes more lanes, validation gets a sample for each.
    Raises: ConfigError if `world` is not a number of whole replicas, or with every problem of
    settings whose parts per replica are not defined.
    """
    if _without_parts(settings):
        check(settings.problems())
    mesh, batch = settings.mesh, settings.loop.global_batch_size
    block = mesh.tensor * mesh.pipeline
    if world < 1 or world % block:
        near = max(1, round(world / block)) * block
        raise ConfigError(
            f"{world} ranks are not a multiple of the {block} of a replica (tensor {mesh.tensor} x "
            f"pipeline {mesh.pipeline}); try --world {near}"
        )
    data = world // block
    nodes = max(1, data // mesh.local) if mesh.nodes > 1 else 1
    lanes, accumulate = settings.order.lanes, settings.engine.gradient_accumulation_steps
    held_out = settings.loop.validation_samples
    micro = batch // mesh.data // accumulate
    if batch % (data * micro) == 0 and lanes % data == 0:
        accumulate = batch // data // micro
    else:
        enough = held_out >= lanes  # too few before: stays so, and is reported
        batch, lanes = (max(1, count // mesh.data) * data for count in (batch, lanes))
        held_out = max(held_out, lanes) if enough else held_out
    return replace(
        settings,
        mesh=replace(mesh, data=data, nodes=nodes),
        loop=replace(settings.loop, global_batch_size=batch, validation_samples=held_out),
        order=replace(settings.order, lanes=lanes),
        engine=replace(settings.engine, gradient_accumulation_steps=accumulate),
    )


def _without_parts(settings: Any) -> list[str]:
    """Problems of a replica's parts of the mesh, the batch and the lanes."""
    loop, mesh = settings.loop, settings.mesh
    problems: list[str] = loop.problems() + mesh.problems(sizes=settings.sizes())
    if problems:
        return problems
    alone = EngineConfig(gradient_accumulation_steps=settings.engine.gradient_accumulation_steps)
    problems += settings.order.problems(loop.global_batch_size, mesh.data)
    return problems + alone.problems(
        loop.global_batch_size // mesh.data, MeshConfig(), compress=False
    )


def _times(count: int, what: str, more: str = "s") -> str:
    return f"{count} {what}" + (more if count > 1 else "")
