"""Explain why sequences do not match: which call, on which ranks, from which line.

Ranks of one stage must make the same calls. If one of them differs, the report names it and one
that does not; otherwise, ranks that meet with different calls, or that wait for each other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planning.rehearsal.matcher import Outcome, Roles, Stuck
from planning.rehearsal.sequence import CREATE, CollectiveCall, Grid
from planning.rehearsal.sequence import Sequence as RankSequence

_HINTS = {
    "failed": "the rank fails before it communicates wrongly: mend this error first",
    "skipped call": "all ranks of a group must make the same calls: look above this line for a "
    "branch that depends on the rank or on its data",
    "extra call": "all ranks of a group must make the same calls: look above this line for a "
    "branch that depends on the rank or on its data",
    "another size": "sizes must not depend on the rank: pad to the largest, or make sizes known "
    "to all ranks first",
    "another device": "make the tensor on mesh.world.device on all ranks: gloo carries tensors of "
    "the host and nccl those of GPUs, and neither waits for the other",
    "host tensor": "make the tensor on mesh.world.device: between hosts only pickled objects shall "
    "travel, for that is slow, and gloo connects two ranks only when they first need it",
    "another type": "cast to one type on all ranks before the call",
    "another root": "all ranks must name the same root of the group",
    "another group": "pass the same axis of the mesh on all ranks",
    "another order": "make the calls in one order on all ranks: sort what is iterated over, never "
    "iterate over a set",
    "missing message": "each send needs its recv on the other rank: compare the two sides' "
    "schedules around these lines",
    "other groups made": "every rank must make the same groups in the same order, its own or not",
    "deadlock": "these ranks wait for each other: let one of them make its calls in the other "
    "order",
}
_NEAR = 64
"""Calls that are searched for one that came too early."""
_SHOWN = 4
"""Waiting ranks that a report names."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One rank's part in a mismatch."""

    rank: int
    role: str
    """Coordinates of the rank in the mesh."""
    index: int
    """Index of the operation in the rank's sequence."""
    operation: str
    size: str
    places: tuple[str, ...]
    """Where it is called, the innermost line first."""

    def lines(self) -> list[str]:
        """The side as lines of a report."""
        role = f" ({self.role})" if self.role else ""
        what = ", ".join(part for part in (self.operation, self.size) if part)
        head = f"  rank {self.rank}{role}, operation {self.index}: {what}"
        return [head, *(f"      at {place}" for place in self.places)]


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A mismatch of collectives, which would be a deadlock or an error on a cluster."""

    kind: str
    text: str
    sides: list[Side] = field(default_factory=list)
    hint: str = ""
    waiting: list[str] = field(default_factory=list)
    """Calls in which the first blocked ranks wait."""

    def report(self) -> str:
        """The mismatch as text."""
        lines = [f"{self.kind}: {self.text}"]
        for side in self.sides:
            lines += side.lines()
        lines += [f"  {text}" for text in self.waiting]
        return "\n".join([*lines, f"  hint: {self.hint}"])


def explain(
    roles: Roles, sequences: Mapping[int, RankSequence], outcome: Outcome
) -> Mismatch | None:
    """The cause of an outcome; None if all ranks reached their ends."""
    failed = next((sequence for sequence in sequences.values() if sequence.failure), None)
    if failed is not None:
        who = f"rank {failed.rank} ({roles.grid.describe(failed.rank)})"
        text = f"{who} after {len(failed.operations)} operations:\n{failed.failure}"
        return Mismatch(kind="failed", text=text, hint=_HINTS["failed"])
    reporter = _Reporter(roles.grid, sequences, outcome)
    if outcome.whole:
        return reporter.tensor_of_the_host()
    return reporter.odd_one_out() or reporter.where_they_meet() or reporter.who_waits()


class _Reporter:
    def __init__(self, grid: Grid, sequences: Mapping[int, RankSequence], outcome: Outcome) -> None:
        self._grid, self._sequences, self._outcome = grid, sequences, outcome

    def tensor_of_the_host(self) -> Mismatch | None:
        """A tensor in host memory that all ranks with GPUs exchange."""
        for rank, sequence in self._sequences.items():
            on_host = (i for i, op in enumerate(sequence.operations) if op.on_host)
            index = next(on_host, None) if sequence.device != "cpu" else None
            if index is not None:
                backend = self._operation(rank, index).backend
                text = f"ranks with GPUs exchange a tensor of the host, which {backend} carries"
                return self._mismatch("host tensor", text, [self._side(rank, index)])
        return None

    def odd_one_out(self) -> Mismatch | None:
        """A rank that differs from the others of its stage."""
        mismatches: list[tuple[int, Mismatch]] = []
        stages: dict[int, list[int]] = {}
        for rank in self._sequences:
            stages.setdefault(self._grid.coordinates(rank)[0], []).append(rank)
        for ranks in stages.values():
            calls = {rank: self._relative(rank, False) for rank in ranks}
            classes = Counter(calls.values())
            if len(classes) == 1:
                continue
            usual = max(classes, key=lambda c: (classes[c], len(c)))
            odd = next(rank for rank in ranks if calls[rank] != usual)
            mismatches.append(self._compare(odd, [rank for rank in ranks if calls[rank] == usual]))
        return min(mismatches, key=lambda pair: pair[0])[1] if mismatches else None

    def where_they_meet(self) -> Mismatch | None:
        """Two ranks of different stages that meet with calls that do not match."""
        if self._outcome.unequal is None:
            return None
        first, second = self._outcome.unequal
        a, b = self._operation(first.role, first.index), self._operation(second.role, second.index)
        kind = "another type" if a.dtype != b.dtype else "another size"
        if not a.paired and a.kind != b.kind:
            kind = "another order"
        elif a.kind == CREATE:
            kind = "other groups made"
        elif _elsewhere(a, b):
            kind = "another device"
        sides = [self._side(first.role, first.index), self._side(second.role, second.index)]
        text = "two ranks meet with calls that do not go together"
        if kind == "another device":
            text += _backends(first.role, a, second.role, b)
        return self._mismatch(kind, text, sides)

    def who_waits(self) -> Mismatch:
        """Ranks that wait for ever: for a rank that has ended, or for each other."""
        stuck = self._outcome.stuck
        for one in stuck:
            op = self._operation(one.role, one.index)
            role = self._sequences[one.role]
            if not op.paired or op.group[0] not in self._sequences:
                continue
            opposite = _OTHER[op.kind]
            other = self._sequences[op.group[0]]
            mine = sum(
                o.paired and o.sends == op.sends and o.group == op.group for o in role.operations
            )
            theirs = [
                i
                for i, o in enumerate(other.operations)
                if o.paired and o.sends != op.sends and o.group == (one.role,)
            ]
            if mine > len(theirs):
                text = (
                    f"rank {one.role} has {mine} calls of {op.kind} for rank {other.rank}, which "
                    f"has {len(theirs)} of {opposite}"
                )
                sides = [self._side(one.role, one.index)]
                sides += [self._side(other.rank, theirs[-1])] if theirs else []
                return self._mismatch("missing message", text, sides)
        text = f"{len(stuck)} ranks wait for ever"
        roles = list(dict.fromkeys((one.role, one.index) for one in stuck))
        sides = [self._side(role, index) for role, index in roles[:_SHOWN]]
        return self._mismatch("deadlock", text, sides)

    def _compare(self, odd: int, others: list[int]) -> tuple[int, Mismatch]:
        """Describe the first call in which a rank differs from those of its stage."""
        mine, usual = self._relative(odd, True), self._relative(others[0], True)
        at = _common(mine, usual)
        met = self._operation(odd, min(at, self._count(odd) - 1)).group
        other = next((rank for rank in others if rank in met), others[0])
        runs = {
            "changed": _common(mine[at + 1 :], usual[at + 1 :]),
            "skipped call": _common(mine[at:], usual[at + 1 :]),
            "extra call": _common(mine[at + 1 :], usual[at:]),
        }
        kind = max(runs, key=lambda name: runs[name])
        shown = [(odd, at), (other, at)]
        if kind == "changed":
            kind = self._change(odd, other, at)
        elif self._operations(odd, other, at)[0 if kind == "extra call" else 1].paired:
            kind = "missing message"
            shown += [(one.role, one.index) for one in self._outcome.stuck if self._waits(one, odd)]
        text = f"rank {odd} differs from rank {other}, which is at the same stage"
        if kind == "another device":
            a, b = self._operations(odd, other, at)
            text += _backends(odd, a, other, b)
        sides = [self._side(rank, i) for rank, i in shown if i < self._count(rank)]
        return at, self._mismatch(kind, text, sides)

    def _waits(self, one: Stuck, other: int) -> bool:
        """True if a rehearsed rank waits for a message of another."""
        op = self._operation(one.role, one.index)
        return one.rank == one.role and op.paired and op.group[0] == other

    def _change(self, odd: int, other: int, at: int) -> str:
        """Kind of the difference between the calls of two ranks at one index."""
        a, b = self._operations(odd, other, at)
        if a.kind == b.kind == CREATE:
            return "other groups made"
        if self._swapped(odd, other, at):
            return "another order"
        same = a.kind == b.kind
        if same and self._group(odd, a) != self._group(other, b):
            return "another group"
        if same and _elsewhere(a, b):
            return "another device"
        if same and a.dtype != b.dtype:
            return "another type"
        if same and a.bytes != b.bytes:
            return "another size"
        return "another root" if same and a.root != b.root else "another order"

    def _swapped(self, odd: int, other: int, at: int) -> bool:
        """True if both ranks make both calls, in opposite order."""
        mine, usual = (self._relative(rank, False)[at : at + _NEAR] for rank in (odd, other))
        swapped = mine[0] in usual and usual[0] in mine
        return swapped and Counter(mine) == Counter(usual)

    def _operations(self, odd: int, other: int, at: int) -> tuple[CollectiveCall, CollectiveCall]:
        last = (min(at, self._count(rank) - 1) for rank in (odd, other))
        a, b = (self._operation(rank, i) for rank, i in zip((odd, other), last, strict=True))
        return a, b

    def _relative(self, rank: int, with_places: bool) -> tuple[Any, ...]:
        """A rank's calls in a form that is the same for every rank of its stage."""
        calls = []
        for op in self._sequences[rank].operations:
            root: Any = op.root
            spans = None if op.paired else self._grid.spans(rank, op.group)
            if spans is not None and op.root >= 0:
                root_at = self._grid.coordinates(op.root)
                root = tuple(at for at, whole in zip(root_at, spans, strict=True) if whole)
            tensors = (op.bytes, op.dtype, op.device, op.backend)
            call = (op.kind, self._group(rank, op), *tensors, root, op.detail)
            calls.append((*call, op.places) if with_places else call)
        return tuple(calls)

    def _group(self, rank: int, op: CollectiveCall) -> Any:
        if op.paired:
            here, there = self._grid.coordinates(rank), self._grid.coordinates(op.group[0])
            return tuple(b - a for a, b in zip(here, there, strict=True))
        return self._grid.spans(rank, op.group) or op.group

    def _count(self, rank: int) -> int:
        return len(self._sequences[rank].operations)

    def _operation(self, rank: int, index: int) -> CollectiveCall:
        return self._sequences[rank].operations[index]

    def _side(self, rank: int, index: int) -> Side:
        op = self._operation(rank, index)
        return Side(
            rank=rank,
            role=self._grid.describe(rank),
            index=index,
            operation=op.text(),
            size=op.size(),
            places=op.places,
        )

    def _mismatch(self, kind: str, text: str, sides: Sequence[Side]) -> Mismatch:
        waiting = []
        stuck = [*(self._outcome.unequal or ()), *self._outcome.stuck]
        for one in stuck[:_SHOWN]:
            op = self._operation(one.role, one.index).text()
            waiting.append(f"rank {one.rank} cannot go on from operation {one.index}: {op}")
        if len(stuck) > _SHOWN:
            waiting.append(f"and {len(stuck) - _SHOWN} more ranks")
        return Mismatch(kind=kind, text=text, sides=list(sides), hint=_HINTS[kind], waiting=waiting)


def _elsewhere(a: CollectiveCall, b: CollectiveCall) -> bool:
    return (a.device, a.backend) != (b.device, b.backend)


def _backends(rank: int, a: CollectiveCall, other: int, b: CollectiveCall) -> str:
    return (
        f": rank {rank} brings a tensor on {a.device}, which {a.backend} carries, rank {other} one "
        f"on {b.device}, which {b.backend} carries, and each waits for ever"
    )


_OTHER = {"send": "recv", "recv": "send", "isend": "irecv", "irecv": "isend"}


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many first elements two sequences have in common."""
    for i, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return i
    return min(len(a), len(b))
