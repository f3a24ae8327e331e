"""Figures of a rank for the rows of metrics.jsonl, and what they come to over all ranks."""

import os
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.log import LOG
from training.profile_categories import CATEGORIES

SLOW = 1.5
"""A rank whose own work takes so many times the median of its stage's is a straggler."""
_PEAK_SIZE = {"cpu": 768, "cuda": 8192}
_PEAK_ROUNDS = 4
_STATM = Path("/proc/self/statm")


def measure_peak(precision: str) -> float:
    """FLOP/s of this rank's device at a square matmul in the run's precision, the best of some.

    Set the precision of fp32 matmuls first. On a machine that does other work it is too low.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if precision == "fp16" and device == "cuda" else torch.bfloat16
    dtype = torch.float32 if precision == "fp32" else half
    size = _PEAK_SIZE[device]
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(1 + _PEAK_ROUNDS):
        began = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def memory() -> dict[str, int]:
    """Bytes of this process now and at most, and of its GPU."""
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory_peak_bytes": most}
    if _STATM.exists():
        pages = int(_STATM.read_text().split()[1])
        found["memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        found["memory_peak_bytes"] = max(most, found["memory_bytes"])
    if torch.cuda.is_available():
        found["cuda_bytes"] = torch.cuda.memory_allocated()
        found["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def memory_of(ranks: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The largest of all ranks, each figure by itself."""
    names = set.intersection(*(set(row["memory"]) for row in ranks))
    return {name: max(row["memory"][name] for row in ranks) for name in sorted(names)}


def slowest(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The rank whose own work took longest beside its stage's median; nothing for one rank."""
    if len(ranks) == 1:
        return {}
    medians = {
        stage: statistics.median(row["busy"] for row in ranks if row["stage"] == stage)
        for stage in {row["stage"] for row in ranks}
    }
    ratios = [row["busy"] / max(medians[row["stage"]], 1e-9) for row in ranks]
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    if ratios[worst] > SLOW and len(ranks) > 2:
        LOG.info("rank %d takes %.1f times its peers' time for a step", worst, ratios[worst])
    return {"slowest_rank": worst, "slowest_ratio": ratios[worst]}


def speed_of(ranks: Sequence[dict[str, Any]], tflops: float) -> dict[str, float]:
    """Model TFLOP/s of a step, and their share of the peaks of all ranks; nothing if unknown."""
    peak = sum(row["peak"] for row in ranks)
    if not tflops or not peak:
        return {}
    return {"model_tflops": tflops, "peak_tflops": peak, "mfu": tflops / peak}


def time_of(ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Seconds of a step by category: the mean over the ranks, and the most with its rank."""
    columns = list(zip(*(row["seconds"] for row in ranks), strict=True))
    means = [round(statistics.fmean(column), 6) for column in columns]
    most = [[max(column), column.index(max(column))] for column in columns]
    return {
        "time": dict(zip(CATEGORIES, means, strict=True)),
        "time_max": dict(zip(CATEGORIES, most, strict=True)),
    }
