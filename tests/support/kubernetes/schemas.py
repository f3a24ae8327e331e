"""Check objects as an API server would: schemas offline, and what schemas leave open."""

import re
from typing import Any, get_args

import kubernetes_validate
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import BaseModel, ValidationError

LONGEST_NAME = 63
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
_ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
"""Actions that need no alpha gate."""
_REASONS = (
    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
    *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
)
_QUANTITY = "instance of IoK8sApimachineryPkgApiResourceQuantity"


def job_problems(job: dict[str, Any], version: str = "1.37") -> list[str]:
    """Problems of a batch/v1 Job, or of any other built-in object."""
    try:
        kubernetes_validate.validate(job, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return _policy_problems(job["spec"]) if job["kind"] == "Job" else []


def _policy_problems(spec: dict[str, Any]) -> list[str]:
    """Problems of podFailurePolicy that its schema leaves open."""
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    actions = ["FailJob", "Ignore", "Count"]
    actions += ["FailIndex"] if "backoffLimitPerIndex" in spec else []
    problems = [
        f"podFailurePolicy action {rule['action']!r}"
        for rule in rules
        if rule["action"] not in actions
    ]
    if rules and spec["template"]["spec"].get("restartPolicy") != "Never":
        problems.append("podFailurePolicy needs restartPolicy Never")
    for rule in rules:
        codes = rule.get("onExitCodes", {}).get("values", [])
        if codes != sorted(set(codes)) or 0 in codes:
            problems.append(f"podFailurePolicy exit codes {codes}")
    return problems


def embedded_jobs(jobset: dict[str, Any]) -> list[dict[str, Any]]:
    """The Jobs that a JobSet makes, as batch/v1 objects."""
    name, space = jobset["metadata"]["name"], jobset["metadata"]["namespace"]
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                **each["template"].get("metadata", {}),
                "name": f"{name}-{each['name']}-{number}",
                "namespace": space,
            },
            "spec": each["template"]["spec"],
        }
        for each in jobset["spec"]["replicatedJobs"]
        for number in range(each.get("replicas", 1))
    ]


def jobset_problems(jobset: dict[str, Any]) -> list[str]:
    """Problems of a JobSet: unknown fields and wrong types, then what the models leave open."""
    try:
        _STRICT.model_validate(jobset)
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        # the models take quantities as objects only; the embedded Job's schema checks their text
        problems = [text for text in texts if not text.endswith(_QUANTITY)]
        if problems:
            return problems
    problems = []
    spec = jobset["spec"]
    for rule in spec.get("failurePolicy", {}).get("rules", []):
        if not _RULE_NAME.fullmatch(rule["name"]):
            problems.append(f"rule name {rule['name']!r}")
        if rule["action"] not in _ACTIONS:
            problems.append(f"action {rule['action']!r}")
        problems += [
            f"reason {reason!r}"
            for reason in rule.get("onJobFailureReasons", [])
            if reason not in _REASONS
        ]
    first, *_ = spec["replicatedJobs"]
    if "dependsOn" in first:
        problems.append("dependsOn of the first replicatedJob")
    for job in embedded_jobs(jobset):
        last = job["spec"].get("completions", 1) - 1
        pod = f"{job['metadata']['name']}-{last}-xxxxx"
        if len(pod) > LONGEST_NAME or not _LABEL.fullmatch(pod):
            problems.append(f"pod name {pod!r} has {len(pod)} characters")
    return problems


def problems_of(body: dict[str, Any]) -> list[str]:
    """Problems of any object that a chain has."""
    if body["kind"] != "JobSet":
        return job_problems(body)
    if problems := jobset_problems(body):
        return problems
    return [text for job in embedded_jobs(body) for text in job_problems(job)]


def _strict(model: type[BaseModel], made: dict[type[BaseModel], type[BaseModel]]) -> None:
    """Refuse unknown fields in a model and all that it holds."""
    if model in made:
        return
    made[model] = model
    model.model_config["extra"] = "forbid"
    for field in model.model_fields.values():
        for kind in _kinds(field.annotation):
            _strict(kind, made)
    model.model_rebuild(force=True)


def _kinds(hint: Any) -> list[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    return [kind for part in get_args(hint) for kind in _kinds(part)]


_strict(JobsetV1alpha2JobSet, {})
_STRICT = JobsetV1alpha2JobSet
