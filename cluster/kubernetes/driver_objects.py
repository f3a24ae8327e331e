"""The driver's objects: service account, Role, the chain as a ConfigMap, and a small Job."""

import dataclasses
from typing import Any

import yaml

from cluster.chain import CHAIN, Chain, Submitted, submitted_text
from cluster.kubernetes.config import (
    KubernetesConfig,
    driver_name,
    jobs_name,
    labels_of,
    stage_name,
)
from cluster.kubernetes.pods import claim_mount, claim_volume, variables
from cluster.kubernetes.stages import on_disruption, on_exit, stage_objects
from core.errors import EXIT_GAVE_UP, EXIT_PREEMPTED, EXIT_WRONG_INPUT
from core.files.atomic import Json

CHAIN_FOLDER = "/etc/tapir"
"""Where the driver's pod sees the chain."""
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Kubernetes puts the token of a pod's service account."""
_RESTARTS = 1000
_RBAC = "rbac.authorization.k8s.io"
_OF_KIND = {
    "Service": ("", "services"),
    "Job": ("batch", "jobs"),
    "JobSet": ("jobset.x-k8s.io", "jobsets"),
}
"""Kind of a stage's object -> its API group and resource."""


def driver_objects(chain: Chain, config: KubernetesConfig) -> list[dict[str, Any]]:
    """All objects that a submission applies, in the order of application."""
    name, space = driver_name(chain), config.namespace
    metadata = {"name": name, "namespace": space, "labels": labels_of(chain, "driver")}
    account = {"kind": "ServiceAccount", "name": name, "namespace": space}
    role = {"apiGroup": _RBAC, "kind": "Role", "name": name}
    settings: Json = dataclasses.asdict(config)
    submitted = Submitted(chain=chain, to="kubernetes", settings=settings, ids={})
    parts: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ServiceAccount"},
        {"apiVersion": f"{_RBAC}/v1", "kind": "Role", "rules": _permissions(chain, config)},
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "RoleBinding",
            "subjects": [account],
            "roleRef": role,
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "data": {CHAIN: submitted_text(submitted).decode()},
        },
        {"apiVersion": "batch/v1", "kind": "Job", "spec": _job_spec(chain, config)},
    ]
    heads = ({k: part.pop(k) for k in ("apiVersion", "kind")} for part in parts)
    return [{**head, "metadata": metadata, **part} for head, part in zip(heads, parts, strict=True)]


def dry_run(chain: Chain, config: KubernetesConfig) -> str:
    """The objects as YAML for `kubectl apply -f -`; what the driver will create as comments."""
    text = _yaml(driver_objects(chain, config))
    for job in chain.jobs:
        after = f" once the markers of {', '.join(job.after)} are there" if job.after else ""
        stage = _yaml(stage_objects(chain, job, config))
        text += f"# the driver creates{after}:\n"
        text += "".join(f"#   {line}\n" for line in stage.splitlines())
    return text


def _yaml(objects: list[dict[str, Any]]) -> str:
    return str(yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=100))


class _Plain(yaml.SafeDumper):
    """Dumps repeated values in full, without YAML aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _permissions(chain: Chain, config: KubernetesConfig) -> list[dict[str, Any]]:
    """Create the kinds that stages have; read, and for Jobs delete, those of this chain alone."""
    names = [stage_name(chain, job) for job in chain.jobs]
    kinds = {each["kind"] for job in chain.jobs for each in stage_objects(chain, job, config)}
    rules = []
    for kind in sorted(kinds):
        group, resource = _OF_KIND[kind]
        of = {"apiGroups": [group], "resources": [resource]}
        verbs = ["get", "delete"] if kind == "Job" else ["get"]
        rules += [{**of, "verbs": ["create"]}, {**of, "resourceNames": names, "verbs": verbs}]
    if config.kind == "jobset":  # their Jobs tell why one failed
        names = [jobs_name(chain, job) for job in chain.jobs]
        of = {"apiGroups": ["batch"], "resources": ["jobs"]}
        rules.append({**of, "resourceNames": names, "verbs": ["get"]})
    return rules


def _job_spec(chain: Chain, config: KubernetesConfig) -> dict[str, Any]:
    """A Job of one pod; a lost pod is replaced, and the next one takes over from the markers."""
    command = [chain.python, "-P", "-m", "cluster.kubernetes", f"{CHAIN_FOLDER}/{CHAIN}"]
    resources = {"cpu": "100m", "memory": "256Mi"}
    container = {
        "name": "driver",
        "image": config.driver_image or config.image,
        "command": [*command, TOKEN_FOLDER],
        "env": variables(PYTHONSAFEPATH="1"),
        "volumeMounts": [
            claim_mount(config),
            {"name": "chain", "mountPath": CHAIN_FOLDER, "readOnly": True},
        ],
        "resources": {"limits": resources, "requests": resources},
    }
    return {
        "backoffLimit": _RESTARTS,
        "podFailurePolicy": {
            "rules": [
                on_exit("FailJob", EXIT_WRONG_INPUT, EXIT_GAVE_UP),
                on_exit("Ignore", EXIT_PREEMPTED),
                on_disruption(),
            ]
        },
        "template": {
            "metadata": {"labels": labels_of(chain, "driver")},
            "spec": {
                "serviceAccountName": driver_name(chain),
                "restartPolicy": "Never",
                "containers": [container],
                "volumes": [
                    claim_volume(config),
                    {"name": "chain", "configMap": {"name": driver_name(chain)}},
                ],
            },
        },
    }
