"""Sets in place: the same records as a copy; blocks, masks, splits, and changed archives."""

import gzip
import io
import json
import re
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import CorruptError
from core.keys import key_int
from core.storage.store import FolderStore
from data_pipeline.config import FilterConfig, PackConfig
from data_pipeline.evaluation_sets import packed_set
from data_pipeline.formats.in_place import InPlaceUnit
from data_pipeline.formats.manifest import NAME, SPLITS, TOKENS
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.raw_set import write_split
from data_pipeline.packing.pack import pack
from data_pipeline.sources.pair import Pair, Unusable
from data_pipeline.sources.tars import archive_pairs
from tests.in_place import (
    BLOCK,
    img2dataset,
    in_place_set,
    in_place_unit,
    noise,
    records_of,
    tar_bytes,
    written,
)
from workflow.verify import verify_path


def _webdataset(first: int, count: int) -> list[tuple[str, bytes]]:
    """Dotted names, further fields, nested names, captions in the .json, and what is no pair."""
    rows: list[tuple[str, bytes]] = [("README.md", b"a data set"), ("sub/._0.png", b"metadata")]
    for i in range(first, first + count):
        key = f"sub/clip v1.5 {i:04d}"
        note = json.dumps({"captions": [f"One {i}", f"Two {i}", "x"]}).encode()
        rows += [(f"{key}.png", noise(i)), (f"{key}.cls", b"3"), (f"{key}.json", note)]
        if i % 3 == 0:
            rows += [(f"{key}.mask.png", noise(1000 + i)), (f"{key}.mask.txt", b"the mask")]
        if i % 4 == 0:
            rows += [(f"bad{i}.png", b"no picture"), (f"bad{i}.txt", b"caption")]
        if i % 5 == 0:
            rows += [(f"alone{i}.txt", b"a caption without a picture"), (f"x{i}.npy", bytes(3000))]
    return rows


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("src")
    long = [(f"{'long' * 40}{i}.{e}", d) for i in range(9) for e, d in _two(i)]
    both = tar_bytes(img2dataset(500, 7)) + tar_bytes(img2dataset(600, 6))
    (folder / "joined.tar").write_bytes(both)
    (folder / "pax.tar").write_bytes(tar_bytes(long, tarfile.PAX_FORMAT))
    (folder / "gnu.tar").write_bytes(tar_bytes(long, tarfile.GNU_FORMAT))
    paths = [folder / f"{name}.tar" for name in ("gnu", "joined", "pax")]
    paths += [written(folder, f"{i:05d}.tar", img2dataset(100 * i, 20 + i)) for i in range(3)]
    return sorted([*paths, written(folder, "web.tar", _webdataset(0, 30))])


def _two(number: int) -> list[tuple[str, bytes]]:
    return [("png", noise(number)), ("txt", b"caption %d" % number)]


def test_a_set_in_place_has_the_records_of_a_copy(tars: list[Path], tmp_path: Path) -> None:
    filters = FilterConfig(min_words=2)
    config = PackConfig(filters=filters, validation=0.3, max_rejects=0.5, block=BLOCK)
    copied, placed = FolderStore(tmp_path / "copied"), FolderStore(tmp_path / "placed")
    pack(str(tars[0].parent), copied, config)
    in_place_set(placed, tars, filters=filters)
    records = records_of(placed)
    assert records == records_of(copied) and len(records) > 100
    assert {len(r.captions) for r in records} == {1, 2}
    assert not [name for name in placed.names() if name.endswith(".tar")]
    sets = [packed_set(store, SPLITS) for store in (copied, placed)]
    captions = [[(c.text, sorted(c.pictures)) for c in given.captions] for given in sets]
    assert captions[0] == captions[1]
    assert [sets[1].read(key) for key in sets[1].pictures] == [
        next(r.image for r in records if r.key == key) for key in sets[1].pictures
    ]


def test_each_block_yields_what_the_whole_archive_does(tars: list[Path], tmp_path: Path) -> None:
    placed = FolderStore(tmp_path)
    manifests = in_place_set(placed, tars)
    sources = {split: RawSource(placed, split) for split in SPLITS}
    for path in tars:
        with open(path, "rb") as stream:
            whole = [p for p in archive_pairs(stream, str(path), path.stem) if isinstance(p, Pair)]
        blocks = []
        for split, source in sources.items():
            number = 0
            for shard in manifests[split].shards:
                for block in range(number, number + shard.blocks):
                    start = int(source.blocks.index.start[block])
                    if shard.place == str(path):
                        blocks.append((start, split, source.read(block)))
                number += shard.blocks
        read = [
            (r.key, r.image)
            for _, _, records in sorted(blocks, key=lambda b: b[0])
            for r in records
        ]
        assert read == [(p.key, p.image) for p in whole if p.image != b"no picture"]
        assert len(whole) < 10 or {split for _, split, _ in blocks} == set(SPLITS)


def test_splits_share_no_byte(tars: list[Path], tmp_path: Path) -> None:
    manifests = in_place_set(FolderStore(tmp_path), tars)
    ranges = []
    for split in SPLITS:
        index, first = RawSource(FolderStore(tmp_path), split).blocks.index, 0
        for shard in manifests[split].shards:
            for block in range(first, first + shard.blocks):
                start = int(index.start[block])
                ranges.append((shard.place, start, start + int(index.bytes[block])))
            first += shard.blocks
    ranges.sort()
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ranges))
    assert all(a[2] - a[1] > BLOCK * 500 for a in ranges[:5])


@pytest.mark.parametrize("byte", [False, True])
def test_a_changed_archive_is_refused(tmp_path: Path, byte: bool) -> None:
    path = written(tmp_path / "src", "00000.tar", img2dataset(0, 12))
    placed = FolderStore(tmp_path / "set")
    in_place_set(placed, [path])
    source, data = RawSource(placed, "train"), path.read_bytes()
    start = int(source.blocks.index.start[0]) + 600
    if byte:
        path.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
        match = rf"{path}: the block at offset \d+ has crc32 .* its index says .* pack the archives"
    else:
        path.write_bytes(data + bytes(512))
        match = (
            rf"{path} has changed since it was packed: it has {len(data) + 512} bytes.* {len(data)}"
        )
    with pytest.raises(CorruptError, match=match):
        source.read(0)
    path.unlink()
    with pytest.raises(
        CorruptError, match=r"00000\.tar, a tar of this data set, is gone .*; restore it"
    ):
        RawSource(placed, "train").read(0)


def test_long_members_between_pairs_end_a_block(tmp_path: Path) -> None:
    rows = img2dataset(0, 2)
    members = [*rows[:3], ("film.mp4", bytes(2**20 + 1)), *rows[3:], ("a.mp4", bytes(9000))]
    path = written(tmp_path / "src", "00000.tar", [*members, *img2dataset(5, 1)])
    unit = InPlaceUnit(open(path, "rb"), str(path), "a", block=64, split_of=lambda n: "train")  # noqa: SIM115
    assert len([item for item, _ in unit if isinstance(item, Pair)]) == 3
    assert [block.pairs for block in unit._blocks] == [1, 2]
    assert sum(block.end - block.start for block in unit._blocks) < 40_000


def test_a_pair_with_too_much_between_its_members_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.formats.in_place._HELD", 300_000)
    rows = img2dataset(0, 3)
    members = [*rows[:3], rows[3], ("000000001.mp4", bytes(500_000)), *rows[4:]]
    data = tar_bytes(members)
    unit = InPlaceUnit(io.BytesIO(data), "/a.tar", "a", block=64, split_of=lambda n: "train")
    items = [item for item, _ in unit]
    reasons = [item.reason for item in items if isinstance(item, Unusable)]
    assert len(reasons) == 2 and "000000001.mp4 is neither" in reasons[0]
    assert re.fullmatch(
        r"/a.tar:000000001 has other members between its own, 50\d{4} .*", reasons[1]
    )
    assert [block.pairs for block in unit._blocks] == [1, 1]
    ids = np.asarray([key_int(i.key) for i in items if isinstance(i, Pair)], np.uint64)
    kept = np.ones(2, np.bool_)
    (tmp_path / "a.tar").write_bytes(data)
    unit._place = str(tmp_path / "a.tar")
    assert unit.write(FolderStore(tmp_path), 0, etag="", ids=ids, kept=kept)["train"].samples == 2


@pytest.mark.parametrize("kind", ["gzip", "global"])
def test_archives_that_cannot_be_read_in_place_are_rejects(kind: str) -> None:
    data = tar_bytes(img2dataset(0, 3))
    if kind == "gzip":
        data = gzip.compress(data)
    else:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", pax_headers={"gname": "x"}) as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
        data = buffer.getvalue()
    unit = InPlaceUnit(io.BytesIO(data), "/a.tar", "a", block=2, split_of=lambda n: "train")
    (item,) = [item for item, _ in unit]
    assert isinstance(item, Unusable) and item.kind == "archive"
    assert ("compressed" if kind == "gzip" else "global PAX header") in item.reason
    assert (
        unit.write(
            FolderStore(Path("/nonexistent")),
            0,
            etag="",
            ids=np.zeros(0, np.uint64),
            kept=np.zeros(0, np.bool_),
        )
        == {}
    )


class _Slow(io.RawIOBase):
    """A stream that gives a few bytes at a time, and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._data.read(min(len(buffer), 7))
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("compressed", [False, True])
def test_any_stream_is_read(compressed: bool) -> None:
    data = tar_bytes(img2dataset(0, 3))
    expected = list(archive_pairs(io.BytesIO(data), "w", "a"))
    stored = gzip.compress(data) if compressed else data
    assert list(archive_pairs(_Slow(stored), "w", "a")) == expected and len(expected) == 3


def test_a_truncated_archive_keeps_its_whole_pairs(tmp_path: Path) -> None:
    data, kept = tar_bytes(img2dataset(0, 9)), []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    for cut in (last.offset_data + last.size, last.offset_data, 9_000, 600):
        path = tmp_path / f"cut{cut}.tar"
        path.write_bytes(data[:cut])
        with open(path, "rb") as stream:
            whole = [p for p in archive_pairs(stream, "w", path.stem) if isinstance(p, Pair)]
        kept.append(len(whole))
        placed = FolderStore(tmp_path / f"set{cut}")
        shards = in_place_unit(placed, 0, path, validation=0.0)
        if whole:
            write_split(placed, "train/", [[shards["train"]]], {}, {})
            assert [r.key for r in records_of(placed, ["train"])] == [p.key for p in whole]
            index = RawSource(placed, "train").blocks.index
            assert int(index.start[-1]) + int(index.bytes[-1]) <= cut
        assert bool(whole) == bool(shards)
    assert kept[:2] == [9, 8] and 0 < kept[2] < 8 and kept[3] == 0


def test_a_set_is_verified_as_its_format_says_whatever_its_places_are_called(
    tmp_path: Path,
) -> None:
    written(tmp_path / TOKENS, "a.tar", img2dataset(0, 40))
    store = FolderStore(tmp_path / "out")
    pack(str(tmp_path / TOKENS), store, PackConfig(in_place=True, validation=0.3, block=4))
    assert TOKENS in store.get(f"train/{NAME}").decode()
    assert [line.rpartition("/")[2] for line in verify_path(store.url)] == [
        "train: 1 shards",
        "validation: 1 shards",
        "catalogue: 1 files",
    ]
