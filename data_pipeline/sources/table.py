"""Pairs from a parquet table: each row has a caption, and a picture or its local path."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.sources.files import MOST_BYTES
from data_pipeline.sources.names import extension_of
from data_pipeline.sources.pair import Pair, Unusable, key_of, make_pair, unusable
from data_pipeline.text.captions import joined

PICTURES = ("jpg", "png", "webp", "image")
"""Column names of encoded pictures, as written by img2dataset and the Hugging Face hub."""
PLACES = ("path", "file", "image_path", "url")
CAPTIONS = ("caption", "captions", "text")
_BYTES_TOGETHER = 32
_ROWS = 1024


class _RowError(Exception):
    """Why a row is not a pair."""


def table_pairs(paths: list[Path]) -> Iterator[Pair | Unusable]:
    """Yield the rows of tables: `caption` (a text, or a list of texts), and a column of pictures
    (`jpg`, `png`, `webp`, `image`) or of paths (`path`, `file`, `image_path`, `url`).

    A path is relative to the table's folder and must stay in it; a URL must be file://. A row that
    is not a pair yields a reject, and so does an unreadable table.
    """
    import pyarrow  # noqa: PLC0415 - 100 MB that other sources do without
    from pyarrow import parquet  # noqa: PLC0415

    for path in paths:
        number = 0
        try:
            table = parquet.ParquetFile(path)
            picture, caption = _columns(table.schema_arrow, pyarrow.types)
            together = _BYTES_TOGETHER if picture.lower() in PICTURES else _ROWS
            for batch in table.iter_batches(together, columns=[picture, caption]):
                for row in _rows(batch):
                    yield _row(path, number, row.get(picture), row.get(caption))
                    number += 1
        except _RowError as error:
            yield unusable(path.as_posix(), str(error), "table")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = f"is not a readable parquet table from row {number} on: {error}"
            yield unusable(path.as_posix(), reason, "table")


def _columns(schema: Any, types: Any) -> tuple[str, str]:
    """Names of the column of pictures or paths, and of the column of captions."""

    def holds_bytes(name: str) -> bool:
        kind = schema.field(name).type
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind))

    names = {name.lower(): name for name in reversed(schema.names)}
    pictures = [names[name] for name in PICTURES if name in names and holds_bytes(names[name])]
    places = [names[name] for name in (*PLACES, "image") if name in names]
    captions = [names[name] for name in CAPTIONS if name in names]
    for columns, known in ((pictures + places, (*PLACES, *PICTURES)), (captions, CAPTIONS)):
        if not columns:
            raise _RowError(f"has no column {' or '.join(known)}; rename one")
    return (pictures + places)[0], captions[0]


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch, without values that do not convert, such as text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except ValueError:
        pass
    for i in range(batch.num_rows):
        row = {}
        for name in batch.schema.names:
            with suppress(ValueError):
                row[name] = batch.column(name)[i].as_py()
        yield row


def _row(table: Path, number: int, picture: object, caption: object) -> Pair | Unusable:
    key, where = key_of(f"{table.stem}/{number:09d}"), f"{table}:{number}"
    try:
        text = _caption(caption)
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, bytes):
            return make_pair(key, picture, _type_of(picture), text, where)
        if not isinstance(picture, str):
            raise _RowError("has no picture, or no path of one")
        path = _place(table.parent.resolve(), picture)
        return make_pair(key, path.read_bytes(), path.suffix, text, f"{where} ({path})")
    except _RowError as error:
        return Unusable(key=key, kind="row", reason=f"{where} {error}")
    except OSError as error:
        reason = f"{where} {picture!r:.200} cannot be read: {error.strerror}"
        return Unusable(key=key, kind="row", reason=reason)


def _caption(value: object) -> bytes:
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if not texts:
        raise _RowError("has no caption")
    return joined(texts)


def _type_of(picture: bytes) -> str:
    """The extension of a picture by its first bytes; decoding rejects anything else later."""
    if len(picture) > MOST_BYTES:
        raise _RowError(f"has a picture of {len(picture)} bytes; the limit is {MOST_BYTES}")
    if picture[:4] == b"\x89PNG":
        return "png"
    return "webp" if picture[:4] == b"RIFF" else "jpg"


def _place(root: Path, place: str) -> Path:
    """The checked path of a row's picture."""
    shown = f"{place[:200]!r}"
    try:
        url = urlsplit(place) if "://" in place or place.startswith("file:") else None
        if url is not None and url.scheme != "file":
            raise _RowError(f"{shown} is not on this machine; fetch it first (img2dataset)")
        path = (root / (unquote(url.path) if url else place)).resolve()
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError) as error:  # a malformed URL, a name that is too long, a NUL
        raise _RowError(f"{shown} is not a path: {error}") from error
    if not path.is_relative_to(root):
        raise _RowError(f"{shown} leaves the table's folder; put the pictures there")
    if not 0 <= size <= MOST_BYTES:
        raise _RowError(f"{shown} is not a file, or larger than {MOST_BYTES} bytes")
    if extension_of(path.name) not in EXTENSIONS:
        raise _RowError(f"{shown} is not a PNG, JPEG or WebP")
    return path
