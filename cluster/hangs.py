"""Detect ranks that are stopped or hang, and report their stacks and last collectives."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from cluster.config import SupervisorConfig
from cluster.processes import is_stopped
from core.errors import RankError
from core.heartbeat import DIAGNOSE, Beat, read_beats

_PATIENCE = 2.0
"""Seconds for the ranks to write stacks and collectives."""
_FRAMES = 6


class Watch:
    """Watches the ranks of one launch."""

    def __init__(
        self, processes: list[Any], folder: Path, config: SupervisorConfig, reports: Path | None
    ) -> None:
        """`folder` holds heartbeats and stacks; `reports` keeps them after a hang."""
        self._processes, self._folder = processes, folder
        self._config, self._reports = config, reports
        self._began = time.monotonic()
        self._stopped: dict[int, float] = {}

    def look(self) -> None:
        """Raise RankError for a rank that is stopped, or has no heartbeat, for too long."""
        now, ranks = time.monotonic(), len(self._processes)
        for rank, process in enumerate(self._processes):
            if not is_stopped(process.pid):
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) > self._config.stopped_seconds:
                seconds = self._config.stopped_seconds
                self._give_up(rank, f"is stopped (SIGSTOP) since {seconds:.0f} s")
        beats = read_beats(self._folder, ranks)
        last = max([self._began, *(beat.time for beat in beats)])
        if now - last > self._config.hang_seconds:
            rank = _culprit(beats, ranks)
            self._give_up(rank, f"hangs: no rank gave a sign of life for {now - last:.0f} s")

    def _give_up(self, rank: int, what: str) -> None:
        ranks = len(self._processes)
        beats = read_beats(self._folder, ranks)
        self._ask_where()
        rows = [f"rank {b.rank}: after step {b.step}, last in {b.doing}" for b in beats]
        stack, flight = self._stack(rank), self._flight(rank)
        kept = self._keep()
        raise RankError(
            f"rank {rank} of {ranks} {what}; all ranks were ended; the same command goes on from "
            "the last checkpoint\n"
            + "\n".join([*rows, *flight, *stack, *([f"all stacks: {kept}"] if kept else [])])
        )

    def _ask_where(self) -> None:
        """Make every rank write its stacks (faulthandler) and its last collectives (a thread)."""
        (self._folder / DIAGNOSE).touch()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, signal.SIGUSR2)
                os.kill(process.pid, signal.SIGCONT)
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            if len(list(self._folder.glob("flight-*.json"))) == len(self._processes):
                break
            time.sleep(0.1)

    def _stack(self, rank: int) -> list[str]:
        """The innermost frames of a rank's main thread."""
        try:
            text = (self._folder / f"stacks-{rank}.txt").read_text()
        except OSError:
            return []
        threads = [part for part in text.split("\n\n") if part.strip()]
        main = next((part for part in threads if part.startswith("Current thread")), "")
        main = main or (threads[-1] if threads else "")
        return [f"stack of rank {rank}:", *main.splitlines()[1 : 1 + _FRAMES]] if main else []

    def _flight(self, rank: int) -> list[str]:
        """A rank's last collective, from torch's flight recorder."""
        try:
            entries = json.loads((self._folder / f"flight-{rank}.json").read_text())["entries"]
        except (OSError, ValueError, KeyError):
            return []
        if not entries:
            return []
        last = entries[-1]
        state = "done" if last.get("retired") else "not done"
        return [
            f"last collective of rank {rank}: {last.get('profiling_name')} "
            f"{last.get('input_sizes')}, number {last.get('collective_seq_id')}, {state}"
        ]

    def _keep(self) -> Path | None:
        if self._reports is None:
            return None
        with contextlib.suppress(OSError):
            shutil.rmtree(self._reports, ignore_errors=True)
            self._reports.mkdir(parents=True)
            for path in [*self._folder.glob("stacks-*"), *self._folder.glob("flight-*")]:
                shutil.copy(path, self._reports)
            return self._reports
        return None


def _culprit(beats: list[Beat], ranks: int) -> int:
    """The rank that others wait for: without heartbeat, else not in a collective, else last."""
    silent = sorted(set(range(ranks)) - {beat.rank for beat in beats})
    if silent:
        return silent[0]
    return min(beats, key=lambda beat: (" over " in beat.doing, beat.step, beat.time)).rank
