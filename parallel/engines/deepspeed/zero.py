"""DeepSpeed owns the step: ZeRO-1/2/3 over the replicas, with tensor parallelism.

With mesh.nodes above 1 this is the paper's layout: ZeRO-3 shards over the ranks of a node,
and gradient shards are reduced, compressed or not, between the nodes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from core.log import LOG
from parallel.engines.deepspeed.engine import DeepSpeedEngine, zero_config
from parallel.engines.deepspeed.hooks import Gradients, GroupsOfMesh, hook_zero3, initialize
from parallel.engines.deepspeed.zero3_shards import Shards
from parallel.engines.modules import build_compressor
from parallel.engines.protocol import (
    Batch,
    EngineSettings,
    Losses,
    Program,
    StepResult,
    Whole,
    build_adamw,
    scales_of,
)
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.replicas import copy_parts, flat_average


class DeepSpeedZeroEngine(DeepSpeedEngine):
    """Optimiser state (and gradients, and weights) sharded over the replicas."""

    name = "deepspeed_zero"

    def __init__(self, program: Program, settings: EngineSettings, mesh: Mesh) -> None:
        """Raises: ConfigError on one process without a process group."""
        self._refuse_one_process(mesh)
        self._stage = settings.engine.zero_stage
        self._shards = mesh.machine if self._stage == 3 else mesh.data
        own = None
        if self._stage == 3:
            own = Shards(program.layers, settings.optim, mesh.machine, mesh.world.device)
            program = replace(program, layers=own.layers)
        self._whole = Whole(program, settings.engine, mesh.world.device)
        names = self._whole.stage.global_names()
        scales = scales_of(program, self._whole.stage.scales, settings.engine)
        super().__init__(program, names, mesh, mesh.between.size, scales, settings.judge)
        compress = settings.compress.on
        elements = sum(p.numel() for p in self._trained.values()) if compress else None
        engine = settings.engine
        config = zero_config(settings.optim, engine, self._stage, elements, mesh.world.device)
        whole_world = mesh.data.size == mesh.world.size and mesh.between.size == 1
        mpu = None if whole_world else GroupsOfMesh(mesh, "machine" if self._stage == 3 else "data")
        optimizer = build_adamw(names, settings.optim)
        with own.adopted() if own else nullcontext():
            self._engine = initialize(self._whole, optimizer, config, mesh.world.device, mpu)
        if self._stage == 3:
            places = {n: self._places[n] for n in self._trained}
            compressible = {n: p for n, p in places.items() if n.endswith(program.compressed)}
            shards = {n: self._shard_of(n, p) for n, p in compressible.items()} if compress else {}
            held = {n: p for n, p in shards.items() if p is not None}
            self._compressor = build_compressor(
                program, held, settings, mesh.between, mesh.machine, mesh.world.device
            )
            hook_zero3(self._engine.optimizer, names, self._norm_between_machines)
        else:
            self._attach_zero12(program, settings)

    def step(
        self, micro_batches: Sequence[Batch], lr: float, wants_stop: bool = False
    ) -> StepResult:
        step = self._begin(wants_stop)
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        for batch in micro_batches:
            losses = self._engine(batch)
            step.losses.append({name: value.detach() for name, value in losses.items()})
            self._engine.backward(losses["loss"])
            self._engine.step()  # only the last one updates the weights
        return self._result(step)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        self._engine.eval()
        losses: Losses = self._engine(batch)
        return losses

    def layers(self) -> dict[str, nn.Module]:
        return dict(self._whole.stage.layers.items())

    def _shard_of(self, name: str, place: Placement) -> Placement | None:
        """This rank's ZeRO-3 shard as rows of the matrix, or None if it cuts a row in two."""
        parameter: Any = self._names[name]
        shard = place.flat_shard(self._shards.rank, int(parameter.partition_numel()))
        if shard is None:
            LOG.warning("%s is cut inside of a row: its gradient cannot be compressed", name)
        return shard

    def _norm_between_machines(self, gradients: Gradients) -> float:
        """Average shards over the nodes (in place), then take the global norm."""
        between = self._mesh.between
        if between.size == 1:
            return self._norm(gradients)
        if self._compressor is not None:
            squares, reduced = self._compressor.average(gradients)
            self._current.reductions.append(reduced)
            return self._decide(squares)
        tensors = list(gradients.values())
        copy_parts(flat_average(tensors, between.handle, between.size), tensors)
        return self._norm(gradients)
