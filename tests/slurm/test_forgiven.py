"""Failures on a real Slurm: forgiven as long as checkpoints come, the end of a job if none do."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.files.atomic import unseal
from tests.harness import PATIENCE, processes_with, rows_of, tapir
from tests.slurm.cluster import Slurm
from tests.slurm.test_slurm import finish, states, wait_for, write

FAILURES = int(os.environ.get("TAPIR_FORGIVEN", "4"))
"""Of the run that survives them; more than `retries`."""
NODE_EVERY = 4
"""One failure in so many is a lost node, the one that `tapir job` runs on."""


def _prior(tokens: Path, steps: int, every: int) -> dict[str, Any]:
    """A prior over two nodes."""
    flags: dict[str, Any] = {"data": str(tokens), "loop.steps": steps, "checkpoint.every": every}
    flags |= {"loop.global_batch_size": 8, "loop.log_every": 1, "loop.validate_every": 0}
    return {"prior": {"nodes": 2, "cpus": 2, "flags": {**flags, "model.layers": 1}}}


def _newest(out: Path) -> int:
    paths = (out / "prior" / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name[5:]) for path in paths), default=0)


def _wait_for_a_newer(slurm: Slurm, out: Path) -> None:
    """Wait for a newer checkpoint; `tapir status` ends Slurm's hold of a requeued job."""
    before, until = _newest(out), time.monotonic() + 2 * PATIENCE
    while _newest(out) <= before:
        assert time.monotonic() < until, tapir("logs", str(out), **slurm.environment)
        states(slurm, out)
        for _ in range(50):
            if _newest(out) > before:
                return
            time.sleep(0.1)


def _kill_command(out: Path) -> None:
    """Kill srun, torchrun and the ranks on all nodes, but not `tapir job`."""
    for pid in processes_with(f"--out={out}/prior"):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if "--name=prior" not in psutil.Process(pid).cmdline():
                os.kill(pid, signal.SIGKILL)


def _lose_node(slurm: Slurm, out: Path) -> None:
    """Lose the node that `tapir job` runs on; it comes back once Slurm has noticed."""
    node = int(states(slurm, out)["prior"].partition("[")[2][:1])
    slurm.kill_node(node)
    wait_for(lambda: "RUNNING" not in states(slurm, out)["prior"])
    slurm.start_node(node)


@pytest.mark.big
def test_failures_are_forgiven(slurm: Slurm, tokens: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "forgiven", 40 * FAILURES
    path = write(out, _prior(tokens, steps, 2), launcher="srun", doctor=False)  # starts sooner
    tapir("submit", str(path), **slurm.environment)
    for number in range(1, FAILURES + 1):
        _wait_for_a_newer(slurm, out)
        if number % NODE_EVERY:
            _kill_command(out)
        else:
            _lose_node(slurm, out)
    assert finish(slurm, out)["prior"] == "done", tapir("logs", str(out), **slurm.environment)
    marker = unseal((out / "markers" / "prior.json").read_bytes(), "prior.json")
    assert marker["starts"] > FAILURES, "a start may fail by itself, e.g. if its port is taken"
    assert [row["step"] for row in rows_of(out / "prior")] == list(range(1, steps + 1))


@pytest.mark.big
def test_failures_at_one_step_end_the_job(slurm: Slurm, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop"
    tapir("submit", str(write(out, _prior(tokens, 100_000, 50_000))), **slurm.environment)
    for _ in range(4):
        (out / "prior" / "metrics.jsonl").unlink(missing_ok=True)  # a start removes its rows
        wait_for(lambda: states(slurm, out) and rows_of(out / "prior"))
        _kill_command(out)
    assert finish(slurm, out)["prior"] == "ended: FAILED (exit code 70:0)"
    log = tapir("logs", str(out), **slurm.environment)
    assert "job prior gives up: 4 failures before a checkpoint since 20" in log
    assert f"Mend the cause, then: tapir resume {out}" in log
