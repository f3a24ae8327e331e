"""Which precision fp32 matmuls use, chosen by measuring their error."""

import torch

PROBE_SIZE = 256
WORST_ERROR = 2e-6
"""Relative error against float64 that still counts as fp32 accuracy."""


def choose_matmul_precision(wanted: str) -> str:
    """Set torch's fp32 matmul precision and return its name.

    `auto` takes `medium` (up to twice as fast on CPUs) if a probe finds it accurate to fp32 here.
    """
    chosen = wanted
    if wanted == "auto":
        chosen = "medium" if _error("medium") < WORST_ERROR else "highest"
    torch.set_float32_matmul_precision(chosen)
    return chosen


def _error(precision: str) -> float:
    torch.set_float32_matmul_precision(precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draws = torch.Generator().manual_seed(0)
    shape = (PROBE_SIZE, PROBE_SIZE)
    a, b = (torch.randn(shape, generator=draws, device="cpu").to(device) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())
