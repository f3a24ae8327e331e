"""`tapir job`: what it records, and the exit codes it makes of its command's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import cli.cluster
from cluster.chain import read_marker
from cluster.job_runner import JobSettings, run_job
from core.errors import (
    CheckpointError,
    ConfigError,
    CorruptError,
    InputError,
    Preempted,
    RankError,
    TapirError,
    TrainingError,
)
from core.files.reason import REASON_FILE, leave_reason, read_reason


def job(folder: Path, script: str, **settings: Any) -> int:
    """Run a line of Python as a job that leaves restarts to its caller."""
    given = {"again": "no", **settings}
    command = [sys.executable, "-c", script]
    return run_job(JobSettings(name="stage", out=folder, **given), command)


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "jobs" / "stage.starts").read_text()))


def test_a_start_is_recorded_before_its_command_runs(tmp_path: Path) -> None:
    script = "import json; body = json.load(open(FILE)); raise SystemExit(len(body['starts']) - 1)"
    script = script.replace("FILE", repr(str(tmp_path / "jobs" / "stage.starts")))
    assert job(tmp_path, script, marker="stage.json") == 0
    assert read_marker(str(tmp_path / "markers"), "stage.json")["starts"] == 1
    assert not (tmp_path / "jobs" / "stage.starts").exists()


def test_of_several_pods_the_first_writes_the_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tmp_path / "markers"
    for pod, marker in (("1", "stage.json"), ("1", "stage-{worker}.json"), ("0", "stage.json")):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", pod)
        assert job(tmp_path, "", marker=marker) == 0
        written = sorted(path.name for path in names.glob("*.json"))
        if pod == "0":
            assert written == ["stage-1.json", "stage.json"]
        else:
            assert written == ([] if marker == "stage.json" else ["stage-1.json"])
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert job(tmp_path, "raise SystemExit(1)", marker="stage.json") == 0, "it has ended well"


@pytest.mark.parametrize("code", [1, 3, 137])
def test_the_fourth_failure_gives_up(tmp_path: Path, code: int) -> None:
    script = f"raise SystemExit({code})"
    assert [job(tmp_path, script) for _ in range(5)] == [code, code, code, 70, code]
    rows = record(tmp_path)["starts"]
    assert [(row["attempt"], row["code"]) for row in rows] == [(5, code)], "by hand: a new count"


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    assert [job(tmp_path, "raise SystemExit(75)", retries=0) for _ in range(3)] == [75] * 3
    assert [row["code"] for row in record(tmp_path)["starts"]] == [75] * 3


def test_wrong_input_ends_a_job_without_another_start(tmp_path: Path) -> None:
    assert job(tmp_path, "raise SystemExit(2)", again="here") == 2
    assert len(record(tmp_path)["starts"]) == 1


@pytest.mark.parametrize("code", [2, 70])
def test_after_a_final_error_the_failures_count_anew(tmp_path: Path, code: int) -> None:
    """Somebody has mended the cause: it is none of the forgiven failures of the next starts."""
    codes = [code, code, code, 1, 1, 1, 1, 1]
    ended = [job(tmp_path, f"raise SystemExit({each})") for each in codes]
    assert ended == [code, code, code, 1, 1, 1, 70, 1]


def test_a_command_that_cannot_start_has_an_end_on_record(tmp_path: Path) -> None:
    settings = JobSettings(name="stage", out=tmp_path, again="no")
    assert run_job(settings, [str(tmp_path / "absent")]) == 2
    (start,) = record(tmp_path)["starts"]
    assert start["code"] == 2 and "absent: No such file or directory" in start["reason"]


def test_a_damaged_marker_ends_a_job_for_good(tmp_path: Path) -> None:
    """With exit code 1 Kubernetes would start it again without an end."""
    (tmp_path / "markers").mkdir()
    (tmp_path / "markers" / "x.json").write_text("{}")
    with pytest.raises(CorruptError, match="delete it to run the stage again") as error:
        cli.cluster.job(["--name=x", f"--out={tmp_path}", "--marker=x.json", "--", "true"])
    assert error.value.exit_code == 70


def test_a_job_starts_again_here_until_it_gives_up(tmp_path: Path) -> None:
    script = f"open({str(tmp_path)!r} + '/runs', 'a').write('x'); raise SystemExit(1)"
    assert job(tmp_path, script, again="here") == 70
    assert (tmp_path / "runs").read_text() == "xxxx"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("TapirError('x')", 1),
        ("InputError('x')", 2),
        ("Preempted('x')", 75),
        ("TrainingError('x')", 70),
        ("CorruptError('x')", 70),
        ("ValueError('x')", 1),
    ],
)
def test_what_a_launcher_hides_is_read_from_the_reason(
    tmp_path: Path, error: str, code: int
) -> None:
    """A second rank fails because of the first: only the first one's reason counts."""
    script = "from core.errors import *; from core.files.reason import leave_reason\n"
    script += f"leave_reason({error}); leave_reason(TapirError('y')); raise SystemExit(1)"
    assert job(tmp_path, script) == code
    (start,) = record(tmp_path)["starts"]
    assert start["code"] == code and start["reason"].endswith("x")


def test_a_reason_of_a_command_that_succeeds_in_the_end_is_none(tmp_path: Path) -> None:
    script = "from core.errors import *; from core.files.reason import leave_reason\n"
    assert job(tmp_path, script + "leave_reason(TrainingError('x'))") == 0


def test_a_reason_is_left_once_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reason"
    leave_reason(TapirError("nobody asks"))
    monkeypatch.setenv(REASON_FILE, str(path))
    assert read_reason(path) is None
    leave_reason(KeyError("a" * 5000))
    reason = read_reason(path)
    assert reason is not None and reason.text.startswith("KeyError: 'aaa")
    assert len(reason.text) == 2000 and reason.code == 1 and reason.retry
    path.write_text('{"text": "cut')
    assert read_reason(path) is None
    monkeypatch.setenv(REASON_FILE, str(tmp_path / "none" / "reason"))
    leave_reason(TapirError("no folder"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError(), 70),
        (CorruptError(), 70),
        (CheckpointError(), 70),
        (RankError(), 1),
        (TapirError(), 1),
        (InputError(), 2),
        (Preempted(), 75),
    ],
)
def test_a_training_gives_up_what_no_start_mends(error: TapirError, code: int) -> None:
    error.give_up()
    assert error.exit_code == code


def test_pods_of_one_job_have_records_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert job(tmp_path, "raise SystemExit(1)") == 1
    given = JobSettings(name="worker-{worker}", out=tmp_path, again="no")
    assert run_job(given, [sys.executable, "-c", "raise SystemExit(1)"]) == 1
    names = sorted(path.name for path in (tmp_path / "jobs").glob("*.starts"))
    assert names == ["stage-3.starts", "worker-3.starts"]


@pytest.mark.parametrize("settings", [{"retries": -1}, {"stall_hours": 0.0}])
def test_limits_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must not be negative, and --stall-hours must be"):
        job(tmp_path, "", **settings)


@pytest.mark.parametrize("settings", [{"again": "slurm"}, {"nodes": 2}])
def test_what_needs_slurm_is_refused_outside_of_it(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="SLURM_JOB_ID is not set"):
        run_job(JobSettings(name="x", out=tmp_path, **settings), ["true"])


def test_a_reason_of_an_earlier_start_decides_nothing(tmp_path: Path) -> None:
    script = "from core.errors import *; from core.files.reason import leave_reason\n"
    assert job(tmp_path, script + "leave_reason(TrainingError('x'))\nraise SystemExit(1)") == 70
    assert job(tmp_path, "raise SystemExit(3)") == 3


def test_the_error_of_a_start_that_left_no_end_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four lost nodes: the fifth start gives up before its command, by what a rank left."""
    rows = [{"attempt": i, "time": 100.0 * i, "progress": 0} for i in range(1, 5)]
    (tmp_path / "jobs").mkdir()
    body = json.dumps({"starts": rows, "gave_up": False})
    (tmp_path / "jobs" / "stage.starts").write_text(body)
    left = {"text": "rank 3: no space", "code": 1, "retry": True}
    (tmp_path / "jobs" / "stage.reason").write_text(json.dumps(left))
    assert job(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')") == 70
    assert not (tmp_path / "ran").exists()
    text = caplog.records[-1].getMessage()
    assert text.startswith("job stage gives up: 4 failures since ")
    assert "; last error: rank 3: no space (retries, now 3, in the run file or as a" in text
    assert text.endswith(". Mend the cause, then: start it again")
