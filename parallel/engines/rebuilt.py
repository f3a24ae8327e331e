"""Tensors that autograd keeps as a recipe: matmuls that save one get it computed again in backward.

torch's checkpointing would run the matmuls again as well. Here only their input is forgotten, and
rebuilt from what other nodes of the graph keep anyway. Source: Megatron-LM's output-discarding
checkpoints.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]
_WATCHERS: list[tuple[Pack, Unpack]] = []


@contextmanager
def watched(pack: Pack, unpack: Unpack) -> Iterator[None]:
    """torch's saved_tensors_hooks, also for what is saved beside a rebuilt tensor."""
    _WATCHERS.append((pack, unpack))
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _WATCHERS.pop()


@contextmanager
def rebuilt(value: Tensor, again: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """In the context, autograd saves views of `value` as views of `again(*inputs)`.

    `again` runs without gradients, under the autocast of now, once for all views; its result must
    have the memory layout of `value`.
    """
    recipe = _Recipe(value, again, [x.detach() for x in inputs])
    with saved_tensors_hooks(recipe.pack, recipe.unpack):
        yield


@dataclass(frozen=True)
class _View:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Other:
    """What the hooks around the context made of another tensor."""

    packed: Any
    unpack: Unpack


class _Recipe:
    def __init__(self, value: Tensor, again: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        self._place = value.untyped_storage()._cdata
        self._again, self._inputs = again, inputs
        device = value.device.type
        self._device, self._dtype = device, torch.get_autocast_dtype(device)
        self._cast = torch.is_autocast_enabled(device)
        self._views, self._read = 0, 0
        self._value: Tensor | None = None
        """The rebuilt tensor, until all views were read."""

    def pack(self, x: Tensor) -> Any:
        if x.untyped_storage()._cdata == self._place:
            self._views += 1
            return _View(tuple(x.shape), x.stride(), int(x.storage_offset()))
        if not _WATCHERS:
            return x
        pack, unpack = _WATCHERS[-1]
        return _Other(pack(x), unpack)

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Other):
            return packed.unpack(packed.packed)
        if not isinstance(packed, _View):
            other: Tensor = packed
            return other
        value = self._rebuild() if self._value is None else self._value
        self._read += 1
        self._value = value if self._read % self._views else None
        return value.as_strided(packed.size, packed.stride, packed.offset)

    def _rebuild(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self._device, self._dtype, enabled=self._cast):
            return self._again(*self._inputs)
