"""Settings of jobs on Slurm."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_OPTION = re.compile(r"--[^\x00-\x1f\x7f]+")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """sbatch settings of every job."""

    partition: str = ""
    """Partition; empty = the default one."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that nodes must have."""
    exclude: str = ""
    """Nodes that are never used."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """What starts the ranks: torchrun on each node, or srun itself."""
    warn_seconds: int = 120
    """A job receives SIGUSR1 this many seconds before its time limit, so that it saves."""
    doctor: bool = True
    """Check every node before the ranks start, and exclude bad ones."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, e.g. --reservation=NAME."""

    def problems(self) -> list[str]:
        problems = []
        if self.launcher not in ("torchrun", "srun"):
            problems.append(f"slurm.launcher={self.launcher!r} must be torchrun or srun")
        if self.warn_seconds < 1:
            problems.append("slurm.warn_seconds must be at least 1")
        for option in self.extra:
            if not _OPTION.fullmatch(option):
                problems.append(
                    f"slurm.extra: {option!r} must begin with -- and be one line, e.g. "
                    "--reservation=NAME"
                )
        words = (self.partition, self.account, self.qos, self.constraint, self.exclude)
        if any(re.search(r"[\s\x00-\x1f\x7f]", word) for word in words):
            problems.append(
                "slurm.partition, account, qos, constraint, exclude must not have spaces"
            )
        return problems


def folder_problems(out: Path) -> list[str]:
    """Problems of a chain's folder whose logs sbatch names.

    Slurm takes a backslash in a log's name for a mark that nothing in the name is replaced.
    """
    if re.search(r"[\\\x00-\x1f\x7f]", str(out)):
        return [f"out={str(out)!r} must be without backslashes and line breaks: Slurm writes logs"]
    return []
