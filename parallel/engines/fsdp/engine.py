"""torch's own stack owns the step: FSDP2 inside a machine, overlapped reductions between machines.

With mesh.nodes above 1 this is the paper's layout: weights are sharded over the ranks of a node,
and each layer's gradient shards are reduced between the nodes, compressed or not, while the
backward pass goes on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.format import KINDS, Reader, StateSlice
from core.errors import ConfigError
from parallel.control import Vote
from parallel.engines.frozen import trained
from parallel.engines.fsdp.buckets import Buckets, Reduction
from parallel.engines.fsdp.pipeline import Pipeline, chunks_of
from parallel.engines.fsdp.units import Sharder, hollow
from parallel.engines.modules import (
    build_compressor,
    counts_once,
    decide_update,
    load_scales,
    mean_losses,
    placements,
    scale_slices,
)
from parallel.engines.protocol import (
    Batch,
    EngineSettings,
    Losses,
    Program,
    Stage,
    StepResult,
    Whole,
    build_adamw,
    scales_of,
)
from parallel.mesh import Group, Mesh
from parallel.placement import Placement, global_names
from parallel.scales import Scale


class TorchEngine:
    """Matrices sharded over a machine's ranks; gains and biases on every rank."""

    name = "torch"

    def __init__(self, program: Program, settings: EngineSettings, mesh: Mesh) -> None:
        """Raises: ConfigError on one process without a process group."""
        if mesh.world.group is None:
            raise ConfigError(
                "torch needs at least 2 ranks; use --engine.name reference on one process"
            )
        device, self._mesh = mesh.world.device, mesh
        layers = [hollow(layer, device) for layer in program.layers]
        built = replace(program, layers=layers)
        cut = mesh.pipeline.size > 1
        chunks = chunks_of(built, settings.engine, mesh) if cut else []
        self._whole = None if cut else Whole(built, settings.engine, None)
        modules: list[Any] = [self._whole] if self._whole is not None else list(chunks)
        self._stages = [module.stage for module in modules]
        names = global_names(nn.ModuleDict(self.layers()))
        self._places = placements(names)
        scale_of = _scales_by_parameter(program, self._stages, names)
        sharder = Sharder(program.layers, mesh.machine, settings.engine, device, keeps=cut)
        each = [sharder.shard(dict(m.stage.layers.items()), m) for m in modules]
        self._units = [unit for units in each for unit in units]
        self._pipeline = Pipeline(program, chunks, each, settings.engine, mesh) if cut else None
        self._parts = {part.name: part for unit in self._units for part in unit.parts}
        self._masters = {
            name: self._parts[name].shard if name in self._parts else p for name, p in names.items()
        }
        self._trained = trained(self._masters)
        self._saved = self._masters if program.saves_frozen else self._trained
        self._vectors = [p for n, p in self._trained.items() if n not in self._parts]
        self._optimizer = build_adamw(self._masters, settings.optim)
        here = {name: scale for stage in self._stages for name, scale in stage.scales.items()}
        self._scales = scales_of(program, here, settings.engine)
        self._losses, self._judge = program.losses, settings.judge
        self._clip_norm = settings.optim.clip_norm
        self._compressor = build_compressor(
            program,
            self._shard_places(),
            settings,
            mesh.between,
            mesh.machine,
            device,
            bucket_of={p.name: unit.name for unit in self._units for p in unit.parts}.__getitem__,
        )
        shared = frozenset(program.tied) if cut else frozenset()
        self._buckets = Buckets(self._units, scale_of, self._places, mesh, self._compressor, shared)

    def step(
        self, micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False
    ) -> StepResult:
        losses = self._passes(micro_batches)
        reduction = self._reduce()
        vote = Vote(losses=losses, wants_stop=wants_stop)
        squares = self._squares(reduction)
        decision = decide_update(squares, self._mesh, self._scales, vote, self._judge)
        self._buckets.settle(reduction, refused=not math.isfinite(decision.norm))
        if not decision.skipped:
            self._update(decision.norm, lr)
        self._forget()
        return StepResult(
            losses=mean_losses(losses, self._losses, self._mesh),
            grad_norm=decision.norm,
            skipped=decision.skipped,
            stopping=decision.stopping,
            facts={**reduction.facts, **self._scales.facts()},
        )

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        if self._pipeline is None:
            assert self._whole is not None, "without a pipeline there is one module"
            losses: Losses = self._whole(batch)
            return losses
        alone = Mesh(world=self._mesh.world, pipeline=self._mesh.pipeline)
        means = mean_losses(self._pipeline.evaluate(batch), self._losses, alone)
        return {name: torch.tensor(value, device="cpu") for name, value in means.items()}

    def state_slices(self) -> Iterator[StateSlice]:
        """The slices that this rank saves: its shards, and on the first replica the vectors."""
        yield from scale_slices(self._scales, self._mesh)
        for name, master in self._saved.items():
            place, (start, saves) = self._places[name], self._held(name)
            if not (saves and counts_once(place, self._mesh)):
                continue
            tensors = {"master": master, **self._optimizer.state.get(master, {})}
            for kind in (kind for kind in KINDS if kind in tensors):
                if kind != "step":
                    part = place.slice(name, kind, start, tensors[kind])
                    if part is not None:
                        yield part
                elif start == 0 and place.first == 0:
                    data = tensors[kind].reshape(1)
                    yield StateSlice(name=name, kind=kind, shape=(), start=0, data=data)

    def error_slices(self) -> Iterator[StateSlice]:
        if self._compressor is not None:
            yield from self._compressor.slices()

    @torch.no_grad()
    def load_slices(self, reader: Reader) -> None:
        for name, master in self._saved.items():
            self._read(reader, name, "master", master)
            if name not in self._trained:
                continue
            state = self._optimizer.first_state(master)
            for kind, tensor in state.items():
                if kind == "step":
                    tensor.copy_(reader.tensor(name, kind))
                else:
                    self._read(reader, name, kind, tensor)
            self._optimizer.state[master] = state
        load_scales(self._scales, reader)
        if self._compressor is not None:
            self._compressor.load(reader)

    @torch.no_grad()
    def load_frozen(self, reader: Reader) -> None:
        for name in sorted(self.frozen()):
            self._read(reader, name, "master", self._masters[name])

    def frozen(self) -> frozenset[str]:
        return frozenset(self._masters.keys() - self._trained.keys())

    def replicas(self) -> list[tuple[list[Tensor], Group]]:
        vectors = {n: p for n, p in self._masters.items() if n not in self._parts}
        common: list[Tensor] = [p for n, p in vectors.items() if not self._places[n].split]
        shards: list[Tensor] = [part.shard for part in self._parts.values()]
        groups: list[tuple[list[Tensor], Group]] = [
            (list(vectors.values()), self._mesh.data),
            (common, self._mesh.tensor),
            (shards, self._mesh.between),
        ]
        shared = [part.shard for n, part in self._parts.items() if n in self._buckets.on_both_ends]
        groups.append((list(shared), self._mesh.ends))
        return [(tensors, group) for tensors, group in groups if tensors]

    def layers(self) -> dict[str, nn.Module]:
        return {name: m for stage in self._stages for name, m in stage.layers.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._places[name].shape for name in self._saved}

    def memory(self) -> dict[str, int]:
        """Bytes of shards, with padding, and of vectors."""
        sizes = {
            name: self._parts[name].padded if name in self._parts else p.numel()
            for name, p in self._masters.items()
        }
        trains = sum(sizes[name] for name in self._trained)
        moment = (self._optimizer.moments or torch.float32).itemsize
        return {
            "parameters": 4 * sum(sizes.values()),
            "gradients": 4 * trains,
            "optimizer": 2 * moment * sum(p.numel() for p in self._trained.values()),
        }

    def close(self) -> None:
        self._forget()

    def _passes(self, micro_batches: Sequence[Batch]) -> list[Losses]:
        """Forward and backward of a step; returns the losses of the micro-batches."""
        if self._pipeline is not None:
            self._buckets.last = True
            losses = self._pipeline.run(micro_batches)
            for unit in self._units:
                unit.forget()
            return losses
        losses = []
        for i, batch in enumerate(micro_batches):
            self._buckets.last = i == len(micro_batches) - 1
            losses.append(self._backward(batch, len(micro_batches)))
        return losses

    def _backward(self, batch: Batch, micro_batches: int) -> Losses:
        """Accumulate the gradients of one of `micro_batches`; returns its losses."""
        assert self._whole is not None, "without a pipeline there is one module"
        losses: Losses = self._whole(batch)
        (losses["loss"] / micro_batches).backward()
        for unit in self._units:
            unit.forget()
        return {name: value.detach() for name, value in losses.items()}

    def _squares(self, reduction: Reduction) -> list[Tensor]:
        """This rank's share of the squares of all gradients."""
        shares = []
        for name, square in reduction.squares.items():
            if counts_once(self._places[name], self._mesh):
                copies = self._mesh.between.size if name in self._parts else self._mesh.data.size
                shares.append(square / copies)
        return shares

    def _reduce(self) -> Reduction:
        vectors = {n: p for n, p in self._trained.items() if n not in self._parts}
        gradients = {n: p.grad for n, p in vectors.items() if p.grad is not None}
        return self._buckets.finish(gradients)

    @torch.no_grad()
    def _update(self, norm: float, lr: float) -> None:
        """Clip by the global norm, and update the masters, which are what FSDP2 gathers."""
        for name, gradient in self._buckets.gradients().items():
            if gradient.numel():
                self._parts[name].shard.grad = gradient
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        if norm + 1e-6 > self._clip_norm:
            torch._foreach_mul_(gradients, self._clip_norm / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def _forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._buckets.forget()

    def _held(self, name: str) -> tuple[int, bool]:
        """First element of what this rank holds in the flat local parameter; does it save it."""
        if name in self._parts:
            return self._parts[name].start, self._mesh.between.rank == 0
        return 0, self._mesh.data.rank == 0

    def _read(self, reader: Reader, name: str, kind: str, tensor: Tensor) -> None:
        start, _ = self._held(name)
        flat = self._places[name].read(reader, name, kind, start, tensor.numel())
        tensor.copy_(flat.view_as(tensor))

    def _shard_places(self) -> dict[str, Placement]:
        """Where the shards of what is trained are in the global matrices."""
        rank, places = self._mesh.machine.rank, {}
        for name in (name for name in self._trained if name in self._parts):
            shard = self._places[name].flat_shard(rank, self._parts[name].padded)
            if shard is not None:  # of convolutions, which are not compressed
                places[name] = shard
        return places


def _scales_by_parameter(
    program: Program, stages: Sequence[Stage], names: Mapping[str, nn.Parameter]
) -> dict[str, Scale]:
    """Parameter -> the gradient scale of its branch, in fp16: FSDP2 runs no hooks of parameters."""
    name_of = {id(parameter): name for name, parameter in names.items()}
    table: dict[str, Scale] = {}
    held: dict[str, tuple[Stage, Any]] = {
        name: (stage, m) for stage in stages for name, m in stage.layers.items()
    }
    for layer in (layer for layer in program.layers if layer.name in held):
        stage, module = held[layer.name]
        for key, (_, parameters) in (module.branches() if layer.branches else {}).items():
            scale = stage.scales.get(f"{layer.name}.{key}")
            if scale is not None:
                table |= {name_of[id(parameter)]: scale for parameter in parameters}
    return table
