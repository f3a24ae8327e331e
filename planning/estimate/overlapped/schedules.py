"""Pipeline schedules whose transfers block nobody: 1F1B, interleaved 1F1B and a zero bubble.

As torch.distributed.pipelining runs them; DeepSpeed's blocking one is in
planning/estimate/pipeline_schedule.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from parallel.pipelines.schedules import Schedule

Kind = Literal["forward", "backward", "weights"]
ROUNDS = 4
"""Micro-batches that are simulated, as a multiple of the stages; more of them add their own time
alone."""


@dataclass(frozen=True)
class Pass:
    """A pass of a micro-batch through a chunk of layers."""

    kind: Kind
    chunk: int
    micro: int


@dataclass(frozen=True)
class Pipelined:
    """A simulated pipeline."""

    seconds: float
    busy: float
    """Seconds of computation of the busiest stage."""
    first: float
    """When the first stage has ended its passes: its gradients come last."""

    @property
    def bubble(self) -> float:
        """Fraction of the time in which the busiest stage waits."""
        return 1 - self.busy / self.seconds if self.seconds else 0.0


def pipelined(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int,
    *,
    chunks: int = 1,
    transfer: float = 0.0,
) -> Pipelined:
    """Play a step; `forward` and `backward` are a stage's seconds for a micro-batch, all chunks.

    The zero bubble's backward passes have two halves: gradients of the inputs, and of the weights.
    """
    stages, most = len(forward), ROUNDS * len(forward)
    played = micro_batches
    if micro_batches > most + stages:
        played = most + micro_batches % stages
    part = _play(schedule, tuple(forward), tuple(backward), played, chunks, transfer)
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    more = (micro_batches - played) * slowest
    return Pipelined(part.seconds + more, part.busy + more, part.first + more)


@lru_cache(maxsize=4096)
def _play(
    schedule: Schedule,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    micro_batches: int,
    chunks: int,
    transfer: float,
) -> Pipelined:
    halves = 2 if schedule == "zero-bubble" else 1

    def seconds(stage: int, _number: int, one: Pass) -> float:
        whole = forward[stage] if one.kind == "forward" else backward[stage] / halves
        return whole / chunks

    return play(schedule, len(forward), micro_batches, chunks, seconds, transfer)


def play(
    schedule: Schedule,
    stages: int,
    micro_batches: int,
    chunks: int,
    seconds: Callable[[int, int, Pass], float],
    transfer: float = 0.0,
) -> Pipelined:
    """Play a step; `seconds` of a stage, the number of a pass in its order, and the pass."""
    orders = [list(order(schedule, s, stages, micro_batches, chunks)) for s in range(stages)]
    clock, busy, at = [0.0] * stages, [0.0] * stages, [0] * stages
    done: dict[tuple[Kind, int, int], float] = {}
    waiting = True
    while waiting:
        waiting = False
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                one = orders[stage][at[stage]]
                place = one.chunk * stages + stage  # of all chunks, in the model's order
                ready = _ready(one, place, stages * chunks - 1, done, transfer)
                if ready < 0:
                    break
                each = seconds(stage, at[stage], one)
                clock[stage] = max(clock[stage], ready) + each
                busy[stage] += each
                done[one.kind, place, one.micro] = clock[stage]
                at[stage] += 1
                waiting = True
    if any(at[stage] < len(orders[stage]) for stage in range(stages)):
        raise AssertionError("stages wait for each other")
    return Pipelined(max(clock), max(busy), clock[0])


def _ready(
    one: Pass,
    place: int,
    last: int,
    done: dict[tuple[Kind, int, int], float],
    transfer: float,
) -> float:
    """When the inputs of a pass are there; -1 = not yet known."""
    if one.kind == "weights":
        return done.get(("backward", place, one.micro), -1.0)
    if one.kind == "forward":
        return 0.0 if place == 0 else _after(done.get(("forward", place - 1, one.micro)), transfer)
    if place == last:
        return done.get(("forward", place, one.micro), -1.0)
    return _after(done.get(("backward", place + 1, one.micro)), transfer)


def _after(end: float | None, transfer: float) -> float:
    return -1.0 if end is None else end + transfer


def order(
    schedule: Schedule, stage: int, stages: int, micro_batches: int, chunks: int
) -> Iterator[Pass]:
    """The passes of a stage, as torch.distributed.pipelining 2.13 orders them."""
    total, inside = micro_batches * chunks, micro_batches // max(1, micro_batches // stages)

    def nth(kind: Kind, number: int) -> Pass:
        """Micro-batches go through a chunk a round at a time."""
        rounds, rest = divmod(number, inside * chunks)
        chunk, micro = divmod(rest, inside)
        chunk = chunk if kind == "forward" else chunks - 1 - chunk
        return Pass(kind, chunk, rounds * inside + micro)

    steps = 2 if schedule == "interleaved" else 1  # forward passes ahead of each later stage
    ahead = min(total, (chunks - 1) * inside + steps * (stages - 1 - stage))
    weights = 0
    for number in range(total + ahead):
        if number < total:
            yield nth("forward", number)
        if number < ahead:
            continue
        yield nth("backward", number - ahead)
        if schedule == "zero-bubble" and number - ahead >= stage:
            yield nth("weights", weights)
            weights += 1
    if schedule == "zero-bubble":
        for number in range(weights, total):
            yield nth("weights", number)
