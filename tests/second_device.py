"""A second device for tests without GPUs: its tensors have values, and are not the CPU's.

A tensor of it wraps one of the CPU, which torch's own kernels compute with, so that results are
those of the CPU to the last bit. It refuses what CUDA refuses: tensors of two devices in
one operation, unless one is a single number in plain arithmetic, or a CPU index. torch's interface
for such devices (PrivateUse1) is experimental; nothing outside of tests rests on it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_BETWEEN = (_aten.copy_.default, _aten._to_copy.default, _aten._copy_from.default)
"""What goes from one device to another."""
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Where indices may be on the CPU."""
_STRICT = ("stack", "cat", "_fused_adamw_", "_foreach_add_", "_foreach_lerp_", "_foreach_copy_")
"""What refuses even a single number of another device."""


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("second", _Module())
SECOND = torch.device("second", 0)


class SecondTensor(Tensor):
    """A tensor on SECOND; `raw` has its values."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "SecondTensor":
        made: SecondTensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=SECOND,
        )
        return made

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"SecondTensor({self.raw!r})"

    def tolist(self) -> Any:
        """torch's own method refuses wrapper tensors."""
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = named or {}
        if function.namespace != "c10d":  # a collective's group determines its devices
            _refuse_two_devices(function, arguments, named)
        return _run(function, arguments, named)


def _refuse_two_devices(function: Any, arguments: Any, named: Any) -> None:
    """Raise RuntimeError, as CUDA does, for an operation over tensors of two devices."""
    name = function._overloadpacket.__name__
    if function in _BETWEEN or name in _INDEXED:
        return
    tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)]
    others = [x for x in tensors if not isinstance(x, SecondTensor)]
    if any(x.dim() or name in _STRICT for x in others):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {SECOND} and "
            f"{sorted({str(x.device) for x in others})}"
        )


def _run(function: Any, arguments: Any, named: Any) -> Any:
    raw, inside = tree_map(_raw, arguments), tree_map(_raw, named)
    goes_to = named.get("device")
    if goes_to is not None:
        inside["device"] = "cpu"
    result = function(*raw, **inside)
    if torch.device(goes_to or SECOND).type == "cpu":
        return result
    if function is _aten.copy_.default:
        return arguments[0]
    result = tree_map(lambda x: SecondTensor(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(function, arguments, named, result)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, SecondTensor) else value


def _empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return SecondTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return SecondTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    _raw(into).copy_(_raw(source))
    return into


_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_fallthrough = torch.library.Library("_", "IMPL")
_fallthrough.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
