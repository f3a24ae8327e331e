"""The world of ranks, under Tapir's launcher, torchrun, mpirun and srun."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from core.errors import InputError
from core.launch_environment import FIRST_PORT, PORT_COUNT, free_port, ranks_of, refuse_left_socket
from parallel.device import CPU, backends, rank_device, refuse_shared_gpus
from parallel.rendezvous import heard, met_store

TIMEOUT = timedelta(minutes=10)
_FIRST = 512
"""Bytes of a tree's first message between two ranks, which begins with the length of all; a second
one has the rest."""
_HEAD = 8
_MPI_FIX = (
    "unset them (PMI_*, OMPI_*) if nobody started ranks by mpirun; else install mpi4py and the "
    "MPI that mpirun is of (pip install mpi4py mpich), or start the ranks by torchrun"
)


class Tree:
    """One rank's place in a binomial tree of messages; its ranks call the same methods in order.

    The parent of rank r is r without its lowest set bit. So half of the ranks exchange one message,
    none more than log2(n), and neighbours are 1, 2, 4, ... ranks apart, as in gloo's barrier: a
    tree opens no connections that a barrier does not open, too.
    """

    def __init__(self, rank: int, ranks: Sequence[int], group: "dist.ProcessGroup | None") -> None:
        """`ranks` are global ranks, the root first; `rank`, the caller, is one of them."""
        self._ranks, self._group = ranks, group
        self._mine, self._reach = ranks.index(rank), 1
        while self._reach < len(ranks) and not self._mine & self._reach:
            self._reach *= 2

    def spread(self, data: bytes) -> bytes:
        """The root's bytes, on every rank."""
        if self._mine:
            data = self._receive(self._parent)
        for child in reversed(self._children):
            self._send(data, child)
        return data

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of all ranks in their order, on the root; empty on the others."""
        parts = [_framed(data), *(self._receive(child) for child in self._children)]
        if self._mine:
            self._send(b"".join(parts), self._parent)
            return []
        return list(_unframed(b"".join(parts)))

    @property
    def _parent(self) -> int:
        return self._ranks[self._mine - self._reach]

    @property
    def _children(self) -> list[int]:
        """The ranks below this one; each stands for itself and those up to the next."""
        steps = (2**i for i in range(self._reach.bit_length() - 1))
        return [self._ranks[self._mine + s] for s in steps if self._mine + s < len(self._ranks)]

    def _send(self, data: bytes, rank: int) -> None:
        data = _framed(data)
        for part in (data[:_FIRST].ljust(_FIRST, b"\0"), data[_FIRST:]):
            if part:
                host = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                dist.send(host, rank, group=self._group)

    def _receive(self, rank: int) -> bytes:
        first = self._bytes_from(rank, _FIRST)
        length = _length(first, 0)
        rest = length + _HEAD - _FIRST
        return first[_HEAD : _HEAD + length] + (self._bytes_from(rank, rest) if rest > 0 else b"")

    def _bytes_from(self, rank: int, count: int) -> bytes:
        host = torch.empty(count, dtype=torch.uint8, device="cpu")
        dist.recv(host, rank, group=self._group)
        return host.numpy().tobytes()


def _framed(data: bytes) -> bytes:
    return np.int64(len(data)).tobytes() + data


def _length(data: bytes, at: int) -> int:
    return int(np.frombuffer(data, np.int64, 1, at)[0])


def _unframed(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        start, at = at + _HEAD, at + _HEAD + _length(data, at)
        yield data[start:at]


@dataclass(frozen=True)
class World:
    """This rank's place in the world, and the process groups of all ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU
    """Device of this rank's weights, batches and collectives."""
    group: "dist.ProcessGroup | None" = None
    """All ranks; None on one process."""
    aside: "dist.ProcessGroup | None" = None
    """All ranks again, for the saving thread: its collectives must not mix with the loop's."""

    def mean(self, values: Tensor) -> Tensor:
        """Average a small tensor over all ranks; returns it on this rank's device."""
        values = values.to(self.device)
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def of_rank_0(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(held, src=0, group=self.group)
        return float(held)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather_text(self, text: str) -> list[str]:
        """Collect one string of every rank over a tree; collective.

        Returns all of them on rank 0, and rank 0's alone on the others: what follows from all of
        them, rank 0 tells in a second call.
        """
        return self._gather(text, self.group)

    def gather_aside(self, text: str) -> list[str]:
        """`gather_text` for a thread beside the loop."""
        return self._gather(text, self.aside)

    def hand_on(self, data: bytes, ranks: Sequence[int]) -> bytes:
        """Send rank 0's bytes to some ranks, over a binomial tree; returns them on each.

        `ranks` begins with 0 and is the same on all callers; a rank outside of it gets its own
        `data` back. Only neighbours in the tree connect: there is no group to create.
        """
        if self.group is None or self.rank not in ranks:
            return data
        return Tree(self.rank, ranks, self.group).spread(data)

    def _gather(self, text: str, group: "dist.ProcessGroup | None") -> list[str]:
        if group is None:
            return [text]
        tree, data = Tree(self.rank, range(self.size), group), text.encode(errors="surrogatepass")
        texts, first = tree.gather(data), tree.spread(data)
        return [each.decode(errors="surrogatepass") for each in texts or [first]]


ALONE = World()
"""A world of one rank on the CPU."""


def join_world() -> World:
    """Join the launcher's ranks, if any, and choose this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and TAPIR_RENDEZVOUS (our launcher) or MASTER_ADDR and
    MASTER_PORT (torchrun); under mpirun, rank 0 chooses the address and MPI spreads it; under srun
    Slurm's variables and the first node's address are used.
    Raises: InputError if these variables are invalid or incomplete; ConfigError if this machine has
    more ranks than GPUs; the errors of `Meeting.store` if the ranks do not meet.
    """
    started = ranks_of()
    if started is None or started.size == 1:
        return World(device=rank_device())
    if started.launcher == "mpirun":
        with heard(f"rank {started.rank} of {started.size} waits in MPI for the others"):
            _adopt_mpi_ranks(started.size)
    elif started.launcher == "srun":
        os.environ.update(srun_ranks(os.environ, _address_of))
    rank, size, device = int(os.environ["RANK"]), started.size, rank_device()
    with heard(f"rank {rank} of {size} waits in torch for the process group of all ranks"):
        _meet(rank, size, device)
        aside = dist.new_group(backend="gloo", timeout=TIMEOUT)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return World(rank, size, local, device, dist.group.WORLD, aside)


def _meet(rank: int, size: int, device: torch.device) -> None:
    """Create the process group after all ranks have arrived.

    gloo connects two ranks only when they first exchange something: a full mesh of 1,024 ranks is
    a million sockets for each process group, and as many reads of the store.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    store = met_store(rank, size, TIMEOUT)
    bound: dict[str, Any] = {}
    if device.type == "cuda":
        refuse_shared_gpus(store, device, rank)
        bound["device_id"] = device
    common = PrefixStore("world", store)
    dist.init_process_group(
        backends(device), rank=rank, world_size=size, timeout=TIMEOUT, store=common, **bound
    )


def leave_world(world: World) -> None:
    """Close the process group."""
    if world.group is not None:
        dist.destroy_process_group()


def _adopt_mpi_ranks(size: int) -> None:
    """Set torch's variables from MPI; checks its size against the launcher's variables."""
    refuse_left_socket(os.environ)
    try:
        from mpi4py import MPI  # noqa: PLC0415 - importing it starts MPI: only under mpirun
    except (ImportError, RuntimeError) as error:  # no mpi4py, or it finds no library
        text = str(error).partition("\n")[0]
        raise InputError(
            f"mpirun's variables are in the environment, but MPI cannot be used: {text}; {_MPI_FIX}"
        ) from error

    everybody = MPI.COMM_WORLD
    if everybody.size != size:
        raise InputError(
            f"the environment speaks of {size} ranks that mpirun started, but MPI knows of "
            f"{everybody.size}: mpi4py has loaded another library than this mpirun's "
            f"({MPI.Get_library_version().split(',')[0].split(chr(10))[0].strip()}), or the "
            f"variables are left over; {_MPI_FIX}"
        )
    host = everybody.Split_type(MPI.COMM_TYPE_SHARED)
    address = None
    if everybody.rank == 0:
        alone = host.size == everybody.size
        address = ("127.0.0.1" if alone else socket.gethostname(), free_port(""))
    name, port = everybody.bcast(address)
    os.environ.update(
        RANK=str(everybody.rank),
        WORLD_SIZE=str(everybody.size),
        LOCAL_RANK=str(host.rank),
        LOCAL_WORLD_SIZE=str(host.size),
        MASTER_ADDR=name,
        MASTER_PORT=str(port),
    )


def srun_ranks(environment: Mapping[str, str], address_of: Callable[[str], str]) -> dict[str, str]:
    """torch's variables from Slurm's; the port follows from the job and its step."""
    step = int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address_of(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + step % PORT_COUNT),
    }


def _address_of(nodes: str) -> str:
    """NodeAddr of the first node of a Slurm list; a node's name need not resolve.

    Falls back to MASTER_ADDR, e.g. in a container without scontrol.
    Raises: InputError if neither is known.
    """
    try:
        first = _scontrol("show", "hostnames", nodes).split()[0]
        shown = _scontrol("show", "node", first)
        return next(w.split("=", 1)[1] for w in shown.split() if w.startswith("NodeAddr="))
    except (OSError, subprocess.SubprocessError, LookupError, StopIteration) as error:
        if given := os.environ.get("MASTER_ADDR"):
            return given
        odd = isinstance(error, LookupError | StopIteration)
        why = "it names no NodeAddr" if odd else getattr(error, "stderr", None) or str(error)
        raise InputError(
            f"srun's ranks meet at the first of the nodes {nodes}, and scontrol does not tell its "
            f"address ({why.strip()}): is slurmctld up, and scontrol on PATH? Else export "
            "MASTER_ADDR, the address of that node"
        ) from error


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout
