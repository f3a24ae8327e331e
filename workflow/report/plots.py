"""Plots of report.html, as SVG."""

import io
import itertools
from math import nan
from pathlib import Path
from typing import Any

import matplotlib

from core.files.atomic import Json
from training.run.folder import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot

_BEST = "best_of_"


def loss_curves(folder: Path) -> str:
    """Losses of the three networks, training and held-out."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3))
    for axis, (stage, field) in zip(
        axes, (("dvae", "loss"), ("prior", "image_loss"), ("clip", "loss")), strict=True
    ):
        rows = read_metrics(folder / stage)
        train = [row for row in rows if row.get("split") != "validation"]
        held_out = [row for row in rows if row.get("split") == "validation"]
        axis.plot([r["step"] for r in train], [r[field] for r in train], lw=0.8, label="train")
        axis.plot(
            [r["step"] for r in held_out], [r[field] for r in held_out], "o-", label="validation"
        )
        if stage == "prior":
            bounds = held_out[-1]
            for name, style in (("per_position_entropy", ":"), ("shuffled_caption_loss", "--")):
                axis.axhline(bounds[name], ls=style, c="grey", lw=1, label=name.replace("_", " "))
        axis.set_title(f"{stage}: {field.replace('_', ' ')} (nats)", fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    return _svg(figure)


def best_of_counts(accuracy: Json) -> dict[int, float]:
    """Caption accuracy by number of candidates, in ascending order."""
    shares = {k.removeprefix(_BEST): v for k, v in accuracy.items() if k.startswith(_BEST)}
    return dict(sorted((int(count), v) for count, v in shares.items() if count.isdigit()))


def accuracy_curves(accuracy: Json) -> str:
    """Caption accuracy by number of candidates (figure 6 of the paper) and by guidance scale."""
    best = best_of_counts(accuracy)
    guided = {float(scale): share for scale, share in accuracy.get("guidance", {}).items()}
    figure, axes = pyplot.subplots(1, 1 + bool(guided), figsize=(5 * (1 + bool(guided)), 3))
    left, *others = [axes] if not guided else list(axes)
    left.plot(list(best), list(best.values()), "o-", label="best of N by CLIP")
    left.set_xscale("log", base=2)
    left.set_xticks(list(best), [str(count) for count in best])
    left.set_xlabel("candidates N")
    for axis in others:
        scales = sorted(guided)
        axis.plot(scales, [guided[scale] for scale in scales], "o-", label="single samples")
        axis.set_xlabel("guidance scale")
    for axis in (left, *others):
        axis.axhline(accuracy["reconstruction"], ls="--", c="green", label="upper bound")
        axis.axhline(accuracy["chance"], ls=":", c="grey", label="chance")
        axis.set_ylim(0, 1.02)
        axis.set_ylabel("exact captions")
        axis.legend(fontsize=8)
    return _svg(figure)


def score_curves(rows: list[Json]) -> str:
    """FID and IS by blur radius, one line for each set."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3))
    for axis, name in zip(axes, ("fid", "is"), strict=True):
        styles = itertools.cycle(("o-", "s--", "^:"))
        for kind in dict.fromkeys(row["set"] for row in rows):
            part = sorted((r["radius"], r[name]) for r in rows if r["set"] == kind)
            axis.plot([x for x, _ in part], [y for _, y in part], next(styles), label=kind)
        axis.set_xlabel("blur radius (pixels)")
        axis.set_ylabel(name.upper())
        axis.set_ylim(0, 1.1 * max(row[name] for row in rows))
        axis.legend(fontsize=8)
    return _svg(figure)


def candidate_curves(results: Json) -> str:
    """FID, IS and on shapes accuracy against the number of candidates N (figures 9c and 6)."""
    rows = results["rows"]
    counts = [row["n"] for row in rows]
    proxy = "proxy " if results["label"].startswith("proxy") else ""
    names = {"fid": f"{proxy}FID", "is": f"{proxy}IS", "accuracy": "exact captions"}
    names = {name: text for name, text in names.items() if name in rows[0]}
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 3))
    for axis, (name, text) in zip(axes, names.items(), strict=True):
        values, spreads = ([row.get(key, nan) for row in rows] for key in (name, f"{name}_std"))
        axis.errorbar(counts, values, spreads, fmt="o-", capsize=2)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_xlabel("candidates N, the best by CLIP is kept")
        axis.set_ylabel(text)
    return _svg(figure)


def _svg(figure: Any) -> str:
    """A figure as SVG, the same bytes each time, with labels as text: as outlines they would be
    most of the file."""
    buffer = io.StringIO()
    figure.tight_layout()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "tapir", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
