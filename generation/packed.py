"""Linear layers as decoding wants them: few rows, so that reading the weights is what costs."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedLinear:
    """x W^T + b, with W laid out once for the CPU's kernels; elsewhere plain torch.

    From 2 to some tens of rows oneDNN's own layout is twice as fast as torch's. At one row it is
    read at 0.6 of what the memory gives; in fp32, W^T in order is read at 0.8 where there are more
    outputs than inputs, and W in order where there are not: docs/LOG.md.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        gelu: bool = False,
        one_row: bool = False,
    ) -> None:
        """`weight` is (outputs, inputs); `one_row`: lay it out for calls of one row."""
        weight = weight.detach().to(dtype).contiguous()
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._gelu = gelu
        self.bytes = weight.numel() * weight.element_size()
        """What is read of the weights for each call."""
        self._in_order = one_row and dtype == torch.float32
        self._packed = not self._in_order and _packs(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        elif self._in_order and len(weight) > weight.shape[1]:
            weight = weight.T.contiguous().T
        self._weight = weight

    def in_order(self) -> "PackedLinear":
        """The same on a CPU in fp32, laid out for calls of one row; elsewhere itself."""
        weight = self._weight.to_dense() if self._packed else self._weight
        if self._in_order or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return self
        return PackedLinear(weight, self._bias, weight.dtype, gelu=self._gelu, one_row=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) -> (..., outputs), in the weights' precision."""
        if self._packed:
            name, kind = ("gelu", "tanh") if self._gelu else ("none", "")
            found: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, name, [], kind
            )
            return found
        x = F.linear(x, self._weight, self._bias)
        return F.gelu(x, approximate="tanh") if self._gelu else x


def _packs(weight: Tensor) -> bool:
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and known
