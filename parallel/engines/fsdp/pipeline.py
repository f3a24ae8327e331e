"""Pipelines by torch.distributed.pipelining: 1F1B, interleaved 1F1B and zero bubble.

A rank holds one chunk of layers, or several (virtual stages). Weights are gathered once a step and
stay gathered for all micro-batches; gradients add up in fp32 and are scattered at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from core.config import check
from parallel.config import EngineConfig
from parallel.engines.fsdp.units import Unit, collect
from parallel.engines.protocol import Batch, Layer, Losses, Program, Stage
from parallel.mesh import Mesh
from parallel.pipelines.balance import stage_layers
from parallel.tensor.halves import only


class Chunk(nn.Module):
    """Consecutive layers of one rank; the first takes a batch's tensors, the last gives losses."""

    def __init__(
        self,
        program: Program,
        layers: Sequence[Layer],
        engine: EngineConfig,
        index: int,
        count: int,
    ) -> None:
        super().__init__()
        self.stage = Stage(layers, engine, None)
        self.first, self.last = index == 0, index == count - 1
        self.fields: list[str] = []
        """Names of a batch's tensors, sorted."""
        self.micro_batches = 1
        self.losses: list[Losses] = []
        """Of this step's micro-batches, on the last chunk."""
        self._loss = program.loss

    def forward(self, *states: Tensor, **targets: Tensor) -> Tensor:
        """States of the chunk before, or a batch's tensors -> states, or the loss.

        `targets`: the batch; read by the last chunk alone.
        """
        state: Any = dict(zip(self.fields, states, strict=True)) if self.first else states[0]
        out: Tensor = self.stage(state)
        if not self.last:
            return out
        losses = self._loss(out, targets)
        self.losses.append({name: value.detach() for name, value in losses.items()})
        return losses["loss"] / self.micro_batches


def chunks_of(program: Program, engine: EngineConfig, mesh: Mesh) -> list[Chunk]:
    """This rank's chunks: of S stages with V chunks each, stage s has s, s + S, s + 2 S, ..."""
    stages, count = mesh.pipeline.size, mesh.pipeline.size * engine.virtual_stages
    mine = range(mesh.pipeline.rank, count, stages)
    return [Chunk(program, stage_layers(program.layers, i, count), engine, i, count) for i in mine]


class _Stage(PipelineStage):
    """A stage whose custom functions compute only the half that is asked for."""

    units: Sequence[Unit] = ()

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        half = {"input": "input", "weight": "weights"}.get(backward_type, "both")
        with only(half):  # type: ignore[arg-type]
            result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "weight":
            collect(self.units)
        return result


class Pipeline:
    """Runs the chunks of one rank through a schedule."""

    def __init__(
        self,
        program: Program,
        chunks: Sequence[Chunk],
        units: Sequence[Sequence[Unit]],
        engine: EngineConfig,
        mesh: Mesh,
    ) -> None:
        """`units`: of each chunk.

        Raises: ConfigError for a schedule that this device cannot run.
        """
        check(engine.gpu_problems() if mesh.world.device.type == "cuda" else [])
        assert program.state is not None, "a program that can be cut names its states' shape"
        self._shape_of, self._chunks, self._units = program.state, chunks, units
        self._engine, self._mesh = engine, mesh
        self._schedules: dict[tuple[int, ...], Any] = {}

    def run(self, micro_batches: Sequence[Batch]) -> list[Losses]:
        """Forward and backward of all micro-batches; returns their losses on the last stage."""
        count, fields = len(micro_batches), sorted(micro_batches[0])
        for chunk in self._chunks:
            chunk.fields, chunk.micro_batches = fields, count
            chunk.losses.clear()
        schedule = self._schedule(micro_batches)
        whole = {name: torch.cat([row[name] for row in micro_batches]) for name in fields}
        arguments: list[Tensor] = []
        targets: dict[str, Tensor] = {}
        marks: Tensor | None = None
        if self._chunks[0].first:
            arguments = [whole[name] for name in fields]
        if self._chunks[-1].last:
            targets, marks = whole, torch.zeros(count, device=self._mesh.world.device)
        schedule.step(*arguments, target=marks, return_outputs=False, **targets)
        return [row for chunk in self._chunks for row in chunk.losses]

    def evaluate(self, batch: Batch) -> list[Losses]:
        """Forward of one batch through all stages; its losses on the last one."""
        group, device = self._mesh.pipeline, self._mesh.world.device
        stages, count = group.size, group.size * len(self._chunks)
        shape = self._agreed(batch)
        state: Any = None
        losses: list[Losses] = []
        for i in range(group.rank, count, stages):
            chunk = self._chunks[i // stages]
            chunk.fields = sorted(batch)
            chunk.losses.clear()
            if not chunk.first:
                state = torch.empty(shape, device=device)
                dist.recv(state, group=group.handle, group_src=(group.rank - 1) % stages)
            inputs = [batch[name] for name in chunk.fields] if chunk.first else [state]
            out = chunk(*inputs, **(batch if chunk.last else {}))
            if not chunk.last:
                dist.send(out.contiguous(), group=group.handle, group_dst=(group.rank + 1) % stages)
            losses += chunk.losses
            chunk.losses.clear()
        for unit in (unit for units in self._units for unit in units):
            unit.module.reshard()
        return losses

    def _agreed(self, batch: Batch) -> tuple[int, ...]:
        """The shape of the states between stages; only the first stage has a whole batch."""
        group = self._mesh.pipeline
        sizes = torch.zeros(8, dtype=torch.int64, device=self._mesh.world.device)
        if group.rank == 0:
            shape = self._shape_of(batch)
            sizes[: len(shape) + 1] = torch.tensor([len(shape), *shape], device=sizes.device)
        dist.broadcast(sizes, group=group.handle, group_src=0)
        dims, *known = sizes.tolist()
        return tuple(known[:dims])

    def _schedule(self, micro_batches: Sequence[Batch]) -> Any:
        """The schedule of a step: of the first one's shapes, which all steps have."""
        key = (len(micro_batches),)
        if key not in self._schedules:
            shape = self._agreed(micro_batches[0])
            self._schedules[key] = self._build(len(micro_batches), shape, micro_batches[0])
        return self._schedules[key]

    def _build(self, count: int, shape: tuple[int, ...], batch: Batch) -> Any:
        group, device = self._mesh.pipeline, self._mesh.world.device
        total = group.size * len(self._chunks)
        state = torch.empty(shape, device=device, requires_grad=True)
        stages: list[Any] = []
        for i, (chunk, units) in enumerate(zip(self._chunks, self._units, strict=True)):
            given = tuple(batch[name] for name in sorted(batch)) if chunk.first else (state,)
            made = torch.empty((), device=device, requires_grad=True) if chunk.last else state
            stage = _Stage(
                chunk,
                group.rank + i * group.size,
                total,
                device,
                input_args=given,
                output_args=(made,),
                group=group.handle,
            )
            stage.units = units
            stages.append(stage)
        loss: Callable[[Tensor, Tensor], Tensor] = _loss
        if self._engine.schedule == "1f1b":
            return Schedule1F1B(stages[0], count, loss_fn=loss, scale_grads=False)
        kind = {
            "interleaved": ScheduleInterleaved1F1B,
            "zero-bubble": ScheduleInterleavedZeroBubble,
        }[self._engine.schedule]
        return kind(stages, count, loss_fn=loss, scale_grads=False)


def _loss(output: Tensor, _target: Tensor) -> Tensor:
    """The last chunk has computed it."""
    return output
