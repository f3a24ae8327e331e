"""Match the sequences of all ranks by simulating every rank's queue of calls to its end.

Calls block: a collective ends when all ranks of its group have reached it, a message when both
sides have. If all queues end like this, no deadlock is possible with calls that block less. The
ranks of one role make the same calls, each over its own groups, so that one rehearsed sequence
stands for all of them: `Grid.spans` gives the axes of a group, and so the group of another rank.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planning.rehearsal.sequence import POSTED, CollectiveCall, Coordinates, Grid
from planning.rehearsal.sequence import Sequence as RankSequence

MeetingKey = tuple[Any, ...]
"""Identifies a rendezvous: a group, or the two sides of a message."""


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A rank that is blocked for ever."""

    rank: int
    role: int
    """The rehearsed rank whose sequence it follows."""
    index: int
    """Index of the operation in that sequence."""


@dataclass(kw_only=True)
class Outcome:
    """Result of simulating all queues."""

    operations: int = 0
    """Finished operations over all ranks."""
    bytes: int = 0
    """Bytes of the finished operations."""
    unequal: tuple[Stuck, Stuck] | None = None
    """Two ranks that meet with different calls."""
    stuck: list[Stuck] = field(default_factory=list)
    """Ranks that wait for ever."""

    @property
    def whole(self) -> bool:
        """True if every rank reached its end."""
        return self.unequal is None and not self.stuck


class Roles:
    """Maps each rank to the rehearsed rank that stands for it."""

    def __init__(self, grid: Grid, rehearsed: Sequence[int]) -> None:
        """`rehearsed`: all combinations of some coordinates on each axis of the grid."""
        self.grid = grid
        self._chosen = [
            sorted({grid.coordinates(rank)[axis] for rank in rehearsed})
            for axis in range(len(grid.sizes))
        ]

    def of(self, rank: int) -> int:
        """The rehearsed rank whose sequence a rank follows."""
        coordinates = []
        for at, chosen, size in zip(
            self.grid.coordinates(rank), self._chosen, self.grid.sizes, strict=True
        ):
            between = next((c for c in chosen if 0 < c < size - 1), size - 1)
            coordinates.append(at if at in chosen else between)
        return self.grid.rank(tuple(coordinates))


@dataclass(frozen=True)
class _Step:
    """An operation of a role, relative to the rank that makes it."""

    operation: CollectiveCall
    spans: tuple[bool, ...] | None
    """Axes of its group; None for a group that is not made of whole axes: the same for all."""
    offset: Coordinates
    """Coordinates of a message's other rank relative to this one."""


class _Player:
    """The queues of all ranks."""

    def __init__(self, roles: Roles, sequences: Mapping[int, RankSequence]) -> None:
        self._grid = roles.grid
        steps: dict[tuple[int, Any], _Step] = {}
        self._queues = {
            role: [self._step(steps, role, op) for op in sequence.operations]
            for role, sequence in sequences.items()
        }
        world = range(self._grid.world)
        self._role = [roles.of(rank) for rank in world]
        self._coordinates = [self._grid.coordinates(rank) for rank in world]
        self._at = [0] * len(world)
        self._waiting: dict[MeetingKey, list[int]] = {}
        self._posted: dict[MeetingKey, deque[Stuck]] = {}
        """Messages that have been sent and not yet received, in order."""
        self._meetings: dict[tuple[int, int], tuple[MeetingKey, int]] = {}
        self.outcome = Outcome()

    def play(self) -> Outcome:
        """Advance ranks as long as any can go on."""
        ready = deque(range(self._grid.world))
        while ready and self.outcome.unequal is None:
            rank = ready.popleft()
            queue = self._queues[self._role[rank]]
            if self._at[rank] == len(queue):
                continue
            step = queue[self._at[rank]]
            meeting, size = self._meeting(rank, step)
            posted = self._posted.setdefault(meeting, deque()) if step.operation.paired else None
            if posted is not None and step.operation.kind == POSTED:
                posted.append(self._stuck(rank))
                waking = self._waiting.pop(meeting, [])
                self._end([rank], step)
                ready.extend([rank, *waking])
            elif posted and not step.operation.sends:
                if self._meet(posted.popleft(), rank):
                    self._end([rank], step)
                    ready.append(rank)
            else:
                met = self._waiting.setdefault(meeting, [])
                met.append(rank)
                if self._meet(self._stuck(met[0]), rank) and len(met) == size:
                    del self._waiting[meeting]
                    self._end(met, step)
                    ready.extend(met)
        if self.outcome.unequal is None:
            self.outcome.stuck = [
                self._stuck(rank)
                for rank, at in enumerate(self._at)
                if at < len(self._queues[self._role[rank]])
            ]
            self.outcome.stuck += [one for posted in self._posted.values() for one in posted]
        return self.outcome

    def _end(self, ranks: list[int], step: _Step) -> None:
        """The operation of these ranks ends."""
        for rank in ranks:
            self._at[rank] += 1
            self.outcome.operations += 1
            self.outcome.bytes += step.operation.bytes

    def _step(self, known: dict[tuple[int, Any], _Step], role: int, op: CollectiveCall) -> _Step:
        key = (role, op)
        if key not in known:
            spans = None if op.paired else self._grid.spans(role, op.group)
            offset: Coordinates = ()
            if op.paired:
                here, there = self._grid.coordinates(role), self._grid.coordinates(op.group[0])
                offset = tuple(b - a for a, b in zip(here, there, strict=True))
            known[key] = _Step(op, spans, offset)
        return known[key]

    def _meeting(self, rank: int, step: _Step) -> tuple[MeetingKey, int]:
        """The rendezvous of a rank's step, and the number of ranks that meet there."""
        key = (rank, id(step))
        if key not in self._meetings:
            self._meetings[key] = self._find_meeting(rank, step)
        return self._meetings[key]

    def _find_meeting(self, rank: int, step: _Step) -> tuple[MeetingKey, int]:
        mine, op = self._coordinates[rank], step.operation
        if op.paired:
            other = self._grid.rank(tuple(a + b for a, b in zip(mine, step.offset, strict=True)))
            sides = (rank, other) if op.sends else (other, rank)
            return ("message", *sides), 2
        if step.spans is None:
            member = rank in op.group
            return (("ranks", *op.group), len(op.group)) if member else (("none", rank), 2)
        fixed = (-1 if whole else at for at, whole in zip(mine, step.spans, strict=True))
        return ("axes", *fixed), len(op.group)

    def _meet(self, first: Stuck, rank: int) -> bool:
        """True if a rank's call matches that of the rank that came first; else notes both."""
        second = self._stuck(rank)
        one, other = self._operation(first), self._operation(second)
        if first != second and one.signature != other.signature:
            self.outcome.unequal = (first, second)
        return self.outcome.unequal is None

    def _operation(self, one: Stuck) -> CollectiveCall:
        return self._queues[one.role][one.index].operation

    def _stuck(self, rank: int) -> Stuck:
        return Stuck(rank=rank, role=self._role[rank], index=self._at[rank])


def play(roles: Roles, sequences: Mapping[int, RankSequence]) -> Outcome:
    """Simulate the queues of all ranks of the grid to their ends."""
    return _Player(roles, sequences).play()
