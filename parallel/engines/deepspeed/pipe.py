"""DeepSpeed's pipeline engine with ZeRO-1: tensor x pipeline x data parallelism."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import TapirError
from parallel.config import EngineConfig
from parallel.engines.deepspeed.engine import DeepSpeedEngine, zero_config
from parallel.engines.deepspeed.hooks import (
    LayerSpec,
    PipelineModule,
    PipeModelDataParallelTopology,
    initialize,
    quiet,
    start_comm,
)
from parallel.engines.modules import mean_losses
from parallel.engines.protocol import (
    Batch,
    EngineSettings,
    Layer,
    Losses,
    Program,
    Stage,
    StepResult,
    build_adamw,
    scales_of,
)
from parallel.mesh import AXES, Group, Mesh
from parallel.pipelines.balance import balanced_starts
from parallel.placement import global_names, tie
from parallel.scales import Scale

_NAMES = {"pipeline": "pipe", "data": "data", "tensor": "model"}
"""Mesh axis -> DeepSpeed's name."""
Fields = tuple[Tensor, ...]
"""A batch as a tuple of tensors, sorted by name."""


class DeepSpeedPipeEngine(DeepSpeedEngine):
    """Stages of layers on different ranks, optimiser state sharded over the replicas."""

    name = "deepspeed_pipe"

    def __init__(self, program: Program, settings: EngineSettings, mesh: Mesh) -> None:
        """Raises: ConfigError on one process without a process group."""
        self._refuse_one_process(mesh)
        self._loss = program.loss
        self._fields: list[str] = []
        start_comm(mesh.world.device)
        with quiet():
            self._module = _Stages(program, settings.engine, mesh, self._losses, self._fields)
        names = self._module.global_names()
        scales = scales_of(program, self._module.scales(), settings.engine)
        super().__init__(program, names, mesh, 1, scales, settings.judge)
        compress, held = settings.compress.on, self._trained.values()
        elements = sum(p.numel() for p in held) if compress else None
        config = zero_config(settings.optim, settings.engine, 1, elements, mesh.world.device)
        if mesh.shared.sequence:  # DeepSpeed would cut what tensor ranks send, as if it were equal
            config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        optimizer = build_adamw(names, settings.optim)
        self._engine = initialize(self._module, optimizer, config, mesh.world.device)
        self._attach_zero12(program, settings)

    def step(
        self, micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False
    ) -> StepResult:
        step = self._begin(wants_stop)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.train_batch(self._feed(micro_batches))
        return self._result(step)

    def evaluate(self, batch: Batch) -> Losses:
        evaluation = self._begin()
        self._engine.reset_activation_shape()
        self._engine.eval_batch(
            self._feed([batch]), reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        self._engine.reset_activation_shape()
        alone = Mesh(world=self._mesh.world, pipeline=self._mesh.pipeline)
        means = mean_losses(evaluation.losses, self._losses_named, alone)
        return {name: torch.tensor(value, device="cpu") for name, value in means.items()}

    def layers(self) -> dict[str, nn.Module]:
        return self._module.by_name()

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        shared: list[Tensor] = [*self._module.on_both_ends()]
        return super().replicas() + ([(shared, self._mesh.ends)] if shared else [])

    def _feed(self, batches: Sequence[Batch]) -> Iterator[tuple[Fields, Fields]]:
        """Batches as (inputs, labels): the first stage reads the former, the last the latter."""
        self._fields[:] = sorted(batches[0])  # middle stages read no batch
        rows = [tuple(batch[name] for name in self._fields) for batch in batches]
        return iter([(row, row) for row in rows])

    def _losses(self, output: Any, labels: Fields) -> Tensor:
        losses = self._loss(output, dict(zip(self._fields, labels, strict=True)))
        self._current.losses.append({name: value.detach() for name, value in losses.items()})
        return losses["loss"]


class _First(nn.Module):
    """The first layer: turns the tuple of tensors back into a batch."""

    def __init__(self, stage: Stage, fields: list[str]) -> None:
        super().__init__()
        self.stage, self._fields = stage, fields

    def forward(self, tensors: Fields) -> Tensor:
        state: Tensor = self.stage(dict(zip(self._fields, tensors, strict=True)))
        return state


class _Recipe(LayerSpec):  # type: ignore[misc]
    """A layer that is built only on the ranks of its stage."""

    def __init__(
        self, layer: Layer, engine: EngineConfig, fields: list[str] | None, device: torch.device
    ) -> None:
        super().__init__(nn.Module)
        self._layer, self._engine, self._fields = layer, engine, fields
        self._device = device

    def build(self, log: bool = False) -> nn.Module:
        stage = Stage([self._layer], self._engine, self._device)
        return stage if self._fields is None else _First(stage, self._fields)


class _Stages(PipelineModule):  # type: ignore[misc]
    """A program cut into stages of about equal cost."""

    def __init__(
        self, program: Program, engine: EngineConfig, mesh: Mesh, loss: Any, fields: list[str]
    ) -> None:
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pipeline.size, num_mp=mesh.tensor.size, num_dp=mesh.data.size
        )
        _check_topology(topology, mesh)
        self._costs = [layer.cost for layer in program.layers]
        recipes = [
            _Recipe(layer, engine, fields if i == 0 else None, mesh.world.device)
            for i, layer in enumerate(program.layers)
        ]
        super().__init__(layers=recipes, topology=topology, loss_fn=loss)
        tie(self.by_name())
        self._tied = program.tied if self.num_stages > 1 else ()
        self._data, self._ends = mesh.data, mesh.ends

    def _partition_layers(self, method: str = "cost") -> None:
        """Cut by cost instead of by parameter count, which underestimates the head."""
        self.parts = balanced_starts(self._costs, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def global_names(self) -> dict[str, nn.Parameter]:
        """Global parameter name -> parameter of this stage, sorted by name."""
        return global_names(nn.ModuleDict(self.by_name()))

    def by_name(self) -> dict[str, nn.Module]:
        """This stage's layers by name, in order."""
        return {name: m for stage in self.stages() for name, m in stage.layers.items()}

    def on_both_ends(self) -> list[nn.Parameter]:
        """Parameters of this stage that the first and the last one share, in the order of both."""
        names = self.global_names()
        return [names[name] for name in self._tied if name in names]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Add up the gradients of tied weights; DeepSpeed calls it before it averages gradients.

        Returns none, since nothing is left for DeepSpeed to add up.
        """
        for parameter in self.on_both_ends():
            if parameter.grad is not None:
                self._add_up(parameter.grad)
        return []

    def _add_up(self, gradient: Tensor) -> None:
        """Sum a gradient over the replicas and both ends, and leave it to the first replica.

        DeepSpeed averages it in other buckets on either end, where sums of several terms round
        differently; a sum of one term and zeros does not, so that the copies stay bitwise equal.
        """
        for group in (self._data, self._ends):
            if group.size > 1:
                torch.distributed.all_reduce(gradient, group=group.handle)
        if self._data.rank > 0:
            gradient.zero_()

    def scales(self) -> dict[str, Scale]:
        """The gradient scales of this stage's branches."""
        return {name: scale for stage in self.stages() for name, scale in stage.scales.items()}

    def stages(self) -> Iterator[Stage]:
        """The layers of this rank, each as a stage of its own."""
        for module in self.forward_funcs:
            yield module.stage if isinstance(module, _First) else module


def _check_topology(topology: PipeModelDataParallelTopology, mesh: Mesh) -> None:
    """Compare DeepSpeed's arrangement of the ranks with the mesh's groups.

    Raises: TapirError if they differ.
    """
    for axis in AXES:
        group = getattr(mesh, axis)
        if group.size == 1:
            continue
        mine = torch.distributed.get_process_group_ranks(group.handle)
        if mine not in topology.get_axis_comm_lists(_NAMES[axis]):
            raise TapirError(
                f"rank {mesh.world.rank}: DeepSpeed's topology has no {axis} group {mine}; the "
                "installed version arranges ranks differently from the tested one"
            )
