"""Worlds of real processes for tests: the project's own launcher, which reports every failure."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

from cluster.launcher import launch
from parallel.engines.registry import ENGINES, modules_of
from tests.warm import Warm
from training.launch import PRELOAD

ROOT = Path(__file__).parents[1]
DEVELOPERS = "needs what `make test` installs: requirements-dev.txt"
EVERYTHING = [
    *PRELOAD,
    *(m for name in ENGINES for m in modules_of(name, True)),
    *("bench.parity", "vector_quantize_pytorch"),
]
"""What ranks of any test import, but for the test's own modules."""
TAPIR = [sys.executable, "-P", "-m", "tapir"]
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""Where children find this tree, and what was installed beside this Python."""
LONGEST = 1800.0
"""Seconds of one command."""
READ_LATE = ("AWS_", "WORLD_SIZE", "RANK", "MASTER_")
"""Variables that are read when a verb runs; others may be read by an import."""
COLD = 2
"""Commands of a session before a process is made warm for the others (tests/warm.py)."""
_cold = 0 if "TAPIR_COLD" not in os.environ else -(10**9)
os.environ["PYTHONPATH"] = PATH  # a forkserver does not import from the current folder
PATIENCE = 900.0
"""Seconds that a test waits for what should take a few; other workers may keep all cores busy."""
_STARTED: list["subprocess.Popen[bytes]"] = []
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


def run_world(target: str, payload: dict[str, Any], ranks: int) -> list[Any]:
    """Run `module:function` on some ranks; each may write result-RANK.json into payload['out'].

    Raises: RankError if any rank fails.
    """
    launch(target, json.dumps(payload), ranks, PRELOAD)
    paths = [Path(payload["out"], f"result-{rank}.json") for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def tapir(*arguments: str, code: int = 0, cwd: Path | None = None, **extra: str) -> str:
    """Run the command line; returns its output, checks its exit code.

    The first commands of a session, and those with another folder or environment, are cold.
    """
    global _cold
    _cold += 1
    if _cold <= COLD or cwd or any(not name.startswith(READ_LATE) for name in extra):
        return cold_tapir(*arguments, code=code, cwd=cwd, **extra)
    ended, text = _warm().run(arguments, {**ENVIRONMENT, **extra}, LONGEST)
    assert ended == code, f"exit {ended}, not {code}:\n{text[-4000:]}"
    return text


@cache
def _warm() -> Warm:
    return Warm(EVERYTHING, ENVIRONMENT)


def cold_tapir(*arguments: str, code: int = 0, cwd: Path | None = None, **extra: str) -> str:
    """Run the command line as a user does; returns its output, checks its exit code."""
    done = subprocess.run(
        [*TAPIR, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**ENVIRONMENT, **extra},
        timeout=LONGEST,
    )
    text = done.stdout + done.stderr
    assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{text[-4000:]}"
    return text


def json_of(*arguments: str, **extra: str) -> Any:
    """The JSON object that a command prints with --json."""
    lines = tapir(*arguments, "--json", **extra).splitlines()
    return json.loads(next(line for line in lines if line.startswith("{")))


def start_tapir(*arguments: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start the command line in the background, in a session of its own, for this test alone."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*TAPIR, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
    _STARTED.append(process)
    return process


def end_started() -> None:
    """Kill the processes of `start_tapir` and their sessions."""
    while _STARTED:
        process = _STARTED.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def heed_interrupts() -> None:
    """Restore SIGINT in a child: a shell's background job inherits it as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_with(text: str) -> list[int]:
    """PIDs of living processes whose command line or environment holds a text."""
    pids = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if text in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            pids.append(process.info["pid"])
    return pids


def rows_of(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """Metrics rows of one split."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if (row.get("split") or "train") == split]


def installed(package: str) -> bool:
    """Say whether a package is installed beside this Python."""
    return any(distribution.name == package for distribution in distributions())
