"""Slurm: jobs as sbatch scripts that a person can read, run by hand and change."""

import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cluster.chain import LOGS, SCRIPTS, WORKER, Chain, Job
from cluster.slurm_job import CLEANING, without_bad
from core.errors import ConfigError, TapirError
from core.files.atomic import write_atomic

_ANSWER_SECONDS = 60
_PORTS, _NEXT = 20_000, 997
"""Ports of the rendezvous, and the step to another one at each restart: something that still holds
the port must not end every start."""
_FORGOTTEN = "Invalid job id"
"""squeue's error for jobs that Slurm no longer knows."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """sbatch settings of every job."""

    partition: str = ""
    """Partition; empty = the default one."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Features that nodes must have."""
    exclude: str = ""
    """Nodes that are never used."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """What starts the ranks: torchrun on each node, or srun itself."""
    warn_seconds: int = 120
    """A job receives SIGUSR1 this many seconds before its time limit, so that it saves."""
    doctor: bool = True
    """Check every node before the ranks start, and exclude bad ones."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, e.g. --reservation=NAME."""

    def problems(self) -> list[str]:
        problems = []
        if self.launcher not in ("torchrun", "srun"):
            problems.append(f"slurm.launcher={self.launcher!r} must be torchrun or srun")
        if self.warn_seconds < 1:
            problems.append("slurm.warn_seconds must be at least 1")
        if any(not re.fullmatch(r"--\S+", option) for option in self.extra):
            problems.append("slurm.extra must be options without spaces that begin with --")
        words = (self.partition, self.account, self.qos, self.constraint, self.exclude)
        if any(re.search(r"\s", word) for word in words):
            problems.append(
                "slurm.partition, account, qos, constraint, exclude must not have spaces"
            )
        return problems


def render(chain: Chain, job: Job, config: SlurmConfig) -> str:
    """The batch script of a job."""
    words = " \\\n  ".join(_lines(_job_command(chain, job, config)))
    options = "\n".join(f"#SBATCH {option}" for option in _options(chain, job, config))
    resources = job.resources
    threads = max(1, resources.cpus // job.ranks)
    return f"""#!/bin/bash
{options}
# {" ".join(job.text.splitlines())}
cd {shlex.quote(str(chain.folder))} || exit 2
export OMP_NUM_THREADS={threads} PYTHONSAFEPATH=1
export TAPIR_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd " ")
export MASTER_ADDR=$(scontrol show node "${{TAPIR_NODES%% *}}" | grep -o "NodeAddr=[^ ]*" \
| cut -d= -f2)
export MASTER_PORT=$(({_PORTS} + (SLURM_JOB_ID + {_NEXT} * ${{SLURM_RESTART_COUNT:-0}}) % {_PORTS}))
exec {words}
"""


def _options(chain: Chain, job: Job, config: SlurmConfig) -> list[str]:
    resources = job.resources
    log = _escaped(chain.log(job, "%a" if job.array else ""))
    options = [
        f"--job-name={chain.name}-{job.name}",
        f"--output={log}",
        "--open-mode=append",
        f"--nodes={resources.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={resources.cpus}",
        "--requeue",
        "--kill-on-invalid-dep=yes",
        f"--signal=B:USR1@{config.warn_seconds}",
    ]
    if job.array:
        limit = f"%{resources.parallelism}" if resources.parallelism else ""
        options.append(f"--array=0-{resources.workers - 1}{limit}")
    given = {
        "--gpus-per-node": resources.gpus or "",
        "--mem": resources.memory,
        "--time": resources.minutes or "",
        "--partition": config.partition,
        "--account": config.account,
        "--qos": config.qos,
        "--constraint": config.constraint,
        "--exclude": config.exclude,
    }
    options += [f"{name}={value}" for name, value in given.items() if value]
    return [*options, *config.extra]


def _escaped(log: Path) -> str:
    """Escape a log's path for an #SBATCH line, where a space ends it and # begins a comment."""
    return re.sub(r"([\s\\\"'#])", r"\\\1", str(log))


def _job_command(chain: Chain, job: Job, config: SlurmConfig) -> list[str]:
    """The stage's command, wrapped in its launcher, wrapped in `tapir job`."""
    name = f"{job.name}-{WORKER}" if job.array else job.name
    check = ["--check-nodes", f"--gpus={job.resources.gpus}"] if config.doctor else []
    command = _start_ranks(chain, job, config)
    return chain.wrapped(job, name, command, "--again=slurm", *check)


def _start_ranks(chain: Chain, job: Job, config: SlurmConfig) -> list[str]:
    resources = job.resources
    if job.array or job.world == 1:
        return chain.tapir(*job.command)
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", f"--nodes={resources.nodes}"]
    if config.launcher == "srun":
        each = f"--ntasks-per-node={job.ranks}"
        return [*srun, f"--ntasks={job.world}", each, "--overcommit", *chain.tapir(*job.command)]
    tasks = [f"--ntasks={resources.nodes}", "--ntasks-per-node=1"]
    cpus = f"--cpus-per-task={resources.cpus}"
    address = '"$MASTER_ADDR"', '"$MASTER_PORT"'
    return [*srun, *tasks, cpus, *chain.torchrun(job, "SLURM_NODEID", *address)]


def _lines(words: list[str]) -> list[str]:
    """Lines of a `tapir job` command in a shell script: its flags one by one, then its command."""
    quoted = [shlex.quote(word) for word in words]
    cut = quoted.index("--")
    return [" ".join(quoted[:5]), *quoted[5:cut], "--", " ".join(quoted[cut + 1 :])]


def sbatch_command(chain: Chain, job: Job, ids: dict[str, str]) -> list[str]:
    """The sbatch command of a job; `ids` are Slurm's ids of earlier jobs."""
    waits = ":".join(ids[name] for name in job.after if name in ids)
    dependency = [f"--dependency=afterok:{waits}"] if waits else []
    script = str(chain.out / SCRIPTS / f"{job.name}.sh")
    names = ",".join(name for name in chain.passed if name in os.environ)
    return ["sbatch", "--parsable", f"--export={names}", *dependency, script]


def submit(chain: Chain, config: SlurmConfig) -> dict[str, str]:
    """Write the scripts and send all jobs; returns Slurm's ids by job name.

    Raises: TapirError with Slurm's answer; what was sent before is cancelled again.
    """
    for folder in (LOGS, SCRIPTS):
        (chain.out / folder).mkdir(parents=True, exist_ok=True)
    ids: dict[str, str] = {}
    try:
        for job in chain.jobs:
            script = chain.out / SCRIPTS / f"{job.name}.sh"
            write_atomic(script, os.fsencode(render(chain, job, config)))
            ids[job.name] = _ask(sbatch_command(chain, job, ids)).strip().split(";")[0]
    except TapirError:
        cancel(list(ids.values()))
        raise
    return ids


def dry_run(chain: Chain, config: SlurmConfig) -> str:
    """A shell script that does what `submit` does."""
    parts = ["set -e", shlex.join(["mkdir", "-p", *(str(chain.out / n) for n in (LOGS, SCRIPTS))])]
    ids = {job.name: f"${job.name}" for job in chain.jobs}
    for job in chain.jobs:
        script = chain.out / SCRIPTS / f"{job.name}.sh"
        text = render(chain, job, config)
        parts.append(f"cat > {shlex.quote(str(script))} <<'SCRIPT'\n{text}SCRIPT")
        known = {name: ids[name] for name in job.after if name in ids}
        words = [w if "$" in w else shlex.quote(w) for w in sbatch_command(chain, job, known)]
        parts.append(f"{job.name}=$({' '.join(words)})")
    return "\n".join(parts) + "\n"


def states(ids: dict[str, str], out: Path) -> dict[str, str]:
    """Slurm's state of each queued job: RUNNING on n1, PENDING (Dependency), ...

    Also releases jobs that Slurm holds after a requeue.
    """
    if not ids:
        return {}
    names = {number: name for name, number in ids.items()}
    by_job: dict[str, list[str]] = {}
    for line in _queue(list(names), "%i|%F|%T|%r|%S|%N"):
        number, whole, state, reason, begin, nodes = line.split("|")
        if state == "PENDING" and reason == "BeginTime" and _seconds_to(begin) > 2 * CLEANING:
            change = [f"jobid={number}", *without_bad(out), f"starttime=now+{CLEANING}"]
            subprocess.run(["scontrol", "update", *change], check=False, stderr=subprocess.DEVNULL)
        text = f"{state} on {nodes}" if nodes else f"{state} ({reason})"
        by_job.setdefault(names.get(whole, names.get(number, number)), []).append(text)
    return {name: ", ".join(sorted(set(texts))) for name, texts in by_job.items()}


def _seconds_to(begin: str) -> float:
    """Seconds until a job's begin time, which squeue prints in local time; 0 if there is none."""
    try:
        return (datetime.fromisoformat(begin) - datetime.now()).total_seconds()
    except ValueError:
        return 0.0


def _queue(numbers: list[str], columns: str) -> list[str]:
    """squeue's lines about jobs; none if all have left the queue.

    Raises: TapirError if Slurm does not answer.
    """
    command = ["squeue", "-h", "--jobs", ",".join(numbers), "-o", columns]
    try:
        return _ask(command).splitlines()
    except TapirError as error:
        if _FORGOTTEN in str(error):
            return []
        raise


def cancel(numbers: list[str]) -> None:
    """Cancel jobs and wait until they have left the queue.

    Raises: TapirError if they do not, or Slurm does not answer.
    """
    if not numbers or not _queue(numbers, "%i"):
        return
    subprocess.run(["scancel", *numbers], check=False, timeout=_ANSWER_SECONDS)  # some are gone
    until = time.monotonic() + _ANSWER_SECONDS
    while _queue(numbers, "%i"):
        if time.monotonic() > until:
            raise TapirError(
                f"jobs {', '.join(numbers)} are still in the queue after scancel: see squeue"
            )
        time.sleep(0.5)


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no Slurm on this machine: submit from a login node of the cluster, or use "
            "--to local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TapirError(f"Slurm did not answer for {_ANSWER_SECONDS} s: {command[0]}") from error
    if done.returncode:
        raise TapirError(f"Slurm refused {shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout
