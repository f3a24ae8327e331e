"""ids.bin, the index of a data set, and its manifest: bytes by hand and by other libraries."""

import itertools
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as tensors

from bench.support.counted import CountedStore
from bench.support.synthetic import write_tokens
from core.errors import CorruptError, InputError
from core.files.atomic import canonical_json, seal, sha256, unseal
from core.keys import key_int, keyed_rng
from core.storage.store import FolderStore
from data_pipeline.formats import ids as table
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.ids import NAME, IdSorter, find_in_table, row_type
from data_pipeline.formats.index import BlockIndex, index_parts
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.manifest import TOKENS, Manifest, Shard, read_manifest, write_manifest
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.formats.verify import verify_split

SHARDS, EACH = 30, 40


def _uint(*values: int) -> Any:
    return np.array(values, np.uint64)


@pytest.fixture(autouse=True, scope="module")
def _small_parts() -> Iterator[None]:
    """Runs of 64 rows, partitions of 64 to 128, slots of 4 to 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_RUN", 64)
        patch.setattr(table, "_SLOT", 4)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 token records in 30 shards."""
    folder = tmp_path_factory.mktemp("written")
    write_tokens(FolderStore(folder), SHARDS, EACH, 16, grid=2, text=3)
    return folder


@pytest.fixture
def stored(tmp_path: Path, written: Path) -> FolderStore:
    """A copy to change."""
    shutil.copytree(written, tmp_path / "stored")
    return FolderStore(tmp_path / "stored")


def test_a_table_by_hand(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with IdSorter(3, "here") as ids:
        ids.add(0, _uint(9, 2**62), np.array([1, 0]))
        ids.add(2, _uint(5), np.array([0]))
        digest = ids.write(store, "t/ids.bin")
    expected = struct.pack("<QIQIQI", 5, 2, 9, 1, 2**62, 0) + struct.pack("<QQ", 0, 3)
    assert store.get("t/ids.bin") == expected and digest == sha256(expected) and ids.bits == 0
    assert [find_in_table(store, f"t/{NAME}", 3, 0, i) for i in (5, 9, 2**62)] == [2, 1, 0]
    assert find_in_table(store, f"t/{NAME}", 3, 0, 6) is None
    assert (row_type(2**32).itemsize, row_type(2**32 + 1).itemsize) == (12, 16)


def test_a_table_of_many_parts_has_every_id_and_no_other(tmp_path: Path) -> None:
    store, drawn = FolderStore(tmp_path), keyed_rng(3, "ids")
    expected = np.unique(drawn.integers(0, 2**63, 1500, np.uint64))
    shuffled = drawn.permutation(expected)
    with IdSorter(len(expected), "here") as ids:
        assert ids.bits == 8
        for first in range(0, len(shuffled), 37):
            part = shuffled[first : first + 37]
            order = np.argsort(part)
            ids.add(first, part[order], order)
        ids.write(store, "t/ids.bin")
    data = store.get("t/ids.bin")
    rows = np.frombuffer(data[: 12 * len(expected)], row_type(len(expected)))
    slots = np.frombuffer(data[12 * len(expected) :], "<u8")
    assert (rows["id"] == expected).all() and (shuffled[rows["record"]] == expected).all()
    bounds = np.arange(257, dtype=np.uint64)[:-1] << np.uint64(55)
    assert (slots[:-1] == np.searchsorted(expected, bounds)).all() and slots[-1] == len(expected)


def test_a_pair_is_looked_up_in_two_reads_at_any_number_of_shards(stored: FolderStore) -> None:
    source = TokenSource(stored, "train")
    for shard, place in itertools.product((0, 7, 29), (0, 15, 16, 39)):
        store = CountedStore(stored)
        block, record = find_pair(store, "train", source.blocks, str(key_int(shard, place)))
        assert source.read(block)[record].id == key_int(shard, place)
        assert set(store.names_read) == {"train/ids.bin"} and store.requests.total() <= 4
    store = CountedStore(stored)
    number = find_in_table(
        store, f"train/{NAME}", 1200, source.manifest.lookup["bits"], key_int(7, 15)
    )
    assert number == 7 * EACH + 15 and store.requests == {"GET": 2}
    for text in ("12345", "nobody", str(2**63 - 1)):
        with pytest.raises(InputError, match="no pair of the key or id"):
            find_pair(stored, "train", source.blocks, text)


def test_data_sets_without_a_table_are_looked_up_by_shard(stored: FolderStore) -> None:
    body = unseal(stored.get("train/manifest.json"), "")
    new = TokenSource(stored, "train")
    stored.put("train/manifest.json", seal({k: v for k, v in body.items() if k != "lookup"}))
    stored.delete("train/ids.bin")
    old = TokenSource(stored, "train")
    assert old.manifest.lookup == {} and old.fingerprint == new.fingerprint
    for shard, place in ((0, 0), (29, 39), (11, 20)):
        at = find_pair(stored, "train", old.blocks, str(key_int(shard, place)))
        assert at == new.blocks.block_of(shard, place)
    assert verify_split(stored, "train") == SHARDS


def test_an_id_that_occurs_twice_or_is_missing_is_named(tmp_path: Path) -> None:
    store, ids_ = FolderStore(tmp_path), np.arange(100, dtype=np.uint64) * np.uint64(2**56)
    for twice, count, text in ((True, 101, f"two pairs of the id {2**56 * 41};"), (False, 101, "")):
        with IdSorter(count, "here/train") as ids:
            ids.add(0, ids_, np.arange(100))
            if twice:
                ids.add(100, ids_[41:42], np.zeros(1))
                with pytest.raises(InputError, match=text):
                    ids.write(store, "ids.bin")
            else:
                with pytest.raises(CorruptError, match="100 ids in its indexes for 101 records"):
                    ids.write(store, "ids.bin")
    assert store.names() == []


def test_a_full_temporary_disk_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30 * 2))
    with IdSorter(10**6, "here"):
        pass
    with (
        pytest.raises(InputError, match=r"needs 2\.8 GiB in .*export TMPDIR"),
        IdSorter(250_000_000, "here"),
    ):
        pass


def test_a_damaged_table_is_named(stored: FolderStore) -> None:
    whole, source = stored.get("train/ids.bin"), TokenSource(stored, "train")
    text = str(key_int(4, 4))
    assert verify_split(stored, "train", 0.1) > 0
    rows = whole[: 12 * 1200]
    for damaged in (rows, rows + b"\xff" * 4096):
        stored.put("train/ids.bin", damaged)
        with pytest.raises(CorruptError, match=r"train/ids\.bin does not fit its manifest"):
            find_pair(stored, "train", source.blocks, text)
    stored.put("train/ids.bin", whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    with pytest.raises(CorruptError, match=r"train/ids\.bin has sha256"):
        verify_split(stored, "train", 0.1)


def test_an_index_is_written_as_safetensors_writes_it() -> None:
    for blocks in (0, 1, 7):
        index = BlockIndex(
            start=np.arange(blocks, dtype=np.uint64) + np.uint64(2**40),
            bytes=np.arange(blocks, dtype=np.uint32) * np.uint32(3),
            records=np.full(blocks, 9, np.uint32),
            crc32=np.arange(blocks, dtype=np.uint32) + np.uint32(2**31),
        )
        assert b"".join(bytes(part) for part in index_parts(index)) == tensors.save(index.arrays)


@pytest.mark.parametrize("count", [0, 1, 3, 1000, 2001])
def test_a_manifest_is_sealed_in_parts_as_in_one(tmp_path: Path, count: int) -> None:
    shards = [
        Shard(
            name=f'shard "{i}".tar',
            samples=i,
            blocks=1,
            bytes=9 * i,
            sha256=sha256(b"%d" % i),
            etag="e",
            index_sha256="i",
        )
        for i in range(count)
    ]
    facts = {"a": {"shards": [0]}, "shards": '"shards": [\n  0'}
    given: dict[str, Any] = {"format": TOKENS, "samples": 5, "facts": facts, "rejects": {}}
    manifest = Manifest(shards=shards, index_sha256="x", **given)
    store = FolderStore(tmp_path)
    write_manifest(store, "t/", manifest)
    names = ("name", "samples", "blocks", "bytes", "sha256", "etag", "index_sha256")
    body = {**given, "index_sha256": "x", "variants": 1}
    rows = [{name: getattr(shard, name) for name in names} for shard in shards]
    mark = sha256(canonical_json({**body, "shards": [shard.sha256 for shard in shards]}))
    assert store.get("t/manifest.json") == seal({**body, "shards": rows, "fingerprint": mark})
    assert read_manifest(store, "t/", TOKENS) == manifest
    more = replace(manifest, figures={"f": 0.5}, lookup={"bits": 2}, numerics=[{"n": 1}])
    assert more.fingerprint == manifest.fingerprint == mark
    write_manifest(store, "t/", more)
    assert read_manifest(store, "t/", TOKENS) == more


def test_results_come_in_order_and_few_wait() -> None:
    open_ = 0
    most = 0

    def read(item: int) -> int:
        nonlocal open_, most
        open_ += 1
        most = max(most, open_)
        time.sleep(0.001 * (item % 3))
        return item

    for expected, item in enumerate(fetched(read, range(100), threads=4)):
        assert item == expected
        open_ -= 1
    assert expected == 99 and 1 < most <= 8
    with pytest.raises(ZeroDivisionError):
        list(fetched(lambda item: 1 // item, [1, 0, 1]))
