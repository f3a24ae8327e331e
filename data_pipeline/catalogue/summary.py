"""Counts, histograms, examples of rejects and the largest clusters of duplicates of a set."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data_pipeline.catalogue.query import Database

_EXAMPLES, _CLUSTERS = 5, 12
_SHORT = 200
"""Characters of a caption or reason that are shown."""


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """What a histogram counts."""

    title: str
    sql: str
    ends: Sequence[float] = ()
    """The largest value of each bin but the last; none = each value is a bin."""


_MEASURES = (
    _Measure(
        title="Shorter side, pixels",
        sql="least(width, height)",
        ends=(31, 63, 127, 255, 511, 1023, 2047),
    ),
    _Measure(
        title="Longer over shorter side",
        sql="greatest(width, height)::DOUBLE / least(width, height)",
        ends=(1, 1.25, 1.5, 2, 3),
    ),
    _Measure(
        title="Bytes of a picture",
        sql="bytes",
        ends=(3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000),
    ),
    _Measure(title="Format", sql="format"),
    _Measure(title="Captions of a picture", sql="len(captions)", ends=(1, 2, 4, 8, 16)),
    _Measure(title="Words of a caption", sql="words", ends=(1, 2, 4, 8, 16, 32, 64)),
    _Measure(
        title="Characters of a caption", sql="length(caption)", ends=(15, 31, 63, 127, 255, 511)
    ),
    _Measure(title="Language (guessed)", sql="language"),
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Pairs that are left out as duplicates of one pair."""

    key: str
    caption: str
    split: str
    size: int
    """With the first one."""
    is_kept: bool
    """Whether training reads the first one; a near duplicate of another pair may have its own."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A set in numbers; all but `rejects` and `clusters` are of kept pairs."""

    rows: int
    """Of the catalogue: pairs and rejects."""
    kept: dict[str, int]
    """By split."""
    rejects: dict[str, int]
    """By kind, the commonest first."""
    examples: dict[str, list[tuple[str, str]]]
    """(key, reason) of some rejects of each kind."""
    histograms: dict[str, dict[str, int]]
    """Title -> label of a bin -> pairs."""
    cluster_sizes: dict[str, int]
    """Size of a cluster of duplicates -> clusters."""
    clusters: list[Cluster]
    """The largest ones."""


def summarise(database: Database) -> Summary:
    """Read the catalogue a few times; the same set gives the same summary."""
    rejects = database.rows(
        "SELECT reject, count(*), min_by({'key': key, 'reason': reason}, (id, unit, place), "
        f"{_EXAMPLES}) FROM pairs WHERE reject IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    kept = database.rows("SELECT split, count(*) FROM pairs WHERE kept GROUP BY 1 ORDER BY 1")
    return Summary(
        rows=database.rows("SELECT count(*) FROM parts")[0][0],
        kept=dict(kept),
        rejects={kind: count for kind, count, _ in rejects},
        examples={
            kind: [(row["key"][:_SHORT], (row["reason"] or "")[:_SHORT]) for row in some]
            for kind, _, some in rejects
        },
        histograms=_histograms(database),
        cluster_sizes=_cluster_sizes(database),
        clusters=_clusters(database),
    )


def _histograms(database: Database) -> dict[str, dict[str, int]]:
    columns = ", ".join(
        f"histogram({m.sql}, {list(map(float, m.ends))})" if m.ends else f"histogram({m.sql})"
        for m in _MEASURES
    )
    row = database.rows(f"SELECT {columns} FROM pairs WHERE kept")[0]
    return {
        measure.title: _labelled(measure, counts or {})
        for measure, counts in zip(_MEASURES, row, strict=True)
    }


def _labelled(measure: _Measure, counts: dict[Any, int]) -> dict[str, int]:
    """Bins in order, without empty ones at both ends; values by their count."""
    if not measure.ends:
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    whole = all(end == int(end) for end in measure.ends)
    labels = [f"to {measure.ends[0]:,g}"]
    for low, high in pairwise(measure.ends):
        label = f"{low + 1:,g} to {high:,g}" if whole else f"over {low:g} to {high:g}"
        labels.append(f"{high:,g}" if whole and high == low + 1 else label)
    last = measure.ends[-1]
    labels.append(f"{last + 1:,g} and more" if whole else f"over {last:g}")
    bins = [*map(float, measure.ends), float("inf")]
    rows = [(label, counts.get(end, 0)) for label, end in zip(labels, bins, strict=True)]
    filled = [number for number, (_, count) in enumerate(rows) if count]
    return dict(rows[filled[0] : filled[-1] + 1]) if filled else {}


_SIZES = (
    "SELECT first_unit, first_place, count(*) + 1 AS size FROM pairs "
    "WHERE first_unit IS NOT NULL GROUP BY ALL"
)


def _cluster_sizes(database: Database) -> dict[str, int]:
    bins = (2, 3, 4, 8, 16, 64, 256, 1024)
    measure = _Measure(title="", sql="size", ends=bins)
    row = database.rows(f"SELECT histogram(size, {list(map(float, bins))}) FROM ({_SIZES})")[0]
    sizes = _labelled(measure, row[0] or {})
    return {
        label.removeprefix("to ") if label == "to 2" else label: n for label, n in sizes.items()
    }


def _clusters(database: Database) -> list[Cluster]:
    rows = database.rows(
        f"WITH largest AS ({_SIZES} ORDER BY size DESC, 1, 2 LIMIT {_CLUSTERS}) "
        "SELECT key, caption, split, size, kept FROM largest JOIN pairs "
        "ON pairs.unit = largest.first_unit AND pairs.place = largest.first_place "
        "ORDER BY size DESC, unit, place"
    )
    return [
        Cluster(key=key, caption=caption[:_SHORT], split=split, size=size, is_kept=kept)
        for key, caption, split, size, kept in rows
    ]
