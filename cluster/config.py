"""Settings of the supervisor; imports no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """What happens when a rank dies, hangs or is asked to stop."""

    max_restarts: int = 3
    """Consecutive failures without a new step; the next one ends the run."""
    backoff_seconds: float = 1.0
    """Seconds before the first restart; doubled for each failure without progress, at most 60."""
    hang_seconds: float = 300.0
    """A rank without a heartbeat for this long is lost: its stack is shown, all ranks are ended."""
    stopped_seconds: float = 10.0
    """A rank that is stopped (SIGSTOP) for this long is lost."""
    grace_seconds: float = 60.0
    """Time to finish the step and save after SIGTERM or SIGUSR1; then all ranks are ended."""

    def problems(self) -> list[str]:
        problems = []
        if self.max_restarts < 0:
            problems.append(
                "supervisor.max_restarts must not be negative; 0 = end at the first failure"
            )
        seconds = (
            self.backoff_seconds,
            self.hang_seconds,
            self.stopped_seconds,
            self.grace_seconds,
        )
        if not all(0 < each < math.inf for each in seconds):
            problems.append("supervisor's seconds must be positive numbers")
        return problems
