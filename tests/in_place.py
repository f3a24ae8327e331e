"""Sets in place from hand-made tars, as a pack job with one worker makes them."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bench.support.counted import CountedStore
from core.errors import InputError
from core.keys import key_int
from core.storage.store import Store
from data_pipeline.config import FilterConfig
from data_pipeline.formats.in_place import InPlaceUnit, split_of_block
from data_pipeline.formats.manifest import SPLITS, Manifest, Shard
from data_pipeline.formats.raw import RawRecord, RawSource, caption_rules
from data_pipeline.formats.raw_set import Keep, keep_all, write_split
from data_pipeline.formats.views.masks import Kept
from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import inspect
from data_pipeline.packing.filters import caption_reject
from data_pipeline.sources.pair import Pair
from data_pipeline.streaming.stream import stored_records
from data_pipeline.text.captions import clean_captions

Members = Iterable[tuple[str, bytes]]
BLOCK = 4


def noise(number: int, side: int = 24) -> bytes:
    """A PNG of its own content."""
    rng = np.random.default_rng(number)
    return encode_png(rng.integers(0, 256, (side, side + number % 5, 3), np.uint8))


def img2dataset(first: int, count: int, side: int = 24) -> list[tuple[str, bytes]]:
    """Members of a tar of img2dataset: KEY.jpg, KEY.json, KEY.txt; the names have no folder."""
    rows: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        note = {"key": f"{i:09d}", "status": "success", "width": side, "url": f"http://x/{i}"}
        rows += [
            (f"{i:09d}.png", noise(i, side)),
            (f"{i:09d}.json", json.dumps(note).encode()),
            (f"{i:09d}.txt", f"Picture number {i}".encode()),
        ]
    return rows


def tar_bytes(members: Members, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def in_place_unit(
    dest: Store,
    number: int,
    path: Path,
    *,
    block: int = BLOCK,
    validation: float = 0.25,
    filters: FilterConfig = FilterConfig(),  # noqa: B008 - frozen
    etag: str = "",
    place: str = "",
) -> dict[str, Shard]:
    """Index one tar; pairs that `pack` would refuse are masked."""

    def split_of(index: int) -> str:
        return split_of_block(0, path.stem, index, validation)

    with open(path, "rb") as stream:
        unit = InPlaceUnit(stream, place or str(path), path.stem, block=block, split_of=split_of)
        pairs = [item for item, _ in unit if isinstance(item, Pair)]
    ids = np.asarray([key_int(pair.key) for pair in pairs], np.uint64)
    kept = np.asarray([_is_usable(pair, filters) for pair in pairs], np.bool_)
    rules = caption_rules(filters)
    return unit.write(dest, number, etag=etag, ids=ids, kept=kept, captions=rules)


def _is_usable(pair: Pair, filters: FilterConfig) -> bool:
    try:
        captions = clean_captions(pair.caption, pair.where)
        inspect(pair.image, pair.where)
    except InputError:
        return False
    return any(caption_reject(caption, filters) is None for caption in captions)


def in_place_set(
    dest: Store,
    tars: Sequence[Path],
    keep: Callable[[str], Keep] = lambda split: keep_all,
    where: Mapping[Path, tuple[str, str]] = MappingProxyType({}),
    **options: Any,
) -> dict[str, Manifest]:
    """Both splits of a set in place; `where`: (URL, ETag) of tars that are in a store."""
    units = []
    for number, path in enumerate(tars):
        place, etag = where.get(path, ("", ""))
        units.append(in_place_unit(dest, number, path, place=place, etag=etag, **options))
    return {
        split: write_split(
            *(dest, f"{split}/", [[u[split]] if split in u else [] for u in units]),
            *({"split": split}, {}, keep(split)),
        )
        for split in SPLITS
    }


def records_of(store: Store, splits: Sequence[str] = SPLITS) -> list[RawRecord]:
    """All records of a set, by key."""
    rows = [r for split in splits for r in stored_records(RawSource(store, split))]
    return sorted(rows, key=lambda record: record.key)


def written(folder: Path, name: str, members: Members) -> Path:
    """A tar in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(tar_bytes(members))
    return path


def kept_by(store: Store, split: str, some: Callable[[str], bool]) -> Keep:
    """Keeps, of each shard, the records whose key is chosen."""
    source = RawSource(store, split)

    @cache
    def keep(number: int) -> Kept:
        blocks = range(*source.blocks.blocks_of(number))
        return np.asarray([some(r.key) for b in blocks for r in source.read(b)], np.bool_)

    return keep


def epoch(store: Store, opened: list[CountedStore]) -> tuple[float, float]:
    """(GETs, bytes) a record of reading each block of the train split once.

    `opened`: the stores of other places, which opening them appends.
    """
    opened.clear()
    own = CountedStore(store)
    source = RawSource(own, "train")
    before, read_before = own.requests["GET"], own.bytes_read
    records = sum(len(source.read(block)) for block in range(len(source.sizes)))
    gets = own.requests["GET"] - before + sum(s.requests["GET"] for s in opened)
    read = own.bytes_read - read_before + sum(s.bytes_read for s in opened)
    return gets / records, read / records
