"""Error bounds of benchmarks hold on every CPU, also on one that computes fp32 matmuls in bf16."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.attention import BITS, KINDS, differences, rounding
from models.attention.banded import band_of, banded_attention
from models.attention.masks import Kind, full_mask

TEXT, GRID, KERNEL = 24, 8, 11


class MatmulsInBf16(TorchDispatchMode):
    """Emulates Intel CPUs with AMX: fp32 matmuls at `medium` round inputs to bf16, sum in fp32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            *others, a, b = args
            args = (*others, *(x.to(torch.bfloat16).float() for x in (a, b)))
        return func(*args, **(kwargs or {}))


def _run(kind: Kind, forget: bool = False) -> tuple[list[float], dict[str, list[float]]]:
    draws = torch.Generator().manual_seed(0)
    shape = (2, TEXT + GRID * GRID, 3, 64)
    *inputs, grad = (torch.randn(shape, generator=draws).transpose(1, 2) for _ in range(4))
    leaves = [x.requires_grad_() for x in inputs]
    mask = full_mask(kind, TEXT, GRID, KERNEL)
    band = replace(band_of(kind, TEXT, GRID, KERNEL), dense=None)  # tiled, as for long streams
    bounds = {n: rounding([*inputs, grad], mask, bits) for n, bits in BITS.items()}
    if forget:
        mask = mask.clone()
        mask[TEXT + 5, 3] = False

    def output_and_gradients(out: torch.Tensor) -> list[torch.Tensor]:
        return [out, *torch.autograd.grad(out, leaves, grad)]

    dense = output_and_gradients(F.scaled_dot_product_attention(*leaves, attn_mask=mask))
    return differences(dense, output_and_gradients(banded_attention(*leaves, band))), bounds


@pytest.mark.parametrize("kind", KINDS)
def test_attention_differs_by_what_its_precision_rounds(kind: Kind) -> None:
    errors, bounds = _run(kind)
    assert all(a < b for a, b in zip(errors, bounds["highest"], strict=True))
    with MatmulsInBf16():
        played, _ = _run(kind)
    assert max(played) > 1e-3, "nothing was rounded"
    assert all(a < b for a, b in zip(played, bounds["medium"], strict=True))
    assert all(a > b for a, b in zip(played, bounds["highest"], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_forgotten_pair_of_positions_is_beyond_the_bound(kind: Kind) -> None:
    errors, bounds = _run(kind, forget=True)
    assert errors[0] > 100 * bounds["highest"][0]
