"""Where a pair is stored, when a run reads it, the state of a job; caches, samples, dropout."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from bench.support.synthetic import write_tokens
from core.errors import CorruptError, InputError
from core.keys import key_int
from core.storage.store import FolderStore
from core.workers import JobWorker, job_worker_of
from data_pipeline.config import LoaderConfig, OrderConfig
from data_pipeline.formats.index import BlockReader
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.formats.verify import verify_split
from data_pipeline.jobs.leases import Leases
from data_pipeline.streaming.cache import BlockCache
from data_pipeline.streaming.stream import Stream, first_records
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.text.dropout import DropoutEncoder
from models.prior import PAD
from parallel.tensor.ops import TensorParallel
from tests.harness import tapir
from training.config import PriorTrain
from training.run.history import History
from training.tasks.prior import PriorTask


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """A small token data set."""
    store = FolderStore(tmp_path_factory.mktemp("stored"))
    write_tokens(store, 5, 300, 16, grid=4, text=5)
    return store


def test_every_record_is_looked_up_by_its_id(stored: FolderStore) -> None:
    source = TokenSource(stored, "train")
    for shard, place in ((0, 0), (2, 150), (4, 299), (3, 17)):
        block, record = find_pair(stored, "train", source.blocks, str(key_int(shard, place)))
        assert source.read(block)[record].id == key_int(shard, place)
    for text in ("12345", "²", str(2**64), str(2**63 - 1)):
        with pytest.raises(InputError, match="no pair of the key or id"):
            find_pair(stored, "train", source.blocks, text)


@pytest.mark.seconds
def test_seen_and_batch_say_what_a_run_reads(raw: Path, tmp_path: Path) -> None:
    settings = {"stage": "dvae", "data": str(raw), "out": str(tmp_path)}
    settings |= {
        "loop": {"steps": 45, "global_batch_size": 32, "seed": 4},
        "order": {"lanes": 8, "shuffle_buffer": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    stream = Stream(RawSource(FolderStore(raw), "train"), seed=4, batch=32, order=OrderConfig())
    batches = iter(stream)
    read = [[record.key for record in next(batches)[0]] for _ in range(45)]
    batches.close()  # type: ignore[attr-defined]
    assert stream.state.epoch >= 2
    history = History(tmp_path)
    for step in range(1, 46):
        assert [pair.key for pair in history.batch(step)] == read[step - 1]
    for key in read[6][:5] + read[40][:5]:
        steps = [step + 1 for step, keys in enumerate(read) if key in keys]
        assert history.seen(key) == steps == history.seen(str(key_int(key)))
    text = tapir("seen", read[6][3], f"--run={tmp_path}", "--json")
    assert 7 in json.loads(text.splitlines()[0])["steps"]
    assert "is not one of" in tapir("batch", "46", f"--run={tmp_path}", code=2)
    with pytest.raises(InputError, match="no pair of the key or id"):
        history.seen("nobody")


def test_batches_passed_over_move_the_later_steps(raw: Path, tmp_path: Path) -> None:
    settings = {"stage": "dvae", "data": str(raw), "out": str(tmp_path)}
    settings |= {
        "loop": {"steps": 30, "global_batch_size": 32, "seed": 4},
        "order": {"lanes": 8, "shuffle_buffer": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    stream = Stream(RawSource(FolderStore(raw), "train"), seed=4, batch=32, order=OrderConfig())
    passed = [(0, 3), (0, 4), (0, 9), (1, 0)]
    stream.resume(stream.state.passing(passed))
    batches = iter(stream)
    read = [[record.key for record in next(batches)[0]] for _ in range(30)]
    batches.close()  # type: ignore[attr-defined]
    history = History(tmp_path)
    history.passed = passed
    for step in (1, 4, 5, 9, 13, 14, 30):
        assert [pair.key for pair in history.batch(step)] == read[step - 1]
    for key in read[20][:5]:
        assert history.seen(key) == [i + 1 for i, keys in enumerate(read) if key in keys]


def test_status_counts_a_job(tokens: Path, tmp_path: Path) -> None:
    status = json.loads(tapir("status", str(tokens), "--json").splitlines()[0])
    for split in ("train", "validation"):
        row = status[split]
        assert row["finished"] and row["tasks"] == row["tasks_done"]
        assert row["pairs"] == row["pairs_done"] and row["workers"] == []
    assert "no token job" in tapir("status", str(tmp_path), code=2)


def test_a_cache_keeps_blocks_within_its_size(stored: FolderStore, tmp_path: Path) -> None:
    manifest = TokenSource(stored, "train").manifest
    cache = BlockCache(tmp_path / "cache", 20_000)
    asked: list[str] = []

    class Counted(FolderStore):
        def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
            asked.append(name)
            return super().get(name, start, length)

    reader = BlockReader(Counted(stored.root), "train/", manifest, cache)
    asked.clear()
    first = reader.read(3)
    assert reader.read(3) == first and len(asked) == 1
    for block in range(len(reader.records)):
        reader.read(block)
    files = list((tmp_path / "cache").iterdir())
    assert 0 < sum(path.stat().st_size for path in files) <= 20_000
    for path in files:
        path.write_bytes(path.read_bytes()[:-1])
    assert reader.read(len(reader.records) - 1) == BlockReader(stored, "train/", manifest).read(
        len(reader.records) - 1
    )


def test_a_cached_stream_reads_the_same(stored: FolderStore, tmp_path: Path) -> None:
    def ids(loader: LoaderConfig, cache: BlockCache | None) -> list[int]:
        source = TokenSource(stored, "train", cache)
        stream = Stream(source, seed=1, batch=16, order=OrderConfig(lanes=4), loader=loader)
        batches = iter(stream)
        return [int(i) for _ in range(100) for i in next(batches)[0].ids]

    cache = BlockCache(tmp_path, 10**7)
    plain = ids(LoaderConfig(), None)
    assert ids(LoaderConfig(readers=1, prefetch=1), cache) == plain == ids(LoaderConfig(), cache)


def test_a_sample_of_the_blocks_is_verified(stored: FolderStore, tmp_path: Path) -> None:
    copy = FolderStore(tmp_path)
    for name in stored.names():
        copy.put(name, stored.get(name))
    assert 0 < verify_split(copy, "train", 0.3) < 95 and verify_split(copy, "train") == 5
    name = "train/shard-000003.tar"
    data = copy.get(name)
    for at in range(1000, len(data) - 11_000, 700):
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    copy.put(name, data)
    for sample in (0.3, 1.0):
        with pytest.raises(CorruptError, match="shard-000003"):
            verify_split(copy, "train", sample)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "5",
            },
            (2, 4),
        ),
        ({"TAPIR_WORKER": "17/25", "SLURM_ARRAY_TASK_ID": "7"}, (17, 25)),
        ({"JOB_COMPLETION_INDEX": "3", "TAPIR_WORKERS": "8"}, (3, 8)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_a_worker_finds_its_part(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job_worker_of("") == JobWorker(number=expected[0], count=expected[1])
    assert job_worker_of("1/3") == JobWorker(number=1, count=3)
    for wrong in ("3/3", "a/b", "1", "-1/2"):
        with pytest.raises(InputError, match="i/n"):
            job_worker_of(wrong)


def test_an_index_without_a_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    with pytest.raises(InputError, match="export TAPIR_WORKERS"):
        job_worker_of("")
    monkeypatch.setenv("TAPIR_WORKER", "25/25")
    with pytest.raises(InputError, match="TAPIR_WORKER='25/25' in the environment must be i/n"):
        job_worker_of("")


def test_a_lease_is_held_by_one_and_taken_over_when_it_is_left(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first, second = (Leases(store, "train/", 1.0, JobWorker(number=i, count=2)) for i in range(2))
    lease = first.claim("task")
    assert lease is not None and second.claim("task") is None
    with first.held(lease, {"pairs": 3}):
        for _ in range(6):
            assert second.claim("task") is None
            time.sleep(0.25)
        assert json.loads(store.get(lease))["progress"] == {"pairs": 3}
    assert store.names() == []
    lease = first.claim("task")
    assert second.claim("task") is None
    time.sleep(1.3)
    taken = second.claim("task")
    assert taken is not None and taken != lease and first.claim("task") is None


def test_bpe_dropout_is_keyed_lossless_and_bpe_itself_at_rate_0(bpe: Path) -> None:
    tokenizer, _ = load_tokenizer(bpe)
    text = "a small red circle above 2 large blue squares, über"
    ids = encode(tokenizer, text)
    assert DropoutEncoder(tokenizer, 0.0).encode(ids, 1).tolist() == ids
    half = DropoutEncoder(tokenizer, 0.5)
    drawn = [half.encode(ids, key).tolist() for key in range(30)]
    assert all(tokenizer.decode(row) == text for row in drawn)
    assert half.encode(ids, 3).tolist() == drawn[3] and len({tuple(row) for row in drawn}) > 20
    mean = np.mean([len(row) for row in drawn])
    assert len(ids) < mean < len(text)
    with pytest.raises(InputError, match="must be in"):
        DropoutEncoder(tokenizer, 1.0)


def test_captions_are_left_empty_by_key_for_guidance(tokens: Path) -> None:
    def task(rate: float) -> PriorTask:
        return PriorTask(PriorTrain(data=str(tokens), caption_dropout=rate), TensorParallel())

    quarter = task(0.25)
    records = first_records(quarter.train, 400)

    def empty(step: int, training: bool = True) -> list[bool]:
        text = quarter.batch(records, step, training)["text"]
        return [bool(row) for row in (text == PAD).all(1)]

    assert empty(3) == empty(3) != empty(4) and not any(empty(3, training=False))
    assert 0.15 < np.mean(empty(3)) < 0.35
    plain, dropped = task(0.0).batch(records, 3), quarter.batch(records, 3)
    kept = ~(dropped["text"] == PAD).all(1)
    assert dropped["text"][kept].equal(plain["text"][kept])
    assert dropped["image"].equal(plain["image"]) and not (plain["text"] == PAD).all(1).any()
    assert quarter.facts()["caption_dropout"] == 0.25
    assert PriorTrain(caption_dropout=1.0).problems()
