"""What launchers say of a process in its environment: read in one place, checked as a whole.

torchrun and Tapir's launcher set RANK and WORLD_SIZE; MPICH and Open MPI variables of their own;
srun one for each step of a job. One of them alone, or an odd value, is refused by name: a process
that guesses would train alone, or wait for ranks that nobody started.
"""

import os
import re
import socket
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from core.errors import InputError

T = TypeVar("T")
RENDEZVOUS = "TAPIR_RENDEZVOUS"
"""Where the ranks of Tapir's own launcher meet."""
_LONGEST = 18
_LAST_PORT = 65_535
_MPI = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
"""A process's place on its machine, as torchrun, MPICH and Open MPI tell it."""
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
_FIX = "torchrun, mpirun and srun set all that they need; a process alone needs none"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that a launcher started."""

    launcher: Literal["torchrun", "mpirun", "srun"]
    """Whose variables say so; Tapir's own launcher sets torchrun's."""
    rank: int
    size: int


class Variables:
    """Reads numbers from an environment and notes everything that is wrong with them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: dict[str, str] = {}
        """What is wrong, by the variable's name."""

    def __contains__(self, name: str) -> bool:
        return name in self.environment

    def number(self, name: str, what: str, least: int = 0, most: int | None = None) -> int:
        """A variable's number; one that is absent, odd or out of bounds is noted, and `least`."""
        text = self.environment.get(name)
        if text is None:
            self.problems[name] = f"{name} is not set in the environment ({what})"
            return least
        number = as_number(text)
        if number is None or number < least or (most is not None and number > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            self.problems[name] = f"{name}={text!r} in the environment is no {what} ({bounds})"
            return least
        return number

    def pair(self, rank: str, size: str) -> tuple[int, int]:
        """A rank and how many there are."""
        ranks = self.number(size, "number of ranks", 1)
        known = as_number(self.environment.get(size, "")) == ranks
        return self.number(rank, f"rank of {size}", 0, ranks - 1 if known else None), ranks

    def check(self) -> None:
        """Raise InputError with everything that was noted."""
        if self.problems:
            raise InputError("\n".join((*self.problems.values(), _FIX)))


def as_number(text: str) -> int | None:
    """A text of ASCII digits as a number; None for all else, signs and spaces included."""
    plain = text.isascii() and text.isdecimal() and len(text) <= _LONGEST
    return int(text) if plain else None


def ranks_of(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """What torchrun, mpirun, srun or Tapir's launcher made this process; None if nobody did.

    torchrun counts before mpirun and srun, inside of which it may run, and mpirun before srun. A
    step of one task (srun --pty bash) is no launcher, and neither is its MPI of one rank.
    Raises: InputError with every variable that is odd, or there without the others it needs.
    """
    return _checked(environment, _started)


def check_launch(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """`ranks_of`, for ranks that are to meet: the place on the machine and the address, too."""
    variables = Variables(environment)
    ranks = _started(variables)
    _local_rank(variables)
    _local_ranks(variables)
    if ranks is not None and ranks.launcher == "torchrun" and ranks.size > 1:
        _address(variables)
    variables.check()
    return ranks


def address_of_ranks(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of the store that ranks meet at.

    Raises: InputError if they are not known, or the port is none.
    """
    return _checked(environment, _address)


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's place on its machine; None if no launcher tells it. Raises: InputError."""
    return _checked(environment, _local_rank)


def local_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Ranks on this machine, as far as the launcher tells; 1 if it does not. Raises: InputError."""
    return _checked(environment, _local_ranks)


def refuse_left_socket(environment: Mapping[str, str] = os.environ) -> None:
    """Raise InputError if PMI_FD is no socket of this process: MPI would end it from C."""
    text = environment.get("PMI_FD")
    if text is None:
        return
    try:
        is_socket = stat.S_ISSOCK(os.fstat(int(text)).st_mode)
    except (OSError, ValueError, OverflowError):
        is_socket = False
    if not is_socket:
        raise InputError(
            f"PMI_FD={text!r} in the environment is no socket of mpirun's: `unset PMI_FD PMI_RANK "
            f"PMI_SIZE` if they are left over from elsewhere; {_FIX}"
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
                break  # srun's own MPI, maybe of the step around this one
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
    """Tasks of the Slurm step that this process is in; 0 outside of one, as in a batch script."""
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
            "0's machine, or start the ranks by torchrun"
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
                f"SLURM_STEP_TASKS_PER_NODE={text!r} in the environment is no list of numbers"
            )
            return 1
        counts += [int(match[1])] * int(match[2] or 1)
    asked = "SLURM_NODEID" in variables or len(counts) > 1
    node = variables.number("SLURM_NODEID", "number of a node of this step") if asked else 0
    return counts[node] if node < len(counts) else 1


def ranks_given(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks torchrun, mpirun, srun or our launcher started; None if nobody did.

    Raises: InputError with every launcher's variable that is odd, or lacks the others it needs.
    """
    ranks = check_launch(environment)
    return ranks.size if ranks else None


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens at now; "" = on every address of this machine."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])
