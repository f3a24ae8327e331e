"""The driver: creates each stage's object once the markers before it are there.

It keeps no state that it needs: each round reads the markers and the objects, whose names are
fixed, so a driver that takes over after a kill creates nothing twice.
"""

import time
from dataclasses import dataclass, field

from cluster.chain import CANCELLED, SCRIPTS, Chain, Job
from cluster.kubernetes.client import ApiClient, ApiError
from cluster.kubernetes.config import KubernetesConfig, jobs_name
from cluster.kubernetes.outcome import Outcome, outcome_of
from cluster.kubernetes.stages import stage_objects
from core.errors import EXIT_GAVE_UP, EXIT_WRONG_INPUT, InputError
from core.files.atomic import Json, canonical_json, write_atomic
from core.log import LOG

NOTES = "kubernetes.json"
"""File in the chain's folder of scripts: what the driver last knew of each stage, for people."""
_LOOK = 2.0
_MARKER_SECONDS = 120.0
"""A network file system may show a pod's marker to the driver this late."""
_REFUSED = (400, 404, 422)
"""HTTP status of an object that the server will never take."""
_FORBIDDEN, _FORBIDDEN_ROUNDS = (401, 403), 30
_QUOTA = "exceeded quota"
_OVER = ("done", "failed", "not run")


@dataclass
class _Stage:
    job: Job
    state: str = "waiting"
    """waiting, running, restarting, done, failed or not run."""
    why: str = ""
    starts: int = 0
    """How often this driver created its object."""
    complete_since: float | None = field(default=None, repr=False)


class Driver:
    """Brings the stages of a chain to their end, one round after the other."""

    def __init__(self, chain: Chain, config: KubernetesConfig, client: ApiClient) -> None:
        self._chain, self._config, self._client = chain, config, client
        self._stages = {job.name: _Stage(job) for job in chain.jobs}

    def run(self) -> int:
        """Rounds until all stages are over; returns 0, or the exit code of a failed chain.

        Raises: InputError if the server refuses an object or the driver's rights do not suffice.
        """
        forbidden = 0
        while not self._is_over():
            if (self._chain.out / CANCELLED).exists():
                LOG.warning("the chain was cancelled")
                return EXIT_GAVE_UP
            try:
                self.round()
                forbidden = 0
            except ApiError as error:
                forbidden += error.status in _FORBIDDEN and _QUOTA not in str(error)
                if error.status in _REFUSED or forbidden > _FORBIDDEN_ROUNDS:
                    raise InputError(f"the API server refuses: {error}{_hint(error)}") from error
                LOG.warning("%s; asking again", error)
            if not self._is_over():
                time.sleep(_LOOK)
        return self._exit_code()

    def _is_over(self) -> bool:
        return all(stage.state in _OVER for stage in self._stages.values())

    def _exit_code(self) -> int:
        failed = [stage for stage in self._stages.values() if stage.state == "failed"]
        if not failed:
            return 0
        wrong = any(f"exit code {EXIT_WRONG_INPUT} " in stage.why for stage in failed)
        return EXIT_WRONG_INPUT if wrong else EXIT_GAVE_UP

    def round(self) -> None:
        """Look once at every stage that is not over. Raises: ApiError."""
        for stage in self._stages.values():
            if stage.state not in _OVER:
                self._advance(stage)

    def _advance(self, stage: _Stage) -> None:
        before = [self._stages[n].state for n in stage.job.after if n in self._stages]
        if any(state in ("failed", "not run") for state in before):
            self._note(stage, "not run", "an earlier stage failed")
        elif all(state == "done" for state in before):
            self._drive(stage)

    def _drive(self, stage: _Stage) -> None:
        *_, main = objects = stage_objects(self._chain, stage.job, self._config)
        done, name = self._chain.is_done(stage.job), main["metadata"]["name"]
        current = self._client.get(main["kind"], self._config.namespace, name)
        if current is None and done:
            self._note(stage, "done")
        elif current is None:
            made = [self._client.create(each) for each in objects]
            stage.starts += made[-1]
            self._note(stage, "running")
        else:
            self._watch(stage, current, done)

    def _watch(self, stage: _Stage, current: Json, done: bool) -> None:
        """Judge a stage's object; its pods have ended before the next stage starts."""
        outcome = outcome_of(current)
        restarts = self._config.kind == "job" and not outcome.is_final
        if outcome.state == "deleting":
            self._note(stage, "restarting")
        elif outcome.state == "active":
            self._note(stage, "running")
        elif done:
            self._note(stage, "done")
        elif outcome.state == "complete":
            self._miss_markers(stage)
        elif restarts:
            self._note(stage, "restarting", f"{outcome.reason}: {outcome.message}")
            self._client.delete(current)
        else:
            self._note(stage, "failed", self._why(stage, outcome))

    def _why(self, stage: _Stage, outcome: Outcome) -> str:
        """The controller's reason; for a JobSet that of its Job, which names the exit code."""
        if self._config.kind == "jobset":
            name, space = jobs_name(self._chain, stage.job), self._config.namespace
            current = self._client.get("Job", space, name)
            outcome = outcome_of(current) if current else outcome
        return f"{outcome.reason}: {outcome.message}"

    def _miss_markers(self, stage: _Stage) -> None:
        stage.complete_since = stage.complete_since or time.monotonic()
        if time.monotonic() - stage.complete_since > _MARKER_SECONDS:
            self._note(
                stage,
                "failed",
                f"its pods ended well, but {self._chain.out}/markers does not hold "
                f"{', '.join(stage.job.markers())}: is claim {self._config.claim} shared?",
            )

    def _note(self, stage: _Stage, state: str, why: str = "") -> None:
        """Log and write down a change."""
        if (state, why) == (stage.state, stage.why):
            return
        stage.state, stage.why = state, why
        level = LOG.error if state == "failed" else LOG.info
        level("%s: %s%s", stage.job.name, state, f" ({why})" if why else "")
        body = {
            name: {"state": each.state, "why": each.why, "starts": each.starts}
            for name, each in self._stages.items()
        }
        write_atomic(self._chain.out / SCRIPTS / NOTES, canonical_json(body))


def _hint(error: ApiError) -> str:
    if error.status == 404 and "jobsets" in str(error):
        return "; is JobSet installed? Without it set kubernetes.kind: job"
    return ""
