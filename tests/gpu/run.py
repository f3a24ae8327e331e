"""All checks on one GPU in one command: tests/gpu, then `python -m bench gpu`.

For a bare machine: needs only this tree and the standard library, no network, no make. Runs with
the Python of .venv if there is one, else with this one and the wheels of .whl
(tests/gpu/wheels.py). Results go to $OUT, else to runs/gpu; a table comes last. Ends with 1 if a
test failed or a figure missed its target, with 2 if another run is at work there, or a GPU or
pytest is missing.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # python -P leaves it out

from cluster.processes import die_with_parent  # noqa: E402

SHARE = 0.5
"""Of the time that the tests may take; the benchmark gets what they leave."""
LAST = 10.0
"""Seconds that are kept for the table."""
MESHES = "test_meshes_on_gpu.py"
_STARTED: "list[subprocess.Popen[bytes]]" = []
_ENDING = {signal.SIGINT, signal.SIGTERM}
NO_GPU = """
import sys, torch
if not torch.cuda.is_available():
    what = f"no GPU can be used here (torch {torch.__version__}); see nvidia-smi"
    sys.exit(print(what + "; a dry run: make gpu DEVICE=cpu TINY=1", file=sys.stderr) or 2)
"""
PYTEST = ".venv/bin/pip install -r requirements-dev.txt -c constraints/gpu.txt"


def main() -> int:
    """Run all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a dry run")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all of it together (8)")
    flags = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is at work in {out}: wait, or set OUT", file=sys.stderr)
            return 2
        try:
            return _run(flags, out)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        finally:
            for process in _STARTED:
                if process.poll() is None:
                    _kill(process)


def _run(flags: argparse.Namespace, out: Path) -> int:
    until = time.monotonic() + 60 * flags.minutes - LAST
    for old in out.glob("*gpu*.*"):
        old.unlink()
    environment = {**os.environ, "TAPIR_GPU_TESTS_DEVICE": flags.device}
    if flags.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    python = _python(environment)
    if subprocess.run([python, "-c", "import pytest"], env=environment, cwd=out).returncode:
        print(f"{python} has no pytest; with a network: {PYTEST}", file=sys.stderr)
        return 2
    looks = [python, "-c", NO_GPU]
    if flags.device == "cuda" and subprocess.run(looks, env=environment, cwd=out).returncode:
        return 2
    _tests(python, environment, out, time.monotonic() + SHARE * (until - time.monotonic()))
    bench = [python, "-m", "bench", "gpu", "--json", f"--device={flags.device}", f"--out={out}"]
    left = until - time.monotonic()
    bench += [f"--budget={left:.0f}", *(["--tiny"] if flags.tiny else [])]
    _end([_start(bench, environment, out / "bench-gpu.log")], until + LAST / 2)
    text, failed = table(out)
    (out / "table-gpu.md").write_text(text)
    print(text)
    return 1 if failed else 0


def _python(environment: dict[str, str]) -> str:
    """The Python to run with; without a .venv, the wheels are put on its path."""
    own = ROOT / ".venv" / "bin" / "python"
    paths = [str(ROOT)]
    if not own.exists() and any((ROOT / ".whl").glob("*.whl")):
        site = ROOT / ".site"
        install = [sys.executable, "-P", str(Path(__file__).with_name("wheels.py")), "install"]
        subprocess.run([*install, str(site)], check=True)
        paths.append(str(site))
    environment["PYTHONPATH"] = os.pathsep.join(
        [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return str(own) if own.exists() else sys.executable


def _tests(python: str, environment: dict[str, str], out: Path, until: float) -> None:
    """Run tests of worlds beside those of one process, so that no core idles."""
    tests = [python, "-m", "pytest", "-m", "big or not big", "-p", "no:cacheprovider"]
    folder, running = "tests/gpu", []
    for name, chosen in (
        ("tests-gpu-ranks", [f"{folder}/{MESHES}"]),
        ("tests-gpu", [folder, f"--ignore={folder}/{MESHES}"]),
    ):
        command = [*tests, *chosen, f"--junitxml={out / name}.xml"]
        running.append(_start(command, environment, out / f"{name}.log"))
    _end(running, until)


def _start(command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a process in its own session; no signal ends this one before the child is recorded."""
    print(f"{log.name}: {' '.join(command)}", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_before_it_runs,
            )
        _STARTED.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    return process


def _before_it_runs() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    die_with_parent()


def _end(running: "list[subprocess.Popen[bytes]]", until: float) -> None:
    """Wait for processes; those that exceed the time are killed with their children."""
    for process in running:
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            print(f"out of time: {' '.join(process.args[:6])} ...", flush=True)  # type: ignore[index]
            _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(out: Path) -> tuple[str, list[str]]:
    """Results as a Markdown table, and the names of failures."""
    lines, failed = ["| what | figure | target | |", "|---|---|---|---|"], []
    for name in ("tests-gpu", "tests-gpu-ranks"):
        counted, bad = _counted(out / f"{name}.xml")
        lines.append(f"| {name} | {counted} | all pass | {'FAIL' if bad else 'pass'} |")
        failed += bad
    rows = _rows(out / "bench-gpu.jsonl")
    if not rows:
        failed.append("bench gpu left no row")
    for row in rows:
        name = f"{row['section']}: {row['name']}"
        verdict = {True: "pass", False: "FAIL", None: ""}[row["passed"]]
        figure = f"{row['value']:.4g} {row['unit']}".strip() if row["value"] else "0"
        beside = row["baseline"].replace(f", target {row['target']}", "")
        figure = beside if row.get("absent") or (row["ratio"] == 0 and not row["value"]) else figure
        note = f" ({beside})" if beside not in (figure, f"target {row['target']}", "") else ""
        lines.append(f"| {name} | {figure}{note} | {row['target']} | {verdict} |")
        failed += [name] if row["passed"] is False else []
    lines += ["", f"{len(rows)} figures, {len(failed)} failed{''.join(f'; {n}' for n in failed)}"]
    return "\n".join(lines) + "\n", failed


def _counted(report: Path) -> tuple[str, list[str]]:
    """Number of passed tests with their largest figures; names of failed tests."""
    if not report.exists():
        return "left no report: see its log", [report.stem]
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    text = f"{len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped"
    measured: dict[str, float] = {}
    for one in ElementTree.parse(report).iter("property"):
        name = one.get("name", "")
        measured[name] = max(measured.get(name, 0.0), float(one.get("value", "nan")))
    text += "".join(f"; largest {name} {value:.2g}" for name, value in measured.items())
    return text, bad or ([] if cases else [report.stem])


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


if __name__ == "__main__":
    sys.exit(main())
