"""Linears and embeddings that a tensor group shares; weights are cut along axis 0.

On one rank each layer is the whole layer, so one model definition serves every degree. Weights are
created on torch's default device: the host, from which engines move them layer by layer, or meta.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from parallel.placement import Placement, place, rows_of
from parallel.tensor.ops import TensorParallel

MASKED = -1e30
"""Logit of a padding row of the vocabulary."""


class ColumnLinear(nn.Module):
    """x W^T + b for this rank's rows of W: whole states in, a part of the channels out.

    Shapes: weight (outputs, inputs); `unit` outputs (e.g. of one head) stay together. Call
    `tensor.enter` on the input first, once for all linears that share it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tensor: TensorParallel,
        unit: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        first, rows, padded = rows_of(outputs, unit, tensor.rank, tensor.size)
        self.weight = _zeros(padded, inputs)
        self.bias = _zeros(padded) if bias else None
        split = tensor.size > 1
        place(self.weight, Placement(shape=(outputs, inputs), first=first, rows=rows, split=split))
        if self.bias is not None:
            place(self.bias, Placement(shape=(outputs,), first=first, rows=rows, split=split))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """x W + b over this rank's rows of W: a part of the channels in, whole states out.

    Shapes: weight (inputs, outputs), so that the cut axis is the first one, as the paper cuts its
    second MLP matrix (appendix E). The partial sums are added in fp32.
    """

    def __init__(self, inputs: int, outputs: int, tensor: TensorParallel, unit: int = 1) -> None:
        super().__init__()
        first, rows, padded = rows_of(inputs, unit, tensor.rank, tensor.size)
        self._tensor = tensor
        self.weight = _zeros(padded, outputs)
        self.bias = _zeros(outputs)
        placement = Placement(
            shape=(inputs, outputs), first=first, rows=rows, split=tensor.size > 1
        )
        place(self.weight, placement)

    def forward(self, x: Tensor) -> Tensor:
        partial = torch.matmul(x, self.weight)
        if self._tensor.size > 1:
            partial = self._tensor.leave(partial.float())
        return partial + self.bias


class VocabularyEmbedding(nn.Module):
    """A table of vectors cut along the vocabulary; ids -> vectors on every rank."""

    def __init__(self, entries: int, width: int, tensor: TensorParallel) -> None:
        super().__init__()
        first, rows, padded = rows_of(entries, 1, tensor.rank, tensor.size)
        self.table = tensor.embedding(padded * tensor.size, width)
        placement = Placement(shape=(entries, width), first=first, rows=rows, split=tensor.size > 1)
        place(cast(nn.Parameter, self.table.weight), placement)

    def forward(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.table(ids)
        return vectors


class VocabularyHead(ColumnLinear):
    """States -> this rank's part of the logits; padding rows can never be drawn."""

    def __init__(self, width: int, entries: int, tensor: TensorParallel) -> None:
        super().__init__(width, entries, tensor)
        _, self._rows, padded = rows_of(entries, 1, tensor.rank, tensor.size)
        self._padding = padded - self._rows

    def forward(self, x: Tensor, half: bool = False) -> Tensor:
        """fp32 logits of fp32 states; `half`: the matmuls of the backward pass are in bf16."""
        assert self.bias is not None
        logits: Tensor
        if half and torch.is_grad_enabled():
            logits = _HalfBack.apply(x, self.weight, self.bias)
        else:
            logits = F.linear(x, self.weight, self.bias)
        if not self._padding:
            return logits
        return F.pad(logits[..., : self._rows], (0, self._padding), value=MASKED)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=torch.get_default_device()))


class _HalfBack(Function):
    """A linear layer whose forward pass is in fp32 and whose backward pass multiplies in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x.to(torch.bfloat16), weight.to(torch.bfloat16))
        # F.linear returns a view for one sample, but the vocabulary-parallel loss writes in place
        logits = torch.addmm(bias, x.flatten(0, -2), weight.T)
        out: Tensor = torch.ops.aten._unsafe_view(logits, [*x.shape[:-1], len(weight)])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        flat = gradients[0].flatten(0, -2)
        half = flat.to(torch.bfloat16)
        states = torch.mm(half, weight).float().view_as(x)
        rows = torch.mm(half.T, x.flatten(0, -2)).float()
        return states, rows, flat.sum(0)
