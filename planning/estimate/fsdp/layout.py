"""Layout of parameters in engine `torch`: FSDP2's units, and the whole vectors beside them.

Mirrors parallel/engines/fsdp, and torch/distributed/fsdp/_fully_shard of torch 2.13.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from planning.estimate.layers import Held, RankLayer
from training.config import PriorTrain

FLOAT, HALF = 4, 2
"""Bytes of an element."""


def uses_fsdp(settings: PriorTrain) -> bool:
    """True if torch's own stack shards the weights."""
    return settings.engine.name == "torch"


@dataclass(frozen=True, kw_only=True)
class PlannedUnit:
    """Matrices that are gathered, and whose gradients are reduced, together."""

    name: str
    """Of its layer; empty for the root, which holds tied weights."""
    matrices: dict[str, Held]
    """By global name."""
    width: int
    """Bytes of a gathered element."""
    reduced: int
    """Bytes of an element of a gradient as it is added up."""
    goes_back: bool
    """Gathered for the backward pass, too."""

    def padded(self, shards: int, trained: bool = False) -> int:
        """Elements of the matrices on all shards together, with padding."""
        chosen = (h for h in self.matrices.values() if h.trained or not trained)
        return shards * sum(rows_of_shard(h, shards) * row_of(h) for h in chosen)


def row_of(h: Held) -> int:
    """Elements of a row."""
    return prod(h.placement.shape[1:])


def rows_of_shard(h: Held, shards: int) -> int:
    """Rows of each rank's shard, with padding."""
    return -(-h.numel // row_of(h) // shards)


def shard_elements(h: Held, shards: int) -> int:
    """Elements of a matrix's shard with its padding; a vector is whole on every rank."""
    return rows_of_shard(h, shards) * row_of(h) if h.matrix else h.numel


def real_elements(h: Held, shards: int, rank: int) -> int:
    """Elements of a rank's shard without the padding, as the optimiser sees it."""
    if not h.matrix:
        return h.numel
    rows, each = h.numel // row_of(h), rows_of_shard(h, shards)
    return row_of(h) * max(0, min(each, rows - each * rank))


def vectors_of(held: Mapping[str, Held]) -> int:
    """Elements of the gains and biases that are trained."""
    return sum(h.numel for h in held.values() if h.trained and not h.matrix)


def units_of(
    settings: PriorTrain, layers: Sequence[RankLayer], emulates: bool
) -> list[PlannedUnit]:
    """The units of a rank's layers, in the order of the forward pass; the root comes last.

    `emulates`: fp16 is emulated, as on CPUs, with fp32 weights.

    A layer before the first one that is trained has no backward pass; the last of those is
    gathered ahead of one nevertheless.
    """
    owners = {name for part in layers for name in _copied(part)} & {part.name for part in layers}
    trains = [len(part.frozen) < len(part.parameters) for part in layers]
    first = trains.index(True) if any(trains) else len(layers)
    units: list[PlannedUnit] = []
    root: dict[str, Held] = {}
    for i, part in enumerate(layers):
        mine = dict(_matrices(part, owners))
        ties = part.name in owners or bool(_copied(part) & owners)
        if ties:
            root |= mine
        elif mine:
            half = part.name.startswith("block") and _in_16_bits(settings, emulates)
            narrow = part.name.startswith("block") and settings.engine.reduce_precision != "fp32"
            unit = PlannedUnit(
                name=part.name,
                matrices=mine,
                width=HALF if half else FLOAT,
                reduced=HALF if narrow else FLOAT,
                goes_back=i >= first - 1,
            )
            units.append(unit)
    if root:
        units.append(
            PlannedUnit(name="", matrices=root, width=FLOAT, reduced=FLOAT, goes_back=True)
        )
    return units


def _copied(part: RankLayer) -> set[str]:
    """The layers whose weights it uses, too."""
    copies = (h.placement.tied_to for h in part.parameters.values())
    return {name.partition(".")[0] for name in copies if name}


def _matrices(part: RankLayer, owners: set[str]) -> Iterator[tuple[str, Held]]:
    """Its own, and copies of weights that another stage holds."""
    for name, h in part.parameters.items():
        copy = h.placement.tied_to
        if h.matrix and copy.partition(".")[0] not in owners:
            yield copy or f"{part.name}.{name}", h


def _in_16_bits(settings: PriorTrain, emulates: bool) -> bool:
    precision = settings.engine.precision
    return precision == "bf16" or (precision == "fp16" and not emulates)
