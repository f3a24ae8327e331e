"""Hot spares on a real Slurm: three nodes, of which a job uses two."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import rows_of, tapir
from tests.slurm.cluster import Slurm, private_slurm
from tests.slurm.conftest import refuse_without_slurm
from tests.slurm.test_slurm import finish, losses, states, wait_for, write

STEPS = 60


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Three nodes."""
    refuse_without_slurm()
    folder = tmp_path_factory.mktemp("spares")
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    with private_slurm(folder / "s", nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(three: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, and the data of all runs here."""
    folder = tmp_path_factory.mktemp("calm")
    flags = ["--count=600", "--validation=0.2", "--shard-pairs=200", "--block=8"]
    tapir("pack", "shapes", str(folder / "data" / "raw"), *flags)
    out = folder / "calm"
    tapir("submit", str(run_file(out, folder)), "--wait", **three.environment)
    return out


def run_file(out: Path, data: Path, steps: int = STEPS) -> Path:
    """A dVAE on two nodes and a spare one."""
    flags = {
        "loop.global_batch_size": 32,
        "loop.validation_samples": 32,
        "loop.log_every": 1,
        "loop.validate_every": 0,
        "loop.steps": steps,
        "checkpoint.every": 10,
        "mesh.data": 2,
        "engine.precision": "fp32",
        "engine.matmul_precision": "highest",  # auto chooses by times
    }
    stage = {"nodes": 2, "spares": 1, "cpus": 2, "flags": flags}
    return write(out, {"dvae": stage}, store=str(data / "data"))


def wait_until_idle(cluster: Slurm) -> None:
    """Wait until all nodes have returned."""
    ask = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle")
    wait_for(lambda: cluster.ask(*ask).count("\n") == 3)


def lose(cluster: Slurm, out: Path, node: int) -> None:
    """Start a run, and kill a node in the middle of it."""
    wait_for(lambda: len(rows_of(out / "dvae")) > 15)
    assert states(cluster, out)["dvae"] == "RUNNING on n[1-3]"
    cluster.kill_node(node)


def restarts(cluster: Slurm) -> str:
    """How often the newest job was queued again."""
    text = cluster.ask("scontrol", "-o", "show", "job")
    return text.splitlines()[-1].partition(" Restarts=")[2].split()[0]


@pytest.mark.big
def test_a_lost_node_is_replaced_in_the_same_job(three: Slurm, calm: Path) -> None:
    out = calm.with_name("replaced")
    wait_until_idle(three)
    tapir("submit", str(run_file(out, calm.parent)), **three.environment)
    lose(three, out, 2)
    assert finish(three, out)["dvae"] == "done"
    three.start_node(2)
    log = tapir("logs", str(out), **three.environment)
    assert "nodes n1, n2; spares: n3" in log
    assert "nodes n2 replaced by n3" in log and "nodes n1, n3; spares: none" in log
    assert "resumed from" in log and restarts(three) == "0"
    assert losses(out / "dvae") == losses(calm / "dvae")


@pytest.mark.big
def test_a_lost_batch_host_is_noticed_by_another_node(three: Slurm, calm: Path) -> None:
    out = calm.with_name("requeued")
    wait_until_idle(three)
    tapir("submit", str(run_file(out, calm.parent)), **three.environment)
    lose(three, out, 1)
    began = time.monotonic()
    wait_for(lambda: "PENDING" in three.queue())
    print(f"queued again after {time.monotonic() - began:.0f} s")
    assert finish(three, out)["dvae"] == "done"
    three.start_node(1)
    log = tapir("logs", str(out), **three.environment)
    assert "batch host n1 is lost" in log and "nodes n2, n3; spares: none" in log
    assert "resumed from" in log and restarts(three) == "1"
    assert losses(out / "dvae") == losses(calm / "dvae")


@pytest.mark.big
def test_a_job_with_too_few_nodes_is_queued_again(three: Slurm, calm: Path) -> None:
    out = calm.with_name("none")
    wait_until_idle(three)
    tapir("submit", str(run_file(out, calm.parent)), **three.environment)
    lose(three, out, 2)
    three.kill_node(3)
    wait_for(lambda: "PENDING" in three.queue())
    three.start_node(3)
    assert finish(three, out)["dvae"] == "done"
    three.start_node(2)
    log = tapir("logs", str(out), **three.environment)
    assert "the command needs 2 nodes, the job has 1" in log
    assert "nodes n1, n3; spares: none" in log and restarts(three) == "1"
    assert losses(out / "dvae") == losses(calm / "dvae")


@pytest.mark.big
def test_a_bad_node_is_replaced(calm: Path, tmp_path: Path) -> None:
    out = tmp_path / "bad"
    tmp_path.chmod(0o755)
    with private_slurm(tmp_path / "s", nodes=3, bad=2) as cluster:
        path = run_file(out, calm.parent, steps=4)
        tapir("submit", str(path), "--wait", **cluster.environment)
        log = tapir("logs", str(out), **cluster.environment)
        assert log.count("node n2: open files") == 1
        assert "nodes n1, n3; spares: none" in log and restarts(cluster) == "0"
        assert (out / "jobs" / "bad-nodes").read_text() == "n2\n"
    assert [step for step, _ in losses(out / "dvae")] == [1, 2, 3, 4]
