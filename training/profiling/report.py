"""What the profile of a run says: where time went, how fast it was, and what to do about it."""

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
"""Ranks of a list that are named."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a category took of the steps, over all ranks. Units: seconds a step."""

    mean: float
    p50: float
    p99: float
    share: float
    """Of the whole time."""
    slowest_rank: int
    """The rank that spent most on it."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of collective, a step, as rank 0 sees it."""

    group: str
    operation: str
    calls: float
    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `tapir profile` shows."""

    run: str
    stage: str
    ranks: int
    first_step: int
    last_step: int
    steps: int
    """Steps that the figures are taken over."""
    time: dict[str, Spent]
    seconds: float
    """Mean of a step, with its part of validation and saves."""
    steps_per_second: float
    tokens_per_second: float | None
    """None if no row of metrics.jsonl says how many tokens a step has."""
    model_flops: float
    """Of a step."""
    model_tflops: float
    """A second, over steps without validation and saves."""
    peak_tflops: float
    """Of all ranks."""
    peak_source: str
    mfu: float
    collectives: list[Traffic]
    slow_ranks: dict[int, float]
    """Each rank's own work over the median of its peers', the other ranks of its stage."""
    missing: list[str]
    """What the run folder lacks, so that figures are missing or come from some ranks alone."""
    warnings: list[str]
    predicted: dict[str, float] | None = None
    """A plan's seconds by category."""
    predicted_for: str = ""
    """The hardware that the plan was made for."""


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What a run folder holds about its time."""

    run: Path
    stage: str
    settings: StageConfig
    model: Any
    rows: list[dict[str, Any]]
    """Of training, from metrics.jsonl, that tell of these steps."""
    ranks: int
    """Of the run."""
    numbers: np.ndarray
    """(found,) numbers of the ranks whose files are there."""
    stages: np.ndarray
    """(found,) place in the pipeline."""
    steps: np.ndarray
    """(steps,) numbers of the steps."""
    seconds: np.ndarray
    """(found, steps, categories)."""
    missing: list[str]
    """What the folder lacks."""

    def own(self) -> np.ndarray:
        """Each rank's own work over its peers' at that step, (found, steps)."""
        columns = [CATEGORIES.index(name) for name in OWN]
        return over_peers(self.seconds[:, :, columns].sum(2), self.stages)


def profile_of(run: Path, last: int, peak: float, plan: Path | None) -> tuple[Profiled, Report]:
    """The last steps of a run and what they say, beside what a plan file predicted.

    Raises: InputError for no run folder, one without a profile, or another run's plan.
    """
    profiled = read_profile(run, last)
    on_gpu = any("cuda_bytes" in row for row in profiled.rows) if profiled.rows else None
    planned = read_plan(plan, profiled.settings, on_gpu) if plan else None
    return profiled, report_of(profiled, peak, planned)


def read_profile(run: Path, last: int = 0) -> Profiled:
    """The last steps of a run, finished or in progress; 0 = all that are kept.

    Raises: InputError for no run folder, or one without a profile.
    """
    stage, settings = settings_of_run(run)
    rings = [ring for ring in read_rings(run) if len(ring.steps)]
    if not rings:
        raise InputError(
            f"{run} holds no profile; train a step at least, without --profile.no-always (a "
            "damaged profile/rank-0.bin is written anew when the run resumes)"
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
    """The rows that tell of some steps, each of those since the row before; else the last one."""
    earlier = [0, *(row["step"] for row in rows)]
    told = [row for row, before in zip(rows, earlier, strict=False) if before < last]
    return [row for row in told if row["step"] >= first] or rows[-1:]


def _together(rings: Sequence[RankSteps], last: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all ranks have, and their seconds."""
    steps = rings[0].steps
    for ring in rings[1:]:
        steps = np.intersect1d(steps, ring.steps)
    steps = steps[-last:] if last else steps
    rows = [ring.seconds[np.searchsorted(ring.steps, steps)] for ring in rings]
    return steps, np.stack(rows).astype(np.float64)


def report_of(profiled: Profiled, peak: float, plan: Planned | None) -> Report:
    """Sum a profile up; `peak` is one device's TFLOP/s, 0 = what the run measured."""
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
    """TFLOP/s of all ranks, and where the figure comes from."""
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
    """Collectives of a step by group and operation; the longest first.

    What is called between steps alone (a row's own gather, comparisons) is not one of a step.
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
