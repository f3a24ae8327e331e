"""Simulate a step of DeepSpeed's pipeline: when each stage computes, sends and waits.

The order is that of its TrainSchedule (runtime/pipe/schedule.py): 1F1B, with sends and receives
that block both ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from planning.estimate.hardware import Hardware

Kind = Literal["forward", "backward", "send", "receive"]


@dataclass(frozen=True)
class Action:
    """One action of a stage."""

    kind: Kind
    micro: int
    peer: int = -1
    """The stage at the other end."""


@dataclass(frozen=True)
class Span:
    """A pass of one stage, and when it ran."""

    stage: int
    kind: str
    micro: int
    begin: float
    end: float


@dataclass
class Played:
    """A simulated step."""

    seconds: float
    busy: list[float]
    """Seconds of computation of each stage."""
    spans: list[Span] = field(default_factory=list)

    @property
    def bubble(self) -> float:
        """Fraction of the stages' time without computation."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def actions(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """The actions of a stage in a step, in order."""
    before = -1

    def real(micro: int) -> bool:
        return 0 <= micro < micro_batches

    for step in range(2 * (micro_batches + stages - 1)):
        forward = step % 2 == stage % 2
        base = step // 2
        if forward:
            micro = base - stage // 2
        elif step % 2 == 0:
            micro = base - stages + (stage + 1) // 2
        else:
            micro = base - stages + 1 + stage // 2
        if forward:
            if real(before) and stage > 0:
                yield Action("send", before, stage - 1)
            if real(micro) and stage > 0:
                yield Action("receive", micro, stage - 1)
        else:
            if real(micro) and stage < stages - 1:
                yield Action("receive", micro, stage + 1)
            if real(before) and stage < stages - 1:
                yield Action("send", before, stage + 1)
        if real(micro):
            yield Action("forward" if forward else "backward", micro)
        before = micro


def play(
    forward: Sequence[float], backward: Sequence[float], micro_batches: int, transfer: float
) -> Played:
    """Simulate all stages; `forward` and `backward` are seconds per micro-batch on each stage."""
    stages = len(forward)
    plans = _plans(stages, micro_batches)
    at, clock, busy = [0] * stages, [0.0] * stages, [0.0] * stages
    spans: list[Span] = []
    waiting = set(range(stages))
    while waiting:
        moved = False
        for stage in sorted(waiting):
            while at[stage] < len(plans[stage]):
                action = plans[stage][at[stage]]
                if action.peer >= 0:
                    if not _meets(plans, at, stage, action):
                        break
                    clock[stage] = max(clock[stage], clock[action.peer]) + transfer
                    clock[action.peer] = clock[stage]
                    at[action.peer] += 1
                else:
                    spent = (forward if action.kind == "forward" else backward)[stage]
                    begin, clock[stage] = clock[stage], clock[stage] + spent
                    spans.append(Span(stage, action.kind, action.micro, begin, clock[stage]))
                    busy[stage] += spent
                at[stage] += 1
                moved = True
        waiting = {stage for stage in waiting if at[stage] < len(plans[stage])}
        if waiting and not moved:
            raise AssertionError(f"stages {sorted(waiting)} wait for each other")
    return Played(seconds=max(clock), busy=busy, spans=spans)


def crowded(played: Played, ranks: int, hardware: Hardware) -> float:
    """Seconds of the same passes if all ranks share the cores of one machine evenly.

    `ranks`: ranks of one stage, whose replicas and tensor ranks compute at the same time.
    """
    if not hardware.cores:
        return played.seconds
    changes = [(span.begin, ranks) for span in played.spans]
    changes += [(span.end, -ranks) for span in played.spans]
    seconds, active, before = 0.0, 0, 0.0
    for at, change in sorted(changes):
        seconds += (at - before) * hardware.crowd(active)
        active, before = active + change, at
    return seconds + played.seconds - before


@lru_cache(maxsize=8)
def _plans(stages: int, micro_batches: int) -> list[list[Action]]:
    return [list(actions(stage, stages, micro_batches)) for stage in range(stages)]


def _meets(plans: list[list[Action]], at: list[int], stage: int, action: Action) -> bool:
    """True if the stage at the other end has reached the same transfer."""
    if at[action.peer] >= len(plans[action.peer]):
        return False
    other = plans[action.peer][at[action.peer]]
    return other.peer == stage and other.micro == action.micro and other.kind != action.kind
