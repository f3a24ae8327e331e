"""A fake GPU for a rank without one: shadows have it as their device, torch.cuda is stubbed.

A shadow is a FakeTensor whose values may be known (fake_tensors.py). To torch's C++ code every
shadow is a CPU tensor, which any build of torch can index, differentiate and autocast. Python, and
FakeTensorMode's rules for mixed devices, see the device that the program asked for. Whatever
depends on the device within C++ is decided here: copies between devices, and tensors made from
Python numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planning.rehearsal.patches import Change, nothing, replaced

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_BYTES = 80 * 2**30
_new_shadow, _to, _tolist, _data = FakeTensor.__new__, Tensor.to, FakeTensor.tolist, Tensor.data
FakeTensor.held = None  # type: ignore[attr-defined]
"""A real CPU tensor with the values of a shadow, if they are known."""
_tensor, _as_tensor, _autocast = torch.tensor, torch.as_tensor, torch.autocast.__init__


class Moves:
    """True while Python asks for a copy to another device; C++ copies name the device it sees."""

    asked = False


class _Idle:
    """A stub of a stream or an event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def record(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return nothing


_CARD = SimpleNamespace(
    name="a claimed GPU", uuid="0", total_memory=_BYTES, major=9, minor=0, multi_processor_count=132
)
_ANSWERS: dict[str, Any] = {
    **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache"), None),
    **dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated", "ipc_collect"), None),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "current_device"), 0),
    **dict.fromkeys(("memory_reserved", "max_memory_reserved"), 0),
    **dict.fromkeys(("get_rng_state", "set_rng_state"), None),
    **dict.fromkeys(("current_stream", "default_stream"), _Idle()),
    **dict.fromkeys(("stream", "device"), nullcontext()),
    **dict.fromkeys(("is_available", "is_bf16_supported"), True),
    "is_current_stream_capturing": False,
    "device_count": 1,
    "memory_stats": {},
    "mem_get_info": (_BYTES, _BYTES),
    "get_device_name": _CARD.name,
    "get_device_properties": _CARD,
    "get_device_capability": (_CARD.major, _CARD.minor),
}
"""Return values of torch.cuda's functions in a rehearsal; a rank sees one GPU, its own."""


@contextmanager
def claimed_gpu() -> Iterator[None]:
    """Pretend that this process has a GPU; `Shadows` must make all tensors."""
    with replaced(_changes()):
        yield


def _changes() -> list[Change]:
    return [
        *((torch.cuda, name, _answering(answer)) for name, answer in _ANSWERS.items()),
        *((torch.cuda, name, _Idle) for name in ("Stream", "Event")),
        *((torch.cuda.nvtx, name, _answering(None)) for name in ("range_push", "range_pop")),
        (fake_tensor, "init_gpu_context", nothing),
        (FakeTensorMode, "avoid_device_init", True),
        (FakeTensor, "__new__", staticmethod(_shadow_of_any_device)),
        (FakeTensor, "data", property(_data.__get__, _set_data)),  # type: ignore[attr-defined]
        (FakeTensor, "is_cuda", property(lambda self: self.fake_device.type == "cuda")),
        (FakeTensor, "is_cpu", property(lambda self: self.fake_device.type == "cpu")),
        (FakeTensor, "tolist", _list_of),
        (FakeTensor, "get_device", lambda self: 0 if self.is_cuda else -1),
        (Tensor, "to", _moved),
        (Tensor, "cpu", lambda self, *_, **__: _moved(self, CPU)),
        (Tensor, "cuda", lambda self, *_, **__: _moved(self, GPU)),
        (Tensor, "pin_memory", lambda self, *_, **__: self),
        (Tensor, "is_pinned", lambda self, *_, **__: False),
        (Tensor, "new_tensor", _new_tensor),
        (torch, "tensor", _made_of_numbers),
        (torch, "as_tensor", _taken_as_tensor),
        (torch.autocast, "__init__", _autocast_of_the_cpu),
        (torch, "is_autocast_enabled", _of_the_cpu(torch.is_autocast_enabled)),
        (torch, "get_autocast_dtype", _of_the_cpu(torch.get_autocast_dtype)),
    ]


def _answering(answer: Any) -> Callable[..., Any]:
    """A new stub for each name, since torch's compiler keeps a table of functions."""
    return lambda *_, **__: answer


def _shadow_of_any_device(
    kind: Any, mode: Any, elem: Any, device: Any, *rest: Any, **named: Any
) -> Any:
    shadow = _new_shadow(kind, mode, elem, CPU, *rest, **named)
    shadow.fake_device = _numbered(device)
    return shadow


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return GPU if device.type == "cuda" else device


def _set_data(shadow: Any, data: Any) -> None:
    _data.__set__(shadow, data)  # type: ignore[attr-defined]
    shadow.fake_device, shadow.held = data.device, getattr(data, "held", None)


def _list_of(shadow: Any) -> Any:
    return _tolist(shadow) if shadow.held is None else shadow.held.tolist()


def _moved(tensor: Any, *arguments: Any, **named: Any) -> Any:
    """`Tensor.to`, which C++ would skip between devices that are the same CPU to it."""
    arguments, device = _target(arguments, named)
    keywords = {name: value for name, value in named.items() if name not in ("device", "other")}
    if device is None or device.type == tensor.device.type:
        return _to(tensor, *arguments, **keywords) if arguments or keywords else tensor
    dtypes = [x for x in (*arguments, keywords.get("dtype")) if isinstance(x, torch.dtype)]
    Moves.asked = True
    try:
        dtype = dtypes[0] if dtypes else tensor.dtype
        return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)
    finally:
        Moves.asked = False


def _target(arguments: Any, named: dict[str, Any]) -> tuple[tuple[Any, ...], torch.device | None]:
    """Split the arguments of `Tensor.to` into those without the device, and the device."""
    given = named.get("device", named.get("other"))
    if given is None and arguments and not isinstance(arguments[0], torch.dtype):
        given, *rest = arguments
        arguments = tuple(x for x in rest if isinstance(x, torch.dtype))
    if isinstance(given, Tensor):
        return (given.dtype,), given.device
    if given is None:
        return tuple(arguments), None
    return tuple(arguments), GPU if isinstance(given, int) else _numbered(given)


def _made_of_numbers(data: Any, *, device: Any = None, **named: Any) -> Any:
    return _placed(_tensor(data, **named), device)


def _taken_as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
    return _placed(_as_tensor(data, dtype=dtype), device)


def _new_tensor(shadow: Any, data: Any, *, device: Any = None, dtype: Any = None, **_: Any) -> Any:
    return _placed(_tensor(data, dtype=dtype or shadow.dtype), device or shadow.device)


def _placed(tensor: Any, device: Any) -> Any:
    return tensor if device is None else _moved(tensor, device)


def _autocast_of_the_cpu(context: Any, device_type: str, *arguments: Any, **named: Any) -> None:
    _autocast(context, "cpu" if device_type == "cuda" else device_type, *arguments, **named)


def _of_the_cpu(function: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda kind="cuda": function("cpu" if kind == "cuda" else kind)
