"""Send a chain's jobs to Slurm, and ask for their states."""

import os
import shlex
import subprocess
import time
from datetime import datetime
from pathlib import Path

from cluster.chain import LOGS, SCRIPTS, Chain, Job
from cluster.slurm.arrays import MAX_ARRAY_SIZE, Part, parts_of
from cluster.slurm.config import SlurmConfig
from cluster.slurm.job import CLEANING, without_bad
from cluster.slurm.script import render
from core.errors import ConfigError, TapirError
from core.files.atomic import write_atomic

_ANSWER_SECONDS = 60
_FORGOTTEN = "Invalid job id"
"""squeue's error for jobs that Slurm no longer knows."""


def sbatch_command(
    chain: Chain, job: Job, ids: dict[str, str], part: Part | None = None, before: str = ""
) -> list[str]:
    """The sbatch command of a job, or of a part of its array.

    `ids` are Slurm's ids of earlier jobs, of several parts joined by colons; `before` is the id of
    the part that must have ended first.
    """
    waits = ":".join(ids[name] for name in job.after if name in ids)
    needs = [f"afterok:{waits}"] if waits else []
    needs += [f"afterany:{before}"] if before else []
    dependency = [f"--dependency={','.join(needs)}"] if needs else []
    names = ",".join(name for name in chain.passed if name in os.environ)
    script = str(_script(chain, job, part))
    return ["sbatch", "--parsable", f"--export={names}", *dependency, script]


def _script(chain: Chain, job: Job, part: Part | None) -> Path:
    return chain.out / SCRIPTS / f"{job.name}{part.name if part else ''}.sh"


def _parts(job: Job, limit: int) -> list[Part | None]:
    """The sbatch jobs of a job: the parts of its array, or one without an array."""
    return list(parts_of(job.resources.workers, limit)) if job.array else [None]


def submit(chain: Chain, config: SlurmConfig) -> dict[str, str]:
    """Write the scripts and send all jobs; returns Slurm's ids by job name, of parts with colons.

    Raises: TapirError with Slurm's answer; what was sent before is cancelled again.
    """
    for folder in (LOGS, SCRIPTS):
        (chain.out / folder).mkdir(parents=True, exist_ok=True)
    limit = _max_array_size() if any(job.array for job in chain.jobs) else MAX_ARRAY_SIZE
    ids: dict[str, str] = {}
    sent: list[str] = []
    try:
        for job in chain.jobs:
            before = ""
            for part in _parts(job, limit):
                text = render(chain, job, config, part)
                write_atomic(_script(chain, job, part), os.fsencode(text))
                number = _ask(sbatch_command(chain, job, ids, part, before)).strip().split(";")[0]
                sent.append(number)
                before = number if job.resources.parallelism else ""
            ids[job.name] = ":".join(sent[-len(_parts(job, limit)) :])
    except TapirError:
        cancel(sent)
        raise
    return ids


def _max_array_size() -> int:
    """Slurm's MaxArraySize. Raises: ConfigError if it has no arrays."""
    for line in _ask(["scontrol", "show", "config"]).splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize" and value.strip().isdecimal():
            if int(value) < 1:
                raise ConfigError("this Slurm has no job arrays (MaxArraySize=0): give workers: 1")
            return int(value)
    return MAX_ARRAY_SIZE


def dry_run(chain: Chain, config: SlurmConfig) -> str:
    """A shell script that does what `submit` does, for Slurm's default MaxArraySize."""
    parts = ["set -e", shlex.join(["mkdir", "-p", *(str(chain.out / n) for n in (LOGS, SCRIPTS))])]
    if any(job.array for job in chain.jobs):
        note = f"# arrays are split for MaxArraySize={MAX_ARRAY_SIZE}, Slurm's default; without"
        parts.append(f"{note} --dry-run, for this Slurm's")
    ids = {job.name: f"${_variable(job)}" for job in chain.jobs}
    for job in chain.jobs:
        known = {name: ids[name] for name in job.after if name in ids}
        variables: list[str] = []
        for part in _parts(job, MAX_ARRAY_SIZE):
            parts.append(
                _here_document(_script(chain, job, part), render(chain, job, config, part))
            )
            before = f"${variables[-1]}" if variables and job.resources.parallelism else ""
            command = sbatch_command(chain, job, known, part, before)
            number = f"_{part.first}" if part and part.first else ""
            variables.append(f"{_variable(job)}{number}")
            parts.append(f"{variables[-1]}=$({' '.join(map(_shell_word, command))})")
        if len(variables) > 1:
            parts.append(f"{_variable(job)}={':'.join(f'${each}' for each in variables)}")
    return "\n".join(parts) + "\n"


def _variable(job: Job) -> str:
    """The shell variable of a job's id; jobs' names have hyphens, and no underscores."""
    return job.name.replace("-", "_")


def _here_document(path: Path, text: str) -> str:
    """Shell command that writes a file; no line of the text ends it early."""
    end = "SCRIPT"
    while end in text.split("\n"):
        end += "_"
    return f"cat > {shlex.quote(str(path))} <<'{end}'\n{text}{end}"


def _shell_word(word: str) -> str:
    """A word of sbatch's; a dependency holds variables with ids."""
    return word if word.startswith("--dependency=") else shlex.quote(word)


def states(ids: dict[str, str], out: Path) -> dict[str, str]:
    """Slurm's state of each queued job: RUNNING on n1, PENDING (Dependency), ...

    Also releases jobs that Slurm holds after a requeue.
    """
    if not ids:
        return {}
    names = {number: name for name, joined in ids.items() for number in joined.split(":")}
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
    """Cancel jobs, of parts with colons, and wait until they have left the queue.

    Raises: TapirError if they do not, or Slurm does not answer.
    """
    numbers = [number for joined in numbers for number in joined.split(":")]
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
