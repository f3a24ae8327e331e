"""Kubernetes: every job as an Indexed Job with a headless service; manifests are plain YAML.

A job waits in an init container for the markers of the jobs before it, so the whole chain is
applied at once and needs no operator.
"""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.chain import WORKER, Chain, Job
from core.errors import (
    EXIT_GAVE_UP,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    ConfigError,
    TapirError,
)

_PORT = 29_500
_GRACE_SECONDS = 600
_ANSWER_SECONDS = 60
_POD_FAILURES = 1000
"""Failures of each pod after which Kubernetes ends a job. `tapir job` gives up long before if there
is no progress; this bounds pods that fail before it begins."""
_LABEL = "app.kubernetes.io"


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """Settings of every pod."""

    image: str = "tapir:gpu"
    """Image made from cluster/Dockerfile."""
    namespace: str = "default"
    """Namespace of all objects."""
    claim: str = ""
    """PersistentVolumeClaim (ReadWriteMany) for the run folders; needed."""
    mount: str = "/runs"
    """Mount path of the claim; the run file's `out` must be in it."""
    secrets: tuple[str, ...] = ()
    """Secrets whose entries become environment variables (credentials of the object store)."""
    config_maps: tuple[str, ...] = ()
    """ConfigMaps whose entries become environment variables (AWS_ENDPOINT_URL)."""
    queue: str = ""
    """Kueue queue that admits the jobs; empty = they start at once."""
    gpu: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    shared_memory: str = "8Gi"
    """Size of /dev/shm."""
    service_account: str = ""
    """Service account of the pods."""
    node_selector: tuple[str, ...] = ()
    """Labels that nodes must have, as key=value."""

    def problems(self, chain: Chain) -> list[str]:
        problems = []
        if not self.claim:
            problems.append(
                "kubernetes.claim must name a PersistentVolumeClaim for the run folders"
            )
        if not str(chain.out).startswith(self.mount.rstrip("/") + "/"):
            problems.append(
                f"out={chain.out} is not inside kubernetes.mount={self.mount}; try "
                f"out: {self.mount.rstrip('/')}/{chain.name}"
            )
        if any("=" not in label for label in self.node_selector):
            problems.append("kubernetes.node_selector must be key=value")
        problems += [
            f"{name!r} is not a Kubernetes name (lower case, digits, -, at most 50); change `name`"
            for name in (_name(chain, job) for job in chain.jobs)
            if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", name)
        ]
        return problems


def manifests(chain: Chain, config: KubernetesConfig) -> list[dict[str, Any]]:
    """All objects of a chain, in the order of application."""
    objects = []
    for job in chain.jobs:
        if job.resources.nodes > 1:
            objects.append(_service(chain, job, config))
        objects.append(_job(chain, job, config))
    return objects


def dry_run(chain: Chain, config: KubernetesConfig) -> str:
    """The objects as YAML for `kubectl apply -f -`."""
    objects = manifests(chain, config)
    return str(yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=100))


class _Plain(yaml.SafeDumper):
    """Dumps repeated values in full, without YAML aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _name(chain: Chain, job: Job) -> str:
    return f"{chain.name}-{job.name}"


def _labels(chain: Chain, job: Job) -> dict[str, str]:
    return {
        f"{_LABEL}/name": "tapir",
        f"{_LABEL}/instance": chain.name,
        f"{_LABEL}/component": job.name,
    }


def _service(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    """A headless service: gives each pod of a job a DNS name."""
    labels = _labels(chain, job)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": _name(chain, job),
            "namespace": config.namespace,
            "labels": labels,
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }


def _job(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    resources = job.resources
    count = resources.workers if job.array else resources.nodes
    labels = _labels(chain, job)
    queue = {"kueue.x-k8s.io/queue-name": config.queue} if config.queue else {}
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": (resources.parallelism or count) if job.array else count,
        "backoffLimit": _POD_FAILURES * count,
        "podFailurePolicy": {"rules": _rules()},
        "template": {"metadata": {"labels": labels}, "spec": _pod(chain, job, config)},
    }
    if config.queue:
        spec["suspend"] = True
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": _name(chain, job),
            "namespace": config.namespace,
            "labels": {**labels, **queue},
        },
        "spec": spec,
    }


def _rules() -> list[dict[str, Any]]:
    """What no other start mends ends the job; preemptions do not count as failures."""

    def on(action: str, *codes: int) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"operator": "In", "values": list(codes)}}

    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return [
        on("FailJob", EXIT_WRONG_INPUT, EXIT_GAVE_UP),
        on("Ignore", EXIT_PREEMPTED),
        {"action": "Ignore", "onPodConditions": [disrupted]},
    ]


def _pod(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    doctor = chain.tapir(
        "doctor", "--node", f"--out={chain.out}"
    )  # only the main container has GPUs
    first = [_container(chain, job, config, "doctor", doctor)]
    earlier = (before for before in chain.jobs if before.name in job.after)
    waited = [name for before in earlier for name in before.markers()]
    if waited:
        wait = [*chain.tapir("job", f"--out={chain.out}", "--after"), *waited]
        first.insert(0, _container(chain, job, config, "wait", wait))
    command = _job_command(chain, job)
    main = _container(chain, job, config, "tapir", command)
    main["resources"] = {"limits": _limits(job, config), "requests": _limits(job, config)}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "initContainers": first,
        "containers": [main],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": config.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
        ],
    }
    if job.resources.nodes > 1:
        spec["subdomain"] = _name(chain, job)
    if config.service_account:
        spec["serviceAccountName"] = config.service_account
    if config.node_selector:
        spec["nodeSelector"] = dict(label.split("=", 1) for label in config.node_selector)
    return spec


def _container(
    chain: Chain, job: Job, config: KubernetesConfig, name: str, command: list[str]
) -> dict[str, Any]:
    workers = job.resources.workers if job.array else 1
    values = {
        "TAPIR_WORKERS": str(workers),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(max(1, job.resources.cpus // job.ranks)),
    }
    sources = [{"secretRef": {"name": name}} for name in config.secrets]
    sources += [{"configMapRef": {"name": name}} for name in config.config_maps]
    return {
        "name": name,
        "image": config.image,
        "command": command,
        "workingDir": str(chain.out.parent),
        "env": [{"name": key, "value": value} for key, value in values.items()],
        **({"envFrom": sources} if sources else {}),
        "volumeMounts": [
            {"name": "runs", "mountPath": config.mount},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _limits(job: Job, config: KubernetesConfig) -> dict[str, str]:
    resources = job.resources
    limits = {"cpu": str(resources.cpus)}
    if resources.memory:
        limits["memory"] = re.sub(r"([KMGT])$", r"\1i", resources.memory)
    if resources.gpus:
        limits[config.gpu] = str(resources.gpus)
    return limits


def _job_command(chain: Chain, job: Job) -> list[str]:
    name = f"{job.name}-{WORKER}" if job.array else job.name
    command = chain.tapir(*job.command)
    if not job.array and job.resources.nodes > 1:
        service = _name(chain, job)
        address = f"{service}-0.{service}", str(_PORT)
        command = chain.torchrun(job, "JOB_COMPLETION_INDEX", *address)
    return chain.wrapped(job, name, command, "--again=no", f"--grace={_GRACE_SECONDS - 30}")


def submit(chain: Chain, config: KubernetesConfig) -> dict[str, str]:
    """Delete earlier jobs of these names and apply all objects; returns the names by job.

    Raises: ConfigError without kubectl; TapirError with the cluster's answer.
    """
    names = {job.name: _name(chain, job) for job in chain.jobs}
    _kubectl(config, "delete", "jobs", "--ignore-not-found", "--wait=true", *names.values())
    _kubectl(config, "apply", "-f", "-", text=dry_run(chain, config))
    return names


def states(chain: Chain, config: KubernetesConfig) -> dict[str, str]:
    """The cluster's status of each job."""
    text = _kubectl(config, "get", "jobs", "-l", f"{_LABEL}/instance={chain.name}", "-o", "json")
    by_job = {}
    for item in json.loads(text)["items"]:
        status = item.get("status", {})
        ended = [c["type"] for c in status.get("conditions", []) if c["status"] == "True"]
        counts = [f"{status[k]} {k}" for k in ("active", "succeeded", "failed") if status.get(k)]
        by_job[item["metadata"]["labels"][f"{_LABEL}/component"]] = ", ".join([*ended, *counts])
    return by_job


def cancel(chain: Chain, config: KubernetesConfig) -> None:
    """Delete all objects of a chain and wait until they are gone."""
    chosen = f"{_LABEL}/instance={chain.name}"
    _kubectl(config, "delete", "jobs,services", "-l", chosen, "--wait=true")


def logs_command(chain: Chain, config: KubernetesConfig, job: str, follow: bool) -> list[str]:
    """The kubectl command that shows a job's output."""
    chosen = f"{_LABEL}/instance={chain.name},{_LABEL}/component={job}"
    command = ["kubectl", "-n", config.namespace, "logs", "-l", chosen, "--all-containers"]
    return [*command, "--prefix", "--tail=-1", *(["-f"] if follow else [])]


def _kubectl(config: KubernetesConfig, *arguments: str, text: str = "") -> str:
    if shutil.which("kubectl") is None:
        raise ConfigError(
            "there is no kubectl on this machine: install it, or apply the output of --dry-run"
        )
    command = ["kubectl", "-n", config.namespace, *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=_ANSWER_SECONDS
    )
    if done.returncode:
        raise TapirError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
