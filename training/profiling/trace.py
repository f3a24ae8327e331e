"""torch.profiler traces of some steps, for Perfetto, Chrome and TensorBoard's plugin.

Traces are requested by flags, or during a run by a file that rank 0 checks at each row of
metrics.jsonl; the row's gather distributes the request, so that all ranks begin at the same step.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from core.config import check
from core.errors import InputError
from core.files.atomic import TEMPORARY, write_atomic
from core.log import LOG
from parallel.device import CPU
from training.profiling.categories import ProfileConfig, parse_ranks, parse_steps
from training.profiling.clock import Timeline
from training.profiling.ring import FOLDER
from training.run.config import settings_of_run
from training.run.tail import Follower

REQUEST = "request.json"
ENDING = ".pt.trace.json.gz"
"""Opened by both TensorBoard's plugin (torch-tb-profiler) and Perfetto."""
MOST_STEPS = 100
"""Maximum steps of a requested trace: all events are in memory until its end."""
Plan = dict[str, Any]
"""{"first": step, "last": step, "ranks": list, empty for all}."""


class Tracer:
    """Traces planned steps of one rank."""

    def __init__(
        self,
        config: ProfileConfig,
        out: Path,
        rank: int,
        timeline: Timeline,
        device: torch.device = CPU,
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._out, self._rank, self._timeline = out, rank, timeline
        self._first = self._last = -1
        self._running: Any = None
        self._planned: list[tuple[int, int]] = []
        """(first, last) steps of all traces, on any rank."""
        self._mine: list[tuple[int, int]] = []
        """(first, last) steps of this rank's traces."""
        if config.steps:
            first, last = parse_steps(config.steps)
            self.plan({"first": first, "last": last, "ranks": parse_ranks(config.ranks)})

    def plan(self, plan: Plan | None) -> None:
        """Plan a trace of steps first ... last, if this rank is in it."""
        if plan is None:
            return
        steps = plan["first"], plan["last"]
        self._planned.append(steps)
        if not plan["ranks"] or self._rank in plan["ranks"]:
            self._mine.append(steps)

    def asked(self, step: int) -> Plan | None:
        """Rank 0: read and delete the request file, and return the requested trace after `step`.

        The file stays while the trace would overlap another one.
        """
        path = self._out / FOLDER / REQUEST
        if self._rank or not path.exists():
            return None
        try:
            body = json.loads(path.read_bytes())
            first, last = step + 1, step + int(body["steps"])
            ranks = [int(rank) for rank in body["ranks"]]
            if any(begin <= last and first <= end for begin, end in self._planned):
                return None
            path.unlink()
            return {"first": first, "last": last, "ranks": ranks}
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOG.error("%s is not a request for a trace: %s", path, error)
            return None

    def begin(self, step: int) -> None:
        """Begin a step: start, continue or end a trace."""
        if self._running is not None and step > self._last:
            self.close()
        if self._running is not None:
            self._running.step()
            return
        for first, last in self._mine:
            if first <= step <= last:
                self._first, self._last = first, last
                self._start()
                return

    def close(self) -> None:
        """End and write the current trace, if any."""
        running, self._running = self._running, None
        if running is None:
            return
        self._timeline.ranges = None
        running.stop()
        folder = self._out / FOLDER / f"trace-{self._first}-{self._last}"
        name = f"rank-{self._rank}.{time.time_ns()}{ENDING}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(folder / f"{TEMPORARY}{name}"))
            os.replace(folder / f"{TEMPORARY}{name}", folder / name)
            LOG.info("trace of rank %d: %s", self._rank, folder / name)
        except (OSError, RuntimeError) as error:
            LOG.error("cannot write a trace to %s: %s; training goes on", folder, error)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(
            activities=activities,
            schedule=lambda _step: ProfilerAction.RECORD,
            record_shapes=True,
        )
        self._running.start()
        self._timeline.ranges = []


def traces(run: Path) -> list[Path]:
    """The traces of a run, oldest first."""
    paths = (run / FOLDER).glob(f"trace-*/rank-*{ENDING}")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def request_trace(run: Path, steps: int, ranks: list[int]) -> None:
    """Request a trace of the next steps of a run in progress; no ranks = all.

    Raises: InputError if it is not a run folder, or the run has ended; ConfigError for invalid
    steps or ranks, or if another request is pending.
    """
    follower = Follower(run)
    follower.look()
    if follower.finished:
        raise InputError(f"{run} has ended at step {follower.steps}: no step is left to trace")
    _, settings = settings_of_run(run)
    path, problems = run / FOLDER / REQUEST, []
    if steps < 1:
        problems.append(f"a trace of {steps} steps holds nothing; ask for at least 1")
    if steps > MOST_STEPS:
        problems.append(
            f"a trace of {steps} steps is too long: the profiler keeps every event in memory until "
            f"its end; ask for at most {MOST_STEPS}"
        )
    world = settings.mesh.world
    if wrong := [rank for rank in ranks if not 0 <= rank < world]:
        text = ", ".join(map(str, wrong))
        problems.append(f"the run has no rank {text}; its ranks are 0 to {world - 1}")
    if path.exists():
        problems.append(
            f"another request waits in {path}; it is heeded with the next row of metrics.jsonl, "
            "after a trace in progress; ask again then, or delete it"
        )
    check(problems)
    write_atomic(path, json.dumps({"steps": steps, "ranks": ranks}).encode())
