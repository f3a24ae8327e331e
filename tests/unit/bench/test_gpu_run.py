"""`make gpu`: a section that fails loses only its own figures, and the table names it."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import parent
from bench.gpu.report import GpuReport, Target
from tests.gpu.run import table
from tests.harness import ENVIRONMENT, ROOT, heed_interrupts, processes_with

JUNIT = """<testsuites><testsuite><testcase classname="a" name="b"/>{}</testsuite></testsuites>"""
HERE = "tests.unit.bench.test_gpu_run"


def fine(report: GpuReport) -> None:
    report.row("one", 2.0, "s", Target(most=3.0))


def missed(report: GpuReport) -> None:
    report.row("two", math.nan, "x", Target(least=1.0))


def fails(_: GpuReport) -> None:
    raise RuntimeError("planted")


def dies(_: GpuReport) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(_: GpuReport) -> None:
    signal.pause()


@pytest.mark.world
def test_a_section_that_ends_early_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("missed", "dies", "hangs", "fails", "fine")
    seconds = {"hangs": 0.1}
    sections = {name: (f"{HERE}:{name}", seconds.get(name, 60.0)) for name in names}
    monkeypatch.setattr(parent, "SECTIONS", sections)
    rows = parent.run(device="cpu", tiny=True, out=str(tmp_path))
    kept = [json.loads(line) for line in (tmp_path / "bench-gpu.jsonl").read_text().splitlines()]
    assert [row["name"] for row in kept] == [row["name"] for row in rows]
    judged = [(r["section"], r["passed"], r["baseline"]) for r in rows if r["passed"] is not None]
    assert judged == [
        ("missed", False, "target >= 1"),
        ("dies", False, "its process ended with -9"),
        ("hangs", False, "took too long and was ended"),
        ("fails", False, "RuntimeError: planted"),
        ("fine", True, "target <= 3"),
    ]


def test_sections_without_time_left_count_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "SECTIONS", {"fine": (f"{HERE}:fine", 60.0)})
    rows = parent.run(device="cpu", tiny=True, out=str(tmp_path), budget=0)
    assert [(row["passed"], row["baseline"]) for row in rows] == [
        (False, "not run: the time was over")
    ]


def test_the_table_tells_what_failed_and_what_was_not_run(tmp_path: Path) -> None:
    bad = """<testcase name="c"><failure/><properties><property name="error" value="0.5"/>
    <property name="error" value="0.25"/></properties></testcase>"""
    (tmp_path / "tests-gpu.xml").write_text(JUNIT.format(bad))
    row = {"section": "s", "unit": "s", "baseline": "", "ratio": 1.0, "target": "<= 3"}
    absent = {"name": "peer", "value": 0.0, "passed": None, "absent": True, "baseline": "not run"}
    rows = [{**row, "name": "one", "value": 2.0, "passed": True}, {**row, **absent}]
    rows.append({**row, "name": "two", "value": 4.0, "passed": False, "baseline": "beside"})
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "bench-gpu.jsonl").write_text("\n".join([*lines, '{"cut off']))
    text, failed = table(tmp_path)
    assert (
        "| tests-gpu | 1 passed, 1 failed, 0 skipped; largest error 0.5 | all pass | FAIL |" in text
    )
    assert "| tests-gpu-ranks | left no report: see its log | all pass | FAIL |" in text
    assert "| s: one | 2 s | <= 3 | pass |" in text
    assert "| s: two | 4 s (beside) | <= 3 | FAIL |" in text
    assert "| s: peer | not run |" in text
    assert failed == ["None::c", "tests-gpu-ranks", "s: two"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_run_works_in_a_folder_and_cleans_up(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(ROOT / "tests/gpu/run.py"), "--device=cpu", "--tiny"]
    environment = {**ENVIRONMENT, "OUT": str(tmp_path)}

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
        )

    first = start()
    while not processes_with(f"junitxml={tmp_path}"):
        assert first.poll() is None
    second = start()
    assert b"another run is at work" in second.communicate(timeout=60)[1] and second.returncode == 2
    first.send_signal(number)
    assert first.wait(60) == code and not processes_with(f"junitxml={tmp_path}")


@pytest.mark.seconds
def test_without_a_gpu_it_is_refused_at_once(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", str(ROOT / "tests" / "gpu" / "run.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "no GPU can be used here" in ended.stderr
    assert "make gpu DEVICE=cpu TINY=1" in ended.stderr
