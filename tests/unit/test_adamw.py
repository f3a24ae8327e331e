"""AdamW with 16-bit moments against torch's."""

import torch

from parallel.adamw import AdamW16
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
