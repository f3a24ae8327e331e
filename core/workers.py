"""Which worker of a data job this process is, by a flag or by the environment."""

import os
from dataclasses import dataclass

from core.errors import InputError
from core.launch_environment import as_number, ranks_of

COUNT = "TAPIR_WORKERS"
WORKER = "TAPIR_WORKER"
"""Environment variable: i/n, for a worker of an array that is split over several jobs."""
_JOBS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("JOB_COMPLETION_INDEX", COUNT, ""),
)
"""(number, count, first number) of a Slurm array and a Kubernetes indexed job."""


@dataclass(frozen=True, kw_only=True)
class JobWorker:
    """Which of a data job's workers a process is."""

    number: int
    count: int

    @property
    def text(self) -> str:
        """For logs: i/n."""
        return f"{self.number}/{self.count}"


def job_worker_of(text: str) -> JobWorker:
    """Parse i/n; if empty, read the environment; the default is 0/1.

    Raises: InputError for anything else.
    """
    if text:
        number, _, count = text.partition("/")
        return _checked(number, count, f"--worker {text!r}")
    if text := os.environ.get(WORKER, ""):
        number, _, count = text.partition("/")
        return _checked(number, count, f"{WORKER}={text!r} in the environment")
    for number_name, count_name, first_name in _JOBS:
        if number_name in os.environ:
            return _of_job(number_name, count_name, first_name)
    ranks = ranks_of()
    return JobWorker(number=ranks.rank, count=ranks.size) if ranks else JobWorker(number=0, count=1)


def _of_job(number_name: str, count_name: str, first_name: str) -> JobWorker:
    count = os.environ.get(count_name, "")
    if not count:
        raise InputError(
            f"{number_name} is set, but not how many workers there are; export {count_name}"
        )
    number = as_number(os.environ[number_name])
    first = as_number(os.environ.get(first_name) or "0") if first_name else 0
    where = ", ".join(filter(None, (number_name, count_name, first_name)))
    if number is None or first is None:
        raise InputError(f"{where} in the environment must be whole numbers")
    return _checked(str(number - first), count, where)


def _checked(number: str, count: str, where: str) -> JobWorker:
    i, n = as_number(number), as_number(count)
    if i is None or n is None or i >= n:
        raise InputError(f"{where} must be i/n with 0 <= i < n, e.g. 0/4")
    return JobWorker(number=i, count=n)
