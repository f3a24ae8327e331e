"""States and logs of the jobs of a chain."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import local
from cluster.chain import LOGS, Chain, Submitted
from cluster.kubernetes import submission
from cluster.kubernetes.config import KubernetesConfig
from cluster.slurm import submit as slurm
from cluster.slurm.job import last_words
from core.errors import EXIT_WRONG_INPUT, TapirError
from core.log import LOG

_LOOK, _PAUSE = 1.0, 10.0


def states_of(submitted: Submitted) -> dict[str, str]:
    """Each job's state: done by its markers, else as its scheduler reports."""
    chain = submitted.chain
    if submitted.to == "local":
        reported = local.states(chain.out)
    elif submitted.to == "slurm":
        reported = slurm.states(submitted.ids, chain.out)
    else:
        reported = submission.states(chain, kubernetes_of(submitted))
    states = {}
    for each in chain.jobs:
        if chain.is_done(each):
            states[each.name] = "done"
        elif each.name in reported:
            states[each.name] = reported[each.name]
        elif submitted.to == "slurm" and each.name in submitted.ids:
            states[each.name] = f"ended: {last_words(submitted.ids[each.name])}"
        else:
            states[each.name] = "not there"
    return states


def is_over(submitted: Submitted, states: dict[str, str]) -> bool:
    """True if no job runs or waits any more."""
    if submitted.to == "local":
        return not any(text in ("running", "waiting") for text in states.values())
    if submitted.to == "slurm":
        return all(text == "done" or text.startswith("ended") for text in states.values())
    ended = ("done", "not there")
    return all(text in ended or text.startswith("Failed") for text in states.values())


def place_settings(submitted: Submitted) -> dict[str, Any]:
    """The scheduler's settings, with JSON's lists as tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in submitted.settings.items()}


def kubernetes_of(submitted: Submitted) -> KubernetesConfig:
    return KubernetesConfig(**place_settings(submitted))


def _states_once_answered(submitted: Submitted) -> dict[str, str]:
    """`states_of`, retried until the scheduler answers."""
    while True:
        try:
            return states_of(submitted)
        except TapirError as error:
            if error.exit_code == EXIT_WRONG_INPUT:
                raise
            LOG.warning("%s; asking again", error)
            time.sleep(_PAUSE)


@contextmanager
def only_looking() -> Iterator[None]:
    """Ctrl-C ends the enclosed command with exit code 130; the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        LOG.info("the run goes on; `tapir cancel` ends it")
        sys.exit(130)


def wait_for(submitted: Submitted) -> None:
    """Log every change until the chain is over; exits with 1 if a job failed."""
    shown: dict[str, str] = {}
    while True:
        states = _states_once_answered(submitted)
        for name, text in states.items():
            if shown.get(name) != text:
                LOG.info("%s: %s", name, text)
        shown = states
        if is_over(submitted, states):
            break
        time.sleep(_LOOK)
    for name, text in shown.items():
        if text.startswith(("failed", "ended: FAILED")) and (why := _last_line(submitted, name)):
            LOG.error("%s: %s (full log: tapir logs %s %s)", name, why, submitted.chain.out, name)
    if any(text != "done" for text in shown.values()):
        sys.exit(1)


def _last_line(submitted: Submitted, name: str) -> str:
    """Why a job gave up, else the last line of its logs that its command wrote."""
    lines = [
        line
        for path in sorted(submitted.chain.out.glob(f"{LOGS}/{name}*.log"))
        for line in path.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    why = [line for line in lines if f"job {name}" in line and "gives up: " in line]
    of_command = [line for line in lines if f"job {name}" not in line]
    return (why or of_command or [""])[-1]


def follow_logs(submitted: Submitted, stage: str, follow: bool) -> None:
    """Print log files, and with `follow` new lines until the chain is over."""
    chain: Chain = submitted.chain
    read: dict[Path, int] = {}
    names: Callable[[], list[Path]] = lambda: sorted(  # noqa: E731
        path
        for each in chain.jobs
        if not stage or each.name == stage
        for path in {chain.log(each), *chain.log(each).parent.glob(f"{each.name}-*.log")}
        if path.exists()
    )
    while True:
        over = not follow or is_over(submitted, _states_once_answered(submitted))
        for path in names():
            with open(path, "rb") as file:
                file.seek(read.get(path, 0))
                news = file.read()
            read[path] = read.get(path, 0) + len(news)
            for line in news.decode(errors="replace").splitlines():
                print(f"{path.stem}: {line}", flush=True)
        if over:
            return
        time.sleep(_LOOK)
