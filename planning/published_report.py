"""The cost model's predictions for published runs, as JSON and as tables."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from planning.estimate.hardware import KNOWN
from planning.estimate.overlapped.published_h100 import H100_RUNS, Run
from planning.estimate.overlapped.runs import tokens_a_second
from planning.estimate.published import RUNS, predict

WIDTH = 150
"""Columns that the tables need, also if output is not a terminal."""


def published_json() -> dict[str, Any]:
    """The published runs, predicted row by row: A100s, and under `h100` the H100s."""
    return {**_summed(_a100_rows()), "h100": _summed([_h100_row(run) for run in H100_RUNS])}


def _a100_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for run in RUNS:
        predicted = predict(run)
        rows.append(
            {
                "run": run.name,
                "tensor": run.tensor,
                "pipeline": run.pipeline,
                "gpus": run.gpus,
                "micro_batch": predicted.micro,
                "chunks": predicted.chunks,
                "held_out": run.held_out,
                "published_tflops": run.measured,
                "predicted_tflops": predicted.tflops,
                "error": predicted.tflops / run.measured - 1,
            }
        )
    return rows


def _h100_row(run: Run) -> dict[str, Any]:
    predicted = tokens_a_second(run, KNOWN[run.gpu])
    return {
        "run": run.name,
        "source": run.source,
        "gpu": run.gpu,
        "gpus": run.gpus,
        "micro_batch": run.micro,
        "recompute": run.recompute,
        "held_out": run.held_out,
        "published_tokens_a_second": run.measured,
        "predicted_tokens_a_second": predicted,
        "error": predicted / run.measured - 1,
    }


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, their mean errors, and the worst of them."""
    worst = max(rows, key=lambda row: abs(row["error"]))
    return {
        "rows": rows,
        "mean_error": _mean(rows),
        "seen_mean_error": _mean([row for row in rows if not row["held_out"]]),
        "held_out_mean_error": _mean([row for row in rows if row["held_out"]]),
        "worst": {"run": worst["run"], "error": worst["error"]},
    }


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    return float(mean(abs(row["error"]) for row in rows))


def show_published(published: dict[str, Any]) -> None:
    """Print the predictions of `published_json` as tables."""
    console = Console()
    console.width = max(console.width, WIDTH)
    titles = {
        "TFLOP/s a GPU: Megatron-LM on A100-80GB (arXiv 2104.04473, table 1)": published,
        "Tokens a second and GPU: torchtitan, OLMo-core and llm-foundry on H100 (bf16; sources in "
        "planning/estimate/overlapped/published_h100.py)": published["h100"],
    }
    for title, part in titles.items():
        console.print(_table(title, part["rows"]), _told(part))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " ").replace(" a second", "/s"), no_wrap=True)
    for row in rows:
        *cells, error = row.values()
        table.add_row(*map(_cell, cells), f"{error:+.1%}")
    return table


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _told(part: dict[str, Any]) -> str:
    worst = part["worst"]
    return (
        f"mean error {part['mean_error']:.1%}: {part['seen_mean_error']:.1%} of the rows that the "
        f"model was made with, {part['held_out_mean_error']:.1%} of those held out; worst: "
        f"{worst['run']}, {worst['error']:+.1%}\n"
    )
