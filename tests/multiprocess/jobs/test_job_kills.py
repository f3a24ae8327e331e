"""Jobs of four workers, each killed at a random moment: the bytes of one undisturbed worker."""

from pathlib import Path

import pytest

from core.storage.store import FolderStore
from data_pipeline.formats.raw import RawSource
from data_pipeline.streaming.stream import stored_records
from tests.harness import tapir
from tests.multiprocess.jobs.kills import Workers
from tests.unit.finished import write_models

WORKERS = 4


def _killed(arguments: list[str], out: Path, prefix: str, folder: Path) -> None:
    """Run four workers, kill each once while it holds a lease, and start it again."""
    with Workers(arguments, WORKERS, folder, {}) as workers:
        for number in range(WORKERS):
            workers.start(number)
        workers.kill(range(WORKERS), FolderStore(out), [prefix], again=True)
        workers.finish()


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
    _killed([*job, f"--out={many}"], many, "counts/", tmp_path)
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
    _killed([*job, *flags], many / "out", "likeness/", tmp_path)
    assert _bytes(many) == _bytes(one)
    kinds = RawSource(FolderStore(many / "dest"), "train").manifest.rejects
    assert kinds.get("overlap", 0) > 0
