"""Build a ZeRO-3 model so that each rank only ever allocates its own shards.

All shards of a rank are initialised in one buffer, in the order of DeepSpeed's flat groups. Plain
DeepSpeed cuts whole layers, copies the shards into a second buffer, clones that for the fp32
masters, and gathers every parameter once to hook its gradient (0.19.8, stage3.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from torch import Tensor, nn

from parallel.config import OptimConfig
from parallel.engines.deepspeed.hooks import start_comm
from parallel.engines.protocol import Layer, parameter_groups
from parallel.mesh import Group
from parallel.placement import move, place, placement_of


class Shards:
    """One rank's shards of the weights: views of one buffer."""

    def __init__(
        self, layers: Sequence[Layer], optim: OptimConfig, group: Group, device: torch.device
    ) -> None:
        """`group`: the ranks over which every parameter is sharded."""
        start_comm(device)
        self._group = group
        with torch.device("meta"):  # prebuilt modules keep their device
            self._shapes = nn.ModuleDict({layer.name: layer.build() for layer in layers})
        self._spans, self._trained = _spans(self._shapes, optim, group.size)
        total = sum(count for _, count in self._spans.values())
        self._buffer = torch.empty(total, device=device)
        self._zero = deepspeed.zero.Init(
            module=nn.Module(), data_parallel_group=group.handle, dtype=torch.float32
        )
        self.layers = [replace(layer, build=partial(self._build, layer)) for layer in layers]
        """The program's layers; they build only this rank's shards."""

    @contextmanager
    def adopted(self) -> Iterator[None]:
        """Make DeepSpeed use the buffer as its flat groups and as their fp32 masters."""
        owner: Any = stage3.DeepSpeedZeroOptimizer_Stage3
        masters, hooks = owner._create_fp32_partitions, owner.create_reduce_and_remove_grad_hooks

        def share_masters(optimizer: Any) -> None:
            optimizer.device = torch.device(optimizer.device)  # compared with torch devices
            masters(optimizer)

        def hook_shards(optimizer: Any) -> None:
            with _none_gathered([p for group in optimizer.fp16_groups for p in group]):
                hooks(optimizer)

        with (
            _replaced(stage3, "defragment", self._flat),
            _replaced(owner, "_create_fp32_partitions", share_masters),
            _replaced(owner, "initialize_optimizer_states", lambda _: None),  # only to swap them
            _replaced(owner, "create_reduce_and_remove_grad_hooks", hook_shards),
        ):
            yield

    def _build(self, layer: Layer) -> nn.Module:
        device, drawn = self._buffer.device, layer.draw is not None
        module = self._shapes[layer.name] if drawn else move(layer.build(), device)
        for name, parameter in list(module.named_parameters()):
            part = placement_of(parameter)
            if part.tied_to:  # the stage replaces it by its owner
                place(_hollow(module, name, device), part)
                continue
            start, count = self._spans[f"{layer.name}.{name}"]
            shard = self._buffer[start : start + count]
            if layer.draw is not None:
                layer.draw(name, part, count * self._group.rank, shard)
                parameter = _hollow(module, name, device)
            else:
                self._take(parameter, shard)
            place(parameter, part)  # ZeRO-3 empties its shape
            self._convert(parameter, shard)
        return module

    def _take(self, parameter: nn.Parameter, shard: Tensor) -> None:
        """Copy this rank's shard out of a whole parameter, broadcast by the group's first rank."""
        whole = parameter.detach().contiguous()
        if self._group.handle is not None:
            first = dist.get_global_rank(self._group.handle, 0)
            dist.broadcast(whole, src=first, group=self._group.handle)
        mine = whole.view(-1)[shard.numel() * self._group.rank :][: shard.numel()]
        shard[: mine.numel()].copy_(mine)
        shard[mine.numel() :].zero_()

    def _convert(self, parameter: Any, shard: Any) -> None:
        """Convert a parameter to ZeRO-3's partitioned state."""
        self._zero._convert_to_deepspeed_param(parameter)
        shard.ds_numel = shard.numel()
        shard.status, shard.final_location = PartitionedParamStatus.AVAILABLE, None
        parameter.ds_tensor = shard
        parameter.ds_numel_aligned = shard.numel() * self._group.size
        parameter.data = torch.empty(0, device=shard.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def _flat(self, shards: list[Tensor]) -> Tensor:
        starts = [start for start, _ in self._spans.values() if start < self._trained]
        offsets = [shard.storage_offset() for shard in shards]
        assert offsets == starts, "DeepSpeed's flat groups have another order than parameter_groups"
        return self._buffer[: self._trained]


def _spans(
    modules: nn.Module, optim: OptimConfig, size: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """Parameter name -> (first element, count) of its shard in the buffer, without gaps.

    The shards of frozen parameters follow those of the others, whose elements are counted, too.
    """
    owned = ((n, p) for n, p in modules.named_parameters() if not placement_of(p).tied_to)
    names = dict(sorted(owned))
    name_of = {id(parameter): name for name, parameter in names.items()}
    groups = [flat["params"] for flat in parameter_groups(names, optim)]
    spans, end, trains = {}, 0, 0
    for group in (*groups, [p for p in names.values() if not p.requires_grad]):
        for parameter in group:
            count = -(-parameter.numel() // size)
            spans[name_of[id(parameter)]] = end, count
            end += count
            trains += count if parameter.requires_grad else 0
    return spans, trains


def _hollow(module: nn.Module, name: str, device: torch.device) -> nn.Parameter:
    """Replace a meta parameter by one of the same shape that takes one element of memory."""
    owner, _, last = name.rpartition(".")
    shape = module.get_parameter(name)
    made = nn.Parameter(torch.empty(1, device=device).expand(shape.shape), shape.requires_grad)
    setattr(module.get_submodule(owner), last, made)
    return made


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _none_gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Disable the gathering of parameters; hooking their gradients needs no values."""
    with ExitStack() as stack:
        for parameter in parameters:
            for name in ("all_gather", "partition"):
                stack.enter_context(_replaced(parameter, name, lambda *_: None))
        yield
