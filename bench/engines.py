"""Tokens/s of the engines at 2 data-parallel ranks, against plain torch on one process.

Each round trains the tiny prior for some steps under every engine in turn, on the same tokens.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.support.rows import bench_row
from bench.support.sizes import sized
from bench.support.tokens import make_tokens, run_tapir

ROUNDS = sized(3, 1)
STEPS = sized(25, 2)
COUNTED = sized(15, 1)
ENGINES = {
    "reference, 1 process": ["--engine.name=reference", "--mesh.data=1"],
    "reference, 2 ranks": ["--engine.name=reference", "--mesh.data=2"],
    "deepspeed_zero, 2 ranks": ["--engine.name=deepspeed_zero", "--mesh.data=2"],
}


def run() -> list[dict[str, Any]]:
    """One row an engine; ratio > 1 means faster than the reference on one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = make_tokens(folder, sized(1500, 400), 4)
        rates: dict[str, list[float]] = {name: [] for name in ENGINES}
        for i in range(ROUNDS):
            for engine, flags in ENGINES.items():
                rates[engine].append(_rate(tokens, folder / f"{i}-{flags[0]}-{flags[1]}", flags))
    baseline = next(iter(ENGINES))
    rows = []
    for engine, values in rates.items():
        ratios = [value / base for value, base in zip(values, rates[baseline], strict=True)]
        rows.append(bench_row(engine, statistics.median(values), "tokens/s", baseline, ratios))
    return rows


def _rate(tokens: str, out: Path, flags: list[str]) -> float:
    length = [f"--loop.steps={STEPS}", "--loop.log-every=1", "--loop.validation-samples=16"]
    run_tapir("train", "prior", "tiny", f"--data={tokens}", f"--out={out}", *length, *flags)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train: list[float] = [row["tokens_per_second"] for row in rows if "split" not in row]
    return statistics.median(train[-COUNTED:])
