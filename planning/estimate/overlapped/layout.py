"""How engine torch lays a prior over its ranks, and the layouts that a plan compares."""

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import PriorConfig
from parallel.compress.advisor import PAPER_SHARE
from parallel.pipelines.schedules import Schedule, whole_rounds
from planning.estimate.hardware import Hardware
from planning.estimate.overlapped.step import Recompute, Sizes
from training.config import PriorTrain

IN_BUILD = False
"""True when all that these layouts have can be asked for by flags: engine torch has no compiled
blocks, asynchronous tensor parallelism or zero bubble on GPUs yet. Until then a plan shows them
apart, and recommends none."""
MOST_TENSOR = 8
MACHINES = (1, 2, 4, 8)
"""Machines that a group of shards is tried over."""
CHUNKS = (2, 4)
"""Chunks of layers a stage that the interleaved schedule is tried with."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A mesh of engine torch, and the options of its step."""

    tensor: int = 1
    pipeline: int = 1
    replicas: int = 1
    """Ranks with their own samples."""
    shards: int = 1
    """Replicas that share weights, gradients and moments (FSDP); pipelines share moments alone."""
    samples: int = 1
    """Samples of a replica in a step."""
    micro: int = 1
    recompute: Recompute = "none"
    schedule: Schedule = "1f1b"
    chunks: int = 1
    rank: int = 0
    """Total rank of compressed gradients between machines; 0 = off."""
    asynchronous: bool = False

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.replicas

    @property
    def accumulate(self) -> int:
        """Micro-batches a step."""
        return self.samples // self.micro

    @property
    def nodes(self) -> int:
        """Groups of replicas, each with the whole model in its shards."""
        return self.replicas // self.shards

    @property
    def eager(self) -> bool:
        """Zero bubble splits the backward pass: no compiled blocks, no recompute, dense attention
        (pytorch issue 161904, torchtitan issue 3584).
        """
        return self.schedule == "zero-bubble"

    @property
    def name(self) -> str:
        """What it is called in a table."""
        split = f"TP{self.tensor} " if self.tensor > 1 else ""
        if self.pipeline > 1:
            chunks = f" x{self.chunks}" if self.chunks > 1 else ""
            return f"{split}PP{self.pipeline} DP{self.replicas}, {self.schedule}{chunks}"
        if self.nodes > 1:
            return f"{split}FSDP over {self.shards} x {self.nodes} copies"
        return f"{split}FSDP over {self.shards}"


def layouts(settings: PriorTrain, world: int, hardware: Hardware) -> Iterator[list[Layout]]:
    """Every mesh, each with its micro-batches, recompute, schedules and compression."""
    batch, heads = settings.loop.global_batch_size, settings.model.heads
    most = min(MOST_TENSOR, hardware.gpus_per_node, heads)

    def dealt(replicas: int) -> bool:
        """True if the replicas get equal parts of the batch and of the lanes."""
        return batch % replicas == 0 and settings.order.lanes % replicas == 0

    tensors = [t for t in (1, 2, 4, 8) if world % t == 0 and t <= most]
    for t in tensors:
        replicas = world // t
        local = hardware.gpus_per_node // t
        sizes = {replicas} | {
            local * nodes for nodes in MACHINES if replicas % (local * nodes) == 0
        }
        for shards in sorted(sizes - {1}):
            if dealt(replicas) and replicas > 1:
                base = Layout(tensor=t, replicas=replicas, shards=shards, samples=batch // replicas)
                yield list(_sharded(base, settings))
        for p in range(2, min(settings.model.layers, world // t) + 1):
            replicas = world // (t * p)
            if world % (t * p) == 0 and settings.model.layers % p == 0 and dealt(replicas):
                base = Layout(tensor=t, pipeline=p, replicas=replicas, samples=batch // replicas)
                yield list(_pipelines(base, settings))


def _sharded(base: Layout, settings: PriorTrain) -> Iterator[Layout]:
    papers = round(PAPER_SHARE * settings.model.dim)
    ranks = [0, papers] if base.nodes > 1 and base.tensor == 1 else [0]
    for micro in _divisors(base.samples):
        for recompute in ("none", "norms", "full"):
            for rank in ranks:
                yield Layout(
                    **{
                        **vars(base),
                        "micro": micro,
                        "recompute": recompute,
                        "rank": rank,
                        "asynchronous": base.tensor > 1,
                    }
                )


def _pipelines(base: Layout, settings: PriorTrain) -> Iterator[Layout]:
    each = settings.model.layers // base.pipeline
    schedules: list[tuple[Schedule, int]] = [("1f1b", 1), ("zero-bubble", 1)]
    schedules += [("interleaved", chunks) for chunks in CHUNKS if each % chunks == 0]
    for micro in _divisors(base.samples):
        times = base.samples // micro
        for schedule, chunks in schedules:
            if schedule != "1f1b" and not (
                times >= base.pipeline and whole_rounds(times, base.pipeline)
            ):
                continue
            for recompute in ("none",) if schedule == "zero-bubble" else ("none", "norms", "full"):
                yield Layout(
                    **{
                        **vars(base),
                        "micro": micro,
                        "recompute": recompute,
                        "schedule": schedule,
                        "chunks": chunks,
                        "asynchronous": base.tensor > 1,
                    }
                )


def _divisors(samples: int) -> list[int]:
    """Powers of two that divide the samples of a replica, up to 16."""
    return [n for n in (1, 2, 4, 8, 16) if samples % n == 0]


def sizes_of(model: PriorConfig, tensor: int) -> Sizes:
    """A prior's blocks; heads are padded to a multiple of the tensor ranks."""
    heads = -(-model.heads // tensor) * tensor
    return Sizes(
        hidden=model.dim,
        heads=heads,
        layers=model.layers,
        groups=heads,
        wide=model.hidden,
        vocabulary=model.image_vocabulary,
        gated=model.mlp == "gated",
        qk_norm=model.qk_norm,
        head=model.dim // model.heads,
    )
