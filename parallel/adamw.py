"""AdamW on top of torch's fused kernel: a cap on the running variance, moments in 16 bits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose running variance is clipped by value before it is used.

    The clip costs a look at the largest gradient and variance, and more only if the cap could be
    passed. A parameter's update does not depend on what lies beside it, so that its copies on
    several ranks stay equal.
    Source: arXiv 2102.12092, section 3.5: the variance of the 12B prior is clipped to 5.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        most_variance: float = math.inf,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        self._most = most_variance

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure."""
        capped = self._make_room() if self._most < math.inf else []
        super().step()
        if capped:
            torch._foreach_clamp_max_(capped, self._most)

    def _make_room(self) -> list[Tensor]:
        """Lower those running variances that this step would lift above the cap.

        Returns the variances if any of them could be, to be cut at the cap behind the step.
        """
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not parameters:
            return []
        gradients = [p.grad.float() for p in parameters]
        squares = [self._variance(p) for p in parameters]
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

    def _variance(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter)
        found: Tensor = state["exp_avg_sq"]
        return found


class AdamW16(torch.optim.Optimizer):
    """AdamW with both moments in bf16: 4 bytes a parameter instead of 8.

    bf16 keeps fp32's range, so nothing is flushed, and 8 bits of precision: a moment follows its
    gradient as long as 1 - beta is well above 2^-8, which `OptimConfig.problems` asks for.
    Source: arXiv 2102.12092, appendix D, which uses two 16-bit formats of its own (1-6-9, 0-6-10).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        most_variance: float = math.inf,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._most = most_variance

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; there is no closure."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        states = [self._state(p) for p in parameters]
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

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device="cpu")  # read on the host at every step
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state
