"""Result shapes and types of the functions that a rank calls most.

torch derives them from its Python references, a hundred times slower. A rule returns one (shape,
type) for each result, or None for arguments that it does not handle; the results are contiguous.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
Made = list[tuple[Sequence[int], torch.dtype] | None] | None
"""None in the list stands for a result that is not requested."""


def _same(x: Tensor, *_: Any, **__: Any) -> Made:
    return [(x.shape, x.dtype)] if x.is_floating_point() else None


def _same_as_second(_: Any, x: Tensor, **__: Any) -> Made:
    return _same(x)


def _like(x: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Made:
    known = device is None and (dtype or x.dtype).is_floating_point
    return [(x.shape, dtype or x.dtype)] if known else None


def _of_equals(x: Tensor, other: Any, **__: Any) -> Made:
    if not isinstance(other, Tensor):
        return _same(x)
    if other.shape != x.shape or not (x.is_floating_point() and other.is_floating_point()):
        return None
    return [(x.shape, torch.promote_types(x.dtype, other.dtype))]


def _compared(x: Tensor, other: Any) -> Made:
    made = _of_equals(x, other)
    return made and [(x.shape, torch.bool)]


def _sums(x: Tensor, dims: Sequence[int], keepdim: bool = False, dtype: Any = None) -> Made:
    if not x.is_floating_point() or dtype is not None or not dims:
        return None
    gone = {dim % x.dim() for dim in dims}
    kept = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return [(kept, x.dtype)]


def _product(a: Tensor, b: Tensor) -> Made:
    return [((a.shape[0], b.shape[1]), a.dtype)]


def _product_and_bias(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> Made:
    return _product(a, b)


def _layer_norm(x: Tensor, normalized: Sequence[int], *_: Any) -> Made:
    one = (*x.shape[: x.dim() - len(normalized)], *(1 for _ in normalized))
    made = _same(x)
    return made and [*made, (one, torch.float32), (one, torch.float32)]


def _layer_norm_backward(
    _: Tensor,
    x: Tensor,
    __: Any,
    mean: Tensor,
    rstd: Tensor,
    weight: Any,
    bias: Any,
    requested: Sequence[bool],
) -> Made:
    tensors = zip((x, weight, bias), requested, strict=True)
    return [(t.shape, t.dtype) if asked and t is not None else None for t, asked in tensors]


def _number(x: Tensor, **named: Any) -> Made:
    return [((), x.dtype)] if x.is_floating_point() and not named else None


def _flag(x: Tensor) -> Made:
    return [((), torch.bool)]


RULES: dict[Any, Callable[..., Made]] = {
    _aten.gelu.default: _same,
    _aten.tanh.default: _same,
    _aten.abs.default: _same,
    _aten.nan_to_num.default: _same,
    _aten.pow.Tensor_Scalar: _same,
    _aten.gelu_backward.default: _same_as_second,
    _aten.add.Tensor: _of_equals,
    _aten.sub.Tensor: _of_equals,
    _aten.mul.Tensor: _of_equals,
    _aten.div.Tensor: _of_equals,
    _aten.eq.Tensor: _compared,
    _aten.ne.Scalar: _compared,
    _aten.mm.default: _product,
    _aten.addmm.default: _product_and_bias,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.sum.dim_IntList: _sums,
    _aten.sum.default: _number,
    _aten.empty_like.default: _like,
    _aten.zeros_like.default: _like,
    _aten.ones_like.default: _like,
    _aten.all.default: _flag,
}

WRITING = frozenset(
    (
        _aten.copy_.default,
        _aten.add_.Tensor,
        _aten.mul_.Tensor,
        _aten.div_.Tensor,
        _aten.zero_.default,
        _aten.fill_.Scalar,
        _aten.normal_.default,
        _aten.index_put_.default,
    )
)
"""In-place functions, which return their first argument."""
