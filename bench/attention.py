"""Attention forward and backward against SDPA with the dense boolean mask, on one thread.

Batch 2, 8 heads, 256 text + 32x32 image tokens, 64 channels a head, fp32. Both sides run at the
same matmul precision, in turns; process CPU time. Outputs and gradients are compared as well,
within the rounding error of that precision. The ceiling is the number of pairs that the dense mask
computes over those that the mask allows.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.support.rows import bench_row
from bench.support.sizes import sized
from models.attention.banded import band_of, banded_attention
from models.attention.masks import Kind, full_mask

BATCH, HEADS, WIDTH, KERNEL = 2, 8, 64, 11
TEXT, GRID = sized((256, 32), (64, 16))
ROUNDS = sized(7, 1)
BITS = {"highest": 24, "medium": 8}
"""Significant bits that torch promises for the operands of an fp32 matmul: medium may be bf16."""
TARGETS = {"row": 2.8, "column": 3.2, "conv": 2.3}
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
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    def ours() -> list[Tensor]:
        out = banded_attention(q, k, v, band)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    bounds = rounding([x[:1, :1] for x in (q, k, v, grad)], mask, BITS[precision])
    errors = differences(dense(), ours())
    assert all(a < b for a, b in zip(errors, bounds, strict=True)), (kind, errors, bounds)
    times = [(_seconds(dense), _seconds(ours)) for _ in range(ROUNDS)]
    ratios = [a / b for a, b in times]
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    target = f", target {TARGETS[kind]}x" if precision == "highest" else ""
    ceiling = mask.numel() / int(mask.sum())
    return bench_row(
        f"{kind} attention, fp32 {precision}",
        1e3 * mine,
        "ms",
        f"dense mask {1e3 * theirs:.0f} ms, ceiling by pairs {ceiling:.1f}x{target}",
        ratios,
        ratio=theirs / mine,
    )


def differences(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """For each pair of tensors, the norm of the difference over the norm of the first."""
    with torch.no_grad():
        return [float((x - y).norm() / x.norm()) for x, y in zip(a, b, strict=True)]


def rounding(inputs: Sequence[Tensor], mask: Tensor, bits: int) -> list[float]:
    """Bounds of `differences` between two implementations, from the number format alone.

    One bound each for the output and the gradients of q, k and v; `inputs` are q, k, v and the
    output's gradient. A matmul rounds its operands to `bits`; the effect is computed in float64, as
    the difference between products of rounded and of exact operands. Sums are in fp32: a sum of n
    terms rounds n times, each time by at most 2^-24 / sqrt(3) of it (root mean square). A result
    passes through at most 4 products; independent errors add in quadrature. Both implementations
    have this error, hence the factor of two. The bound does not depend on the CPU.
    """
    q, k, v, grad = (x.detach().double() for x in inputs)
    exact = _products(q, k, v, grad, mask, 53)
    own = differences(exact, _products(q, k, v, grad, mask, bits))
    sums = math.sqrt(4 * len(mask) / 3) * 2**-24
    return [2 * (error + sums) for error in own]


def _products(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor, bits: int
) -> list[Tensor]:
    """Output and gradients by the definition; operands of products are rounded to `bits`."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return _rounded(a, bits) @ _rounded(b, bits)

    scale = q.shape[-1] ** -0.5
    scores = scale * product(q, k.mT)
    shares = scores.masked_fill(~mask, -math.inf).softmax(-1)
    of_shares = product(grad, v.mT)
    of_scores = scale * shares * (of_shares - (shares * of_shares).sum(-1, keepdim=True))
    of_q, of_k = product(of_scores, k), product(of_scores.mT, q)
    return [product(shares, v), of_q, of_k, product(shares.mT, grad)]


def _rounded(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(
        torch.round(torch.ldexp(mantissa, torch.tensor(bits, device=x.device))), exponent - bits
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
