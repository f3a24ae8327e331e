"""Submit a chain of jobs to its scheduler, or print what would be submitted."""

import shlex
from pathlib import Path

from cluster import local
from cluster.chain import CANCELLED, CHAIN, SCRIPTS, Submitted, read_submitted, write_submitted
from cluster.kubernetes import driver_objects, submission
from cluster.slurm import submit as slurm
from cluster.slurm.config import SlurmConfig, folder_problems
from cluster.slurm.job import BAD_NODES
from cluster.starts import STARTS
from core.config import check
from core.errors import InputError
from core.log import LOG
from workflow.chain.states import is_over, kubernetes_of, place_settings, states_of


def send(submitted: Submitted) -> Submitted:
    """Submit the unfinished jobs of a chain.

    Raises: InputError if the chain still runs.
    """
    _refuse_running(submitted.chain.out)
    chain = submitted.chain.without_done()
    (chain.out / CANCELLED).unlink(missing_ok=True)
    for left in chain.jobs:
        for path in (chain.out / SCRIPTS).glob(f"{left.name}*{STARTS}"):
            path.unlink()
    (chain.out / SCRIPTS / BAD_NODES).unlink(missing_ok=True)
    if not chain.jobs:
        LOG.info("all jobs of %s have ended well before", chain.out)
        return submitted
    write_submitted(submitted)
    if submitted.to == "local":
        ids = local.submit(chain)
    elif submitted.to == "slurm":
        ids = slurm.submit(chain, _slurm(submitted))
    else:
        ids = submission.submit(chain, kubernetes_of(submitted))
    sent = Submitted(**{**vars(submitted), "ids": ids})
    write_submitted(sent)
    LOG.info(
        "sent %d jobs to %s: tapir status %s", len(ids), submitted.to, shlex.quote(str(chain.out))
    )
    return sent


def _refuse_running(out: Path) -> None:
    if not (out / CHAIN).exists():
        return
    before = read_submitted(out)
    if not before.ids:  # it was refused, and what it asked for may not exist
        return
    states = states_of(before)
    if not is_over(before, states):
        raise InputError(
            f"{out} is running already:\n{table(states)}\nwait for it, or `tapir cancel "
            f"{shlex.quote(str(out))}`"
        )


def check_place(submitted: Submitted) -> None:
    """Raise ConfigError if the scheduler's settings do not fit the chain."""
    if submitted.to == "kubernetes":
        check(kubernetes_of(submitted).problems(submitted.chain))
    elif submitted.to == "slurm":
        check(folder_problems(submitted.chain.out))


def dry_run_text(submitted: Submitted) -> str:
    """The shell script, sbatch scripts or manifests that `send` would submit."""
    chain = submitted.chain.without_done()
    if submitted.to == "local":
        return local.dry_run(chain, local.LocalConfig(**place_settings(submitted)))
    if submitted.to == "slurm":
        return slurm.dry_run(chain, _slurm(submitted))
    return driver_objects.dry_run(chain, kubernetes_of(submitted))


def _slurm(submitted: Submitted) -> SlurmConfig:
    return SlurmConfig(**place_settings(submitted))


def table(states: dict[str, str]) -> str:
    """One line per job: name and state."""
    return "\n".join(f"{name:<10} {text}" for name, text in states.items())
