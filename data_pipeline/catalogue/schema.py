"""The rows of a catalogue: facts about each pair, so that no picture is read a second time.

catalogue/<unit:06d>.parquet holds the rows of one unit of `tapir pack` in its order. Rows with a
`split`, in order, are the pairs of that split's blocks of the unit.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.keys import key_int
from data_pipeline.images.decode import LOOK_BITS, Inspected
from data_pipeline.sources.pair import Pair, Unusable, printable
from data_pipeline.text.language import guess_language

CATALOGUE = "catalogue/"
DIGEST_BYTES = 16
LOOK_BYTES = LOOK_BITS // 8
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), False),
        pa.field("id", pa.uint64(), False),
        pa.field("unit", pa.uint32(), False),
        pa.field("place", pa.uint32(), False),
        pa.field("source", pa.string(), False),
        pa.field("width", pa.uint32()),
        pa.field("height", pa.uint32()),
        pa.field("bytes", pa.uint32()),
        pa.field("format", pa.string()),
        pa.field("captions", pa.list_(pa.field("element", pa.string(), False)), False),
        pa.field("words", pa.uint32()),
        pa.field("language", pa.string()),
        pa.field("image_digest", pa.binary(DIGEST_BYTES)),
        pa.field("pair_digest", pa.binary(DIGEST_BYTES)),
        pa.field("perceptual_hash", pa.binary(LOOK_BYTES)),
        pa.field("split", pa.string()),
        pa.field("reject", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["format", "language", "split", "reject"],
    "store_schema": False,
}
"""Settings of every parquet file of a catalogue; few values are in a dictionary."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pair, or one reject; fields that are not known are None (`row_of`, `reject_row`)."""

    key: str
    source: str
    """Where it was read, for people."""
    width: int | None = None
    """Upright, in pixels."""
    height: int | None = None
    size: int | None = None
    """Bytes of the encoded picture."""
    format: str | None = None
    """png, jpg or webp."""
    captions: tuple[str, ...] = ()
    """Cleaned, as records of the set give them."""
    image_digest: bytes | None = None
    """Of the encoded picture."""
    pair_digest: bytes | None = None
    """Of the encoded picture and all its captions."""
    perceptual_hash: bytes | None = None
    split: str | None = None
    """The split whose blocks hold the pair; None if no block does."""
    reject: str | None = None
    """Kind of the reject; None = kept by its unit."""
    reason: str | None = None


def row_of(
    pair: Pair,
    captions: Sequence[str],
    image: Inspected | None,
    split: str | None,
    reject: Unusable | None = None,
) -> Row:
    """The row of a pair, with its digests: about 1 ms a MB, without the GIL.

    `image` is None for a picture that does not decode; `reject` says why the unit leaves it out.
    """
    digest = hashlib.blake2b(pair.image, digest_size=DIGEST_BYTES).digest()
    text = "\n".join(captions).encode()
    return Row(
        key=pair.key,
        source=pair.where,
        width=image.width if image else None,
        height=image.height if image else None,
        size=len(pair.image),
        format=pair.extension,
        captions=tuple(captions),
        image_digest=digest,
        pair_digest=hashlib.blake2b(digest + text, digest_size=DIGEST_BYTES).digest(),
        perceptual_hash=image.look if image else None,
        split=split,
        reject=reject.kind if reject else None,
        reason=reject.reason if reject else None,
    )


def reject_row(reject: Unusable, split: str | None = None) -> Row:
    """The row of a file, member or table row that is no pair."""
    return Row(
        key=reject.key, source=reject.key, split=split, reject=reject.kind, reason=reject.reason
    )


class CatalogueWriter:
    """Collects the rows of one unit; equal rows give equal bytes."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._columns: list[list[Any]] = [[] for _ in SCHEMA.names]
        self.rows = 0

    def add(self, row: Row) -> None:
        """Append a row; its `place` is the number of rows before it."""
        key, caption = printable(row.key), row.captions[0] if row.captions else None
        values = (
            *(key, key_int(key), self._unit, self.rows, printable(row.source)),
            *(row.width, row.height, row.size, row.format, row.captions),
            None if caption is None else len(caption.split()),
            None if caption is None else guess_language(caption),
            *(row.image_digest, row.pair_digest, row.perceptual_hash, row.split, row.reject),
            None if row.reason is None else printable(row.reason),
        )
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self.rows += 1

    def finish(self) -> bytes:
        """The unit's parquet file."""
        return to_parquet(pa.table(dict(zip(SCHEMA.names, self._columns, strict=True)), SCHEMA))


def to_parquet(table: pa.Table) -> bytes:
    """Serialise a table; equal tables give equal bytes with one version of pyarrow."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, **PARQUET) as writer:
        writer.write_table(table)
    return bytes(buffer.getvalue())


def part_name(unit: int) -> str:
    """Name of a unit's rows in the set."""
    return f"{CATALOGUE}{unit:06d}.parquet"
