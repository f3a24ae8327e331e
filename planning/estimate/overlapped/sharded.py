"""A step with weights sharded over ranks: gathers ahead of the passes, reductions behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

from planning.estimate.hardware import Hardware
from planning.estimate.overlapped.rates import contention
from planning.estimate.overlapped.streams import COMPUTE, Played, Tasks, play

MACHINE, BETWEEN = "machine", "between"
"""Streams of the links inside a node, and between nodes."""
HOP, NETWORK_HOP = 3.4e-6, 14e-6
"""Seconds of a step of a ring inside a node, and between nodes: NCCL's own table of latencies
(src/graph/tuning.cc, ring, simple protocol)."""
AHEAD = 2
"""Units whose weights are gathered at a time: the one that computes, and the next."""

FEW = 3
"""Micro-batches that are played; each further one takes as long as the last of them adds."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Layers whose weights are gathered together, in seconds of a micro-batch."""

    forward: float
    backward: float
    gather: float = 0.0
    """Gathering its weights."""
    scatter: float = 0.0
    """Reducing and scattering its gradients."""
    between: float = 0.0
    """Reducing its shard between machines, once a step."""
    factors: float = 0.0
    """Computation that this reduction needs, before it."""


def ring_seconds(count: float, ranks: int, hardware: Hardware, stride: int = 1) -> float:
    """Seconds of an all-gather or reduce-scatter whose larger side has `count` bytes.

    Over `ranks` that are `stride` apart; the groups that leave a node share its network.
    """
    if ranks == 1 or not count:
        return 0.0
    local = max(1, hardware.gpus_per_node // stride)
    nodes = -(-ranks // local)
    sharing = min(stride, hardware.gpus_per_node)
    rate = hardware.link if nodes == 1 else min(hardware.link, hardware.network / sharing)
    hops = (ranks - nodes) * HOP + (nodes - 1) * NETWORK_HOP
    return (ranks - 1) / ranks * count / (rate * hardware.joined) + hops


def sharded_step(
    units: Sequence[Unit],
    micro_batches: int,
    *,
    keeps: bool,
    update: float,
    hardware: Hardware,
    beside: bool = True,
) -> Played:
    """Play a step.

    `keeps`: weights stay gathered from the forward pass to the backward pass. `beside`: collectives
    inside a node run beside the passes; else they block them, as on gloo.
    """
    few = min(micro_batches, FEW)
    link = MACHINE if beside else COMPUTE
    played = _played(units, few, link, keeps=keeps, update=update, hardware=hardware)
    if few == micro_batches:
        return played
    fewer = _played(units, few - 1, link, keeps=keeps, update=update, hardware=hardware)
    return played.more(fewer, micro_batches - few)


def _played(
    units: Sequence[Unit],
    micro_batches: int,
    link: str,
    *,
    keeps: bool,
    update: float,
    hardware: Hardware,
) -> Played:
    tasks, freed = Tasks(), -1
    reduced: list[int] = []
    for micro in range(micro_batches):
        last = micro == micro_batches - 1
        freed, shards = _micro_batch(tasks, link, units, freed, keeps=keeps, last=last)
        reduced += shards
    tasks.add(COMPUTE, update, *reduced)
    return play(tasks, contention(hardware))


def _micro_batch(
    tasks: Tasks, link: str, units: Sequence[Unit], freed: int, *, keeps: bool, last: bool
) -> tuple[int, list[int]]:
    """Issue both passes: the number of the last computation, and those of the reductions."""
    computed: list[int] = []
    for unit in units:
        free = computed[-AHEAD] if len(computed) >= AHEAD and not keeps else freed
        here = tasks.add(link, unit.gather, free)
        computed.append(tasks.add(COMPUTE, unit.forward, here))
    shards: list[int] = []
    reduced: list[int] = []
    back: list[int] = []
    order = units[::-1]
    for number, unit in enumerate(order):
        here = -1
        if not keeps and number:  # the last unit is still gathered
            here = tasks.add(link, unit.gather, back[-AHEAD] if len(back) >= AHEAD else -1)
        if number:
            shards.append(tasks.add(link, order[number - 1].scatter, back[-1]))
        back.append(tasks.add(COMPUTE, unit.backward, here))
        if number:  # its factors wait for a shard: a pass later they hold up nothing
            reduced.append(_between(tasks, order[number - 1], shards[-1], last=last))
    shards.append(tasks.add(link, order[-1].scatter, back[-1]))
    reduced.append(_between(tasks, order[-1], shards[-1], last=last))
    return back[-1], reduced


def _between(tasks: Tasks, unit: Unit, shard: int, *, last: bool) -> int:
    """Reduce a shard between machines, once a step."""
    if not (last and unit.between):
        return shard
    if unit.factors:
        shard = tasks.add(COMPUTE, unit.factors, shard)
    return tasks.add(BETWEEN, unit.between, shard)
