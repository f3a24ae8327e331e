"""A resblock pair of the 12B prior in bf16 against its own matmuls alone, on one thread.

Width 3968, 62 heads, 1,280 positions, forward and backward, gradients of states and weights. The
matmuls are those of its six matrices, three each (forward, states, weights), in bf16 on tensors
in memory; the block also has norms, attention under a row mask, GELU, and weights and
gradients in fp32. Attention's own products are not counted. Rounds take turns; medians.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.support.rows import bench_row
from bench.support.sizes import sized
from core.memory import keep_freed_memory
from models.config import PriorConfig
from models.initialization import init_normal
from models.prior import PriorBlock
from parallel.device import CPU
from parallel.tensor.ops import TensorParallel

CONFIG = PriorConfig(
    dim=sized(3968, 128), heads=sized(62, 2), layers=64, text_length=256, grid=sized(32, 8)
)
ROUNDS, TARGET = sized(3, 1), 0.8


def rows() -> list[dict[str, Any]]:
    """One row: GFLOP/s of the pair; ratio = over those of its matmuls alone."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dim, length = CONFIG.dim, CONFIG.length
    flops = 3 * 2 * 12 * dim**2 * length
    works = {"block": _block(), "matmuls": matmuls(dim, length, CPU)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, ROUNDS):
        for name, work in works.items():
            spent = _seconds(work)
            if turn >= 0:
                seconds[name].append(spent)
    ratios = [a / b for a, b in zip(seconds["matmuls"], seconds["block"], strict=True)]
    alone = flops / statistics.median(seconds["matmuls"]) / 1e9
    return [
        bench_row(
            "paper-size resblock pair, bf16",
            flops / statistics.median(seconds["block"]) / 1e9,
            "GFLOP/s",
            f"its own matmuls alone: {alone:.0f}, target {TARGET:g}",
            ratios,
        )
    ]


def _block() -> Callable[[], None]:
    block = PriorBlock(CONFIG, 1, TensorParallel())
    init_normal(block, 0, {"weight": CONFIG.dim**-0.5}, "block.")
    draws = torch.Generator().manual_seed(0)
    shape = (1, CONFIG.length, CONFIG.dim)
    x, grad = (torch.randn(shape, generator=draws) for _ in range(2))
    x.requires_grad_()

    def work() -> None:
        block.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        out.backward(grad)

    return work


def matmuls(dim: int, rows: int, device: torch.device) -> Callable[[], None]:
    """Three products of each of a resblock pair's six matrices, in bf16 on allocated tensors."""
    sizes = [(dim, dim)] * 4 + [(dim, 4 * dim), (4 * dim, dim)]

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    ready = [(made(rows, a), made(b, a), made(rows, b)) for a, b in sizes]

    def work() -> None:
        for states, weight, grad in ready:
            states @ weight.T
            grad @ weight
            grad.T @ states

    return work


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
