"""A profile as tables and a heat map: on the terminal, and as an HTML page."""

import html
import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.log import LOG
from training.profiling.categories import CATEGORIES
from training.profiling.heat import as_svg, as_text, heat_of
from training.profiling.report import Profiled, Report

_WIDTH = 110
_HEAT = "own work of each rank over the median of its peers', the other ranks of its stage"


def page(profiled: Profiled, report: Report) -> str:
    """The report as one self-contained HTML page."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), color_system="truecolor")
    console.print(_tables(report))
    tables = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    heat = heat_of(profiled.own(), profiled.numbers, profiled.steps, 120, 1024)
    return (
        f'<!doctype html><meta charset="utf-8"><title>profile of {html.escape(report.run)}</title>'
        f"{tables}<h3>{_HEAT}</h3>{as_svg(heat)}\n"
    )


def show(profiled: Profiled, report: Report) -> None:
    """Print the report on the terminal."""
    for text in report.missing:
        LOG.warning("%s: %s", profiled.run, text)
    Console(width=_WIDTH).print(_view(profiled, report))


def _view(profiled: Profiled, report: Report) -> RenderableType:
    if len(profiled.numbers) == 1:
        return _tables(report)
    heat = heat_of(profiled.own(), profiled.numbers, profiled.steps, 64, 32)
    return Group(_tables(report), Text(_HEAT, style="bold"), as_text(heat))


def _tables(report: Report) -> RenderableType:
    parts: list[RenderableType] = [_breakdown(report), Text(_speed(report))]
    if report.collectives:
        parts.append(_collectives(report))
    notes = [*report.missing, *report.warnings]
    parts += [Text(f"! {text}", style="yellow") for text in notes]
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
