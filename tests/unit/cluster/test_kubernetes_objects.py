"""Objects of a chain on Kubernetes: valid by their schemas, and what they say about failures."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.chain import Chain, Job, Resources, parse_submitted
from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.driver_objects import driver_objects, dry_run
from cluster.kubernetes.stages import stage_objects
from tests.harness import DEVELOPERS

pytest.importorskip("kubernetes_validate", reason=DEVELOPERS)
pytest.importorskip("kubeflow_trainer_api", reason=DEVELOPERS)

from tests.support.kubernetes.schemas import (
    embedded_jobs,
    job_problems,
    jobset_problems,
)

PACK = Job(name="pack", command=("pack", "shapes", "/runs/s/raw"))
TOKENIZE = Job(
    name="tokenize",
    command=("tokenize", "/runs/s/raw", "/runs/s/tokens"),
    after=("pack",),
    array=True,
    resources=Resources(workers=4, parallelism=2),
)
PRIOR = Job(
    name="prior",
    command=("train", "prior", "tiny"),
    after=("tokenize",),
    ranks=2,
    trains=True,
    resources=Resources(nodes=2, gpus=2, cpus=8, memory="64G"),
)
CHAIN = Chain(
    name="shapes",
    out=Path("/runs/s"),
    folder=Path("/"),
    python="python3",
    jobs=(PACK, TOKENIZE, PRIOR),
)
JOBSET = KubernetesConfig(claim="runs", secrets=("s3",), config_maps=("endpoint",), queue="gpus")
JOB = replace(JOBSET, kind="job")
VERSIONS = ("1.29", "1.33", "1.37")


def main_of(job: Job, config: KubernetesConfig) -> dict[str, Any]:
    """The object that runs a stage."""
    return stage_objects(CHAIN, job, config)[-1]


def spec_of(job: Job, config: KubernetesConfig) -> dict[str, Any]:
    """The Job's spec of a stage of either kind."""
    main = main_of(job, config)
    spec = main["spec"]
    return dict(embedded_jobs(main)[0]["spec"] if main["kind"] == "JobSet" else spec)


@pytest.mark.seconds
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", [JOBSET, JOB], ids=["jobset", "job"])
def test_every_object_is_valid(version: str, config: KubernetesConfig) -> None:
    assert config.problems(CHAIN) == []
    objects = driver_objects(CHAIN, config)
    assert [each["kind"] for each in objects] == [
        "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job"
    ]  # fmt: skip
    stages = [each for job in CHAIN.jobs for each in stage_objects(CHAIN, job, config)]
    if config.kind == "jobset":
        assert [each["kind"] for each in stages] == ["JobSet"] * 3
        assert [jobset_problems(each) for each in stages] == [[]] * 3
        stages = [job for each in stages for job in embedded_jobs(each)]
        assert [each["metadata"]["name"] for each in stages] == [
            "shapes-pack-run-0", "shapes-tokenize-run-0", "shapes-prior-run-0"
        ]  # fmt: skip
    else:
        assert [each["kind"] for each in stages] == ["Job", "Job", "Service", "Job"]
    for each in [*objects, *stages]:
        assert job_problems(each, version) == []


def planted(change: Callable[[dict[str, Any]], None]) -> list[str]:
    """Problems of the prior's JobSet, and of its Job, after a change."""
    jobset = deepcopy(main_of(PRIOR, JOBSET))
    change(jobset["spec"])
    if problems := jobset_problems(jobset):
        return problems
    return [text for job in embedded_jobs(jobset) for text in job_problems(job)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda spec: spec.update(replicatedJob=[]), "spec.replicatedJob: Extra inputs are not"),
        (
            lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(backofLimit=0),
            "spec.replicatedJobs.0.template.spec.backofLimit: Extra inputs are not permitted",
        ),
        (
            lambda spec: spec["failurePolicy"]["rules"][1].update(action="RestartJobset"),
            "action 'RestartJobset'",
        ),
        (
            lambda spec: spec["failurePolicy"]["rules"][0].update(
                onJobFailureReasons=["PodFailurepolicy"]
            ),
            "reason 'PodFailurepolicy'",
        ),
        (
            lambda spec: spec["failurePolicy"]["rules"][0].update(name="ends-it"),
            "rule name 'ends-it'",
        ),
        (
            lambda spec: spec["replicatedJobs"][0].update(name="r" * 43),
            f"pod name 'shapes-prior-{'r' * 43}-0-1-xxxxx' has 66 characters",
        ),
        (
            lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(completions="two"),
            "spec.replicatedJobs.0.template.spec.completions: Input should be a valid integer",
        ),
        (
            lambda spec: spec["replicatedJobs"][0].update(
                dependsOn=[{"name": "pack", "status": "Complete"}]
            ),
            "dependsOn of the first replicatedJob",
        ),
        (
            lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][
                0
            ].update(action="FailIndex"),
            "podFailurePolicy action 'FailIndex'",
        ),
    ],
)
def test_planted_errors_are_refused(change: Callable[[dict[str, Any]], None], problem: str) -> None:
    problems = planted(change)
    assert any(text.startswith(problem) for text in problems), problems


def test_a_wrong_job_is_refused() -> None:
    job = main_of(PACK, JOB)
    job["spec"]["completionMod"] = job["spec"].pop("completionMode")
    assert job_problems(job)


def test_failures_of_a_training_stage_restart_all_its_pods() -> None:
    end = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 70]}}
    for job, config in ((PACK, JOBSET), (PRIOR, JOBSET), (PRIOR, JOB)):
        spec = spec_of(job, config)
        assert spec["backoffLimit"] == 0 and spec["podFailurePolicy"] == {"rules": [end]}
        assert "backoffLimitPerIndex" not in spec
    assert main_of(PRIOR, JOBSET)["spec"]["failurePolicy"] == {
        "maxRestarts": 0,
        "rules": [
            {
                "name": "final",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
            {"name": "others", "action": "RestartJobSetAndIgnoreMaxRestarts"},
        ],
    }


def test_a_worker_of_an_array_restarts_alone() -> None:
    for config in (JOBSET, JOB):
        spec = spec_of(TOKENIZE, config)
        assert (spec["completions"], spec["parallelism"]) == (4, 2)
        assert spec["backoffLimitPerIndex"] == 2**31 - 1 and "backoffLimit" not in spec
        rules = [
            (rule["action"], rule.get("onExitCodes", {}).get("values"))
            for rule in spec["podFailurePolicy"]["rules"]
        ]
        assert rules == [("FailJob", [2]), ("FailIndex", [70]), ("Ignore", [75]), ("Ignore", None)]
        assert spec["podFailurePolicy"]["rules"][3]["onPodConditions"] == [
            {"type": "DisruptionTarget", "status": "True"}
        ]
    final, _ = main_of(TOKENIZE, JOBSET)["spec"]["failurePolicy"]["rules"]
    assert final["onJobFailureReasons"] == [
        "PodFailurePolicy", "FailedIndexes", "MaxFailedIndexesExceeded"
    ]  # fmt: skip


def test_pods_check_their_node_and_meet_at_the_first_one() -> None:
    for config, address in (
        (JOBSET, "shapes-prior-run-0-0.shapes-prior"),
        (JOB, "shapes-prior-0.shapes-prior"),
    ):
        pod = spec_of(PRIOR, config)["template"]["spec"]
        assert pod.get("subdomain") == (None if config is JOBSET else "shapes-prior")
        assert "initContainers" not in pod and pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        command = container["command"]
        own, rest = command[: command.index("--")], command[command.index("--") + 1 :]
        assert own[:5] == ["python3", "-P", "-m", "tapir", "job"] and "--saves" in own
        assert {"--name=prior", "--marker=prior.json", "--again=no"} <= set(own)
        check = "python3 -P -m tapir doctor --node --out=/runs/s --gpus=2"
        assert rest[:3] == ["bash", "-c", f'{check} && exec "$@"']
        assert f"--master-addr={address} --master-port=29500" in rest[6]
        assert '--nnodes=2 --nproc-per-node=2 --node-rank="$JOB_COMPLETION_INDEX"' in rest[6]
        limits = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
        assert container["resources"] == {"limits": limits, "requests": limits}
        assert container["envFrom"] == [
            {"secretRef": {"name": "s3"}}, {"configMapRef": {"name": "endpoint"}}
        ]  # fmt: skip


def as_kubernetes_starts(word: str) -> str:
    """A word of a container's command: $$ becomes $, $(NAME) the value of a variable."""
    values = {"HOME": "/root"}
    return re.sub(
        r"\$(?:(\$)|\((\w*)\))",
        lambda match: match[1] or values.get(match[2], match[0]),
        word,
    )


def test_dollars_reach_the_command() -> None:
    source = "/data/$(HOME) $$HOME $$(HOME) $ $$$ ${HOME} $"
    pack = replace(PACK, command=("pack", source, "/runs/s/raw"))
    chain = replace(CHAIN, jobs=(pack,))
    pod = stage_objects(chain, pack, JOB)[-1]["spec"]["template"]["spec"]
    words = [as_kubernetes_starts(word) for word in pod["containers"][0]["command"]]
    assert words[-3:] == list(pack.command)


def test_each_stage_waits_in_its_own_queue() -> None:
    config = replace(JOBSET, queues=("pack=cpus",))
    for kind in (config, replace(config, kind="job")):
        for job, queue in ((PACK, "cpus"), (PRIOR, "gpus")):
            main = main_of(job, kind)
            assert main["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue
            assert main["spec"]["suspend"] is True
    for plain in (replace(JOBSET, queue=""), replace(JOB, queue="")):
        main = main_of(PACK, plain)
        assert "suspend" not in main["spec"]
        assert "kueue.x-k8s.io/queue-name" not in main["metadata"]["labels"]
    assert "queue-name" not in str(driver_objects(CHAIN, JOBSET))


def test_the_driver_may_touch_the_chains_own_objects_only() -> None:
    names = ["shapes-pack", "shapes-tokenize", "shapes-prior"]
    jobs = {"apiGroups": ["batch"], "resources": ["jobs"]}
    jobsets = {"apiGroups": ["jobset.x-k8s.io"], "resources": ["jobsets"]}
    services = {"apiGroups": [""], "resources": ["services"]}
    children = [f"{name}-run-0" for name in names]
    assert driver_objects(CHAIN, JOBSET)[1]["rules"] == [
        {**jobsets, "verbs": ["create"]},
        {**jobsets, "resourceNames": names, "verbs": ["get"]},
        {**jobs, "resourceNames": children, "verbs": ["get"]},
    ]
    assert driver_objects(CHAIN, JOB)[1]["rules"] == [
        {**jobs, "verbs": ["create"]},
        {**jobs, "resourceNames": names, "verbs": ["get", "delete"]},
        {**services, "verbs": ["create"]},
        {**services, "resourceNames": names, "verbs": ["get"]},
    ]


def test_the_driver_is_a_small_job_that_reads_the_chain() -> None:
    account, role, binding, config_map, job = driver_objects(
        CHAIN, replace(JOBSET, driver_image="tapir:cpu", node_selector=("pool=gpu",))
    )
    assert {each["metadata"]["name"] for each in (account, role, binding, config_map, job)} == {
        "shapes-driver"
    }
    submitted = parse_submitted(config_map["data"]["chain.json"].encode(), "it")
    assert submitted.chain == CHAIN and submitted.settings["claim"] == "runs"
    assert binding["roleRef"]["name"] == binding["subjects"][0]["name"] == "shapes-driver"
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "shapes-driver" and "nodeSelector" not in pod
    (container,) = pod["containers"]
    assert container["image"] == "tapir:cpu"
    assert container["command"] == [
        "python3", "-P", "-m", "cluster.kubernetes", "/etc/tapir/chain.json",
        "/var/run/secrets/kubernetes.io/serviceaccount",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {"cpu": "100m", "memory": "256Mi"}
    assert [rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]] == [
        "FailJob", "Ignore", "Ignore"
    ]  # fmt: skip
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 70]


def test_a_dry_run_applies_the_driver_and_shows_the_stages() -> None:
    text = dry_run(CHAIN, JOBSET)
    assert list(yaml.safe_load_all(text)) == driver_objects(CHAIN, JOBSET)
    assert "# the driver creates once the markers of tokenize are there:\n" in text
    marks = "# the driver creates"
    last = text[text.rindex(marks) :].split("\n", 1)[1]
    shown = "\n".join(line.removeprefix("#   ") for line in last.splitlines())
    assert yaml.safe_load(shown) == main_of(PRIOR, JOBSET)


@pytest.mark.parametrize(
    ("config", "chain", "problem"),
    [
        ({"kind": "pod"}, {}, "kubernetes.kind='pod' must be jobset or job"),
        ({"claim": ""}, {}, "kubernetes.claim must name a PersistentVolumeClaim"),
        ({"queues": ("piror=x",)}, {}, "'piror=x' must be stage=queue, with a stage of pack,"),
        ({"queues": ("prior=",)}, {}, "'prior=' must be stage=queue"),
        ({"mount": "/data"}, {}, "out=/runs/s is not inside kubernetes.mount=/data"),
        ({}, {"name": "1st"}, "'1st-driver-xxxxx' would be no Kubernetes name"),
    ],
)
def test_wrong_settings_are_refused(
    config: dict[str, Any], chain: dict[str, Any], problem: str
) -> None:
    problems = replace(JOBSET, **config).problems(replace(CHAIN, **chain))
    assert any(problem in text for text in problems), problems


def test_pod_names_have_at_most_63_characters() -> None:
    # -tokenize-run-0-3-xxxxx are 23 characters, -tokenize-3-xxxxx 17
    assert JOBSET.problems(replace(CHAIN, name="n" * 40)) == []
    (problem,) = JOBSET.problems(replace(CHAIN, name="n" * 41))
    assert problem.endswith(
        "-tokenize-run-0-3-xxxxx: 64 characters, at most 63; shorten `name` by 1"
    )
    assert JOB.problems(replace(CHAIN, name="n" * 46)) == []
    assert len(JOB.problems(replace(CHAIN, name="n" * 47))) == 1
