"""The ranks of one model as the server sees them: started, watched, restarted, and spoken to.

A thread runs the launcher, which ends all ranks when one dies; then it starts them again. Rank 0
connects to a Unix socket of this process. Imports no torch.
"""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.config import SupervisorConfig
from cluster.launcher import StopRequest, launch
from core.config import to_json
from core.errors import TapirError
from core.files.temporary import private_folder
from core.log import LOG
from generation.config import ModelPaths
from parallel.engines.registry import MEGATRON
from serving.config import ServeConfig
from serving.ranks.messages import Draw, Frame, ModelFacts, RankSettings, packed, read_frame

State = Literal["starting", "ready", "restarting", "failed", "stopped"]
TARGET = "serving.ranks.worker:rank_main"
_PRELOAD = ["torch", "torch.distributed", "serving.ranks.worker"]
_SUPERVISION = SupervisorConfig(hang_seconds=600.0, grace_seconds=10.0)
"""Rank 0 gives a sign of life at each step, and every 10 s without work; none while it loads."""

_MOST_UNREAD = 64
"""Pictures of a request that wait for its client, before further unfinished ones are dropped."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture that rank 0 sent."""

    candidate: int
    row: int
    """Rows of tokens that are drawn, if it is unfinished; else 0."""
    score: float
    codes: tuple[int, ...]
    png: bytes
    warnings: tuple[str, ...] = ()
    """What of the caption the models do not read or know."""


class JobError(Exception):
    """Why a request got no pictures, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Job:
    """A request whose pictures arrive one by one, and wait here for a client that reads slowly."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.warnings: tuple[str, ...] = ()
        self.left = draw.candidates
        """Pictures that have not arrived."""
        self._arrived: asyncio.Queue[Drawn | JobError] = asyncio.Queue()

    def put(self, arrived: Drawn | JobError) -> None:
        """Add a picture, or what ends the request; drops unfinished ones that nobody reads."""
        unfinished = isinstance(arrived, Drawn) and arrived.row > 0
        if not unfinished:
            self.left -= 1
        elif self._arrived.qsize() >= _MOST_UNREAD:
            return
        self._arrived.put_nowait(arrived)

    async def next(self) -> Drawn:
        """Wait for the next picture. Raises: JobError."""
        arrived = await self._arrived.get()
        if isinstance(arrived, JobError):
            raise arrived
        return arrived


class RankGroup:
    """The ranks of one model; all methods belong to the event loop's thread."""

    def __init__(self, config: ServeConfig, name: str, models: ModelPaths, number: int = 0) -> None:
        self.name = name
        self.state: State = "starting"
        self.facts: ModelFacts | None = None
        self.error: TapirError | None = None
        """Why the state is `failed`."""
        self.restarts, self.busy_rows, self.waiting = 0, 0, 0
        self._config, self._models, self._number = config, models, number
        self._jobs: dict[int, Job] = {}
        self._last = 0
        self._writer: asyncio.StreamWriter | None = None
        self._stop, self._was_ready = StopRequest(), False
        self._folder: Path | None = None
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None

    @property
    def unfinished(self) -> int:
        """Requests that wait or are decoded."""
        return len(self._jobs)

    async def start(self) -> None:
        """Start the ranks; `state` tells when they are ready."""
        self._folder = private_folder("tapir-serve")
        path = self._folder / "link"
        self._server = await asyncio.start_unix_server(self._speak, path)
        settings = RankSettings(
            models=self._models,
            mesh=self._config.mesh,
            rows=self._config.rows,
            precision=self._config.precision,
            rerank=self._config.rerank,
            link=str(path),
            number=self._number,
        )
        payload = json.dumps(to_json(settings))
        loop = asyncio.get_running_loop()
        name = f"ranks of {self.name}"
        arguments = (payload, loop.call_soon_threadsafe)
        self._thread = threading.Thread(target=self._run, args=arguments, name=name, daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the ranks; unfinished requests fail."""
        self._enter("stopped")
        self._fail_jobs("the server is shutting down")
        self._stop.ask()
        if self._writer is not None:
            self._writer.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._server is not None:
            self._server.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def submit(self, draw: Callable[[int], Draw], pixels: bytes = b"") -> Job:
        """Send a request to the ranks; `draw` makes it from its number.

        Raises: JobError if the ranks are not ready, or too many requests are unfinished.
        """
        if self.state != "ready" or self._writer is None:
            raise self.unavailable()
        if self.unfinished >= self._config.limits.waiting:
            message = f"{self.unfinished} requests are waiting, which is the limit; try again later"
            raise JobError(429, message, "rate_limit_exceeded")
        self._last += 1
        job = Job(draw(self._last))
        self._jobs[self._last] = job
        self._writer.write(packed("draw", asdict(job.draw), *([pixels] if pixels else [])))
        return job

    def finish(self, job: Job) -> None:
        """Forget a request; if it is unfinished, its rows are freed."""
        if self._jobs.pop(job.draw.job, None) is not None and self._writer is not None:
            self._writer.write(packed("cancel", {"job": job.draw.job}))

    def unavailable(self) -> JobError:
        """Why requests are refused now."""
        why = {
            "starting": "is being loaded",
            "restarting": "is being started again after a rank died",
            "stopped": "is shutting down",
        }.get(self.state, f"cannot be started: {self.error}")
        return JobError(503, f"the model {self.name} {why}", "server_unavailable")

    def _run(self, payload: str, tell: Callable[..., object]) -> None:
        """The thread: start the ranks, and again when they have failed."""
        failures, ranks = 0, self._config.mesh.world
        preload = [*_PRELOAD, *([MEGATRON] if ranks > 1 else [])]
        while not self._stop.asked:
            restarts = self.restarts
            try:
                launch(TARGET, payload, ranks, preload, _SUPERVISION, self._stop)
                error = TapirError("the ranks ended")
            except TapirError as raised:
                error = raised
            except Exception as raised:
                error = TapirError(f"the ranks cannot be started: {raised!r}")
            if self._stop.asked:
                return
            failures = 1 if self._was_ready else failures + 1
            self._was_ready = False
            if not error.retry or failures > _SUPERVISION.max_restarts:
                tell(self._give_up, error)
                return
            pause = _SUPERVISION.backoff_seconds * 2 ** (failures - 1)
            LOG.warning("%s: %s; the ranks start again in %.1f s", self.name, error, pause)
            self.restarts = restarts + 1
            self._stop.sleep(pause)

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of rank 0, from its start to its end."""
        self._writer = writer
        while (frame := await read_frame(reader)) is not None:
            self._heed(frame)
        if self._writer is writer:
            self._writer = None
            if self.state == "ready":
                self._enter("restarting")
            self._fail_jobs("a rank of this model died; it is being started again, try again soon")
            self.busy_rows = self.waiting = 0
        writer.close()

    def _heed(self, frame: Frame) -> None:
        body = frame.body
        if frame.kind == "ready":
            self.facts, self._was_ready = ModelFacts(**body), True
            self._enter("ready")
        elif frame.kind == "load":
            self.busy_rows, self.waiting = body["rows"], body["waiting"]
        elif (job := self._jobs.get(body["job"])) is None:
            return  # cancelled meanwhile
        elif frame.kind == "failed":
            del self._jobs[job.draw.job]
            job.put(JobError(400, body["message"], "invalid_value"))
        elif frame.kind == "warnings":
            job.warnings = tuple(body["warnings"])
        else:
            job.put(
                Drawn(
                    candidate=body["candidate"],
                    row=body["row"],
                    score=body["score"],
                    codes=tuple(body["codes"]),
                    png=frame.blobs[0],
                    warnings=job.warnings,
                )
            )
            if not job.left:  # its client may still be reading
                del self._jobs[job.draw.job]

    def _give_up(self, error: TapirError) -> None:
        self.error = error
        self._enter("failed")
        self._fail_jobs(f"the ranks of this model cannot be started: {error}")

    def _enter(self, state: State) -> None:
        if self.state != "stopped":
            self.state = state

    def _fail_jobs(self, message: str) -> None:
        jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.put(JobError(503, message, "server_unavailable"))
