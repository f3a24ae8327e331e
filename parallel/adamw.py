"""AdamW on top of torch's fused kernel: a cap on the running variance, moments in 16 bits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class _CappedAdamW(torch.optim.Optimizer):
    """Options and per-parameter state that AdamW and AdamW16 share."""

    moments: torch.dtype | None = None
    """Type of the moments; None = the parameter's."""
    step_on_host = False
    """True if the step count is on the host (AdamW16); the fused kernel reads it on the device."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        max_variance: float = math.inf,
    ) -> None:
        self._most = max_variance
        self._start(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def _start(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Call the constructor of torch's optimiser."""
        torch.optim.Optimizer.__init__(self, groups, options)

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A step count of zero and zero moments, with the strides of their parameter.

        The fused kernel walks memory, not indices.
        """
        device = torch.device("cpu") if self.step_on_host else parameter.device
        state = {"step": torch.zeros((), device=device)}
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=self.moments)
        return state

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimiser state of a parameter, created at its first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update(self.first_state(parameter))
        return state


class AdamW(_CappedAdamW, torch.optim.AdamW):
    """torch's fused AdamW, whose running variance is clipped by value before it is used.

    Each step checks the largest gradient and variance, and does more only if the cap could be
    exceeded. A parameter's update does not depend on its neighbours in memory, so that its copies
    on several ranks stay equal.
    Source: arXiv 2102.12092, section 3.5: the variance of the 12B prior is clipped to 5.
    """

    def _start(self, groups: list[dict[str, Any]], options: dict[str, Any]) -> None:
        torch.optim.AdamW.__init__(self, groups, **options, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is ignored."""
        capped = self._lower_variances() if self._most < math.inf else []
        super().step()
        if capped:
            torch._foreach_clamp_max_(capped, self._most)

    def _lower_variances(self) -> list[Tensor]:
        """Lower each running variance so that this step does not lift it above the cap.

        Returns all variances if any could exceed the cap, to be clamped after the step.
        """
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not parameters:
            return []
        gradients = [p.grad.float() for p in parameters]
        squares = [self._state_of(p)["exp_avg_sq"] for p in parameters]
        keep = self.param_groups[0]["betas"][1]
        most, highest = (
            float(torch.stack(torch._foreach_norm(tensors, math.inf)).amax())
            for tensors in (gradients, squares)
        )
        if keep * highest + (1 - keep) * most**2 <= self._most:
            return []
        for square, gradient in zip(squares, gradients, strict=True):
            added = gradient.square().mul_(1 - keep)
            too_high = square * keep + added > self._most
            square.copy_(torch.where(too_high, (self._most - added) / keep, square))
        return squares


class AdamW16(_CappedAdamW):
    """AdamW with both moments in bf16: 4 bytes a parameter instead of 8.

    bf16 keeps fp32's range, so nothing is flushed, and 8 bits of precision: a moment follows its
    gradient as long as 1 - beta is well above 2^-8, which `OptimConfig.problems` asks for.
    Source: arXiv 2102.12092, appendix D, which uses two 16-bit formats of its own (1-6-9, 0-6-10).
    """

    moments = torch.bfloat16
    step_on_host = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is ignored."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        states = [self._state_of(p) for p in parameters]
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        means = [state["exp_avg"].float() for state in states]
        squares = [state["exp_avg_sq"].float() for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        if self._most < math.inf:
            torch._foreach_clamp_max_(squares, self._most)
        torch._foreach_copy_([state["exp_avg"] for state in states], means)
        torch._foreach_copy_([state["exp_avg_sq"] for state in states], squares)
        steps = [float(state["step"]) for state in states]
        torch._foreach_div_(squares, [1 - second**step for step in steps])
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, group["eps"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        sizes = [-group["lr"] / (1 - first**step) for step in steps]
        torch._foreach_addcdiv_(parameters, means, squares, sizes)
