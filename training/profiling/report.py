"""The report of a run's profile: time by category, speed, and warnings with remedies."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError
from parallel.device import worker_device
from parallel.precision import engine_numerics
from training.config import StageConfig
from training.profiling.advice import warnings_for
from training.profiling.categories import CATEGORIES, CHECKPOINT, OWN, VALIDATION
from training.profiling.figures import cores_of, measure_peak, over_peers, peaks_of
from training.profiling.flops import model_flops
from training.profiling.plan import Planned, read_plan
from training.profiling.ring import RankSteps, read_rings
from training.run.config import settings_of_run
from training.run.folder import read_rows
from training.run.metrics import passed_over

_MOST_NAMED = 8
"""Maximum ranks that a message names."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A category's time over all ranks. Units: seconds per step."""

    mean: float
    p50: float
    p99: float
    share: float
    """Fraction of the whole time."""
    slowest_rank: int
    """The rank that spent most on it."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of collective, per step, on rank 0."""

    group: str
    operation: str
    calls: float
    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of `tapir profile`."""

    run: str
    stage: str
    ranks: int
    first_step: int
    last_step: int
    steps: int
    """Number of steps that the figures cover."""
    time: dict[str, Spent]
    seconds: float
    """Mean per step, including its share of validation and saves."""
    steps_per_second: float
    tokens_per_second: float | None
    """None if no row of metrics.jsonl has the number of tokens."""
    model_flops: float
    """Per step."""
    model_tflops: float
    """Achieved TFLOP/s, excluding validation and saves."""
    peak_tflops: float
    """Peak of all ranks together."""
    peak_source: str
    mfu: float
    collectives: list[Traffic]
    slow_ranks: dict[int, float]
    """Own work of each rank over the median of its peers, the other ranks of its stage."""
    missing: list[str]
    """Data missing in the run folder; figures are then absent, or cover only some ranks."""
    warnings: list[str]
    predicted: dict[str, float] | None = None
    """A plan's seconds per step by category."""
    predicted_for: str = ""
    """The hardware of the plan."""


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """The profile data of a run folder."""

    run: Path
    stage: str
    settings: StageConfig
    model: Any
    rows: list[dict[str, Any]]
    """Training rows of metrics.jsonl for these steps."""
    ranks: int
    """Number of ranks of the run."""
    numbers: np.ndarray
    """(files,) ranks with a profile file."""
    stages: np.ndarray
    """(files,) pipeline stage."""
    steps: np.ndarray
    """(steps,) step numbers."""
    seconds: np.ndarray
    """(files, steps, categories)."""
    missing: list[str]
    """Data missing in the run folder."""

    def own(self) -> np.ndarray:
        """Each rank's own work over its peers' at each step, (files, steps)."""
        columns = [CATEGORIES.index(name) for name in OWN]
        return over_peers(self.seconds[:, :, columns].sum(2), self.stages)


def profile_of(run: Path, last: int, peak: float, plan: Path | None) -> tuple[Profiled, Report]:
    """Read and report the last steps of a run, with a plan's prediction if given.

    Raises: InputError if it is not a run folder, has no profile, or the plan is for another run.
    """
    profiled = read_profile(run, last)
    on_gpu = any("cuda_bytes" in row for row in profiled.rows) if profiled.rows else None
    planned = read_plan(plan, profiled.settings, on_gpu) if plan else None
    return profiled, report_of(profiled, peak, planned)


def read_profile(run: Path, last: int = 0) -> Profiled:
    """Read the last steps of a run, finished or in progress; 0 = all recorded steps.

    Raises: InputError if it is not a run folder, or has no profile.
    """
    stage, settings = settings_of_run(run)
    rings = [ring for ring in read_rings(run) if len(ring.steps)]
    if not rings:
        raise InputError(
            f"{run} holds no profile; train a step at least, without --profile.no-always (a "
            "damaged profile/rank-0.bin is rewritten when the run resumes)"
        )
    steps, seconds = _together(rings, last)
    if not len(steps):
        raise InputError(
            f"{run} holds no common steps of its {len(rings)} ranks: their files are of different "
            "times; train a step at least"
        )
    rows, bad = read_rows(run)
    rows = [row for row in rows if "split" not in row]
    numbers = np.array([ring.rank for ring in rings])
    missing = _missing_ranks(rings[0].ranks, numbers.tolist())
    missing += ["no row of training in metrics.jsonl: no collectives, no tokens"] * (not rows)
    missing += [passed_over(bad)] * bool(bad)
    return Profiled(
        run=run,
        stage=stage,
        settings=settings,
        model=settings.model,  # type: ignore[attr-defined]
        rows=rows_of_steps(rows, int(steps[0]), int(steps[-1])),
        ranks=rings[0].ranks,
        numbers=numbers,
        stages=np.array([ring.stage for ring in rings]),
        steps=steps,
        seconds=seconds,
        missing=missing,
    )


def _missing_ranks(ranks: int, present: list[int]) -> list[str]:
    lacking = ranks - len(present)
    if not lacking:
        return []
    absent = [rank for rank in range(len(present) + _MOST_NAMED) if rank not in present]
    named = absent[:_MOST_NAMED]
    text = ", ".join(str(rank) for rank in named if rank < ranks)
    return [
        f"the profile of {lacking} of {ranks} ranks is missing, empty or damaged (rank {text}"
        f"{', ...' if lacking > _MOST_NAMED else ''}): the figures are those of the others"
    ]


def rows_of_steps(rows: list[dict[str, Any]], first: int, last: int) -> list[dict[str, Any]]:
    """The rows that cover these steps, else the last row; a row covers those since the previous."""
    earlier = [0, *(row["step"] for row in rows)]
    told = [row for row, before in zip(rows, earlier, strict=False) if before < last]
    return [row for row in told if row["step"] >= first] or rows[-1:]


def _together(rings: Sequence[RankSteps], last: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps recorded by all ranks, and their seconds."""
    steps = rings[0].steps
    for ring in rings[1:]:
        steps = np.intersect1d(steps, ring.steps)
    steps = steps[-last:] if last else steps
    rows = [ring.seconds[np.searchsorted(ring.steps, steps)] for ring in rings]
    return steps, np.stack(rows).astype(np.float64)


def report_of(profiled: Profiled, peak: float, plan: Planned | None) -> Report:
    """Summarise a profile; `peak` is one device's TFLOP/s, 0 = as measured by the run."""
    seconds = max(profiled.seconds.sum(2).mean(), 1e-9)
    apart = [CATEGORIES.index(name) for name in (CHECKPOINT, VALIDATION)]
    training = max(seconds - profiled.seconds[:, :, apart].sum(2).mean(), 1e-9)
    flops = profiled.settings.loop.global_batch_size * model_flops(profiled.model)
    total, source = _peak(profiled, peak)
    tokens = _tokens_a_step(profiled.rows)
    medians = np.median(profiled.own(), 1)
    ratios = {int(n): float(r) for n, r in zip(profiled.numbers, medians, strict=True)}
    time = {
        name: _spent(profiled.seconds[:, :, i], seconds, profiled.numbers)
        for i, name in enumerate(CATEGORIES)
    }
    shares = {name: row.share for name, row in time.items()}
    return Report(
        run=str(profiled.run),
        stage=profiled.stage,
        ranks=profiled.ranks,
        first_step=int(profiled.steps[0]),
        last_step=int(profiled.steps[-1]),
        steps=len(profiled.steps),
        time=time,
        seconds=float(seconds),
        steps_per_second=float(1 / seconds),
        tokens_per_second=None if tokens is None else float(tokens / seconds),
        model_flops=float(flops),
        model_tflops=float(flops / training / 1e12),
        peak_tflops=total,
        peak_source=source,
        mfu=float(flops / training / 1e12 / total),
        collectives=_traffic(profiled.rows),
        slow_ranks=ratios,
        missing=profiled.missing,
        warnings=warnings_for(profiled.settings, shares, ratios),
        predicted=plan.seconds if plan else None,
        predicted_for=plan.gpu if plan else "",
    )


def _spent(seconds: np.ndarray, whole: float, numbers: np.ndarray) -> Spent:
    mean = float(seconds.mean())
    return Spent(
        mean=mean,
        p50=float(np.quantile(seconds, 0.5)),
        p99=float(np.quantile(seconds, 0.99)),
        share=mean / max(float(whole), 1e-12),
        slowest_rank=int(numbers[seconds.mean(1).argmax()]),
    )


def _peak(profiled: Profiled, peak: float) -> tuple[float, str]:
    """Peak TFLOP/s of all ranks, and the source of the figure."""
    together = [row["concurrent_ranks"] for row in profiled.rows if row.get("concurrent_ranks")]
    if peak:
        return peak * (together[-1] if together else profiled.ranks), "given"
    noted = [row["peak_tflops"] for row in profiled.rows if row.get("peak_tflops")]
    if noted:
        return float(noted[-1]), "of the run"
    device = worker_device()
    engine_numerics(device, profiled.settings.engine)
    here = measure_peak(profiled.settings.engine.precision, device) / 1e12
    rank = {"peak": here, **cores_of(device)}
    return peaks_of([rank] * profiled.ranks)[0], "measured on this machine now"


def _tokens_a_step(rows: Sequence[dict[str, Any]]) -> float | None:
    noted = [row for row in rows if {"tokens_per_second", "seconds"} <= row.keys()]
    if not noted:
        return None
    return statistics.fmean(row["tokens_per_second"] * row["seconds"] for row in noted)


def _traffic(rows: Sequence[dict[str, Any]]) -> list[Traffic]:
    """Collectives per step by group and operation, longest first.

    Collectives between steps (a row's gather, replica comparisons) are excluded.
    """
    noted = [row for row in rows if row.get("comm_seconds") and "comm" in row]
    traffic = []
    for group, operation in sorted(
        {(g, op) for row in noted for g, part in row["comm"].items() for op in part}
    ):
        counts = [row["comm"].get(group, {}).get(operation, {}) for row in noted]
        taken = [row["comm_seconds"].get(group, {}).get(operation, 0.0) for row in noted]
        traffic.append(
            Traffic(
                group=group,
                operation=operation,
                calls=statistics.fmean(count.get("calls", 0) for count in counts),
                bytes=statistics.fmean(count.get("bytes", 0) for count in counts),
                seconds=statistics.fmean(taken),
            )
        )
    return sorted(traffic, key=lambda row: -row.seconds)
