"""Workers of a data job are spread over the GPUs that they see."""

import pytest

from core.gpus import gpu_of_worker
from parallel.device import CPU, worker_device


@pytest.mark.parametrize(
    ("number", "gpus", "environment", "expected"),
    [
        (0, 1, {}, 0),
        (5, 4, {}, 1),  # by hand, --worker 5/8
        (7, 1, {"SLURM_ARRAY_TASK_ID": "7"}, 0),  # a GPU a task
        (6, 4, {"RANK": "6", "LOCAL_RANK": "2"}, 2),  # torchrun
        (1, 2, {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 0),  # mpirun that deals nodes in turn
        (9, 4, {"MPI_LOCALRANKID": "5"}, 1),  # more workers than GPUs
    ],
)
def test_which_gpu_a_worker_takes(
    number: int, gpus: int, environment: dict[str, str], expected: int
) -> None:
    assert gpu_of_worker(number, gpus, environment) == expected


def test_without_a_gpu_workers_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker_device(3) == CPU
