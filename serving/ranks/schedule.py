"""Which candidates are decoded: earlier requests first, as rows of the batch become free."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from generation.config import DrawSettings
from generation.sampling.running import Candidate, RunningBatch
from generation.sampling.running_lane import Progress
from generation.sampling.sampler import Prompt
from serving.ranks.messages import Draw


@dataclass(kw_only=True, eq=False)
class Job:
    """A request that is being drawn."""

    draw: Draw
    settings: DrawSettings
    prompt: Prompt | None
    rows: dict[int, int] = field(default_factory=dict)
    """Candidates that are decoded now -> their number in the batch."""
    left: int = 0
    """Candidates that have not finished."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """What one step did for one candidate of a request."""

    job: Job
    candidate: int
    progress: Progress


class Schedule:
    """Requests in their order of arrival, on a running batch."""

    def __init__(self, batch: RunningBatch, candidate: Callable[[Job, int], Candidate]) -> None:
        """`candidate` makes the candidate of a request with a number."""
        self._batch, self._candidate = batch, candidate
        self._waiting: deque[tuple[Job, int]] = deque()
        self._jobs: dict[int, Job] = {}
        self._rows: dict[int, tuple[Job, int]] = {}

    @property
    def idle(self) -> bool:
        """True if a step would decode nothing."""
        return not self._waiting and not self._rows

    @property
    def busy_rows(self) -> int:
        """Rows of the batch that are taken."""
        return self._batch.rows - self._batch.free

    @property
    def waiting(self) -> int:
        """Candidates that wait for a row."""
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Append a request."""
        job.left = job.draw.candidates
        self._jobs[job.draw.job] = job
        self._waiting.extend((job, i) for i in range(job.draw.candidates))

    def cancel(self, number: int) -> None:
        """Drop a request; its rows are free at once. Nothing happens if it has finished."""
        job = self._jobs.pop(number, None)
        if job is None:
            return
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not job)
        for row in job.rows.values():
            self._batch.leave(row)
            del self._rows[row]

    def step(self) -> Iterator[Advance]:
        """Let waiting candidates join, in order, and decode one position of all.

        The first one that does not fit makes all later ones wait, so that guidance, which takes two
        rows, is not overtaken for ever.
        """
        while self._waiting and self._batch.fits(self._waiting[0][0].settings):
            job, number = self._waiting.popleft()
            row = self._batch.join(self._candidate(job, number))
            job.rows[number] = row
            self._rows[row] = job, number
        for progress in self._batch.step():
            job, number = self._rows[progress.row]
            if progress.finished:
                del self._rows[progress.row], job.rows[number]
                job.left -= 1
                if not job.left:
                    del self._jobs[job.draw.job]
            yield Advance(job=job, candidate=number, progress=progress)
