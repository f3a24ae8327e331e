"""Plain torch, on one process or with all-reduced gradients: the oracle of every equality test.

Gradients are reduced as one flat fp32 tensor in name order rather than by torch's DDP, whose
buckets change order after the first step: on more than two ranks that moves rounding, and a
resumed run would no longer be bit-equal to an unbroken one.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.format import KINDS, Reader, StateSlice, whole_box
from parallel.config import EngineConfig, OptimConfig
from parallel.engines.protocol import (
    Batch,
    Losses,
    Program,
    StepResult,
    Whole,
    build_adamw,
)
from parallel.engines.results import mean_losses
from parallel.world import World


class ReferenceEngine:
    """The whole model on every rank."""

    name = "reference"

    def __init__(
        self, program: Program, optim: OptimConfig, engine: EngineConfig, world: World
    ) -> None:
        self._whole = Whole(program, engine.precision)
        self._names = self._whole.global_names()
        self._ordered = [self._names[name] for name in sorted(self._names)]
        self._optimizer = build_adamw(self._names, optim)
        self._clip_norm, self._world = optim.clip_norm, world

    def step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        self._optimizer.zero_grad(set_to_none=True)
        seen = []
        for batch in micro_batches:
            losses = self._whole(batch)
            (losses["loss"] / len(micro_batches)).backward()
            seen.append({name: value.detach() for name, value in losses.items()})
        norm = self._reduce()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if torch.isfinite(norm):
            self._optimizer.step()
        return StepResult(losses=mean_losses(seen, self._world), grad_norm=float(norm))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        losses: Losses = self._whole(batch)
        return losses

    def state_slices(self) -> Iterator[StateSlice]:
        if self._world.rank > 0:
            return
        for name, parameter in self._names.items():
            shape = tuple(parameter.shape)
            state = self._optimizer.state[parameter]
            tensors = {"master": parameter, **state}
            for kind in KINDS:
                if kind in tensors:
                    value: Tensor = tensors[kind]
                    size = shape if value.dim() else ()
                    flat = value.detach().reshape(-1)
                    yield StateSlice(
                        name=name, kind=kind, shape=size, box=whole_box(size), start=0, data=flat
                    )

    @torch.no_grad()
    def load_slices(self, reader: Reader) -> None:
        for name, parameter in self._names.items():
            parameter.copy_(reader.tensor(name, "master"))
            moments = ("exp_avg", "exp_avg_sq", "step")
            self._optimizer.state[parameter] = {k: reader.tensor(name, k) for k in moments}

    def model(self) -> nn.ModuleDict:
        return self._whole.layers

    def memory(self) -> dict[str, int]:
        bytes_ = sum(p.numel() * p.element_size() for p in self._ordered)
        return {"parameters": bytes_, "gradients": bytes_, "optimizer": 2 * bytes_}

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _reduce(self) -> Tensor:
        """Average gradients over the ranks, clip them by their global norm, and return it."""
        gradients = [p.grad for p in self._ordered if p.grad is not None]
        if self._world.group is not None:
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat, group=self._world.group)
            flat /= self._world.size
            sizes = [g.numel() for g in gradients]
            for gradient, part in zip(gradients, flat.split(sizes), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.get_total_norm(gradients)
        scale = self._clip_norm / (norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_(gradients, scale)
        return norm
