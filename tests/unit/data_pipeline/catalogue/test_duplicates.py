"""Duplicates of a whole set, against the definition in plain Python."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from data_pipeline.catalogue import near, partition
from data_pipeline.catalogue.duplicates import duplicates
from data_pipeline.catalogue.near import (
    BANDS,
    bands_of,
    distinct,
    edges_of,
    ends_of,
    keep_first,
    near_edges,
)
from data_pipeline.catalogue.schema import CatalogueWriter, Row
from data_pipeline.catalogue.verdict import CONDITION, DUPLICATE, KEPT, KEY, NEAR, REJECTED, Verdict
from data_pipeline.config import FilterConfig
from data_pipeline.images.decode import FLAT_LOOKS

BOTH = FilterConfig(duplicates=True, near=3)


def _rows(count: int, seed: int = 0) -> list[Row]:
    """Rows with planted repeats of keys, pairs and hashes, chains, flat pictures and rejects."""
    draw = np.random.default_rng(seed)
    rows: list[Row] = []
    for number in range(count):
        key, pair, look = f"k{number}", draw.bytes(16), draw.bytes(16)
        kind = draw.integers(10)
        if rows and kind < 5:
            other = rows[draw.integers(max(0, number - 2000), number)]
            key = other.key if kind == 0 else key
            pair = other.pair_digest or pair if kind in (0, 1) else pair
            flips = 0 if kind == 1 else int(draw.integers(6))
            look = _flipped(other.perceptual_hash or look, flips, draw)
        if kind == 9 and draw.random() < 0.1:
            look = _flipped(FLAT_LOOKS[draw.integers(4)], int(draw.integers(12)), draw)
        rejected = kind == 8 and draw.random() < 0.2
        rows.append(
            Row(
                key=key,
                source=f"row {number}",
                captions=("a caption",),
                pair_digest=pair,
                perceptual_hash=look,
                split="validation" if kind == 7 else "train",
                reject="small" if rejected else None,
                reason="too small" if rejected else None,
            )
        )
    return rows


def _flipped(look: bytes, bits: int, draw: np.random.Generator) -> bytes:
    number = int.from_bytes(look, "little")
    for bit in draw.choice(128, bits, replace=False).tolist():
        number ^= 1 << bit
    return number.to_bytes(16, "little")


def _parts(rows: list[Row], folder: Path, each: int) -> list[Path]:
    """Units of `each` rows; the third has none."""
    cuts = [rows[i : i + each] for i in range(0, len(rows), each)]
    cuts.insert(2, [])
    paths = []
    for unit, cut in enumerate(cuts):
        writer = CatalogueWriter(unit)
        for row in cut:
            writer.add(row)
        paths.append(folder / f"{unit:06d}.parquet")
        paths[-1].write_bytes(writer.finish())
    return paths


def _is_flat(look: bytes) -> bool:
    number = int.from_bytes(look, "big")
    return any((number ^ int.from_bytes(flat, "big")).bit_count() <= 8 for flat in FLAT_LOOKS)


def _by_definition(rows: list[Row], config: FilterConfig) -> list[tuple[int, int]]:
    """(kind, first row) of each row, one row after another, compared with all before it."""
    keys: dict[str, int] = {}
    pairs: dict[bytes, int] = {}
    low, high = np.zeros((2, len(rows)), np.uint64)
    kept: list[int] = []
    result = []
    for number, row in enumerate(rows):
        kind, first = KEPT, 0
        if row.reject:
            result.append((REJECTED, 0))
            continue
        if keys.setdefault(row.key, number) != number:
            kind, first = KEY, keys[row.key]
        elif config.duplicates and pairs.setdefault(row.pair_digest, number) != number:
            kind, first = DUPLICATE, pairs[row.pair_digest]
        elif config.near >= 0 and not _is_flat(row.perceptual_hash or b""):
            look = np.frombuffer(row.perceptual_hash or b"", "<u8")
            bits = np.bitwise_count(low[: len(kept)] ^ look[0])
            bits += np.bitwise_count(high[: len(kept)] ^ look[1])
            near_ones = np.flatnonzero(bits <= config.near)
            if len(near_ones):
                kind, first = NEAR + int(bits[near_ones[0]]), kept[near_ones[0]]
            else:
                low[len(kept)], high[len(kept)] = look
                kept.append(number)
        result.append((kind, first))
    return result


def _result(verdict: Verdict) -> list[tuple[int, int]]:
    return list(zip(verdict.kinds.tolist(), verdict.firsts.tolist(), strict=True))


def test_20000_pairs_with_planted_ones_equal_the_definition(tmp_path: Path) -> None:
    rows = _rows(20_000)
    verdict = duplicates(_parts(rows, tmp_path, 3000), BOTH)
    assert _result(verdict) == _by_definition(rows, BOTH)
    planted = np.delete(np.bincount(verdict.kinds), CONDITION)
    assert all(planted > 100) and verdict.kinds.max() == NEAR + 3, "some kind was not planted"
    assert not verdict.crowded.skipped


@pytest.mark.parametrize(
    "config",
    [
        FilterConfig(),
        FilterConfig(duplicates=True),
        *(FilterConfig(near=bits) for bits in range(4)),
        FilterConfig(duplicates=True, near=1),
    ],
    ids=str,
)
def test_every_setting_equals_the_definition_in_many_partitions(
    config: FilterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partitions of 64 rows, written 100 at a time, and band values of 2 are cut further."""
    monkeypatch.setattr(partition, "PARTITION_ROWS", 64)
    monkeypatch.setattr(partition, "_TOGETHER", 100)
    monkeypatch.setattr(near, "RUN", 2)
    rows = _rows(1500, seed=1)
    for threads in (1, 3):
        verdict = duplicates(_parts(rows, tmp_path, 400), config, tmp_path, threads)
        assert _result(verdict) == _by_definition(rows, config)
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}, "temporary files are left"


@pytest.mark.parametrize("values", [[], [3], [5, 1, 5, 1, 2], [2**64 - 1, 0, 0]])
def test_distinct_values_are_those_of_numpy(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    assert distinct(array).tolist() == np.unique(array).tolist()


def test_partitions_keep_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion rows have three times 512 partitions: more files than a process may open."""
    monkeypatch.setattr(partition, "PARTITION_ROWS", 8)
    kind, draw = np.dtype([("key", "<u8"), ("row", "<u4")]), np.random.default_rng(0)
    rows = np.zeros(1000, kind)
    rows["key"], rows["row"] = draw.integers(0, 2**63, 1000), np.arange(1000)
    before = os.listdir("/proc/self/fd")
    with partition.Partitions(tmp_path, "x", kind, len(rows)) as partitions:
        for part in np.split(rows, 4):
            partitions.add(part["key"], part)
            partitions.flush()
        assert len(partitions) == 128 and os.listdir("/proc/self/fd") == before
        parts = [partitions.part(number) for number in range(len(partitions))]
        stored = np.concatenate(parts)
        assert all((np.diff(part["row"].astype(int)) > 0).all() for part in parts)
    assert (np.sort(stored, order="row") == rows).all() and not list(tmp_path.iterdir())


def _words(looks: list[int]) -> NDArray[np.uint64]:
    data = b"".join(look.to_bytes(16, "little") for look in looks)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def _as_set(edges: NDArray[np.uint64]) -> set[tuple[int, ...]]:
    """(earlier, later, bits) of each edge; none is twice."""
    rows = list(zip(*(part.tolist() for part in ends_of(edges)), strict=True))
    assert len(set(rows)) == len(rows)
    return set(rows)


def _all_edges(looks: NDArray[np.uint64], band: int, most: int) -> set[tuple[int, ...]]:
    bits = np.bitwise_count(looks[:, None] ^ looks[None]).sum(2)
    same = bands_of(looks, band)[:, None] == bands_of(looks, band)[None]
    near_ones = np.argwhere(np.triu(same & (bits <= most), 1)).tolist()
    return {(one, other, int(bits[one, other])) for one, other in near_ones}


@pytest.mark.parametrize("band", range(BANDS))
def test_a_crowded_band_value_is_cut_further_without_a_loss(band: int) -> None:
    """600 hashes share a band: 120 groups of 5 near ones, and 40 mutual neighbours."""
    draw = np.random.default_rng(band)
    own = ((1 << 32) - 1) << (32 * band)
    looks = []
    for _ in range(120):
        base = int.from_bytes(draw.bytes(16), "little")
        others = [int.from_bytes(_flipped(base.to_bytes(16, "little"), 3, draw)) for _ in range(4)]
        looks += [look & ~own for look in [base, *others]]
    looks = list(dict.fromkeys(looks + [1 << bit & ~own for bit in range(128)]))
    words = _words(looks)
    edges, crowded = near_edges(words, np.arange(len(words), dtype=np.uint32), band, 3)
    assert _as_set(edges) == _all_edges(words, band, 3)
    assert len(edges) and not crowded.skipped


def test_the_cap_compares_each_hash_with_the_next_ones_and_counts_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 hashes of six bits in one byte agree in band 0 and in three of four parts of the rest."""
    monkeypatch.setattr(near, "CROWD", 10)
    words = _words([value << 120 for value in range(64)])
    edges, crowded = near_edges(words, np.arange(64, dtype=np.uint32), 0, 3)
    capped = {edge for edge in _all_edges(words, 0, 3) if edge[1] - edge[0] <= 10}
    assert _as_set(edges) == capped
    assert (crowded.values, crowded.hashes) == (3, 3 * 64)
    assert crowded.skipped == 3 * sum(range(64 - 10))


def test_rows_are_dropped_in_order() -> None:
    """1-2-3-4 is a chain; 5 is near 2, which is dropped, and 6 near 3 and 1, which are kept."""
    rows = [(1, 2, 1), (2, 3, 2), (3, 4, 3), (2, 5, 1), (3, 6, 1), (1, 6, 2), (5, 9, 1)]
    edges = np.sort(edges_of(*np.array(rows).T))
    assert _as_set(keep_first(edges, 10)) == {(1, 2, 1), (3, 4, 3), (1, 6, 2), (5, 9, 1)}


def test_edges_hold_the_largest_rows() -> None:
    rows = np.array([2**31 - 1, 0, 5]), np.array([2**31 - 2, 2**31 - 1, 4]), np.array([3, 1, 0])
    expected = {(2**31 - 2, 2**31 - 1, 3), (0, 2**31 - 1, 1), (4, 5, 0)}
    assert _as_set(edges_of(*rows)) == expected


def test_rows_that_are_left_out_name_the_first_one(tmp_path: Path) -> None:
    look = bytes(range(16))
    facts = {"captions": ("a",), "split": "train"}
    rows = [
        Row(key="a", source="A", pair_digest=b"1" * 16, perceptual_hash=look, **facts),
        Row(key="x", source="X", reject="image", reason="damaged"),
        Row(key="b", source="B", pair_digest=b"1" * 16, perceptual_hash=look, **facts),
        Row(key="a", source="C", pair_digest=b"2" * 16, perceptual_hash=look, **facts),
        Row(
            key="d", source="D", pair_digest=b"3" * 16, perceptual_hash=look[:-1] + b"\x0c", **facts
        ),
        Row(key="e", source="E", pair_digest=b"4" * 16, perceptual_hash=b"e" * 16, **facts),
    ]
    verdict = duplicates(_parts(rows, tmp_path, 2), BOTH)
    columns = ["unit", "place", "key", "reject", "reason", "first_unit", "first_place"]
    table = pa.concat_tables(verdict.left_out())
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == [
        (1, 0, "b", "duplicate", "the same pair as a", 0, 0),
        (1, 1, "a", "key", "the key 'a' (C) occurs twice; give it another name", 0, 0),
        (3, 0, "d", "near-duplicate", "2 of 128 bits from a", 0, 0),
    ]
    assert verdict.counts == {"key": 1, "duplicate": 1, "near-duplicate": 1}
    masks = [verdict.masks(part) for part in range(4)]
    assert [{name: mask.tolist() for name, mask in part.items()} for part in masks] == [
        {"train": [True]},
        {"train": [False, False]},
        {},
        {"train": [False, True]},
    ]
