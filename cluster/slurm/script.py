"""Batch scripts that a person can read, run by hand and change."""

import re
import shlex

from cluster.chain import WORKER, Chain, Job
from cluster.slurm.arrays import Part
from cluster.slurm.config import SlurmConfig
from cluster.slurm.nodes import NODE_LIST
from core.launch_environment import FIRST_PORT, PORT_COUNT
from core.workers import WORKER as ARRAY_WORKER

_NEXT = 997
"""Between the ports of two starts of a job, so that what still holds one does not end them all."""


def render(chain: Chain, job: Job, config: SlurmConfig, part: Part | None = None) -> str:
    """The batch script of a job, or of a part of its array."""
    words = " \\\n  ".join(_lines(_job_command(chain, job, config)))
    options = "\n".join(f"#SBATCH {_quoted(each)}" for each in _options(chain, job, config, part))
    resources = job.resources
    threads = max(1, resources.cpus // job.ranks)
    number = ""
    if part is not None and part.count < resources.workers:
        total = f"$(({part.first} + SLURM_ARRAY_TASK_ID))/{resources.workers}"
        number = f"export {ARRAY_WORKER}={total}\n"
    return f"""#!/bin/bash
{options}
# {" ".join(job.text.splitlines())}
cd {shlex.quote(str(chain.folder))} || exit 2
export OMP_NUM_THREADS={threads} PYTHONSAFEPATH=1
{number}export TAPIR_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd " ")
export MASTER_ADDR=$(scontrol show node "${{TAPIR_NODES%% *}}" | grep -o "NodeAddr=[^ ]*" \
| cut -d= -f2)
export MASTER_PORT=$(({FIRST_PORT} \
+ (SLURM_JOB_ID + {_NEXT} * ${{SLURM_RESTART_COUNT:-0}}) % {PORT_COUNT}))
exec {words}
"""


def _options(chain: Chain, job: Job, config: SlurmConfig, part: Part | None) -> list[str]:
    resources = job.resources
    log = chain.log(job, (part.log if part else "%a") if job.array else "")
    folder = str(log.parent).replace("%", "%%")
    options = [
        f"--job-name={chain.name}-{job.name}",
        f"--output={folder}/{log.name}",
        "--open-mode=append",
        *_nodes(job),
        f"--cpus-per-task={resources.cpus}",
        "--requeue",
        "--kill-on-invalid-dep=yes",
        f"--signal=B:USR1@{config.warn_seconds}",
    ]
    if job.array:
        limit = f"%{resources.parallelism}" if resources.parallelism else ""
        count = part.count if part else resources.workers
        options.append(f"--array=0-{count - 1}{limit}")
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


def _nodes(job: Job) -> list[str]:
    """sbatch's options of the nodes; with spares the job outlives the loss of a node.

    Slurm prefers the larger number of a range, unless a number of tasks is given.
    """
    nodes, spares = job.resources.nodes, job.resources.spares
    if spares:
        return [f"--nodes={nodes}-{nodes + spares}", "--no-kill"]
    return [f"--nodes={nodes}", "--ntasks-per-node=1"]


def _quoted(option: str) -> str:
    """An option for an #SBATCH line, where a space ends it, quotes vanish and # is a comment.

    sbatch does not take a backslash before a space, but takes one in double quotes.
    """
    name, equals, value = option.partition("=")
    if re.search(r"""[\\"'#\s]""", value):
        value = '"' + re.sub(r'([\\"])', r"\\\1", value) + '"'
    return f"{name}{equals}{value}"


def _job_command(chain: Chain, job: Job, config: SlurmConfig) -> list[str]:
    """The stage's command, wrapped in its launcher, wrapped in `tapir job`."""
    name = f"{job.name}-{WORKER}" if job.array else job.name
    check = ["--check-nodes", f"--gpus={job.resources.gpus}"] if config.doctor else []
    used = [f"--nodes={job.resources.nodes}"] if job.resources.spares else []
    command = _start_ranks(chain, job, config)
    return chain.wrapped(job, name, command, "--again=slurm", *check, *used)


def _start_ranks(chain: Chain, job: Job, config: SlurmConfig) -> list[str]:
    resources = job.resources
    if job.array or job.world == 1:
        return chain.tapir(*job.command)
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", f"--nodes={resources.nodes}"]
    if resources.spares:
        srun += [NODE_LIST, "--overlap"]
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
