"""report.html: one page that shows the results of a demo folder; leaderboard.md of its suites."""

import base64
import io
import json
import math
import shlex
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from core.errors import InputError
from core.files.atomic import Json, write_atomic
from training.run.config import config_of
from workflow.report.costs import costs_of
from workflow.report.findings import findings_of, worst_rows
from workflow.report.leaderboard import galleries, suite_tables, write_leaderboard
from workflow.report.plots import accuracy_curves, best_of_counts, loss_curves, score_curves

TEMPLATE = Path(__file__).with_name("report.html")
_LEAST_SIDE, _MOST_SIDE = 64, 128
_STRIP, _WORST = 12, 6
"""Pictures of the strip on top, and of the worst captions."""


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
    scores = _scores(folder / "scores" / "scores.json")
    costs = costs_of(summary)
    worst = worst_rows(rows, _WORST)
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = loader.from_string(TEMPLATE.read_text()).render(
        summary=summary,
        strip=[_tile(row, samples) for row in rows[:_STRIP]],
        findings=findings_of(summary, rows, scores),
        worst=[_tile(row, samples) for row in worst],
        gallery=[_gallery_row(row, samples / row["file"]) for row in rows],
        reconstructions=_embed(samples / "reconstructions.png"),
        prompted=_embed(samples / "image-prompts.png"),
        verdict=summary.get("verdict"),
        nearest=_embed(folder / "nearest.png") if "verdict" in summary else "",
        best_of=best_of_counts(summary.get("caption_accuracy") or {}),
        plots=_plots(folder, summary, scores),
        costs=costs,
        leaderboard=_leaderboard_row(folder, summary, scores, costs),
        commands=_next_commands(folder, [row["caption"] for row in worst or rows]),
        scores=scores,
        suites=tables,
        galleries=[_embedded(folder, each) for each in galleries(folder, tables)],
    )
    target = folder / "report.html"
    write_atomic(target, html.encode())
    return target


def _plots(folder: Path, summary: Json, scores: Json | None) -> dict[str, str]:
    """SVG by section, each with a name for screen readers."""
    accuracy = summary.get("caption_accuracy")
    plots = {"losses": _named(loss_curves(folder), "Losses of dVAE, prior and CLIP by step")}
    if accuracy:
        name = "Share of exact captions by number of candidates"
        name += " and by guidance scale" if accuracy.get("guidance") else ""
        plots["accuracy"] = _named(accuracy_curves(accuracy), name)
    if scores:
        plots["scores"] = _named(score_curves(scores["rows"]), "FID and IS by blur radius")
    return plots


def _named(svg: str, name: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _leaderboard_row(folder: Path, summary: Json, scores: Json | None, costs: Json) -> Json:
    """The run as one row of a table, column -> cell."""
    model = config_of(folder / "prior")
    accuracy = summary.get("caption_accuracy") or {}
    best = best_of_counts(accuracy)
    row = {
        "run": folder.absolute().name,
        "data": str(summary["data"]),
        "prior": f"{model['model']['layers']} layers of {model['model']['dim']}",
        "steps": f"{model['loop']['steps']:,}",
        "held-out loss": f"{summary['prior']['validation_loss']:.4g}",
        "PSNR": f"{summary['dvae']['psnr']:.1f}",
    }
    if best:
        row["exact, single"] = f"{best[min(best)]:.1%}"
        row[f"exact, best of {max(best)}"] = f"{best[max(best)]:.1%}"
    if scores:
        row["FID"] = f"{min(scores['rows'], key=lambda each: each['radius'])['fid']:.4g}"
    row["minutes"] = f"{costs['seconds'] / 60:.1f}"
    return {"cells": row, "markdown": _markdown(row)}


def _markdown(row: dict[str, str]) -> str:
    lines = [list(row), ["---"] * len(row), list(row.values())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _next_commands(folder: Path, captions: list[str]) -> list[tuple[str, str]]:
    """(what it is for, command) of what a reader may try next."""
    place = {name: shlex.quote(str(folder / name)) for name in ("prior", "dvae", "clip", "bpe")}
    models = " ".join(f"--{name} {path}" for name, path in place.items())
    caption = shlex.quote(captions[0] if captions else "a small red circle")
    whole, elsewhere = shlex.quote(str(folder)), shlex.quote(str(folder / "export"))
    return [
        (
            "More candidates of a caption that failed",
            f"tapir sample {caption} {models} --candidates 64 --temperature 0.8 --out try.png",
        ),
        ("A page to draw with, and the images API", f"tapir serve {shlex.quote(f'run={folder}')}"),
        _study_command(folder),
        ("Where the prior's time went", f"tapir profile {place['prior']}"),
        ("Losses, reconstructions and codebook over time", f"tensorboard --logdir {whole}"),
        ("The models for other programs", f"tapir export {whole} {elsewhere}"),
        ("This page again", f"tapir report {whole}"),
    ]


def _study_command(folder: Path) -> tuple[str, str]:
    """People compare the pictures with real ones if they are at hand, else with another run's."""
    run, raw, out = (shlex.quote(str(folder / name)) for name in ("", "data/raw", "study"))
    if (folder / "data" / "raw").is_dir():
        what = "How people like the pictures beside real ones"
        return what, f"tapir study make {run} {raw} --count 50 --candidates 16 --out {out}"
    what = "How people like the pictures beside another run's (a caption a line in captions.txt)"
    flags = f"--captions captions.txt --candidates 16 --out {out}"
    return what, f"tapir study make {run} runs/OTHER {flags}"


def _embed(path: Path) -> str:
    return _as_url(path.read_bytes())


def _as_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _embedded(folder: Path, gallery: Json) -> Json:
    """A suite's gallery with its pictures in place of their paths."""
    rows = [{**row, "image": _embed(folder / row["path"])} for row in gallery["rows"]]
    return {**gallery, "rows": rows}


def _tile(row: Json, samples: Path) -> Json:
    """A caption with its best candidate alone, and how many of its candidates are exact."""
    with Image.open(samples / row["file"]) as tiles:
        side = tiles.width // len(row["scores"])
        best, buffer = tiles.crop((0, 0, side, tiles.height)), io.BytesIO()
    best.save(buffer, "PNG")
    exact = row.get("exact")
    return {
        "caption": row["caption"],
        "image": _as_url(buffer.getvalue()),
        "side": side * round(_MOST_SIDE / side) if side < _MOST_SIDE else _MOST_SIDE,
        "of": len(row["scores"]),
        "right": None if exact is None else sum(exact),
    }


def _gallery_row(row: Json, path: Path) -> dict[str, Any]:
    """A caption with its candidates: one image of square tiles side by side, and their scores."""
    with Image.open(path) as tiles:
        tile = max(tiles.width // len(row["scores"]), 1)
    side = _shown_side(tile)
    shown = {"image": _embed(path), "side": side, "enlarged": side >= tile}
    return {"caption": row["caption"], "scores": row["scores"], **shown}


def _shown_side(tile: int) -> int:
    """Pixels of a tile on the page: whole multiples of small ones."""
    return min(tile * math.ceil(_LEAST_SIDE / tile), _MOST_SIDE)


def _scores(path: Path) -> Json | None:
    """FID and IS, if they were measured."""
    if not path.exists():
        return None
    scores: Json = json.loads(path.read_text())
    return scores
