"""What an engine is: it owns the weights, the optimiser and the step; the loop owns the rest.

A `Program` is what gets trained: named layers that a pipeline can cut, and a loss on the output
of the last one. The first layer takes the batch (a dict of tensors), the others what came before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint.format import Reader, StateSlice
from core.errors import ConfigError
from parallel.adamw import AdamW, AdamW16
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.control import Judge, accept_all
from parallel.mesh import Group, Mesh
from parallel.placement import Placement, move, placement_of
from parallel.scales import Scale, Scales

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
"""Mean losses of a batch over its samples; `loss` is the one that is minimised."""


Draw = Callable[[str, Placement, int, Tensor], None]
"""(Name of a parameter inside of the layer, its placement, an element, a flat tensor): fill the
tensor with the initial values of the flat local parameter from that element on."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a program, built only by the ranks whose stage holds it."""

    name: str
    """First part of the global names of its parameters."""
    build: Callable[[], nn.Module]
    """Its module with the initial weights; with shapes alone under torch.device("meta")."""
    draw: Draw | None = None
    """Draws a part of one initial weight without the others; None: only `build` has them."""
    cost: int = 1
    """What it costs beside the other layers; stages are balanced by it."""
    branches: tuple[str, ...] = ()
    """Keys of its module's `branches()`: residual branches that fp16 gives a scale each."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model as a list of layers, with its loss."""

    layers: list[Layer]
    loss: Callable[[Any, Batch], Losses]
    losses: tuple[str, ...]
    """Names of the losses: ranks that see none must know them."""
    compressed: tuple[str, ...] = ()
    """Endings of the names of matrices whose gradients may be compressed."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All that an engine is configured by."""

    optim: OptimConfig
    engine: EngineConfig
    compress: CompressConfig
    seed: int
    judge: Judge = accept_all
    """Says why an update must be skipped."""


class Recomputed(nn.Module):
    """A layer that can run its residual branches again in the backward pass, one at a time."""

    recompute = False

    def run_branch(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The branch, of which only the input is kept if `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(branch, x, use_reentrant=False)
            return out
        return branch(x)


class Stage(nn.Module):
    """Some consecutive layers of a program on a device, in the run's precision."""

    def __init__(self, layers: Sequence[Layer], engine: EngineConfig, device: torch.device) -> None:
        """Layers are built one after the other, so that the host never holds several."""
        super().__init__()
        if engine.precision == "auto":
            raise ConfigError(
                "engine.precision=auto is settled before an engine is built; give one"
            )
        self.layers = nn.ModuleDict()
        for layer in layers:
            self.layers[layer.name] = move(layer.build(), device)
        self._precision = engine.precision
        for module in self.layers.values():
            if isinstance(module, Recomputed):
                module.recompute = engine.recompute
        self.scales: dict[str, Scale] = {}
        """The gradient scale of each residual branch, in fp16 alone."""
        if engine.precision == "fp16":
            for layer in layers:
                built: Any = self.layers[layer.name]
                marks = built.branches() if layer.branches else {}
                for key in layer.branches:
                    branch, parameters = marks[key]
                    self.scales[f"{layer.name}.{key}"] = Scale()
                    branch.watch(parameters, self.scales[f"{layer.name}.{key}"])

    def forward(self, state: Any) -> Any:
        first = next(iter(state.values())) if isinstance(state, dict) else state
        half = first.device.type == "cuda" and self._precision == "fp16"
        dtype = torch.float16 if half else torch.bfloat16
        enabled = half or self._precision == "bf16"
        with torch.autocast(first.device.type, dtype, enabled=enabled):
            for layer in self.layers.values():
                state = layer(state)
        return state

    def global_names(self) -> dict[str, nn.Parameter]:
        """Global parameter name -> parameter, sorted by name, so that all ranks see one order."""
        return dict(sorted(self.layers.named_parameters()))


def scales_of(program: Program, here: dict[str, Scale], engine: EngineConfig) -> Scales:
    """The scales of a program's branches, of which this rank runs some, or none."""
    names = [f"{layer.name}.{key}" for layer in program.layers for key in layer.branches]
    return Scales(names if engine.precision == "fp16" else [], here)


class Whole(nn.Module):
    """A program run on one process, layer after layer; returns its losses."""

    def __init__(self, program: Program, engine: EngineConfig, device: torch.device) -> None:
        super().__init__()
        self.stage = Stage(program.layers, engine, device)
        self._loss = program.loss

    def forward(self, batch: Batch) -> Losses:
        return self._loss(self.stage(batch), batch)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did."""

    losses: dict[str, float]
    """Means over the global batch."""
    grad_norm: float
    """Global norm of the gradients before clipping; infinite if one anywhere was not finite."""
    skipped: str = ""
    """Why the update was skipped, on every rank alike."""
    stopping: bool = False
    """Some rank was asked to stop: all save after this step."""
    facts: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Owner of the training step on this rank."""

    name: str

    def step(
        self, micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False
    ) -> StepResult:
        """Accumulate gradients, reduce them, clip, and update; the same result on every rank.

        `wants_stop`: this rank was asked to stop, which the result tells all ranks.
        """

    def evaluate(self, batch: Batch) -> Losses:
        """Losses of this replica's batch, without gradients, on all ranks of the replica.

        All ranks must call it equally often, with batches of equal size.
        """

    def state_slices(self) -> Iterator[StateSlice]:
        """The parts of weights, moments and compression buffers that this rank saves."""

    def load_slices(self, reader: Reader) -> None:
        """Take this rank's part of the state from a checkpoint of any mesh."""

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        """Tensors that all ranks of a group hold alike between two steps."""

    def layers(self) -> dict[str, nn.Module]:
        """The layers that this rank runs, in order, by name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that this rank holds a part of."""

    def memory(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimiser state on this rank."""

    def close(self) -> None:
        """Free what the engine holds."""


Builder = Callable[[Program, EngineSettings, Mesh], Engine]


def parameter_groups(names: dict[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices decay, gains and biases do not.

    Parameters are sorted by name, so that every rank sees one order. Their placements tell which
    are matrices: ZeRO-3's are flat.
    """
    ordered = [names[name] for name in sorted(names)]
    matrices = [p for p in ordered if len(placement_of(p).shape) > 1]
    others = [p for p in ordered if len(placement_of(p).shape) <= 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(names: dict[str, nn.Parameter], optim: OptimConfig) -> AdamW | AdamW16:
    """AdamW over the groups, with moments in 32 or 16 bits."""
    groups, betas = parameter_groups(names, optim), (optim.beta1, optim.beta2)
    most = optim.max_variance or math.inf
    kind = AdamW16 if optim.moments == "bf16" else AdamW
    return kind(groups, lr=optim.lr, betas=betas, eps=optim.eps, max_variance=most)
