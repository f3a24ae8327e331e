"""The end of a token job: one finisher, ledgers, requests; old and damaged sets."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.support.counted import CountedStore
from bench.support.synthetic import records_of, write_tokens
from core.config import to_json
from core.errors import CorruptError, InputError
from core.files.atomic import canonical_json, seal
from core.storage.store import FolderStore, Store
from core.workers import JobWorker
from data_pipeline.config import PackConfig, TokenizeConfig
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.manifest import TOKENS, Manifest, read_manifest
from data_pipeline.jobs import ledger as ledgers
from data_pipeline.jobs.finish import Finisher
from data_pipeline.jobs.leases import FOLDER, Leases, holder_is_dead
from data_pipeline.jobs.ledger import DONE, LEDGER, Ledger
from data_pipeline.jobs.request import REQUEST
from data_pipeline.jobs.status import job_status
from data_pipeline.packing.pack import pack
from data_pipeline.text.bpe import train_bpe
from data_pipeline.tokenize import finish as finishing
from data_pipeline.tokenize.encode import Encoders
from data_pipeline.tokenize.figures import ENTROPY, per_position_entropy
from data_pipeline.tokenize.finish import ManifestWriter
from data_pipeline.tokenize.worker import Worker
from models.config import DVAEConfig
from models.dvae import DVAE
from models.tokenizers.protocol import DVAETokenizer
from parallel.device import CPU
from parallel.precision import set_numerics

SHARDS, EACH = 100, 12
FILES = ("manifest.json", "index.safetensors", IDS)
NUMERICS = ({"device": "cpu"}, {"device": "H200"})


def _task(number: int) -> str:
    return f"shard-{number:06d}"


def _record(manifest: Manifest, number: int) -> dict[str, Any]:
    """The record of a shard; the last one had a reject."""
    last = number == SHARDS - 1
    return {
        "shards": [to_json(manifest.shards[number])],
        "rejects": {"small": 1} if last else {},
        "rejects_sha256": "",
        "first_reject": "it is small" if last else "",
        "numerics": NUMERICS[number % 2],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job whose 100 shards are done, and their ledgers written: 70 shards and 25; 5 unlisted."""
    store = FolderStore(tmp_path_factory.mktemp("written"))
    manifest = write_tokens(store, SHARDS, EACH, 4, grid=2, text=3)
    request = {"input": {s: {"shards": SHARDS, "pairs": 1201} for s in ("train", "validation")}}
    store.put(REQUEST, canonical_json(request))
    for numbers in (range(70), range(70, 95)):
        ledger = Ledger(store, "train/")
        for number in numbers:
            ledger.commit(_task(number), _record(manifest, number))
    for number in range(95, SHARDS):
        record = canonical_json(_record(manifest, number))
        store.put(f"train/{DONE}{_task(number)}.json", record)
    for name in FILES:
        store.delete(f"train/{name}")
    return store.root


@pytest.fixture
def job(tmp_path: Path, written: Path) -> FolderStore:
    """A copy to finish."""
    shutil.copytree(written, tmp_path / "tokens")
    return FolderStore(tmp_path / "tokens")


def _finisher(store: Store, worker: int = 0, seconds: float = 60.0, **changes: Any) -> Finisher:
    facts = {"grid": 2, "image_vocabulary": 8192, "split": "train"}
    pairs, listed = changes.pop("pairs", SHARDS * EACH + 1), changes.pop("ledgers", True)
    config = replace(TokenizeConfig(lease_seconds=seconds), **changes)
    leases = Leases(store, "train/", seconds, JobWorker(number=worker, count=2))
    tasks = [_task(number) for number in range(SHARDS)]
    writer = ManifestWriter(store, pairs, tasks, facts, config, listed)
    return Finisher(store, "train/", leases, "train/manifest.json", writer.write)


def _bytes(store: Store) -> dict[str, bytes]:
    return {name: store.get(f"train/{name}") for name in FILES}


def test_a_ledger_is_rewritten_in_parts_and_counts_what_is_committed(job: FolderStore) -> None:
    names = job.names(f"train/{LEDGER}")
    parts = {name: json.loads(job.get(name))["rows"] for name in names}
    assert sorted(map(len, parts.values())) == [6, 25, 64]
    assert sorted(t for rows in parts.values() for t in rows) == [_task(i) for i in range(95)]
    second = Ledger(job, "train/")
    second.commit(_task(3), {"another": "record"})
    assert job.names(f"train/{LEDGER}") == names
    assert "another" not in json.loads(job.get(f"train/{DONE}{_task(3)}.json"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of the first 2 shards; up to 32 more are fetched ahead."""
    monkeypatch.setattr(finishing, "FIRST_BLOCKS", 6)


AHEAD = 34


def test_the_end_reads_each_index_once_and_each_part_of_the_ledgers(
    job: FolderStore, few: None
) -> None:
    store = CountedStore(job)
    finisher = _finisher(store)
    assert finisher.finish() and finisher.finished()
    reads = store.names_read
    indexes = [reads[f"train/{_task(i)}.index.safetensors"] for i in range(SHARDS)]
    assert set(indexes[AHEAD:]) == {1} and set(indexes[:AHEAD]) <= {1, 2}
    markers = [reads[f"train/{DONE}{_task(i)}.json"] for i in range(SHARDS)]
    assert markers[AHEAD:] == [0] * (95 - AHEAD) + [1] * 5 and set(markers[:AHEAD]) <= {0, 1}
    assert sum(count for name, count in reads.items() if LEDGER in name) == 3
    assert sum(count for name, count in reads.items() if name.endswith(".tar")) == 6
    assert store.requests.total() <= 1.25 * SHARDS + 2 * AHEAD
    manifest = read_manifest(job, "train/", TOKENS)
    assert manifest.samples == 1200 and manifest.rejects == {"small": 1}
    assert [shard.name for shard in manifest.shards] == [f"{_task(i)}.tar" for i in range(SHARDS)]
    assert manifest.numerics == [{**row, "shards": 50} for row in reversed(NUMERICS)]
    finisher.sweep()
    assert job.names(f"train/{LEDGER}") == [] == job.names("train/_leases/")


def test_the_entropy_is_that_of_the_stored_codes(job: FolderStore) -> None:
    _finisher(job).finish()
    codes = np.concatenate([records_of(i, EACH, 4, 3).image for i in range(SHARDS)])
    expected = 0.0
    for column in codes.T:
        _, counts = np.unique(column, return_counts=True)
        expected -= float((counts / 1200 * np.log(counts / 1200)).sum()) / 4
    manifest = read_manifest(job, "train/", TOKENS)
    assert manifest.figures == {ENTROPY: pytest.approx(expected, abs=1e-8)}
    assert manifest.figures[ENTROPY] == round(manifest.figures[ENTROPY], 9)
    first = lambda block: records_of(0, EACH, 4, 3)[:1]  # noqa: E731
    assert per_position_entropy(first, 3, 4, 8192) == 0.0


def _without_ledgers(store: FolderStore) -> None:
    ledgers.sweep_ledgers(store, "train/")


def _damaged_ledgers(store: FolderStore) -> None:
    first, second, third = store.names(f"train/{LEDGER}")
    store.put(first, store.get(first).replace(b'"samples": 12', b'"samples": 13'))
    store.put(second, b"{")
    store.put(third, seal({"lines": {}}))


def _doubled_ledgers(store: FolderStore) -> None:
    for name in store.names(f"train/{LEDGER}"):
        store.put(name.replace(LEDGER, f"{LEDGER}0"), store.get(name))
    store.put(f"train/{LEDGER}x.json", seal({"rows": {"another task": {}}}))


@pytest.mark.parametrize("change", [_without_ledgers, _damaged_ledgers, _doubled_ledgers])
def test_the_manifest_is_the_same_whatever_ledgers_there_are(
    job: FolderStore, change: Callable[[FolderStore], None], few: None
) -> None:
    _finisher(job).finish()
    expected = _bytes(job)
    for name in FILES:
        job.delete(f"train/{name}")
    change(job)
    store = CountedStore(job)
    assert _finisher(store, 1).finish()
    assert _bytes(job) == expected
    assert store.requests.total() <= 2.25 * SHARDS + 2 * AHEAD


def test_only_one_worker_ends_a_split(job: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    real = finishing.put_manifest

    def slow(*arguments: Any) -> Manifest:
        begun.set()
        assert goes_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(finishing, "put_manifest", slow)
    one, two = CountedStore(job), CountedStore(job)
    threads = [threading.Thread(target=_finisher(one, 0, 1.0).finish)]
    threads[0].start()
    assert begun.wait(60)
    threads += [threading.Thread(target=_finisher(two, 1, 1.0).finish)]
    threads[1].start()
    until = time.monotonic() + 60
    while two.requests["HEAD"] < 3 and time.monotonic() < until:
        time.sleep(0.01)  # it looks for the manifest, again and again
    goes_on.set()
    for thread in threads:
        thread.join(60)
    assert not any("index" in name or DONE in name for name in two.names_read)
    assert read_manifest(job, "train/", TOKENS).samples == 1200


def test_a_marker_that_is_gone_sends_the_worker_back(job: FolderStore) -> None:
    name = f"train/{DONE}{_task(40)}.json"
    record = job.get(name)
    job.delete(name)
    assert not _finisher(job).finish() and not _finisher(job).finished()
    assert job.names("train/_leases/") == []
    job.put(name, record)
    assert _finisher(job).finish()


def test_pairs_that_are_missing_or_rejected_stop_the_end(job: FolderStore) -> None:
    with pytest.raises(InputError, match="1200 records and 1 rejects for 1300 pairs"):
        _finisher(job, pairs=1300).finish()
    with pytest.raises(InputError, match=r"1 of 1201 pairs .* the first: it is small"):
        _finisher(job, max_rejects=0.0008).finish()
    job.put(f"train/{DONE}{_task(97)}.json", b'{"shards": [{"name": "x"}], "rejects": {}}')
    with pytest.raises(CorruptError, match=r"a record of .*train.* is damaged.*--again"):
        _finisher(job).finish()
    assert not _finisher(job).finished() and job.names("train/_leases/") == []


def test_again_trusts_no_ledger(job: FolderStore) -> None:
    """A worker that runs on may write a line of a shard that --again has made anew."""
    _finisher(job).finish()
    expected = _bytes(job)
    name = job.names(f"train/{LEDGER}")[0]
    rows = json.loads(job.get(name))["rows"]
    next(iter(rows.values()))["shards"][0]["index_sha256"] = "of other bytes"
    job.put(name, seal({"rows": rows}))
    job.delete("train/manifest.json")
    with pytest.raises(CorruptError, match="differs from its manifest"):
        _finisher(job).finish()
    job.put("train/index.safetensors", b"damaged")
    assert _finisher(job, ledgers=False).finish(again=True)
    assert _bytes(job) == expected


def test_status_reads_ledgers_then_the_manifest(job: FolderStore) -> None:
    counted = CountedStore(job)
    before = job_status(counted)[0]
    assert (before.tasks_done, before.pairs_done, before.finished) == (100, 1201, False)
    assert before.devices == {"cpu": 50, "H200": 50} and before.rejects == {"small": 1}
    assert counted.requests["GET"] == 1 + 3 + 5
    _finisher(job).finish()
    counted = CountedStore(job)
    after = job_status(counted)[0]
    assert replace(after, finished=False) == before and after.finished
    assert counted.requests["GET"] == 2


def test_status_tells_of_damaged_records_and_passes_over_the_rest(job: FolderStore) -> None:
    whole = job_status(job)[0]
    for content in (b"[1]", b"{}", b"no JSON", b'{"holder": 3}', b'{"progress": 3}'):
        job.put(f"train/{FOLDER}{_task(40)}.000000.json", content)
        assert job_status(job)[0] == whole, "a lease"
        assert not holder_is_dead(content)
    job.put(f"train/{LEDGER}other.000000.json", seal({"rows": [1]}))
    assert job_status(job)[0] == whole, "a part of a ledger"
    for content in (b"{}", b'{"shards": []}', b'{"shards": [{"name": "x"}]}', b'{"shards": 3}'):
        job.put(f"train/{DONE}{_task(97)}.json", content)
        with pytest.raises(CorruptError, match=r"a record of .*/train/ is damaged .*--again"):
            job_status(job)


def _worker(folder: Path, shard_pairs: int) -> tuple[Worker, CountedStore]:
    raw = FolderStore(folder / "raw")
    pack("shapes", raw, PackConfig(count=60, validation=0.3, shard_pairs=shard_pairs, pixels=16))
    encoders = Encoders(
        images=DVAETokenizer(DVAE(DVAEConfig(pixels=16, width=4, codebook=16, code_width=8)), "d"),
        tokenizer=train_bpe(["a red circle"], 300),
        tokenizer_hash="t",
        numerics=set_numerics(CPU),
    )
    counted = CountedStore(FolderStore(folder / "tokens"))
    member = JobWorker(number=0, count=1)
    return Worker(raw, counted, encoders, TokenizeConfig(block=4), member), counted


def test_a_finished_job_costs_the_same_few_requests_at_any_size(tmp_path: Path) -> None:
    again = {}
    for pairs in (20, 2):
        worker, store = _worker(tmp_path / str(pairs), pairs)
        made = worker.run()
        assert (made > 20) == (pairs == 2) and store.requests["HEAD"] <= 2 * made + 12
        store.requests.clear()
        assert worker.run() == 0
        again[pairs] = dict(store.requests)
    assert again[20] == again[2] and sum(again[2].values()) <= 12


def test_again_adds_the_figures_and_table_of_an_older_set(tmp_path: Path) -> None:
    worker, store = _worker(tmp_path, 10)
    worker.run()
    expected = {name: store.get(f"train/{name}") for name in FILES}
    manifest = read_manifest(store, "train/", TOKENS)
    assert 0 < manifest.figures[ENTROPY] <= np.log(16)
    assert read_manifest(store, "validation/", TOKENS).figures == {}
    body = json.loads(expected["manifest.json"])
    older = {k: v for k, v in body.items() if k not in ("lookup", "figures", "digest")}
    store.put("train/manifest.json", seal(older))
    store.delete(f"train/{IDS}")
    assert read_manifest(store, "train/", TOKENS).fingerprint == manifest.fingerprint
    assert worker.run() == 0 and read_manifest(store, "train/", TOKENS).lookup == {}
    assert worker.run(again=True) == 0
    assert {name: store.get(f"train/{name}") for name in FILES} == expected
