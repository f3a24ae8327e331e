"""Do the sequences of all ranks go together? Every rank's queue is played to its end.

Calls block: a collective ends when all ranks of its group have come to it, a message when both
sides have. What can go to its end like this cannot deadlock with calls that block less. The ranks
of one role make the same calls, each over its own groups, so that a sequence of one of them stands
for all: `Grid.spans` says along which axes a group runs, and so which one another rank has.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planning.rehearsal.sequence import CollectiveCall, Coordinates, Grid
from planning.rehearsal.sequence import Sequence as RankSequence

MeetingKey = tuple[Any, ...]
"""Where ranks meet: a group, or the two sides of a message."""


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A rank that cannot go on."""

    rank: int
    role: int
    """The rehearsed rank that it follows."""
    index: int
    """Of the operation in its sequence."""


@dataclass(kw_only=True)
class Outcome:
    """What came of playing all queues."""

    operations: int = 0
    """That were finished, over all ranks."""
    bytes: int = 0
    """Of them."""
    unequal: tuple[Stuck, Stuck] | None = None
    """Two ranks that meet with different calls."""
    stuck: list[Stuck] = field(default_factory=list)
    """Ranks that wait for ever."""

    @property
    def whole(self) -> bool:
        """True if every rank came to its end."""
        return self.unequal is None and not self.stuck


class Roles:
    """Which rehearsed rank stands for which ranks."""

    def __init__(self, grid: Grid, rehearsed: Sequence[int]) -> None:
        """`rehearsed` are the ranks of a grid of chosen coordinates on each axis."""
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
    """An operation of a role, ready to be placed for each of its ranks."""

    operation: CollectiveCall
    spans: tuple[bool, ...] | None
    """Axes of its group; None if it is no group of whole axes, which stays as it is."""
    offset: Coordinates
    """From this rank to the other one of a message."""


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
        self._meetings: dict[tuple[int, int], tuple[MeetingKey, int]] = {}
        self.outcome = Outcome()

    def play(self) -> Outcome:
        """Let ranks go on as long as any can."""
        ready = deque(range(self._grid.world))
        while ready and self.outcome.unequal is None:
            rank = ready.popleft()
            queue = self._queues[self._role[rank]]
            if self._at[rank] == len(queue):
                continue
            step = queue[self._at[rank]]
            meeting, size = self._meeting(rank, step)
            met = self._waiting.setdefault(meeting, [])
            met.append(rank)
            if not self._alike(met[0], rank):
                self.outcome.unequal = (self._stuck(met[0]), self._stuck(rank))
            elif len(met) == size:
                del self._waiting[meeting]
                for member in met:
                    self._at[member] += 1
                    self.outcome.operations += 1
                    self.outcome.bytes += step.operation.bytes
                ready.extend(met)
        if self.outcome.unequal is None:
            self.outcome.stuck = [
                self._stuck(rank)
                for rank, at in enumerate(self._at)
                if at < len(self._queues[self._role[rank]])
            ]
        return self.outcome

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
        """Where a rank meets whom in a step, and how many they are."""
        key = (rank, id(step))
        if key not in self._meetings:
            self._meetings[key] = self._find_meeting(rank, step)
        return self._meetings[key]

    def _find_meeting(self, rank: int, step: _Step) -> tuple[MeetingKey, int]:
        mine, op = self._coordinates[rank], step.operation
        if op.paired:
            other = self._grid.rank(tuple(a + b for a, b in zip(mine, step.offset, strict=True)))
            sides = (rank, other) if op.kind == "send" else (other, rank)
            return ("message", *sides), 2
        if step.spans is None:
            member = rank in op.group
            return (("ranks", *op.group), len(op.group)) if member else (("none", rank), 2)
        fixed = (-1 if whole else at for at, whole in zip(mine, step.spans, strict=True))
        return ("axes", *fixed), len(op.group)

    def _alike(self, a: int, b: int) -> bool:
        """True if two ranks that meet make calls that go together."""
        if a == b:
            return True
        one, other = (self._queues[self._role[r]][self._at[r]].operation for r in (a, b))
        return one.signature == other.signature

    def _stuck(self, rank: int) -> Stuck:
        return Stuck(rank=rank, role=self._role[rank], index=self._at[rank])


def play(roles: Roles, sequences: Mapping[int, RankSequence]) -> Outcome:
    """Play the queues of all ranks of the grid to their ends."""
    return _Player(roles, sequences).play()
