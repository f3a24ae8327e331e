"""Every operation that the engines use, on a group and a device; returns tensors to compare."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.world import join_world, leave_world
from tests.staging import carried, stage

_together = dist.distributed_c10d._coalescing_manager


class Operations:
    """The operations of one rank; `_` methods are helpers."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._right, self._left = (self._rank + 1) % self._size, (self._rank - 1) % self._size

    def _mine(self, count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.arange(count, dtype=torch.float32, device=self._device)
        return ((self._rank + 1) * values).to(dtype)

    def _empty(self, count: int) -> Tensor:
        return torch.full((count,), -1.0, device=self._device)

    def all_reduce(self) -> list[Tensor]:
        x, low, most = self._mine(), self._mine(dtype=torch.bfloat16), self._mine()
        dist.all_reduce(x, group=self._group)
        dist.all_reduce(low, group=self._group)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return [x, low, most]

    def all_reduce_later(self) -> list[Tensor]:
        x = self._mine()
        work = dist.all_reduce(x, group=self._group, async_op=True)
        while not work.is_completed():
            pass
        total = x.clone()
        work.wait()
        return [total, x]

    def reduce(self) -> list[Tensor]:
        x = self._mine()
        dist.reduce(x, 1, group=self._group)
        return [x] if self._rank == 1 else []

    def broadcast(self) -> list[Tensor]:
        x = self._mine()
        dist.broadcast(x.view(torch.uint8), 2, group=self._group)
        return [x]

    def all_gather(self) -> list[Tensor]:
        parts = [self._empty(6) for _ in range(self._size)]
        dist.all_gather(parts, self._mine(), group=self._group)
        return parts

    def all_gather_in_place(self) -> list[Tensor]:
        flat = self._empty(6 * self._size)
        parts = list(flat.chunk(self._size))
        parts[self._rank].copy_(self._mine())
        dist.all_gather(parts, parts[self._rank], group=self._group)
        return [flat]

    def all_gather_into_tensor(self) -> list[Tensor]:
        flat, later = self._empty(6 * self._size), self._empty(6 * self._size)
        dist.all_gather_into_tensor(flat, self._mine(), group=self._group)
        work = dist.all_gather_into_tensor(later, self._mine(), group=self._group, async_op=True)
        work.wait()
        return [flat, later]

    def reduce_scatter(self) -> list[Tensor]:
        out = self._empty(2)
        dist.reduce_scatter(out, list(self._mine(2 * self._size).chunk(3)), group=self._group)
        return [out]

    def reduce_scatter_tensor(self) -> list[Tensor]:
        out = self._empty(2)
        dist.reduce_scatter_tensor(out, self._mine(2 * self._size), group=self._group)
        return [out]

    def all_to_all_single(self) -> list[Tensor]:
        out, uneven = self._empty(6), self._empty(self._size * (self._rank + 1))
        dist.all_to_all_single(out, self._mine(), group=self._group)
        sizes, mine = list(range(1, self._size + 1)), [self._rank + 1] * self._size
        dist.all_to_all_single(uneven, self._mine(sum(sizes)), mine, sizes, group=self._group)
        return [out, uneven]

    def gather(self) -> list[Tensor]:
        parts = [self._empty(6) for _ in range(self._size)] if self._rank == 0 else None
        dist.gather(self._mine(), parts, 0, group=self._group)
        return parts or []

    def scatter(self) -> list[Tensor]:
        out = self._empty(2)
        parts = list(self._mine(6).chunk(3)) if self._rank == 0 else None
        dist.scatter(out, parts, 0, group=self._group)
        return [out]

    def send(self) -> list[Tensor]:
        x = self._empty(6)
        for sender in range(self._size):
            if self._rank == sender:
                dist.send(self._mine(), self._right, group=self._group)
            elif self._left == sender:
                dist.recv(x, self._left, group=self._group)
        return [x]

    def isend(self) -> list[Tensor]:
        x, mine = self._empty(6), self._mine()
        work = dist.irecv(x, self._left, group=self._group)
        sent = dist.isend(mine, self._right, group=self._group)
        work.wait()
        sent.wait()
        return [x]

    def batch_isend_irecv(self) -> list[Tensor]:
        x = self._empty(6)
        calls = [
            dist.P2POp(dist.isend, self._mine(), self._right, self._group),
            dist.P2POp(dist.irecv, x, self._left, self._group),
        ]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        return [x]

    def coalesced_all_reduce(self) -> list[Tensor]:
        """Several in one, as DeepSpeed's ZeRO-3 asks for them."""
        sums = [self._mine(), self._mine(3)]
        with _together(self._group):
            for x in sums:
                dist.all_reduce(x, group=self._group)
        return sums

    def coalesced_all_gather(self) -> list[Tensor]:
        wholes = [self._empty(9), self._empty(6)]
        with _together(self._group, async_ops=True) as work:
            for whole, count in zip(wholes, (3, 2), strict=True):
                dist.all_gather_into_tensor(whole, self._mine(count), group=self._group)
        work.wait()
        return wholes

    def coalesced_reduce_scatter(self) -> list[Tensor]:
        parts = [self._empty(2), self._empty(1)]
        with _together(self._group):
            for part, count in zip(parts, (6, 3), strict=True):
                dist.reduce_scatter_tensor(part, self._mine(count), group=self._group)
        return parts

    def objects(self) -> list[Tensor]:
        names: list[Any] = [None] * self._size
        dist.all_gather_object(names, f"rank {self._rank}", group=self._group)
        lasting = [self._rank]
        dist.broadcast_object_list(lasting, 2, group=self._group)
        dist.barrier(group=self._group)
        assert names == [f"rank {rank}" for rank in range(self._size)]
        return [torch.tensor(lasting)]

    def subgroup(self) -> list[Tensor]:
        handle = dist.new_group([0, 1], backend=dist.get_backend_config(self._group))
        x = self._mine()
        if self._rank < 2:
            dist.all_reduce(x, group=handle)
        return [x]


def try_operations(payload: str) -> None:
    """Call every operation on both backends; writes results and traffic to result-RANK.json."""
    body = json.loads(payload)
    stage(body["kind"])
    world = join_world()
    assert world.group is not None and world.aside is not None
    assert world.device.type == body["kind"]
    results = {}
    for name in (name for name in vars(Operations) if not name.startswith("_")):
        before = carried.total()
        staged = _values(getattr(Operations(world.group, world.device), name))
        alone = name == "objects" or (name == "subgroup" and world.rank == 2)
        assert alone or carried.total() > before, f"{name} went elsewhere"
        gloo = _values(getattr(Operations(world.aside, torch.device("cpu")), name))
        results[name] = [staged, gloo]
    with pytest.raises(ValueError, match="not contiguous"):
        dist.all_reduce(torch.zeros(2, 3, device=world.device)[:, 1], group=world.group)
    results["mean"] = _means(world.group, world.device)
    Path(body["out"], f"result-{world.rank}.json").write_text(json.dumps(results))
    leave_world(world)


def _values(call: Callable[[], list[Tensor]]) -> list[Any]:
    return [x.tolist() for x in call()]


def _means(group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """gloo has no mean, NCCL does: a sum that is divided, in an all-reduce and a reduce-scatter."""
    size, mine = dist.get_world_size(group), float(dist.get_rank(group) + 1)
    x, part = torch.full((2,), mine, device=device), torch.zeros(1, device=device)
    dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group)
    dist.reduce_scatter_tensor(
        part, torch.full((size,), mine, device=device), dist.ReduceOp.AVG, group
    )
    mean = (size + 1) / 2
    return [[x.tolist(), part.tolist()], [[mean] * 2, [mean]]]
