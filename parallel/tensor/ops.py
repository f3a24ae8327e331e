"""Operations of a tensor group for its layers; on one rank each is plain torch."""

import torch.nn.functional as F
from torch import Tensor, nn


class TensorParallel:
    """Tensor parallelism of degree 1; `parallel.tensor.megatron` has the real one."""

    rank = 0
    size = 1

    def enter(self, x: Tensor) -> Tensor:
        """Copy states into a tensor-parallel region; backward sums the gradients of all ranks."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """Sum the partial results of all ranks; backward passes the gradient through."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All-gather along the last axis; without gradients.

        Shapes: (..., n / size) -> (..., n).
        """
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
