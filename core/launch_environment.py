"""Read and check the environment variables of torchrun, mpirun, srun and Tapir's launcher.

torchrun and Tapir's launcher set RANK and WORLD_SIZE; MPICH, Open MPI and srun set their own. An
invalid or incomplete set is refused by name: a process that guesses would train alone, or wait
for ranks that never started.
"""

import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from core.errors import InputError

T = TypeVar("T")
RENDEZVOUS = "TAPIR_RENDEZVOUS"
"""Environment variable: the address of the store of Tapir's own launcher."""
FIRST_PORT, PORT_COUNT = 20_000, 12_000
"""Jobs of Slurm meet at one of these ports, by their number."""
_FIRST_FREE, _PORT_ATTEMPTS = 10_240, 1_000
_LONGEST = 18
_LAST_PORT = 65_535
_MPI = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Variables of torchrun, MPICH and Open MPI with the local rank."""
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
_FIX = "torchrun, mpirun and srun set all that they need; a process alone needs none"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank and world size, as a launcher set them."""

    launcher: Literal["torchrun", "mpirun", "srun"]
    """The launcher whose variables were read; Tapir's own sets torchrun's."""
    rank: int
    size: int


class Variables:
    """Reads numbers from an environment and collects all problems."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: dict[str, str] = {}
        """Problems by variable name."""

    def __contains__(self, name: str) -> bool:
        return name in self.environment

    def number(self, name: str, what: str, least: int = 0, most: int | None = None) -> int:
        """Read a number; notes a problem and returns `least` if it is missing or invalid."""
        text = self.environment.get(name)
        if text is None:
            self.problems[name] = f"{name} is not set in the environment ({what})"
            return least
        number = as_number(text)
        if number is None or number < least or (most is not None and number > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            self.problems[name] = f"{name}={text!r} in the environment is not a {what} ({bounds})"
            return least
        return number

    def pair(self, rank: str, size: str) -> tuple[int, int]:
        """Read (rank, number of ranks)."""
        ranks = self.number(size, "number of ranks", 1)
        known = as_number(self.environment.get(size, "")) == ranks
        return self.number(rank, f"rank of {size}", 0, ranks - 1 if known else None), ranks

    def check(self) -> None:
        """Raise InputError with everything that was noted."""
        if self.problems:
            raise InputError("\n".join((*self.problems.values(), _FIX)))


def as_number(text: str) -> int | None:
    """Parse ASCII digits; None for anything else, including signs and spaces."""
    plain = text.isascii() and text.isdecimal() and len(text) <= _LONGEST
    return int(text) if plain else None


def ranks_of(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Rank and world size of this process; None if no launcher started it.

    torchrun takes precedence over mpirun and srun, in which it may run, and mpirun over srun. A
    Slurm step of one task (srun --pty bash) is not a launcher, and neither is its MPI of one rank.
    Raises: InputError with every invalid or incomplete variable.
    """
    return _checked(environment, _started)


def check_launch(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """`ranks_of` for ranks that join a process group: also checks local rank and address."""
    variables = Variables(environment)
    ranks = _started(variables)
    _local_rank(variables)
    _local_ranks(variables)
    if ranks is not None and ranks.launcher == "torchrun" and ranks.size > 1:
        _address(variables)
    variables.check()
    return ranks


def address_of_ranks(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of the rendezvous store.

    Raises: InputError if they are missing or invalid.
    """
    return _checked(environment, _address)


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Local rank of this process; None if no launcher sets it. Raises: InputError."""
    return _checked(environment, _local_rank)


def local_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Number of ranks on this machine; 1 if no launcher sets it. Raises: InputError."""
    return _checked(environment, _local_ranks)


def refuse_left_socket(environment: Mapping[str, str] = os.environ) -> None:
    """Raise InputError if PMI_FD is not an open socket: MPI would abort the process."""
    text = environment.get("PMI_FD")
    if text is None:
        return
    try:
        is_socket = stat.S_ISSOCK(os.fstat(int(text)).st_mode)
    except (OSError, ValueError, OverflowError):
        is_socket = False
    if not is_socket:
        raise InputError(
            f"PMI_FD={text!r} in the environment is not a socket of mpirun's: `unset PMI_FD "
            f"PMI_RANK PMI_SIZE` if they are left over from elsewhere; {_FIX}"
        )


def _checked(environment: Mapping[str, str], read: Callable[[Variables], T]) -> T:
    variables = Variables(environment)
    result = read(variables)
    variables.check()
    return result


def _started(variables: Variables) -> Ranks | None:
    if "RANK" in variables and "WORLD_SIZE" in variables:
        rank, size = variables.pair("RANK", "WORLD_SIZE")
        return Ranks(launcher="torchrun", rank=rank, size=size)
    ranks = _by_mpi_or_srun(variables)
    others = f", and {ranks.launcher} started {ranks.size} ranks" if ranks else ""
    if "WORLD_SIZE" in variables:
        size = variables.number("WORLD_SIZE", "number of ranks", 1)
        if ranks is None or ranks.size != size:
            _note_alone(variables, "WORLD_SIZE", "RANK", others)
    if "RANK" in variables:
        _note_alone(variables, "RANK", "WORLD_SIZE", others)
    return ranks


def _note_alone(variables: Variables, name: str, missing: str, others: str = "") -> None:
    variables.problems.setdefault(
        name,
        f"{name}={variables.environment[name]!r} is in the environment without {missing}{others}: "
        f"`unset {name}` if it is left over from elsewhere, else export {missing} too",
    )


def _by_mpi_or_srun(variables: Variables) -> Ranks | None:
    for rank_name, size_name in _MPI:
        if rank_name in variables and size_name in variables:
            rank, size = variables.pair(rank_name, size_name)
            if size == 1 and _in_step(variables) and not variables.problems:
                break  # PMI variables of srun, maybe of an outer step
            return Ranks(launcher="mpirun", rank=rank, size=size)
        if size_name in variables:
            variables.number(size_name, "number of ranks", 1)
        for name, other in ((size_name, rank_name), (rank_name, size_name)):
            if name in variables and other not in variables:
                _note_alone(variables, name, other)
    if _step(variables) < 2:
        return None
    rank, size = variables.pair("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_LOCALID"):
        variables.number(name, "number that srun gave")
    if not variables.environment.get("SLURM_STEP_NODELIST"):
        variables.problems["nodes"] = "SLURM_STEP_NODELIST is not set in the environment"
    return Ranks(launcher="srun", rank=rank, size=size)


def _step(variables: Variables) -> int:
    """Number of tasks of this Slurm step; 0 outside of a step, e.g. in a batch script."""
    if not _in_step(variables):
        return 0
    return variables.number("SLURM_STEP_NUM_TASKS", "number of ranks", 1)


def _in_step(variables: Variables) -> bool:
    return "SLURM_STEP_ID" in variables and "SLURM_STEP_NUM_TASKS" in variables


def _address(variables: Variables) -> tuple[str, int]:
    if variables.environment.get(RENDEZVOUS):
        return "", 0
    name = variables.environment.get("MASTER_ADDR", "").strip()
    if not name:
        variables.problems["MASTER_ADDR"] = (
            "MASTER_ADDR is not set in the environment: on every rank export the address of rank "
            "0's node, or start the ranks by torchrun"
        )
    return name, variables.number("MASTER_PORT", "port that rank 0 listens at", 1, _LAST_PORT)


def _local_rank(variables: Variables) -> int | None:
    for name in _LOCAL_RANKS:
        if name in variables:
            size = variables.environment.get("LOCAL_WORLD_SIZE", "")
            most = as_number(size) if name == "LOCAL_RANK" else None
            return variables.number(name, "rank of this machine", 0, most and most - 1)
    if _step(variables) > 1:
        return variables.number("SLURM_LOCALID", "rank of this machine")
    return None


def _local_ranks(variables: Variables) -> int:
    for name in _LOCAL_SIZES:
        if name in variables:
            return variables.number(name, "number of ranks on this machine", 1)
    text = variables.environment.get("SLURM_STEP_TASKS_PER_NODE")
    if not text:
        return 1
    counts: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", word, re.ASCII)
        if match is None:
            variables.problems["tasks"] = (
                f"SLURM_STEP_TASKS_PER_NODE={text!r} in the environment is not a list of numbers"
            )
            return 1
        counts += [int(match[1])] * int(match[2] or 1)
    asked = "SLURM_NODEID" in variables or len(counts) > 1
    node = variables.number("SLURM_NODEID", "number of a node of this step") if asked else 0
    return counts[node] if node < len(counts) else 1


def ranks_given(environment: Mapping[str, str] = os.environ) -> int | None:
    """Number of ranks that a launcher started; None without a launcher.

    Raises: InputError with every invalid or incomplete variable.
    """
    ranks = check_launch(environment)
    return ranks.size if ranks else None


def free_port(address: str = "127.0.0.1", beside: int = 0) -> int:
    """A TCP port that is free now, as is the one `beside` ports above it.

    Linux gives outgoing connections ports of 32768 and more (ip_local_port_range); these lie
    below, so that none takes the port before its server does. An empty address = all interfaces.
    Raises: OSError if none is found.
    """
    for left in reversed(range(_PORT_ATTEMPTS)):
        port = _FIRST_FREE + secrets.randbelow(FIRST_PORT - _FIRST_FREE)
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind((address, port))
                if beside:
                    second.bind((address, port + beside))
            return port
        except OSError:
            if not left:
                raise
    raise AssertionError("the last attempt returns or raises")


def free_ports(count: int, beside: int = 0) -> list[int]:
    """Several of `free_port`, no two of them equal: none is taken yet when the next is chosen."""
    ports: list[int] = []
    while len(ports) < count:
        port = free_port(beside=beside)
        if port not in ports:
            ports.append(port)
    return ports
