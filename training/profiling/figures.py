"""Figures of a rank for metrics.jsonl, and their aggregates over all ranks."""

import functools
import operator
import os
import resource
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.log import LOG
from parallel.device import wait_for
from training.profiling.categories import CATEGORIES

SLOW = 1.5
"""A rank is a straggler above this ratio of its own work to its peers' median."""
_PEAK_SIZE = {"cpu": 768, "cuda": 8192}
_PEAK_ROUNDS = 4
_STATM = Path("/proc/self/statm")


def measure_peak(precision: str, device: torch.device) -> float:
    """FLOP/s of a rank's device: the best of several square matmuls in the run's precision.

    The matrices are random, because GPUs multiply constant matrices faster, at less power. Set the
    precision of fp32 matmuls first. On a busy machine the result is too low.
    """
    on_gpu = device.type == "cuda"
    half = torch.float16 if precision == "fp16" and on_gpu else torch.bfloat16
    dtype = torch.float32 if precision == "fp32" else half
    size = _PEAK_SIZE["cuda" if on_gpu else "cpu"]
    draws = torch.Generator(device).manual_seed(0)
    shape = (size, size)
    a, b = (torch.randn(shape, generator=draws, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(1 + _PEAK_ROUNDS):
        began = time.perf_counter()
        torch.mm(a, b)
        wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def memory(device: torch.device) -> dict[str, int]:
    """Current and peak memory of this process and of its GPU, in bytes."""
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"memory_peak_bytes": most}
    if _STATM.exists():
        pages = int(_STATM.read_text().split()[1])
        figures["memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        figures["memory_peak_bytes"] = max(most, figures["memory_bytes"])
    if device.type == "cuda":
        figures["cuda_bytes"] = torch.cuda.memory_allocated(device)
        figures["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures


def memory_of(ranks: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The maximum of each memory figure over the ranks."""
    names = set.intersection(*(set(row["memory"]) for row in ranks))
    return {name: max(row["memory"][name] for row in ranks) for name in sorted(names)}


def over_peers(work: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """Each rank's work over the median of its peers, the other ranks of its stage; 1 without peers.

    Shapes: (ranks, steps) and (ranks,) -> (ranks, steps).
    """
    ratios = np.ones(work.shape)
    for stage in np.unique(stages):
        ours = stages == stage
        if ours.sum() > 1:
            ratios[ours] = work[ours] / np.maximum(_median_of_others(work[ours]), 1e-9)
    return ratios


def _median_of_others(work: np.ndarray) -> np.ndarray:
    """(ranks, steps): for each entry, the median of the others in its column."""
    count = len(work)
    ordered = np.sort(work, axis=0)
    place = work.argsort(0, kind="stable").argsort(0, kind="stable")

    def left(k: int) -> np.ndarray:
        """The k-th smallest of the other values."""
        taken: np.ndarray = np.where(k < place, ordered[k], ordered[k + 1])
        return taken

    median: np.ndarray = (left((count - 2) // 2) + left((count - 1) // 2)) / 2
    return median


def slowest(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The rank with the highest ratio of own work to its peers; empty for one rank."""
    if len(ranks) == 1:
        return {}
    busy = np.array([[row["busy"]] for row in ranks])
    ratios = over_peers(busy, np.array([row["stage"] for row in ranks]))[:, 0]
    worst = int(ratios.argmax())
    ratio = float(ratios[worst])
    if ratio > SLOW:
        LOG.info("rank %d takes %.1f times its peers' time for a step", worst, ratio)
    return {"slowest_rank": worst, "slowest_ratio": ratio}


def cores_of(device: torch.device) -> dict[str, Any]:
    """Host, cores and threads of a CPU rank, for `peaks_of`; empty for a GPU rank."""
    if device.type != "cpu":
        return {}
    mask = sum(1 << core for core in usable_cores())
    return {"host": socket.gethostname(), "cores": f"{mask:x}", "threads": torch.get_num_threads()}


def usable_cores() -> set[int]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def peaks_of(ranks: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(peak TFLOP/s of all ranks together, number of ranks that can compute at once).

    Ranks may share cores: of 8 ranks with one thread each on 2 cores, 2 compute at once. A
    machine's peak is its fastest rank's peak times the number of ranks that compute at once.
    """
    hosts: dict[str, list[dict[str, Any]]] = {}
    for i, row in enumerate(ranks):
        hosts.setdefault(row.get("host", f"device {i}"), []).append(row)
    peak = together = 0.0
    for rows in hosts.values():
        at_once = float(len(rows))
        if "cores" in rows[0]:
            cores = functools.reduce(operator.or_, (int(row["cores"], 16) for row in rows))
            threads = max(row["threads"] for row in rows)
            at_once = min(at_once, max(1.0, cores.bit_count() / threads))
        peak += at_once * max(row["peak"] for row in rows)
        together += at_once
    return peak, together


def speed_of(ranks: Sequence[dict[str, Any]], tflops: float) -> dict[str, float]:
    """Peak TFLOP/s of all ranks, and model TFLOP/s and MFU if known."""
    peak, together = peaks_of(ranks)
    if not peak:
        return {}
    share = {"model_tflops": tflops, "mfu": tflops / peak} if tflops else {}
    return {"peak_tflops": peak, "concurrent_ranks": together, **share}


def time_of(ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Seconds per step by category: mean over the ranks, and [maximum, its rank]."""
    columns = list(zip(*(row["seconds"] for row in ranks), strict=True))
    means = [round(statistics.fmean(column), 6) for column in columns]
    most = [[max(column), column.index(max(column))] for column in columns]
    return {
        "time": dict(zip(CATEGORIES, means, strict=True)),
        "time_max": dict(zip(CATEGORIES, most, strict=True)),
    }
