"""Attention forward and backward against SDPA with the dense boolean mask, on one thread.

Batch 2, 8 heads, 256 text + 32x32 image tokens, 64 channels a head, fp32. Both sides run at the
same matmul precision, in turns; process CPU time. Outputs and gradients are compared as well. The
ceiling is the number of pairs that the dense mask computes over those that the mask allows.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import band_of, banded_attention
from models.masks import Kind, full_mask

BATCH, HEADS, TEXT, GRID, WIDTH, KERNEL = 2, 8, 256, 32, 64, 11
ROUNDS = 7
WANTED = {"row": 2.8, "column": 3.2, "conv": 2.3}
"""At the highest precision."""
KINDS: tuple[Kind, ...] = ("row", "column", "conv")


def run() -> list[dict[str, Any]]:
    """Rows of milliseconds; ratio = the dense mask's time over ours."""
    torch.set_num_threads(1)
    before = torch.get_float32_matmul_precision()
    rows = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            rows += [_row(kind, precision) for kind in KINDS]
    finally:
        torch.set_float32_matmul_precision(before)
    return rows


def _row(kind: Kind, precision: str) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    shape = (BATCH, TEXT + GRID * GRID, HEADS, WIDTH)
    q, k, v, grad = (torch.randn(shape, generator=draws).transpose(1, 2) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask, band = full_mask(kind, TEXT, GRID, KERNEL), band_of(kind, TEXT, GRID, KERNEL)

    def dense() -> list[Tensor]:
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def ours() -> list[Tensor]:
        out = banded_attention(*leaves, band)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    errors = [float((a - b).abs().max()) for a, b in zip(dense(), ours(), strict=True)]
    assert errors[0] < 1e-6 and max(errors) < 1e-5, errors
    times = [(_seconds(dense), _seconds(ours)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in times]
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    wanted = f", wanted {WANTED[kind]}x" if precision == "highest" else ""
    ceiling = mask.numel() / int(mask.sum())
    return {
        "name": f"{kind} attention, fp32 {precision}",
        "value": 1e3 * mine,
        "unit": "ms",
        "baseline": f"dense mask {1e3 * theirs:.0f} ms, ceiling by pairs {ceiling:.1f}x{wanted}",
        "ratio": theirs / mine,
        "spread": [min(ratios), max(ratios)],
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
