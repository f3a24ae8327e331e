"""Memory of a rank beside the tensors of its steps: NCCL's buffers, and the peaks at start-up.

This project measured none of these constants: each names its source.
"""

import re
from dataclasses import dataclass
from math import prod

from core.memory import size_text
from models.initialization import ROWS_A_KEY
from models.prior import TABLES
from planning.estimate.hardware import GB, Hardware
from planning.estimate.memory import Bytes, Loads
from planning.estimate.zero_layout import groups_of, shard_numel, stage_of_zero
from training.config import PriorTrain

NCCL = "nccl"
"""The category of NCCL's buffers, beside those of planning/estimate/memory.py."""
RING = 12 * 2**20
"""Bytes per channel for the neighbours of a ring, or for a peer: 10 MiB to receive in all three
protocols (4 + 4.7 + 0.5), 2 MiB to send. Source: the allocations in NVIDIA/nccl issue 1685."""
TREES = 17 * 2**20
"""Additional bytes per channel for all-reduces, which also use trees. Source: 688 MiB of a
communicator of 24 channels after an all-reduce on A100s, NVIDIA/nccl issue 964."""
PROCESS = int(2.5 * GB)
"""Host bytes of a rank without a model: 2.06 GB with CUDA's libraries (pytorch issue 113326), plus
the imports of DeepSpeed, megatron-core and the loader."""


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """The peaks of a rank before its first step, in bytes."""

    host: int
    """Weights in host memory, without the process itself."""
    device: int
    """Weights and gradients on the device."""
    ranks: int
    """Ranks that start on a node at the same time."""
    loader: int = 0
    """Batches that are made ahead of the steps; they follow when the weights are on the device."""

    @property
    def node(self) -> int:
        """Host memory of all ranks of a node."""
        return self.ranks * (PROCESS + self.own)

    @property
    def own(self) -> int:
        """Host memory of a rank beside its process, at its peak."""
        return max(self.host, self.loader)

    def problem(self, hardware: Hardware) -> str:
        """Why a node cannot start its ranks; empty if it can."""
        if self.node <= hardware.host_memory:
            return ""
        return (
            f"starting takes {size_text(self.node)} of host memory a node, {self.ranks} ranks of "
            f"{size_text(PROCESS + self.own)}; {hardware.name} has "
            f"{size_text(hardware.host_memory)} (--host-memory)"
        )


def communicators(settings: PriorTrain, stage: int = 0) -> list[tuple[int, bool]]:
    """(size, whether it all-reduces) of each process group that a stage's rank communicates over.

    DeepSpeed and megatron-core create some of their own over the same ranks as the mesh's groups.
    """
    mesh, engine = settings.mesh, settings.engine.name
    cloned = engine == "deepspeed_zero" and stage_of_zero(settings) < 3
    groups = [(mesh.world, True)]
    if engine == "deepspeed_pipe":
        groups += [(mesh.tensor * mesh.pipeline, True), (mesh.tensor, True)]
        groups += [(mesh.pipeline, False)] * 2 + [(mesh.data, True)] * 2
        cuts = mesh.pipeline > 1 and not mesh.sequence_parallel  # what stages send
        groups += [(mesh.tensor, False)] if cuts else []
        ends = _shares_tables(settings) and stage in (0, mesh.pipeline - 1)
        groups += [(2, True)] if ends else []
    elif engine == "torch" and mesh.pipeline > 1:
        groups += [(mesh.tensor, True), (mesh.data, True), (mesh.pipeline, False)]
        ends = _shares_tables(settings) and stage in (0, mesh.pipeline - 1)
        groups += [(2, True)] if ends else []
    elif engine == "torch" and mesh.nodes == 1:
        groups += [(mesh.tensor, True), (mesh.data, True)] if mesh.tensor > 1 else []
    elif mesh.nodes > 1:
        groups += [(mesh.local, False), (mesh.nodes, True)]
    elif mesh.tensor > 1:
        groups += [(mesh.tensor, True), (mesh.data, True)]
    elif cloned:
        groups += [(mesh.data, True)]
    return [row for row in groups if row[0] > 1]


def _shares_tables(settings: PriorTrain) -> bool:
    """True if the first and the last stage add up gradients of tied embeddings."""
    if not settings.model.tied or settings.mesh.pipeline == 1 or settings.lora.rank:
        return False
    return not all(settings.freeze and re.search(settings.freeze, name) for name in TABLES)


def nccl_bytes(settings: PriorTrain, hardware: Hardware) -> Bytes:
    """Bytes of NCCL's buffers on a rank: its groups, and up to two neighbouring stages.

    Connections are made on first use (NCCL 2.22 and later).
    """
    rings = [RING + TREES * reduces for _, reduces in communicators(settings)]
    peers = min(settings.mesh.pipeline - 1, 2)
    return {NCCL: hardware.channels * (sum(rings) + peers * RING)}


def start_up(loads: Loads, hardware: Hardware) -> StartUp:
    """The peaks of one rank while its engine is built.

    Layers are built on the host and moved one by one; ZeRO-3 initialises only the rows of its
    shards. DeepSpeed 0.19.8 flattens the weights of ZeRO-1 and ZeRO-2 into a copy on the device if
    both fit, else into two copies on the host (runtime/zero/stage_1_and_2.py).
    """
    settings, held = loads.settings, list(loads.held.values())
    ranks = min(settings.mesh.world, hardware.gpus_per_node)
    stage = stage_of_zero(settings)
    if stage == 3:
        widest = max(prod(h.placement.shape[1:]) for h in held)
        mine = sum(shard_numel(h, settings.mesh.local) for h in held)
        return StartUp(host=4 * ROWS_A_KEY * widest, device=2 * 4 * mine, ranks=ranks)
    layer = max(4 * sum(h.numel for h in part.parameters.values()) for part in loads.layers)
    weights = 4 * sum(h.numel for h in held)
    flat = 4 * max(sum(h.numel for h in group) for group in groups_of(loads.held)) if stage else 0
    if weights + flat <= hardware.usable:
        return StartUp(host=layer, device=weights + flat, ranks=ranks)
    return StartUp(host=max(layer, 2 * flat), device=weights, ranks=ranks)
