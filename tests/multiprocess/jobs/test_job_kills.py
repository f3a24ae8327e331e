"""Jobs of four workers, each killed at a random moment: the bytes of one undisturbed worker."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.keys import keyed_rng
from core.storage.store import FolderStore
from data_pipeline.formats.raw import RawSource
from data_pipeline.jobs.leases import read_leases
from data_pipeline.streaming.stream import stored_records
from tests.harness import ENVIRONMENT, PATIENCE, tapir
from tests.unit.finished import write_models

WORKERS = 4


def _start(arguments: list[str], number: int, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "tests.multiprocess.jobs.slowly", "0.2", *arguments]
    with open(log, "ab") as output:
        return subprocess.Popen(
            [*command, f"--worker={number}/{WORKERS}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )


def _holder(store: FolderStore, prefix: str, numbers: set[int]) -> int:
    """Wait until one of these workers holds a lease; returns its number."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for lease in read_leases(store, prefix):
            if (number := int(lease["worker"].split("/")[0])) in numbers and not lease["dead"]:
                return number
        time.sleep(0.01)
    raise AssertionError(f"none of the workers {numbers} took a task")


def _killed(arguments: list[str], out: Path, prefix: str, log: Path) -> None:
    """Run four workers, kill each once while it holds a lease, and start it again."""
    workers = [_start(arguments, number, log) for number in range(WORKERS)]
    try:
        left = set(range(WORKERS))
        while left:
            victim = _holder(FolderStore(out), prefix, left)
            time.sleep(float(keyed_rng(victim, "kill").uniform(0, 0.2)))
            os.kill(workers[victim].pid, signal.SIGKILL)
            assert workers[victim].wait() == -signal.SIGKILL, log.read_text()
            workers[victim] = _start(arguments, victim, log)
            left.remove(victim)
        codes = [worker.wait(PATIENCE) for worker in workers]
        assert codes == [0] * WORKERS, log.read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _bytes(folder: Path) -> dict[str, bytes]:
    store = FolderStore(folder)
    return {name: store.get(name) for name in store.names()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 40 shards and more."""
    folder = tmp_path_factory.mktemp("pairs") / "raw"
    flags = ["--count=240", "--validation=0.2", "--shard-pairs=5", "--block=2", "--pixels=16"]
    tapir("pack", "shapes", str(folder), *flags)
    return folder


@pytest.mark.slow
def test_bpe_counts_by_killed_workers_give_the_tokenizer_of_one(
    pairs: Path, tmp_path: Path
) -> None:
    job = ["train", "bpe", "tiny", f"--data={pairs}", "--vocabulary=300", "--task-captions=5"]
    tapir(*job, f"--out={tmp_path / 'one'}")
    many = tmp_path / "many"
    _killed([*job, f"--out={many}"], many, "counts/", tmp_path / "log")
    assert _bytes(many) == _bytes(tmp_path / "one")
    assert "; finished" in tapir("status", str(many))


@pytest.mark.slow
def test_overlap_by_killed_workers_is_that_of_one(pairs: Path, tmp_path: Path) -> None:
    captions = [r.caption for r in stored_records(RawSource(FolderStore(pairs), "train"))]
    models = write_models(tmp_path / "models", captions)
    other = tmp_path / "other"
    tapir("pack", "shapes", str(other), "--count=30", "--validation=0.3", "--pixels=16")
    job = ["overlap", str(pairs), str(other), f"--clip={models.clip}", "--threshold=0.9999"]
    one, many = tmp_path / "one", tmp_path / "many"
    tapir(*job, f"--out={one / 'out'}", f"--dest={one / 'dest'}")
    flags = [f"--out={many / 'out'}", f"--dest={many / 'dest'}"]
    _killed([*job, *flags], many / "out", "likeness/", tmp_path / "log")
    assert _bytes(many) == _bytes(one)
    kinds = RawSource(FolderStore(many / "dest"), "train").manifest.rejects
    assert kinds.get("overlap", 0) > 0
