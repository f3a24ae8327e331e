"""Failures on Kubernetes: `tapir job`, the driver and kubectl are real, a script is the stage."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.chain import Chain, Job, Resources
from cluster.kubernetes import submission
from cluster.kubernetes.config import KubernetesConfig
from tests.harness import DEVELOPERS, PATIENCE

pytest.importorskip("kubernetes_validate", reason=DEVELOPERS)
pytest.importorskip("kubeflow_trainer_api", reason=DEVELOPERS)

from tests.support.kubernetes.cluster import Cluster, running_cluster
from tests.support.kubernetes.kubelet import Pod

pytestmark = pytest.mark.slow
_SPACE = "default"
_PYTHON = """#!/bin/bash
# Stands for python on a node: the stage's own program is the script $0.stage.
case "$3 $4" in
    "tapir job" | "cluster.kubernetes "*) exec {real} "$@" ;;
    "tapir doctor") exit 0 ;;
esac
exec bash "$0.stage" "$@"
"""
_COUNT = """
name=$4; [ "$2" = torch.distributed.run ] && name=train
echo . >> {out}/starts-$name-$JOB_COMPLETION_INDEX
start=$(wc -l < {out}/starts-$name-$JOB_COMPLETION_INDEX)
who=$name-$JOB_COMPLETION_INDEX
"""
FIRST = Job(name="first", command=("pack",))
PAIR = Job(
    name="pair", command=("train",), after=("first",), trains=True, resources=Resources(nodes=2)
)
ARRAY = Job(
    name="array",
    command=("tokenize",),
    after=("first",),
    array=True,
    resources=Resources(workers=3),
)
LAST = Job(name="last", command=("evaluate",), after=("pair", "array"))


class Setting:
    """A cluster, and chains whose stages are a script."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.cluster, self.out = cluster, folder / "runs" / "f"
        self.python, self.folder = folder / "python", folder
        self.python.write_text(_PYTHON.format(real=sys.executable))
        self.python.chmod(0o755)

    def submit(self, kind: Any, script: str, *jobs: Job) -> None:
        """Send a chain of jobs; `script` knows $who (name-index), $start (1, 2, ...) and OUT."""
        body = _COUNT.format(out=self.out) + script.replace("OUT", str(self.out)) + "\ntrue\n"
        self.python.with_name("python.stage").write_text(body)
        self.config = KubernetesConfig(kind=kind, claim="c", mount=str(self.folder / "runs"))
        self.chain = Chain(
            name="f", out=self.out, folder=self.folder, python=str(self.python), jobs=jobs
        )
        assert not self.config.problems(self.chain)
        submission.submit(self.chain, self.config)

    def ended(self) -> str:
        """Wait for the driver; returns "" if it succeeded, else its Job's message."""
        self.until(lambda: bool(self.conditions("Job", "f-driver") & {"Complete", "Failed"}))
        job = self.cluster.store.get("Job", _SPACE, "f-driver")
        last = job["status"]["conditions"][-1]
        return "" if last["type"] == "Complete" else str(last["message"])

    def until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < until, self.cluster.store.log[-20:]
            time.sleep(0.05)

    def conditions(self, kind: str, name: str) -> set[str]:
        bodies = self.cluster.store.select(kind, name=name)
        return {c["type"] for body in bodies for c in body.get("status", {}).get("conditions", [])}

    def starts(self) -> dict[str, int]:
        """Starts of each pod's program."""
        paths = self.out.glob("starts-*")
        return {p.name.removeprefix("starts-"): len(p.read_text().split()) for p in paths}

    def pods(self, stage: str) -> list[Pod]:
        """Running pods of a stage."""
        suffix = "-run-0" if self.config.kind == "jobset" else ""
        return self.cluster.jobs.pods_of(f"f-{stage}{suffix}")


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    (tmp_path / "runs" / "f").mkdir(parents=True)
    with running_cluster(tmp_path / "cluster", tmp_path / "runs" / "f") as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
        monkeypatch.setenv("HOME", str(tmp_path))
        beside = str(Path(sys.executable).parent)
        monkeypatch.setenv("PATH", os.pathsep.join([beside, os.environ["PATH"]]))
        yield Setting(tmp_path, cluster)


_WAITS_ONCE = "if [ $start = 1 ]; then touch OUT/up-$who; exec sleep 600; fi\n"
_MEETS = """
[ $who = train-0 ] && until [ $(wc -l < OUT/starts-train-1) -ge $start ]; do sleep 0.1; done
"""
_AFTER_OTHER = "until [ -e OUT/up-train-0 ]; do sleep 0.1; done"


@pytest.mark.parametrize(("kind", "code"), [("jobset", 75), ("job", 1)])
def test_all_pods_of_a_training_stage_restart_and_only_they(
    setting: Setting, kind: str, code: int
) -> None:
    fails = f"if [ $who$start = train-11 ]; then {_AFTER_OTHER}; exit {code}; fi\n"
    script = fails + "[ $who = train-0 ] && " + _WAITS_ONCE + _MEETS
    setting.submit(kind, script, FIRST, PAIR, LAST)
    assert setting.ended() == ""
    assert setting.starts() == {"pack-0": 1, "train-0": 2, "train-1": 2, "evaluate-0": 1}
    if kind == "jobset":
        status = setting.cluster.store.get("JobSet", _SPACE, "f-pair")["status"]
        assert (status["restarts"], status["restartsCountTowardsMax"]) == (1, 0)
    made = [
        event.name for event in setting.cluster.created("JobSet" if kind == "jobset" else "Job")
    ]
    assert made.count("f-pair") == (1 if kind == "jobset" else 2)
    assert made.count("f-first") == made.count("f-last") == 1


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_lost_pods_restart_their_stage(setting: Setting, kind: str) -> None:
    script = "case $who in train-*) " + _WAITS_ONCE + ";; esac" + _MEETS
    setting.submit(kind, script, FIRST, PAIR)
    setting.until(lambda: len(list(setting.out.glob("up-train-*"))) == 2)
    setting.pods("pair")[1].kill()
    assert setting.ended() == ""
    assert setting.starts() == {"pack-0": 1, "train-0": 2, "train-1": 2}


@pytest.mark.parametrize(("kind", "code"), [("jobset", 2), ("job", 70)])
def test_final_exit_codes_end_the_chain(setting: Setting, kind: str, code: int) -> None:
    script = f"if [ $who = train-1 ]; then {_AFTER_OTHER}; exit {code}; fi\n"
    script += "[ $who = train-0 ] && " + _WAITS_ONCE
    setting.submit(kind, script, FIRST, PAIR, LAST)
    assert f"failed with exit code {code} matching FailJob rule" in setting.ended()
    assert setting.starts() == {"pack-0": 1, "train-0": 1, "train-1": 1}
    assert not any("last" in event.name for event in setting.cluster.created())
    states = submission.states(setting.chain, setting.config)
    assert states["first"] == "done" and states["last"] == "not there"
    assert states["pair"].startswith("Failed: ")


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_a_worker_of_an_array_restarts_alone(setting: Setting, kind: str) -> None:
    script = "case $who$start in tokenize-11) exit 75;; tokenize-21) exit 1;; esac\n"
    script += "[ $who = tokenize-0 ] && " + _WAITS_ONCE
    setting.submit(kind, script, FIRST, ARRAY)
    setting.until(lambda: (setting.out / "up-tokenize-0").exists())
    setting.until(lambda: setting.starts().get("tokenize-2") == 2)
    (lost,) = [pod for pod in setting.pods("array") if pod.index == 0]
    lost.disrupted = True
    lost.kill()
    assert setting.ended() == ""
    assert setting.starts() == {"pack-0": 1, **{f"tokenize-{i}": 2 for i in range(3)}}
    jobs = [event.name for event in setting.cluster.created("Job")]
    assert sum(name.startswith("f-array") for name in jobs) == 1


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_a_cancelled_chain_leaves_nothing(setting: Setting, kind: str) -> None:
    setting.submit(kind, "case $who in train-*) " + _WAITS_ONCE + ";; esac", FIRST, PAIR, LAST)
    setting.until(lambda: len(list(setting.out.glob("up-train-*"))) == 2)
    states = submission.states(setting.chain, setting.config)
    assert states["first"] == "done" and states["last"] == "waiting"
    submission.cancel(setting.chain, setting.config)
    for of in ("Job", "JobSet", "Service", "Pod", "ConfigMap", "Role", "ServiceAccount"):
        assert setting.cluster.store.select(of) == []
    assert set(submission.states(setting.chain, setting.config).values()) == {"not there"}


def test_a_cluster_without_jobsets_is_named(setting: Setting) -> None:
    setting.cluster.server.without = ("jobset.x-k8s.io",)
    with pytest.raises(Exception, match=r"this cluster has no JobSets: .* kubernetes.kind: job"):
        setting.submit("jobset", "", FIRST)
    setting.submit("job", "", FIRST)
    assert setting.ended() == ""
