"""Gradient scales of residual branches, against a hand-computed table and against fp32."""

import math

import pytest
import torch
from torch import Tensor, nn

from parallel.config import EngineConfig
from parallel.device import CPU
from parallel.engines.protocol import Layer, Program, scales_of
from parallel.scales import FIRST, HOLD, LEAST, MOST, Branch, Scale, Scales

GROW, HALF = 2 ** (1 / 1000), 2**-0.5


def test_rules_step_by_step() -> None:
    """Finite updates multiply by 2^(1/1000), an overflow divides by sqrt(2), then 125 are held."""
    scale = Scale()
    table = [(True, 2.0**13 * GROW), (True, 2.0**13 * GROW**2)]
    table.append((False, 2.0**13 * GROW**2 * HALF))
    table += [(False, 2.0**13 * GROW**2 * HALF)] * HOLD
    table.append((False, 2.0**13 * GROW**2 / 2))
    table.append((True, 2.0**13 * GROW**3 / 2))
    for finite, expected in table:
        scale.update(finite)
        assert scale.value == pytest.approx(expected, rel=1e-12)


def test_a_thousand_finite_updates_double_it_up_to_the_clamp() -> None:
    scale = Scale()
    for _ in range(1000):
        scale.update(True)
    assert scale.value == pytest.approx(2 * FIRST)
    for _ in range(20_000):
        scale.update(True)
    assert scale.value == MOST
    for _ in range(60 * (HOLD + 1)):
        scale.update(False)
    assert scale.value == LEAST


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 6)
        self.branch = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch.leave(torch.tanh(self.line(self.branch.enter(x))))


def _gradients(scaled: bool, size: float) -> tuple[_Residual, Tensor]:
    torch.manual_seed(0)
    model, x = _Residual(), torch.randn(4, 6).half().float().requires_grad_()
    with torch.no_grad():
        model.line.weight.copy_(model.line.weight.half().float())
    if scaled:
        model.branch.watch(list(model.line.parameters()), Scale())
    (model(x).square().sum() * size).backward()
    assert x.grad is not None
    return model, x.grad


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_gradients_equal_fp32_within_16_bits(size: float) -> None:
    (plain, x_plain), (scaled, x_scaled) = _gradients(False, size), _gradients(True, size)
    torch.testing.assert_close(x_scaled, x_plain, rtol=2e-3, atol=2e-3 * size)
    assert plain.line.weight.grad is not None and scaled.line.weight.grad is not None
    torch.testing.assert_close(
        scaled.line.weight.grad, plain.line.weight.grad, rtol=3e-3, atol=3e-3 * size
    )


def test_an_overflow_is_filtered_from_states_and_breaks_its_branch_alone() -> None:
    model, x_gradient = _gradients(True, 1e3)
    assert bool(torch.isfinite(x_gradient).all())
    scale = model.branch.scale
    assert scale is not None and not scale.finite
    scales = Scales(["first", "second"], {"first": scale, "second": Scale()})
    assert scales.broken(CPU).tolist() == [1.0, 0.0]
    scales.update(scales.broken(CPU))
    assert scales.here["first"].value == pytest.approx(FIRST * HALF)
    assert scales.here["second"].value == pytest.approx(FIRST * GROW)
    assert scale.finite, "an update starts anew"


def test_counters_see_what_16_bits_flush() -> None:
    """2^-25 is half of the smallest fp16 number and rounds to zero; scaled by 2^13 it survives."""
    for value, flushed in ((FIRST, 0), (1.0, 6)):
        branch, y = Branch(), torch.zeros(6, requires_grad=True)
        branch.scale, branch.count = Scale(value=value), True
        (branch.leave(y) * 2.0**-25).sum().backward()
        assert (branch.scale.counters.seen, branch.scale.counters.flushed) == (6, flushed)
    assert math.log2(FIRST) == 13


def test_a_rank_without_branches_sends_flags_as_long_as_its_peers() -> None:
    """A pipeline's last stage may hold the head alone."""
    program = Program(
        layers=[
            Layer(name="block", build=nn.Identity, branches=("attention", "mlp")),
            Layer(name="head", build=nn.Identity),
        ],
        loss=lambda output, batch: {},
        losses=(),
    )
    half, full = EngineConfig(precision="fp16"), EngineConfig(precision="bf16")
    assert scales_of(program, {}, half).broken(CPU).shape == (2,)
    assert scales_of(program, {"block.mlp": Scale()}, half).broken(CPU).shape == (2,)
    assert scales_of(program, {}, full).broken(CPU).shape == (0,)
