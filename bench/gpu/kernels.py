"""The card's ceilings, and attention against dense masks."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.report import GpuReport, Target, at_least, rates, relative, seconds
from models.attention.banded import band_of, banded_attention
from models.attention.flexible import flexible_attention
from models.attention.masks import Kind, full_mask

KINDS: tuple[Kind, ...] = ("row", "column", "conv")
CLOSE = {torch.bfloat16: 1e-2, torch.float32: 2e-6}
"""Largest relative error of outputs and gradients against float64 and a dense mask."""
COPIES = {"H200": 4300.0}
"""GB/s that a copy must reach, by a part of the card's name; others: 3000."""


def ceilings(report: GpuReport) -> None:
    """A large matmul and a large copy, on random numbers."""
    device, tiny = report.device, report.tiny
    side = 256 if tiny else 8192
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    rate, every = rates(2 * side**3 / 1e12, seconds(lambda: a @ b, device))
    where = "data sheet 989"
    report.row(
        f"bf16 matmul of {side}", rate, "TFLOP/s", at_least(790), baseline=where, spread=every
    )
    side = 256 if tiny else 4096
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    rate, every = rates(2 * side**3 / 1e12, seconds(lambda: a @ b, device))
    report.row(f"fp32 matmul of {side}, without TF32", rate, "TFLOP/s", spread=every)
    rate, every = copy_rates(report)
    target = next((least for name, least in COPIES.items() if name in _card(device)), 3000.0)
    report.row(
        "copy, read and written",
        rate / 1e9,
        "GB/s",
        at_least(target),
        baseline="data sheet 3350 (H200 4800)",
    )
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        about = f"{_card(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        report.row("memory of the card", memory, "GiB", baseline=about)


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def copy_rates(report: GpuReport) -> tuple[float, list[float]]:
    """Bytes a second of a copy larger than any cache, counting reads and writes."""
    x = torch.randn(2**18 if report.tiny else 2**29, device=report.device)
    y = torch.empty_like(x)
    return rates(2 * x.nbytes, seconds(lambda: y.copy_(x), report.device))


def attention_of(device: torch.device) -> Callable[..., Tensor]:
    """What a prior runs on that device."""
    if device.type == "cuda":
        return flexible_attention

    def banded(q: Tensor, k: Tensor, v: Tensor, *shape: int) -> Tensor:
        return banded_attention(q, k, v, band_of(*shape))  # type: ignore[arg-type]

    return banded


def attention_equals_dense(report: GpuReport) -> None:
    """Outputs and gradients of each mask against a dense one in float64 on the CPU."""
    text, grid = (8, 8) if report.tiny else (256, 32)
    ours = attention_of(report.device)
    draws = torch.Generator().manual_seed(1)
    shape = (1, 2, text + grid * grid, 64)
    q, k, v, grad = (torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(4))
    for kind in KINDS:
        exact = _with_gradients((q, k, v, grad), partial(_dense, kind=kind, text=text, grid=grid))
        for dtype, bound in CLOSE.items():
            there = [x.to(report.device, dtype) for x in (q, k, v, grad)]
            ours_here = _with_gradients(there, lambda *x, kind=kind: ours(*x, kind, text, grid, 11))
            worst = max(relative(a, b) for a, b in zip(ours_here, exact, strict=True))
            name = f"{kind} attention, {str(dtype).removeprefix('torch.')}"
            report.row(name, worst, "relative error", Target(most=bound))


def _with_gradients(tensors: Sequence[Tensor], attend: Callable[..., Tensor]) -> list[Tensor]:
    """The output and gradients of q, k and v; `tensors` are these and the output's gradient."""
    *inputs, grad = tensors
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def _dense(q: Tensor, k: Tensor, v: Tensor, kind: Kind, text: int, grid: int) -> Tensor:
    mask = full_mask(kind, text, grid, 11).to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention(report: GpuReport) -> None:
    """Forward and backward at the 12B prior's sizes: ours, the dense mask, causal flash."""
    text, grid, batch, heads = (8, 8, 1, 2) if report.tiny else (256, 32, 4, 62)
    length, device = text + grid * grid, report.device
    ours, shape = attention_of(device), (batch, heads, length, 64)
    q, k, v, grad = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(4))

    def timed(attend: Callable[..., Tensor]) -> float:
        spent = seconds(lambda: _with_gradients((q, k, v, grad), attend), device)
        return statistics.median(spent)

    causal = timed(partial(F.scaled_dot_product_attention, is_causal=True))
    flops = 3.5 * 4 * 64 * batch * heads
    rate = flops * length**2 / 2 / causal / 1e12
    report.row("causal flash", causal * 1e3, "ms", baseline=f"{rate:.0f} TFLOP/s, FA3 265 to 291")
    for kind in KINDS:
        dense = timed(partial(_dense, kind=kind, text=text, grid=grid))
        mine = timed(lambda *x, kind=kind: ours(*x, kind, text, grid, 11))
        pairs = int(full_mask(kind, text, grid, 11).sum())
        rate = flops * pairs / mine / 1e12
        beside = f"{mine * 1e3:.2f} ms, {rate:.0f} TFLOP/s of allowed pairs"
        report.row(
            f"{kind}: dense mask over ours", dense / mine, "x", at_least(2.0), baseline=beside
        )
        report.row(f"{kind}: causal flash over ours", causal / mine, "x", at_least(1.0))
