"""Run the stages of a run file here, one after the other, each as the command a user could type."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.chain import Chain, Job
from cluster.local import LocalConfig, commands
from cluster.processes import start, stop
from core.errors import EXIT_WRONG_INPUT, InputError, TapirError
from core.files.atomic import canonical_json, write_atomic
from core.log import LOG
from workflow.chain.stages import chain_of
from workflow.run_file import FOLDERS, STAGES, RunFile

SECONDS = "seconds.json"
_LOOK = 0.5
_SAVING = 180.0
"""Seconds in which a stage that ran out of time saves a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LocalStage:
    """One step of a run: commands that run side by side."""

    name: str
    """Its folder."""
    commands: list[list[str]]


def stages_of(run: RunFile) -> list[LocalStage]:
    """The stages of a run file, in the order of their execution."""
    chain = chain_of(run, "local")
    return [_stage(chain, job) for job in chain.jobs if job.name in STAGES]


def _stage(chain: Chain, job: Job) -> LocalStage:
    here = len(chain.tapir())
    arguments = [command[here:] for command in commands(chain, job, LocalConfig())]
    return LocalStage(name=FOLDERS.get(job.name, job.name), commands=arguments)


def named(stage: LocalStage, name: str) -> LocalStage:
    """The same commands with another folder for their log."""
    return replace(stage, name=name)


def run_stage(
    stage: LocalStage,
    folder: Path,
    environment: dict[str, str],
    limit: float = 0.0,
    is_late: Callable[[], bool] | None = None,
) -> bool:
    """Run a stage, show its log and note its seconds; False if it was stopped.

    It is stopped after `limit` seconds (0 = never), or when `is_late`, which is asked again and
    again, says so. A stopped training run has saved a checkpoint.
    Raises: TapirError naming the stage that failed, with its log.
    """
    began = time.monotonic()

    def must_stop() -> bool:
        over = bool(limit) and time.monotonic() > began + limit
        return over or (is_late is not None and is_late())

    log = folder / stage.name / "log.txt"
    LOG.info("stage %s: tapir %s", stage.name, " ".join(stage.commands[0]))
    running: list[Any] = []
    try:
        for command in stage.commands:
            whole = [sys.executable, "-P", "-m", "tapir", *command]
            running.append(start(whole, log, {**os.environ, **environment}))
        finished = _wait(stage, running, log, must_stop)
    finally:
        for process in running:
            stop(process)
    _note(folder, stage.name, time.monotonic() - began)
    LOG.info("stage %s took %.0f s", stage.name, time.monotonic() - began)
    return finished


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds of each stage so far."""
    path = folder / SECONDS
    return dict(json.loads(path.read_text())) if path.exists() else {}


def typed(stages: list[LocalStage]) -> list[str]:
    """The commands as a user types them."""
    return ["tapir " + " ".join(command) for stage in stages for command in stage.commands]


def _note(folder: Path, name: str, seconds: float) -> None:
    done = seconds_of(folder)
    done[name] = round(max(done.get(name, 0.0), seconds), 1)
    write_atomic(folder / SECONDS, canonical_json(done))


def _wait(stage: LocalStage, running: list[Any], log: Path, must_stop: Callable[[], bool]) -> bool:
    """Wait for all commands, and show their logs; False if they were stopped."""
    shown = log.stat().st_size if log.exists() else 0
    waiting, stopped = True, False
    while waiting:
        waiting = any(process.poll() is None for process in running)
        with open(log, "rb") as file:
            file.seek(shown)
            news = file.read()
        shown += len(news)
        for line in news.decode(errors="replace").splitlines():
            LOG.info("  %s", line)
        failed = [process for process in running if process.poll() not in (None, 0)]
        if failed and not stopped:
            raise _failure(stage, failed[0].returncode, log)
        if waiting and not stopped and must_stop():
            LOG.warning("stage %s is out of time: it saves and stops", stage.name)
            stopped = True
            for process in running:
                stop(process, _SAVING)
        time.sleep(_LOOK if waiting else 0)
    return not any(process.returncode for process in running)


def _failure(stage: LocalStage, code: int, log: Path) -> TapirError:
    if code == EXIT_WRONG_INPUT:
        return InputError(
            f"stage {stage.name} refused its input (above, and in {log}); mend it, or give "
            "another --out"
        )
    return TapirError(
        f"stage {stage.name} failed with exit code {code}; its log is {log}; the same command "
        "goes on from here"
    )
