"""A backend that carries collectives through host memory, so that several ranks share one GPU.

NCCL refuses two ranks on a GPU. Here each operation copies its tensors to the host, runs there over
gloo, and copies the results back when it is waited for: this tests values and the order of
operations, not NCCL's speed or its overlap. `stage` before `join_world` makes it the backend of a
type of device; on a CPU it stages just as well, which is how it is tried without a GPU.
"""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions
from torch.utils._pytree import tree_leaves, tree_map

from parallel.device import share_devices

NAME = "staged"
carried: Counter[str] = Counter()
"""Operations on tensors of the staged device that this rank has begun, by name."""


def stage(kind: str) -> None:
    """Let this backend carry the tensors of "cuda" or "cpu" in the world that is joined next."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, Staged, devices=["cpu", "cuda"])
    share_devices(kind, NAME)


def _carried(name: str) -> Callable[..., dist.Work]:
    """A method of a process group that is staged unchanged."""

    def call(self: "Staged", *arguments: Any) -> dist.Work:
        return self.carry(name, *arguments)

    return call


class StagedWork(dist.Work):
    """Operations on the host; their results are copied to the device when they are waited for."""

    def __init__(self, works: list[Any], copy_back: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._works, self._copy_back, self._done = works, copy_back, False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._done:
            for work in self._works:
                work.wait(timeout) if timeout else work.wait()
            self._copy_back()
            self._done = True
        return True

    def is_completed(self) -> bool:
        """True also means that the results are on the device, as with NCCL."""
        return self._done or (all(work.is_completed() for work in self._works) and self.wait())

    def is_success(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        self.wait()

    def _source_rank(self) -> int:
        return int(self._works[0]._source_rank())


class Staged(dist.ProcessGroup):
    """One group. torch takes a ProcessGroup written in Python for all devices of the group, so
    host tensors beside GPU ones are carried as well, over gloo connections of their own: a rank
    that sends a host tensor where another awaits a GPU's hangs, as it does with NCCL.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        make = dist.ProcessGroupGloo
        self._host = make(dist.PrefixStore("host", store), rank, size, timeout)
        self._device = self._host
        if torch.cuda.is_available():
            self._device = make(dist.PrefixStore("device", store), rank, size, timeout)
            self._register(torch.device("cuda"), self._device)
        self._register(torch.device("cpu"), self._host)
        self._coalesced: list[Any] | None = None

    def _register(self, device: torch.device, inner: "dist.ProcessGroupGloo") -> None:
        """Register the devices with torch, which asks for a device's backend to set a timeout."""
        self._register_backend(device, dist.ProcessGroup.BackendType.GLOO, inner)

    def getBackendName(self) -> str:
        return NAME

    allreduce = _carried("allreduce")
    allreduce_coalesced = _carried("allreduce_coalesced")
    reduce = _carried("reduce")
    broadcast = _carried("broadcast")
    allgather = _carried("allgather")
    allgather_coalesced = _carried("allgather_coalesced")
    reduce_scatter = _carried("reduce_scatter")
    gather = _carried("gather")
    scatter = _carried("scatter")
    send = _carried("send")
    recv = _carried("recv")
    recv_anysource = _carried("recv_anysource")
    # of these torch.distributed calls the first up to 2.11, the second from 2.13 on
    _allgather_base = all_gather_single = _carried("_allgather_base")
    _reduce_scatter_base = reduce_scatter_single = _carried("_reduce_scatter_base")
    alltoall_base = all_to_all_single = _carried("alltoall_base")

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> StagedWork:
        """torch 2.11 gives no options."""
        opts = opts or AllgatherOptions()
        return self._each("_allgather_base", outputs, inputs, opts)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any
    ) -> StagedWork:
        return self._each("_reduce_scatter_base", outputs, inputs, opts)

    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._host.barrier()

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: torch.device) -> StagedWork:
        works, self._coalesced = self._coalesced or [], None
        return StagedWork(works)

    def carry(self, name: str, results: Any, *rest: Any) -> dist.Work:
        """Run an operation of gloo on host copies of its tensors.

        `results` are the tensors that it writes into and does not send.
        Raises: ValueError for tensors on two types of device and for those that are not
        contiguous, which NCCL refuses, and of which gloo takes the wrong elements.
        """
        leaves = [*tree_leaves(results), *tree_leaves(rest)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        if len(kinds) > 1:
            raise ValueError(f"rank {self.rank()}: {name} of tensors on {' and '.join(kinds)}")
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError(f"rank {self.rank()}: {name} of a tensor that is not contiguous")
        mean = _sum_for_mean(rest)
        host, *others = tree_map(_to_host, (results, *rest))
        inner = self._host if kinds == {"cpu"} else self._device
        carried[name] += inner is self._device
        started = getattr(inner, name)(host, *others)
        written = [] if name == "send" else tree_leaves(results)

        def copy_back() -> None:
            for tensor, value in zip(written, tree_leaves(host), strict=False):
                tensor.detach().copy_(value / self.size() if mean else value)

        work = StagedWork([started], copy_back)
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _each(self, name: str, outputs: list[Tensor], inputs: list[Tensor], o: Any) -> StagedWork:
        works = [self.carry(name, *pair, o) for pair in zip(outputs, inputs, strict=True)]
        return StagedWork(works)


def _to_host(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def _sum_for_mean(options: tuple[Any, ...]) -> bool:
    """Replace a mean, which gloo lacks, by a sum; True if it was a mean."""
    mean = bool(options) and getattr(options[-1], "reduceOp", None) == dist.ReduceOp.AVG
    if mean:
        options[-1].reduceOp = dist.ReduceOp.SUM
    return mean
