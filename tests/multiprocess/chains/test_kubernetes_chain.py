"""Chains on Kubernetes to their end: kubectl, the driver and all stages are real processes.

The API server, its controllers and the kubelet are stand-ins: tests/support/kubernetes.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.chain import read_submitted
from cluster.starts import read_attempts
from core.storage.store import FolderStore
from tests.harness import DEVELOPERS, PATIENCE, json_of, rows_of, tapir
from tests.support.kubernetes.cluster import Cluster, running_cluster

kubernetes = pytest.importorskip("kubernetes", reason=DEVELOPERS)

_BIN = str(Path(sys.executable).parent)
_SHORT = {
    "loop.global_batch_size": 8,
    "loop.log_every": 1,
    "loop.validation_samples": 8,
    "mesh.data": 1,
    "model.width": 4,
}
_PACK = {"source": "shapes", "flags": {"count": 200, "validation": 0.2, "block": 8}}


def write(folder: Path, kind: str, stages: dict[str, Any], **settings: Any) -> Path:
    """A run file for the cluster."""
    body = {
        "name": "tiny",
        "out": str(folder / "runs" / "tiny"),
        "to": "kubernetes",
        "python": sys.executable,
        "stages": stages,
        "kubernetes": {"kind": kind, "claim": "runs", "mount": str(folder / "runs"), **settings},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    out = tmp_path / "runs" / "tiny"
    out.mkdir(parents=True)
    with running_cluster(tmp_path / "cluster", out) as started:
        yield started


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables with which kubectl finds the cluster."""
    return {
        "KUBECONFIG": str(cluster.kubeconfig),
        "HOME": str(cluster.kubeconfig.parent),
        "PATH": os.pathsep.join([_BIN, os.environ["PATH"]]),
    }


def check_order(cluster: Cluster, out: Path) -> None:
    """No object of a stage was created before all markers of the stages before it."""
    chain = read_submitted(out).chain
    jobs = {job.name: job for job in chain.jobs}
    for job in chain.jobs:
        before = {marker for name in job.after for marker in jobs[name].markers()}
        events = [
            event
            for event in cluster.created()
            if event.component == job.name or event.name.startswith(f"tiny-{job.name}")
        ]
        assert {"Pod", "Job"} <= {event.kind for event in events}
        for event in events:
            assert before <= event.markers, f"{event.kind} {event.name} came before {before}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_a_chain_runs_to_its_end_although_its_driver_is_killed_in_every_stage(
    kind: str, tmp_path: Path, cluster: Cluster
) -> None:
    out = tmp_path / "runs" / "tiny"
    two = {**_SHORT, "mesh.data": 2, "loop.steps": 2, "model.codebook": 64}
    stages = {
        "pack": _PACK,
        "bpe": None,
        "dvae": {"nodes": 2, "flags": two},
        "tokenize": {"workers": 2, "flags": {"block": 8}},
    }
    cluster.kill_driver_after_each_create("tiny-driver")
    path = write(tmp_path, kind, stages, queue="gpus")
    tapir("submit", str(path), "--wait", **environment(cluster))
    main = "JobSet" if kind == "jobset" else "Job"
    own = {f"{main} tiny-{stage}" for stage in stages}
    services = {"Service tiny-dvae"} if kind == "job" else set()
    assert cluster.killed == own | services
    driver = "system:serviceaccount:default:tiny-driver"
    made = Counter(f"{e.kind} {e.name}" for e in cluster.created() if e.user == driver)
    assert made == dict.fromkeys(own | services, 1)
    assert len(cluster.created("Workload")) == len(stages)
    check_order(cluster, out)
    assert len(rows_of(out / "dvae")) == 2
    states = json_of("status", str(out), **environment(cluster))
    assert states == dict.fromkeys(stages, "done")
    kubernetes.config.load_kube_config(str(cluster.kubeconfig))
    suffix = "-run-0" if kind == "jobset" else ""
    complete = {f"tiny-{n}{suffix}": "Complete" for n in stages} | {"tiny-driver": "Complete"}
    until = time.monotonic() + PATIENCE
    while (ended := conditions()) != complete and time.monotonic() < until:
        time.sleep(0.2)  # the controllers see the pods' ends after `submit` sees the markers
    assert ended == complete
    assert (len(kubernetes.client.CustomObjectsApi().list_namespaced_custom_object(
        "jobset.x-k8s.io", "v1alpha2", "default", "jobsets")["items"])
        == (len(stages) if kind == "jobset" else 0))  # fmt: skip


def conditions() -> dict[str, str]:
    """The newest condition of each Job that has one, by its name."""
    jobs = kubernetes.client.BatchV1Api().list_namespaced_job("default").items
    with_one = [job for job in jobs if job.status.conditions]
    return {job.metadata.name: job.status.conditions[-1].type for job in with_one}


def newest_step(run: Path) -> int:
    """Step of the newest whole checkpoint; 0 if there is none."""
    paths = (run / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name[5:]) for path in paths), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_kills_between_checkpoints_are_forgiven(
    kind: str, tmp_path: Path, cluster: Cluster
) -> None:
    """More kills than `retries`, each of a whole pod, and each start made a newer checkpoint."""
    out = tmp_path / "runs" / "tiny"
    kills = int(os.environ.get("TAPIR_KUBERNETES_KILLS", "5"))
    steps = 20 * (kills + 1)
    flags = {**_SHORT, "loop.steps": steps, "checkpoint.every": 2, "checkpoint.keep": 2}
    path = write(tmp_path, kind, {"pack": _PACK, "dvae": {"flags": flags}})
    tapir("submit", str(path), **environment(cluster))
    job = "tiny-dvae-run-0" if kind == "jobset" else "tiny-dvae"
    until = time.monotonic() + PATIENCE * kills
    for _ in range(kills):
        before = newest_step(out / "dvae")
        while newest_step(out / "dvae") == before or not cluster.jobs.pods_of(job):
            assert time.monotonic() < until, cluster.created()[-5:]
            time.sleep(0.02)
        cluster.jobs.pods_of(job)[0].kill()
    wait_for_driver(cluster, until + PATIENCE)
    (driver,) = cluster.store.select("Job", name="tiny-driver")
    assert driver["status"]["conditions"][-1]["type"] == "Complete"
    pods = [event for event in cluster.created("Pod") if event.component == "dvae"]
    assert len(pods) == kills + 1
    assert [row["step"] for row in rows_of(out / "dvae")] == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_crash_loop_ends_the_chain_with_its_reason(tmp_path: Path, cluster: Cluster) -> None:
    """Killed before each first checkpoint: `retries` are forgiven, then code 70 ends all."""
    flags = {**_SHORT, "loop.steps": 100_000, "checkpoint.every": 100_000}
    stages = {"pack": _PACK, "dvae": {"flags": flags}, "tokenize": {}, "bpe": None}
    path = write(tmp_path, "jobset", stages)
    tapir("submit", str(path), **environment(cluster))
    out, until = tmp_path / "runs" / "tiny", time.monotonic() + PATIENCE * 4
    for number in range(4):
        while attempts(out) <= number:
            assert time.monotonic() < until, cluster.created()[-5:]
            time.sleep(0.05)
        cluster.jobs.pods_of("tiny-dvae-run-0")[0].kill()
    wait_for_driver(cluster, until)
    (driver,) = cluster.store.select("Job", name="tiny-driver")
    last = driver["status"]["conditions"][-1]
    assert last["type"] == "Failed" and "exit code 70 matching FailJob rule" in last["message"]
    assert started(cluster, "dvae") == 5 and started(cluster, "tokenize") == 0
    states = json_of("status", str(out), **environment(cluster))
    assert states["bpe"] == "done" and states["tokenize"] == "not there"
    text = tapir("logs", str(out), "dvae", **environment(cluster))
    assert "job dvae gives up: 4 failures before a checkpoint since" in text


def attempts(out: Path) -> int:
    """Starts of the dVAE's only pod on record."""
    return read_attempts(FolderStore(out / "jobs"), "dvae-0")


def started(cluster: Cluster, stage: str) -> int:
    """Pods of a stage that were created so far."""
    return sum(event.component == stage for event in cluster.created("Pod"))


def wait_for_driver(cluster: Cluster, until: float) -> None:
    """Wait until the driver's Job has ended."""
    while True:
        (driver,) = cluster.store.select("Job", name="tiny-driver")
        ended = {each["type"] for each in driver["status"].get("conditions", [])}
        if ended & {"Complete", "Failed"}:
            return
        assert time.monotonic() < until, cluster.created()[-5:]
        time.sleep(0.1)
