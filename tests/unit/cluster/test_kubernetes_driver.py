"""The driver's decisions, against the tests' stand-in of an API server, without controllers."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.chain import Chain, Job, Resources, write_marker
from cluster.kubernetes.__main__ import main
from cluster.kubernetes.client import ApiClient, ApiError
from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.driver import Driver
from cluster.kubernetes.driver_objects import driver_objects
from core.errors import InputError
from tests.harness import DEVELOPERS

pytest.importorskip("kubernetes_validate", reason=DEVELOPERS)
pytest.importorskip("kubeflow_trainer_api", reason=DEVELOPERS)

from tests.support.kubernetes.cluster import Cluster, serving_cluster

pytestmark = pytest.mark.seconds
A = Job(name="a", command=("pack",))
B = Job(name="b", command=("bpe",), after=("a",), resources=Resources(nodes=2))
C = Job(name="c", command=("tokenize",), after=("a",), array=True, resources=Resources(workers=2))
SPACE = "default"


class Bench:
    """A chain, its driver and the cluster that it drives."""

    def __init__(self, folder: Path, cluster: Cluster, patch: pytest.MonkeyPatch) -> None:
        self.cluster, self.folder = cluster, folder
        self.chain = Chain(
            name="x", out=folder / "runs" / "x", folder=folder, python="python3", jobs=(A, B, C)
        )
        self.config = KubernetesConfig(claim="runs", mount=str(folder / "runs"))
        patch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        patch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.server.port))

    def applied(self, **settings: Any) -> Driver:
        """A driver, after its objects were applied."""
        self.config = replace(self.config, **settings)
        for body in driver_objects(self.chain, self.config)[:3]:
            self.cluster.store.create(body, "admin")
        return self.driver()

    def driver(self) -> Driver:
        return Driver(self.chain, self.config, ApiClient(self.account()))

    def account(self) -> Path:
        """What a pod sees of its service account."""
        token = self.cluster.server.access.token_of(SPACE, "x-driver")
        (self.folder / "token").write_text(token + "\n")
        return self.folder

    def names(self) -> list[str]:
        """Kind and name of each object that the driver created."""
        events = self.cluster.created("Job", "JobSet", "Service")
        return [f"{event.kind} {event.name}" for event in events]

    def set(self, kind: str, name: str, condition: str, reason: str = "", text: str = "") -> None:
        """Let a controller set a condition."""
        body = self.cluster.store.get(kind, SPACE, name)
        one = {"type": condition, "status": "True", "reason": reason, "message": text}
        body["status"] = {"conditions": [one]}
        self.cluster.store.update(body)

    def mark(self, job: Job) -> None:
        for name in job.markers():
            facts: dict[str, object] = {"command": job.fingerprint, "seconds": 1.0}
            write_marker(str(self.chain.out / "markers"), name, facts)

    def notes(self) -> dict[str, Any]:
        return dict(json.loads((self.chain.out / "jobs" / "kubernetes.json").read_text()))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with serving_cluster(tmp_path, tmp_path / "runs" / "x") as cluster:
        yield Bench(tmp_path, cluster, monkeypatch)


def test_a_stage_is_created_once_all_before_it_are_done_and_have_ended(bench: Bench) -> None:
    driver = bench.applied()
    driver.round()
    driver.round()
    assert bench.names() == ["JobSet x-a"]
    bench.mark(A)
    driver.round()  # its pods still run
    assert bench.names() == ["JobSet x-a"]
    bench.set("JobSet", "x-a", "Completed")
    driver.round()
    assert bench.names() == ["JobSet x-a", "JobSet x-b", "JobSet x-c"]
    bench.mark(B)
    bench.set("JobSet", "x-b", "Completed")
    write_marker(str(bench.chain.out / "markers"), "c-0.json", {"command": C.fingerprint})
    driver.round()
    assert bench.notes()["b"] == {"state": "done", "starts": 1, "why": ""}
    assert bench.notes()["c"]["state"] == "running"
    bench.mark(C)
    bench.set("JobSet", "x-c", "Completed")
    assert driver.run() == 0
    assert len(bench.names()) == 3


def test_stages_with_markers_get_no_object(bench: Bench) -> None:
    for job in (A, B, C):
        bench.mark(job)
    assert bench.applied().run() == 0
    assert bench.names() == []


def test_a_new_driver_takes_over_what_it_finds(bench: Bench) -> None:
    bench.applied().round()
    driver = bench.driver()
    driver.round()
    assert bench.names() == ["JobSet x-a"] and bench.notes()["a"]["starts"] == 0


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_a_final_failure_ends_the_stages_after_it(bench: Bench, kind: str) -> None:
    driver = bench.applied(kind=kind)
    driver.round()
    why = "Container tapir for pod default/x failed with exit code 2 matching FailJob rule"
    if kind == "job":
        bench.set("Job", "x-a", "Failed", "PodFailurePolicy", why)
    else:
        child = {**driver_objects(bench.chain, bench.config)[4], "spec": {}}
        child["metadata"] = {"name": "x-a-run-0", "namespace": SPACE}
        bench.cluster.store.create(child, "jobset")
        bench.set("Job", "x-a-run-0", "Failed", "PodFailurePolicy", why)
        bench.set("JobSet", "x-a", "Failed", "FailJobSetFailurePolicyAction", "first: x-a-run-0")
    assert driver.run() == 2
    assert bench.notes()["a"]["state"] == "failed"
    assert bench.notes()["a"]["why"] == f"PodFailurePolicy: {why}"
    assert bench.notes()["c"] == {
        "state": "not run", "starts": 0, "why": "an earlier stage failed"
    }  # fmt: skip
    assert not any(name.endswith(("x-b", "x-c")) for name in bench.names())


def test_giving_up_ends_the_driver_with_70(bench: Bench) -> None:
    driver = bench.applied(kind="job")
    driver.round()
    bench.set("Job", "x-a", "Failed", "PodFailurePolicy", "... failed with exit code 70 matching")
    assert driver.run() == 70


def test_a_failed_job_is_deleted_and_created_again(bench: Bench) -> None:
    driver = bench.applied(kind="job")
    bench.mark(A)
    driver.round()  # order of the chain: a is done, so b starts in the same round
    assert bench.names() == ["Service x-b", "Job x-b", "Job x-c"]
    first = bench.cluster.store.get("Job", SPACE, "x-b")
    bench.set("Job", "x-b", "Failed", "BackoffLimitExceeded", "Job has reached the limit")
    driver.round()
    ending = bench.cluster.store.get("Job", SPACE, "x-b")
    assert ending["metadata"]["uid"] == first["metadata"]["uid"]
    assert "deletionTimestamp" in ending["metadata"]
    driver.round()
    assert bench.names().count("Job x-b") == 1  # its pods have not ended yet
    assert bench.notes()["b"]["state"] == "restarting"
    bench.cluster.store.remove(ending, "controller")
    driver.round()
    assert bench.names().count("Job x-b") == 2 and bench.names().count("Service x-b") == 1
    assert bench.notes()["b"] == {"state": "running", "starts": 2, "why": ""}


def test_an_array_that_failed_is_not_created_again(bench: Bench) -> None:
    driver = bench.applied(kind="job")
    bench.mark(A)
    bench.mark(B)
    driver.round()
    bench.set("Job", "x-c", "Failed", "FailedIndexes", "Job has failed indexes")
    assert driver.run() == 70
    assert bench.names() == ["Job x-c"]


def test_a_complete_stage_without_markers_fails_after_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = bench.applied()
    driver.round()
    bench.set("JobSet", "x-a", "Completed")
    driver.round()
    assert bench.notes()["a"]["state"] == "running"
    monkeypatch.setattr("cluster.kubernetes.driver._MARKER_SECONDS", -1.0)
    assert driver.run() == 70
    assert "does not hold a.json: is claim runs shared?" in bench.notes()["a"]["why"]


def test_a_cancelled_chain_creates_nothing(bench: Bench) -> None:
    driver = bench.applied()
    bench.chain.out.mkdir(parents=True)
    (bench.chain.out / "cancelled").touch()
    assert driver.run() == 70 and bench.names() == []


def test_the_role_suffices_and_nothing_else_is_allowed(bench: Bench) -> None:
    bench.applied()
    client = ApiClient(bench.account())
    for ask in (
        lambda: client.get("JobSet", SPACE, "y-a"),
        lambda: client.get("JobSet", "kube-system", "x-a"),
        lambda: client.get("Job", SPACE, "x-driver"),
        lambda: client.get("Service", SPACE, "x-a"),
    ):
        with pytest.raises(ApiError, match=r"403 .* is forbidden") as caught:
            ask()
        assert caught.value.status == 403
    assert client.get("JobSet", SPACE, "x-a") is None
    (bench.folder / "token").write_text("other")
    with pytest.raises(ApiError, match="401 Unauthorized"):
        client.get("JobSet", SPACE, "x-a")


def test_missing_rights_and_kinds_end_the_driver(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = bench.applied()
    monkeypatch.setattr("cluster.kubernetes.driver._LOOK", 0.0)
    monkeypatch.setattr(logging.getLogger("tapir"), "propagate", True)
    bench.cluster.server.without = ("jobset.x-k8s.io",)
    with pytest.raises(InputError, match=r"404 .*JobSet installed\? Without it set kubernetes.ki"):
        driver.run()
    bench.cluster.server.without = ()
    for body in bench.cluster.store.select("RoleBinding"):
        bench.cluster.store.remove(body, "admin")
    with pytest.raises(InputError, match=r"403 .* is forbidden"):
        bench.driver().run()
    assert sum("asking again" in record.message for record in caplog.records) == 30


def test_a_server_that_is_away_is_asked_again(bench: Bench) -> None:
    driver = bench.applied()
    bench.cluster.server.failing = 2
    with pytest.raises(ApiError, match="503 try again"):
        driver.round()
    assert bench.names() == []
    with pytest.raises(ApiError, match="503 try again"):
        driver.round()
    driver.round()
    assert bench.names() == ["JobSet x-a"]


def test_the_client_deletes_the_very_object(bench: Bench) -> None:
    bench.applied(kind="job").round()
    client = ApiClient(bench.account())
    current = client.get("Job", SPACE, "x-a")
    assert current is not None and not client.create(current)
    other = {**current, "metadata": {**current["metadata"], "uid": "another"}}
    client.delete(other)
    assert "deletionTimestamp" not in bench.cluster.store.get("Job", SPACE, "x-a")["metadata"]
    client.delete(current)
    assert "deletionTimestamp" in bench.cluster.store.get("Job", SPACE, "x-a")["metadata"]
    bench.cluster.store.remove(current, "controller")
    client.delete(current)
    with pytest.raises(ApiError, match="422 Job is invalid"):
        client.create({**current, "spec": {}})


def test_only_the_clusters_own_certificate_is_trusted(bench: Bench, tmp_path: Path) -> None:
    bench.applied()
    other = tmp_path / "other"
    with serving_cluster(other, tmp_path):
        (bench.folder / "ca.crt").write_text((other / "ca.crt").read_text())
        with pytest.raises(ApiError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            ApiClient(bench.account()).get("JobSet", SPACE, "x-a")
    assert caught.value.status == 0


def test_the_process_names_what_is_wrong(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.applied()
    text = driver_objects(bench.chain, bench.config)[3]["data"]["chain.json"]
    chain = tmp_path / "chain.json"
    chain.write_text(text)
    for job in (A, B, C):
        bench.mark(job)
    assert main([str(chain), str(bench.account())]) == 0
    assert main([str(chain)]) == 2 and main([str(tmp_path / "no"), str(tmp_path)]) == 2
    assert main([str(chain), str(tmp_path / "none")]) == 2
    chain.write_text(text.replace("retries", "retires"))
    assert main([str(chain), str(bench.account())]) == 70
    chain.write_text(text)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    assert main([str(chain), str(bench.account())]) == 2
    lines = capfd.readouterr().err
    for words in ("usage: ", "no cannot be read", "ca.crt cannot be", "is damaged", "in a pod of"):
        assert words in lines
