"""The verb profile."""

import html
import io
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.config import check
from core.errors import InputError
from core.files.atomic import refuse_folder, write_atomic
from core.flags import PositionalPath, parse, print_json
from core.log import LOG
from training.profiling.categories import CATEGORIES
from training.profiling.heat import as_svg, as_text, heat_of
from training.profiling.plan import read_plan
from training.profiling.report import Profiled, Report, read_profile, report_of
from training.profiling.ring import FOLDER
from training.profiling.trace import request_trace, traces

_WIDTH = 110
_HEAT = "own work of each rank over the median of its peers', the other ranks of its stage"


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
            last: look at so many steps, the last ones; 0 = all that are kept (4096)
            peak_tflops: of one device, for MFU; 0 = what the run measured at its start
            plan: what `tapir plan --json` printed, to be shown beside what was measured
            html: write tables and heat map to this file, too
            trace: say where the traces of torch.profiler are, and how to open them
            trace_next: ask the run in progress for a trace of so many steps
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
    found = read_profile(run, last)
    on_gpu = any("cuda_bytes" in row for row in found.rows) if found.rows else None
    planned = read_plan(plan, found.settings, on_gpu) if plan else None
    report = report_of(found, peak, planned)
    for text in report.missing:
        LOG.warning("%s: %s", run, text)
    Console(width=_WIDTH).print(_view(found, report))
    if html:
        write_atomic(html, page(found, report).encode())
        LOG.info("wrote %s", html)
    if json:
        print_json(report)


def _problems(last: int, peak: float, modes: tuple[bool, bool, bool], ranks: bool) -> list[str]:
    """What is wrong with the flags; `modes` = --trace, --trace-next, and flags of the report."""
    found = []
    if last < 0:
        found.append(f"--last {last} must not be negative; 0 = all steps that are kept")
    if not 0 <= peak < float("inf"):
        found.append(f"--peak-tflops {peak} must be finite and not negative; 0 = the run's own")
    if sum(modes) > 1:
        found.append(
            "--trace and --trace-next do one thing each, without the report and its flags (--last, "
            "--peak-tflops, --plan, --html); give one of them"
        )
    if ranks and not modes[1]:
        found.append("--ranks says what --trace-next traces; give --trace-next 5, too")
    return found


def page(found: Profiled, report: Report) -> str:
    """The report as one HTML page without outside parts."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), color_system="truecolor")
    console.print(_tables(report))
    tables = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    heat = heat_of(found.own(), found.numbers, found.steps, 120, 1024)
    return (
        f'<!doctype html><meta charset="utf-8"><title>profile of {html.escape(report.run)}</title>'
        f"{tables}<h3>{_HEAT}</h3>{as_svg(heat)}\n"
    )


def _view(found: Profiled, report: Report) -> RenderableType:
    if len(found.numbers) == 1:
        return _tables(report)
    heat = heat_of(found.own(), found.numbers, found.steps, 64, 32)
    return Group(_tables(report), Text(_HEAT, style="bold"), as_text(heat))


def _tables(report: Report) -> RenderableType:
    parts: list[RenderableType] = [_breakdown(report), Text(_speed(report))]
    if report.collectives:
        parts.append(_collectives(report))
    said = [*report.missing, *report.warnings]
    parts += [Text(f"! {text}", style="yellow") for text in said]
    return Group(*parts)


def _breakdown(report: Report) -> Table:
    some = "" if len(report.slow_ranks) == report.ranks else f"{len(report.slow_ranks)} of "
    title = (
        f"{report.stage} in {report.run}: steps {report.first_step} to {report.last_step}, "
        f"{some}{report.ranks} rank{'s' if report.ranks > 1 else ''}; ms a step"
    )
    table = Table(title=Text(title), title_justify="left")
    names = ["category", "mean", "p50", "p99", "share", "most on rank"]
    planned = report.predicted
    column = f"predicted {report.predicted_for}".strip()
    for name in [*names, *([column] if planned else [])]:
        table.add_column(name, justify="left" if name == "category" else "right")
    for name in CATEGORIES:
        row = report.time[name]
        cells = [name, *(f"{1000 * value:.2f}" for value in (row.mean, row.p50, row.p99))]
        cells += [f"{row.share:.1%}", str(row.slowest_rank)]
        table.add_row(*cells, *([f"{1000 * planned.get(name, 0):.2f}"] if planned else []))
    total = ["all", f"{1000 * report.seconds:.2f}", "", "", "100.0%", ""]
    table.add_row(*total, *([f"{1000 * sum(planned.values()):.2f}"] if planned else []))
    return table


def _speed(report: Report) -> str:
    tokens = report.tokens_per_second
    rate = "tokens/s not noted" if tokens is None else f"{tokens:,.0f} tokens/s"
    return (
        f"{report.steps_per_second:.3g} steps/s, {rate}; "
        f"{report.model_flops:.3g} model FLOPs a step = {report.model_tflops:.3g} TFLOP/s; "
        f"MFU {report.mfu:.1%} of {report.peak_tflops:.3g} TFLOP/s ({report.peak_source})"
    )


def _collectives(report: Report) -> Table:
    table = Table(title="collectives of a step, as rank 0 sees them", title_justify="left")
    for name in ("group", "operation", "calls", "MB", "ms", "GB/s"):
        table.add_column(name, justify="left" if name in ("group", "operation") else "right")
    for row in report.collectives:
        rate = row.bytes / row.seconds / 1e9 if row.seconds else 0.0
        table.add_row(
            row.group,
            row.operation,
            f"{row.calls:.0f}",
            f"{row.bytes / 1e6:.2f}",
            f"{1000 * row.seconds:.2f}",
            f"{rate:.2f}",
        )
    return table


def _show_traces(run: Path, as_json: bool) -> None:
    found = traces(run)
    if not found:
        raise InputError(
            f"{run} holds no trace; train with --profile.steps 20:25, or ask a run in progress by "
            f"`tapir profile {run} --trace-next 5`"
        )
    for path in found:
        LOG.info("%s", path)
    LOG.info("open one in https://ui.perfetto.dev or chrome://tracing (it stays on your machine)")
    LOG.info(
        "or all: pip install torch-tb-profiler && tensorboard --logdir %s; ranges named "
        "`tapir: ...` are the categories of `tapir profile`",
        run / FOLDER,
    )
    if as_json:
        print_json({"traces": found})
