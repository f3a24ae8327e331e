"""Linears and embeddings that a tensor group shares; weights are cut along axis 0.

On one rank each layer is the whole layer, so one model definition serves every degree. Weights are
created on torch's default device: the host, from which engines move them layer by layer, or meta.
"""

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from parallel.placement import Placement, place, placement_of, rows_of
from parallel.tensor.halves import wants_input, wants_weights
from parallel.tensor.ops import TensorParallel

EPS = 1e-5
"""Added to mean squares in norms."""
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
        self._tensor = tensor
        self.weight = _zeros(padded, inputs)
        self.bias = _zeros(padded) if bias else None
        split = tensor.size > 1
        place(self.weight, Placement(shape=(outputs, inputs), first=first, rows=rows, split=split))
        if self.bias is not None:
            place(self.bias, Placement(shape=(outputs,), first=first, rows=rows, split=split))
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def adapt(self, rank: int, scale: float) -> None:
        """Add a low-rank adapter, scale * B A, which starts as zeros.

        Shapes: lora_a is A (rank, inputs), whole on every tensor rank; lora_b is B (outputs, rank),
        cut like the weight. Source: LoRA, arXiv 2106.09685.
        """
        whole = placement_of(self.weight)
        (outputs, inputs), padded = whole.shape, len(self.weight)
        self.lora_a, self.lora_b = _zeros(rank, inputs), _zeros(padded, rank)
        place(self.lora_b, replace(whole, shape=(outputs, rank)))
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.lora_a is None:
            return out
        # each rank's gradient of A comes from its own channels
        low = F.linear(x, self._tensor.share(self.lora_a))
        return out + F.linear(self._scale * low, self.lora_b)


class RowLinear(nn.Module):
    """x W + b over this rank's rows of W: a part of the channels in, whole states out.

    Shapes: weight (inputs, outputs), so that the cut axis is the first one, as the paper cuts its
    second MLP matrix (appendix E). The partial sums are added in the type of the matmul.
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
        place_in_stream(self.bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    def adapt(self, rank: int, scale: float) -> None:
        """Add a low-rank adapter, scale * A B, which starts as zeros.

        Shapes: lora_a is A (inputs, rank), cut like the weight; lora_b is B (rank, outputs), whole
        on every tensor rank. Source: LoRA, arXiv 2106.09685.
        """
        whole = placement_of(self.weight)
        (inputs, outputs), padded = whole.shape, len(self.weight)
        self.lora_a, self.lora_b = _zeros(padded, rank), _zeros(rank, outputs)
        place(self.lora_a, replace(whole, shape=(inputs, rank)))
        self._scale = scale

    def forward(self, x: Tensor) -> Tensor:
        partial = torch.matmul(x, self.weight)
        if self.lora_a is not None:
            low = self._scale * torch.matmul(x, self.lora_a)
            partial = partial + torch.matmul(low, self._tensor.share(self.lora_b))
        return self._tensor.leave(partial) + self.bias


class VocabularyEmbedding(nn.Module):
    """A table of vectors cut along the vocabulary; ids -> vectors on every rank.

    With sequence parallelism `tensor.assemble` has to add the vectors of all ranks up.
    """

    def __init__(self, entries: int, width: int, tensor: TensorParallel) -> None:
        super().__init__()
        first, rows, padded = rows_of(entries, 1, tensor.rank, tensor.size)
        self._tensor = tensor
        self.table = tensor.embedding(padded * tensor.size, width)
        placement = Placement(shape=(entries, width), first=first, rows=rows, split=tensor.size > 1)
        place(cast(nn.Parameter, self.table.weight), placement)

    def forward(self, ids: Tensor) -> Tensor:
        return self._tensor.look_up(self.table, ids)


class VocabularyHead(ColumnLinear):
    """States -> this rank's part of the logits; padding rows can never be drawn."""

    def __init__(self, width: int, entries: int, tensor: TensorParallel, tied_to: str = "") -> None:
        """`tied_to`: global name of the embedding whose table is the weight."""
        super().__init__(width, entries, tensor)
        place(self.weight, replace(placement_of(self.weight), tied_to=tied_to))
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


class HeadNorm(nn.Module):
    """Each head divided by its root mean square, times a gain per channel, cut with the heads.

    Shapes: (..., heads of this rank, head) -> the same, in the input's type.
    """

    def __init__(self, width: int, tensor: TensorParallel, head: int) -> None:
        super().__init__()
        first, rows, padded = rows_of(width, head, tensor.rank, tensor.size)
        self._head = head
        self.weight = _zeros(padded)
        split = tensor.size > 1
        place(self.weight, Placement(shape=(width,), first=first, rows=rows, split=split))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(x.to(self.weight.dtype), (self._head,), eps=EPS)
        return (wide * self.weight.view(-1, self._head)).to(x.dtype)


def place_in_stream(parameter: nn.Parameter) -> None:
    """Place a gain or bias of the residual stream, which every tensor rank holds whole."""
    place(parameter, replace(placement_of(parameter), stream=True))


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradients[0].flatten(0, -2)
        half = flat.to(torch.bfloat16)
        states = torch.mm(half, weight).float().view_as(x) if wants_input() else None
        if not wants_weights():
            return states, None, None
        return states, torch.mm(half.T, x.flatten(0, -2)).float(), flat.sum(0)
