"""Jobs and chains of jobs as values, shared by the local, Slurm and Kubernetes backends."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.config import from_json, to_json
from core.errors import CorruptError, InputError
from core.files.atomic import Json, seal, sha256, unseal, write_atomic
from core.storage.store import open_store

Scheduler = Literal["local", "slurm", "kubernetes"]
"""Backend that runs a chain of jobs."""
CHAIN, LOGS, MARKERS, SCRIPTS = "chain.json", "logs", "markers", "jobs"
CANCELLED = "cancelled"
"""A file in the chain's folder: no job of it starts again."""
WORKER = "{worker}"
"""Placeholder in a job's name for the number of its array worker."""
ALWAYS_PASSED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job needs of each node."""

    nodes: int = 1
    """Nodes of the job."""
    spares: int = 0
    """Further nodes that a Slurm job asks for, each to take the place of a lost or bad one."""
    gpus: int = 0
    """GPUs of each node."""
    cpus: int = 1
    """CPU cores of each node."""
    memory: str = ""
    """Memory of each node, e.g. 64G; empty = the scheduler's default."""
    minutes: int = 0
    """Time limit of one run; before it the job saves and is requeued. 0 = the default."""
    workers: int = 1
    """Processes of a data job (pack, tokenize, score): an array."""
    parallelism: int = 0
    """Workers that may run at the same time; 0 = all."""

    def problems(self, name: str) -> list[str]:
        problems = []
        if min(self.nodes, self.cpus, self.workers) < 1:
            problems.append(f"stages.{name}: nodes, cpus and workers must be at least 1")
        if min(self.gpus, self.minutes, self.parallelism) < 0:
            problems.append(f"stages.{name}: gpus, minutes and parallelism must not be negative")
        if self.spares < 0:
            problems.append(f"stages.{name}: spares must not be negative")
        if self.spares > 0 and self.nodes == 1:
            problems.append(
                f"stages.{name}: spares are for stages of several nodes: a stage of one node runs "
                "on its batch host, and Slurm queues it again elsewhere; leave spares out"
            )
        if not re.fullmatch(r"(\d+[KMGT]?)?", self.memory):
            problems.append(f"stages.{name}: memory={self.memory!r} must be like 64G")
        return problems


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage: a `tapir` command, and what it needs."""

    name: str
    command: tuple[str, ...]
    """Arguments of tapir."""
    after: tuple[str, ...] = ()
    """Jobs that must have succeeded."""
    ranks: int = 1
    """Processes on each node; above 1, or on several nodes, a launcher starts them."""
    array: bool = False
    """True for an array of `resources.workers` equal workers, which split the work."""
    trains: bool = False
    """True if it saves a checkpoint on a stop request."""
    checkpoints: str = ""
    """Place of its checkpoints: a newer one is progress."""
    shards: str = ""
    """Place of a data job's output: more finished files, or a worker's own tasks, are progress."""
    resources: Resources = field(default_factory=Resources)

    @property
    def world(self) -> int:
        return self.ranks * self.resources.nodes

    @property
    def text(self) -> str:
        """The command as a user would type it."""
        return "tapir " + shlex.join(self.command)

    @property
    def fingerprint(self) -> str:
        """Digest of the command."""
        return sha256("\0".join(self.command).encode())[:12]

    def markers(self) -> list[str]:
        """Names of the files that mark its success."""
        if not self.array:
            return [f"{self.name}.json"]
        return [f"{self.name}-{i}.json" for i in range(self.resources.workers)]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Jobs with dependencies, in topological order."""

    name: str
    out: Path
    """Folder of the run folders, logs, scripts and markers, which all nodes see."""
    folder: Path
    """Working directory of the jobs: relative paths in commands start here."""
    python: str
    """Interpreter on the nodes."""
    environment: tuple[str, ...] = ()
    """Names of the variables that jobs get; values are never written down."""
    retries: int = 3
    """Failures of a job without progress that are forgiven."""
    stall_hours: float = 24.0
    """Hours that a job's starts may run without progress."""
    jobs: tuple[Job, ...] = ()

    @property
    def passed(self) -> list[str]:
        """Names of all environment variables that jobs get."""
        return sorted({*ALWAYS_PASSED, *self.environment})

    def log(self, job: Job, worker: str = "") -> Path:
        """The one file that all starts of a job (or of one worker) append to."""
        return self.out / LOGS / f"{job.name}{f'-{worker}' if worker else ''}.log"

    def tapir(self, *arguments: str) -> list[str]:
        """A tapir command line on the nodes."""
        return [self.python, "-P", "-m", "tapir", *arguments]

    def wrapped(self, job: Job, name: str, command: list[str], *flags: str) -> list[str]:
        """Wrap a job's command in `tapir job`; `name` is the array worker's, if it has workers."""
        return [
            *self.tapir("job"),
            f"--name={name}",
            f"--out={self.out}",
            f"--marker={name}.json",
            f"--fingerprint={job.fingerprint}",
            f"--retries={self.retries}",
            f"--stall-hours={self.stall_hours:g}",
            *([f"--checkpoints={job.checkpoints}"] if job.checkpoints else []),
            *([f"--shards={job.shards}"] if job.shards else []),
            *([f"--worker={name.removeprefix(job.name)[1:]}"] if job.array else []),
            *flags,
            *(["--saves"] if job.trains else []),
            "--",
            *command,
        ]

    def torchrun(self, job: Job, number: str, address: str, port: str) -> list[str]:
        """torchrun's command on one node of a job; shell variable `number` holds the node rank."""
        launch = (
            'export PYTHONSAFEPATH=1; exec "$0" -m torch.distributed.run '
            f'--nnodes={job.resources.nodes} --nproc-per-node={job.ranks} --node-rank="${number}" '
            f'--master-addr={address} --master-port={port} -m tapir "$@"'
        )
        return ["bash", "-c", launch, self.python, *job.command]

    def is_done(self, job: Job) -> bool:
        """True if all markers of a job exist and are intact.

        Raises: InputError if it has succeeded with another command; CorruptError.
        """
        folder = self.out / MARKERS
        markers = [read_marker(str(folder), name) for name in job.markers()]
        if any(facts and facts["command"] != job.fingerprint for facts in markers):
            raise InputError(
                f"stage {job.name} of {self.out} has ended well with other flags; give another "
                f"out, or delete {folder / job.name}*.json to run it again"
            )
        return all(markers)

    def without_done(self) -> "Chain":
        """The chain of the unfinished jobs; dependencies on finished ones are dropped."""
        left = [job for job in self.jobs if not self.is_done(job)]
        names = {job.name for job in left}
        rest = [
            Job(**{**vars(job), "after": tuple(name for name in job.after if name in names)})
            for job in left
        ]
        return Chain(**{**vars(self), "jobs": tuple(rest)})


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A chain that was submitted to a scheduler."""

    chain: Chain
    to: Scheduler
    settings: dict[str, object]
    """The scheduler's settings, from the run file."""
    ids: dict[str, str]
    """Job name -> the scheduler's id, of the last submission."""


def submitted_text(submitted: Submitted) -> bytes:
    """A submission as JSON that carries its own digest."""
    return seal(to_json(submitted))


def write_submitted(submitted: Submitted) -> None:
    """Record a submission in the chain's folder."""
    write_atomic(submitted.chain.out / CHAIN, submitted_text(submitted))


def read_submitted(out: Path) -> Submitted:
    """Read the record of `write_submitted`.

    Raises: InputError if nothing was submitted from this folder; CorruptError.
    """
    path = out / CHAIN
    if not path.is_file():
        raise InputError(f"{out} holds no {CHAIN}: give the `out` of a run file that was submitted")
    return parse_submitted(path.read_bytes(), str(path))


def parse_submitted(data: bytes, where: str) -> Submitted:
    """The submission of `submitted_text`. Raises: CorruptError."""
    advice = "delete it, end what may still run by the scheduler's own commands, and submit again"
    body = _unsealed(data, where, advice)
    jobs = tuple(
        from_json(Job, {**job, "command": tuple(job["command"]), "after": tuple(job["after"])})
        for job in body["chain"].pop("jobs")
    )
    chain = from_json(Chain, body["chain"])
    return Submitted(
        chain=Chain(**{**vars(chain), "jobs": jobs}),
        to=body["to"],
        settings=body["settings"],
        ids=body["ids"],
    )


def write_marker(folder: str, name: str, facts: dict[str, object]) -> None:
    """Write the marker of a successful job; it carries its own digest."""
    open_store(folder).put(name, seal(dict(facts)))


def read_marker(folder: str, name: str) -> Json:
    """Read the marker of a successful job; empty if there is none.

    Raises: CorruptError if the marker is damaged.
    """
    store = open_store(folder)
    if not store.exists(name):
        return {}
    return _unsealed(store.get(name), f"{folder}/{name}", "delete it to run the stage again")


def _unsealed(data: bytes, where: str, advice: str) -> Json:
    try:
        return unseal(data, where)
    except CorruptError as error:
        raise CorruptError(f"{where} is damaged: {advice}") from error
