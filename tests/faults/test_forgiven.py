"""`tapir job` forgives failures between which the run gets on, and gives up a crash loop.

A failure is a SIGKILL of all processes below `tapir job`, or of them and `tapir job` itself, as
when a node is lost; this test then starts the same again, as a scheduler does.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.files.atomic import unseal
from tests.faults.conftest import Record
from tests.harness import PATIENCE, TAPIR, rows_of, start_tapir, tapir

FAILURES, FEW = int(os.environ.get("TAPIR_FORGIVEN", "5")), 6
"""Of a training (20 in `make faults`), and of a command that starts in no time."""
_WORK = """
import json, sys, time
from pathlib import Path

out = Path(sys.argv[1])
steps = [int(path.parent.name[5:]) for path in (out / "checkpoints").glob("step-*/manifest.json")]
for step in range(max(steps, default=0) + 1, int(sys.argv[2]) + 1):
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    time.sleep(0.05)
    if step % int(sys.argv[3]) == 0:
        folder = out / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        if (out / "end").exists():
            break
"""
"""Stands for a training that starts in no time: a row a step, a checkpoint every few."""
Command = Callable[[Path, int, int], list[str]]


def work(run: Path, steps: int, every: int) -> list[str]:
    """A command that takes 0.05 s for a step, until `steps` or RUN/end."""
    run.mkdir(parents=True, exist_ok=True)
    return [sys.executable, "-c", _WORK, str(run), str(steps), str(every)]


@pytest.fixture
def training(tokens: Path) -> Command:
    """A training of a small prior in one process."""

    def command(run: Path, steps: int, every: int) -> list[str]:
        flags = [f"--data={tokens}", f"--out={run}", f"--loop.steps={steps}", "--model.layers=1"]
        flags += ["--loop.global-batch-size=8", "--loop.log-every=1", "--loop.validate-every=0"]
        flags += [f"--checkpoint.every={every}", "--mesh.data=1", "--engine.name=reference"]
        return [sys.executable, *TAPIR[1:], "train", "prior", "tiny", *flags]

    return command


class Job:
    """A `tapir job` of this test, which starts it as often as a scheduler would."""

    def __init__(self, folder: Path, command: list[str], *flags: str) -> None:
        self.folder, self.run, self._log = folder, folder / "run", folder / "log"
        self._command = ["job", "--name=prior", f"--out={folder}", "--marker=prior.json"]
        self._command += [f"--checkpoints={self.run}/checkpoints", *flags, "--", *command]
        self.start()

    def start(self) -> None:
        self.process = start_tapir(*self._command, log=self._log)

    def kill(self, node: bool) -> None:
        """Kill the command with all its processes, and with `node` also `tapir job`."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        if node:
            os.killpg(self.process.pid, signal.SIGKILL)
            assert self.process.wait(PATIENCE) == -signal.SIGKILL
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(below, PATIENCE)
        if node:
            self.start()

    def newest(self) -> int:
        """Step of the newest whole checkpoint."""
        paths = (self.run / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name[5:]) for path in paths), default=0)

    def text(self) -> str:
        return self._log.read_text()


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def _kill_after_checkpoints(job: Job, failures: int) -> None:
    """Kill a job again and again, each time after a new checkpoint."""
    for number in range(failures):
        before = job.newest()
        _until(lambda: job.newest() > before)  # noqa: B023
        job.kill(node=number % 2 == 1)


def _kill_at_rows(job: Job, node: bool) -> None:
    """Kill a job four times after a new row, without a checkpoint, and wait for its end."""
    for _ in range(4):
        rows = len(rows_of(job.run))
        _until(lambda: len(rows_of(job.run)) > rows)  # noqa: B023
        job.kill(node)
    job.process.wait(PATIENCE)


def _assert_forgiven(job: Job, failures: int, steps: int) -> None:
    """The job ends well, in one start more than it was killed, and its record is gone."""
    job.process.wait(PATIENCE)
    assert job.process.returncode == 0, job.text()
    marker = unseal((job.folder / "markers" / "prior.json").read_bytes(), "prior.json")
    assert marker["starts"] == failures + 1
    assert job.newest() == steps and not (job.folder / "jobs" / "prior.starts").exists()


@pytest.mark.world
def test_failures_with_progress_between_them_are_forgiven(tmp_path: Path, fault: Record) -> None:
    fault(32, f"{FEW} SIGKILLs of a job, half of them with `tapir job`, progress between them")
    job = Job(tmp_path, work(tmp_path / "run", 10_000, 2))
    _kill_after_checkpoints(job, FEW)
    (job.run / "end").touch()
    job.process.wait(PATIENCE)
    _assert_forgiven(job, FEW, job.newest())
    fault.outcome("all forgiven, exit code 0")


@pytest.mark.world
@pytest.mark.parametrize("node", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_failures_at_one_step_are_the_end(tmp_path: Path, fault: Record, node: bool) -> None:
    fault(33, f"4 SIGKILLs at one step ({'a lost node' if node else 'the command'})")
    job = Job(tmp_path, work(tmp_path / "run", 10_000, 5000))
    _kill_at_rows(job, node)
    assert job.process.returncode == 70, job.text()
    assert "job prior gives up: 4 failures before a checkpoint since 20" in job.text()
    reason = "a lost node" if node else "last error: the command was killed (SIGKILL)"
    assert reason in job.text() and "(retries, now 3" in job.text()
    fault.outcome("given up with the reason, exit code 70")


@pytest.mark.slow
def test_a_training_survives_many_failures(
    training: Command, tmp_path: Path, fault: Record
) -> None:
    fault(32, f"{FAILURES} SIGKILLs of a training, half of them with `tapir job`")
    steps = 20 * FAILURES
    job = Job(tmp_path, training(tmp_path / "run", steps, 2))
    _kill_after_checkpoints(job, FAILURES)
    _assert_forgiven(job, FAILURES, steps)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, steps + 1))
    fault.outcome("all forgiven, every step logged once, exit code 0")


@pytest.mark.slow
@pytest.mark.parametrize("node", [False, True])
def test_a_training_that_dies_at_one_step_is_given_up(
    training: Command, tmp_path: Path, fault: Record, node: bool
) -> None:
    fault(33, f"4 SIGKILLs of a training at one step ({'a lost node' if node else 'its ranks'})")
    job = Job(tmp_path, training(tmp_path / "run", 100_000, 50_000))
    for _ in range(4):
        (job.run / "metrics.jsonl").unlink(missing_ok=True)  # a start removes the rows anyway
        _until(lambda: rows_of(job.run))
        job.kill(node)
    assert job.process.wait(PATIENCE) == 70, job.text()
    assert "job prior gives up: 4 failures before a checkpoint" in job.text()
    fault.outcome("given up with the reason, exit code 70")


@pytest.mark.world
def test_an_error_that_no_retry_mends_ends_a_job_at_once(tmp_path: Path) -> None:
    """The launcher hides the exit code, as torchrun does: the command leaves its reason."""
    tapir("pack", "shapes", str(tmp_path / "raw"), "--count=40", "--validation=0.2", "--block=8")
    shard = next((tmp_path / "raw" / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    verify = f"{sys.executable} -P -m tapir verify {tmp_path}/raw; exit 1"
    job = Job(tmp_path, ["bash", "-c", verify])
    assert job.process.wait(PATIENCE) == 70, job.text()
    record = json.loads((tmp_path / "jobs" / "prior.starts").read_text())
    (start,) = record["starts"]
    assert start["code"] == 70 and shard.name in start["reason"]
    assert "job prior ended with exit code 70: " in job.text()


@pytest.mark.world
def test_a_training_without_a_whole_checkpoint_gives_up(training: Command, tmp_path: Path) -> None:
    command = training(tmp_path / "run", 2, 1)[len(TAPIR) :]
    tapir(*command)
    for path in (tmp_path / "run").glob("checkpoints/*/rank-00000.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    (tmp_path / "run" / "model.safetensors").unlink()
    assert "no checkpoint of this run is whole" in tapir(*command, code=70)


@pytest.mark.world
def test_wrong_input_of_a_rank_ends_a_job_at_once(tmp_path: Path) -> None:
    wrong = f"{sys.executable} -P -m tapir train prior tiny --data={tmp_path}/none; exit 1"
    job = Job(tmp_path, ["bash", "-c", wrong])
    assert job.process.wait(PATIENCE) == 2, job.text()
    assert f"job prior ended with exit code 2: there is no data set at {tmp_path}" in job.text()
