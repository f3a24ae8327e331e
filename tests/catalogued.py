"""Small raw sets with a catalogue, as a pack job makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.keys import key_int
from core.storage.store import FolderStore, Store
from data_pipeline.catalogue.duplicates import duplicates
from data_pipeline.catalogue.parts import FACT, part_of, put_catalogue
from data_pipeline.catalogue.schema import CatalogueWriter, reject_row, row_of
from data_pipeline.config import FilterConfig
from data_pipeline.formats.manifest import SPLITS, Manifest, Shard
from data_pipeline.formats.raw_set import write_split
from data_pipeline.formats.shards import build_tar, describe, list_members
from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import inspect
from data_pipeline.sources.pair import Unusable, make_pair

BLOCK = 4
BOTH = FilterConfig(duplicates=True, near=3)


@dataclass(kw_only=True)
class Made:
    """A pair to write."""

    key: str
    caption: str
    picture: int
    """Pictures of one number are equal."""
    split: str | None = "train"
    reject: Unusable | None = None
    side: int = 24


def picture(number: int, side: int = 24) -> bytes:
    """A PNG of its own content."""
    draw = np.random.default_rng(number)
    return encode_png(draw.integers(0, 256, (side, side + number % 5, 3), np.uint8))


def made(count: int) -> list[Made]:
    """Pairs in both splits: each tenth repeats the pair before it, or only its picture."""
    rows = []
    for number in range(count):
        split = "validation" if number % 7 == 6 else "train"
        caption = f"a picture of the number {number} on the wall"
        rows.append(Made(key=f"k{number:03d}", caption=caption, picture=number, split=split))
        if number % 10 == 9:
            rows[-1].picture = number - 1
            rows[-1].caption = rows[-2].caption if number % 20 == 19 else "another caption"
    return rows


def catalogued_set(
    store: Store, folder: Path, units: Sequence[Sequence[Made]], filters: FilterConfig = BOTH
) -> dict[str, Manifest]:
    """Write the units' shards and rows, and the end of the set; `folder` is temporary."""
    shards: dict[str, list[list[Shard]]] = {name: [] for name in SPLITS}
    parts, paths = [], []
    for unit, rows in enumerate(units):
        data = _catalogue(unit, rows)
        part = part_of(unit, len(rows), data)
        store.put(part.name, data)
        parts.append(part)
        paths.append(folder / f"{unit}.parquet")
        paths[-1].write_bytes(data)
        for name in SPLITS:
            here = [row for row in rows if row.split == name and row.reject is None]
            shards[name].append([_shard(store, name, unit, here)] if here else [])
    verdict = duplicates(paths, filters, folder)
    digest = put_catalogue(store, parts, verdict.left_out())
    return {
        name: write_split(
            *(store, f"{name}/", shards[name], {"split": name, FACT: digest}, verdict.counts),
            lambda unit, name=name: verdict.masks(unit).get(name),
        )
        for name in SPLITS
    }


def _catalogue(unit: int, rows: Sequence[Made]) -> bytes:
    writer = CatalogueWriter(unit)
    for row in rows:
        if row.reject and row.split is None:
            writer.add(reject_row(row.reject))
            continue
        image = picture(row.picture, row.side)
        pair = make_pair(row.key, image, ".png", b"", f"unit {unit}, {row.key}")
        writer.add(row_of(pair, (row.caption,), inspect(image, "x"), row.split, row.reject))
    return writer.finish()


def _shard(store: Store, split: str, unit: int, rows: Sequence[Made]) -> Shard:
    tar = build_tar(
        [
            {
                "__key__": row.key,
                "png": picture(row.picture, row.side),
                "txt": row.caption.encode(),
            }
            for row in rows
        ]
    )
    ends = [member.end for member in list_members(tar)][1::2]
    starts = [0, *ends]
    ranges = [
        (starts[i], ends[min(i + BLOCK, len(ends)) - 1] - starts[i], len(ends[i : i + BLOCK]))
        for i in range(0, len(ends), BLOCK)
    ]
    name = f"shard-{unit:06d}.tar"
    store.put(f"{split}/{name}", tar)
    ids = np.array([key_int(row.key) for row in rows], np.uint64)
    return describe(store, f"{split}/", name, tar, ranges, ids)


def small_set(
    tmp_path: Path, name: str = "set", filters: FilterConfig = BOTH
) -> tuple[FolderStore, list[Made]]:
    """80 pairs in three units, with duplicates, near ones and rejects."""
    rows = made(80)
    rows.insert(3, Made(key="x", caption="", picture=0, split=None, reject=_LINK))
    rows.insert(50, Made(key="y", caption="a b", picture=0, split=None, reject=_SMALL))
    store = FolderStore(tmp_path / name)
    work = tmp_path / f"{name}-work"
    work.mkdir()
    catalogued_set(store, work, [rows[:30], rows[30:60], rows[60:]], filters)
    return store, rows


_LINK = Unusable(key="x", kind="file", reason="x is a link")
_SMALL = Unusable(key="y", kind="small", reason="24x24, min_side=256")
