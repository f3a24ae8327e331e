"""Tensors of a rehearsed rank: real shapes and types, without memory and values.

Small integer tensors keep their values: shapes that stages exchange, counts, pickled names. On the
CPU such a tensor is real, on a GPU it is a shadow that holds a real one. All others are torch's
FakeTensor. If the program reads a value (a norm, a loss, a flag), it gets 1, and False for `any`,
as in a step with finite gradients. Collectives do nothing, except that a broker carries small
integer messages between the rehearsed ranks.
"""

import functools
import logging
import warnings
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from planning.rehearsal.fake_cuda import CPU, Moves
from planning.rehearsal.op_shapes import RULES, WRITING
from planning.rehearsal.recorder import NAMESPACE, Recorder
from planning.rehearsal.sequence import CollectiveCall

warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
SMALL = 2**20
"""Maximum elements of an integer tensor that is real."""
PICKLED = 2**30
"""The same for bytes: one buffer holds the pickled objects of all ranks, and is unpickled."""
Channel = tuple[object, ...]
"""Source and destination: ("send", from, to), or ("broadcast", from, *ranks of the group)."""
_MAKERS = ("empty", "zeros", "ones", "full", "empty_strided", "rand", "randn", "randint", "normal")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_aten = torch.ops.aten
_PLAIN = frozenset(
    getattr(getattr(_aten, name), overload)
    for overload, names in {
        "default": "view t detach bmm clone _unsafe_view _to_copy",
        "Tensor": "slice",
        "int": "transpose select",
        "dtype": "view",
    }.items()
    for name in names.split()
)
"""Frequent functions that run torch's rules for shapes without FakeTensorMode's overhead."""
_BY_SIZE = frozenset(
    (
        _aten.empty.memory_format,
        _aten.zeros.default,
        _aten.ones.default,
        _aten.randn.default,
        _aten.randn.generator,
    )
)
_FAST = _PLAIN | WRITING | frozenset(RULES)
_BY_AUTOGRAD = (_aten._to_copy.default, _aten.new_empty_strided.default)
"""Functions that C++ calls with the device that it sees, not the one the program asked for."""
_STRICT = ("stack", "cat")
"""Functions that refuse even single numbers of another device, which torch's rules let pass."""


class Broker(Protocol):
    """Carries small messages between rehearsed ranks."""

    def give(self, channel: Channel, message: np.ndarray) -> None:
        """Send the next message of a channel."""

    def take(self, channel: Channel, place: int) -> np.ndarray:
        """Wait for message number `place` of a channel, from 0.

        Raises: NeverSent if no rehearsed rank will send it.
        """


class Shadows(TorchDispatchMode):
    """Runs a rank's program on shadows of its tensors and records its communication."""

    def __init__(self, recorder: Recorder, broker: Broker) -> None:
        super().__init__()
        self._recorder, self._broker = recorder, broker
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._rank = recorder.sequence.rank
        self._taken: dict[Channel, int] = {}
        self._state: dict[torch.device, dict[str, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Save two calls per function: nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = named or {}
        if function.namespace == NAMESPACE:
            return self._communicate(function, arguments)
        if FakeTensor in types:
            if function is torch.ops.prim.device.default:
                return CPU  # so C++ may index and differentiate it
            if function is _aten._local_scalar_dense.default:
                return _value_of(arguments[0])
            if function in _BY_AUTOGRAD and not Moves.asked:
                named = {**named, "device": arguments[0].fake_device}
            return self._shadow(function, types, arguments, named)
        if function is _aten.detach.default and isinstance(arguments[0], DTensor):
            with self:  # so that C++ asks this mode for the device of the rows
                return detached(arguments[0])
        device = named.get("device") or CPU
        if device.type == "meta" or (
            device.type == "cpu" and not _makes_large(function, arguments, named)
        ):
            return function(*arguments, **named)
        shadow = self._filled(function, arguments, named)
        return self._shadow(function, types, arguments, named) if shadow is None else shadow

    def _filled(self, function: Any, arguments: Any, named: Any) -> Any:
        """A new floating-point shadow if the function only needs a size; None otherwise."""
        dtype = named.get("dtype") or torch.get_default_dtype()
        if function not in _BY_SIZE or not dtype.is_floating_point:
            return None
        return self._made(_meta(arguments[0], dtype), named.get("device") or CPU)

    def _shadow(self, function: Any, types: Any, arguments: Any, named: Any) -> Any:
        device = self._plain_device(arguments) if function in _FAST else None
        if device is not None:
            result = self._soon(function, arguments, named, device)
            if result is not None:
                return result
        if function._overloadpacket.__name__ in _STRICT:
            _refuse_two_devices(function, arguments[0])
        result = self._fake.dispatch(function, types, arguments, named)
        if function is _aten.any.default:
            result.says_no = True  # type: ignore[attr-defined]
        written = _written(function)
        if written is not None:
            place, name = written
            result = arguments[place] if place < len(arguments) else named[name]
        _hold(function, arguments, named, result)
        return result

    def _soon(self, function: Any, arguments: Any, named: Any, device: torch.device) -> Any:
        """The result of a frequent function without FakeTensorMode; None if that is needed."""
        if function in WRITING:
            return arguments[0] if arguments[0].is_floating_point() else None
        if function in _PLAIN:
            inside = {name: value for name, value in named.items() if name != "device"}
            with in_kernel_invocation_manager(self._fake):
                result = function(*arguments, **inside)
            return self._made(result, named.get("device") or device)
        made = RULES[function](*arguments, **named)
        if made is None:
            return None
        shadows = [row and self._made(_meta(*row), device) for row in made]
        return shadows[0] if len(shadows) == 1 else tuple(shadows)

    def _made(self, meta: Tensor, device: torch.device) -> FakeTensor:
        """Make a shadow faster than FakeTensor does, with the state of another one."""
        if device not in self._state:
            self._state[device] = dict(vars(FakeTensor(self._fake, meta, device)))
        shadow: FakeTensor = Tensor._make_subclass(
            FakeTensor, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=CPU
        )
        vars(shadow).update(self._state[device])
        return shadow

    def _plain_device(self, arguments: Any) -> torch.device | None:
        """The device of the arguments if they are shadows without values, all on one; else None."""
        device = None
        for x in arguments:
            if isinstance(x, FakeTensor):
                held = x.held  # type: ignore[attr-defined]
                if not self._is_own(x) or held is not None or device not in (None, x.fake_device):
                    return None
                device = x.fake_device
            elif isinstance(x, Tensor):
                return None
        return device

    def _is_own(self, shadow: FakeTensor) -> bool:
        """False for shadows that a deep copy gave another mode."""
        return shadow.fake_mode is self._fake

    def _communicate(self, function: Any, arguments: Any) -> Any:
        operation = self._recorder.note(function, arguments)
        self._carry(operation, arguments)
        work = FakeWork().boxed()
        count = len(function._schema.returns)
        return work if count == 1 else (arguments[0], work) if count else None

    def _carry(self, operation: CollectiveCall, arguments: Any) -> None:
        """Pass a small message to the broker, or fill a buffer with one from it."""
        values = [_real(x) for x in tree_leaves(arguments[:2]) if isinstance(x, Tensor)]
        tensors = [x for x in values if x is not None]
        if not tensors or len(tensors) < len(values):
            return
        if operation.paired and operation.sends:
            self._broker.give(("send", self._rank, *operation.group), tensors[0].numpy())
        elif operation.paired:
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


def detached(sharded: DTensor) -> DTensor:
    """`detach` of what FSDP2 shards, around the rows of this rank."""
    rows: Any = sharded._local_tensor
    return DTensor(rows.detach(), sharded._spec, requires_grad=False)


def _real(tensor: Any) -> Tensor | None:
    """The values of an integer tensor, if they are known."""
    if isinstance(tensor, FakeTensor):
        held: Tensor | None = tensor.held  # type: ignore[attr-defined]
        return held
    return tensor if _is_whole(tensor) and tensor.numel() <= SMALL else None


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _meta(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _value(argument: Any) -> Any:
    return _real(argument) if isinstance(argument, Tensor) else argument


def _hold(function: Any, arguments: Any, named: Any, result: Any) -> None:
    """Compute the values of integer shadows, if those of all arguments are known."""
    shadows = result if isinstance(result, list | tuple) else [result]
    if not all(isinstance(x, FakeTensor) and _is_whole(x) for x in shadows):
        return
    tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)]
    if any(_real(x) is None for x in tensors) or any(x.numel() > SMALL for x in shadows):
        for shadow in shadows:
            shadow.held = None
        return
    inside, values = tree_map(_value, (named, arguments))
    if inside.get("device") is not None:
        inside["device"] = CPU
    made = function(*values, **inside)
    if _written(function) is None:
        for shadow, value in zip(shadows, made if shadows is result else [made], strict=True):
            shadow.held = value


def _refuse_two_devices(function: Any, tensors: Any) -> None:
    devices = sorted({str(x.device) for x in tensors})
    if len(devices) > 1:
        raise RuntimeError(f"{function}: all tensors must be on one device, not {devices}")


def _value_of(shadow: Any) -> bool | int | float:
    """The known value of a shadow, else 1 of its type; False for the result of `any`."""
    held: Tensor | None = shadow.held
    if held is not None:
        return held.item()
    if shadow.dtype.is_floating_point:
        return 1.0
    value = not getattr(shadow, "says_no", False)
    return value if shadow.dtype == torch.bool else int(value)


def _makes_large(function: Any, arguments: Any, named: Any) -> bool:
    """True for a function that makes a tensor which must not be real: floating-point or large."""
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
    return not whole or count > (PICKLED if dtype == torch.uint8 else SMALL)


@functools.cache
def _written(function: Any) -> tuple[int, str] | None:
    """(place, name) of the argument that a function writes and returns; None if there is none."""
    returns = function._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return (
                len(function._schema.arguments) if argument.kwarg_only else place
            ), argument.name
    return None
