"""Masks, views and joins of raw sets: which records stay, without a copy or another cut."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as tensors

from bench.support.counted import CountedStore
from core.errors import CorruptError, InputError
from core.files.atomic import sha256
from core.keys import key_fraction
from core.storage.store import FolderStore, Store, open_store
from data_pipeline.config import OrderConfig, PackConfig
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.index import BlockIndex, dump_shard_index, index_parts
from data_pipeline.formats.lookup import find_pair
from data_pipeline.formats.manifest import INDEX, NAME, RAW, SPLITS, Shard, read_manifest
from data_pipeline.formats.raw import RawRecord, RawSource
from data_pipeline.formats.raw_set import Base, write_split, write_view
from data_pipeline.formats.raw_shards import RawShards
from data_pipeline.formats.split import dump_split, load_split, open_split
from data_pipeline.formats.verify import verify_split
from data_pipeline.formats.views import places
from data_pipeline.formats.views.masks import Kept, MaskWriter, Ranks, bits_of
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.cache import BlockCache
from data_pipeline.streaming.stream import Stream
from tests.in_place import (
    epoch,
    img2dataset,
    in_place_set,
    in_place_unit,
    kept_by,
    records_of,
    written,
)

FILES = {f"{split}/{name}" for split in SPLITS for name in (NAME, INDEX, IDS)}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six archives of 30 pairs."""
    folder = tmp_path_factory.mktemp("src")
    return [written(folder, f"{i:05d}.tar", img2dataset(1000 * i, 30)) for i in range(6)]


@pytest.fixture(scope="module")
def placed(src: list[Path], tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """The set of them in place."""
    store = FolderStore(tmp_path_factory.mktemp("placed"))
    in_place_set(store, src)
    return store


@pytest.fixture(scope="module")
def copied(src: list[Path], tmp_path_factory: pytest.TempPathFactory) -> FolderStore:
    """A copied set of them."""
    store = FolderStore(tmp_path_factory.mktemp("copied"))
    pack(str(src[0].parent), store, PackConfig(block=4, validation=0.25, shard_pairs=50))
    return store


def _most(key: str) -> bool:
    return key_fraction(0, key) < 0.7 and not key.startswith("00003")


def _view(base: Store, dest: Store, some: Callable[[str], bool] = _most) -> None:
    for split in SPLITS:
        keep = kept_by(base, split, some)
        write_view(dest, f"{split}/", [Base(store=base, split=split, keep=keep)], {}, {})


def _stored(store: Store, split: str) -> list[RawRecord]:
    source = RawSource(store, split)
    return [record for block in range(len(source.sizes)) for record in source.read(block)]


@pytest.mark.parametrize("kind", ["placed", "copied"])
def test_a_view_has_exactly_the_chosen_records_in_their_order(
    kind: str, placed: FolderStore, copied: FolderStore, tmp_path: Path
) -> None:
    base, view = {"placed": placed, "copied": copied}[kind], FolderStore(tmp_path / "v")
    _view(base, view)
    assert set(view.names()) == FILES
    for split in SPLITS:
        chosen = [record for record in _stored(base, split) if _most(record.key)]
        assert _stored(view, split) == chosen and len(chosen) > 10
        manifest = read_manifest(view, f"{split}/", RAW)
        assert manifest.samples == sum(shard.samples for shard in manifest.shards) == len(chosen)
        assert manifest.facts == {"bases": [read_manifest(base, f"{split}/", RAW).fingerprint]}
        source = RawSource(view, split)
        assert sum(source.sizes) == len(chosen) and min(source.sizes) > 0
        whole = RawSource(base, split).blocks.index
        assert set(source.blocks.index.crc32.tolist()) <= set(whole.crc32.tolist())
        for record in chosen[::7]:
            block, place = find_pair(view, split, source.blocks, record.key)
            assert source.read(block)[place] == record
        for record in _stored(base, split):
            if not _most(record.key):
                with pytest.raises(InputError, match="no pair of the key or id"):
                    find_pair(view, split, source.blocks, record.key)
        assert verify_split(view, split) == len(manifest.shards)
        assert verify_split(view, split, 0.3) > 0
    assert not any(s.name == "shard-000003.tar" for s in manifest.shards) or kind == "copied"


def test_a_view_of_a_view_and_a_handed_on_split(placed: FolderStore, tmp_path: Path) -> None:
    first, second = FolderStore(tmp_path / "a"), FolderStore(tmp_path / "b")
    _view(placed, first)
    _view(first, second, lambda key: key_fraction(1, key) < 0.5)
    kept = [r for r in _stored(placed, "train") if _most(r.key) and key_fraction(1, r.key) < 0.5]
    assert _stored(second, "train") == kept and kept
    opened = load_split(dump_split(open_split(second, "train", RAW)))
    source = RawSource(second, "train", opened=opened)
    assert [r for b in range(len(source.sizes)) for r in source.read(b)] == kept
    order = OrderConfig(lanes=2, shuffle_buffer=2)
    batches = iter(Stream(source, seed=3, batch=4, order=order))
    read = [next(batches)[0] for _ in range(len(kept) // 4)]
    batches.close()  # type: ignore[attr-defined]
    assert {record.key for batch in read for record in batch} <= {record.key for record in kept}


def test_left_out_records_of_units_equal_those_of_a_view(
    src: list[Path], placed: FolderStore, tmp_path: Path
) -> None:
    """What `pack` leaves out at its end, and what a view leaves out later."""
    masked, view = FolderStore(tmp_path / "m"), FolderStore(tmp_path / "v")
    _view(placed, view)
    whole = {split: read_manifest(placed, f"{split}/", RAW).shards for split in SPLITS}

    def keep_of(split: str) -> Callable[[int], Kept | None]:
        by_shard = kept_by(placed, split, _most)
        names = [shard.name for shard in whole[split]]

        def keep(unit: int) -> Kept | None:
            name = f"shard-{unit:06d}.tar"
            return by_shard(names.index(name)) if name in names else None

        return keep

    in_place_set(masked, src, keep_of)
    for split in SPLITS:
        assert _stored(masked, split) == _stored(view, split)
        for name in (INDEX, IDS):
            assert masked.get(f"{split}/{name}") == view.get(f"{split}/{name}")
        for number, shard in enumerate(read_manifest(masked, f"{split}/", RAW).shards):
            kept = list(RawShards(masked, split).records(number))
            assert len(kept) == shard.samples and not shard.is_whole
            assert RawShards(masked, split).digest(number) == RawShards(view, split).digest(number)
            assert RawShards(masked, split).digest(number) != RawShards(placed, split).digest(
                [s.name for s in whole[split]].index(shard.name)
            )


def test_shards_are_read_as_tasks_whole_or_by_their_blocks(
    placed: FolderStore, copied: FolderStore, tmp_path: Path
) -> None:
    view, masked = FolderStore(tmp_path / "v"), FolderStore(tmp_path / "m")
    _view(copied, view)
    for name in copied.names():
        masked.put(name, copied.get(name))
    units = [[shard] for shard in read_manifest(masked, "train/", RAW).shards]
    write_split(masked, "train/", units, {}, {}, kept_by(copied, "train", _most))
    assert _stored(masked, "train") == _stored(view, "train")
    for store in (placed, copied, view, masked):
        shards = RawShards(store, "train")
        numbers = range(len(shards.manifest.shards))
        assert [r for n in numbers for r in shards.records(n)] == _stored(store, "train")
        assert len({shards.digest(number) for number in numbers}) == len(numbers)


def test_a_version_adds_units_to_an_earlier_one(src: list[Path], tmp_path: Path) -> None:
    both, grown = FolderStore(tmp_path / "both"), FolderStore(tmp_path / "grown")
    drop_first = lambda split: lambda unit: _without_first(both, split, unit)  # noqa: E731
    in_place_set(both, src[:2], drop_first)
    unit = in_place_unit(both, 2, src[2])
    for split in SPLITS:
        earlier = open_split(both, split, RAW)
        before = _stored(both, split)
        write_split(both, f"{split}/", [[unit[split]]], {}, {}, earlier=earlier)
        in_place_set(grown, src[2:3])
        assert _stored(both, split) == before + _stored(grown, split)
        assert verify_split(both, split) == len(earlier.manifest.shards) + 1


def _without_first(store: FolderStore, split: str, unit: int) -> Kept:
    name = f"{split}/shard-{unit:06d}.index.safetensors"
    kept = np.ones(len(tensors.load(store.get(name))["ids"]), np.bool_)
    kept[0] = False
    return kept


def test_a_join_has_the_records_of_both_and_refuses_a_double_id(
    src: list[Path], copied: FolderStore, tmp_path: Path
) -> None:
    few, other = FolderStore(tmp_path / "few"), FolderStore(tmp_path / "other")
    in_place_set(few, src[:1])
    archive = written(tmp_path / "src2", "elsewhere.tar", img2dataset(0, 20))
    in_place_set(other, [archive], validation=0.5)
    dest = FolderStore(tmp_path / "dest")
    for split in SPLITS:
        bases = [Base(store=store, split=split) for store in (copied, other)]
        manifest = write_view(dest, f"{split}/", bases, {"a": 1}, {"image": 2})
        assert _stored(dest, split) == _stored(copied, split) + _stored(other, split)
        assert len({shard.name for shard in manifest.shards}) == len(manifest.shards)
        assert manifest.rejects == {"image": 2} and manifest.facts["a"] == 1
        assert verify_split(dest, split) == len(manifest.shards)
    twice = [Base(store=store, split="train") for store in (copied, few)]
    with pytest.raises(InputError, match="two pairs of the id"):
        write_view(FolderStore(tmp_path / "twice"), "train/", twice, {}, {})
    assert not FolderStore(tmp_path / "twice").exists(f"train/{NAME}")


def test_a_view_needs_sound_bases_and_something_to_keep(
    placed: FolderStore, tmp_path: Path
) -> None:
    dest, base = FolderStore(tmp_path / "d"), FolderStore(tmp_path / "b")
    for name in placed.names():
        base.put(name, placed.get(name))
    nothing = Base(store=base, split="train", keep=kept_by(base, "train", lambda key: False))
    with pytest.raises(InputError, match="no pair is left for"):
        write_view(dest, "train/", [nothing], {}, {})
    table = bytearray(base.get(f"train/{IDS}"))
    table[8] ^= 1
    base.put(f"train/{IDS}", bytes(table))
    with pytest.raises(CorruptError, match=r"ids\.bin does not fit"):
        write_view(dest, "train/", [Base(store=base, split="train")], {}, {})


def test_an_epoch_in_place_takes_few_more_requests_and_bytes(
    src: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once whole; once with a fifth left out by a mask, against a copy without it."""
    stores: list[CountedStore] = []

    def counted(url: str) -> Store:
        stores.append(CountedStore(open_store(url)))
        return stores[-1]

    monkeypatch.setattr(places, "open_store", counted)
    copy, placed, masked = (FolderStore(tmp_path / name) for name in ("c", "p", "m"))
    pack(str(src[0].parent), copy, PackConfig(block=8, validation=0.1, shard_pairs=60))
    in_place_set(placed, src, block=8, validation=0.1)
    _view(placed, masked, lambda key: key_fraction(2, key) < 0.8)
    (gets, read), *others = (epoch(store, stores) for store in (copy, placed, masked))
    assert others[0][0] <= 1.2 * gets and others[0][1] <= 1.1 * read
    assert others[1][0] <= 1.5 * gets and others[1][1] <= 1.5 * read
    assert len(stores) == 1 and stores[0].requests["HEAD"] == len(src)


def test_a_view_shares_cached_blocks_with_its_base(placed: FolderStore, tmp_path: Path) -> None:
    cache, view = BlockCache(tmp_path / "cache", 10**8), FolderStore(tmp_path / "v")
    _view(placed, view)
    for store in (placed, view):
        source = RawSource(store, "train", cache)
        for block in range(len(source.sizes)):
            source.read(block)
    count = len(list((tmp_path / "cache").glob("*.block")))
    assert count == len(RawSource(placed, "train").sizes)


def test_masks_and_ranks_count_as_lists_do() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.random(n) < 0.8 for n in (0, 3, 8, 1000, 13, 1)]
    writer, whole = MaskWriter(), np.concatenate(parts)
    for part in parts:
        writer.add(part)
    packed = writer.packed()
    assert packed.tolist() == np.packbits(whole, bitorder="little").tolist()
    assert writer.dropped == np.count_nonzero(~whole)
    for first, count in ((0, 0), (3, 5), (7, 9), (8, 8), (500, 300), (len(whole) - 1, 1)):
        assert bits_of(packed, first, count).tolist() == whole[first : first + count].tolist()
    ranks = Ranks(whole)
    kept = np.flatnonzero(whole)
    assert ranks.of(kept).tolist() == list(range(len(kept))) and ranks.total == len(kept)


def test_sets_of_format_2_are_read_and_viewed(tmp_path: Path) -> None:
    old = FolderStore(Path(__file__).parents[2] / "golden" / "before" / "raw")
    manifest = read_manifest(old, "train/", RAW)
    assert manifest.format == "tapir-raw-2" and all(shard.is_whole for shard in manifest.shards)
    assert len(records_of(old)) == sum(read_manifest(old, f"{s}/", RAW).samples for s in SPLITS)
    if manifest.lookup:
        _view(old, FolderStore(tmp_path), lambda key: key_fraction(key) < 0.5)
        kept = [r for r in _stored(old, "train") if key_fraction(r.key) < 0.5]
        assert _stored(FolderStore(tmp_path), "train") == kept
    else:
        with pytest.raises(InputError, match=r"ids\.bin is missing"):
            _view(old, FolderStore(tmp_path))


def test_an_unmasked_index_has_the_arrays_of_before(copied: FolderStore) -> None:
    index = RawSource(copied, "train").blocks.index
    assert list(index.arrays) == ["start", "bytes", "records", "crc32"]
    assert b"".join(index_parts(index)) == copied.get(f"train/{INDEX}")
    assert b"place" not in copied.get(f"train/{NAME}")


@pytest.mark.seconds
def test_a_million_records_take_a_few_bytes_each(tmp_path: Path) -> None:
    """A Python object a record would take at least 50 MB."""
    store, view, each = FolderStore(tmp_path / "s"), FolderStore(tmp_path / "v"), 10_000
    shards = [_synthetic(store, number, each) for number in range(100)]
    kept = np.random.default_rng(0).random(each) < 0.8
    tracemalloc.start()
    units = [[shard] for shard in shards]
    write_split(store, "train/", units, {}, {}, lambda unit: np.roll(kept, unit))
    base = Base(
        store=store, split="train", keep=lambda _: np.arange(np.count_nonzero(kept)) % 5 > 0
    )
    manifest = write_view(view, "train/", [base], {}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    index = open_split(view, "train", RAW).index[0]
    assert index.mask is not None and index.pairs is not None
    assert index.mask.nbytes == -(-int(index.pairs.sum()) // 8)
    assert sum(array.itemsize for name, array in index.arrays.items() if name != "mask") == 24
    assert manifest.samples == int(index.records.sum()) == 100 * (kept.sum() - -(-kept.sum() // 5))


def _synthetic(store: FolderStore, number: int, records: int) -> Shard:
    """The index of an archive that does not exist."""
    sizes = np.full(records // 50, 50, np.uint32)
    ids = np.arange(number * records + 1, (number + 1) * records + 1, dtype=np.uint64)
    ids = (ids * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(1)
    starts = (np.cumsum(sizes) * 10).astype(np.uint64)
    index = BlockIndex(start=starts, bytes=sizes, records=sizes, crc32=sizes)
    data, place = dump_shard_index(index, ids), f"/none/{number}.tar"
    shard = Shard(
        name=f"shard-{number:06d}.tar",
        samples=records,
        blocks=len(index),
        bytes=1,
        sha256=sha256(place.encode()),
        etag="",
        index_sha256=sha256(data),
        place=place,
        archive=str(number),
    )
    path = store.root / "train" / shard.index_name  # without a sync of each file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return shard
