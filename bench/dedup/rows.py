"""The synthetic catalogue: parts of 10,000 rows, with planted duplicates of either kind.

Rows are drawn in chunks, each by its own key. The first hundredth of a chunk are originals; of the
last two hundredths, one copies the pairs of an earlier chunk's originals, and one has their hashes
with one to three bits changed.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bench.dedup.looks import draw_looks, flipped
from bench.support.sizes import sized
from core.keys import key_int
from data_pipeline.catalogue.schema import SCHEMA, to_parquet

SEED = 0
UNIT_ROWS = 10_000
NEAR = 3
_ODD = np.uint64(0x9E3779B97F4A7C15)

Words = NDArray[np.uint64]


def chunk_rows() -> int:
    """Rows that are drawn together."""
    return sized(1_000_000, 10_000)


def planted_rows() -> int:
    """Originals of a chunk, and its copies of either kind."""
    return chunk_rows() // 100


def source_of(chunk: int) -> int:
    """The earlier chunk whose originals a chunk copies."""
    return key_int(SEED, chunk, "source") % chunk


def originals(chunk: int) -> tuple[Words, Words]:
    """Pair digests and hashes of a chunk's originals. Shapes: (n, 2) each."""
    draw = np.random.default_rng(key_int(SEED, chunk, "originals"))
    return draw.integers(0, 2**63, (planted_rows(), 2), np.uint64), draw_looks(planted_rows(), draw)


def drawn(chunk: int) -> tuple[Words, Words]:
    """Pair digests and hashes of all rows of a chunk."""
    draw = np.random.default_rng(key_int(SEED, chunk, "rows"))
    count, some = chunk_rows(), planted_rows()
    pairs = draw.integers(0, 2**63, (count, 2), np.uint64)
    looks = draw_looks(count, draw)
    pairs[:some], looks[:some] = originals(chunk)
    if chunk:
        pair, look = originals(source_of(chunk))
        pairs[-2 * some : -some], looks[-2 * some : -some] = pair, look
        looks[-some:] = flipped(look, NEAR, draw)
    return pairs, looks


def part_path(folder: Path, unit: int) -> Path:
    """The file of a unit."""
    return folder / f"{unit:06d}.parquet"


def write_chunk(folder: Path, chunk: int) -> None:
    """Write the parts of a chunk."""
    pairs, looks = drawn(chunk)
    first = chunk * chunk_rows()
    for begin in range(0, len(pairs), UNIT_ROWS):
        rows = np.arange(first + begin, first + begin + UNIT_ROWS, dtype=np.uint64)
        unit = int(rows[0]) // UNIT_ROWS
        table = _table(unit, rows, *(part[begin : begin + UNIT_ROWS] for part in (pairs, looks)))
        temporary = folder / f".{unit:06d}"
        temporary.write_bytes(to_parquet(table))
        temporary.replace(part_path(folder, unit))


def _table(unit: int, rows: Words, pairs: Words, looks: Words) -> pa.Table:
    count = len(rows)
    columns: dict[str, pa.Array] = {
        "key": pc.binary_join_element_wise("k", pa.array(rows).cast(pa.string()), ""),
        "id": pa.array(rows * _ODD >> np.uint64(1)),
        "unit": pa.array(np.full(count, unit, np.uint32)),
        "place": pa.array(np.arange(count, dtype=np.uint32)),
        "captions": pa.array([["a picture"]] * count, SCHEMA.field("captions").type),
        "pair_digest": _binary(pairs),
        "perceptual_hash": _binary(looks),
    }
    texts = {"source": "synthetic", "format": "jpg", "language": "en", "split": "train"}
    columns |= {name: pa.repeat(text, count) for name, text in texts.items()}
    numbers = {"width": 512, "height": 384, "bytes": 50_000, "words": 2}
    columns |= {name: pa.repeat(pa.scalar(n, pa.uint32()), count) for name, n in numbers.items()}
    columns |= {
        field.name: pa.nulls(count, field.type) for field in SCHEMA if field.name not in columns
    }
    return pa.table(columns, SCHEMA)


def _binary(words: Words) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(words).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(words), [None, buffer])
