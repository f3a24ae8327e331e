"""The object of a stage: a JobSet, or a Job with a headless service."""

from typing import Any

from cluster.chain import Chain, Job
from cluster.kubernetes.config import (
    REPLICATED,
    KubernetesConfig,
    labels_of,
    pods_of,
    stage_name,
)
from cluster.kubernetes.pods import PORT, pod_template
from core.errors import EXIT_GAVE_UP, EXIT_PREEMPTED, EXIT_WRONG_INPUT

JOBSET_VERSION = "jobset.x-k8s.io/v1alpha2"
FINAL_REASONS = ("PodFailurePolicy", "FailedIndexes", "MaxFailedIndexesExceeded")
"""Reasons of a failed Job after which no restart helps: an exit code said so."""
_QUEUE = "kueue.x-k8s.io/queue-name"
_NO_LIMIT = 2**31 - 1
"""Restarts of a worker: `tapir job` ends a worker that makes no progress with EXIT_GAVE_UP."""


def stage_objects(chain: Chain, job: Job, config: KubernetesConfig) -> list[dict[str, Any]]:
    """All objects of a stage, in the order of creation; the last one runs it."""
    if config.kind == "jobset":
        return [_jobset(chain, job, config)]
    several = pods_of(job) > 1 and not job.array
    services = [_service(chain, job, config)] if several else []
    return [*services, _job(chain, job, config)]


def _metadata(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    queue = config.queue_of(job)
    return {
        "name": stage_name(chain, job),
        "namespace": config.namespace,
        "labels": {**labels_of(chain, job.name), **({_QUEUE: queue} if queue else {})},
    }


def _service(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    """A headless service: gives each pod of a Job a DNS name; a JobSet makes its own."""
    labels = labels_of(chain, job.name)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": stage_name(chain, job),
            "namespace": config.namespace,
            "labels": labels,
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _job(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(chain, job, config),
        "spec": {**_job_spec(chain, job, config), **_suspended(job, config)},
    }


def _jobset(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    return {
        "apiVersion": JOBSET_VERSION,
        "kind": "JobSet",
        "metadata": _metadata(chain, job, config),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 0, "rules": _jobset_rules(job)},
            "replicatedJobs": [
                {
                    "name": REPLICATED,
                    "replicas": 1,
                    "template": {"spec": _job_spec(chain, job, config)},
                }
            ],
            **_suspended(job, config),
        },
    }


def _suspended(job: Job, config: KubernetesConfig) -> dict[str, bool]:
    """Kueue starts what is suspended."""
    return {"suspend": True} if config.queue_of(job) else {}


def _jobset_rules(job: Job) -> list[dict[str, Any]]:
    """Failures that an exit code declared final fail the JobSet; all others restart all its pods.

    The restarts have no limit: a JobSet never resets its count, and `tapir job` ends a loop without
    progress. Workers of an array restart alone, within their Job.
    """
    final = {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": [*FINAL_REASONS] if job.array else ["PodFailurePolicy"],
    }
    return [final, {"name": "others", "action": "RestartJobSetAndIgnoreMaxRestarts"}]


def _job_spec(chain: Chain, job: Job, config: KubernetesConfig) -> dict[str, Any]:
    count = pods_of(job)
    return {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": (job.resources.parallelism or count) if job.array else count,
        **(_each_worker_alone() if job.array else _all_together()),
        "template": pod_template(chain, job, config),
    }


def _all_together() -> dict[str, Any]:
    """The first failure of a pod fails the Job, so that all pods restart together."""
    return {
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [on_exit("FailJob", EXIT_WRONG_INPUT, EXIT_GAVE_UP)]},
    }


def _each_worker_alone() -> dict[str, Any]:
    """A failed worker starts again alone; preemptions and lost nodes do not delay it."""
    return {
        "backoffLimitPerIndex": _NO_LIMIT,
        "podFailurePolicy": {
            "rules": [
                on_exit("FailJob", EXIT_WRONG_INPUT),
                on_exit("FailIndex", EXIT_GAVE_UP),
                on_exit("Ignore", EXIT_PREEMPTED),
                on_disruption(),
            ]
        },
    }


def on_exit(action: str, *codes: int) -> dict[str, Any]:
    """A rule of podFailurePolicy for exit codes of a container."""
    return {"action": action, "onExitCodes": {"operator": "In", "values": [*codes]}}


def on_disruption() -> dict[str, Any]:
    """A rule of podFailurePolicy: evicted pods and lost nodes do not count."""
    condition = {"type": "DisruptionTarget", "status": "True"}
    return {"action": "Ignore", "onPodConditions": [condition]}
