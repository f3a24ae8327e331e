"""The grid of ranks and its process groups, passed as values.

rank = (stage * data + replica) * tensor + shard: tensor ranks are neighbours, stages are furthest
apart. megatron-core builds the groups; they are checked against this formula, and the pipeline
engine checks DeepSpeed's topology against it. Planning and rehearsal take it from here.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from core.errors import TapirError
from parallel.config import MeshConfig
from parallel.device import worker_device
from parallel.tensor.ops import TensorParallel
from parallel.world import World

AXES = ("pipeline", "data", "tensor")
"""Axes of the grid of ranks; the last one varies fastest with the global rank."""


@dataclass(frozen=True)
class Group:
    """A process group, as one of its ranks sees it."""

    handle: "dist.ProcessGroup | None" = None
    """None in a world of one rank, and for unused axes."""
    rank: int = 0
    """This rank's index in the group."""
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place in the grid, and the groups that it belongs to."""

    world: World = field(default_factory=World)
    data: Group = Group()
    """Replicas that read different samples; all hold the same part of the model."""
    tensor: Group = Group()
    """Ranks that share each matmul."""
    pipeline: Group = Group()
    """The stages of one replica."""
    ends: Group = Group()
    """The first and the last stage of one replica, which share tied weights."""
    machine: Group = Group()
    """The data-parallel ranks of one node: ZeRO-3 shards over them."""
    between: Group = Group()
    """The ranks with the same local index on all nodes: they hold the same shards."""

    shared: TensorParallel = field(default_factory=TensorParallel)
    """Operations of the tensor group, for the layers."""

    @property
    def needs_data(self) -> bool:
        """True on the first stage, which reads inputs, and on the last, which reads targets."""
        return self.pipeline.rank in (0, self.pipeline.size - 1)

    @property
    def data_ranks(self) -> list[int]:
        """The global ranks that need data, in order."""
        stage = self.world.size // self.pipeline.size
        last = range(self.world.size - stage, self.world.size)
        return sorted({*range(stage), *last})


def own_mesh(number: int = 0) -> Mesh:
    """A single-process mesh on this process's own device, whatever launcher started it.

    `number` is the worker's number in its job; workers take different GPUs while there are any.
    """
    return Mesh(world=World(device=worker_device(number)))


class RankCoordinates(NamedTuple):
    """A rank's coordinates in the grid, in the order of AXES."""

    stage: int = 0
    replica: int = 0
    shard: int = 0
    """Its rank in the tensor group."""


def rank_at(config: MeshConfig, at: RankCoordinates) -> int:
    """The global rank at some coordinates."""
    return (at.stage * config.data + at.replica) * config.tensor + at.shard


def coordinates_of(config: MeshConfig, rank: int) -> RankCoordinates:
    """The coordinates of a global rank."""
    rest, shard = divmod(rank, config.tensor)
    stage, replica = divmod(rest, config.data)
    return RankCoordinates(stage=stage, replica=replica, shard=shard)


def axis_ranks(config: MeshConfig, axis: str) -> list[list[int]]:
    """The groups of ranks along one axis of the grid, in order."""
    sizes = [getattr(config, name) for name in AXES]
    ranks = [rank_at(config, RankCoordinates(*at)) for at in np.ndindex(*sizes)]
    grid = np.reshape(ranks, sizes)
    moved = np.moveaxis(grid, AXES.index(axis), -1)
    return [[int(rank) for rank in row] for row in moved.reshape(-1, moved.shape[-1])]


def build_mesh(config: MeshConfig, world: World) -> Mesh:
    """Build all groups; every rank of the world must call it.

    Raises: TapirError if megatron-core arranges the ranks differently.
    """
    if world.group is None:
        return Mesh(world=world)
    groups = dict.fromkeys(AXES, Group())
    shared = TensorParallel()
    if config.data == world.size:
        groups["data"] = Group(world.group, world.rank, world.size)
    else:
        from parallel.tensor import megatron  # noqa: PLC0415 - takes seconds, few meshes need it

        built = megatron.megatron_groups(config.tensor, config.pipeline)
        groups = {axis: _checked(config, axis, built[axis], world.rank) for axis in AXES}
        groups["ends"] = _ends(built.get("ends"), groups["pipeline"])
        if config.tensor > 1:
            shared = megatron.MegatronTensorParallel(config.sequence_parallel)
    machine, between = groups["data"], Group()
    if config.nodes > 1:
        rows = np.asarray(axis_ranks(config, "data")).reshape(-1, config.nodes, config.local)
        machine = _subgroup(rows.reshape(-1, config.local), world.rank)
        between = _subgroup(rows.swapaxes(1, 2).reshape(-1, config.nodes), world.rank)
    return Mesh(world=world, machine=machine, between=between, shared=shared, **groups)


def _checked(config: MeshConfig, axis: str, handle: "dist.ProcessGroup", rank: int) -> Group:
    expected = next(row for row in axis_ranks(config, axis) if rank in row)
    ranks = dist.get_process_group_ranks(handle)
    if ranks != expected:
        raise TapirError(
            f"rank {rank}: megatron-core's {axis} group is {ranks}, the mesh expects {expected}; "
            "the installed megatron-core arranges ranks differently from the tested 0.16"
        )
    return Group(handle, expected.index(rank), len(expected))


def _ends(handle: "dist.ProcessGroup | None", stages: Group) -> Group:
    """The group of the first and the last stage, for those two."""
    if handle is None or stages.size == 1:
        return Group()
    return Group(handle, int(stages.rank > 0), 2)


def _subgroup(rows: "np.ndarray", rank: int) -> Group:
    mine = Group()
    for row in rows.tolist():
        handle = dist.new_group(row) if len(row) > 1 else None
        if rank in row:
            mine = Group(handle, row.index(rank), len(row))
    return mine
