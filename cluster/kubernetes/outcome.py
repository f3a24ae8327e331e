"""How a stage's object stands, from its status: alike for a Job and a JobSet."""

from dataclasses import dataclass
from typing import Any, Literal

from cluster.kubernetes.stages import FINAL_REASONS

_DONE = ("Complete", "Completed")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """State of a stage's object."""

    state: Literal["active", "deleting", "complete", "failed"]
    reason: str = ""
    """Why it failed."""
    message: str = ""
    """The controller's text of the failure."""

    @property
    def is_final(self) -> bool:
        """True if an exit code ended it, so that no restart helps; for the reason of a Job."""
        return self.reason in FINAL_REASONS


def outcome_of(current: dict[str, Any]) -> Outcome:
    """Read the conditions of a Job or a JobSet."""
    if current["metadata"].get("deletionTimestamp"):
        return Outcome(state="deleting")
    for condition in current.get("status", {}).get("conditions", []):
        if condition["status"] != "True":
            continue
        if condition["type"] in _DONE:
            return Outcome(state="complete")
        if condition["type"] == "Failed":
            reason, message = condition.get("reason", ""), condition.get("message", "")
            return Outcome(state="failed", reason=reason, message=message)
    return Outcome(state="active")
