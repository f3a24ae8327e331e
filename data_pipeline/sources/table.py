"""Pairs of a parquet table: a caption a row, and where its picture lies on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from core.errors import InputError
from data_pipeline.images import EXTENSIONS
from data_pipeline.sources.files import MOST_BYTES, make_pair
from data_pipeline.sources.pair import Pair, Unusable

PLACES = ("path", "file", "image_path", "url")
CAPTIONS = ("caption", "text")
_ROWS = 1024


def table_pairs(paths: list[Path]) -> Iterator[Pair | Unusable]:
    """Yield the rows of tables: a column `path`, `file`, `image_path` or `url`, and `caption`.

    A path is taken from the table's folder and must stay in it; a URL must be file://.
    Raises: InputError if a file is no parquet table or lacks the columns.
    """
    import pyarrow  # noqa: PLC0415 - 100 MB that other sources do without
    from pyarrow import parquet  # noqa: PLC0415

    for path in paths:
        try:
            table = parquet.ParquetFile(path)
            place, caption = (_column(table, path, names) for names in (PLACES, CAPTIONS))
            at = 0
            for batch in table.iter_batches(_ROWS, columns=[place, caption]):
                for row in batch.to_pylist():
                    yield _row(path, at, row[place], row[caption])
                    at += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path} is no readable parquet table: {error}") from error


def _column(table: Any, path: Path, names: tuple[str, ...]) -> str:
    found = next((name for name in names if name in table.schema_arrow.names), None)
    if found is None:
        raise InputError(f"{path} has no column {' or '.join(names)}; rename one")
    return found


def _row(table: Path, number: int, place: object, caption: object) -> Pair | Unusable:
    key = f"{table.stem.replace('.', '_')}__{number:09d}"
    where = f"{table}:{number}"
    if not isinstance(place, str) or not isinstance(caption, str):
        return Unusable(key=key, kind="row", reason=f"{where} has no path or no caption")
    url = urlsplit(place)
    if url.scheme not in ("", "file"):
        reason = f"{where}: {place[:200]!r} is not on this machine; fetch it first (img2dataset)"
        return Unusable(key=key, kind="row", reason=reason)
    root = table.parent.resolve()
    try:
        path = (root / (unquote(url.path) if url.scheme else place)).resolve()
        size = path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):  # longer than a path may be, or with a NUL
        path, size = root, -1
    if not path.is_relative_to(root):
        reason = f"{where}: {place[:200]!r} leaves the table's folder; put the pictures there"
        return Unusable(key=key, kind="row", reason=reason)
    if not 0 <= size <= MOST_BYTES:
        reason = f"{where}: {place[:200]!r} is no file, or larger than {MOST_BYTES} bytes"
        return Unusable(key=key, kind="row", reason=reason)
    if path.suffix.lower()[1:] not in EXTENSIONS:
        return Unusable(key=key, kind="row", reason=f"{where}: {path} is no PNG, JPEG or WebP")
    text = caption.encode("utf-8", "surrogatepass")
    return make_pair(key, path.read_bytes(), path.suffix, text, f"{where} ({path})")
