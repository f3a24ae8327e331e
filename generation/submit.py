"""The verbs submit, status, logs, cancel, resume and job."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster import kubernetes, local, slurm, slurm_job
from cluster.job import JobSettings, run_job
from cluster.jobs import (
    CANCELLED,
    CHAIN,
    LOGS,
    SCRIPTS,
    Chain,
    Place,
    Submitted,
    read_submitted,
    write_submitted,
)
from core.cli import parse, print_json
from core.errors import EXIT_WRONG_INPUT, ConfigError, InputError, TapirError
from core.log import LOG
from core.settings import check
from core.store import open_store
from data_pipeline.tokenize.status import describe_status, job_status
from generation.runfile import chain_of, missing_variables, read_runfile, settings_of

Folder = Annotated[Path, tyro.conf.Positional]
_FLAT = tyro.conf.OmitArgPrefixes
_LOOK, _PAUSE = 1.0, 10.0


def submit(arguments: list[str]) -> None:
    """`tapir submit FILE`."""

    def run(
        file: Folder,
        to: Place | None = None,
        dry_run: bool = False,
        wait: bool = False,
        json: bool = False,
    ) -> None:
        """Send a run file's stages as a chain of jobs; stages that have ended are left out.

        Args:
            file: YAML, or Python that sets `run`; docs/clusters.md shows one
            to: local, slurm or kubernetes; by default what the file says
            dry_run: print what would be sent, as a shell script or as YAML, and send nothing
            wait: show where it stands until all jobs have ended; exit code 1 if one failed
            json: print a JSON object on the last line
        """
        found = read_runfile(file)
        place = to or found.to
        chain = chain_of(found, place)
        if missing := missing_variables(chain):
            raise ConfigError(f"environment: {', '.join(missing)} is not set here; export it first")
        submitted = Submitted(chain=chain, to=place, settings=settings_of(found, place), ids={})
        _check_place(submitted)
        if dry_run:
            print(_dry_run(submitted), end="")
            return
        sent = _send(submitted)
        if json:
            print_json({"out": str(chain.out), "to": place, "jobs": sent.ids})
        if wait:
            with _only_looking():
                _wait(sent)

    parse(run, arguments, "submit")


def resume(arguments: list[str]) -> None:
    """`tapir resume OUT`."""

    def run(out: Folder, wait: bool = False) -> None:
        """Send the jobs of a chain again that have not ended well.

        Args:
            out: the `out` of a run file that was submitted
            wait: show where it stands until all jobs have ended
        """
        submitted = read_submitted(out)
        sent = _send(submitted)
        if wait:
            with _only_looking():
                _wait(sent)

    parse(run, arguments, "resume")


def cancel(arguments: list[str]) -> None:
    """`tapir cancel OUT`."""

    def run(out: Folder) -> None:
        """End all jobs of a chain; nothing of it stays in a queue or runs. Checkpoints are kept.

        Args:
            out: the `out` of a run file that was submitted
        """
        submitted = read_submitted(out)
        if is_over(submitted, states_of(submitted)):
            LOG.info("nothing of %s runs or waits", out)
            return
        (submitted.chain.out / CANCELLED).touch()
        if submitted.to == "local":
            local.cancel(submitted.chain.out)
        elif submitted.to == "slurm":
            slurm.cancel(list(submitted.ids.values()))
        else:
            kubernetes.cancel(submitted.chain, _kubernetes(submitted))
        LOG.info("cancelled; `tapir resume %s` goes on from the last checkpoint", out)

    parse(run, arguments, "cancel")


def status(arguments: list[str]) -> None:
    """`tapir status PLACE`."""

    def run(place: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
        """Say how far a submitted run, or a token job over all its workers, is.

        Args:
            place: the `out` of a run file; or what `tapir tokenize` writes to (s3:// or a folder)
            json: print a JSON object on the last line
        """
        if (Path(place) / CHAIN).exists():
            states = states_of(read_submitted(Path(place)))
            LOG.info("%s", _table(states))
            if json:
                print_json(states)
            return
        rows = job_status(open_store(place))
        LOG.info("%s", describe_status(rows))
        if json:
            print_json({row.split: row for row in rows})

    parse(run, arguments, "status")


def logs(arguments: list[str]) -> None:
    """`tapir logs OUT [STAGE]`."""

    def run(
        out: Folder,
        stage: Annotated[str, tyro.conf.Positional] = "",
        follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False,
    ) -> None:
        """Print the output of a submitted run's jobs.

        Args:
            out: the `out` of a run file
            stage: one stage; by default all
            follow: go on until all jobs have ended
        """
        submitted = read_submitted(out)
        known = [job.name for job in submitted.chain.jobs]
        if stage and stage not in known:
            raise InputError(f"{out} has no stage {stage!r} (known: {', '.join(known)})")
        if submitted.to == "kubernetes":
            for name in [stage] if stage else known:
                config = _kubernetes(submitted)
                subprocess.run(kubernetes.logs_command(submitted.chain, config, name, follow))
            return
        with _only_looking():
            _follow(submitted, stage, follow)

    parse(run, arguments, "logs")


def job(arguments: list[str]) -> None:
    """`tapir job [flags] -- COMMAND ...`."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)

    def run(settings: Annotated[JobSettings, _FLAT] = JobSettings()) -> None:  # noqa: B008
        """Run what stands behind -- as a job of a chain; `tapir submit` writes these commands.

        Args:
            settings: how
        """
        code = run_job(settings, arguments[cut + 1 :])
        if code:
            sys.exit(code)

    parse(run, arguments[:cut], "job")


def states_of(submitted: Submitted) -> dict[str, str]:
    """Each job's state: done by its markers, else what the place says of it."""
    chain = submitted.chain
    if submitted.to == "local":
        said = local.states(chain.out)
    elif submitted.to == "slurm":
        said = slurm.states(submitted.ids, chain.out)
    else:
        said = kubernetes.states(chain, _kubernetes(submitted))
    found = {}
    for each in chain.jobs:
        if chain.is_done(each):
            found[each.name] = "done"
        elif each.name in said:
            found[each.name] = said[each.name]
        elif submitted.to == "slurm" and each.name in submitted.ids:
            found[each.name] = f"ended: {slurm_job.last_words(submitted.ids[each.name])}"
        else:
            found[each.name] = "not there"
    return found


def is_over(submitted: Submitted, states: dict[str, str]) -> bool:
    """Say whether no job runs or waits any more."""
    if submitted.to == "local":
        return not any(text in ("running", "waiting") for text in states.values())
    if submitted.to == "slurm":
        return all(text == "done" or text.startswith("ended") for text in states.values())
    ended = ("done", "not there")
    return all(text in ended or "Failed" in text for text in states.values())


def _send(submitted: Submitted) -> Submitted:
    """Send what is left of a chain.

    Raises: InputError if it is under way, or nothing is left.
    """
    _refuse_running(submitted.chain.out)
    chain = submitted.chain.without_done()
    (chain.out / CANCELLED).unlink(missing_ok=True)
    for left in chain.jobs:
        for path in (chain.out / SCRIPTS).glob(f"{left.name}*.failures"):
            path.unlink()
    (chain.out / SCRIPTS / slurm_job.BAD_NODES).unlink(missing_ok=True)
    if not chain.jobs:
        LOG.info("all jobs of %s have ended well before", chain.out)
        return submitted
    write_submitted(submitted)
    if submitted.to == "local":
        ids = local.submit(chain)
    elif submitted.to == "slurm":
        ids = slurm.submit(chain, _slurm(submitted))
    else:
        ids = kubernetes.submit(chain, _kubernetes(submitted))
    sent = Submitted(**{**vars(submitted), "ids": ids})
    write_submitted(sent)
    LOG.info("sent %d jobs to %s: tapir status %s", len(ids), submitted.to, chain.out)
    return sent


def _refuse_running(out: Path) -> None:
    if not (out / CHAIN).exists():
        return
    before = read_submitted(out)
    states = states_of(before)
    if before.ids and not is_over(before, states):
        raise InputError(
            f"{out} is under way already:\n{_table(states)}\nwait for it, or `tapir cancel {out}`"
        )


def _check_place(submitted: Submitted) -> None:
    if submitted.to == "kubernetes":
        check(_kubernetes(submitted).problems(submitted.chain))


def _dry_run(submitted: Submitted) -> str:
    chain = submitted.chain.without_done()
    if submitted.to == "local":
        return local.dry_run(chain, local.LocalConfig(**_settings(submitted)))
    if submitted.to == "slurm":
        return slurm.dry_run(chain, _slurm(submitted))
    return kubernetes.dry_run(chain, _kubernetes(submitted))


def _settings(submitted: Submitted) -> dict[str, Any]:
    """Those of the place, with tuples again where JSON made lists of them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in submitted.settings.items()}


def _slurm(submitted: Submitted) -> slurm.SlurmConfig:
    return slurm.SlurmConfig(**_settings(submitted))


def _kubernetes(submitted: Submitted) -> kubernetes.KubernetesConfig:
    return kubernetes.KubernetesConfig(**_settings(submitted))


def _table(states: dict[str, str]) -> str:
    return "\n".join(f"{name:<10} {text}" for name, text in states.items())


def _states_at_last(submitted: Submitted) -> dict[str, str]:
    """`states_of`, as soon as the scheduler answers."""
    while True:
        try:
            return states_of(submitted)
        except TapirError as error:
            if error.exit_code == EXIT_WRONG_INPUT:
                raise
            LOG.warning("%s; asking again", error)
            time.sleep(_PAUSE)


@contextmanager
def _only_looking() -> Iterator[None]:
    """Ctrl-C ends the looking alone; the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        LOG.info("the run goes on; `tapir cancel` ends it")
        sys.exit(130)


def _wait(submitted: Submitted) -> None:
    """Log every change until the chain is over; exits with 1 if a job failed."""
    shown: dict[str, str] = {}
    while True:
        states = _states_at_last(submitted)
        for name, text in states.items():
            if shown.get(name) != text:
                LOG.info("%s: %s", name, text)
        shown = states
        if is_over(submitted, states):
            break
        time.sleep(_LOOK)
    for name, text in shown.items():
        if text.startswith(("failed", "ended: FAILED")) and (why := _last_line(submitted, name)):
            LOG.error("%s: %s (all of it: tapir logs %s %s)", name, why, submitted.chain.out, name)
    if any(text != "done" for text in shown.values()):
        sys.exit(1)


def _last_line(submitted: Submitted, name: str) -> str:
    """What a job said last of its trouble, before `tapir job` named the exit code."""
    lines = [
        line
        for path in sorted(submitted.chain.out.glob(f"{LOGS}/{name}*.log"))
        for line in path.read_text(errors="replace").splitlines()
        if line.strip() and f"job {name}" not in line
    ]
    return lines[-1] if lines else ""


def _follow(submitted: Submitted, stage: str, follow: bool) -> None:
    """Print log files, and what is appended to them until the chain is over."""
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
        over = not follow or is_over(submitted, _states_at_last(submitted))
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
