"""One device a rank, chosen once, before anything else touches CUDA."""

import os
import time
from collections.abc import Mapping

import torch
from torch.distributed.distributed_c10d import Store

from core.config import check
from core.errors import ConfigError
from core.gpus import gpu_of_rank, gpu_of_worker, own_gpus
from core.launch_environment import local_rank, local_ranks

CPU = torch.device("cpu")
_backends = {"cpu": "gloo", "cuda": "nccl"}
"""Device type -> backend of its process groups."""
_shared = False
"""True if several ranks may use one GPU."""


def share_devices(kind: str, backend: str) -> None:
    """Let a backend that is registered carry the tensors of a type of device on shared devices.

    NCCL refuses two ranks on a GPU; with a backend that stages its messages in host memory, all
    meshes run on one card. For tests.
    """
    global _shared
    _backends[kind], _shared = backend, True


def backends(device: torch.device) -> str:
    """The backends of a world's process groups: gloo for host tensors, and the device's.

    Returns a string for `torch.distributed.init_process_group`.
    """
    if device.type == "cpu":
        return _backends["cpu"]
    return f"cpu:{_backends['cpu']},{device.type}:{_backends[device.type]}"


def rank_device(environment: Mapping[str, str] = os.environ) -> torch.device:
    """Choose this rank's device and make it torch's current one; the CPU if no GPU is visible.

    Raises: ConfigError if this machine has more ranks than GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return CPU
    local, ranks = local_rank(environment) or 0, local_ranks(environment)
    index, problems = gpu_of_rank(local, ranks, gpus, own_gpus(environment))
    if _shared:
        index, problems = local % gpus, []
    check(problems)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def worker_device(number: int = 0) -> torch.device:
    """Choose the device of a job's worker, or of a single process, and make it torch's current one.

    Workers exchange no tensors, so that several may use one GPU.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return CPU
    index = gpu_of_worker(number, gpus)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def refuse_shared_gpus(store: Store, device: torch.device, rank: int) -> None:
    """Check that no two ranks have the same GPU, if the launcher gave each its own.

    Raises: ConfigError on the second rank that has the same GPU.
    """
    if device.type != "cuda" or _shared:
        return
    name = str(torch.cuda.get_device_properties(device).uuid)
    if store.add(f"tapir-gpu-{name}", 1) > 1:
        raise ConfigError(
            f"rank {rank}: another rank of this world has the same GPU ({name}); start one rank a "
            "GPU, or give each its own (srun --gpus-per-task=1)"
        )


def wait_for(device: torch.device) -> None:
    """Synchronise with a device; a no-op on CPUs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up the time that this process spends in a context."""

    def __init__(self) -> None:
        self._seconds, self._began = 0.0, 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def seconds(self) -> float:
        """Seconds in all."""
        return self._seconds


class CudaStopwatch(Stopwatch):
    """Adds up the time that the current stream spends in a context, by events.

    A collective returns to the host as soon as it is queued: only the stream knows how long it
    waited for other ranks. Unfinished events are counted by a later call of `seconds`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._first = self._mark()

    def __enter__(self) -> None:
        self._first = self._mark()

    def __exit__(self, *_: object) -> None:
        self._pairs.append((self._first, self._mark()))

    def seconds(self) -> float:
        """Seconds of all finished events."""
        pending = []
        for first, last in self._pairs:  # those of several streams end in any order
            if last.query():
                self._seconds += float(first.elapsed_time(last)) / 1000
            else:
                pending.append((first, last))
        self._pairs = pending
        return self._seconds

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def stopwatch(device: torch.device) -> Stopwatch:
    """A stopwatch for work on a device."""
    return CudaStopwatch() if device.type == "cuda" else Stopwatch()
