"""report.html: one page that shows the results of a demo folder; leaderboard.md of its suites."""

import base64
import json
import math
import struct
from pathlib import Path
from typing import Any

import jinja2

from core.errors import InputError
from core.files.atomic import Json, write_atomic
from workflow.leaderboard import galleries, suite_tables, write_leaderboard
from workflow.plots import accuracy_curves, best_of_counts, loss_curves, score_curves

TEMPLATE = Path(__file__).with_name("report.html")
_LEAST_SIDE, _MOST_SIDE = 64, 128


def write_report(folder: Path) -> Path:
    """Write report.html of a demo folder, and leaderboard.md of its suites; returns its path.

    In a folder that holds suites alone, only leaderboard.md is written.
    Raises: InputError if the folder holds neither a finished demo nor a suite.
    """
    tables = suite_tables(folder)
    board = write_leaderboard(folder, tables) if tables else None
    if not (folder / "summary.json").exists():
        if board is not None:
            return board
        raise InputError(
            f"{folder} has no summary.json and no suite.json; run `tapir demo --out {folder}` or "
            "`tapir evaluate --suite NAME` first"
        )
    summary = json.loads((folder / "summary.json").read_text())
    samples = folder / "samples"
    rows = json.loads((samples / "candidates.json").read_text())["rows"]
    accuracy = summary.get("caption_accuracy")
    scores = _scores(folder / "scores" / "scores.json")
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = loader.from_string(TEMPLATE.read_text()).render(
        summary=summary,
        gallery=[_gallery_row(row, samples / row["file"]) for row in rows],
        reconstructions=_embed(samples / "reconstructions.png"),
        prompted=_embed(samples / "image-prompts.png"),
        verdict=summary.get("verdict"),
        nearest=_embed(folder / "nearest.png") if "verdict" in summary else "",
        losses=loss_curves(folder),
        best_of=best_of_counts(accuracy) if accuracy else {},
        accuracy_plot=accuracy_curves(accuracy) if accuracy else "",
        scores=scores,
        suites=tables,
        galleries=[_embedded(folder, each) for each in galleries(folder, tables)],
        scores_plot=score_curves(scores["rows"]) if scores else "",
    )
    target = folder / "report.html"
    write_atomic(target, html.encode())
    return target


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _embedded(folder: Path, gallery: Json) -> Json:
    """A suite's gallery with its pictures in place of their paths."""
    rows = [{**row, "image": _embed(folder / row["path"])} for row in gallery["rows"]]
    return {**gallery, "rows": rows}


def _gallery_row(row: Json, path: Path) -> dict[str, Any]:
    """A caption with its candidates: one image of square tiles side by side, and their scores."""
    width, _ = struct.unpack(">II", path.read_bytes()[16:24])  # of a PNG's first chunk
    tile = max(width // len(row["scores"]), 1)
    side = min(tile * math.ceil(_LEAST_SIDE / tile), _MOST_SIDE)
    shown = {"image": _embed(path), "side": side, "enlarged": side >= tile}
    return {"caption": row["caption"], "scores": row["scores"], **shown}


def _scores(path: Path) -> Json | None:
    """FID and IS, if they were measured."""
    if not path.exists():
        return None
    scores: Json = json.loads(path.read_text())
    return scores
