"""Traces of some steps by torch.profiler, for Perfetto, Chrome and TensorBoard's plugin.

Asked for by flags, or from a run in progress by a file that rank 0 looks for with each row of
metrics.jsonl; all ranks learn of it in the row's gather, and so begin at the same step.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from core.errors import InputError
from core.files import TEMPORARY, write_atomic
from core.log import LOG
from training.config import ProfileConfig, parse_ranks, parse_steps
from training.profile_clock import Timeline
from training.profile_ring import FOLDER
from training.run_config import config_of

REQUEST = "request.json"
ENDING = ".pt.trace.json.gz"
"""What TensorBoard's plugin (torch-tb-profiler) and Perfetto both open."""
Plan = dict[str, Any]
"""{"first": step, "last": step, "ranks": numbers, none for all}."""


class Tracer:
    """One rank's; records while a planned step is under way."""

    def __init__(self, config: ProfileConfig, out: Path, rank: int, timeline: Timeline) -> None:
        self._out, self._rank, self._timeline = out, rank, timeline
        self._first = self._last = -1
        self._running: Any = None
        if config.steps:
            first, last = parse_steps(config.steps)
            self.plan({"first": first, "last": last, "ranks": parse_ranks(config.ranks)})

    def plan(self, plan: Plan | None) -> None:
        """Record some steps, both ends included, if this rank is one of those meant."""
        meant = plan is not None and (not plan["ranks"] or self._rank in plan["ranks"])
        if plan is not None and meant and self._running is None:
            self._first, self._last = plan["first"], plan["last"]

    def asked(self, step: int) -> Plan | None:
        """What rank 0's request file asks for behind a step; the file goes."""
        path = self._out / FOLDER / REQUEST
        if self._rank or not path.exists():
            return None
        try:
            body = json.loads(path.read_bytes())
            path.unlink()
            first, count = step + 1, int(body["steps"])
            return {"first": first, "last": step + count, "ranks": [int(r) for r in body["ranks"]]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOG.error("%s is no request for a trace: %s", path, error)
            return None

    def begin(self, step: int) -> None:
        """A step begins: record it, or end the trace before it."""
        if self._running is not None:
            if step > self._last:
                self.close()
            else:
                self._running.step()
        elif self._first <= step <= self._last:
            self._start()

    def close(self) -> None:
        """End the trace that may be recorded, and write it."""
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
        if torch.cuda.is_available():
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
    found = (run / FOLDER).glob(f"trace-*/rank-*{ENDING}")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def request_trace(run: Path, steps: int, ranks: list[int]) -> None:
    """Ask a run in progress for a trace of its next steps; no ranks = all.

    Raises: InputError for no run folder, or a number of steps below 1.
    """
    if steps < 1:
        raise InputError(f"a trace of {steps} steps holds nothing; ask for at least 1")
    config_of(run)
    body = json.dumps({"steps": steps, "ranks": ranks}).encode()
    write_atomic(run / FOLDER / REQUEST, body)
