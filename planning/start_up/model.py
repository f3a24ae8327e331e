"""CPU seconds and requests between the start of a job and the building of its engine.

Not in it: building the engine, DeepSpeed's and NCCL's own groups, reading a checkpoint, and waits
for other ranks and for name resolution. `python -m bench start_up` fits `rank`, `rank_level`,
`store` and `request`; the other constants were measured once (docs/LOG.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parallel.config import MeshConfig

SHARDS = 125_000
"""Shards of the data set that is assumed: the paper's 250M pairs, 2,000 a shard."""
_FIXED = 7
"""Requests of a rank to meet the others: it validates and pings, adds three sums, and reads how the
meeting ended, which is a wait and a get."""
_PAIR = 3
"""Requests to connect two ranks: two waits and a get of the other's address."""
_SPLITS, _READS = 2, 3
"""Splits of a data set; requests for one: does the manifest exist, the manifest, the index."""
_OF_ALL, _OF_MESH, _OF_NODES = 2, 16, 2
"""Process groups that a rank is in: those of all ranks; megatron-core's, with a tensor or pipeline
axis; those in and between nodes."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """CPU seconds of AMD EPYC cores: the fitted ones idle, the others beside other work."""

    imports: float = 4.4
    """torch, the training loop, DeepSpeed and megatron-core, in a new process."""
    rank: float = 0.0182
    """A rank that meets the others, with two groups of all ranks and a gather of texts."""
    rank_level: float = 0.00065
    """The same, for each level of the tree of ranks."""
    group: float = 0.00062
    """A further group that this rank is in."""
    group_each: float = 0.00031
    """All groups of the mesh, for each rank of the world: every rank names those of the others."""
    store: float = 0.0010
    """The store's thread on rank 0, for itself."""
    request: float = 1.49e-5
    """The store's thread, for each request."""
    check: float = 3.1e-5
    """Rank 0 reads and checks the manifest, for each shard."""
    dump: float = 3.0e-6
    """Rank 0 turns the manifest into bytes, for each shard."""
    load: float = 3.0e-6
    """A rank that reads records opens these bytes, for each shard."""


MEASURED = Constants()


@dataclass(frozen=True, kw_only=True)
class StartCosts:
    """What the start of one mesh takes."""

    seconds: dict[str, float]
    """CPU seconds by part, one after the other: rank 0's, and those of a rank that then opens the
    manifest. Ranks do the others at the same time, each on its own core."""
    store_requests_a_rank: int
    """Requests of a rank to the ranks' common store, without those while it waits."""
    store_requests: int
    """Those of all ranks."""
    data_requests: int
    """Requests to the data set's store for manifests and indexes, of all ranks."""
    data_readers: int
    """Ranks that open the data set."""

    @property
    def total(self) -> float:
        """CPU seconds of all parts."""
        return sum(self.seconds.values())


def start_costs(
    mesh: MeshConfig, shards: int = SHARDS, constants: Constants = MEASURED
) -> StartCosts:
    """The costs of a mesh's start, with a data set of this many shards."""
    world, made = mesh.world, groups(mesh)
    each = store_requests(world, made) if world > 1 else 0
    further = made - _OF_ALL if world > 1 else 0
    seconds = {
        "imports": constants.imports,
        "meeting": rank_seconds(world, constants) if world > 1 else 0.0,
        "groups": constants.group * further + constants.group_each * world if further else 0.0,
        "store": store_seconds(each * world, constants) if world > 1 else 0.0,
        "manifest": shards * (constants.check + (world > 1) * (constants.dump + constants.load)),
    }
    return StartCosts(
        seconds=seconds,
        store_requests_a_rank=each,
        store_requests=each * world,
        data_requests=_SPLITS * _READS,
        data_readers=world if mesh.pipeline < 3 else 2 * world // mesh.pipeline,
    )


def groups(mesh: MeshConfig) -> int:
    """Process groups that a rank creates before its engine."""
    axes = _OF_MESH if mesh.world > mesh.data else 0
    return _OF_ALL + axes + (_OF_NODES if mesh.nodes > 1 else 0)


def store_requests(world: int, made: int) -> int:
    """Requests of one rank: to meet, to publish its address in each group, to read its peers'.

    A barrier reaches 1, 2, 4, ... ranks both ways; a gather of texts some of these.
    """
    peers = 1 if world == 2 else 2 * math.ceil(math.log2(world)) - 1
    return _FIXED + made + _PAIR * min(peers, world - 1)


def rank_seconds(world: int, constants: Constants = MEASURED) -> float:
    """CPU seconds of a rank that meets the others."""
    return constants.rank + constants.rank_level * math.log2(world)


def store_seconds(requests: int, constants: Constants = MEASURED) -> float:
    """CPU seconds of the store's thread on rank 0 for the requests of all ranks."""
    return constants.store + constants.request * requests


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One world of light ranks."""

    world: int
    rank: float
    """Median CPU seconds of a rank, without those of the store and of gloo's loops."""
    store: float
    """CPU seconds of the store's thread."""
    requests: int
    """Requests of all ranks, with those while they waited."""


def fitted(rows: Sequence[Measured], constants: Constants = MEASURED) -> Constants:
    """The constants of the meeting and the store that follow from worlds of light ranks.

    Raises: ValueError for fewer than two worlds.
    """
    if len(rows) < 2:
        raise ValueError("a fit needs worlds of two sizes")
    rank, level = _least([(1.0, math.log2(r.world)) for r in rows], [r.rank for r in rows])
    store, request = _least([(1.0, r.requests) for r in rows], [r.store for r in rows])
    return replace(constants, rank=rank, rank_level=level, store=store, request=request)


def _least(features: list[tuple[float, float]], values: list[float]) -> tuple[float, float]:
    """Two factors of least squared relative error."""
    weights = 1 / np.asarray(values)
    table = np.asarray(features, float) * weights[:, None]
    first, second = np.linalg.lstsq(table, np.ones(len(values)), rcond=None)[0]
    return float(first), float(second)
