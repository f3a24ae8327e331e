"""What an engine is: it owns the weights, the optimiser and the step; the loop owns the rest.

A `Program` is what gets trained: named layers that a pipeline can cut, and a loss on the output
of the last one. The first layer takes the batch (a dict of tensors), the others what came before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from checkpoint.format import Reader, StateSlice
from parallel.config import EngineConfig, OptimConfig
from parallel.world import World

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
"""Mean losses of a batch over its samples; `loss` is the one that is minimised."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model as a list of layers, with its loss."""

    layers: list[tuple[str, nn.Module]]
    """Names are the first part of global parameter names."""
    loss: Callable[[Any, Batch], Losses]

    def module(self) -> nn.ModuleDict:
        """All layers under their names."""
        return nn.ModuleDict(dict(self.layers))


class Whole(nn.Module):
    """A program run on one process, layer after layer."""

    def __init__(self, program: Program, precision: str) -> None:
        super().__init__()
        self.layers = program.module()
        self._loss, self._bf16 = program.loss, precision == "bf16"

    def forward(self, batch: Batch) -> Losses:
        state: Any = batch
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._bf16):
            for layer in self.layers.values():
                state = layer(state)
            return self._loss(state, batch)

    def global_names(self) -> dict[str, nn.Parameter]:
        """Global parameter name -> parameter."""
        return dict(self.layers.named_parameters())


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did."""

    losses: dict[str, float]
    """Means over the global batch."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    facts: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Owner of the training step on this rank."""

    name: str

    def step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """Accumulate gradients, reduce them, clip, and update; the same result on every rank."""

    def evaluate(self, batch: Batch) -> Losses:
        """Losses of this rank's batch, without gradients."""

    def state_slices(self) -> Iterator[StateSlice]:
        """The parts of weights and moments that this rank saves."""

    def load_slices(self, reader: Reader) -> None:
        """Take this rank's part of the state from a checkpoint of any mesh."""

    def model(self) -> nn.ModuleDict:
        """The layers with the current weights."""

    def memory(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimiser state on this rank."""

    def close(self) -> None:
        """Free what the engine holds."""


Builder = Callable[[Program, OptimConfig, EngineConfig, World], Engine]


def parameter_groups(names: dict[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices decay, gains and biases do not.

    Parameters are sorted by name, so that every rank sees one order.
    """
    ordered = [names[name] for name in sorted(names)]
    matrices = [p for p in ordered if p.dim() > 1]
    others = [p for p in ordered if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(names: dict[str, nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW over the groups."""
    return torch.optim.AdamW(
        parameter_groups(names, optim),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        foreach=True,
    )
