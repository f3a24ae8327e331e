"""Linear layers as decoding wants them: few rows, so that reading the weights is what costs."""

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedLinear:
    """x W^T + b, with W laid out once for the CPU's kernels; elsewhere plain torch.

    At one row, oneDNN's own layout is read at 0.83 (fp32) and 0.6 (bf16) of what the memory gives,
    torch's at 0.67 and 0.4; at 8 rows it is twice as fast: docs/LOG.md.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
    ) -> None:
        """`weight` is (outputs, inputs)."""
        weight = weight.detach().to(dtype).contiguous()
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._gelu = gelu
        self.bytes = weight.numel() * weight.element_size()
        """What is read of the weights for each call."""
        self._packed = _packs(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight

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
