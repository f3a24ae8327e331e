"""A run file on this machine: the chain runs in the background, is cancelled and continues."""

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.files.atomic import unseal
from tests.harness import PATIENCE, cold_tapir, json_of, processes_with, rows_of, tapir

_SHORT = {
    "loop.global_batch_size": 8,
    "loop.log_every": 1,
    "loop.validation_samples": 8,
    "mesh.data": 1,
    "model.width": 4,
}


def write(folder: Path, launcher: str = "tapir", **stages: Any) -> Path:
    """A run file for packing shapes and what is given."""
    pack = {"source": "shapes", "flags": {"count": 200, "validation": 0.2, "block": 8}}
    body = {"name": "small", "out": str(folder / "out"), "stages": {"pack": pack, **stages}}
    body["local"] = {"launcher": launcher}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def states(out: Path) -> dict[str, str]:
    """State of each stage by `tapir status`."""
    return dict(json_of("status", str(out)))


@pytest.mark.slow
def test_a_chain_is_cancelled_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    dvae = {"flags": {**_SHORT, "loop.steps": 100, "checkpoint.every": 10}}
    path = write(tmp_path, bpe={}, dvae=dvae)
    text = tapir("submit", str(path))
    assert "sent 3 jobs to local" in text
    assert "running already" in tapir("submit", str(path), code=2)
    until = time.monotonic() + PATIENCE
    while len(rows_of(out / "dvae")) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    tapir("cancel", str(out))
    assert not processes_with(str(out))
    by_stage = states(out)
    assert by_stage["pack"] == "done" and by_stage["bpe"] == "done" and "75" in by_stage["dvae"]
    reached = len(rows_of(out / "dvae"))
    assert reached < 100 and list((out / "dvae" / "checkpoints").glob("step-*/manifest.json"))
    tapir("resume", str(out), "--wait")
    assert set(states(out).values()) == {"done"}
    steps = [row["step"] for row in rows_of(out / "dvae")]
    assert steps == list(range(1, 101))
    log = tapir("logs", str(out), "dvae")
    assert "resumed from" in log and "asked to stop" in log
    marker = unseal((out / "markers" / "dvae.json").read_bytes(), "dvae.json")
    assert marker["seconds"] > 0
    assert "have ended well before" in tapir("submit", str(path))


def _jobs(out: Path) -> list[int]:
    return processes_with(f"--out={out} --marker=dvae.json")


@pytest.mark.slow
def test_a_job_that_is_killed_between_checkpoints_starts_again(tmp_path: Path) -> None:
    """More often than `retries`: each start made a newer checkpoint, and left no end."""
    out = tmp_path / "out"
    dvae = {"flags": {**_SHORT, "loop.steps": 70, "checkpoint.every": 1}}
    tapir("submit", str(write(tmp_path, dvae=dvae)))

    def newest() -> int:
        paths = (out / "dvae" / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name[5:]) for path in paths), default=0)

    killed: set[int] = set()
    for _ in range(5):
        until = time.monotonic() + PATIENCE
        while not (new := {*_jobs(out)} - killed) and time.monotonic() < until:
            time.sleep(0.02)
        before = newest()  # ranks of the last job may have saved on
        while newest() == before and time.monotonic() < until:
            time.sleep(0.02)
        (job,) = new
        os.kill(job, signal.SIGKILL)
        killed.add(job)
    until = time.monotonic() + 3 * PATIENCE
    while states(out)["dvae"] == "running" and time.monotonic() < until:
        time.sleep(0.2)
    assert states(out)["dvae"] == "done"
    marker = unseal((out / "markers" / "dvae.json").read_bytes(), "dvae.json")
    assert marker["starts"] == 6
    assert [row["step"] for row in rows_of(out / "dvae")] == list(range(1, 71))


@pytest.mark.world
def test_nothing_runs_after_a_failed_stage(tmp_path: Path) -> None:
    clip = {"flags": {"loop.validation_samples": 8, "order.lanes": 2, "loop.global_batch_size": 8}}
    path = write(tmp_path, bpe={"flags": {"texts": str(tmp_path / "none")}}, clip=clip)
    tapir("submit", str(path), "--wait", code=1)
    by_stage = states(tmp_path / "out")
    assert by_stage["pack"] == "done"
    assert by_stage["bpe"] == "failed (exit code 2)" and by_stage["clip"].startswith("not run")
    until = time.monotonic() + PATIENCE
    while processes_with(str(tmp_path / "out")) and time.monotonic() < until:
        time.sleep(0.1)  # the chain's process ends after it reports its last job
    assert not processes_with(str(tmp_path / "out"))
    record = tmp_path / "out" / "jobs" / "bpe.starts"
    assert [start["attempt"] for start in json.loads(record.read_text())["starts"]] == [1]
    tapir("resume", str(tmp_path / "out"), "--wait", code=1)
    assert [start["attempt"] for start in json.loads(record.read_text())["starts"]] == [1]


@pytest.mark.slow
def test_an_unfit_machine_runs_nothing(tmp_path: Path) -> None:
    path, files = write(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, files[1]))  # children inherit it
    try:
        cold_tapir("submit", str(path), "--wait", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    assert states(tmp_path / "out")["pack"].startswith("not run: this machine is not fit")
    assert "open files" in (tmp_path / "out" / "logs" / "chain.log").read_text()
    tapir("resume", str(tmp_path / "out"), "--wait")
    assert states(tmp_path / "out")["pack"] == "done"


@pytest.mark.slow
def test_ranks_start_by_mpirun(tmp_path: Path) -> None:
    dvae = {"flags": {**_SHORT, "mesh.data": 2, "loop.steps": 3}}
    tapir("submit", str(write(tmp_path, "mpirun", dvae=dvae)), "--wait")
    assert [row["step"] for row in rows_of(tmp_path / "out" / "dvae")] == [1, 2, 3]
    config = json.loads((tmp_path / "out" / "dvae" / "config.json").read_text())
    assert config["mesh"]["data"] == 2
