"""Which part of a data job this process does: given, or read from what started it."""

import os
from dataclasses import dataclass

from core.errors import InputError

COUNT = "TAPIR_WORKERS"
_LAUNCHERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("JOB_COMPLETION_INDEX", COUNT, ""),
    ("PMI_RANK", "PMI_SIZE", ""),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
    ("RANK", "WORLD_SIZE", ""),
)
"""(number, count, first number) of a Slurm array, a Kubernetes indexed job, MPI and torchrun."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One worker of a job."""

    number: int
    count: int

    @property
    def text(self) -> str:
        """For logs: i/n."""
        return f"{self.number}/{self.count}"


def member_of(text: str) -> Member:
    """Parse i/n; without it, ask the environment; alone if nobody started several.

    Raises: InputError for anything else.
    """
    if text:
        number, _, count = text.partition("/")
        return _checked(number, count, f"--worker {text!r}")
    for number_name, count_name, first_name in _LAUNCHERS:
        if number_name in os.environ:
            count = os.environ.get(count_name, "")
            if not count:
                raise InputError(
                    f"{number_name} is set, but not how many workers there are; export {count_name}"
                )
            first = int(os.environ.get(first_name, "0") or 0) if first_name else 0
            number = os.environ[number_name]
            if number.isdigit():
                number = str(int(number) - first)
            return _checked(number, count, f"{number_name}, {count_name}")
    return Member(number=0, count=1)


def _checked(number: str, count: str, where: str) -> Member:
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise InputError(f"{where} must be i/n with 0 <= i < n, e.g. 0/4")
    return Member(number=int(number), count=int(count))
