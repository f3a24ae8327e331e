"""Layers that FSDP2 shards: matrices along their first axis, over the ranks of a machine.

Gains and biases stay whole on every rank, in fp32: they are a thousandth of the weights, and a
group of FSDP2 has one type. Matrices of residual blocks are gathered in 16 bits, cast on the shard;
those of the embedding and of the head in fp32 (arXiv 2102.12092, appendix D). Each rank allocates
and draws only its own rows.

All that is used of FSDP2's private parts is here.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from parallel.config import EngineConfig
from parallel.engines.protocol import Layer
from parallel.mesh import Group
from parallel.placement import Placement, global_names, move, place, placement_of

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# a layer's output may be a view, since no loss writes to it
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One parameter of a unit, in the order of its flat gradient."""

    name: str
    """Global name."""
    shard: nn.Parameter
    """This rank's rows: a view of what FSDP2 gathers, so that writing to it changes the weights."""
    start: int
    """First element of the shard in the flat local parameter."""
    padded: int
    """Elements of the part in the flat gradient: as many on every rank."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Matrices that are gathered, and whose gradients are reduced, together."""

    name: str
    module: Any
    """FSDP2's module."""
    parts: tuple[Part, ...]
    narrow: bool = False
    """Its gradients are added up in 16 bits."""

    def gradients(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat gradient by name, of what is trained; shapes of the shards."""
        trained = [part for part in self.parts if part.shard.requires_grad]
        views = flat.split([part.padded for part in trained])
        return {
            part.name: view[: part.shard.numel()].view_as(part.shard)
            for part, view in zip(trained, views, strict=True)
        }

    def forget(self) -> None:
        """Drop the gradients that FSDP2 holds; the flat ones are reduced instead."""
        for each in _fsdp_params(self.module):
            each.sharded_param.grad = None


def hollow(layer: Layer, device: torch.device) -> Layer:
    """The layer on a device, but matrices that can be drawn in parts have shapes only."""
    build = _moved if layer.draw is None else _vectors
    return replace(layer, build=partial(build, layer, device))


def _moved(layer: Layer, device: torch.device) -> nn.Module:
    module = move(layer.build(), device)
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # channels last has no rows to shard
    return module


def _vectors(layer: Layer, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        module = layer.build()
    assert layer.draw is not None
    for name, shape in list(module.named_parameters()):
        if not is_vector(shape):
            continue
        vector = nn.Parameter(torch.empty(shape.shape, device=device), shape.requires_grad)
        layer.draw(name, placement_of(shape), 0, vector.detach().view(-1))
        place(vector, placement_of(shape))
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, vector)
    return module


def is_vector(parameter: nn.Parameter) -> bool:
    """True for gains and biases, which are not sharded."""
    return len(placement_of(parameter).shape) < 2


class Sharder:
    """Applies FSDP2 to layers over a group of ranks."""

    def __init__(
        self,
        layers: Sequence[Layer],
        group: Group,
        engine: EngineConfig,
        device: torch.device,
        keeps: bool = False,
    ) -> None:
        """`keeps`: weights stay gathered from the first forward pass to the end of a step."""
        self._layers, self._keeps = {layer.name: layer for layer in layers}, keeps
        self._group, self._device, self._engine = group, device, engine
        assert group.handle is not None, "a world of one rank has no engine of several"
        self._mesh = DeviceMesh.from_group(group.handle, device.type)

    def shard(self, layers: Mapping[str, nn.Module], whole: nn.Module) -> list[Unit]:
        """Make each layer a unit, and `whole` the root around them.

        The root takes what two layers share, tied weights, with the rest of those two.
        """
        whole_ones = global_names(nn.ModuleDict(layers))  # held, so that no id is used twice
        owner_of = {id(p): name for name, p in whole_ones.items()}
        users = Counter(id(p) for layer in layers.values() for p in set(layer.parameters()))
        units = []
        for name, layer in layers.items():
            if all(users[id(p)] == 1 for p in layer.parameters()):
                units.append(self._unit(name, layer, owner_of))
        return [*units, self._unit("", whole, owner_of)]

    def _unit(self, name: str, module: nn.Module, owner_of: Mapping[int, str]) -> Unit:
        before = {
            inner: (owner_of[id(p)], placement_of(p))
            for inner, p in module.named_parameters()
            if id(p) in owner_of  # what an inner unit took has another name by now
        }
        wrapped = self._wrap(module, self._layers.get(name))
        inside = {id(p): inner for inner, p in module.named_parameters()}
        parts = []
        for each in _fsdp_params(wrapped):
            full, placement = before[inside[id(each.sharded_param)]]
            rows, *others = each.padded_sharded_param_size
            padded = rows * prod(others)
            start = self._group.rank * padded
            if each.sharded_param.is_meta:
                self._fill(each, full, placement, start)
            trained = each.sharded_param.requires_grad
            shard = nn.Parameter(each.sharded_param._local_tensor, requires_grad=trained)
            place(shard, placement)
            parts.append(Part(name=full, shard=shard, start=start, padded=padded))
        layer = self._layers.get(name)
        branches = layer is not None and bool(layer.branches)
        if self._keeps and branches and self._half()[1]:
            _round_gradients(wrapped)
        narrow = branches and self._sent_as() is not None
        return Unit(name=name, module=wrapped, parts=tuple(parts), narrow=narrow)

    def _wrap(self, module: nn.Module, layer: Layer | None) -> Any:
        half, rounds, sent = None, False, None
        if layer and layer.branches:
            (half, rounds), sent = self._half(), self._sent_as()
        added = sent if sent and not self._keeps else torch.float32  # whole sums stay fp32
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=added, cast_forward_inputs=False
        )
        wrapped: Any = fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=not self._keeps,
            mp_policy=policy,
            ignored_params={p for p in module.parameters() if is_vector(p)},
        )
        if _fsdp_params(wrapped):
            wrapped.set_custom_all_gather(_Gather())
            wrapped.set_custom_reduce_scatter(_Sum(rounds and not self._keeps, sent))
            if added == torch.float16:  # is divided before and after the sum otherwise
                wrapped.set_gradient_divide_factor(1.0)
        return wrapped

    def _half(self) -> tuple[torch.dtype | None, bool]:
        """The type that residual branches are gathered in, and whether fp16 is emulated."""
        if self._engine.precision == "bf16":
            return torch.bfloat16, False
        if self._engine.precision != "fp16":
            return None, False
        return (torch.float16, False) if self._device.type == "cuda" else (None, True)

    def _sent_as(self) -> torch.dtype | None:
        """The type in which gradients of residual branches are added up, if not fp32."""
        if self._engine.reduce_precision == "fp32":
            return None
        return torch.float16 if self._engine.precision == "fp16" else torch.bfloat16

    def _fill(self, each: Any, name: str, placement: Placement, start: int) -> None:
        """Allocate and draw this rank's rows of a parameter that had only a shape."""
        layer, _, inner = name.partition(".")
        draw = self._layers[layer].draw
        assert draw is not None, "other layers are built with their values"
        data = torch.empty(each.padded_sharded_param_size, device=self._device)
        draw(inner, placement, start, data.view(-1))
        local = each.to_sharded_dtensor(data.narrow(0, 0, each.sharded_size[0]))
        each._sharded_param_data = data.view(-1)
        each.sharded_param = nn.Parameter(local, requires_grad=each.sharded_param.requires_grad)
        each._setattr_on_modules(each.sharded_param)


def collect(units: Iterable[Unit]) -> None:
    """Add the gradients of whole parameters to their sums, in fp32.

    FSDP2 does so after a backward pass, but not after the half that computes weights' gradients.
    """
    for each in (each for unit in units for each in _fsdp_params(unit.module)):
        each.accumulate_unsharded_grad_if_needed()
        each.to_accumulated_grad_if_needed()


def hook(unit: Unit, reduced: Callable[[Tensor], None]) -> None:
    """Call `reduced` with the unit's flat gradient, summed over the group, in each backward."""
    if unit.parts:
        unit.module.set_all_reduce_hook(reduced)


def whole_parameters(units: Iterable[Unit]) -> list[nn.Parameter]:
    """The parameters that layers see once they have been gathered, whose memory comes and goes."""
    each_unit = (each for unit in units for each in _fsdp_params(unit.module))
    return [each._unsharded_param for each in each_unit if hasattr(each, "_unsharded_param")]


def _fsdp_params(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    return [each for group in state._fsdp_param_groups for each in group.fsdp_params]


def _round_gradients(module: Any) -> None:
    """Round each micro-batch's gradients to fp16, before they add up on whole parameters."""
    module.unshard()
    for each in _fsdp_params(module):
        each._unsharded_param.register_hook(lambda gradient: gradient.half().float())
    module.reshard()


class _Allocates:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Allocates):
    """FSDP2's all-gather, by a name that all supported versions of torch have."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: "dist.ProcessGroup",
        async_op: bool = False,
    ) -> "dist.Work | None":
        work: dist.Work | None = dist.all_gather_into_tensor(
            output_tensor, input_tensor, group, async_op
        )
        return work


class _Sum(_Allocates):
    """A reduce-scatter that adds up; the division follows on the shard, in fp32."""

    def __init__(self, rounds: bool, sent: torch.dtype | None) -> None:
        """`rounds`: to fp16, which is emulated; `sent`: another type to add up in."""
        self._rounds, self._sent = rounds, sent

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: "dist.ProcessGroup",
        op: Any,
        async_op: bool = False,
    ) -> "dist.Work | None":
        if self._rounds:
            input_tensor.copy_(input_tensor.half())
        given = input_tensor if self._sent is None else input_tensor.to(self._sent)
        taken = (
            output_tensor
            if given is input_tensor
            else torch.empty_like(output_tensor, dtype=given.dtype)
        )
        work: dist.Work | None = dist.reduce_scatter_tensor(taken, given, group=group)
        if taken is not output_tensor:
            output_tensor.copy_(taken)
        return work
