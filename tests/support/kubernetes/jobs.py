"""The Job controller: pods of Indexed and plain Jobs, podFailurePolicy, conditions."""

from dataclasses import dataclass, field

from tests.support.kubernetes.kubelet import Kubelet, Pod
from tests.support.kubernetes.store import Json, Store

_USER = "job-controller"


@dataclass
class _Run:
    """What the controller knows of one Job."""

    pods: list[Pod] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    """Names of all its pods, which go with it."""
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    """Indexes that are not tried again."""
    failures: dict[int, int] = field(default_factory=dict)
    """Counted failures by index."""
    verdict: tuple[str, str] | None = None
    """Reason and message of a failure that ends it."""


class JobController:
    """Plays the Job controller; call `tick` again and again."""

    def __init__(self, store: Store, kubelet: Kubelet) -> None:
        self._store, self._kubelet = store, kubelet
        self._runs: dict[str, _Run] = {}

    def pods_of(self, name: str) -> list[Pod]:
        """Running pods of a Job."""
        for job in self._store.select("Job", name=name):
            return list(self._run(job).pods)
        return []

    def tick(self) -> None:
        for job in self._store.select("Job"):
            self._advance(job, self._run(job))

    def stop(self) -> None:
        """SIGKILL to all pods."""
        for run in self._runs.values():
            for pod in run.pods:
                if pod.exit_code is None:
                    pod.kill()

    def _run(self, job: Json) -> _Run:
        return self._runs.setdefault(job["metadata"]["uid"], _Run())

    def _advance(self, job: Json, run: _Run) -> None:
        spec, status = job["spec"], job.setdefault("status", {})
        deleting = "deletionTimestamp" in job["metadata"]
        ends = deleting or run.verdict is not None or spec.get("suspend", False)
        for pod in [pod for pod in run.pods if pod.exit_code is not None]:
            run.pods.remove(pod)
            self._ended(job, pod)
            if not ends:
                self._judge(job, run, pod)
        if ends or run.verdict:
            for pod in run.pods:
                self._kubelet.end(pod)
        if deleting:
            return None if run.pods else self._remove(job, run)
        if run.verdict is not None:
            _condition(status, "FailureTarget", *run.verdict)
            if not run.pods:
                _condition(status, "Failed", *run.verdict)
        elif not spec.get("suspend"):
            self._start_or_finish(job, run)
        status |= {"active": len(run.pods), "succeeded": len(run.succeeded)}
        self._store.update(job)

    def _start_or_finish(self, job: Json, run: _Run) -> None:
        spec, status = job["spec"], job["status"]
        count = spec.get("completions", 1)
        running = {pod.index for pod in run.pods}
        left = [i for i in range(count) if i not in run.succeeded | run.failed | running]
        if not left and not running:
            if run.failed:
                run.verdict = ("FailedIndexes", "Job has failed indexes")
            else:
                _condition(status, "Complete", "CompletionsReached", "Reached all completions")
            return
        for index in left[: spec.get("parallelism", 1) - len(running)]:
            pod = self._kubelet.start(job, index)
            run.pods.append(pod)
            run.made.append(pod.name)

    def _judge(self, job: Json, run: _Run, pod: Pod) -> None:
        spec, code = job["spec"], pod.exit_code
        if code == 0:
            run.succeeded.add(pod.index)
            return
        action, rule = _action(spec, pod)
        if action == "Ignore":
            return
        if action == "FailJob":
            (container,) = spec["template"]["spec"]["containers"]
            space = job["metadata"]["namespace"]
            run.verdict = (
                "PodFailurePolicy",
                f"Container {container['name']} for pod {space}/{pod.name} failed with exit code "
                f"{code} matching FailJob rule at index {rule}",
            )
        elif action == "FailIndex":
            run.failed.add(pod.index)
        else:
            run.failures[pod.index] = run.failures.get(pod.index, 0) + 1
            self._count(spec, run, pod)

    def _count(self, spec: Json, run: _Run, pod: Pod) -> None:
        if "backoffLimitPerIndex" in spec:
            if run.failures[pod.index] > spec["backoffLimitPerIndex"]:
                run.failed.add(pod.index)
        elif sum(run.failures.values()) > spec.get("backoffLimit", 6):
            message = "Job has reached the specified backoff limit"
            run.verdict = ("BackoffLimitExceeded", message)

    def _ended(self, job: Json, pod: Pod) -> None:
        body = self._store.get("Pod", job["metadata"]["namespace"], pod.name)
        body["status"]["phase"] = "Failed" if pod.exit_code else "Succeeded"
        self._store.update(body)

    def _remove(self, job: Json, run: _Run) -> None:
        space = job["metadata"]["namespace"]
        for name in run.made:
            self._store.remove(self._store.get("Pod", space, name), _USER)
        self._store.remove(job, _USER)


def _action(spec: Json, pod: Pod) -> tuple[str, int]:
    """Action of the first rule that matches, and its index."""
    for number, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        codes = rule.get("onExitCodes", {}).get("values", [])
        conditions = [each["type"] for each in rule.get("onPodConditions", [])]
        if pod.exit_code in codes or (pod.disrupted and "DisruptionTarget" in conditions):
            return rule["action"], number
    return "Count", -1


def _condition(status: Json, kind: str, reason: str, message: str) -> None:
    conditions = status.setdefault("conditions", [])
    if all(each["type"] != kind for each in conditions):
        conditions.append({"type": kind, "status": "True", "reason": reason, "message": message})
