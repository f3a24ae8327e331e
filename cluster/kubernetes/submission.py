"""Send, watch and cancel a chain from a user's machine, by kubectl."""

import json
import shutil
import subprocess
from typing import Any

from cluster.chain import Chain
from cluster.kubernetes.config import LABEL, KubernetesConfig, driver_name, stage_name
from cluster.kubernetes.driver_objects import dry_run
from cluster.kubernetes.outcome import outcome_of
from core.errors import ConfigError, TapirError

_ANSWER_SECONDS = 60
_END_SECONDS = 700
"""Seconds for objects to go: their pods may take ten minutes to save."""
_COMPONENT = f"{LABEL}/component"
_JOBSETS = "jobsets.jobset.x-k8s.io"
_NO_SUCH_KIND = "the server doesn't have a resource type"
_NOT_INSTALLED = (
    "this cluster has no JobSets: install https://jobset.sigs.k8s.io, or set kubernetes.kind: job"
)


def submit(chain: Chain, config: KubernetesConfig) -> dict[str, str]:
    """Delete what an earlier submission left and apply the driver; returns the names by job.

    Raises: ConfigError without kubectl, or without JobSets where stages are JobSets; TapirError
    with the cluster's answer.
    """
    cancel(chain, config)
    _kubectl(config, "apply", "-f", "-", text=dry_run(chain, config))
    return {job.name: stage_name(chain, job) for job in chain.jobs}


def states(chain: Chain, config: KubernetesConfig) -> dict[str, str]:
    """The cluster's status of each job: that of its object, else that of the driver."""
    kinds = f"jobs,{_JOBSETS}" if config.kind == "jobset" else "jobs"
    text = _kubectl(config, "get", kinds, "-l", _chosen(chain), "-o", "json")
    objects = {i["metadata"]["labels"][_COMPONENT]: i for i in json.loads(text)["items"]}
    driver = objects.get("driver")
    drives = driver is not None and outcome_of(driver).state in ("active", "deleting")
    return {job.name: _state(objects.get(job.name), drives) for job in chain.jobs}


def _state(current: dict[str, Any] | None, drives: bool) -> str:
    if current is None:
        return "waiting" if drives else "not there"
    outcome, status = outcome_of(current), current.get("status", {})
    if outcome.state == "complete":
        return "done"
    if outcome.state == "failed":
        text = f"Failed: {outcome.reason}: {outcome.message}"
        return f"restarting ({text})" if drives and not outcome.is_final else text
    counts = [f"{status[k]} {k}" for k in ("active", "succeeded", "failed") if status.get(k)]
    counts += [f"{status['restarts']} restarts"] if status.get("restarts") else []
    if current["spec"].get("suspend"):
        counts.insert(0, "queued")
    return ", ".join(counts) or "running"


def cancel(chain: Chain, config: KubernetesConfig) -> None:
    """Delete all objects of a chain and wait until they are gone; the driver goes first."""
    of_driver = f"job/{driver_name(chain)}"
    _delete(config, of_driver)
    stages = ["jobs,services", "-l", f"{_chosen(chain)},{_COMPONENT}!=driver"]
    try:
        _delete(config, _JOBSETS, *stages[1:])
    except TapirError as error:
        if _NO_SUCH_KIND not in str(error):
            raise
        if config.kind == "jobset":
            raise ConfigError(_NOT_INSTALLED) from error
    _delete(config, *stages)
    _delete(config, "configmaps,rolebindings,roles,serviceaccounts", "-l", _chosen(chain))


def logs_command(chain: Chain, config: KubernetesConfig, job: str, follow: bool) -> list[str]:
    """The kubectl command that shows a job's output."""
    chosen = f"{_chosen(chain)},{_COMPONENT}={job}"
    command = ["kubectl", "-n", config.namespace, "logs", "-l", chosen, "--all-containers"]
    return [*command, "--prefix", "--tail=-1", *(["-f"] if follow else [])]


def _chosen(chain: Chain) -> str:
    return f"{LABEL}/instance={chain.name}"


def _delete(config: KubernetesConfig, *what: str) -> None:
    """Delete objects after their pods (foreground), and wait for that."""
    options = ("--ignore-not-found", "--cascade=foreground", "--wait=true")
    _kubectl(config, "delete", *what, *options, seconds=_END_SECONDS)


def _kubectl(
    config: KubernetesConfig, *arguments: str, text: str = "", seconds: float = _ANSWER_SECONDS
) -> str:
    if shutil.which("kubectl") is None:
        raise ConfigError(
            "there is no kubectl on this machine: install it, or apply the output of --dry-run"
        )
    command = ["kubectl", "-n", config.namespace, *arguments]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise TapirError(f"{' '.join(command)}: no answer in {seconds:.0f} s") from error
    if done.returncode:
        raise TapirError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
