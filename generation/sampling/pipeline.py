"""Communication between the pipeline stages of a decoder."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import TapirError
from parallel.mesh import Group
from parallel.world import World


def least_of(world: World, value: int) -> int:
    """All-reduce the minimum of a number over all ranks."""
    if world.group is None:
        return value
    least = torch.tensor(value, device=world.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=world.group)
    return int(least)


class Neighbours:
    """Neighbours of the only stage of a pipeline: none."""

    size = 1

    def receive(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Receive hidden states from the previous stage."""
        raise TapirError("this stage is the first one")

    def send(self, x: Tensor) -> None:
        """Send hidden states to the next stage, without waiting for it."""
        raise TapirError("this stage is the last one")

    def share(self, codes: Tensor) -> "Shared":
        """Broadcast the codes of the last stage; other stages pass a tensor of that size."""
        return Shared(codes, None)


class Shared:
    """Codes whose broadcast is in progress."""

    def __init__(self, codes: Tensor, work: Any) -> None:
        self._codes, self._work = codes, work

    def wait(self) -> Tensor:
        """Wait for the last stage's codes."""
        if self._work is not None:
            self._work.wait()
        return self._codes


class Pipeline(Neighbours):
    """Neighbours of one stage of several; all call the same methods in the same order."""

    def __init__(self, group: Group) -> None:
        assert group.handle is not None
        self._group, self.size = group.handle, group.size
        self._ranks = dist.get_process_group_ranks(group.handle)
        self._place = group.rank
        self._sent: list[tuple[Any, Tensor]] = []

    def receive(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        states = torch.empty(shape, device=device)
        dist.recv(states, self._ranks[self._place - 1], group=self._group)
        return states

    def send(self, x: Tensor) -> None:
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        kept = x.clone(memory_format=torch.contiguous_format)  # the next step may write over x
        work = dist.isend(kept, self._ranks[self._place + 1], group=self._group)
        self._sent.append((work, kept))

    def share(self, codes: Tensor) -> Shared:
        last = self._ranks[-1]
        return Shared(codes, dist.broadcast(codes, last, group=self._group, async_op=True))


class Leader:
    """Rank 0 of a world of one rank: itself."""

    rank = 0
    """This rank."""

    def tell(self, words: list[int]) -> list[int]:
        """Broadcast rank 0's numbers; other ranks' argument is ignored."""
        return words


class WorldLeader(Leader):
    """Rank 0 of several; all ranks call `tell` together."""

    def __init__(self, world: World) -> None:
        self._world, self.rank = world, world.rank

    def tell(self, words: list[int]) -> list[int]:
        world = self._world
        size = torch.tensor(len(words), device=world.device)
        dist.broadcast(size, 0, group=world.group)
        if not int(size):
            return []
        body = torch.tensor(words, device=world.device) if world.rank == 0 else None
        if body is None:
            body = torch.empty(int(size), dtype=torch.int64, device=world.device)
        dist.broadcast(body, 0, group=world.group)
        return body.tolist()  # type: ignore[no-any-return]
