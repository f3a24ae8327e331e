"""The JobSet controller, with failure policy rules as JobSet evaluates them, and Kueue."""

from typing import Any

from tests.support.kubernetes.schemas import embedded_jobs
from tests.support.kubernetes.store import Json, Refused, Store

_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
_USER = "jobset-controller"
_QUEUE = "kueue.x-k8s.io/queue-name"


class JobSetController:
    """Plays the JobSet controller; call `tick` again and again."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def tick(self) -> None:
        for jobset in self._store.select("JobSet"):
            self._advance(jobset)

    def _advance(self, jobset: Json) -> None:
        status = jobset.setdefault("status", {"restarts": 0})
        children = self._children(jobset)
        if "deletionTimestamp" in jobset["metadata"]:
            for child in children:
                self._store.delete(child, _USER)
            if not children:
                self._store.remove(jobset, _USER)
            return
        if status.get("terminalState") or jobset["spec"].get("suspend"):
            return
        current = [c for c in children if c["metadata"]["labels"][_ATTEMPT] == _attempt(status)]
        failed = [child for child in current if _has(child, "Failed")]
        if failed:
            self._fail(jobset, failed[0])
        elif current and all(_has(child, "Complete") for child in current):
            _end(status, "Completed", "AllJobsCompleted", "jobset completed successfully")
        else:
            self._make(jobset, children)
        self._store.update(jobset)

    def _children(self, jobset: Json) -> list[Json]:
        metadata = jobset["metadata"]
        chosen = f"jobset.sigs.k8s.io/jobset-name={metadata['name']}"
        return self._store.select("Job", metadata["namespace"], chosen)

    def _make(self, jobset: Json, children: list[Json]) -> None:
        """Delete Jobs of earlier attempts; create a Job once that of its name has gone."""
        status, name = jobset["status"], jobset["metadata"]["name"]
        for child in children:
            if child["metadata"]["labels"][_ATTEMPT] != _attempt(status):
                self._store.delete(child, _USER)
        names = [child["metadata"]["name"] for child in children]
        for job in embedded_jobs(jobset):
            if job["metadata"]["name"] in names:
                continue
            labels = {"jobset.sigs.k8s.io/jobset-name": name, _ATTEMPT: _attempt(status)}
            job["metadata"]["labels"] = labels
            if jobset["spec"].get("network", {}).get("enableDNSHostnames"):
                job["spec"]["template"]["spec"]["subdomain"] = name
            self._store.create(job, _USER)

    def _fail(self, jobset: Json, job: Json) -> None:
        """Act by the first rule that matches the failed Job's reason."""
        policy, status = jobset["spec"].get("failurePolicy"), jobset["status"]
        action = "RestartJobSet" if policy else "FailJobSet"
        (condition,) = [c for c in job["status"]["conditions"] if c["type"] == "Failed"]
        for rule in (policy or {}).get("rules", []):
            if condition["reason"] in rule.get("onJobFailureReasons", [condition["reason"]]):
                action = rule["action"]
                break
        counted = status.get("restartsCountTowardsMax", 0)
        if action == "RestartJobSet" and counted >= policy.get("maxRestarts", 0):
            _end(status, "Failed", "ReachedMaxRestarts", "jobset failed due to max restarts")
        elif action == "FailJobSet":
            message = f"jobset failed (first failed job: {job['metadata']['name']})"
            _end(status, "Failed", "FailJobSetFailurePolicyAction", message)
        else:
            status["restarts"] += 1
            status["restartsCountTowardsMax"] = counted + (action == "RestartJobSet")


class Kueue:
    """Admits what waits in a queue, at once: a Workload, then suspend is false."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def tick(self) -> None:
        for kind in ("Job", "JobSet"):
            for body in self._store.select(kind):
                metadata = body["metadata"]
                if not body["spec"].get("suspend") or _QUEUE not in metadata.get("labels", {}):
                    continue
                name = f"{kind.lower()}-{metadata['name']}-{metadata['uid'][:5]}"
                self._create(metadata, name)
                body["spec"]["suspend"] = False
                self._store.update(body)

    def _create(self, of: dict[str, Any], name: str) -> None:
        metadata = {"name": name, "namespace": of["namespace"], "labels": of["labels"]}
        kueue = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload"}
        try:
            self._store.create({**kueue, "metadata": metadata}, "kueue")
        except Refused as error:
            assert error.code == 409


def _attempt(status: Json) -> str:
    return str(status["restarts"])


def _has(job: Json, kind: str) -> bool:
    return any(each["type"] == kind for each in job.get("status", {}).get("conditions", []))


def _end(status: Json, kind: str, reason: str, message: str) -> None:
    condition = {"type": kind, "status": "True", "reason": reason, "message": message}
    status |= {"terminalState": kind, "conditions": [condition]}
