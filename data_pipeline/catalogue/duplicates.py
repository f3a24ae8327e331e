"""Which pairs of a whole set are left out: a key that occurs twice, exact and near duplicates.

The rows of all units are numbered in order, and the first of equal ones is kept:

- key: the id of the key is that of an earlier row;
- duplicate: picture and captions equal those of an earlier row;
- near-duplicate: the perceptual hash differs in at most `near` bits from that of an earlier row
  that is kept. Of a chain A, B, C in which only neighbours are near, B is dropped for A, and C is
  kept, since B is not. Hashes of nearly flat pictures and ramps (FLAT_BITS) are near nothing.

Rows that their unit leaves out take no part, and a row is compared only if it was kept so far.
Memory: 6 bytes a row, 16 a near pair, and a few partitions of 2 million rows.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from core.log import LOG
from data_pipeline.catalogue.near import (
    Crowded,
    Edges,
    Words,
    bands_of,
    distinct,
    ends_of,
    is_flat,
    keep_first,
    near_edges,
)
from data_pipeline.catalogue.partition import Partitions
from data_pipeline.catalogue.verdict import (
    DUPLICATE,
    KEPT,
    KEY,
    NEAR,
    REJECTED,
    Verdict,
    is_kept_by_unit,
    read_part,
)
from data_pipeline.config import FilterConfig
from data_pipeline.formats.fetch import fetched
from data_pipeline.images.decode import BANDS

_ID = np.dtype([("key", "<u8", (1,)), ("row", "<u4")])
_DIGEST = np.dtype([("key", "<u8", (2,)), ("row", "<u4")])
_ODD = np.uint64(0xC2B2AE3D27D4EB4F)
_COLUMNS = ["id", "pair_digest", "perceptual_hash", "split", "reject"]


def duplicates(
    parts: Sequence[Path], config: FilterConfig, work: Path | None = None, threads: int = 2
) -> Verdict:
    """Decide which rows of a set are left out; `config` says whether exact and near ones are.

    `parts` are the units' parquet files in order, on a local disk.
    Raises: as `drop_duplicates`; InputError for more than 2**31 rows.
    """
    verdict = Verdict.all_kept(parts)
    drop_duplicates(verdict, config, work, threads)
    return verdict


def drop_duplicates(
    verdict: Verdict, config: FilterConfig, work: Path | None = None, threads: int = 2
) -> None:
    """`duplicates` among the rows that a verdict keeps so far.

    `work` is a folder for up to 60 bytes a row of temporary files (TMPDIR).
    Raises: OSError if the disk is full.
    """
    with TemporaryDirectory(prefix="tapir-duplicates-", dir=work) as folder:
        _Search(verdict, config, Path(folder), threads).run()
    if verdict.crowded.skipped:
        LOG.warning(
            "%d comparisons for near duplicates were not made: too many pictures share a part of "
            "their hash",
            verdict.crowded.skipped,
        )


class _Search:
    """The passes over the rows of a set."""

    def __init__(self, verdict: Verdict, config: FilterConfig, work: Path, threads: int) -> None:
        self._verdict, self._config, self._work, self._threads = verdict, config, work, threads
        self._kinds, self._firsts = verdict.kinds, verdict.firsts

    def run(self) -> None:
        """Partition the rows by what makes them equal, then decide in each partition."""
        rows = len(self._kinds)
        with Partitions(self._work, "look", _DIGEST, rows) as looks:
            with (
                Partitions(self._work, "id", _ID, rows) as ids,
                Partitions(self._work, "pair", _DIGEST, rows) as pairs,
            ):
                self._read(ids, pairs, looks)
                self._drop_repeated(ids, KEY)
                self._drop_repeated(pairs, DUPLICATE)
            self._drop_repeated(looks, NEAR)
            self._drop_near(looks)

    def _read(self, ids: Partitions, pairs: Partitions, looks: Partitions) -> None:
        parts = self._verdict.parts
        tables = fetched(lambda part: read_part(part, _COLUMNS), parts, self._threads)
        for number, table in enumerate(tables):
            start, kinds = self._verdict.starts[number], self._verdict.of_part(number)
            kinds[~is_kept_by_unit(table)] = REJECTED
            places = np.flatnonzero(kinds == KEPT)
            rows = (places + start).astype(np.uint32)
            _add(ids, words_of(table["id"], 1)[places], rows)
            if self._config.duplicates:
                _add(pairs, words_of(table["pair_digest"], 2)[places], rows)
            if self._config.near >= 0:
                keys = words_of(table["perceptual_hash"], 2)[places]
                tells = ~is_flat(keys)
                _add(looks, keys[tells], rows[tells])
        for partitions in (ids, pairs, looks):
            partitions.flush()

    def _drop_repeated(self, partitions: Partitions, kind: int) -> None:
        """Drop rows with the key of an earlier one; leave the first rows in the partitions."""

        def drop(number: int) -> None:
            rows = partitions.part(number)
            rows = rows[self._kinds[rows["row"]] == KEPT]
            later, first = _repeated(rows["key"], rows["row"])
            self._kinds[later], self._firsts[later] = kind, first
            if kind == NEAR:
                partitions.replace(number, rows[self._kinds[rows["row"]] == KEPT])

        for _ in fetched(drop, range(len(partitions)), self._threads):
            pass

    def _drop_near(self, looks: Partitions) -> None:
        """Drop rows near an earlier, kept one; `looks` has the first row of each hash."""
        edges = np.empty(0, np.uint64)
        for band in range(BANDS if self._config.near > 0 else 0):
            with Partitions(self._work, "band", _DIGEST, len(self._kinds)) as partitions:
                parts = fetched(looks.part, range(len(looks)), self._threads)
                for rows in parts:
                    partitions.add(bands_of(rows["key"], band), rows)
                partitions.flush()
                edges = distinct(np.concatenate([edges, *self._edges(partitions, band)]))
        earlier, later, bits = ends_of(keep_first(edges, len(self._kinds)))
        same = np.flatnonzero(self._kinds == NEAR)
        self._kinds[later], self._firsts[later] = NEAR + bits, earlier
        moved = same[self._kinds[self._firsts[same]] >= NEAR]  # their first is near another row
        first = self._firsts[moved]
        self._kinds[moved], self._firsts[moved] = self._kinds[first], self._firsts[first]

    def _edges(self, partitions: Partitions, band: int) -> list[Edges]:
        """The near pairs of each partition of a band."""

        def compare(number: int) -> tuple[Edges, Crowded]:
            rows = partitions.part(number)
            return near_edges(rows["key"], rows["row"], band, self._config.near)

        results = list(fetched(compare, range(len(partitions)), self._threads))
        for _, crowded in results:
            self._verdict.crowded.add(crowded)
        return [edges for edges, _ in results]


def _add(partitions: Partitions, keys: Words, rows: NDArray[np.uint32]) -> None:
    records = np.empty(len(rows), _ID if keys.shape[1] == 1 else _DIGEST)
    records["key"], records["row"] = keys, rows
    partitions.add(keys[:, 0] ^ (keys[:, -1] * _ODD), records)


def _repeated(
    keys: Words, rows: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Rows whose key an earlier row has, and the first row of each one's key."""
    heads = np.sort(keys[:, 0])
    several = distinct(heads[1:][heads[1:] == heads[:-1]])
    if not len(several):
        return np.empty(0, np.uint32), np.empty(0, np.uint32)
    places = np.searchsorted(several, keys[:, 0])
    some = several[np.minimum(places, len(several) - 1)] == keys[:, 0]
    keys, rows = keys[some], rows[some]
    order = np.lexsort((rows, *keys.T))
    keys, rows = keys[order], rows[order]
    is_first = np.concatenate([[True], (keys[1:] != keys[:-1]).any(1)])
    firsts = rows[is_first][np.cumsum(is_first) - 1]
    return rows[~is_first], firsts[~is_first]


def words_of(column: pa.ChunkedArray, count: int) -> Words:
    """Numbers, or binary values, as 64-bit words. Shapes: n -> (n, count); nulls are any words."""
    parts = [
        np.frombuffer(chunk.buffers()[1], "<u8")[chunk.offset * count :][: len(chunk) * count]
        for chunk in column.chunks
        if len(chunk)
    ]
    joined: Words = np.concatenate([np.empty(0, "<u8"), *parts])
    return joined.reshape(-1, count)
