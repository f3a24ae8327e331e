"""`python -m bench NAME [--json]`: run one benchmark and print its rows."""

import argparse
import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from bench.support.sizes import TINY

_RUNS = re.compile(r"^def run\(|^from bench\.\S+ import run$", re.MULTILINE)
_OWN = {
    "compression": ("payloads", "steps", "seeds"),
    "dedup": ("rows",),
    "gpu": ("device", "out", "only", "budget"),
    "pictures": ("step_ms",),
    "start_up": ("ranks",),
    "token_finish": ("shards", "s3"),
    "tokenizers": ("folders", "data", "inception"),
}
"""Benchmark -> the flags that it alone has."""


def names() -> list[str]:
    """The benchmarks: modules of this folder with a function `run`."""
    files = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*/__init__.py")]
    modules = [path.parent.name if path.stem == "__init__" else path.stem for path in files]
    return sorted(
        name
        for name, path in zip(modules, files, strict=True)
        if path != Path(__file__) and _RUNS.search(path.read_text())
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("name", choices=names(), help="which benchmark")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="run in miniature to see that it works; figures mean nothing",
    )
    gpu = parser.add_argument_group("of gpu alone")
    gpu.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a dry run (cuda)")
    gpu.add_argument("--out", help="folder of the rows ($OUT, else runs/gpu)")
    gpu.add_argument("--only", help="names of sections, with commas between them")
    gpu.add_argument("--budget", type=float, help="seconds of all sections together (420)")
    compression = parser.add_argument_group("of compression alone")
    compression.add_argument(
        "--payloads", action="store_true", default=None, help="16-bit and fp32 factors alone"
    )
    compression.add_argument("--steps", type=int, help="steps of each run (1000)")
    compression.add_argument("--seeds", type=int, help="runs of each variant (3)")
    dedup = parser.add_argument_group("of dedup alone")
    dedup.add_argument("--rows", type=int, help="rows of the catalogue (250000000)")
    finish = parser.add_argument_group("of token_finish alone")
    finish.add_argument("--shards", type=int, help="shards of the job (125000)")
    finish.add_argument("--s3", action="store_true", default=None, help="in a SeaweedFS (2000)")
    pictures = parser.add_argument_group("of pictures alone")
    pictures.add_argument("--step-ms", type=float, help="length of a step (50)")
    start_up = parser.add_argument_group("of start_up alone")
    start_up.add_argument("--ranks", type=int, help="a larger world to predict, e.g. 256 (none)")
    tokenizers = parser.add_argument_group("of tokenizers alone")
    tokenizers.add_argument("--folders", help="finished tokenizers, with commas (trains three)")
    tokenizers.add_argument("--data", help="a packed set (shapes and emoji, packed here)")
    tokenizers.add_argument("--inception", help="Inception's weights (a proxy's features)")
    return parser


def main() -> None:
    parser = _parser()
    chosen = parser.parse_args()
    flags: dict[str, Any] = {}
    for bench, own in _OWN.items():
        given = {n: v for n in own if (v := getattr(chosen, n)) is not None}
        if given and chosen.name != bench:
            texts = ", ".join(f"--{n.replace('_', '-')}" for n in given)
            parser.error(f"{texts} belong to {bench}")
        flags |= given
    if chosen.tiny:
        os.environ[TINY] = "1"
    if chosen.name == "gpu":
        flags["tiny"] = chosen.tiny
    rows = importlib.import_module(f"bench.{chosen.name}").run(**flags)
    for row in rows:
        low, high = row["spread"]
        print(
            f"{row['name']:<40} {row['value']:>10.4g} {row['unit']}  "
            f"{row['ratio']:.2f}x of {row['baseline']} [{low:.2f}, {high:.2f}]",
            file=sys.stderr,
        )
    if chosen.json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine()}
        print(json.dumps({"bench": chosen.name, "rows": rows, "machine": machine}))


if __name__ == "__main__":
    main()
