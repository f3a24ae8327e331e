"""The GPUs of this machine and which of them a rank takes, without torch.

Importing torch takes seconds, and asking it may start CUDA, after which a process must not fork.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

DEVICES = Path("/dev")
"""Where the driver puts a file for each GPU, nvidia0, nvidia1, ...; a pod may see others."""
_SHARED = ("TORCHELASTIC_RUN_ID", "TAPIR_RENDEZVOUS")
"""Set by launchers whose ranks all see the same GPUs."""
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
"""A process's place on its machine, as torchrun, MPICH and Open MPI tell it."""


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


def local_ranks(environment: Mapping[str, str]) -> int:
    """Ranks on this machine, as far as the launcher tells; 1 if it does not."""
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in environment:
            return int(environment[name])
    counts: list[int] = []
    for word in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


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


def gpu_of_rank(local_rank: int, ranks: int, gpus: int, own: bool) -> tuple[int, list[str]]:
    """Which of the GPUs that a rank sees is its own, and what is wrong.

    Where the launcher shows each rank GPUs of its own, the first one is taken as soon as there are
    fewer than ranks.
    """
    ranks = max(ranks, local_rank + 1)
    if own and ranks > gpus:
        return 0, []
    problems = gpu_problems(ranks, gpus)
    return (0 if problems else local_rank), problems


def gpu_of_worker(number: int, gpus: int, environment: Mapping[str, str] = os.environ) -> int:
    """Which of the GPUs that a worker of a job sees it takes; more workers than GPUs share them.

    Its place on this machine decides where the launcher tells it, else its number in the job.
    """
    told = [environment[name] for name in _LOCAL_RANKS if name in environment]
    return int(told[0] if told else number) % gpus
