"""What tensor-parallel layers ask of their group; on one rank each is plain torch."""

import torch.nn.functional as F
from torch import Tensor, nn


class TensorParallel:
    """A rank by itself; `parallel.tensor.megatron` has the one for several."""

    rank = 0
    size = 1

    def enter(self, x: Tensor) -> Tensor:
        """Pass states into a cut region; backward, the gradients of all ranks are summed."""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """Sum the parts that the ranks computed; backward, gradients pass."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Join the parts of the last axis that the ranks hold, on all of them; without gradients.

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
