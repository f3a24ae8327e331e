"""Run training steps of a module on fake tensors: live bytes at each moment, and all kernels."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from planning.estimate.kernels import Kernels
from planning.estimate.layer_work import FLASH

Build = Callable[[], tuple[nn.Module, Any]]
"""Gives a module and the arguments of its forward pass: a tuple, a mapping, or one tensor."""
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
}
"""Matmuls, and the places of their operands."""


@dataclass
class Recorded:
    """Two steps with AdamW, of which the second has moments from the start."""

    parameters: int = 0
    """Bytes of trained and frozen parameters."""
    gradients: int = 0
    moments: int = 0
    largest: int = 0
    """Bytes of the largest child's parameters."""
    peak: int = 0
    """Most bytes alive at a time, the module's and the batch's too."""
    elements: int = 0
    """Trained elements."""
    forward: list[Kernels] = field(default_factory=list)
    backward: list[Kernels] = field(default_factory=list)
    update: list[Kernels] = field(default_factory=list)


def record(build: Build, half: bool) -> Recorded:
    """Run two training steps without values; `half`: matmuls under autocast to bf16."""
    done = Recorded()
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        module, batch = build()
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], foreach=False
        )
        for _ in range(2):
            live.work = done.forward = []
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = _loss(_called(module, batch))
            live.work = done.backward = []
            loss.backward()
            live.work = done.update = []
            optimizer.step()
            del loss
            done.gradients = sum(_bytes(p.grad) for p in module.parameters() if p.grad is not None)
            optimizer.zero_grad()
        done.moments = sum(
            _bytes(x)
            for state in optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor) and x.numel() > 1
        )
        done.parameters = sum(map(_bytes, module.parameters()))
        done.elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
        children = [sum(map(_bytes, child.parameters())) for child in module.children()]
        done.largest = max([*children, 0]) or done.parameters
    done.peak = live.peak
    return done


def _called(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def _loss(out: Any) -> Tensor:
    """The first output with a gradient: itself if it is one number, else its mean."""
    first = next(x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad)
    return first if first.numel() == 1 else first.float().mean()


class _Live(TorchDispatchMode):
    """Follows storages from the operation that makes them until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Kernels] = []
        self.bytes = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        out = function(*arguments, **(named or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            self._follow(x)
        if not function.is_view and function is not _aten.detach.default:
            given = [x for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)]
            self.work += kernels_of(function, arguments, named or {}, given, out)
        return out

    def _follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.bytes -= self._known.pop(key)


def kernels_of(
    function: Any, arguments: Any, named: Any, given: list[Tensor], out: Any
) -> list[Kernels]:
    """An operation as a matmul, or as the bytes that it reads and writes."""
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    moved = float(sum(map(_bytes, given + results)))
    if function in _PRODUCTS:
        left, right = (arguments[place] for place in _PRODUCTS[function])
        batch = left.shape[0] if left.dim() == 3 else 1
        return [
            Kernels(
                rows=left.shape[-2],
                columns=right.shape[-1],
                inner=left.shape[-1],
                batch=batch,
                half=left.element_size() < _FULL,
            )
        ]
    counted = flop_registry.get(getattr(function, "_overloadpacket", None))
    if counted is None or not results:
        return [Kernels(moved=moved)] if results else []
    operations = counted(*arguments, **named, out_val=out)
    share = FLASH if "attention" in str(function) else 1.0
    rows = max(1, results[0].numel() // results[0].shape[-1])
    inner = max(1, round(operations / share / 2 / rows / results[0].shape[-1]))
    half = given[0].element_size() < _FULL
    return [Kernels(rows=rows, columns=results[0].shape[-1], inner=inner, half=half, moved=moved)]


_FULL = 4


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
