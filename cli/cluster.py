"""The verbs of submitted runs: submit, status, logs, cancel, resume and job."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import tyro

from cluster import local
from cluster.chain import (
    CANCELLED,
    CHAIN,
    Scheduler,
    Submitted,
    read_submitted,
)
from cluster.job_runner import JobSettings, run_job
from cluster.kubernetes import submission
from cluster.slurm import submit as slurm
from core.config import check
from core.errors import ConfigError, InputError, TapirError
from core.flags import FLAT, PositionalPath, PositionalText, parse, print_json
from core.log import LOG
from core.storage.store import open_store
from data_pipeline.jobs.status import describe_status, job_status
from workflow.chain.inputs import missing_inputs, unfinished_inputs
from workflow.chain.requirements import packed_problems
from workflow.chain.stages import chain_of, missing_variables, settings_of_stages
from workflow.chain.states import (
    follow_logs,
    is_over,
    kubernetes_of,
    only_looking,
    states_of,
    wait_for,
)
from workflow.chain.submit import check_place, dry_run_text, send, table
from workflow.run_file import read_runfile, settings_of


def submit(arguments: list[str]) -> None:
    """`tapir submit FILE`."""

    def run(
        file: PositionalPath,
        to: Scheduler | None = None,
        dry_run: bool = False,
        wait: bool = False,
        json: bool = False,
    ) -> None:
        """Submit a run file's stages as a chain of jobs; finished stages are left out.

        Args:
            file: YAML, or Python that sets `run`; docs/reference/run-file.md shows one
            to: local, slurm or kubernetes; by default as in the file
            dry_run: print what would be sent, as a shell script or as YAML, and send nothing; what
                stages left out should have made and is missing is told, and not refused
            wait: show the jobs' states until all have ended; exit code 1 if one failed
            json: print a JSON object on the last line
        """
        try:
            submitted = _planned(file, to, dry_run)
        except ConfigError as error:
            raise error.of_file(file) from error
        if dry_run:
            print(dry_run_text(submitted), end="")
            return
        sent = send(submitted)
        if json:
            out = str(submitted.chain.out)
            print_json({"out": out, "to": submitted.to, "jobs": sent.ids})
        if wait:
            with only_looking():
                wait_for(sent)

    parse(run, arguments, "submit")


def _planned(file: Path, to: Scheduler | None, dry_run: bool) -> Submitted:
    """A run file as a chain that can be sent. Raises: ConfigError, InputError."""
    run_file = read_runfile(file)
    place = to or run_file.to
    chain = chain_of(run_file, place)
    settings = settings_of_stages(run_file)
    check(packed_problems(run_file, settings))
    for text in unfinished_inputs(run_file, settings):
        LOG.warning("%s: %s", file, text)
    missing = missing_inputs(run_file, settings, place)
    if dry_run:
        for text in missing:
            LOG.warning("%s; without --dry-run this is refused", text)
    else:
        check(missing)
    if unset := missing_variables(chain):
        raise ConfigError(f"environment: {', '.join(unset)} is not set here; export it first")
    submitted = Submitted(chain=chain, to=place, settings=settings_of(run_file, place), ids={})
    check_place(submitted)
    return submitted


def resume(arguments: list[str]) -> None:
    """`tapir resume OUT`."""

    def run(out: PositionalPath, wait: bool = False) -> None:
        """Submit the unfinished and failed jobs of a chain again.

        Args:
            out: the `out` of a run file that was submitted
            wait: show the jobs' states until all have ended
        """
        submitted = read_submitted(out)
        sent = send(submitted)
        if wait:
            with only_looking():
                wait_for(sent)

    parse(run, arguments, "resume")


def cancel(arguments: list[str]) -> None:
    """`tapir cancel OUT`."""

    def run(out: PositionalPath) -> None:
        """Cancel all jobs of a chain, queued or running; checkpoints are kept.

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
            submission.cancel(submitted.chain, kubernetes_of(submitted))
        LOG.info(
            "cancelled; `tapir resume %s` goes on from the last checkpoint", shlex.quote(str(out))
        )

    parse(run, arguments, "cancel")


def status(arguments: list[str]) -> None:
    """`tapir status PLACE`."""

    def run(place: PositionalText, json: bool = False, cost_per_hour: float = 0.0) -> None:
        """Show the progress of a submitted run, or of a data job over all its workers.

        Args:
            place: the `out` of a run file; or where a job of workers writes (s3:// or a folder)
            json: print a JSON object on the last line
            cost_per_hour: of one worker, in any currency: adds what the rest of a data job costs
        """
        if (Path(place) / CHAIN).exists():
            states = states_of(read_submitted(Path(place)))
            LOG.info("%s", table(states))
            if json:
                print_json(states)
            return
        rows = job_status(open_store(place))
        LOG.info("%s", describe_status(rows, cost_per_hour))
        if json:
            print_json({row.part: row for row in rows})

    parse(run, arguments, "status")


def logs(arguments: list[str]) -> None:
    """`tapir logs OUT [STAGE]`."""

    def run(
        out: PositionalPath,
        stage: PositionalText = "",
        follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False,
    ) -> None:
        """Print the output of a submitted run's jobs.

        Args:
            out: the `out` of a run file
            stage: one stage; by default all
            follow: print new lines until all jobs have ended
        """
        submitted = read_submitted(out)
        known = [job.name for job in submitted.chain.jobs]
        if stage and stage not in known:
            raise InputError(f"{out} has no stage {stage!r} (known: {', '.join(known)})")
        if submitted.to == "kubernetes":
            for name in [stage] if stage else known:
                config = kubernetes_of(submitted)
                subprocess.run(submission.logs_command(submitted.chain, config, name, follow))
            return
        with only_looking():
            follow_logs(submitted, stage, follow)

    parse(run, arguments, "logs")


def job(arguments: list[str]) -> None:
    """`tapir job [flags] -- COMMAND ...`."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)

    def run(settings: Annotated[JobSettings, FLAT] = JobSettings()) -> None:  # noqa: B008
        """Run the command after -- as one job of a chain; `tapir submit` writes these commands.

        Exit codes: 0 done; 2 wrong input; 70 gave up (more failures without progress than
        --retries, or an error that no other start mends); 75 asked to stop, or waiting to be
        started again; others are the command's own. Start it again after all but 0, 2 and 70.

        Args:
            settings: settings of the job
        """
        try:
            code = run_job(settings, arguments[cut + 1 :])
        except TapirError as error:
            error.give_up()  # a scheduler would start it again without an end
            raise
        if code:
            sys.exit(code)

    parse(run, arguments[:cut], "job")
