"""Query external programs, and check schedulers with them."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.doctor.finding import Finding, bad, ok, warning

_SECONDS = 8.0
_SLURM = ("sinfo", "sbatch", "squeue", "scontrol", "scancel", "srun")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Output of a program, or why there is none."""

    text: str = ""
    problem: str = ""


def ask(command: Sequence[str], seconds: float) -> Answer:
    """Run a program and return its output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer(problem=f"no answer within {seconds:g} s")
    except OSError as error:
        return Answer(problem=f"cannot be run: {error.strerror}")
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return Answer(problem=lines[-1] if lines else f"exit code {done.returncode}")
    return Answer(text=done.stdout.strip())


def scheduler_findings(kind: str) -> list[Finding]:
    """Check that the scheduler answers and that this user may submit."""
    return _slurm() if kind == "slurm" else _kubernetes()


def _slurm() -> list[Finding]:
    missing = [name for name in _SLURM if shutil.which(name) is None]
    if missing:
        fix = "apt install slurm-client, module load slurm, or put its bin folder on the PATH"
        return [bad("scheduler", f"Slurm: {', '.join(missing)} not found", fix)]
    answer = ask(["sinfo", "--noheader", "--format=%t %D"], _SECONDS)
    if answer.problem:
        fix = "is slurmctld up and reachable? see scontrol ping, SLURM_CONF, slurmctld's log"
        return [bad("scheduler", f"Slurm does not answer: {answer.problem}", fix), *_munge()]
    states = [line.split()[0].rstrip("*~#!%$@+^-") for line in answer.text.splitlines()]
    text = f"Slurm answers; nodes: {', '.join(answer.text.splitlines())}"
    if not set(states) - {"down", "drain", "drained", "fail", "unk", "inval"}:
        return [bad("scheduler", text, "no node takes jobs: see sinfo -R")]
    return [ok("scheduler", text)]


def _munge() -> list[Finding]:
    """Check Munge, only if Slurm does not answer: a private Munge may use another socket."""
    if shutil.which("munge") is None:
        return []
    answer = ask(["munge", "--no-input"], _SECONDS)
    if answer.problem:
        fix = "systemctl restart munge; all nodes need the same /etc/munge/munge.key and time"
        return [warning("munge", f"munge makes no credential: {answer.problem}", fix)]
    return [ok("munge", "munge makes credentials")]


def _kubernetes() -> list[Finding]:
    if shutil.which("kubectl") is None:
        return [bad("scheduler", "Kubernetes: kubectl not found", "install kubectl")]
    command = ["kubectl", "auth", "can-i", "create", "jobs.batch", "--request-timeout=5s"]
    answer = ask(command, _SECONDS)
    if answer.text.endswith("yes"):
        return [ok("scheduler", "Kubernetes answers; this user may create jobs")]
    if answer.problem == "no" or answer.text.endswith("no"):
        text = "Kubernetes answers; this user may not create jobs"
        return [bad("scheduler", text, "ask for a role with create on jobs.batch here")]
    fix = "check KUBECONFIG and the cluster's address: kubectl cluster-info"
    return [bad("scheduler", f"Kubernetes does not answer: {answer.problem}", fix)]
