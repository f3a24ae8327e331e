"""Helpers of all engines: global norm and decision, mean losses, gradient compression."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint.config import averages_errors
from checkpoint.format import Reader, StateSlice
from core.errors import ConfigError
from core.log import LOG
from parallel.compress.advisor import chosen_rank
from parallel.compress.overlapped import OverlappedPowerSGD
from parallel.compress.powersgd import MatrixShard, Reduced, shard_rank
from parallel.control import FIELDS, Decision, Judge, Vote, decide
from parallel.engines.error_buffers import mean_slices, own_slices, read_errors
from parallel.engines.protocol import EngineSettings, Losses, Program
from parallel.mesh import Group, Mesh
from parallel.placement import Placement, placement_of
from parallel.replicas import copy_parts, flat_average
from parallel.scales import Scales

BASIS, SCALE = "basis", "scale"


def mean_losses(seen: list[Losses], names: Sequence[str], mesh: Mesh) -> dict[str, float]:
    """Average each loss over micro-batches, then over the replicas; known on every rank.

    Only the last stage has losses. All replicas must have batches of equal size, so that the mean
    of means is the global mean.
    """
    values = torch.zeros(len(names), device=mesh.world.device)
    if seen:
        rows = [torch.stack([row[name].detach().float() for name in names]) for row in seen]
        values = torch.stack(rows).mean(0)
        if mesh.data.size > 1:
            dist.all_reduce(values, group=mesh.data.handle)
            values /= mesh.data.size
    if mesh.pipeline.size > 1:
        assert mesh.pipeline.handle is not None, "a pipeline of several stages has a group"
        source = dist.get_global_rank(mesh.pipeline.handle, mesh.pipeline.size - 1)
        dist.broadcast(values, src=source, group=mesh.pipeline.handle)
    return dict(zip(names, values.tolist(), strict=True))


def decide_update(
    squares: list[Tensor], mesh: Mesh, scales: Scales, vote: Vote, judge: Judge
) -> Decision:
    """Reduce the gradient norm and the votes over all ranks: update or skip, go on or stop.

    `squares` are sums of squares of this rank's gradients, weighted so that the sum over the world
    counts every element once. The same reduction updates the gradient scales.
    """
    device = mesh.world.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.stack([zero, *(square.double() for square in squares)]).sum()
    shared = torch.cat([total[None], vote.share(device), scales.broken(device)])
    if mesh.world.group is not None:
        dist.all_reduce(shared, group=mesh.world.group)
    shared = shared.to("cpu")  # the step's one wait for the device
    broken = shared[1 + FIELDS :]
    scales.update(broken)
    square = float(shared[0])
    finite = math.isfinite(square) and not broken.any()
    norm = math.sqrt(square) if finite else math.inf
    return decide(norm, shared[1 : 1 + FIELDS], judge)


def add_stream_gradients(
    gradients: Mapping[str, Tensor], places: Mapping[str, Placement], mesh: Mesh
) -> None:
    """Add up, over the tensor ranks, gradients that each has of its own positions only; in place.

    Call it once a step, on gradients that are averaged over the replicas; tensor ranks must hold
    the same partition of them. Without sequence parallelism it does nothing.
    """
    parts = [gradient for name, gradient in gradients.items() if places[name].stream]
    if mesh.shared.sequence and any(part.numel() > 0 for part in parts):
        copy_parts(flat_average(parts, mesh.tensor.handle, 1), parts)


def scale_slices(scales: Scales, mesh: Mesh) -> Iterator[StateSlice]:
    """The gradient scales that this rank saves."""
    if mesh.data.rank == 0 and mesh.tensor.rank == 0:
        for name, scale in scales.here.items():
            data = torch.tensor([scale.value, float(scale.since_division)], device="cpu")
            yield StateSlice(name=name, kind=SCALE, shape=(2,), start=0, data=data)


def load_scales(scales: Scales, reader: Reader) -> None:
    """Load gradient scales; scales that are not stored keep their initial value."""
    for name, scale in scales.here.items():
        if SCALE in reader.kinds(name):
            value, since = reader.tensor(name, SCALE).tolist()
            scale.value, scale.since_division = value, int(since)


def counts_once(placement: Placement, mesh: Mesh) -> bool:
    """True if this rank counts and saves a parameter: not a copy of one on another stage.

    Of replicated ones, tensor rank 0 does.
    """
    return not placement.tied_to and (placement.split or mesh.tensor.rank == 0)


def placements(names: Mapping[str, nn.Parameter]) -> dict[str, Placement]:
    """The placement of each parameter; call it before ZeRO-3 empties them."""
    return {name: placement_of(parameter) for name, parameter in names.items()}


def build_compressor(
    program: Program,
    held: Mapping[str, Placement],
    settings: EngineSettings,
    group: Group,
    parts: Group,
    device: torch.device,
    bucket_of: Callable[[str], str] = lambda _: "",
) -> "Compressor | None":
    """Build PowerSGD over `group` for matrices that are sharded over `parts`; None if it is off.

    `bucket_of` a matrix's name: an engine may reduce one bucket before the others are known.
    Raises: ConfigError if this program has no compressible matrices.
    """
    if not settings.compress.on:
        return None
    matrices = {n: p for n, p in held.items() if n.endswith(program.compressed) and p.rows}
    if not program.compressed:
        raise ConfigError("only the prior's gradients can be compressed; set compress.rank to 0")
    shards = _shards(matrices, parts)
    rank = settings.compress.rank
    if rank == "auto":
        others = sum(p.numel for name, p in held.items() if name not in matrices)
        assert group.handle is not None, "config.problems() asks for at least two replicas"
        each = settings.compress.payload_bytes
        rank = chosen_rank(shards, others, parts.size, group.handle, device, each)
        LOG.info("compression auto: %s", f"rank {rank}" if rank else "off, it would cost time here")
    if not rank:
        return None
    return Compressor(matrices, shards, rank, settings, group, parts, device, bucket_of)


def _shards(matrices: Mapping[str, Placement], parts: Group) -> list[MatrixShard]:
    return [
        MatrixShard(name=n, rows=p.rows, columns=p.shape[1], shard=parts.rank)
        for n, p in matrices.items()
    ]


class Compressor:
    """PowerSGD over the replicas of this rank's matrices, with its checkpoint state."""

    def __init__(
        self,
        matrices: Mapping[str, Placement],
        shards: list[MatrixShard],
        rank: int,
        settings: EngineSettings,
        group: Group,
        parts: Group,
        device: torch.device,
        bucket_of: Callable[[str], str] = lambda _: "",
    ) -> None:
        """`rank` is the total rank, over the shards of a matrix."""
        self._matrices, self._group, self._parts = dict(matrices), group, parts
        self.rank = shard_rank(rank, parts.size)
        self._powersgd = OverlappedPowerSGD(
            shards,
            rank=self.rank,
            seed=settings.seed,
            group=group.handle if group.size > 1 else None,
            device=device,
            warm_start=settings.compress.warm_start,
            error_feedback=settings.compress.error_feedback,
            bucket_of=bucket_of,
            payload=torch.bfloat16 if settings.compress.payload == "bf16" else torch.float32,
        )
        self._warm = settings.compress.warm_start
        self._averages = averages_errors(settings.errors, group.size)
        self._device = device
        LOG.info(
            "PowerSGD: %d matrices at rank %d between %d replicas",
            len(matrices),
            self.rank,
            group.size,
        )

    def reduce(self, gradients: Mapping[str, Tensor]) -> Reduced:
        """Average gradients over the replicas; padding rows come back as zero.

        Shapes: flat or shaped local gradients; returned flat.
        """
        real = {
            name: self._matrix(name, gradient) if name in self._matrices else gradient
            for name, gradient in gradients.items()
        }
        reduced = self._powersgd.reduce(real)
        averaged = {}
        for name, gradient in gradients.items():
            flat = torch.zeros(gradient.numel(), dtype=gradient.dtype, device=gradient.device)
            part = reduced.gradients[name].reshape(-1)
            flat[: part.numel()] = part
            averaged[name] = flat
        return Reduced(
            gradients=averaged,
            squares=reduced.squares,
            raw_bytes=reduced.raw_bytes,
            sent_bytes=reduced.sent_bytes,
        )

    def average(self, gradients: Mapping[str, Tensor]) -> tuple[list[Tensor], Reduced]:
        """`reduce` in place.

        Returns this rank's share of the gradients' squares, and the rest of the reduction.
        """
        reduced = self.reduce(gradients)
        for name, gradient in gradients.items():
            gradient.copy_(reduced.gradients[name].view_as(gradient))
        shares = [square / self._group.size for square in reduced.squares.values()]
        return shares, replace(reduced, gradients={})

    @property
    def names(self) -> frozenset[str]:
        """The matrices that are compressed."""
        return frozenset(self._matrices)

    def start(self, bucket: str, gradients: Mapping[str, Tensor]) -> None:
        """Begin to reduce the matrices of a bucket; `gradients` as in `reduce`."""
        self._powersgd.start(bucket, self._compressed(gradients))

    def finish(self) -> tuple[dict[str, Tensor], Tensor, int]:
        """Wait for what was started: squares, a flag of all ranks, and bytes, as in PowerSGD."""
        return self._powersgd.finish()

    def settle(self, gradients: Mapping[str, Tensor], everywhere: bool, here: bool) -> None:
        """Average gradients in place, and update the error buffers, as in PowerSGD."""
        self._powersgd.settle(self._compressed(gradients), everywhere, here)

    def _compressed(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self._matrix(n, g) for n, g in gradients.items() if n in self._matrices}

    def facts(self, reductions: Sequence[Reduced]) -> dict[str, float]:
        """Metrics of a step: raw and sent bytes of its reductions, and the rank."""
        if not reductions:
            return {"compress_rank": self.rank}
        return {
            "compress_raw_bytes": sum(each.raw_bytes for each in reductions),
            "compress_sent_bytes": sum(each.sent_bytes for each in reductions),
            "compress_rank": self.rank,
        }

    def slices(self) -> Iterator[StateSlice]:
        """This replica's error buffers or run of their mean, and (once) the warm-started Q.

        Collective over the replicas: all must exhaust it.
        """
        cut = mean_slices if self._averages else own_slices
        yield from cut(self._powersgd.errors(), self._matrices, self._group)
        if self._warm and self._group.rank == 0:
            for name, basis in self._powersgd.bases().items():
                part = self._basis_place(basis).slice(name, BASIS, 0, basis)
                if part is not None:
                    yield part

    def load(self, reader: Reader) -> None:
        """Load the buffers, or the mean of those of another number of replicas; collective."""
        flat = read_errors(reader, self._matrices, self._group, self._device)
        errors = {name: flat[name].view(place.rows, -1) for name, place in self._matrices.items()}
        drawn = self._powersgd.bases()
        bases = {name: self._basis(reader, name, drawn[name]) for name in self._matrices}
        self._powersgd.load(errors, bases)

    def _matrix(self, name: str, gradient: Tensor) -> Tensor:
        place = self._matrices[name]
        return gradient.reshape(-1)[: place.numel].view(place.rows, place.shape[1])

    def _basis_place(self, basis: Tensor) -> Placement:
        rows, rank = basis.shape
        return Placement(
            shape=(rows * self._parts.size, rank),
            first=rows * self._parts.rank,
            rows=rows,
            split=True,
        )

    def _basis(self, reader: Reader, name: str, drawn: Tensor) -> Tensor:
        """The stored Q if the sharding of the matrix is unchanged, else the drawn one."""
        if not self._warm or BASIS not in reader.kinds(name):
            return drawn
        place = self._basis_place(drawn)
        if reader.shape(name, BASIS) != place.shape:
            return drawn
        return place.read(reader, name, BASIS, 0, place.numel).view_as(drawn)
