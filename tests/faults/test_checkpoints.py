"""Damaged, missing, hostile and half-written checkpoint files, and retention."""

import multiprocessing
import os
import pickle
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from checkpoint.config import CheckpointConfig
from checkpoint.format import StateSlice
from checkpoint.reader import CheckpointReader, finished_steps, open_checkpoint
from checkpoint.writer import Gather, write_checkpoint
from cluster.object_server import ObjectServer
from core.errors import CheckpointError, CorruptError, StoreError, StoreInputError
from core.files.atomic import TEMPORARY
from core.log import LOG
from core.storage.s3 import S3Store
from core.storage.store import FolderStore
from tests.faults.conftest import Record
from tests.harness import PATIENCE
from training.run.checkpoints import Checkpoints, Saved, kept_steps
from training.run.resume import tell_dropped_errors

FLIPS = 1000


def alone(text: str) -> list[str]:
    """The gathering of a world of one."""
    return [text]


def _slices(value: float) -> list[StateSlice]:
    slices = []
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        data = torch.full((12,), value) + torch.arange(12)
        if kind == "exp_avg":
            data = data.bfloat16()
        for start, stop in ((0, 5), (5, 12)):
            part = data[start:stop]
            slices.append(StateSlice(name="w", kind=kind, shape=(3, 4), start=start, data=part))
    return slices


def _save(root: Path, step: int = 1, ranks: int = 2) -> Path:
    slices = _slices(float(step))
    rows = [slices[rank::ranks] for rank in range(ranks)]
    written: list[str] = []

    def gather(text: str) -> list[str]:
        if "sha256" not in text:
            return [text]  # the outcome of the save
        written.append(text)
        return written

    store = FolderStore(root)
    for rank in reversed(range(ranks)):  # rank 0 last: it gathers the others' rows
        write_checkpoint(store, f"step-{step}", rows[rank], {"step": step}, rank, gather)
    return root / f"step-{step}"


def test_slices_come_back_as_the_global_tensor(tmp_path: Path) -> None:
    reader = open_checkpoint(str(_save(tmp_path, 0)))
    assert reader.tensor("w", "master").equal(torch.arange(12.0).view(3, 4))
    assert reader.flat("w", "exp_avg", 3, 8).equal(torch.arange(3.0, 8.0))
    assert reader.shapes() == {"w": (3, 4)}
    with pytest.raises(CheckpointError, match="no step of 'w'"):
        reader.tensor("w", "step")


def test_only_the_asked_bytes_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint(str(_save(tmp_path, 0)))
    fetched = []
    whole = FolderStore.get

    def get(self: FolderStore, name: str, start: int = 0, length: int | None = None) -> bytes:
        fetched.append(length)
        return whole(self, name, start, length)

    monkeypatch.setattr(FolderStore, "get", get)
    reader.flat("w", "master", 4, 7)
    assert sorted(n for n in fetched if n is not None) == [4, 8]


@pytest.mark.seconds
def test_every_flipped_bit_is_refused_and_named(tmp_path: Path, fault: Record) -> None:
    fault(8, "bit flips in a checkpoint's files, its manifest included")
    draws, refused = random.Random(0), 0
    files = sorted(_save(tmp_path).iterdir())
    for i in range(FLIPS):
        path = files[i % len(files)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=path.name):
            open_checkpoint(str(path.parent))
        refused += 1
        path.write_bytes(whole)
    open_checkpoint(str(files[0].parent))
    fault.outcome(f"{refused} flips, {refused} refusals that name the file")


def test_truncated_and_missing_files(tmp_path: Path, fault: Record) -> None:
    fault(9, "truncated or missing checkpoint files")
    for path in sorted(_save(tmp_path).iterdir()):
        whole = path.read_bytes()
        for data in (whole[:-1], whole[: len(whole) // 2], b""):
            path.write_bytes(data)
            with pytest.raises(CorruptError, match=path.name):
                open_checkpoint(str(path.parent))
        path.unlink()
        with pytest.raises((CorruptError, CheckpointError), match=path.name):
            open_checkpoint(str(path.parent))
        path.write_bytes(whole)
    fault.outcome("each refused by name")


def test_planted_pickles_are_never_executed(tmp_path: Path, fault: Record) -> None:
    fault(13, "a pickle in place of each file")
    marker = tmp_path / "marker"

    class Plant:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (open, (str(marker), "w"))

    for path in sorted(_save(tmp_path / "run").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Plant()))
        with pytest.raises(CorruptError, match=path.name):
            open_checkpoint(str(path.parent))
        path.write_bytes(whole)
    assert not marker.exists()
    fault.outcome("refused, marker absent")


def _checkpoints(root: Path, **settings: object) -> Checkpoints:
    config = CheckpointConfig(async_save=False, **settings)  # type: ignore[arg-type]
    return Checkpoints(FolderStore(root), config, 0, 1, (alone, alone))


@pytest.mark.parametrize("kind", ["error", "error@1", "ema"])
def test_a_resume_without_compression_tells_what_it_drops(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    store, zeros = FolderStore(tmp_path), torch.zeros(12)
    slices = [
        StateSlice(name="w", kind=each, shape=(3, 4), start=0, data=zeros)
        for each in ("master", kind)
    ]
    write_checkpoint(store, "step-1", slices, {}, 0, alone)
    for compresses in (True, False):
        caplog.clear()
        tell_dropped_errors(CheckpointReader(store, "step-1"), compresses)
        assert ("what they hold back is dropped" in caplog.text) == (
            kind != "ema" and not compresses
        )


def test_a_start_deletes_what_killed_writers_left(tmp_path: Path) -> None:
    """Also in a folder outside of the run, and beside a whole checkpoint."""
    _save(tmp_path, 10)
    for step in (10, 20):
        left = tmp_path / f"step-{step}" / f"{TEMPORARY}01234567-rank-00000.safetensors"
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"half of it")
    newest = _checkpoints(tmp_path).newest()
    assert newest is not None and newest.name == "step-10"
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


def test_an_older_checkpoint_replaces_a_damaged_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        _save(tmp_path, step)
    (tmp_path / "step-30" / "manifest.json").unlink()
    damaged = tmp_path / "step-20" / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    run = _checkpoints(tmp_path)
    newest = run.newest()
    assert newest is not None and newest.facts["step"] == 10
    assert not (tmp_path / "step-30").exists(), "unfinished ones are cleaned"
    (tmp_path / "step-10" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        run.newest()


def test_a_store_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreInputError, match="cannot be written to"):
        _checkpoints(tmp_path / "file").newest()
    run = _checkpoints(tmp_path / "new")
    assert run.newest() is None and not list((tmp_path / "new").rglob("*"))


def _save_and_die(root: str, boundary: int) -> None:
    """Save step 2, and die by SIGKILL before the n-th change of the file system."""
    left = [boundary]

    def dying(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **named):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    os.replace, os.fsync, os.open = dying(os.replace), dying(os.fsync), dying(os.open)
    Path.mkdir = dying(Path.mkdir)  # type: ignore[method-assign]
    write_checkpoint(FolderStore(Path(root)), "step-2", _slices(2.0), {"step": 2}, 0, alone)


def test_killed_at_every_write_boundary(tmp_path: Path, fault: Record) -> None:
    fault(7, "killed while saving, at every write boundary")
    context = multiprocessing.get_context("fork")
    outcomes = []
    for boundary in range(30):
        root = tmp_path / str(boundary)
        _save(root, 1, ranks=1)
        process = context.Process(target=_save_and_die, args=(str(root), boundary))
        process.start()
        process.join()
        newest = _checkpoints(root).newest()
        assert newest is not None
        outcomes.append(newest.facts["step"])
        assert newest.tensor("w", "master").flatten()[0] == newest.facts["step"]
        if process.exitcode == 0:
            break
    assert process.exitcode == 0, "more boundaries than expected"
    assert outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes[-1] == 2
    fault.outcome(f"{len(outcomes) - 1} boundaries: the older or the whole new one loads")


def test_what_is_kept() -> None:
    rows = [Saved(step=10 * i, time=1800.0 * i, loss=abs(i - 3.0)) for i in range(8)]
    assert kept_steps(rows, CheckpointConfig(keep=2)) == {60, 70}
    assert kept_steps(rows, CheckpointConfig(keep=1, best=True)) == {30, 70}
    assert kept_steps(rows, CheckpointConfig(keep=1, keep_every_hours=1.0)) == {0, 20, 40, 60, 70}


def test_the_policy_deletes_and_protects(tmp_path: Path) -> None:
    run = _checkpoints(tmp_path, keep=1)
    run.protected = {2}
    for step in (1, 2, 3, 4):
        run.save(step, _slices(float(step)), {"step": step})
        run.saver.wait()
    assert finished_steps(run.store) == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4"]


def _gathers(ranks: int) -> list[Gather]:
    """`gather_text` of some threads, which are the ranks."""
    texts, barrier = [""] * ranks, threading.Barrier(ranks)

    def gather(number: int, text: str) -> list[str]:
        texts[number] = text
        barrier.wait(PATIENCE)
        every = list(texts) if number == 0 else texts[:1]
        barrier.wait(PATIENCE)
        return every

    return [partial(gather, number) for number in range(ranks)]


@pytest.mark.parametrize(
    ("rank", "method", "seen"),
    [(1, "delete", ["", "", ""]), (0, "names", ["planted", "planted", "planted"])],
)
def test_ranks_agree_on_a_retention_that_fails(
    rank: int, method: str, seen: list[str], tmp_path: Path
) -> None:
    """Otherwise one rank alone repeats the last save, and waits for the others for ever."""
    gathers = _gathers(3)

    def fails(*_: object) -> None:
        raise StoreError("planted")

    def run(number: int) -> str:
        store, gather = FolderStore(tmp_path), gathers[number]
        checkpoints = Checkpoints(
            store, CheckpointConfig(keep=1, async_save=False), number, 3, (gather, gather)
        )
        for step in (1, 2):
            if step == 2 and number == rank:
                setattr(store, method, fails)
            checkpoints.save(step, _slices(1.0)[number : number + 1], {"step": step})
        return checkpoints.failure()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == seen
    assert CheckpointReader(FolderStore(tmp_path), "step-2").facts["step"] == 2


def test_each_rank_deletes_its_own_files(tmp_path: Path) -> None:
    """Old checkpoints, of as many ranks or of more, and unfinished ones, whose manifest is gone."""
    _save(tmp_path, step=1, ranks=5)
    gathers = _gathers(4)

    def rank(number: int) -> list[str]:
        gather = gathers[number]
        store, deleted = FolderStore(tmp_path), list[str]()
        delete = store.delete
        store.delete = lambda name: (deleted.append(name), delete(name))[1]  # type: ignore[method-assign]
        config = CheckpointConfig(keep=1, async_save=False)
        run = Checkpoints(store, config, number, 4, (gather, gather))
        for step in (2, 3):
            run.save(step, _slices(1.0)[number : number + 1], {"step": step})
            assert not run.failure()
        gather("")  # until all have deleted
        if number == 0:
            (tmp_path / "step-2").mkdir()
            for name in ("rank-00003.safetensors", "rank-00004.safetensors"):
                (tmp_path / "step-2" / name).touch()
        assert run.newest() is not None
        return [name for name in deleted if name.startswith("step-")]

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(rank, range(4))
    gone = [[f"step-{step}/rank-{i:05d}.safetensors" for step in (1, 2)] for i in range(5)]
    assert [names for names in first if "manifest" not in names] == [
        gone[0][0],
        gone[4][0],
        gone[0][1],
        gone[0][1],
        gone[4][1],
    ]
    assert others == [gone[1] + gone[1][1:], gone[2] + gone[2][1:], gone[3] + gone[3][1:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3"]


@pytest.mark.world
def test_checkpoints_live_in_object_stores(s3: ObjectServer, tmp_path: Path) -> None:
    """Multipart (40 MB), ranged reads, the policy, and damage, in a real store."""
    with s3.credentials():
        store = S3Store("tapir-tests", f"checkpoints/{tmp_path.name}")
        big = torch.arange(10_000_000.0)
        run = Checkpoints(store, CheckpointConfig(keep=1), 0, 1, (alone, alone))
        for step in (1, 2):
            part = StateSlice(name="w", kind="master", shape=(10, 10**6), start=0, data=big + step)
            run.save(step, [part], {"step": step})
        run.saver.wait()
        newest = run.newest()
        assert newest is not None and finished_steps(store) == [2]
        assert (
            newest.flat("w", "master", 9_999_990, 10_000_000).tolist() == (big + 2)[-10:].tolist()
        )
        name = "step-2/rank-00000.safetensors"
        store.put(name, store.get(name)[:-1])
        with pytest.raises(CheckpointError, match="rank-00000"):
            run.newest()
        with pytest.raises(CorruptError, match="rank-00000"):
            CheckpointReader(store, "step-2").verify()


def test_a_save_that_fails_on_one_rank_counts_on_none(tmp_path: Path) -> None:
    def gather(text: str) -> list[str]:
        return [text, '{"error": "rank 1: disk full"}'] if "file" in text else [text, ""]

    with pytest.raises(StoreError, match="rank 1: disk full"):
        write_checkpoint(FolderStore(tmp_path), "step-1", _slices(0.0), {}, 0, gather)
    assert finished_steps(FolderStore(tmp_path)) == []
