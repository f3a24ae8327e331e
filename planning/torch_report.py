"""Layouts of engine torch in a plan, as JSON and as a table."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table

from core.memory import memory_unit, size_text
from planning.estimate.overlapped.layout import IN_BUILD
from planning.estimate.overlapped.search import TorchRow

ASSUMED = (
    "gathers and reduce-scatters run beside the passes",
    "blocks are compiled, with 16-bit weights cast once a step",
    "tensor parallelism is asynchronous",
)
"""What only a GPU can show; plan prints MFU with and without it."""
SHOWN = 4


def torch_json(rows: list[TorchRow]) -> dict[str, Any]:
    """The fastest layouts of engine torch."""
    return {"in_build": IN_BUILD, "assumed": list(ASSUMED), "rows": [_row(row) for row in rows]}


def _row(row: TorchRow) -> dict[str, Any]:
    estimate = row.estimate
    layout = estimate.layout
    return {
        "layout": layout.name,
        **vars(layout),
        "gradient_accumulation_steps": layout.accumulate,
        "bytes": row.bytes_,
        "total_bytes": row.total,
        "step_seconds": estimate.seconds,
        "mfu": estimate.mfu,
        "step_seconds_without_assumed": estimate.bare_seconds,
        "mfu_without_assumed": estimate.bare_mfu,
        "bubble": estimate.bubble,
        "seconds": estimate.parts,
    }


def show_torch(console: Console, rows: list[TorchRow]) -> None:
    """Print the fastest layouts, and where the time of the first goes."""
    if not rows:
        return
    console.print(_layouts(rows[:SHOWN]), _split(rows[0]))
    console.print(f"assumed, since only a GPU can show it: {'; '.join(ASSUMED)}\n")


def _layouts(rows: list[TorchRow]) -> Table:
    where = "" if IN_BUILD else " (this build has a part of it)"
    size, unit = memory_unit(max(row.total for row in rows))
    table = _table(
        f"with engine torch{where}: the best of each mesh",
        *("layout", "micro", "recompute", "rank", unit, "step s", "MFU", "without the assumed"),
        "bubble",
    )
    for row in rows:
        estimate, layout = row.estimate, row.estimate.layout
        table.add_row(
            layout.name,
            f"{layout.micro} x {layout.accumulate}",
            layout.recompute,
            str(layout.rank),
            f"{row.total / size:.1f}",
            f"{estimate.seconds:.3g}",
            f"{estimate.mfu:.1%}",
            f"{estimate.bare_mfu:.1%}",
            f"{estimate.bubble:.0%}",
        )
    return table


def _split(row: TorchRow) -> Group:
    parts = {name: value for name, value in row.estimate.parts.items() if value}
    table = _table("a step of the first one, seconds", *parts)
    table.add_row(*(f"{value:.3g}" for value in parts.values()))
    kept = ", ".join(f"{name} {size_text(count)}" for name, count in row.bytes_.items() if count)
    return Group(table, f"its bytes: {kept}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table
