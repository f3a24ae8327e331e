"""Base of both DeepSpeed engines: optimiser state as slices, the global norm, compression."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.format import Reader, StateSlice
from core.errors import ConfigError
from parallel.adamw import MOMENTS
from parallel.compress.powersgd import Reduced
from parallel.config import EngineConfig, OptimConfig
from parallel.control import Decision, Judge, Vote
from parallel.engines.deepspeed.hooks import (
    Gradients,
    compress_zero12,
    ensure_adam_state,
    fragments,
    gather_small,
    held_bytes,
    hook_zero12,
    publish_masters,
)
from parallel.engines.frozen import trained
from parallel.engines.modules import (
    Compressor,
    add_stream_gradients,
    build_compressor,
    counts_once,
    decide_update,
    load_scales,
    mean_losses,
    placements,
    scale_slices,
)
from parallel.engines.protocol import EngineSettings, Losses, Program, StepResult
from parallel.mesh import Group, Mesh
from parallel.scales import Scales


@dataclass(kw_only=True)
class Pass:
    """Results of one step or evaluation, filled by DeepSpeed's callbacks."""

    wants_stop: bool = False
    losses: list[Losses] = field(default_factory=list)
    """Losses of the micro-batches so far, on the ranks that compute them."""
    reductions: list[Reduced] = field(default_factory=list)
    """Compressed reductions, without their gradients."""
    decision: Decision | None = None
    """The decision about a step's update, once its gradients are averaged."""


class DeepSpeedEngine:
    """Named, sharded optimiser state of a DeepSpeed engine; subclasses build it and step."""

    name: str
    _engine: Any
    """DeepSpeed's engine."""

    def __init__(
        self,
        program: Program,
        names: Mapping[str, nn.Parameter],
        mesh: Mesh,
        copies: int,
        scales: Scales,
        judge: Judge,
    ) -> None:
        """`copies`: number of nodes that hold the same partitions."""
        self._names, self._places, self._mesh = names, placements(names), mesh
        self._trained = trained(names)
        self._saved = names if program.saves_frozen else self._trained
        self._copies, self._scales, self._judge = copies, scales, judge
        self._losses_named = program.losses
        self._compressor: Compressor | None = None
        self._current = Pass()
        """The current pass, filled by the callbacks."""

    @property
    def _optimizer(self) -> Any:
        """DeepSpeed's optimiser, which wraps AdamW."""
        return self._engine.optimizer

    def _begin(self, wants_stop: bool = False) -> Pass:
        """Start a step or an evaluation; `wants_stop` as in `Engine.step`."""
        self._current = Pass(wants_stop=wants_stop)
        return self._current

    def _norm(self, gradients: Gradients) -> float:
        """The global norm of partitioned gradients; infinite if the update is to be skipped."""
        add_stream_gradients(gradients, self._places, self._mesh)
        squares = [
            gradient.double().square().sum() / self._copies
            for name, gradient in gradients.items()
            if counts_once(self._places[name], self._mesh)
        ]
        if not all(reduced.finite for reduced in self._current.reductions):
            squares.append(torch.tensor(math.inf, device=self._mesh.world.device))
        return self._decide(squares)

    def _decide(self, squares: list[Tensor]) -> float:
        """Decide about this step's update with all ranks; returns the norm to clip by."""
        step = self._current
        vote = Vote(losses=step.losses, wants_stop=step.wants_stop)
        decision = decide_update(squares, self._mesh, self._scales, vote, self._judge)
        step.decision = decision
        return decision.clipped_by

    def state_slices(self) -> Iterator[StateSlice]:
        """The slices that this rank saves: ZeRO's fragments, and gradient scales."""
        yield from scale_slices(self._scales, self._mesh)
        if self._mesh.between.rank > 0:
            return
        for name, parameter in self._saved.items():
            place = self._places[name]
            if not counts_once(place, self._mesh):
                continue
            if name not in self._trained:
                yield from self._frozen_slices(name)
                continue
            for part in fragments(self._optimizer, parameter):
                tensors = {"master": part.master, **part.state}
                for kind in ("master", *MOMENTS):
                    if kind not in tensors:  # before the first step
                        continue
                    state_slice = place.slice(name, kind, part.start, tensors[kind])
                    if state_slice is not None:
                        yield state_slice
                if "step" in part.state and part.start == 0 and place.first == 0:
                    data = part.state["step"].reshape(1)
                    yield StateSlice(name=name, kind="step", shape=(), start=0, data=data)

    def error_slices(self) -> Iterator[StateSlice]:
        """The compression buffers that this rank saves; collective over the replicas."""
        if self._compressor is not None:
            yield from self._compressor.slices()

    @torch.no_grad()
    def load_slices(self, reader: Reader) -> None:
        """Load masters and moments from a checkpoint of any mesh, and update all ranks' weights."""
        ensure_adam_state(self._optimizer)
        for name, parameter in self._trained.items():
            place = self._places[name]
            for part in fragments(self._optimizer, parameter):
                count = part.master.numel()
                part.master.copy_(place.read(reader, name, "master", part.start, count))
                for kind in MOMENTS:
                    part.state[kind].copy_(place.read(reader, name, kind, part.start, count))
                part.state["step"].copy_(reader.tensor(name, "step"))
        if self._saved is not self._trained:
            self._read_frozen(reader)
        publish_masters(self._optimizer)
        load_scales(self._scales, reader)
        if self._compressor is not None:
            self._compressor.load(reader)

    @torch.no_grad()
    def load_frozen(self, reader: Reader) -> None:
        """Take this rank's part of the frozen weights from a model of any mesh; collective."""
        if self.frozen():
            self._read_frozen(reader)
            gather_small(self._optimizer)

    def frozen(self) -> frozenset[str]:
        """Names of the parameters of this rank that are not trained."""
        return frozenset(self._names.keys() - self._trained.keys())

    def _read_frozen(self, reader: Reader) -> None:
        """Read this rank's part of the frozen weights; the other ranks do not see it yet."""
        for name in sorted(self.frozen()):
            weights, start = self._frozen_part(name)
            flat = self._places[name].read(reader, name, "master", start, weights.numel())
            weights.copy_(flat.view_as(weights))

    def _frozen_part(self, name: str) -> tuple[Tensor, int]:
        """This rank's part of a frozen parameter, and its first element in the flat local one."""
        parameter: Any = self._names[name]
        if not hasattr(parameter, "ds_tensor"):
            return parameter.detach(), 0
        return parameter.ds_tensor, parameter.ds_tensor.numel() * self._mesh.machine.rank

    def _frozen_slices(self, name: str) -> Iterator[StateSlice]:
        """The slice of a frozen parameter that this rank saves: its shard, or one of the copies."""
        weights, start = self._frozen_part(name)
        if hasattr(self._names[name], "ds_tensor") or self._mesh.data.rank == 0:
            part = self._places[name].slice(name, "master", start, weights)
            if part is not None:
                yield part

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        """Tensors that are equal on all ranks of a group: weights, or shards between nodes."""
        whole = {name: p for name, p in self._names.items() if not hasattr(p, "ds_tensor")}
        common: list[Tensor] = [p for n, p in whole.items() if not self._places[n].split]
        shards = [self._shard(p) for p in self._names.values() if hasattr(p, "ds_tensor")]
        groups: list[tuple[list[Tensor], Group]] = [
            (list(whole.values()), self._mesh.data),
            (common, self._mesh.tensor),
            (shards, self._mesh.between),
        ]
        return [(tensors, group) for tensors, group in groups if tensors]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that this rank holds a part of, and saves."""
        return {name: self._places[name].shape for name in self._saved}

    def _shard(self, parameter: Any) -> Tensor:
        """A ZeRO-3 shard without its uninitialised padding."""
        count = parameter.ds_tensor.numel()
        real = max(0, min(count, parameter.ds_numel - count * self._mesh.machine.rank))
        shard: Tensor = parameter.ds_tensor.reshape(-1)[:real]
        return shard

    def memory(self) -> dict[str, int]:
        """Bytes on this rank in ZeRO's real layout, with padding and copies."""
        return held_bytes(self._optimizer, self._names)

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.destroy()

    def _refuse_one_process(self, mesh: Mesh) -> None:
        if mesh.world.group is None:
            raise ConfigError(
                f"{self.name} needs at least 2 ranks; use --engine.name reference on one process"
            )

    def _attach_zero12(self, program: Program, settings: EngineSettings) -> None:
        """Hook the norm, and compression over the replicas, into ZeRO-1 or ZeRO-2."""
        mesh, held = self._mesh, placements(self._trained)
        self._compressor = build_compressor(
            program, held, settings, mesh.data, mesh.tensor, mesh.world.device
        )
        hook_zero12(self._optimizer, self._names, self._norm)
        if self._compressor is not None:
            compress_zero12(self._optimizer, self._names, self._compressed)

    def _compressed(self, gradients: Gradients) -> Gradients:
        """Average gradients with compression, and keep its byte counts for the step's metrics."""
        assert self._compressor is not None, "hooked only with compression"
        reduced = self._compressor.reduce(gradients)
        self._current.reductions.append(replace(reduced, gradients={}))
        return reduced.gradients

    def _result(self, step: Pass) -> StepResult:
        assert step.decision is not None, "DeepSpeed asks for the norm in every step"
        facts = self._compressor.facts(step.reductions) if self._compressor else {}
        return StepResult(
            losses=mean_losses(step.losses, self._losses_named, self._mesh),
            grad_norm=step.decision.norm,
            skipped=step.decision.skipped,
            stopping=step.decision.stopping,
            facts={**facts, **self._scales.facts()},
        )


def zero_config(
    optim: OptimConfig, engine: EngineConfig, stage: int, elements: int | None, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's config; `elements` sizes one bucket for all gradients, as compression needs."""
    own = engine.bucket(device.type == "cuda")
    bucket = max(elements or 0, own)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": own,
    }
    if stage == 3:
        del zero["allgather_bucket_size"]
        zero |= {"stage3_prefetch_bucket_size": own, "reduce_bucket_size": own}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
