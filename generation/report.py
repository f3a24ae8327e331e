"""report.html: one file that shows what a demo folder holds."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from core.errors import InputError
from core.files import write_atomic
from training.run_folder import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(folder: Path) -> Path:
    """Write report.html of a demo folder; returns its path.

    Raises: InputError if the folder holds no finished demo.
    """
    if not (folder / "summary.json").exists():
        raise InputError(f"{folder} has no summary.json; run `tapir demo --out {folder}` first")
    summary = json.loads((folder / "summary.json").read_text())
    samples = folder / "samples"
    rows = json.loads((samples / "candidates.json").read_text())["rows"]
    for row in rows:
        row["image"] = _embed(samples / row["file"])
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = loader.from_string(TEMPLATE.read_text()).render(
        summary=summary,
        rows=rows,
        reconstructions=_embed(samples / "reconstructions.png"),
        prompted=_embed(samples / "image-prompts.png"),
        curves=_curves(folder),
        figure6=_figure6(summary.get("caption_accuracy")),
    )
    target = folder / "report.html"
    write_atomic(target, html.encode())
    return target


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _curves(folder: Path) -> str:
    """Loss curves of the three networks, training and held-out, as one SVG."""
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


def _figure6(accuracy: dict[str, float] | None) -> str:
    """Caption accuracy against the number of candidates, or nothing."""
    if not accuracy:
        return ""
    counts = [n for n in (1, 4, 16) if f"best_of_{n}" in accuracy]
    figure, axis = pyplot.subplots(figsize=(5, 3))
    values = [accuracy[f"best_of_{n}"] for n in counts]
    axis.plot(counts, values, "o-", label="best of N by CLIP")
    axis.axhline(accuracy["reconstruction"], ls="--", c="green", label="upper bound")
    axis.axhline(accuracy["chance"], ls=":", c="grey", label="chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("candidates N")
    axis.set_ylabel("exact captions")
    axis.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
