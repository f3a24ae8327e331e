"""AdamW with 16-bit moments, and with a capped variance, against torch's and the definition."""

import pytest
import torch

from parallel.adamw import AdamW, AdamW16
from parallel.config import OptimConfig

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8}


def _run(half: bool, steps: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 32, generator=draws))
    groups = [{"params": [weight], "weight_decay": 0.1}]
    kind = AdamW16 if half else torch.optim.AdamW
    optimizer = kind(groups, **SETTINGS)  # type: ignore[operator]
    for _ in range(steps):
        weight.grad = torch.randn(64, 32, generator=draws) + weight.detach()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_the_first_step_is_torchs() -> None:
    torch.testing.assert_close(_run(True, 1)[0], _run(False, 1)[0], rtol=1e-6, atol=1e-7)


def test_fifty_steps_stay_within_bf16_of_torchs() -> None:
    (half, state), (full, _) = _run(True, 50), _run(False, 50)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert float((half - full).norm() / full.norm()) < 2**-8


def test_slow_moments_are_refused_in_bf16() -> None:
    assert OptimConfig(moments="bf16", beta2=0.999).problems()
    assert not OptimConfig(moments="bf16", beta2=0.96).problems()


@pytest.mark.parametrize("kind", [AdamW, AdamW16])
def test_the_variance_is_capped_before_it_is_used(kind: type[AdamW] | type[AdamW16]) -> None:
    """Against the formulas in float64; some of the gradients pass the cap and some do not."""
    draws = torch.Generator().manual_seed(1)
    start = torch.randn(40, generator=draws)
    weight, expected = torch.nn.Parameter(start.clone()), start.double()
    optimizer = kind([{"params": [weight], "weight_decay": 0.1}], **SETTINGS, max_variance=5.0)
    mean = variance = torch.zeros(40, dtype=torch.float64)
    passed = 0
    for step in range(1, 60):
        gradient = 2.2 * torch.randn(40, generator=draws) * torch.linspace(0, 2, 40)
        weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient.double()
        variance = 0.96 * variance + 0.04 * gradient.double() ** 2
        passed += int((variance > 5).sum())
        variance = variance.clamp_max(5)
        expected = expected * (1 - 1e-3)
        root = (variance / (1 - 0.96**step)).sqrt() + 1e-8
        expected = expected - 1e-2 * mean / (1 - 0.9**step) / root
    assert 100 < passed < 2000
    assert float(optimizer.state[weight]["exp_avg_sq"].max()) <= 5.0
    bound = 1e-6 if kind is AdamW else 2**-8
    assert float((weight.detach().double() - expected).norm() / expected.norm()) < bound


def test_a_cap_that_is_not_reached_changes_no_bit() -> None:
    draws = torch.Generator().manual_seed(2)
    start, high = torch.randn(2, 33, generator=draws), torch.full((5,), 9.0)
    weights = []
    for companions in ([], [high]):
        parameters = [torch.nn.Parameter(x.clone()) for x in (start, *companions)]
        optimizer = AdamW([{"params": parameters, "weight_decay": 0.1}], **SETTINGS, max_variance=1)
        for step in range(20):
            for parameter in parameters:
                parameter.grad = parameter.detach() * (0.1 + step / 100)
            optimizer.step()
        weights.append(parameters[0].detach())
    plain = torch.nn.Parameter(start.clone())
    optimizer = AdamW([{"params": [plain], "weight_decay": 0.1}], **SETTINGS)
    for step in range(20):
        plain.grad = plain.detach() * (0.1 + step / 100)
        optimizer.step()
    assert weights[0].equal(weights[1]) and weights[0].equal(plain.detach())
