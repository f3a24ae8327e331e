"""`tapir watch` follows metrics.jsonl while it grows, is truncated and restarts."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli.profile import watch
from core.errors import InputError
from core.files.atomic import write_atomic
from core.heartbeat import FOLDER, Heart
from tests.harness import tapir
from training.run.folder import beats_of, write_live
from training.run.tail import Follower, Tail
from workflow.watch import _fitting, _live, duration, frame, spark


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = {"stage": "prior", "loop": {"steps": 40}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def _row(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 4.0 - step / 20, "seconds": 0.5, **more}) + "\n"


def _shown(follower: Follower) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(frame([follower]))
    return console.export_text()


def test_a_line_waits_until_it_is_whole(run: Path) -> None:
    path = run / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.lines()) == []
    with open(path, "w") as file:
        for text, expected in (("one\ntw", ["one"]), ("o", []), ("\nthree\n", ["two", "three"])):
            file.write(text)
            file.flush()
            assert list(tail.lines()) == expected


def test_nothing_is_read_twice(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(_row(10))
    follower = Follower(run)
    follower.look()
    with open(path, "r+") as file:
        file.write(" " * 5)  # bytes already read are not read again
        file.seek(0, 2)
        file.write("no row\n" + _row(20) + '{"step": 3')
    follower.look()
    assert (follower.last["step"], list(follower.losses)) == (20, [3.5, 3.0])


@pytest.mark.parametrize("replaced", [True, False])
def test_a_run_that_begins_anew_is_read_anew(run: Path, replaced: bool) -> None:
    path = run / "metrics.jsonl"
    path.write_text(_row(10) + _row(20) + _row(30))
    follower = Follower(run)
    follower.look()
    if replaced:
        write_atomic(path, (_row(10) + _row(20) + _row(25) + _row(26)).encode())
    else:
        path.write_text(_row(26))
    follower.look()
    assert follower.last["step"] == 26
    assert list(follower.losses) == ([3.5, 3.0, 2.75, 2.7] if replaced else [2.7])


def test_a_frame_says_what_is_going_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = run / "beats"
    beats.mkdir()
    monkeypatch.setenv(FOLDER, str(beats))
    write_live(run)
    Heart(0).beat("all_reduce over data", 20)
    follower = Follower(run)
    assert "no step is logged yet" in _shown(follower)
    times = {"compute": 0.3, "data": 0.1}
    more = {"time": times, "mfu": 0.41, "model_tflops": 2.0, "skipped": "a spike"}
    row = _row(20, memory_bytes=2**30, compress_raw_bytes=80, compress_sent_bytes=10, **more)
    (run / "metrics.jsonl").write_text(row + _row(20, split="validation"))
    text = _shown(follower)
    for part in ("20/40 (50%)", "8 s left", "MFU 41.0%", "compressed 8.0x", "SKIPPED: a spike"):
        assert part in text
    for part in ("process 1.00 GiB", "0: all_reduce over data", "validation  at 20: loss 3"):
        assert part in text
    assert "compute     75.0%     300.0 ms " + 22 * "█" + " " in text
    assert not follower.finished
    monkeypatch.setenv(FOLDER, "")
    write_live(run)
    assert beats_of(run) == []


@pytest.mark.parametrize(
    "odd",
    [
        '{"step": Infinity}',
        '{"step": 1e400}',
        '{"step": "41"}',
        '{"step": %s}' % ("9" * 400),
        '{"step": 41, "time": []}',
        '{"step": 41, "time": null}',
        '{"step": 41, "time": {"compute": "a"}}',
        '{"step": 41, "seconds": null}',
        '{"step": 41, "tokens_per_second": "fast"}',
        '{"step": 41, "mfu": 0.5}',
        '{"step": 41, "slowest_ratio": 2.0}',
        '{"step": 41, "compress_raw_bytes": 80}',
        "[" * 100_000,
        "null",
    ],
)
def test_an_odd_row_is_passed_over(odd: str, run: Path) -> None:
    (run / "metrics.jsonl").write_text(_row(20) + odd + "\n" + _row(30))
    text = _shown(Follower(run))
    assert "30/40" in text and "1 line of metrics.jsonl cannot be read" in text
    (run / "metrics.jsonl").write_text(odd + "\n")
    assert "no step is logged yet; 1 line" in _shown(Follower(run))


def test_what_a_row_says_is_no_markup(run: Path) -> None:
    named = run.rename(run.with_name("run[red]:smiley:"))
    (named / "metrics.jsonl").write_text(
        _row(20, skipped="[/x] :smiley:", loss=1e308)
        + _row(30, skipped="[/x] :smiley:")
        + _row(30, split="validation", figure="[/y]")
        + '{"step": 31}\n'
    )
    follower = Follower(named)
    text = _shown(follower)
    assert "run[red]:smiley:" in text and "figure [/y]" in text and "not noted" in text
    (named / "metrics.jsonl").write_text(_row(30, skipped="[/x] :smiley:"))
    assert "SKIPPED: [/x] :smiley:" in _shown(follower)


def test_a_folder_that_goes_ends_the_watch(run: Path) -> None:
    (run / "metrics.jsonl").write_text(_row(20))
    follower = Follower(run)
    assert "20/40" in _shown(follower) and not follower.gone
    run.rename(run.with_name("moved"))
    assert follower.gone and "the folder is gone" in _shown(follower)
    _live([follower], 1e-3)  # ends by itself


def test_a_small_terminal_says_what_it_hides(run: Path) -> None:
    console = Console(width=100, height=9, file=io.StringIO(), record=True)
    console.print(_fitting([Follower(run) for _ in range(4)], console))
    text = console.export_text()
    assert text.count("no step is logged yet") == 2 and "2 more do not fit here" in text


@pytest.mark.parametrize("interval", ["inf", "1e10", "nan", "0", "-1"])
def test_intervals_that_cannot_be_slept_are_refused(interval: str, run: Path) -> None:
    with pytest.raises(InputError, match="at most 3600 s"):
        watch([str(run), f"--interval={interval}"])


def test_encodings_without_blocks_get_plain_signs(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "metrics.jsonl").write_text(_row(10, time={"compute": 1.0}) + _row(20))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    watch([str(run)])
    sys.stdout.flush()
    text = written.getvalue().decode("latin-1")
    assert "20/40" in text and "#." in text


def test_a_finished_run_is_shown_and_ends(dvae: Path, tmp_path: Path) -> None:
    text = tapir("watch", str(dvae), str(dvae))
    assert text.count("6/6 (100%), epoch 0, finished") == 2
    assert "validation at 6" in " ".join(text.split()).replace("│ ", "")
    assert "is not a run folder" in tapir("watch", str(tmp_path), "--once", code=2)


def test_lines_and_durations_are_short() -> None:
    assert spark([1, 1, 2, 2, 3, 3], 3) == "▁▅█"
    assert spark([], 5) == "" and spark([7.0], 5) == "▁"
    assert [duration(s) for s in (59, 150, 7300, 200_000)] == ["59 s", "2.5 min", "2.0 h", "2.3 d"]
