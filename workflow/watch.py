"""`tapir watch RUN...`: show runs live in a terminal, from metrics.jsonl and heartbeats alone."""

import codecs
import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.errors import InputError
from core.heartbeat import Beat
from training.profiling.categories import CATEGORIES
from training.run.folder import beats_of
from training.run.metrics import passed_over
from training.run.tail import Follower

_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = {**dict(zip(_BLOCKS, ".:-=+*%#", strict=True)), "…": "."}
"""ASCII replacements for encodings without these characters."""
_SPARK, _BAR, _MOST_BEATS = 60, 30, 16
_NAME = "tapir-plain"
_QUIET = 60.0
"""Seconds without a row after which the panel warns."""
_SLOW = 1.2
"""Ratio of a rank's own work to its peers' above which it is named."""
_LONGEST = 3600.0
"""Maximum seconds between two updates."""


def watch_runs(runs: Sequence[Path], once: bool, interval: float) -> None:
    """Draw the panels of some run folders every `interval` seconds, or once.

    Raises: InputError for no run, or an interval that is not in (0, 3600].
    """
    if not runs or not 0 < interval <= _LONGEST:
        raise InputError(
            f"name a run folder at least, and an --interval of at most {_LONGEST:.0f} s"
        )
    followers = [Follower(path) for path in runs]
    codecs.register_error(_NAME, _in_plain_signs)
    sys.stdout.reconfigure(errors=_NAME)  # type: ignore[union-attr]
    if once or not sys.stdout.isatty():
        Console().print(frame(followers))
        return
    _live(followers, interval)


def _in_plain_signs(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: replace characters that the terminal's encoding lacks by ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in text), error.end


def _live(followers: Sequence[Follower], interval: float) -> None:
    console = Console()
    try:
        with Live(_fitting(followers, console), console=console, auto_refresh=False) as live:
            while not all(follower.finished or follower.gone for follower in followers):
                time.sleep(interval)
                live.update(_fitting(followers, console), refresh=True)
    except KeyboardInterrupt:
        return


def _fitting(followers: Sequence[Follower], console: Console) -> RenderableType:
    """The runs that fit in the terminal, and how many do not."""
    shown: list[Panel] = []
    left = console.height - 1
    for panel in [_panel(follower) for follower in followers]:
        left -= len(console.render_lines(panel))
        if left >= 0 or not shown:
            shown.append(panel)
        else:
            break
    hidden = len(followers) - len(shown)
    more = f"{hidden} more do not fit here: make the terminal higher, or watch fewer"
    return Group(*shown, *([Text(more)] if hidden else []))


def frame(followers: Sequence[Follower]) -> RenderableType:
    """The current panels of all runs."""
    return Group(*(_panel(follower) for follower in followers))


def _panel(follower: Follower) -> Panel:
    follower.look()
    title = Text(f"{follower.stage} in {follower.run}")
    if follower.gone:
        return Panel(Text("the folder is gone: deleted or moved"), title=title)
    row = follower.last
    if not row:
        bad = f"; {passed_over(follower.passed_over)}" if follower.passed_over else ""
        return Panel(Text(f"no step is logged yet{bad}"), title=title)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, content in _lines(follower, row):
        table.add_row(name, Text(content) if isinstance(content, str) else content)
    return Panel(table, title=title)


def _lines(follower: Follower, row: dict[str, Any]) -> list[tuple[str, str | Text]]:
    lines: list[tuple[str, str | Text]] = [
        ("step", _progress(follower, row)),
        ("loss", f"{spark(follower.losses, _SPARK)}  {_number(row.get('loss'))}"),
        ("speed", _speed(row)),
    ]
    if follower.validation:
        skipped = ("step", "split")
        figures = {k: v for k, v in follower.validation.items() if k not in skipped}
        text = ", ".join(f"{name} {_number(value)}" for name, value in figures.items())
        lines.append(("validation", f"at {follower.validation['step']}: {text}"))
    if "time" in row:
        lines.append(("time", _bars(row)))
    lines.append(("loader", _waits(row)))
    lines.append(("memory", _memory(row)))
    lines.append(("update", _update(row)))
    if beats := beats_of(follower.run):
        lines.append(("ranks", _beats(beats)))
    if follower.passed_over:
        lines.append(("rows", passed_over(follower.passed_over)))
    return lines


def _progress(follower: Follower, row: dict[str, Any]) -> str:
    step, total = row["step"], follower.steps
    done = f"{step}/{total} ({step / max(total, 1):.0%}), epoch {row.get('epoch', 0)}"
    if follower.finished:
        return f"{done}, finished"
    seconds = follower.seconds_a_step
    quiet = follower.quiet
    late = f"; no row for {duration(quiet)}" if quiet > max(_QUIET, 20 * seconds) else ""
    return f"{done}, {duration(max(total - step, 0) * seconds)} left{late}"


def _speed(row: dict[str, Any]) -> str:
    parts = []
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "seconds" in row:
        parts.append(f"{row['seconds']:.3g} s a step")
    if "mfu" in row:
        parts.append(f"{row['model_tflops']:.3g} TFLOP/s, MFU {row['mfu']:.1%}")
    text = ", ".join(parts) or "not noted"
    if row.get("slowest_ratio", 0) > _SLOW:
        text += f"; rank {row['slowest_rank']} takes {row['slowest_ratio']:.2f}x its peers' time"
    return text


def _bars(row: dict[str, Any]) -> Text:
    times = row["time"]
    whole = max(sum(times.values()), 1e-9)
    text = Text()
    for name in sorted(CATEGORIES, key=lambda name: -times.get(name, 0)):
        share = times.get(name, 0) / whole
        if share >= 0.001:
            bar = "█" * max(1, round(share * _BAR))
            text.append(f"{name:<10} {share:>6.1%} {1000 * times[name]:>9.1f} ms {bar}\n")
    text.rstrip()
    return text


def _waits(row: dict[str, Any]) -> str:
    share, seconds = row.get("data_wait_fraction", 0), row.get("data_wait_seconds", 0)
    return f"waited for records {share:.2%} of the time, {1000 * seconds:.2f} ms in the last step"


def _memory(row: dict[str, Any]) -> str:
    parts = [
        f"{label} {row[name] / 2**30:.2f} GiB"
        for name, label in (
            ("memory_bytes", "process"),
            ("memory_peak_bytes", "at most"),
            ("cuda_bytes", "GPU"),
            ("cuda_peak_bytes", "GPU at most"),
        )
        if name in row
    ]
    return f"{', '.join(parts)} (largest rank)" if parts else "not noted"


def _update(row: dict[str, Any]) -> str:
    parts = [f"gradient norm {_number(row.get('grad_norm'))}", f"lr {_number(row.get('lr'))}"]
    if raw := row.get("compress_raw_bytes"):
        parts.append(f"compressed {raw / max(row['compress_sent_bytes'], 1):.1f}x")
    parts += [f"{name} {_number(row[name])}" for name in row if name.startswith("scale_")]
    if row.get("skipped"):
        parts.append(f"SKIPPED: {row['skipped']}")
    return ", ".join(parts)


def _beats(beats: Sequence[Beat]) -> Text:
    now = time.monotonic()
    text = Text()
    for beat in sorted(beats, key=lambda beat: beat.time)[:_MOST_BEATS]:
        text.append(f"{beat.rank:>4}: {beat.doing}, {now - beat.time:.1f} s ago\n")
    text.rstrip()
    return text


def spark(given: Iterable[float], width: int) -> str:
    """A line of blocks: means over equal parts, from the lowest to the highest of them."""
    values = list(given)
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / max(high - low, 1e-12)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in means)


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
