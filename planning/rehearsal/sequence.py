"""A rank's sequence of collectives and messages, which `tapir rehearse` compares."""

from dataclasses import dataclass, field
from math import prod

from parallel.config import MeshConfig
from parallel.mesh import RankCoordinates, coordinates_of, rank_at

PAIRS = ("send", "recv", "isend", "irecv")
"""Operations between two ranks; all others are over a group."""
POSTED = "isend"
"""A message whose sender goes on."""
CREATE = "new_group"
"""Creation of consecutive groups; every rank must create the same ones in the same order."""
OBJECTS = "objects"
AXES = ("pipeline", "machine", "local", "tensor")
"""Axes of the grid, slowest first; the replicas of a `machine` (node) are `local`."""
Coordinates = tuple[int, ...]


class NeverSent(Exception):
    """This rank waits for a message that nobody sends: its sequence ends here."""


@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """One call of a collective, or one message between two ranks."""

    kind: str
    """all_reduce, broadcast, send, recv, ..."""
    group: tuple[int, ...]
    """Global ranks that take part, in the group's order; for a message, the other rank alone."""
    bytes: int
    """Bytes of the larger side, as this rank sees it; 0 for objects, whose sizes may differ."""
    dtype: str
    """Type of the tensors; OBJECTS for pickled objects of the host."""
    root: int = -1
    """Global rank of the source of a broadcast or the target of a reduce; -1 = none."""
    device: str = ""
    """Type of the device that the tensors are on."""
    backend: str = ""
    """Backend of this device in this group: nccl, gloo."""
    detail: str = ""
    """Anything else that must be equal: a digest of the groups that are created."""
    places: tuple[str, ...] = ()
    """Call sites as `file:line function`, the innermost first."""

    @property
    def paired(self) -> bool:
        """True for a message between two ranks."""
        return self.kind in PAIRS

    @property
    def sends(self) -> bool:
        """True for this rank's side of a message that it sends."""
        return self.kind in ("send", POSTED)

    @property
    def signature(self) -> tuple[object, ...]:
        """Fields that must be equal on all ranks of the group, or on both sides of a message."""
        tensors = (self.bytes, self.dtype, self.device, self.backend)
        return tensors if self.paired else (self.kind, *tensors, self.root, self.detail)

    @property
    def on_host(self) -> bool:
        """True for tensors in host memory, in which only objects and barriers are expected."""
        return self.device == "cpu" and self.dtype not in ("", OBJECTS)

    def text(self) -> str:
        """A phrase for reports."""
        if self.kind == CREATE:
            return f"{self.bytes} groups made"
        if self.paired:
            return f"{self.kind} {'to' if self.sends else 'from'} rank {self.group[0]}"
        return f"{self.kind} over {short(self.group)}"

    def size(self) -> str:
        """Bytes, type and device, for reports."""
        what = self.dtype
        if what not in ("", OBJECTS):
            what = f"{self.bytes:,} bytes of {what}"
        return f"{what} on {self.device} ({self.backend})".strip() if self.device else what


@dataclass(kw_only=True)
class Sequence:
    """All operations of one rank, in order."""

    rank: int
    operations: list[CollectiveCall] = field(default_factory=list)
    created: list[tuple[int, ...]] = field(default_factory=list)
    """Ranks of each created group, in order."""
    device: str = "cpu"
    """Type of this rank's device."""
    failure: str = ""
    """The error that ended it early; empty if none did."""


def short(ranks: tuple[int, ...]) -> str:
    """Ranks as a phrase: `ranks 0, 2, ..., 126 (64)`."""
    if len(ranks) <= 4:
        return "ranks " + ", ".join(map(str, ranks))
    return f"ranks {ranks[0]}, {ranks[1]}, ..., {ranks[-1]} ({len(ranks)})"


class Grid:
    """Coordinates of ranks in the mesh, its data axis cut into nodes and their replicas."""

    def __init__(self, mesh: MeshConfig) -> None:
        self.sizes = (mesh.pipeline, mesh.nodes, mesh.local, mesh.tensor)
        self.world, self._mesh = mesh.world, mesh

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a rank."""
        stage, replica, shard = coordinates_of(self._mesh, rank)
        return stage, *divmod(replica, self._mesh.local), shard

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at some coordinates; -1 outside of the grid."""
        if not all(0 <= at < size for at, size in zip(coordinates, self.sizes, strict=True)):
            return -1
        stage, machine, local, shard = coordinates
        replica = machine * self._mesh.local + local
        return rank_at(self._mesh, RankCoordinates(stage, replica, shard))

    def spans(self, rank: int, group: tuple[int, ...]) -> tuple[bool, ...] | None:
        """For each axis whether a group of this rank spans it; None if it spans a part of one."""
        members = [self.coordinates(member) for member in group]
        mine = self.coordinates(rank)
        spanned = []
        for axis, size in enumerate(self.sizes):
            seen = {member[axis] for member in members}
            if seen == {mine[axis]} and size > 1:
                spanned.append(False)
            elif len(seen) == size:
                spanned.append(size > 1)
            else:
                return None
        count = prod(s for s, whole in zip(self.sizes, spanned, strict=True) if whole)
        return tuple(spanned) if count == len(group) else None

    def describe(self, rank: int) -> str:
        """The role of a rank, for reports."""
        pairs = zip(AXES, self.coordinates(rank), self.sizes, strict=True)
        names = {"pipeline": "stage", "local": "replica", "tensor": "tensor rank"}
        parts = [f"{names.get(axis, axis)} {at} of {size}" for axis, at, size in pairs if size > 1]
        return ", ".join(parts)
