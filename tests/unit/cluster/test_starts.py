"""The record of a job's starts, by tables worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

import cluster.starts
from checkpoint.reader import finished_steps
from cluster.starts import (
    Progress,
    Start,
    Starts,
    failed_starts,
    idle_seconds,
    read_attempts,
)
from core.storage.store import FolderStore


def starts(*rows: tuple[int, int | None]) -> list[Start]:
    """Starts by (progress before it, exit code)."""
    return [
        Start(attempt=i, time=100.0 * i, progress=progress, code=code)
        for i, (progress, code) in enumerate(rows, 1)
    ]


@pytest.mark.parametrize(
    ("rows", "now", "attempts"),
    [
        ([], 0, []),
        ([(0, 1)], 0, [1]),
        ([(0, 1)], 10, [1]),  # it made step 10, then failed: the first failure there
        ([(0, 1), (10, 1)], 10, [1, 2]),
        ([(0, 1), (10, 1)], 20, [2]),  # the second one got on to 20, which forgives the first
        ([(0, 1), (10, 1), (10, 1), (10, 1)], 10, [1, 2, 3, 4]),
        ([(0, 1), (0, 1), (0, 1), (0, 1)], 10, [4]),
        ([(0, 75), (10, 1), (10, 75), (10, 1)], 10, [2, 4]),  # who was asked to stop did not fail
        ([(0, None), (10, None), (10, 2)], 10, [1, 2, 3]),  # a dead node writes no end
        ([(0, 0)], 0, []),
    ],
)
def test_failures_since_the_newest_checkpoint(
    rows: list[tuple[int, int | None]], now: int, attempts: list[int]
) -> None:
    assert [start.attempt for start in failed_starts(starts(*rows), now)] == attempts


def test_only_starts_without_progress_are_idle() -> None:
    rows = [
        Start(attempt=1, time=0.0, progress=0, code=1, seconds=1000.0),
        Start(attempt=2, time=0.0, progress=10, code=75, seconds=20.0),
        Start(attempt=3, time=0.0, progress=10, code=1, seconds=3.0),
        Start(attempt=4, time=0.0, progress=10),
    ]
    assert idle_seconds(rows, 10) == 23.0 and idle_seconds(rows, 20) == 0.0


class Job:
    """A job whose starts come one by one; `save` writes a whole checkpoint."""

    def __init__(self, folder: Path, retries: int = 3, stall_hours: float = 24.0) -> None:
        self.store, self._limits = FolderStore(folder / "jobs"), (retries, stall_hours)
        self._progress = Progress(checkpoints=str(folder / "checkpoints"))
        self._checkpoints = FolderStore(folder / "checkpoints")
        self.last = self._next()

    def save(self, step: int, whole: bool = True) -> None:
        self._checkpoints.put(f"step-{step}/rank-00000.safetensors", b"state")
        if whole:
            self._checkpoints.put(f"step-{step}/manifest.json", b"{}")

    def begin(self, left: str = "") -> str:
        """A new process: it knows what is on record, and nothing else."""
        self.last = self._next()
        return self.last.begin(left)

    def record(self) -> dict[str, Any]:
        return dict(json.loads(self.store.get("prior.starts")))

    def _next(self) -> Starts:
        return Starts(self.store, "prior", self._progress, *self._limits)


def test_dead_nodes_are_forgiven_as_long_as_checkpoints_come(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for step in range(1, 21):
        assert job.begin() == ""
        job.save(step)
    assert job.begin() == "" and job.last.attempt == 21 == read_attempts(job.store, "prior")
    assert [row["attempt"] for row in job.record()["starts"]] == [20, 21]
    job.last.clear()
    assert read_attempts(job.store, "prior") == 0


def test_four_dead_nodes_at_one_step_are_the_end(tmp_path: Path) -> None:
    """Four starts died after step 10, the first of them made it; so the fifth start gives up."""
    job = Job(tmp_path)
    assert job.begin() == ""
    job.save(10)
    job.save(11, whole=False)
    assert [job.begin() for _ in range(3)] == ["", "", ""]
    why = job.begin("CUDA error: no device")
    assert why.startswith("4 failures after the checkpoint of step 10 since ")
    assert "last error: CUDA error: no device (retries, now 3, in the run file" in why
    assert job.record()["gave_up"] is True
    assert job.begin() == "" and job.last.attempt == 5, "somebody wants another try"
    assert [job.begin() for _ in range(3)] == ["", "", ""] and job.begin() != ""


def test_the_fourth_failure_ends_the_job_at_once_if_its_end_is_seen(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for _ in range(3):
        assert job.begin() == "" and job.last.end(1, "out of luck") == ""
    assert job.begin() == ""
    why = job.last.end(1, "a bad disk")
    assert why.startswith("4 failures before a checkpoint since ") and "error: a bad disk (" in why


def test_the_newest_of_four_failures_made_a_checkpoint(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for _ in range(3):
        assert job.begin() == "" and job.last.end(1) == ""
    assert job.begin() == ""
    job.save(5)
    assert job.last.end(1) == "", "it is the first failure after step 5"


def test_a_checkpoint_that_is_lost_is_no_progress_when_it_is_made_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.save(10)
    for _ in range(3):
        assert job.begin() == "" and job.last.end(1) == ""
    (tmp_path / "checkpoints" / "step-10" / "manifest.json").unlink()
    assert job.begin() == ""
    job.save(10)
    assert job.last.end(1).startswith("4 failures after the checkpoint of step 10 since ")


def test_stop_requests_are_no_failures_but_hours_without_progress_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start is asked to stop after 7 h: three are fewer than 24 h, four are not."""
    clock = [0.0]
    monkeypatch.setattr(cluster.starts.time, "monotonic", lambda: clock[0])
    job = Job(tmp_path, retries=0)
    for _ in range(4):
        assert job.begin() == ""
        clock[0] += 7 * 3600
        assert job.last.end(75) == ""
    why = job.begin()
    assert why.startswith("its starts ran 28.0 h before a checkpoint and came no further")
    assert "(stall_hours, now 24, in the run file" in why
    job = Job(tmp_path / "other", retries=0)
    for step in range(1, 9):
        assert job.begin() == ""
        clock[0] += 23 * 3600
        job.save(step)
        assert job.last.end(75) == ""
    assert job.begin() == ""


def test_without_retries_the_first_failure_is_the_end(tmp_path: Path) -> None:
    job = Job(tmp_path, retries=0)
    assert job.begin() == "" and job.last.end(1, "x").startswith("1 failure before a checkpoint")


def test_a_damaged_record_begins_a_new_count(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for text in (b"{", b"[]", b'{"starts": [{"attempt": 1}], "gave_up": false}', b'{"starts": []}'):
        job.store.put("prior.starts", text)
        assert job.begin() == "" and job.last.attempt == 1


def test_the_steps_are_those_of_the_checkpoint_format(tmp_path: Path) -> None:
    names = ["step-9/manifest.json", "step-30/manifest.json", "step-31/rank-00000.safetensors"]
    names += ["step-x/manifest.json", "step-40/old/manifest.json", "capsules/step-50/manifest.json"]
    store = FolderStore(tmp_path)
    for name in names:
        store.put(name, b"{}")
    assert Progress(checkpoints=str(tmp_path)).read() == 30 == finished_steps(store)[-1]


def test_a_data_job_counts_its_finished_files(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    names = ["request.json", "train/shard-000000.tar", "train/shard-000000.index.safetensors"]
    for name in [*names, "train/_leases/a", "train/_done/a.json"]:
        store.put(name, b"")
    progress = Progress(shards=str(tmp_path))
    assert progress.read() == 3 and progress.describe(3) == " after 3 finished files"
    for name, rows in (("0-aa.000000", 64), ("0-bb.000000", 3), ("10-cc.000000", 5)):
        content = json.dumps({"rows": {str(i): {} for i in range(rows)}})
        store.put(f"train/_ledger/{name}.json", content.encode())
    store.put("train/_ledger/0-dd.000000.json", b"damaged")
    counts = [Progress(shards=str(tmp_path), worker=number).read() for number in ("0", "1", "10")]
    assert counts == [67, 0, 5] and progress.read() == 3
    assert Progress(shards="x", worker="1").describe(4) == " after 4 tasks of its own"
    assert Progress().describe(0) == ""
    assert Progress().read() == 0 == Progress(shards=str(tmp_path / "none")).read()


def test_a_store_that_does_not_answer_is_no_progress_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    assert Progress(checkpoints="s3://bucket/run").read() == 0
