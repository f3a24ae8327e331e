"""Starts the process that runs the sections; if it ends early, another runs the rest."""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from bench.gpu.report import failed_row
from bench.gpu.sections import SECTIONS
from bench.support.children import child_environment, module_command
from bench.support.rows import Row, bench_row

BUDGET = 420.0
"""Seconds of all sections together."""


def run(
    device: str = "cuda", tiny: bool = False, out: str = "", only: str = "", budget: float = BUDGET
) -> list[Row]:
    """Rows of all sections; each is also appended to OUT/bench-gpu.jsonl at once."""
    names = [name for name in SECTIONS if not only or name in only.split(",")]
    folder = Path(out or os.environ.get("OUT") or "runs/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    until, rows = time.monotonic() + budget, []
    with open(folder / "bench-gpu.jsonl", "w") as kept:
        for row in _all(device, tiny, names, until):
            rows.append(row)
            print(json.dumps(row), file=kept, flush=True)
    return rows


def _all(device: str, tiny: bool, names: list[str], until: float) -> Iterator[Row]:
    while names and time.monotonic() < until:
        done = yield from _process(device, tiny, names, until)
        names = names[done:]
    for name in names:
        yield failed_row(name, "the section", "not run: the time was over")


def _process(device: str, tiny: bool, names: list[str], until: float) -> Generator[Row, None, int]:
    """The rows of one process; returns how many sections have ended, failed ones included."""
    targets = [f"{name}={SECTIONS[name][0]}" for name in names]
    command = module_command("bench.gpu.child", device, "tiny" if tiny else "full", *targets)
    environment = child_environment()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    done, section, limit = 0, names[0], until
    try:
        while done < len(names):
            line = lines.get(timeout=max(min(limit, until) - time.monotonic(), 0))
            if not line:
                yield failed_row(section, "the section", f"its process ended with {child.wait()}")
                return done + 1
            row = json.loads(line)
            if "begin" in row:
                section = row["begin"]
                limit = time.monotonic() + _limit(section, device)
            elif "end" in row:
                done += 1
                yield _took(section, row["seconds"], device)
            else:
                yield row
    except queue.Empty:
        yield failed_row(section, "the section", "took too long and was ended")
        return done + 1
    finally:
        child.kill()
        child.wait()
    return done


def _read(child: "subprocess.Popen[str]", lines: "queue.Queue[str]") -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put("")


def _limit(section: str, device: str) -> float:
    """Seconds that a section may take; a dry run shares its cores with others."""
    return SECTIONS[section][1] * (1 if device == "cuda" else 3)


def _took(section: str, seconds: float, device: str) -> Row:
    limit = _limit(section, device)
    name, text = "the section took", f"limit {limit:g} s"
    row = bench_row(name, seconds, "s", text, [limit / max(seconds, 1e-9)])
    return {**failed_row(section, name, text), **row, "passed": None}
