"""Linear layers for decoding: with few rows, reading the weights takes most of the time."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_HALF = 65504.0
"""The largest fp16 number."""
_MOST_EIGHT, _LEAST_SCALE = 127, 1e-12
"""The largest 8-bit number used, and the scale of an output without weights."""


class PackedLinear:
    """x W^T + b, with W packed once for the CPU's kernels; on other devices plain torch.

    From 2 to some tens of rows oneDNN's packed layout is twice as fast as torch's. For one row it
    reads weights at 0.6 of the memory's bandwidth, so other layouts are used: in fp32, row-major
    W^T if there are more outputs than inputs, else row-major W (0.8); in 16 bits, FBGEMM's kernel
    for fp16 weights, which sums in fp32 (0.8 to 1). Figures: docs/LOG.md.
    8-bit weights have a scale for each output; a CPU rounds the inputs to 8 bits too, with a scale
    for each call, other devices do not.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        gelu: bool = False,
        one_row: bool = False,
        eight: bool = False,
    ) -> None:
        """`weight` is (outputs, inputs); `one_row` chooses the layout for calls of one row.

        `eight`: weights in 8 bits; the inputs have `dtype`.
        """
        self._gelu, self._dtype = gelu, dtype
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._eight = EightBits(weight.detach(), bias) if eight else None
        if self._eight is not None:
            self.bytes = self._eight.bytes
            self._packed = self._in_order = False
            self._half, self._weight = None, weight.new_empty(0)
            return
        weight = weight.detach().to(dtype).contiguous()
        self.bytes = weight.numel() * weight.element_size()
        """Bytes of weights that each call reads."""
        self._in_order = one_row and dtype == torch.float32
        self._half = _half(weight, self._bias) if one_row and dtype == torch.bfloat16 else None
        self._packed = not self._in_order and self._half is None and _packs(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        elif self._in_order and len(weight) > weight.shape[1]:
            weight = weight.T.contiguous().T
        self._weight = weight if self._half is None else weight.new_empty(0)

    def in_order(self) -> "PackedLinear":
        """The layer in the layout for one row if it is fp32 on a CPU, else itself."""
        if self._in_order or self._weight.device.type != "cpu" or self._dtype != torch.float32:
            return self
        weight = self._weight.to_dense() if self._packed else self._weight
        return PackedLinear(weight, self._bias, self._dtype, gelu=self._gelu, one_row=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) -> (..., outputs), in the precision of x."""
        given = x.dtype
        if self._eight is not None:
            return self._activated(self._eight(x)).to(given)
        if self._half is not None:
            x = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._half)
            return self._activated(x).to(given)
        x = x.to(self._dtype)
        if self._packed:
            name, kind = ("gelu", "tanh") if self._gelu else ("none", "")
            output: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, name, [], kind
            )
            return output.to(given)
        return self._activated(F.linear(x, self._weight, self._bias)).to(given)

    def _activated(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if self._gelu else x


class EightBits:
    """x W^T + b with the weights of each output as 8-bit integers times a scale."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` is (outputs, inputs); its largest magnitude of an output becomes 127."""
        weight = weight.float()
        scale = (weight.abs().amax(1) / _MOST_EIGHT).clamp_min(_LEAST_SCALE)
        whole = (weight / scale[:, None]).round().to(torch.int8)
        self.bytes = whole.numel()
        self._bias = None if bias is None else bias.detach().float()
        self._packed = _fbgemm(whole, scale, self._bias)
        self._unpacked = (whole, scale) if self._packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: (..., inputs) -> (..., outputs), in fp32."""
        if self._packed is not None:
            fewer = not torch.cpu._is_vnni_supported()  # else sums of two products saturate
            narrow: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self._packed, fewer)
            return narrow
        assert self._unpacked is not None
        whole, scale = self._unpacked
        y = F.linear(x, whole.to(x.dtype)).float() * scale
        return y if self._bias is None else y + self._bias


def _fbgemm(whole: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """FBGEMM's layout of 8-bit weights; None where there is none."""
    known = torch.backends.quantized.engine in ("fbgemm", "x86")
    if not known or whole.device.type != "cpu":
        return None
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move its quantized tensors elsewhere
        quantized = torch._make_per_channel_quantized_tensor(whole, scale.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(quantized, bias)


def _packs(weight: Tensor) -> bool:
    """True if oneDNN packs this weight; bf16 needs AVX-512 or native bf16 instructions."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return False
    wide = weight.dtype == torch.float32
    return wide or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _half(weight: Tensor, bias: Tensor | None) -> Any:
    """FBGEMM's fp16 layout; None without FBGEMM, or if a weight is NaN or out of fp16's range.

    bf16 weights of at least 2^-14 are exact in fp16; smaller ones change by at most 2^-25.
    """
    known = torch.backends.quantized.engine in ("fbgemm", "x86")
    if not known or weight.device.type != "cpu" or not float(weight.abs().max()) <= _MOST_HALF:
        return None
    wide_bias = None if bias is None else bias.float()
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), wide_bias)
