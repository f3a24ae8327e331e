"""The job of a rehearsed life as its scheduler sees it: start it, hit it, check what is left."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.processes import start, stop
from core.config import to_json
from core.errors import EXIT_PREEMPTED, TapirError
from core.log import LOG
from core.storage.store import FolderStore
from data_pipeline.jobs import leases
from planning.life.config import (
    LEASES,
    MARKS,
    ROWS,
    RUN,
    STAGE,
    Event,
    LifePlan,
    done,
    due,
    lease_of,
)
from planning.life.counts import FIRST, SAVE
from planning.life.engine import block_name, weight_after
from training.export.weights import open_model
from training.run.folder import beats_of, read_metrics

_LOOK = 0.1
_RESTARTS = "all ranks start again"
"""What the supervisor logs at a restart."""
_SHOWN = 2000
"""Characters of the job's log in an error."""


class Job:
    """The job's folder and processes."""

    def __init__(self, plan: LifePlan, place: Path, port: int, store_port: int) -> None:
        """`port` leads to the ranks' store at `store_port`."""
        self.plan, self.place, self.run = plan, place, place / RUN
        self._log, self._payload = place / "job.log", place / "payload.json"
        body = {"settings": to_json(plan.settings(self.run)), "place": str(place), "port": port}
        body |= {"store_port": store_port, "events": [event.step for event in plan.events()]}
        self._payload.write_text(json.dumps(body))
        (place / ROWS).mkdir()
        self.rows: list[dict[str, Any]] = []
        """What each rank reported in the last start."""
        self._marks: list[dict[str, Any]] = []
        """Rank 0's marks of all starts, in order."""
        self._times: list[float] = []
        """When the job was started, at each event, when it stopped, and when it ended."""

    def live(self) -> None:
        """Run the job through all events to its end.

        Raises: TapirError if it ends otherwise.
        """
        events = list(enumerate(self.plan.events()))
        self._times = [time.monotonic()]
        while True:
            process = self._start()
            try:
                while process.poll() is None:
                    if events and (self.place / due(events[0][0])).exists():
                        self._do(*events.pop(0), process)
                    time.sleep(_LOOK)
            finally:
                stop(process)
            self._times.append(time.monotonic())
            if process.returncode != EXIT_PREEMPTED or events:
                break
        if process.returncode or events:
            raise self._wrong(f"exit code {process.returncode}, {len(events)} events to come")
        marks = (self.place / MARKS).read_text().splitlines()
        self._marks = [json.loads(line) for line in marks]
        for rank in range(self.plan.world):
            self.rows.append(json.loads((self.place / ROWS / f"{rank}.json").read_text()))

    def check(self) -> None:
        """Raise TapirError if anything is missing, double or wrong after the end."""
        plan, problems = self.plan, []
        rows = [row for row in read_metrics(self.run) if row.get("split") is None]
        steps = [row["step"] for row in rows]
        if steps != list(range(1, plan.steps + 1)):
            problems.append(f"metrics.jsonl has the steps {steps}")
        restarts = self._log.read_text().count(_RESTARTS)
        if restarts != plan.losses:
            problems.append(f"the supervisor restarted {restarts} times after {plan.losses} losses")
        saves = {mark["step"] for mark in self._marks if mark["what"] == SAVE}
        if unsaved := sorted(set(range(plan.every, plan.steps + 1, plan.every)) - saves):
            problems.append(f"no checkpoints were begun after the steps {unsaved}")
        problems += [row["save_error"] for row in rows if "save_error" in row]
        model = open_model(self.run, STAGE)
        for rank in range(plan.world):
            if set(model.read(block_name(rank)).tolist()) != {weight_after(rank, plan.steps)}:
                problems.append(f"the finished model lacks steps of rank {rank}, or has some twice")
        left = FolderStore(self.place / LEASES).names(leases.FOLDER)
        lost = Counter(event.rank for event in plan.events() if event.rank is not None)
        for rank, times in lost.items():
            names = [name for name in left if lease_of(rank) in name]
            if len(names) < times:
                problems.append(f"rank {rank} was lost {times} times, and left {len(names)} leases")
        if problems:
            raise self._wrong("; ".join(problems))

    def seconds(self) -> dict[str, float]:
        """Seconds of the parts of the job's life."""
        marks = self._marks
        began, *losses, preempted, stopped, ended = self._times
        firsts = [mark["time"] for mark in marks if mark["what"] == FIRST]
        restarts = [first - loss for first, loss in zip(firsts[1:], losses, strict=False)]
        saves = [
            after["time"] - before["time"]
            for before, after in pairwise(marks)
            if before["what"] == after["what"] == SAVE
        ]
        return {
            "a start": firsts[0] - began,
            **({"a restart after a loss, median": statistics.median(restarts)} if losses else {}),
            "a step and a checkpoint, median": statistics.median(saves),
            "a stop with a checkpoint": stopped - preempted,
            "a resumed start": firsts[-1] - stopped,
            "the end: checkpoint and model": ended - marks[-1]["time"],
            "all": ended - began,
        }

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "planning.life", str(self._payload)]
        return start(command, self._log)

    def _do(self, number: int, event: Event, process: "subprocess.Popen[bytes]") -> None:
        """Kill a rank, or ask the job to stop."""
        self._times.append(time.monotonic())
        if event.rank is None:
            LOG.info("%d ranks: preempted after step %d", self.plan.world, event.step)
            process.terminate()  # rank 0 goes on when it hears of it
            process.wait()
        else:
            LOG.info(
                "%d ranks: rank %d is lost after step %d", self.plan.world, event.rank, event.step
            )
            pids = {beat.rank: beat.pid for beat in beats_of(self.run)}
            if event.rank not in pids:
                raise self._wrong(f"rank {event.rank} has no heartbeat")
            os.kill(pids[event.rank], signal.SIGKILL)
        (self.place / done(number)).touch()

    def _wrong(self, what: str) -> TapirError:
        tail = self._log.read_text(errors="replace")[-_SHOWN:]
        return TapirError(f"the life of {self.plan.world} ranks went wrong: {what}\n{tail}")
