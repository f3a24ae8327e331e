"""All meshes of the parity benchmark, trained through the staging backend.

`python -m tests.meshes OUT KIND NAME...` trains the named cases in a separate process, whose
forkserver imports all engines before the first rank starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import parity
from bench.parity import CASES, ONE, Case
from cluster.processes import die_with_parent
from core.errors import TapirError
from tests.harness import ENVIRONMENT, ROOT
from tests.staging import carried, stage

Rows = list[dict[str, Any]]
STEPS = 6
CORES = 4
"""A world of 8 small ranks keeps about that many busy."""


def train_meshes(
    out: Path,
    kind: str,
    precisions: Sequence[str],
    more: Sequence[str] = (),
    cases: Sequence[Case] = CASES,
) -> dict[str, Rows]:
    """Rows by name of the cases in each precision, and of `more`, such as "TP2 pipe bf16".

    A case that failed has none, and is printed. Worlds run side by side where there are cores.
    """
    parts = max(1, (os.cpu_count() or 1) // CORES)
    environment = {**ENVIRONMENT, **({"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {})}
    ones = {f"{ONE.name} {name.split()[-1]}" for name in [*precisions, *more]}
    names = [f"{case.name} {precision}" for precision in precisions for case in cases]
    names = [*sorted(ones), *names, *more]
    command = [sys.executable, "-m", "tests.meshes", str(out), kind]
    running = [
        subprocess.Popen([*command, *names[part::parts]], cwd=ROOT, env=environment)
        for part in range(parts)
    ]
    for process in running:
        process.wait()
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def main(out: str, kind: str, *names: str) -> None:
    """Train cases, one world after another; each leaves NAME.json."""
    cases = {case.name: case for case in (ONE, *CASES)}
    for name in names:
        case, _, precision = name.rpartition(" ")
        chosen = replace(cases[case].precise(precision), steps=STEPS)
        try:
            rows = parity.train(chosen, f"tests.meshes:train_on_{kind}")
        except TapirError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        else:
            Path(out, f"{name}.json").write_text(json.dumps(rows))


def train_on_cpu(payload: str) -> None:
    """One rank with CPU tensors, staged like GPU tensors."""
    _train("cpu", payload)


def train_on_cuda(payload: str) -> None:
    """One rank of several that share the GPU."""
    _train("cuda", payload)


def _train(kind: str, payload: str) -> None:
    stage(kind)
    parity.train_rank(payload)
    world = int(os.environ["WORLD_SIZE"])
    assert world == 1 or carried.total() > 0, "its collectives went elsewhere"


if __name__ == "__main__":
    die_with_parent()
    main(*sys.argv[1:])
