"""Chains on a real Slurm with two nodes: whole, a lost node, preemption, failure, cancelling."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import json_of, rows_of, tapir
from tests.hostile import foreign_code, hostile_folder
from tests.slurm.cluster import Slurm, private_slurm

_SHORT = {
    "loop.global_batch_size": 32,
    "loop.validation_samples": 32,
    "engine.precision": "fp32",
    "engine.matmul_precision": "highest",  # auto chooses by times
}
_PATIENCE = 600


def write(out: Path, stages: dict[str, Any], store: str = "", **slurm: Any) -> Path:
    """A run file for this Slurm."""
    body = {"name": out.name, "out": str(out), "to": "slurm", "stages": stages, "slurm": slurm}
    body |= {"store": store} if store else {}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(body))
    return path


def pack(count: int = 600) -> dict[str, Any]:
    flags = {"count": count, "validation": 0.2, "shard_pairs": 200, "block": 8}
    return {"source": "shapes", "flags": flags}


def wait_for(what: Callable[[], Any], seconds: float = _PATIENCE, pause: float = 0.5) -> Any:
    """The first true answer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := what():
            return result
        time.sleep(pause)
    raise AssertionError("waited in vain")


def states(slurm: Slurm, out: Path) -> dict[str, str]:
    return dict(json_of("status", str(out), **slurm.environment))


def finish(slurm: Slurm, out: Path) -> dict[str, str]:
    """Wait until the chain has ended, by `tapir status`."""

    def over() -> dict[str, str] | None:
        by_stage = states(slurm, out)
        ended = all(text == "done" or text.startswith("ended") for text in by_stage.values())
        return by_stage if ended else None

    by_stage: dict[str, str] = wait_for(over)
    return by_stage


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows_of(run)]


@pytest.fixture(scope="session")
def tokens(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain up to the tokens, an array of two workers: the smoke test looks at it.

    It is submitted from a folder of files named like our modules.
    """
    folder = tmp_path_factory.mktemp("chain")
    out, hostile = folder / "data", hostile_folder(folder / "hostile")
    stages = {
        "pack": pack(),
        "bpe": {},
        "dvae": {"flags": {**_SHORT, "loop.steps": 6, "mesh.data": 1}},
        "tokenize": {"workers": 2, "flags": {"block": 8}},
    }
    tapir("submit", str(write(out, stages)), cwd=hostile, **slurm.environment)
    by_stage = finish(slurm, out)
    assert foreign_code(hostile) == []
    assert set(by_stage.values()) == {"done"}, tapir("logs", str(out), **slurm.environment)
    return out


def prior(tokens: Path, steps: int, **flags: Any) -> dict[str, Any]:
    """A prior over two nodes on tokens that are there."""
    every = {"checkpoint.every": 10, "loop.log_every": 1, "loop.validate_every": 0}
    data = {"data": str(tokens / "data" / "tokens")}
    flags = {**_SHORT, **every, **data, "loop.steps": steps, **flags}
    return {"nodes": 2, "cpus": 2, "flags": flags}


@pytest.mark.slow
def test_a_chain_with_an_array_and_two_nodes(slurm: Slurm, tokens: Path, tmp_path: Path) -> None:
    assert len(list((tokens / "logs").glob("tokenize-*.log"))) == 2
    out, hostile = tmp_path / "two", hostile_folder(tmp_path / "hostile")
    path = write(out, {"prior": prior(tokens, 4)}, launcher="srun")
    tapir("submit", str(path), "--wait", cwd=hostile, **slurm.environment)
    assert foreign_code(hostile) == []
    assert [step for step, _ in losses(out / "prior")] == [1, 2, 3, 4]
    wait_for(lambda: not slurm.queue())  # the marker is written just before the job's end
    again = tapir("submit", str(path), **slurm.environment)
    assert "have ended well before" in again
    assert not any("KEY" in p.read_text() for p in (out / "jobs").glob("*.sh"))


@pytest.mark.big
def test_the_whole_demo_by_one_submit(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    short = {"flags": {**_SHORT, "loop.steps": 6, "mesh.data": 1}}
    stages = {
        "pack": pack(),
        "bpe": {},
        "dvae": short,
        "tokenize": {"workers": 2, "flags": {"block": 8}},
        "prior": {"nodes": 2, "flags": {**_SHORT, "loop.steps": 6}},
        "clip": short,
        "evaluate": {"flags": {"prompts": 8, "candidates": 4}},
    }
    tapir("submit", str(write(out, stages)), "--wait", **slurm.environment)
    assert (out / "report.html").stat().st_size > 10_000
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"] == "shapes" and set(summary["seconds"]) >= {"pack", "prior", "evaluate"}
    wait_for(lambda: not slurm.queue() and not slurm.processes())


@pytest.mark.big
def test_a_lost_node_changes_no_loss(slurm: Slurm, tokens: Path, tmp_path: Path) -> None:
    calm, out = tmp_path / "calm", tmp_path / "lost"
    tapir("submit", str(write(calm, {"prior": prior(tokens, 60)})), "--wait", **slurm.environment)
    tapir("submit", str(write(out, {"prior": prior(tokens, 60)})), **slurm.environment)
    wait_for(lambda: len(rows_of(out / "prior")) > 15)
    slurm.kill_node(2)
    wait_for(lambda: "RUNNING" not in states(slurm, out)["prior"])
    slurm.start_node(2)
    assert finish(slurm, out)["prior"] == "done"
    assert "resumed from" in tapir("logs", str(out), **slurm.environment)
    assert losses(out / "prior") == losses(calm / "prior")


@pytest.mark.big
def test_a_preempted_job_saves_and_comes_back(slurm: Slurm, tokens: Path, tmp_path: Path) -> None:
    out, urgent = tmp_path / "low", tmp_path / "high"
    tapir("submit", str(write(out, {"prior": prior(tokens, 80)})), **slurm.environment)
    wait_for(lambda: len(rows_of(out / "prior")) > 12)
    path = write(urgent, {"prior": prior(tokens, 4)}, partition="urgent")
    tapir("submit", str(path), "--wait", **slurm.environment)
    assert finish(slurm, out)["prior"] == "done"
    log = tapir("logs", str(out), **slurm.environment)
    assert "with a checkpoint saved" in log and "resumed from" in log
    assert [step for step, _ in losses(out / "prior")] == list(range(1, 81))


@pytest.mark.big
def test_a_job_continues_after_its_time_limit(slurm: Slurm, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "limit"
    stage = {**prior(tokens, 200), "minutes": 2}
    tapir("submit", str(write(out, {"prior": stage}, warn_seconds=60)), **slurm.environment)
    assert finish(slurm, out)["prior"] == "done"
    assert "asked to stop" in tapir("logs", str(out), **slurm.environment)


@pytest.mark.big
def test_nothing_waits_for_a_failed_stage(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "failed"
    stages = {"pack": pack(), "bpe": {"flags": {"texts": "/nowhere"}}, "dvae": {}, "tokenize": {}}
    stages["dvae"] = {"flags": {**_SHORT, "loop.steps": 6, "mesh.data": 1}}
    path = write(out, stages)
    tapir("submit", str(path), "--wait", code=1, **slurm.environment)
    by_stage = states(slurm, out)
    assert by_stage["bpe"].startswith("ended: FAILED") and by_stage["dvae"] == "done"
    assert by_stage["tokenize"].startswith("ended: CANCELLED") and not slurm.queue()


@pytest.mark.big
def test_cancel_removes_every_process(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "cancelled"
    stages = {"pack": pack(), "bpe": {}, "dvae": {"nodes": 2, "cpus": 2}, "tokenize": {}}
    stages["dvae"]["flags"] = {**_SHORT, "loop.steps": 5000, "loop.log_every": 1, "mesh.data": 2}
    tapir("submit", str(write(out, stages)), **slurm.environment)
    wait_for(lambda: len(rows_of(out / "dvae")) > 3)
    assert len(slurm.processes()) > 4
    tapir("cancel", str(out), **slurm.environment)
    wait_for(lambda: not slurm.processes(), 30)  # any left could queue the job again
    wait_for(lambda: not slurm.queue())
    by_stage = states(slurm, out)
    assert all(by_stage[name].startswith("ended: CANCELLED") for name in ("dvae", "tokenize"))
    assert len(rows_of(out / "dvae")) < 5000


@pytest.mark.big
def test_a_bad_node_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "sound"
    tmp_path.chmod(0o755)
    stages = {"pack": {**pack(), "cpus": 2}}
    with private_slurm(tmp_path / "s", nodes=2, bad=1) as cluster:
        tapir("submit", str(write(out, stages)), **cluster.environment)
        assert finish(cluster, out)["pack"] == "done"
        log = tapir("logs", str(out), **cluster.environment)
        assert log.count("node n1: open files") == 1
        assert (out / "jobs" / "bad-nodes").read_text() == "n1\n"
        assert "ExcNodeList=n1" in cluster.ask("scontrol", "show", "job", "1")
        assert not cluster.queue()
