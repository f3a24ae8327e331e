"""Chains on Kubernetes to their end: kubectl, the driver and all stages are real processes."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import yaml

from cluster.chain import read_submitted
from tests.harness import json_of, rows_of, tapir
from tests.support.kubernetes.cluster import Cluster, running_cluster

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
    jobs = kubernetes.client.BatchV1Api().list_namespaced_job("default").items
    ended = {job.metadata.name: job.status.conditions[-1].type for job in jobs}
    suffix = "-run-0" if kind == "jobset" else ""
    assert ended == {f"tiny-{n}{suffix}": "Complete" for n in stages} | {"tiny-driver": "Complete"}
    assert (len(kubernetes.client.CustomObjectsApi().list_namespaced_custom_object(
        "jobset.x-k8s.io", "v1alpha2", "default", "jobsets")["items"])
        == (len(stages) if kind == "jobset" else 0))  # fmt: skip
