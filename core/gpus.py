"""The GPUs of this machine and which of them a rank takes, without torch.

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
"""Where the driver puts a file for each GPU, nvidia0, nvidia1, ...; a pod may see others."""
_SHARED = ("TORCHELASTIC_RUN_ID", RENDEZVOUS)
"""Set by launchers whose ranks all see the same GPUs."""


def gpu_devices() -> list[str]:
    """Device files of NVIDIA GPUs."""
    return sorted(str(path) for path in DEVICES.glob("nvidia[0-9]*"))


@cache
def built_for_cuda() -> bool:
    """Say whether the installed torch is a build for CUDA; it is not imported."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = Path(spec.submodule_search_locations[0], "version.py")
    text = version.read_text() if version.exists() else ""
    return re.search(r"^cuda\b[^=]*= *['\"]", text, re.MULTILINE) is not None


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """How many GPUs CUDA would show a process with this environment.

    CUDA_VISIBLE_DEVICES counts up to its first entry that is none: a number beyond the last GPU,
    or -1; an empty one hides all, and so does one that names a GPU twice.
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
    """How many GPUs the installed torch could use in a process with this environment."""
    return visible_gpus(environment) if built_for_cuda() else 0


def own_gpus(environment: Mapping[str, str]) -> bool:
    """Say whether the launcher may show each rank GPUs of its own (srun --gpus-per-task, MPI)."""
    return not any(name in environment for name in _SHARED)


def gpu_problems(ranks: int, gpus: int) -> list[str]:
    """What is wrong with so many ranks on a machine that shows all of them these GPUs.

    Without any GPU ranks run on the CPU, as many as are wanted.
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
    """Which of the GPUs that a rank sees is its own, by its place on the machine; what is wrong.

    Where the launcher shows each rank GPUs of its own, the first one is taken as soon as there are
    fewer than ranks.
    """
    if place < 0:
        return 0, [f"local rank {place} is no place among the ranks of this machine (0, 1, ...)"]
    ranks = max(ranks, place + 1)
    if own and ranks > gpus:
        return 0, []
    problems = gpu_problems(ranks, gpus)
    return (0 if problems else place), problems


def gpu_of_worker(number: int, gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """Which of the GPUs that a worker of a job sees it takes; more workers than GPUs share them.

    Its place on this machine decides where the launcher tells it, else its number in the job.
    Raises: InputError if what the launcher tells is no number.
    """
    place = local_rank(environment)
    return (number if place is None else place) % gpus
