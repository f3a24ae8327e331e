"""The job core with a small job: kills, duplicates, repair, rejects, and what status tells."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from core.errors import CorruptError, InputError
from core.files.atomic import canonical_json
from core.keys import keyed_rng
from core.storage.store import FolderStore
from core.workers import JobWorker
from data_pipeline.jobs.finish import Finisher
from data_pipeline.jobs.leases import Pace
from data_pipeline.jobs.ledger import Record, finished_tasks
from data_pipeline.jobs.status import describe_status, job_status
from data_pipeline.jobs.worker import Job, Progress, Task, Work
from tests.harness import PATIENCE

TASKS = [Task(prefix="part/", name=f"{i:04x}", shown=f"shard {i}", size=i + 1) for i in range(16)]


class _Toy:
    """Squares numbers; its result lists the squares in the order of the tasks."""

    def __init__(self, folder: Path, number: int = 0, count: int = 1, seconds: float = 0.0) -> None:
        self.store, self._pause = FolderStore(folder), seconds
        member = JobWorker(number=number, count=count)
        self.job = Job(self.store, TASKS, member, 1.0)
        self.end: Finisher = self.job.finisher("part/", "result.json", self._write)

    def run(self, again: bool = False) -> int:
        self.job.announce("toy", [self.end])
        return self.job.run(Work(make=self._make), [self.end], again)

    def _make(self, task: Task, progress: Progress) -> Record:
        time.sleep(self._pause)
        square = str(int(task.name, 16) ** 2).encode()
        self.store.put(f"part/{task.name}.txt", square, if_absent=True)
        progress["pairs"] = task.size
        return {"pairs": task.size, "rejects": {"odd": 1} if task.size % 2 else {}}

    def _write(self) -> bool:
        records = dict(finished_tasks(self.store, "part/"))
        if records.keys() != {task.name for task in TASKS}:
            return False
        squares = [self.store.get(f"part/{task.name}.txt").decode() for task in TASKS]
        pairs = sum(records[task.name]["pairs"] for task in TASKS)
        self.store.put("result.json", canonical_json({"squares": squares, "pairs": pairs}))
        return True

    def check(self, task: Task, record: Record) -> None:
        if self.store.get(f"part/{task.name}.txt") != str(int(task.name, 16) ** 2).encode():
            raise CorruptError("another number")


def _objects(folder: Path) -> dict[str, bytes]:
    store = FolderStore(folder)
    return {name: store.get(name) for name in store.names()}


@pytest.mark.seconds
def test_killed_and_doubled_workers_leave_the_bytes_of_one(tmp_path: Path) -> None:
    assert _Toy(tmp_path / "one").run() == len(TASKS)
    context = multiprocessing.get_context("fork")

    def started(number: int) -> Any:
        run = _Toy(tmp_path / "many", number, 4, seconds=0.02).run
        process = context.Process(target=run, daemon=True)
        process.start()
        return process

    for turn in range(3):  # all four are killed, at another moment each time
        workers = [started(number) for number in range(4)]
        time.sleep(float(keyed_rng(turn, "kill").uniform(0.03, 0.1)))
        for worker in workers:
            worker.kill()  # one that has ended is not there
            worker.join()
    last = [started(number) for number in (0, 1, 1)]
    for worker in last:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in last] == [0, 0, 0]
    assert _objects(tmp_path / "many") == _objects(tmp_path / "one")
    assert not FolderStore(tmp_path / "many").names("part/_leases/")
    assert _Toy(tmp_path / "many", 3, 9).run() == 0


def test_a_damaged_task_is_made_again_and_the_result_written_anew(tmp_path: Path) -> None:
    toy = _Toy(tmp_path)
    toy.run()
    expected = _objects(tmp_path)
    toy.store.put("part/0003.txt", b"8")
    toy.store.put("result.json", b"{}")
    toy.job.repair(toy.check, lambda task: [f"part/{task.name}.txt"], [toy.end])
    assert not toy.store.exists("part/_done/0003.json") and not toy.end.finished()
    assert toy.run(again=True) == 1 and _objects(tmp_path) == expected


def test_a_worker_that_refuses_a_task_keeps_what_is_made(tmp_path: Path) -> None:
    toy = _Toy(tmp_path)

    def judge(task: Task, record: Record) -> None:
        if record["rejects"]:
            raise InputError(f"{task.shown} has rejects")

    with pytest.raises(InputError, match="shard 0 has rejects"):
        toy.job.run(Work(make=toy._make, judge=judge), [toy.end])
    assert toy.store.names("part/_done/") == ["part/_done/0000.json"]
    assert toy.store.names("part/_leases/") == []


def _leased(toy: _Toy, number: int, worked: tuple[int, float], task: str) -> None:
    """A lease of a worker that has made so many pairs in so many seconds, one of them now."""
    pace = Pace(pairs=worked[0] - 1, began=time.monotonic() - worked[1])
    toy.job._pace = pace
    toy.job._leases.clear()
    leases = toy.job.leases("part/")
    name = leases.claim(task)
    assert name is not None
    body = json.loads(toy.store.get(name))
    body |= {"worker": f"{number}/2", "progress": {"shard": "x", "of": 9, "pairs": 1}}
    body["worked"] = {"pairs": worked[0], "seconds": worked[1]}
    toy.store.put(name, canonical_json(body))


def test_status_adds_the_workers_pace_and_tells_what_is_left(tmp_path: Path) -> None:
    toy = _Toy(tmp_path)
    toy.job.announce("toy", [toy.end])
    for task in TASKS[:8]:
        assert toy.job._take(task, Work(make=toy._make))
    _leased(toy, 0, (100, 50.0), "one")
    _leased(toy, 1, (30, 30.0), "two")
    (row,) = job_status(toy.store)
    assert (row.tasks, row.tasks_done, row.pairs, row.pairs_done) == (16, 8, 136, 36 + 2)
    assert row.rejects == {"odd": 4} and not row.finished
    assert row.pairs_per_second == pytest.approx(100 / 50 + 30 / 30)
    assert row.hours_left == pytest.approx((136 - 38) / 3 / 3600)
    text = describe_status([row], cost_per_hour=180.0)
    cost = (136 - 38) / 3 / 3600 * 2 * 180
    assert f"3 pairs/s of 2 workers: 0.0 hours left, which cost {cost:.2f}" in text
    assert "shard" not in text.splitlines()[0] and "30 pairs since it began" in text
    toy.store.put("result.json", b"{}")
    (row,) = job_status(toy.store)
    assert row.finished and row.tasks_done == 16 and row.pairs_done == 136 and row.hours_left == 0


def test_unknown_sizes_are_estimated_from_the_finished_tasks(tmp_path: Path) -> None:
    toy = _Toy(tmp_path)
    toy.job.tasks = [Task(prefix="part/", name=task.name, shown="x") for task in TASKS]
    toy.job.announce("toy", [toy.end])
    assert json.loads(toy.store.get("job.json"))["parts"]["part/"]["pairs"] == 0
    assert job_status(toy.store)[0].pairs_done == 0
    for task in TASKS[:4]:
        toy.job._take(task, Work(make=toy._make))
    (row,) = job_status(toy.store)
    assert (row.pairs_done, row.pairs) == (10, 40)  # 10 pairs in 4 of 16 tasks
    assert row.hours_left is None
