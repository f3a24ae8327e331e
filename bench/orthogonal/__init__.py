"""Orthogonalisation of PowerSGD's factors on this CPU: Householder's QR beside CholeskyQR2."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.support.rows import bench_row
from bench.support.sizes import sized
from parallel.compress.orthogonal import cholesky_qr2, householder

SHAPES: list[tuple[int, int, int]] = sized(
    [(8, 512, 64), (4, 1024, 64), (2, 2048, 128), (2, 3968, 112)], [(2, 64, 8)]
)
"""(matrices, rows, rank) of a stack; the last one is the paper's, over 8 shards."""
ROUNDS = sized(9, 2)


def run() -> list[dict[str, Any]]:
    """One row a shape, in milliseconds of CPU time; ratio > 1 means CholeskyQR2 is faster."""
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        draws = torch.Generator().manual_seed(0)
        p = torch.randn(shape, generator=draws, device="cpu")
        pairs = [(_spent(householder, p), _spent(cholesky_qr2, p)) for _ in range(ROUNDS + 1)][1:]
        theirs, ours = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(
            bench_row(
                f"CholeskyQR2, {shape[0]} of {shape[1]} x {shape[2]}",
                ours,
                "ms",
                f"Householder {theirs:.2f} ms",
                [a / b for a, b in pairs],
            )
        )
    return rows


def _spent(function: Callable[[torch.Tensor], Any], p: torch.Tensor) -> float:
    begin = time.process_time()
    function(p)
    return time.process_time() - begin
