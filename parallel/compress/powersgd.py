"""PowerSGD with error feedback: low-rank all-reduce of gradient matrices.

Source: arXiv 2102.12092, appendix E (fixed Q, epsilon shift, norm from the factors, non-finite
rules); arXiv 1905.13727 (the method, warm start). Means over the group replace the
paper's sums over nodes: P is orthogonalised, so its scale does not matter, and Q holds the mean.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from core.keys import key_int
from parallel.compress.orthogonal import orthonormal
from parallel.replicas import copy_parts, flat_average


@dataclass(frozen=True, kw_only=True)
class MatrixShard:
    """This rank's shard of a gradient matrix; each shard is factored on its own."""

    name: str
    """Global parameter name; fixed Q is drawn from it, so that tied copies agree."""
    rows: int
    columns: int
    shard: int = 0
    """Index of the shard; each shard draws its own Q."""

    @property
    def oriented(self) -> tuple[int, int]:
        """(short, long) side; the columns of P have the short length."""
        return min(self.rows, self.columns), max(self.rows, self.columns)


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """Result of a reduction over the group; the same on all of its ranks."""

    gradients: dict[str, Tensor]
    """Mean gradients: decompressed matrices, and the rest as it was sent."""
    squares: dict[str, Tensor]
    """Sum of squares of each mean gradient, from its factor; infinite if any was not finite."""
    raw_bytes: int
    """Bytes of an uncompressed fp32 all-reduce."""
    sent_bytes: int

    @property
    def norm_squared(self) -> Tensor:
        """Sum of squares of all mean gradients."""
        return torch.stack(list(self.squares.values())).sum()

    @property
    def finite(self) -> bool:
        """False if any replica had a non-finite gradient; the mean gradients are always finite."""
        return bool(torch.isfinite(self.norm_squared))


@dataclass
class Stack:
    """All shards of a bucket with one oriented shape, with the factors of the current update."""

    bucket: str
    members: list[MatrixShard]
    error: Tensor
    """(n, short, long): error feedback, the residual of earlier updates."""
    q: Tensor
    """(n, long, rank): the Q that the error is multiplied by."""
    p: Tensor = field(init=False)
    """(n, short, rank), orthonormal."""
    q_mean: Tensor = field(init=False)
    """(n, long, rank): the mean of the transposed errors times P."""


class PowerSGD:
    """Error buffers, and the compressed all-reduce of gradients over one group of ranks."""

    def __init__(
        self,
        shards: Sequence[MatrixShard],
        *,
        rank: int,
        seed: int,
        group: "dist.ProcessGroup | None",
        device: torch.device,
        warm_start: bool = False,
        error_feedback: bool = True,
        bucket_of: Callable[[str], str] = lambda _: "",
        payload: torch.dtype = torch.float32,
    ) -> None:
        """`payload` is the type in which factors are sent; error feedback takes its rounding.

        `rank` is the rank of one shard: the config's total rank divided by the shards.

        Buffers and gradients must be on `device`. `bucket_of` a matrix's name: matrices of one
        bucket can be reduced before the gradients of the others are known (overlapped.py).
        Raises: ValueError for a rank below 1.
        """
        if rank < 1:
            raise ValueError(f"a shard's rank must be at least 1, not {rank}")
        self.rank, self._group, self._device = rank, group, device
        self._size = dist.get_world_size(group) if group is not None else 1
        self._warm, self._feedback = warm_start, error_feedback
        self._payload = payload
        alike: dict[tuple[str, tuple[int, int]], list[MatrixShard]] = defaultdict(list)
        for shard in shards:
            alike[bucket_of(shard.name), shard.oriented].append(shard)
        self._batches = [
            Stack(
                bucket=bucket,
                members=members,
                error=torch.zeros(len(members), *shape, device=device),
                q=torch.stack([_gaussian(m, shape, min(rank, shape[0]), seed) for m in members]).to(
                    device
                ),
            )
            for (bucket, shape), members in alike.items()
        ]
        self.names = frozenset(shard.name for shard in shards)

    @torch.no_grad()
    def reduce(self, gradients: Mapping[str, Tensor], finite: bool = True) -> Reduced:
        """Average this rank's gradients over the group; waits for a GPU twice.

        Matrices go as two factors, in one all-reduce for all P and one for all Q; everything else,
        and the flag of non-finite gradients, in one fp32 all-reduce. `finite`: False if gradients
        that are reduced elsewhere are not finite.
        Shapes: a compressed gradient is (rows, columns); returns the same shapes, fp32.
        """
        here = _all_finite(gradients.values(), self._device) & finite
        self._accumulate(gradients, here)
        for batch in self._batches:
            batch.p = batch.error @ batch.q
        factors = self._average([batch.p for batch in self._batches], self._payload)
        for batch, basis in zip(
            self._batches, orthonormal([batch.p for batch in self._batches]), strict=True
        ):
            batch.p = basis
            batch.q_mean = batch.error.transpose(1, 2) @ batch.p
        factors &= self._average([batch.q_mean for batch in self._batches], self._payload)
        plain = {n: g.float() for n, g in gradients.items() if n not in self.names}
        flag = (~here).float()[None]
        rest = [torch.nan_to_num(g, 0.0, 0.0, 0.0).clone() for g in plain.values()]
        self._average([*rest, flag])
        usable, everywhere = torch.stack([factors, factors & (flag[0] == 0.0)]).tolist()
        means = dict(zip(plain, rest, strict=True))
        squares = {name: gradient.square().sum() for name, gradient in means.items()}
        for batch, i, member in self._members():
            squares[member.name] = batch.q_mean[i].square().sum()
        if not everywhere:
            broken = torch.tensor(math.inf, device=self._device)
            squares = dict.fromkeys(squares, broken)
        for batch in self._batches:
            self._finish(batch, usable, means)
        raw = sum(gradient.numel() for gradient in gradients.values())
        sent = self._payload.itemsize * sum(b.p.numel() + b.q_mean.numel() for b in self._batches)
        sent += 4 * (1 + sum(t.numel() for t in rest))
        return Reduced(
            gradients=means,
            squares=squares,
            raw_bytes=4 * raw,
            sent_bytes=sent,
        )

    def errors(self) -> dict[str, Tensor]:
        """The error buffers by name, as (rows, columns)."""
        return {m.name: _turn(batch.error[i], m) for batch, i, m in self._members()}

    def bases(self) -> dict[str, Tensor]:
        """The Q of each shard by name, (long side, rank); with a warm start, the last one."""
        return {m.name: batch.q[i] for batch, i, m in self._members()}

    @torch.no_grad()
    def load(self, errors: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> None:
        """Restore the results of `errors` and `bases`."""
        for batch, i, member in self._members():
            batch.error[i].copy_(_turn(errors[member.name], member))
            batch.q[i].copy_(bases[member.name])

    def _members(self) -> list[tuple[Stack, int, MatrixShard]]:
        return [(b, i, member) for b in self._batches for i, member in enumerate(b.members)]

    def _accumulate(self, gradients: Mapping[str, Tensor], finite: Tensor) -> None:
        """Add the gradients to what is owed, if all of this rank's are finite."""
        waits = finite.device.type == "cpu"
        if waits and not finite:
            return
        for batch, i, member in self._members():
            gradient = _turn(gradients[member.name].float(), member)
            if not waits:
                gradient = torch.where(finite, gradient, 0.0 if self._feedback else batch.error[i])
            if self._feedback:
                batch.error[i] += gradient
            else:
                batch.error[i] = gradient

    def _average(self, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Average tensors in place in one all-reduce; infinities are clamped. True if finite."""
        if not tensors:
            return _all_finite([], self._device)
        flat = flat_average(tensors, self._group, self._size, dtype)
        copy_parts(torch.nan_to_num(flat), tensors)
        return torch.isfinite(flat).all()

    def _finish(self, batch: Stack, finite: bool, gradients: dict[str, Tensor]) -> None:
        """Add the decompressed gradients to `gradients`, and keep the residual as error."""
        mean = batch.p @ batch.q_mean.transpose(1, 2)
        for i, member in enumerate(batch.members):
            gradients[member.name] = _turn(mean[i], member)
        if finite and self._feedback:
            batch.error -= mean
        elif not bool(torch.isfinite(batch.error).all()):
            batch.error.zero_()
        if self._warm and finite:
            batch.q = batch.q_mean.clone()


def shard_rank(total: int, shards: int) -> int:
    """The rank of one shard: the paper's 896 over 8 GPUs is 112 each."""
    return max(1, total // shards)


def _gaussian(shard: MatrixShard, shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(key_int(seed, shard.name, shard.shard, "powersgd"))
    return torch.randn(shape[1], rank, generator=draws, device="cpu")


def _turn(matrix: Tensor, shard: MatrixShard) -> Tensor:
    """Convert between (rows, columns) and (short, long); its own inverse."""
    return matrix if shard.rows <= shard.columns else matrix.T


def _all_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """One flag on the device, without waiting for it."""
    flags = [torch.isfinite(t).all() for t in tensors]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)
