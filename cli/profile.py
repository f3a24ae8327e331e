"""The verbs profile and watch."""

from pathlib import Path
from typing import Annotated

import tyro

from core.config import check
from core.errors import InputError
from core.files.atomic import refuse_folder, write_atomic
from core.flags import PositionalPath, parse, print_json
from core.log import LOG
from training.profiling.report import profile_of
from training.profiling.ring import FOLDER
from training.profiling.tables import page, show
from training.profiling.trace import request_trace, traces
from workflow.watch import watch_runs


def profile(arguments: list[str]) -> None:
    """`tapir profile RUN`."""

    def run(
        run: PositionalPath,
        last: int = 0,
        peak_tflops: float = 0.0,
        plan: Path | None = None,
        html: Path | None = None,
        trace: bool = False,
        trace_next: int = 0,
        ranks: tuple[int, ...] = (),
        json: bool = False,
    ) -> None:
        """Show where the time of a run's steps went, on every rank, and what to do about it.

        Args:
            run: run folder of a dVAE, prior or CLIP, finished or in progress
            last: use only this many of the last steps; 0 = all that are kept (4096)
            peak_tflops: peak of one device, for MFU; 0 = as measured at the run's start
            plan: output of `tapir plan --json`, shown beside the measurements
            html: also write tables and heat map to this file
            trace: list the traces of torch.profiler, and how to open them
            trace_next: ask the run in progress to trace this many steps
            ranks: ranks that --trace-next traces; none = all
            json: print a JSON object on the last line
        """
        reads = bool(last or peak_tflops or plan or html)
        check(_problems(last, peak_tflops, (trace, trace_next != 0, reads), bool(ranks)))
        if trace_next:
            request_trace(run, trace_next, list(ranks))
            LOG.info("asked; the ranks begin at the step after the next row of metrics.jsonl")
        elif trace:
            _show_traces(run, json)
        else:
            _profile(run, last, peak_tflops, (plan, html), json)

    parse(run, arguments, "profile")


def _profile(
    run: Path, last: int, peak: float, files: tuple[Path | None, Path | None], json: bool
) -> None:
    plan, html = files
    if html:
        refuse_folder(html)
    profile, report = profile_of(run, last, peak, plan)
    show(profile, report)
    if html:
        write_atomic(html, page(profile, report).encode())
        LOG.info("wrote %s", html)
    if json:
        print_json(report)


def _problems(last: int, peak: float, modes: tuple[bool, bool, bool], ranks: bool) -> list[str]:
    """Problems of the flags; `modes` = (--trace, --trace-next, any flag of the report)."""
    problems = []
    if last < 0:
        problems.append(f"--last {last} must not be negative; 0 = all steps that are kept")
    if not 0 <= peak < float("inf"):
        problems.append(f"--peak-tflops {peak} must be finite and not negative; 0 = the run's own")
    if sum(modes) > 1:
        problems.append(
            "--trace and --trace-next do one thing each, without the report and its flags (--last, "
            "--peak-tflops, --plan, --html); give one of them"
        )
    if ranks and not modes[1]:
        problems.append("--ranks says what --trace-next traces; give --trace-next 5, too")
    return problems


def _show_traces(run: Path, as_json: bool) -> None:
    paths = traces(run)
    if not paths:
        raise InputError(
            f"{run} holds no trace; train with --profile.steps 20:25, or ask a run in progress by "
            f"`tapir profile {run} --trace-next 5`"
        )
    for path in paths:
        LOG.info("%s", path)
    LOG.info("open one in https://ui.perfetto.dev or chrome://tracing (it stays on your machine)")
    LOG.info(
        "or all: pip install torch-tb-profiler && tensorboard --logdir %s; ranges named "
        "`tapir: ...` are the categories of `tapir profile`",
        run / FOLDER,
    )
    if as_json:
        print_json({"traces": paths})


def watch(arguments: list[str]) -> None:
    """`tapir watch RUN [RUN...]`."""

    def run(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        once: bool = False,
        interval: float = 1.0,
    ) -> None:
        """Watch runs in this terminal until all have ended, or Ctrl-C.

        Args:
            runs: run folders of dVAEs, priors or CLIPs
            once: print one frame and exit, as when standard output is not a terminal
            interval: seconds between two updates, up to 3600
        """
        watch_runs(runs, once, interval)

    parse(run, arguments, "watch")
