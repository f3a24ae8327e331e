"""Tensors for a rank that computes nothing: shapes and types are real, memory and values are not.

What is small and whole-numbered stays real: shapes that stages tell each other, counts, pickled
names. All else is torch's FakeTensor. Where the program reads a value (a norm, a loss, a flag), it
gets one, or for `any` no: as in a step whose gradients are finite. Collectives do nothing, but
small whole-numbered messages arrive: a broker carries them between the rehearsed ranks.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.draws
import models.prior
import parallel.replicas
from planning.sequence import Operation
from planning.sequence_record import NAMESPACE, Recorder

warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
SMALL = 2**20
"""Elements up to which a whole-numbered tensor is real."""
Channel = tuple[object, ...]
"""Who speaks to whom: ("send", from, to), or ("broadcast", from, *ranks of the group)."""
_MAKERS = ("empty", "zeros", "ones", "full", "empty_strided", "rand", "randn", "randint", "normal")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_aten = torch.ops.aten
_PLAIN = frozenset(
    getattr(getattr(_aten, name), overload)
    for overload, names in {
        "default": "view t detach mm addmm bmm gelu gelu_backward clone _unsafe_view _to_copy",
        "Tensor": "add add_ mul slice",
        "int": "transpose",
        "dim_IntList": "sum",
    }.items()
    for name in names.split()
)
"""Functions of which there are very many: torch's rules for shapes, without its book-keeping."""
_CPU = torch.device("cpu")


class Broker(Protocol):
    """Carries small messages between rehearsed ranks."""

    def give(self, channel: Channel, message: np.ndarray) -> None:
        """Send the next message of a channel."""

    def take(self, channel: Channel, place: int) -> np.ndarray:
        """Wait for a message of a channel, by its place from 0.

        Raises: NeverSent if no rank that is rehearsed will send it.
        """


class NeverSent(Exception):
    """This rank waits for a message that nobody sends: its sequence ends here."""


class Shadows(TorchDispatchMode):
    """Runs a rank's program on shadows of its tensors and records what it communicates."""

    def __init__(self, recorder: Recorder, broker: Broker) -> None:
        super().__init__()
        self._recorder, self._broker = recorder, broker
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._rank = recorder.sequence.rank
        self._taken: dict[Channel, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = named or {}
        if function.namespace == NAMESPACE:
            return self._communicate(function, arguments)
        if FakeTensor in types:
            if function is torch.ops.prim.device.default:
                return arguments[0].fake_device
            if function is _aten._local_scalar_dense.default:
                return _value_of(arguments[0])
            return self._shadow(function, types, arguments, named)
        if _makes_large(function, arguments, named):
            return self._shadow(function, types, arguments, named)
        return function(*arguments, **named)

    def _shadow(self, function: Any, types: Any, arguments: Any, named: Any) -> Any:
        plain = function in _PLAIN and all(self._is_own(x) for x in arguments)
        if plain:
            inside = {name: value for name, value in named.items() if name != "device"}
            with in_kernel_invocation_manager(self._fake):
                found = function(*arguments, **inside)
        else:
            found = self._fake.dispatch(function, types, arguments, named)
        if function is _aten.any.default:
            found.says_no = True
        written = _written(function)
        if written is not None:
            place, name = written
            return arguments[place] if place < len(arguments) else named[name]
        return FakeTensor(self._fake, found, _CPU) if plain else found

    def _is_own(self, argument: Any) -> bool:
        """False for real tensors, and for shadows that a deep copy gave a mode of their own."""
        if isinstance(argument, FakeTensor):
            return argument.fake_mode is self._fake
        return not isinstance(argument, Tensor)

    def _communicate(self, function: Any, arguments: Any) -> Any:
        operation = self._recorder.note(function, arguments)
        self._carry(operation, arguments)
        work = FakeWork().boxed()
        count = len(function._schema.returns)
        return work if count == 1 else (arguments[0], work) if count else None

    def _carry(self, operation: Operation, arguments: Any) -> None:
        """Hand a small message over, or fill the buffer that waits for one."""
        tensors = [x for x in tree_leaves(arguments[:2]) if isinstance(x, Tensor)]
        if not tensors or not all(_readable(x) for x in tensors):
            return
        if operation.kind == "send":
            self._broker.give(("send", self._rank, *operation.group), tensors[0].numpy())
        elif operation.kind == "recv":
            self._fill(tensors[0], ("send", *operation.group, self._rank))
        elif operation.kind == "broadcast":
            channel = ("broadcast", operation.root, *operation.group)
            if operation.root == self._rank:
                self._broker.give(channel, tensors[0].numpy())
            else:
                self._fill(tensors[0], channel)
        elif operation.kind == "all_gather":
            *outputs, mine = tensors
            for output in outputs:
                output.copy_(mine)

    def _fill(self, buffer: Tensor, channel: Channel) -> None:
        place = self._taken.get(channel, 0)
        self._taken[channel] = place + 1
        message = torch.from_numpy(self._broker.take(channel, place)).flatten()
        count = min(message.numel(), buffer.numel())
        buffer.view(-1)[:count] = message[:count]


@contextmanager
def without_arithmetic() -> Iterator[None]:
    """Leave out long computations that communicate nothing; change modules as shadows bear it."""
    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (models.draws, "_runs", _no_draws),
        (models.draws, "_gumbel", lambda shape, key, device: torch.zeros(shape)),
        (parallel.replicas, "fingerprint", _no_sums),
        (models.prior, "banded_attention", lambda q, k, v, band: q + k + v),
        (nn.Module, "_apply", _apply),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, function in changes:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _no_draws(*_: object) -> Iterator[tuple[int, Tensor]]:
    """Matrices stay as they were made."""
    return iter(())


def _no_sums(tensors: Iterable[Tensor]) -> Tensor:
    """Fingerprints of zero."""
    return torch.zeros(len(list(tensors)), dtype=torch.int64)


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` for shadows, which torch would swap in a way that they do not bear."""
    for owner in module.modules() if recurse else [module]:
        for name, held in owner._parameters.items():
            with torch.no_grad():
                changed = held if held is None else change(held)
            if held is None or changed is None or changed is held:
                continue
            made = nn.Parameter(changed, requires_grad=held.requires_grad)
            for noted, value in vars(held).items():
                vars(made).setdefault(noted, value)
            owner._parameters[name] = made
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = buffer if buffer is None else change(buffer)
    return module


def _readable(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and tensor.numel() <= SMALL and not isinstance(tensor, FakeTensor)


def _value_of(shadow: Any) -> bool | int | float:
    """One, as the type has it; no where it was asked if any element is true."""
    if shadow.dtype.is_floating_point:
        return 1.0
    value = not getattr(shadow, "says_no", False)
    return value if shadow.dtype == torch.bool else int(value)


def _makes_large(function: Any, arguments: Any, named: Any) -> bool:
    """True for a function that makes a tensor which is not to be real."""
    name = function._overloadpacket.__name__
    dtype = named.get("dtype")
    if name in _LIKE:
        count, dtype = arguments[0].numel(), dtype or arguments[0].dtype
    elif name in _MAKERS:
        size = named.get("size", next((a for a in arguments if isinstance(a, list | tuple)), ()))
        count = prod(size)
    else:
        return False
    whole = dtype is not None and not (dtype.is_floating_point or dtype.is_complex)
    return not whole or count > SMALL


@functools.cache
def _written(function: Any) -> tuple[int, str] | None:
    """The argument that a function writes and returns, if it does."""
    returns = function._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return (
                len(function._schema.arguments) if argument.kwarg_only else place
            ), argument.name
    return None
