"""Layout of parameters in the engines: ZeRO's groups, partitions and shards, PowerSGD's factors.

Mirrors parallel/engines and DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from models.prior import COMPRESSED
from parallel.compress.advisor import PAPER_SHARE
from parallel.compress.powersgd import shard_rank
from parallel.mesh import RankCoordinates
from planning.estimate.fsdp.layout import shard_elements, uses_fsdp
from planning.estimate.layers import Held
from training.config import PriorTrain

ALIGNED = 2
"""A partition of ZeRO-1/2 has a multiple of this many elements."""
PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of fewer elements whole on every rank (DeepSpeed's default)."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at a time (DeepSpeed's default)."""


def stage_of_zero(settings: PriorTrain) -> int:
    """0 for plain data parallelism, else ZeRO's stage."""
    engine = settings.engine
    if engine.name == "reference":
        return 0
    if engine.name == "torch":
        return 3
    return 1 if engine.name == "deepspeed_pipe" else engine.zero_stage


def bucket_of(settings: PriorTrain) -> int:
    """Elements of a ZeRO bucket; a plan for GPUs names one, so that the default is a CPU's."""
    return settings.engine.bucket(gpu=False)


def groups_of(held: Mapping[str, Held]) -> list[list[Held]]:
    """The optimiser's groups of what is trained: matrices, then gains and biases."""
    matrices = [h for h in held.values() if h.trained and h.matrix]
    others = [h for h in held.values() if h.trained and not h.matrix]
    return [group for group in (matrices, others) if group]


def padded(group: list[Held], replicas: int) -> int:
    """Elements of a group's flat buffer in ZeRO-1/2."""
    unit = ALIGNED * replicas
    return -(-sum(h.numel for h in group) // unit) * unit


def touched(group: list[Held], replicas: int, replica: int) -> int:
    """Elements of all parameters that overlap this replica's partition, and padding."""
    size = padded(group, replicas) // replicas
    first, last, at, total = size * replica, size * (replica + 1), 0, 0
    for h in group:
        if at < last and at + h.numel > first:
            total += h.numel
        at += h.numel
    return total + max(0, last - max(at, first))


def shard_numel(h: Held, shards: int) -> int:
    """Elements of a parameter's ZeRO-3 shard."""
    return -(-h.numel // shards)


def total_rank(settings: PriorTrain) -> int:
    """Compression rank over all shards of a matrix; `auto` = the paper's fraction of the width."""
    rank = settings.compress.rank
    return round(PAPER_SHARE * settings.model.dim) if rank == "auto" else rank


@dataclass(frozen=True)
class Factored:
    """A matrix shard that PowerSGD factors."""

    rows: int
    columns: int
    rank: int

    @property
    def sent(self) -> int:
        """Elements of P and of Q."""
        return self.rank * (self.rows + self.columns)


def factored(
    settings: PriorTrain, held: Mapping[str, Held], at: RankCoordinates
) -> Iterator[Factored]:
    """The shards whose gradients this rank compresses."""
    mesh = settings.mesh
    if not settings.compress.on:
        return
    third = stage_of_zero(settings) == 3
    parts = mesh.local if third else mesh.tensor
    each = shard_rank(total_rank(settings), parts)
    for name, h in held.items():
        if not (h.trained and name.endswith(COMPRESSED)):
            continue
        placement = h.placement
        if third:
            count = (shard_elements if uses_fsdp(settings) else shard_numel)(h, mesh.local)
            shard = placement.flat_shard(at.replica % mesh.local, count)
            if shard is None:
                continue
            placement = shard
        if placement.rows:
            rows, columns = placement.rows, placement.shape[1]
            yield Factored(rows, columns, min(each, rows, columns))


def factored_names(settings: PriorTrain, held: Mapping[str, Held], at: RankCoordinates) -> set[str]:
    """The parameters of which this rank compresses a gradient."""
    return {name for name, h in held.items() if list(factored(settings, {name: h}, at))}
