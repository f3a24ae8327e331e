"""Which launcher started the ranks, by its environment variables, and where they may meet.

Imports no torch.
"""

import os
import socket
from collections.abc import Mapping

from core.errors import InputError


def ranks_given(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks torchrun, mpirun, srun or our launcher started; None if nobody did.

    Raises: InputError if a variable holds no number.
    """
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in environment:
            return _ranks(name, environment)
    return srun_size(environment) or None


def _ranks(name: str, environment: Mapping[str, str]) -> int:
    text = environment[name]
    if not (text.isdecimal() and text.isascii() and int(text) > 0):
        raise InputError(f"{name}={text!r} in the environment is no number of ranks; unset it")
    return int(text)


def mpi_size(environment: Mapping[str, str] = os.environ) -> int:
    """Ranks that an mpirun started, 0 if none did.

    Raises: InputError if a variable holds no number.
    """
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in environment:
            return _ranks(name, environment)
    return 0


def srun_size(environment: Mapping[str, str] = os.environ) -> int:
    """Ranks that an srun started, 0 if none did; a batch script alone is none.

    Raises: InputError if a variable holds no number.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 0
    name = "SLURM_STEP_NUM_TASKS"
    return _ranks(name, environment) if name in environment else 0


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens at now; "" = on every address of this machine."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])
