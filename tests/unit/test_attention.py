"""Banded attention against the dense definition: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from models.attention import band_of, banded_attention
from models.masks import Kind, full_mask

SIZES = [(5, 4, 3), (24, 8, 11), (64, 16, 11)]
"""(text, grid, conv kernel)."""


def _inputs(text: int, grid: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(text)
    length = text + grid * grid
    made = [torch.randn(2, length, 3, 16, generator=draws).to(dtype) for _ in range(4)]
    return [x.transpose(1, 2) for x in made]


def _run(attend: object, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out, leaves, inputs[3])]


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("text", "grid", "kernel"), SIZES)
def test_it_equals_the_dense_definition(kind: Kind, text: int, grid: int, kernel: int) -> None:
    inputs = _inputs(text, grid)
    mask, band = full_mask(kind, text, grid, kernel), band_of(kind, text, grid, kernel)
    dense = _run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), inputs)
    ours = _run(lambda q, k, v: banded_attention(q, k, v, band), inputs)
    assert (dense[0] - ours[0]).abs().max() < 1e-6
    for a, b in zip(dense[1:], ours[1:], strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_logits_far_apart_stay_finite(kind: Kind) -> None:
    inputs = _inputs(24, 8)
    inputs = [80 * inputs[0], 80 * inputs[1], inputs[2], inputs[3]]
    mask, band = full_mask(kind, 24, 8, 11), band_of(kind, 24, 8, 11)
    dense = _run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), inputs)
    ours = _run(lambda q, k, v: banded_attention(q, k, v, band), inputs)
    for a, b in zip(dense, ours, strict=True):
        assert torch.isfinite(b).all() and (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-5


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_bf16_is_as_near_to_the_truth_as_the_dense_bf16(kind: Kind) -> None:
    inputs = _inputs(64, 16, torch.bfloat16)
    mask, band = full_mask(kind, 64, 16, 11), band_of(kind, 64, 16, 11)

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    exact = _run(dense, [x.double() for x in inputs])
    plain, ours = _run(dense, inputs), _run(lambda q, k, v: banded_attention(q, k, v, band), inputs)
    for truth, a, b in zip(exact, plain, ours, strict=True):
        assert (truth - b).abs().mean() <= 1.5 * (truth - a).abs().mean()
