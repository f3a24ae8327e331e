"""What the DeepSpeed engines share: optimiser state as slices, the global norm, compression."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.format import Reader, StateSlice
from core.errors import ConfigError
from parallel.config import OptimConfig
from parallel.control import Control
from parallel.engines.deepspeed.hooks import (
    Gradients,
    compress_zero12,
    ensure_adam_state,
    fragments,
    held_bytes,
    hook_zero12,
    publish_masters,
)
from parallel.engines.modules import (
    Compressor,
    build_compressor,
    counts_once,
    global_norm,
    load_scales,
    mean_losses,
    scale_slices,
)
from parallel.engines.protocol import EngineSettings, Losses, Program, StepResult
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from parallel.scales import Scales

BUCKET = 2**20
"""Elements reduced together; ZeRO allocates this much, so it is small on CPUs."""


class DeepSpeedState:
    """The named, sharded state behind a DeepSpeed optimiser."""

    def __init__(
        self,
        names: Mapping[str, nn.Parameter],
        places: Mapping[str, Placement],
        mesh: Mesh,
        copies: int,
        scales: Scales,
        control: Control,
    ) -> None:
        """`copies` are the ranks of other machines that hold the same partitions."""
        self.names, self.places, self.mesh, self.control = names, places, mesh, control
        self._copies, self.scales = copies, scales
        self.optimizer: Any = None
        self.compressor: Compressor | None = None

    def norm(self, gradients: Gradients) -> float:
        """The global norm of partitioned gradients; infinite if the update is to be skipped."""
        squares = [
            gradient.double().square().sum() / self._copies
            for name, gradient in gradients.items()
            if counts_once(self.places[name], self.mesh)
        ]
        if self.compressor is not None and not self.compressor.take_finite():
            squares.append(torch.tensor(math.inf, device=self.mesh.world.device))
        return global_norm(squares, self.mesh, self.scales, self.control)

    def slices(self) -> Iterator[StateSlice]:
        """What this rank saves: ZeRO's fragments, and its compression buffers."""
        if self.compressor is not None:
            yield from self.compressor.slices()
        yield from scale_slices(self.scales, self.mesh)
        if self.mesh.between.rank > 0:
            return
        for name, parameter in self.names.items():
            place = self.places[name]
            if not counts_once(place, self.mesh):
                continue
            for part in fragments(self.optimizer, parameter):
                tensors = {"master": part.master, **part.state}
                for kind in ("master", "exp_avg", "exp_avg_sq"):
                    if kind not in tensors:  # before the first step
                        continue
                    found = place.slice(name, kind, part.start, tensors[kind])
                    if found is not None:
                        yield found
                if "step" in part.state and part.start == 0 and place.first == 0:
                    data = part.state["step"].reshape(1)
                    yield StateSlice(name=name, kind="step", shape=(), start=0, data=data)

    @torch.no_grad()
    def load(self, reader: Reader) -> None:
        """Fill masters and moments, and spread the weights."""
        ensure_adam_state(self.optimizer)
        for name, parameter in self.names.items():
            place = self.places[name]
            for part in fragments(self.optimizer, parameter):
                count = part.master.numel()
                part.master.copy_(place.read(reader, name, "master", part.start, count))
                for kind in ("exp_avg", "exp_avg_sq"):
                    part.state[kind].copy_(place.read(reader, name, kind, part.start, count))
                part.state["step"].copy_(reader.tensor(name, "step"))
        publish_masters(self.optimizer)
        load_scales(self.scales, reader)
        if self.compressor is not None:
            self.compressor.load(reader)

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        """What the ranks of a group hold alike: weights, or in the paper's layout their shards."""
        whole = {name: p for name, p in self.names.items() if not hasattr(p, "ds_tensor")}
        common: list[Tensor] = [p for n, p in whole.items() if not self.places[n].split]
        shards = [self._shard(p) for p in self.names.values() if hasattr(p, "ds_tensor")]
        return [
            (list(whole.values()), self.mesh.data),
            (common, self.mesh.tensor),
            (shards, self.mesh.between),
        ]

    def _shard(self, parameter: Any) -> Tensor:
        """A ZeRO-3 shard without its padding, which nobody sets."""
        count = parameter.ds_tensor.numel()
        real = max(0, min(count, parameter.ds_numel - count * self.mesh.machine.rank))
        shard: Tensor = parameter.ds_tensor.reshape(-1)[:real]
        return shard

    def facts(self) -> dict[str, float]:
        """Figures of the last step: compression and gradient scales."""
        facts = self.compressor.take_facts() if self.compressor else {}
        return {**facts, **self.scales.facts()}

    def memory(self) -> dict[str, int]:
        """Bytes on this rank, as ZeRO really laid them out, with its padding and copies."""
        return held_bytes(self.optimizer, self.names)


class DeepSpeedEngine:
    """What both DeepSpeed engines do alike; a subclass builds `_engine` and `_state`."""

    name: str
    _engine: Any
    _state: DeepSpeedState
    _losses_named: tuple[str, ...]
    """What the program's losses are called."""

    def state_slices(self) -> Iterator[StateSlice]:
        """The parts of weights, moments and compression buffers that this rank saves."""
        return self._state.slices()

    def load_slices(self, reader: Reader) -> None:
        """Take this rank's part of the state from a checkpoint of any mesh."""
        self._state.load(reader)

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        """Tensors that all ranks of a group hold alike between two steps."""
        return [(tensors, group) for tensors, group in self._state.replicas() if tensors]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shapes of the parameters that this rank holds a part of."""
        return {name: place.shape for name, place in self._state.places.items()}

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
        state, mesh = self._state, self._state.mesh
        state.optimizer = self._engine.optimizer
        state.compressor = build_compressor(
            program, state.places, settings, mesh.data, mesh.tensor, mesh.world.device
        )
        hook_zero12(state.optimizer, state.names, state.norm)
        if state.compressor is not None:
            reduce = state.compressor.reduce
            compress_zero12(state.optimizer, state.names, lambda g: reduce(g).gradients)

    def _result(self, seen: list[Losses]) -> StepResult:
        return StepResult(
            losses=mean_losses(seen, self._losses_named, self._state.mesh),
            grad_norm=self._state.control.norm,
            skipped=self._state.control.skipped,
            facts=self._state.facts(),
        )


def zero_config(
    optim: OptimConfig, stage: int, accumulate: int, elements: int | None
) -> dict[str, Any]:
    """DeepSpeed's config. `elements` sizes the bucket that compression needs whole."""
    bucket = max(elements or 0, BUCKET)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": BUCKET,
    }
    if stage == 3:
        del zero["allgather_bucket_size"]
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "reduce_bucket_size": BUCKET}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
