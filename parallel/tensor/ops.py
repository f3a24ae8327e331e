"""Operations of a tensor group for its layers; on one rank each is plain torch.

States travel in the compute type: 16 bits under autocast. With sequence parallelism each rank holds
a run of positions outside of the regions that share a matmul: an all-gather enters a region and a
reduce-scatter leaves it, the two halves of the all-reduce that leaves it otherwise.
Source: Korthikanti et al. 2022, arXiv 2205.05198.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class TensorParallel:
    """Tensor parallelism of degree 1; `parallel.tensor.megatron` has the real one."""

    rank = 0
    size = 1
    sequence = False
    """Each rank holds a run of positions outside of the regions."""

    def enter(self, x: Tensor, uses: int = 1) -> tuple[Tensor, ...]:
        """States into a region, in the compute type, for `uses` layers that share them.

        Backward sums the gradients of all uses in fp32, then those of all ranks.
        Shapes: (B, S, dim), with sequence parallelism (B, S / size, dim) -> (B, S, dim).
        """
        dtype = compute_dtype(x)
        if self.size == 1 and (uses == 1 or dtype == x.dtype):
            return (x.to(dtype),) * uses
        made: tuple[Tensor, ...] = _Enter.apply(x, self, dtype, uses)
        return made

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial results of all ranks, in their type; undoes the shapes of `enter`."""
        if self.size == 1:
            return x
        out: Tensor = _Leave.apply(x, self)
        return out

    def share(self, weight: Tensor) -> Tensor:
        """A whole weight for a part of the channels; backward sums the gradients of all ranks."""
        if self.size == 1:
            return weight
        out: Tensor = _Share.apply(weight, self)
        return out

    def once(self, x: Tensor) -> Tensor:
        """A summand, equal on all ranks, of embeddings that `assemble` adds up."""
        if not self.sequence:
            return x
        out: Tensor = _Once.apply(x, self.rank)
        return out

    def assemble(self, x: Tensor) -> Tensor:
        """States of all positions -> this rank's; embeddings are sums over the ranks before it."""
        return self.leave(x) if self.sequence else x

    def look_up(self, table: nn.Module, ids: Tensor) -> Tensor:
        """Vectors of an `embedding`, to be added up by `assemble`."""
        vectors: Tensor = table(ids)
        return vectors

    def gather(self, x: Tensor) -> Tensor:
        """All-gather along the last axis; without gradients.

        Shapes: (..., n / size) -> (..., n).
        """
        return x

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over all ranks; may write to x."""
        return x

    def gather_sequence(self, x: Tensor) -> Tensor:
        """All-gather along the positions: (B, S / size, dim) -> (B, S, dim)."""
        return x

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's positions of the sum over all ranks: (B, S, dim) -> (B, S / size, dim)."""
        return x

    def embedding(self, rows: int, width: int) -> nn.Module:
        """A table of `rows` (a multiple of size), cut along its rows; ids -> sums over all ranks.

        Its parameter is `weight`, not initialised.
        """
        return nn.Embedding(rows, width)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each row, from logits whose last axis is cut over the ranks.

        Shapes: (N, vocabulary / size) float32, (N,) int64 -> (N,).
        """
        return F.cross_entropy(logits, targets, reduction="none")

    def whole_states(self, x: Tensor) -> Tensor:
        """States of all positions, without gradients, from what a rank holds of them."""
        return self.gather_sequence(x) if self.sequence else x

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all ranks, of the positions that this rank holds."""
        return self.scatter_sum(x) if self.sequence else self.add_up(x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which linears multiply x: autocast's, if it is on."""
    device = x.device.type
    on = x.is_floating_point() and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


class _Enter(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tensor: TensorParallel, dtype: torch.dtype, uses: int
    ) -> tuple[Tensor, ...]:
        ctx.tensor, ctx.inside, ctx.outside = tensor, dtype, x.dtype
        whole = tensor.whole_states(x.to(dtype))
        return tuple(whole.view_as(whole) for _ in range(uses))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradients[0].float() if len(gradients) > 1 else gradients[0]
        for gradient in gradients[1:]:
            total = total + gradient
        if ctx.tensor.size > 1:
            total = ctx.tensor.summed(_own(total.to(ctx.inside), gradients[0]))
        return total.to(ctx.outside), None, None, None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor = tensor
        return tensor.summed(_own(x, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.tensor.whole_states(gradients[0]), None


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor = tensor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.tensor.add_up(_own(gradients[0], gradients[0])), None


class _Once(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int) -> Tensor:
        return x.view_as(x) if rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _own(x: Tensor, given: Tensor) -> Tensor:
    """A contiguous tensor that an in-place sum may write to: x, or a copy if it is the given."""
    shared = x.untyped_storage()._cdata == given.untyped_storage()._cdata
    return x.clone(memory_format=torch.contiguous_format) if shared else x.contiguous()
