"""A plan as a picture: memory by category, and the timeline of a step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from planning.estimate.hardware import Hardware
from planning.estimate.memory import CATEGORIES
from planning.estimate.reserve import NCCL
from planning.estimate.search import Candidate, SearchResult, Timed
from planning.estimate.step_time import PASSES, Estimate

BARS = 9
TIMES_USABLE = 3.5
"""Height of the memory axis over the usable memory; higher bars are cut."""


def draw(result: SearchResult, hardware: Hardware, path: Path) -> None:
    """Write the picture; the suffix of the file gives its format."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 8), layout="constrained")
    fitting = [row.candidate for row in result.timed[:4]]
    others = sorted((row for row in result.rejected if row.bytes_), key=_known, reverse=True)
    _memory(above, [*fitting, *others[: BARS - len(fitting)]], hardware)
    if result.timed:
        _timeline(below, result.timed[0])
    else:
        below.set_axis_off()
    figure.savefig(path)
    plt.close(figure)


def _known(row: Candidate) -> bool:
    """True for the layouts of most interest: plain data parallelism, and the paper's."""
    settings = row.settings
    return settings.engine.name == "reference" or settings.mesh.nodes > 1


def _memory(axes: Axes, rows: list[Candidate], hardware: Hardware) -> None:
    names = []
    for row in rows:
        mesh = row.settings.mesh
        short = row.settings.engine.name.removeprefix("deepspeed_")
        short = "paper" if mesh.nodes > 1 else short
        names.append(f"TP{mesh.tensor} PP{mesh.pipeline}\nDP{mesh.data} {short}")
    at = list(range(len(rows)))
    bottoms = [0.0] * len(rows)
    for category in (*CATEGORIES, NCCL):
        heights = [row.bytes_[category] / 1e9 for row in rows]
        axes.bar(at, heights, bottom=bottoms, label=category)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    most = TIMES_USABLE * hardware.usable / 1e9
    for i, top in zip(at, bottoms, strict=True):
        axes.text(i, min(top, 0.93 * most), f"{top:.1f}", ha="center", va="bottom", fontsize=8)
    axes.axhline(hardware.usable / 1e9, color="black", linestyle="--", label="usable")
    axes.set_ylim(0, most)
    axes.set_xticks(at, names, fontsize=8)
    axes.set_ylabel("GB a rank")
    axes.set_title(f"memory by category on {hardware.name}")
    axes.legend(fontsize=8, ncols=2)


def ending(estimate: Estimate) -> list[tuple[str, float, float]]:
    """Parts of a step after the passes of the stages: (name, begin, seconds)."""
    rows, at = [], max(span.end for span in estimate.spans)
    for name, seconds in estimate.parts.items():
        if name not in PASSES and seconds:
            rows.append((name, at, seconds))
            at += seconds
    return rows


def _timeline(axes: Axes, row: Timed) -> None:
    """Draw the passes of every stage, then what all stages do after the last backward pass."""
    colours = {"forward": "tab:blue", "backward": "tab:orange"}
    for kind, colour in colours.items():
        for stage in {span.stage for span in row.estimate.spans}:
            spans = [s for s in row.estimate.spans if s.stage == stage and s.kind == kind]
            bars = [(s.begin, s.end - s.begin) for s in spans]
            axes.broken_barh(bars, (stage - 0.4, 0.8), color=colour, edgecolor="white", lw=0.2)
    stages = row.candidate.settings.mesh.pipeline
    for i, (name, begin, width) in enumerate(ending(row.estimate)):
        axes.broken_barh([(begin, width)], (-0.4, stages - 0.2), color=f"C{i + 2}", label=name)
    axes.set_yticks(range(stages))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_ylabel("stage")
    axes.set_title("a step of the fastest: forward (blue), backward (orange), then all together")
    axes.legend(fontsize=8, loc="center right")
