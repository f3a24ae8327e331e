"""Counts of collectives under the ledger's labels."""

from collections.abc import Iterator

from parallel.config import MeshConfig
from parallel.ledger import Counts
from parallel.mesh import RankCoordinates, rank_at

FLOAT, DOUBLE = 4, 8


class Tally:
    """Counts under the ledger's labels; of groups with equal ranks, the last one is the label."""

    def __init__(self, mesh: MeshConfig, at: RankCoordinates) -> None:
        self.counts: Counts = {}
        self._labels: dict[tuple[int, ...], str] = {}
        self._ranks = dict(_groups(mesh, at))
        for name, ranks in self._ranks.items():
            self._labels[ranks] = name

    def add(self, group: str, operation: str, count: float, calls: int = 1) -> None:
        """Count `calls` operations of `count` bytes in total."""
        if group not in self._ranks:
            return
        label = self._labels[self._ranks[group]]
        row = self.counts.setdefault(label, {}).setdefault(operation, {"calls": 0, "bytes": 0})
        row["calls"] += calls
        row["bytes"] += int(count)

    def size(self, group: str) -> int:
        """Ranks of a group, 1 if there is none."""
        return len(self._ranks.get(group, (0,)))


def _groups(mesh: MeshConfig, at: RankCoordinates) -> Iterator[tuple[str, tuple[int, ...]]]:
    """This rank's groups of the mesh in the ledger's order, as in parallel/mesh.py."""
    if mesh.world == 1:
        return
    data = tuple(rank_at(mesh, at._replace(replica=d)) for d in range(mesh.data))
    yield "world", tuple(range(mesh.world))
    if mesh.nodes > 1:
        machine = at.replica // mesh.local
        yield "machine", data[machine * mesh.local : (machine + 1) * mesh.local]
        yield "between", data[at.replica % mesh.local :: mesh.local]
    else:
        yield "machine", data
    yield "data", data
    if mesh.data < mesh.world:
        yield "tensor", tuple(rank_at(mesh, at._replace(shard=t)) for t in range(mesh.tensor))
        if mesh.pipeline > 1 and at.stage in (0, mesh.pipeline - 1):
            yield "ends", tuple(rank_at(mesh, at._replace(stage=s)) for s in (0, mesh.pipeline - 1))
        yield "pipeline", tuple(rank_at(mesh, at._replace(stage=s)) for s in range(mesh.pipeline))
