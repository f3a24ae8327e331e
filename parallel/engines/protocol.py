"""Engines and programs: an engine owns the weights, the optimiser and the training step.

A `Program` is the model to train: named layers that a pipeline can cut, and a loss on the last
layer's output. The first layer takes the batch (a dict of tensors), each other layer the output
of the layer before it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint.config import ErrorBuffers
from checkpoint.format import Reader, StateSlice
from core.errors import ConfigError
from parallel.adamw import AdamW, AdamW16
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.control import Judge, accept_all
from parallel.engines.rebuilt import rebuilt
from parallel.mesh import Group, Mesh
from parallel.placement import Placement, global_names, move, placement_of, tie
from parallel.scales import Scale, Scales

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
"""Mean losses of a batch over its samples; `loss` is the one that is minimised."""


Draw = Callable[[str, Placement, int, Tensor], None]
"""(parameter name inside the layer, its placement, start, flat tensor): fill the tensor with the
initial values of the flat local parameter from element `start` on."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a program, built only by the ranks whose stage holds it."""

    name: str
    """First part of the global names of its parameters."""
    build: Callable[[], nn.Module]
    """Builds the module with initial weights; only shapes under torch.device("meta")."""
    draw: Draw | None = None
    """Draws a part of one initial weight; None = initial weights come from `build` only."""
    cost: int = 1
    """Relative cost, by which stages are balanced."""
    branches: tuple[str, ...] = ()
    """Keys of its module's `branches()`: residual branches, each with its own scale in fp16."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model as a list of layers, with its loss."""

    layers: list[Layer]
    loss: Callable[[Any, Batch], Losses]
    losses: tuple[str, ...]
    """Names of the losses; ranks that compute none need them too."""
    compressed: tuple[str, ...] = ()
    """Endings of the names of matrices whose gradients may be compressed."""
    state: Callable[[Batch], tuple[int, ...]] | None = None
    """Shape of the hidden states between two layers, of a batch; None = it cannot be cut."""
    tied: tuple[str, ...] = ()
    """Global names of the parameters of the first layer that the last one uses too."""
    saves_frozen: bool = True
    """Checkpoints hold the weights of frozen parameters, too; else they come from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Configuration of an engine."""

    optim: OptimConfig
    engine: EngineConfig
    compress: CompressConfig
    seed: int
    errors: ErrorBuffers = "auto"
    """How checkpoints hold the error buffers of compression."""
    judge: Judge = accept_all
    """Returns why an update must be skipped, or nothing."""


class Recomputed(nn.Module):
    """A layer with activation checkpointing: of each residual branch, or of cheap parts alone.

    Nothing in a layer draws random numbers, so that no generator's state is kept.
    """

    recompute = False
    """Keep only the inputs of branches."""
    selective = False
    """Keep the outputs of matmuls; recompute norms, activation functions and attention."""

    def run_branch(self, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a branch; if `recompute` is set, only its input is kept for the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(branch, x, use_reentrant=False, preserve_rng_state=False)
            return out
        return branch(x)

    def run_cheap(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run a part without matmuls of weights; if `selective`, only its inputs are kept."""
        if self.selective and torch.is_grad_enabled():
            out: Tensor = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
            return out
        return part(*inputs)

    def rebuilt(
        self, value: Tensor, again: Callable[..., Tensor], *inputs: Tensor
    ) -> AbstractContextManager[None]:
        """A context in which matmuls do not keep `value`; if `selective`, it is computed again."""
        if self.selective and torch.is_grad_enabled():
            return rebuilt(value, again, *inputs)
        return nullcontext()


class Stage(nn.Module):
    """Some consecutive layers of a program on a device, in the run's precision."""

    def __init__(
        self, layers: Sequence[Layer], engine: EngineConfig, device: torch.device | None
    ) -> None:
        """Builds and moves one layer at a time, so that the host never holds several.

        `device`: None leaves each layer where it was built.
        """
        super().__init__()
        if engine.precision == "auto":
            raise ConfigError(
                "engine.precision=auto must be resolved (training/auto_precision.py) before "
                "an engine is built; give fp32, bf16 or fp16"
            )
        self.layers = nn.ModuleDict()
        for layer in layers:
            built = layer.build()
            self.layers[layer.name] = move(built, device) if device else built
        tie(self.layers)  # type: ignore[arg-type]
        self._precision = engine.precision
        for module in self.layers.values():
            if isinstance(module, Recomputed):
                module.recompute = engine.recompute and not engine.selective
                module.selective = engine.recompute and engine.selective
        self.scales: dict[str, Scale] = {}
        """The gradient scale of each residual branch; empty unless in fp16."""
        if engine.precision == "fp16":
            for layer in layers:
                whole: Any = self.layers[layer.name]
                marks = whole.branches() if layer.branches else {}
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
        """Global parameter name -> parameter, sorted by name: the same order on all ranks."""
        return global_names(self.layers)


def scales_of(program: Program, here: dict[str, Scale], engine: EngineConfig) -> Scales:
    """The scales of a program's branches; `here` holds those of this rank."""
    names = [f"{layer.name}.{key}" for layer in program.layers for key in layer.branches]
    return Scales(names if engine.precision == "fp16" else [], here)


class Whole(nn.Module):
    """A program run on one process, layer after layer; returns its losses."""

    def __init__(self, program: Program, engine: EngineConfig, device: torch.device | None) -> None:
        super().__init__()
        self.stage = Stage(program.layers, engine, device)
        self._loss = program.loss

    def forward(self, batch: Batch) -> Losses:
        return self._loss(self.stage(batch), batch)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one optimiser step."""

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

        `wants_stop`: this rank was asked to stop; `stopping` in the result tells all ranks.
        """

    def evaluate(self, batch: Batch) -> Losses:
        """Losses of this replica's batch, without gradients, on all ranks of the replica.

        All ranks must call it equally often, with batches of equal size.
        """

    def state_slices(self) -> Iterator[StateSlice]:
        """The parts of weights, moments and gradient scales that this rank saves."""

    def error_slices(self) -> Iterator[StateSlice]:
        """The compression buffers that this rank saves; collective: all ranks must exhaust it."""

    def load_slices(self, reader: Reader) -> None:
        """Take this rank's part of the state from a checkpoint of any mesh; collective."""

    def load_frozen(self, reader: Reader) -> None:
        """Take this rank's part of the frozen weights from a model of any mesh; collective."""

    def frozen(self) -> frozenset[str]:
        """Names of the parameters of this rank that are not trained."""

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        """Tensors that are equal on all ranks of a group between two steps."""

    def layers(self) -> dict[str, nn.Module]:
        """The layers that this rank runs, in order, by name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that this rank holds a part of, and saves."""

    def memory(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimiser state on this rank."""

    def close(self) -> None:
        """Free what the engine holds."""


Builder = Callable[[Program, EngineSettings, Mesh], Engine]


def parameter_groups(names: dict[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """Two optimiser groups of what is trained: matrices decay, gains and biases do not.

    Parameters are sorted by name: the same order on all ranks. Matrices are recognised by their
    placement, because ZeRO-3's parameters are flat.
    """
    ordered = [names[name] for name in sorted(names) if names[name].requires_grad]
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
