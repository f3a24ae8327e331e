"""What the profile of a run says: where time went, how fast it was, and what to do about it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError
from core.settings import from_json
from parallel.precision import choose_matmul_precision
from training.config import StageConfig
from training.main import SETTINGS
from training.profile_advice import warnings_for
from training.profile_categories import CATEGORIES, CHECKPOINT, OWN, VALIDATION
from training.profile_figures import measure_peak
from training.profile_flops import model_flops
from training.profile_ring import RankSteps, read_rings
from training.run_config import config_of
from training.run_folder import read_metrics


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
    tokens_per_second: float
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
    """Each rank's own work over the median of its stage, 1 = as its peers."""
    warnings: list[str]
    predicted: dict[str, float] | None = None
    """A plan's seconds by category."""


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What a run folder holds about its time."""

    run: Path
    stage: str
    settings: StageConfig
    model: Any
    rows: list[dict[str, Any]]
    """Of training, from metrics.jsonl."""
    ranks: int
    stages: np.ndarray
    """(ranks,) place in the pipeline."""
    steps: np.ndarray
    """(steps,) numbers of the steps."""
    seconds: np.ndarray
    """(ranks, steps, categories)."""

    def own(self) -> np.ndarray:
        """Each rank's own work over the median of its stage's at that step, (ranks, steps)."""
        columns = [CATEGORIES.index(name) for name in OWN]
        work = self.seconds[:, :, columns].sum(2)
        found = np.ones_like(work)
        for stage in np.unique(self.stages):
            peers = self.stages == stage
            found[peers] = work[peers] / np.maximum(np.median(work[peers], 0), 1e-9)
        return found


def read_profile(run: Path, last: int = 0) -> Profiled:
    """The last steps of a run, finished or in progress; 0 = all that are kept.

    Raises: InputError for no run folder, or one without a profile.
    """
    body = config_of(run)
    stage = body.pop("stage")
    settings = from_json(SETTINGS[stage], body)
    rows = [row for row in read_metrics(run) if "split" not in row]
    rings = read_rings(run)
    if not rings or not min(len(ring.steps) for ring in rings):
        raise InputError(
            f"{run} holds no profile; train a step at least, without --profile.no-always"
        )
    steps, seconds = _together(rings, last)
    return Profiled(
        run=run,
        stage=stage,
        settings=settings,
        model=settings.model,  # type: ignore[attr-defined]
        rows=rows,
        ranks=rings[0].ranks,
        stages=np.array([ring.stage for ring in rings]),
        steps=steps,
        seconds=seconds,
    )


def _together(rings: Sequence[RankSteps], last: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all ranks have, and their seconds."""
    steps = rings[0].steps
    for ring in rings[1:]:
        steps = np.intersect1d(steps, ring.steps)
    steps = steps[-last:] if last else steps
    rows = [ring.seconds[np.searchsorted(ring.steps, steps)] for ring in rings]
    return steps, np.stack(rows).astype(np.float64)


def report_of(found: Profiled, peak: float, plan: dict[str, float] | None) -> Report:
    """Sum a profile up; `peak` is one device's TFLOP/s, 0 = what the run measured."""
    seconds = found.seconds.sum(2).mean()
    apart = [CATEGORIES.index(name) for name in (CHECKPOINT, VALIDATION)]
    training = seconds - found.seconds[:, :, apart].sum(2).mean()
    flops = found.settings.loop.batch * model_flops(found.model)
    total, source = _peak(found, peak)
    tokens = _tokens_a_step(found.rows)
    ratios = np.median(found.own(), 1)
    time = {name: _spent(found.seconds[:, :, i], seconds) for i, name in enumerate(CATEGORIES)}
    return Report(
        run=str(found.run),
        stage=found.stage,
        ranks=found.ranks,
        first_step=int(found.steps[0]),
        last_step=int(found.steps[-1]),
        steps=len(found.steps),
        time=time,
        seconds=float(seconds),
        steps_per_second=float(1 / seconds),
        tokens_per_second=float(tokens / seconds),
        model_flops=float(flops),
        model_tflops=float(flops / training / 1e12),
        peak_tflops=total,
        peak_source=source,
        mfu=float(flops / training / 1e12 / total),
        collectives=_traffic(found.rows),
        slow_ranks={rank: float(ratio) for rank, ratio in enumerate(ratios)},
        warnings=warnings_for(
            found.settings, {name: row.share for name, row in time.items()}, ratios
        ),
        predicted=plan,
    )


def _spent(seconds: np.ndarray, whole: float) -> Spent:
    mean = float(seconds.mean())
    return Spent(
        mean=mean,
        p50=float(np.quantile(seconds, 0.5)),
        p99=float(np.quantile(seconds, 0.99)),
        share=mean / max(float(whole), 1e-12),
        slowest_rank=int(seconds.mean(1).argmax()),
    )


def _peak(found: Profiled, peak: float) -> tuple[float, str]:
    """TFLOP/s of all ranks, and where the figure comes from."""
    if peak:
        return peak * found.ranks, "given"
    noted = [row["peak_tflops"] for row in found.rows if "peak_tflops" in row]
    if noted:
        return float(noted[-1]), "of the run"
    choose_matmul_precision(found.settings.engine.matmul_precision)
    here = measure_peak(found.settings.engine.precision) / 1e12
    return here * found.ranks, "measured on this machine now"


def _tokens_a_step(rows: Sequence[dict[str, Any]]) -> float:
    return rows[-1]["tokens_per_second"] * rows[-1]["seconds"] if rows else 0.0


def _traffic(rows: Sequence[dict[str, Any]]) -> list[Traffic]:
    """Collectives by group and operation, a step; the longest first."""
    noted = [row for row in rows if row.get("comm_seconds")]
    found = []
    for group, operation in sorted(
        {(g, op) for row in noted for g, part in row["comm_seconds"].items() for op in part}
    ):
        counts = [row["comm"].get(group, {}).get(operation, {}) for row in noted]
        taken = [row["comm_seconds"].get(group, {}).get(operation, 0.0) for row in noted]
        found.append(
            Traffic(
                group=group,
                operation=operation,
                calls=statistics.fmean(count.get("calls", 0) for count in counts),
                bytes=statistics.fmean(count.get("bytes", 0) for count in counts),
                seconds=statistics.fmean(taken),
            )
        )
    return sorted(found, key=lambda row: -row.seconds)
