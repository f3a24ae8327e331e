"""Count this machine's GPUs and choose one for each rank, without torch.

Importing torch takes seconds, and asking it may start CUDA, after which a process must not fork.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from core.launch_environment import RENDEZVOUS, local_rank

DEVICES = Path("/dev")
"""The driver creates nvidia0, nvidia1, ... here; a pod may see other numbers."""
_SHARED = ("TORCHELASTIC_RUN_ID", RENDEZVOUS)
"""Set by launchers whose ranks all see the same GPUs."""


def gpu_devices() -> list[str]:
    """Device files of NVIDIA GPUs."""
    return sorted(str(path) for path in DEVICES.glob("nvidia[0-9]*"))


@cache
def built_for_cuda() -> bool:
    """True if the installed torch is built for CUDA; does not import it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(spec.submodule_search_locations[0], "version.py")
    text = version.read_text() if version.exists() else ""
    return re.search(r"^cuda\b[^=]*= *['\"]", text, re.MULTILINE) is not None


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that CUDA shows to a process with this environment.

    CUDA_VISIBLE_DEVICES is read up to its first invalid entry (-1, or a number beyond the last
    GPU). An empty list, or one that names a GPU twice, hides all GPUs.
    """
    there = len(gpu_devices())
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return there
    seen: list[str] = []
    for entry in (word.strip() for word in named.split(",")):
        known = entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < there)
        if not known:
            break
        seen.append(entry)
    return min(len(seen), there) if len(set(seen)) == len(seen) else 0


def usable_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that the installed torch can use with this environment."""
    return visible_gpus(environment) if built_for_cuda() else 0


def own_gpus(environment: Mapping[str, str]) -> bool:
    """True if the launcher may show each rank its own GPUs (srun --gpus-per-task, MPI)."""
    return not any(name in environment for name in _SHARED)


def gpu_problems(ranks: int, gpus: int) -> list[str]:
    """Check that a machine whose ranks all see the same GPUs has one for each.

    Without any GPU, any number of ranks runs on the CPU.
    """
    if gpus == 0 or ranks <= gpus:
        return []
    return [
        f"{ranks} ranks on this machine, but {gpus} visible GPU{'s'[: gpus > 1]}, and each rank "
        f"needs one: start {gpus} rank{'s'[: gpus > 1]} here (a smaller mesh, e.g. --mesh.data "
        f"{gpus}; one rank: --mesh.data 1 --engine.name reference), show more GPUs by "
        "CUDA_VISIBLE_DEVICES, or hide all of them (CUDA_VISIBLE_DEVICES=) to train on the CPU"
    ]


def gpu_of_rank(place: int, ranks: int, gpus: int, own: bool) -> tuple[int, list[str]]:
    """(index of a local rank's GPU among those that it sees, problems).

    `own`: the launcher may show each rank its own GPUs. A rank then takes the first one if it sees
    fewer GPUs than there are ranks.
    """
    if place < 0:
        return 0, [f"local rank {place} is not a place among the ranks of this machine (0, 1, ...)"]
    ranks = max(ranks, place + 1)
    if own and ranks > gpus:
        return 0, []
    problems = gpu_problems(ranks, gpus)
    return (0 if problems else place), problems


def gpu_of_worker(number: int, gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """Index of the GPU that a worker of a job takes; workers share GPUs if there are too few.

    The local rank decides if the launcher sets one, else the worker's number in the job.
    Raises: InputError if the launcher's local rank is not a number.
    """
    place = local_rank(environment)
    return (number if place is None else place) % gpus
