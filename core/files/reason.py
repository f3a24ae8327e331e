"""Why a job's command failed: its processes leave it in a file, since launchers hide exit codes.

torchrun and mpirun end with a code of their own, whatever the code of the rank that failed first.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from core.config import from_json, to_json
from core.errors import EXIT_FAILED, EXIT_GAVE_UP, TapirError

REASON_FILE = "TAPIR_REASON"
"""Environment variable: the file for the error that ends a job's command."""
_LONGEST = 2000


@dataclass(frozen=True, kw_only=True)
class Reason:
    """The first error of a job's command."""

    text: str
    code: int
    """Exit code of the process that failed."""
    retry: bool
    """False if no other start would help."""

    @property
    def job_code(self) -> int:
        """Exit code of the job: EXIT_GAVE_UP for an error that no other start mends."""
        return EXIT_GAVE_UP if self.code == EXIT_FAILED and not self.retry else self.code


def leave_reason(error: BaseException) -> None:
    """Write an error to this job's reason file, unless another process was first."""
    place = os.environ.get(REASON_FILE)
    if not place:
        return
    known = error if isinstance(error, TapirError) else TapirError()
    text = str(error) if isinstance(error, TapirError) else f"{type(error).__name__}: {error}"
    reason = Reason(text=text[:_LONGEST], code=known.exit_code, retry=known.retry)
    with contextlib.suppress(OSError), open(place, "x") as file:
        file.write(json.dumps(to_json(reason)))


def read_reason(path: Path) -> Reason | None:
    """The reason that a command left; None without one, or if its process died while writing."""
    try:
        return from_json(Reason, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, TapirError):
        return None
