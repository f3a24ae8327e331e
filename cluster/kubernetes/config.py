"""Settings of the Kubernetes backend, and the names of a chain's objects."""

import re
from dataclasses import dataclass
from typing import Literal

from cluster.chain import Chain, Job

LABEL = "app.kubernetes.io"
REPLICATED = "run"
"""Name of the only replicated job of a stage's JobSet."""
LONGEST_NAME = 63
"""Characters of a pod's name, which is also its host name (RFC 1123)."""
_RANDOM = "-xxxxx"
"""What Kubernetes appends to a pod's name."""
_PART = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """Settings of every pod."""

    image: str = "tapir:gpu"
    """Image made from cluster/Dockerfile."""
    driver_image: str = ""
    """Image of the driver, e.g. the one without CUDA; empty = `image`."""
    kind: Literal["jobset", "job"] = "jobset"
    """Object of a stage: a JobSet, whose controller restarts it, or a Job, which the driver deletes
    and creates again."""
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
    """Kueue queue that admits the stages; empty = they start at once."""
    queues: tuple[str, ...] = ()
    """Kueue queues of single stages, as stage=queue."""
    gpu: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    shared_memory: str = "8Gi"
    """Size of /dev/shm."""
    service_account: str = ""
    """Service account of the stages' pods; the driver has its own."""
    node_selector: tuple[str, ...] = ()
    """Labels that the stages' nodes must have, as key=value."""

    def problems(self, chain: Chain) -> list[str]:
        problems = []
        if self.kind not in ("jobset", "job"):
            problems.append(f"kubernetes.kind={self.kind!r} must be jobset or job")
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
        stages = [job.name for job in chain.jobs]
        problems += [
            f"kubernetes.queues: {text!r} must be stage=queue, with a stage of {', '.join(stages)}"
            for text in self.queues
            if text.partition("=")[0] not in stages or not text.partition("=")[2]
        ]
        pods = [driver_name(chain) + _RANDOM, *(self._pod_name(chain, job) for job in chain.jobs)]
        return problems + [text for pod in pods if (text := _name_problem(pod))]

    def queue_of(self, job: Job) -> str:
        """Kueue queue of a stage; empty = none."""
        return dict(text.split("=", 1) for text in self.queues).get(job.name, self.queue)

    def _pod_name(self, chain: Chain, job: Job) -> str:
        """Name of the last pod of a stage, the longest one."""
        job_name = first_pod(chain, job, self.kind).removesuffix("-0")
        return f"{job_name}-{pods_of(job) - 1}{_RANDOM}"


def stage_name(chain: Chain, job: Job) -> str:
    """Name of a stage's objects: the same at each start, so that none can exist twice."""
    return f"{chain.name}-{job.name}"


def driver_name(chain: Chain) -> str:
    """Name of the driver's objects."""
    return f"{chain.name}-driver"


def jobs_name(chain: Chain, job: Job) -> str:
    """Name of the Job that a stage's JobSet makes."""
    return f"{stage_name(chain, job)}-{REPLICATED}-0"


def first_pod(chain: Chain, job: Job, kind: str) -> str:
    """Host name of a stage's first pod; the pod's own name has a random end."""
    name = jobs_name(chain, job) if kind == "jobset" else stage_name(chain, job)
    return f"{name}-0"


def pods_of(job: Job) -> int:
    """Number of a stage's pods."""
    return job.resources.workers if job.array else job.resources.nodes


def labels_of(chain: Chain, component: str) -> dict[str, str]:
    """Labels of the objects and pods of a stage, or of the driver."""
    return {
        f"{LABEL}/name": "tapir",
        f"{LABEL}/instance": chain.name,
        f"{LABEL}/component": component,
    }


def _name_problem(pod: str) -> str:
    if not _PART.fullmatch(pod):
        return f"{pod!r} would be no Kubernetes name (lower case, digits, -); change `name`"
    if len(pod) > LONGEST_NAME:
        return (
            f"a pod would be called {pod}: {len(pod)} characters, at most {LONGEST_NAME}; shorten "
            f"`name` by {len(pod) - LONGEST_NAME}"
        )
    return ""
