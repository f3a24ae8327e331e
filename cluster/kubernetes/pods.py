"""Pods of a stage: `tapir job` around the stage's command, on the volume of the run folders."""

import re
import shlex
from typing import Any

from cluster.chain import WORKER, Chain, Job
from cluster.kubernetes.config import (
    KubernetesConfig,
    first_pod,
    labels_of,
    pods_of,
    stage_name,
)

PORT = 29_500
_GRACE_SECONDS = 600


def pod_template(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    """Template of a stage's pods; each is started once (restartPolicy Never)."""
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [_container(chain, job, config)],
        "volumes": [
            claim_volume(config),
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
        ],
    }
    if pods_of(job) > 1 and not job.array and config.kind == "job":
        spec["subdomain"] = stage_name(chain, job)  # a JobSet sets it itself
    if config.service_account:
        spec["serviceAccountName"] = config.service_account
    if config.node_selector:
        spec["nodeSelector"] = dict(label.split("=", 1) for label in config.node_selector)
    return {"metadata": {"labels": labels_of(chain, job.name)}, "spec": spec}


def claim_volume(config: KubernetesConfig) -> dict[str, Any]:
    """The volume of the run folders."""
    return {"name": "runs", "persistentVolumeClaim": {"claimName": config.claim}}


def claim_mount(config: KubernetesConfig) -> dict[str, Any]:
    """Where a container sees the run folders."""
    return {"name": "runs", "mountPath": config.mount}


def variables(**values: str) -> list[dict[str, str]]:
    """Environment variables of a container."""
    return [{"name": name, "value": value} for name, value in values.items()]


def _container(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    sources = [{"secretRef": {"name": name}} for name in config.secrets]
    sources += [{"configMapRef": {"name": name}} for name in config.config_maps]
    limits = _limits(job, config)
    return {
        "name": "tapir",
        "image": config.image,
        "command": [_literal(word) for word in _command(chain, job, config)],
        "workingDir": str(chain.out.parent),
        "env": variables(
            TAPIR_WORKERS=str(job.resources.workers if job.array else 1),
            PYTHONSAFEPATH="1",
            OMP_NUM_THREADS=str(max(1, job.resources.cpus // job.ranks)),
        ),
        **({"envFrom": sources} if sources else {}),
        "volumeMounts": [claim_mount(config), {"name": "shm", "mountPath": "/dev/shm"}],
        "resources": {"limits": limits, "requests": limits},
    }


def _literal(word: str) -> str:
    """A word of a command as Kubernetes hands it on: it replaces $(NAME), and $$ by $."""
    return re.sub(r"\$(?=[$(])", "$$", word)


def _limits(job: Job, config: KubernetesConfig) -> dict[str, str]:
    resources = job.resources
    limits = {"cpu": str(resources.cpus)}
    if resources.memory:
        limits["memory"] = re.sub(r"([KMGT])$", r"\1i", resources.memory)
    if resources.gpus:
        limits[config.gpu] = str(resources.gpus)
    return limits


def _command(chain: Chain, job: Job, config: KubernetesConfig) -> list[str]:
    name = f"{job.name}-{WORKER}" if job.array else job.name
    command = chain.tapir(*job.command)
    if not job.array and job.resources.nodes > 1:
        address = f"{first_pod(chain, job, config.kind)}.{stage_name(chain, job)}"
        command = chain.torchrun(job, "JOB_COMPLETION_INDEX", address, str(PORT))
    return chain.wrapped(
        job, name, _after_check(chain, job, command), "--again=no", f"--grace={_GRACE_SECONDS - 30}"
    )


def _after_check(chain: Chain, job: Job, command: list[str]) -> list[str]:
    """The command after `tapir doctor`; `tapir job` counts an unfit node like any other failure."""
    doctor = chain.tapir("doctor", "--node", f"--out={chain.out}", f"--gpus={job.resources.gpus}")
    return ["bash", "-c", f'{shlex.join(doctor)} && exec "$@"', "checked", *command]
