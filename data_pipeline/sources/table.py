"""Pairs from a parquet table: each row has a caption, and a picture or its path beside it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from core.errors import TapirError
from data_pipeline.formats.fetch import fetched
from data_pipeline.images.crops import EXTENSIONS
from data_pipeline.sources.files import MOST_BYTES
from data_pipeline.sources.names import extension_of
from data_pipeline.sources.pair import Pair, Unusable, key_of, make_pair, unusable
from data_pipeline.sources.places import Files, LocalFiles
from data_pipeline.text.captions import joined

PICTURES = ("jpg", "png", "webp", "image")
"""Column names of encoded pictures, as written by img2dataset and the Hugging Face hub."""
PLACES = ("path", "file", "image_path", "url")
CAPTIONS = ("caption", "captions", "text")
_BYTES_TOGETHER = 32
_ROWS = 1024
_BUFFER = 2**20
"""Bytes of a column that are read together, where a row group would not fit into memory."""


class _RowError(Exception):
    """Why a row is not a pair."""


class TablePart(NamedTuple):
    """Row groups of a table that are read together."""

    name: str
    archive: str
    """With which keys begin."""
    first: int = 0
    """Row group."""
    groups: int = 0
    """Row groups; 0 = all of the table's."""
    row: int = 0
    """The table's number of the first row."""


def row_groups(files: Files, name: str) -> list[tuple[int, int]]:
    """(rows, bytes) of each row group; empty for an unreadable table."""
    import pyarrow  # noqa: PLC0415 - 100 MB that other sources do without
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with files.open(name) as file:
            about = parquet.ParquetFile(file).metadata
            groups = (about.row_group(i) for i in range(about.num_row_groups))
            return [(group.num_rows, group.total_byte_size) for group in groups]
    except (pyarrow.ArrowException, OSError, ValueError):
        return []


def table_pairs(files: Files, part: TablePart) -> Iterator[Pair | Unusable]:
    """Yield the rows of a table: `caption` (a text, or a list of texts), and a column of pictures
    (`jpg`, `png`, `webp`, `image`) or of paths (`path`, `file`, `image_path`, `url`).

    A path is relative to the table's folder and must stay in it; a URL must be file://, or begin
    with the store of the table. A row that is not a pair yields a reject, and so does an unreadable
    table.
    """
    import pyarrow  # noqa: PLC0415

    number = part.row
    try:
        for picture, rows in _batches(files, part):
            pairs: Iterator[Pair | Unusable]
            if picture:
                pairs = (_row(files, part, number + i, *row) for i, row in enumerate(rows))
            else:
                numbered = enumerate(rows, number)
                pairs = fetched(lambda row: _row(files, part, row[0], *row[1]), numbered)
            for pair in pairs:
                yield pair
                number += 1
    except _RowError as error:
        yield unusable(files.where(part.name), str(error), "table")
    except TapirError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = f"is not a readable parquet table from row {number} on: {error}"
        yield unusable(files.where(part.name), reason, "table")


def _batches(files: Files, part: TablePart) -> Iterator[tuple[bool, list[tuple[Any, Any]]]]:
    """(True for a column of pictures, [(picture or path, caption)]), some rows at a time."""
    import pyarrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    with files.open(part.name) as file:
        table = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        picture, caption = _columns(table.schema_arrow, pyarrow.types)
        holds = picture.lower() in PICTURES
        last = part.first + part.groups if part.groups else table.num_row_groups
        for batch in table.iter_batches(
            _BYTES_TOGETHER if holds else _ROWS,
            row_groups=list(range(part.first, last)),
            columns=[picture, caption],
            use_threads=False,
        ):
            yield holds, [(row.get(picture), row.get(caption)) for row in _rows(batch)]


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


def _row(
    files: Files, part: TablePart, number: int, picture: object, caption: object
) -> Pair | Unusable:
    key, where = key_of(f"{part.archive}/{number:09d}"), f"{files.where(part.name)}:{number}"
    try:
        text = _caption(caption)
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, bytes):
            return make_pair(key, picture, _type_of(picture), text, where)
        if not isinstance(picture, str):
            raise _RowError("has no picture, or no path of one")
        name = _place(files, PurePosixPath(part.name).parent.as_posix(), picture)
        data = files.read(name, MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise _RowError(f"{picture[:200]!r} is larger than {MOST_BYTES} bytes")
        suffix, where = PurePosixPath(name).suffix, f"{where} ({files.where(name)})"
        return make_pair(key, data, suffix, text, where)
    except _RowError as error:
        return Unusable(key=key, kind="row", reason=f"{where} {error}")
    except FileNotFoundError:
        return Unusable(key=key, kind="row", reason=f"{where} {picture!r:.200} is not a file")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        reason = f"{where} {picture!r:.200} cannot be read: {why}"
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


def _place(files: Files, folder: str, place: str) -> str:
    """The checked name of a row's picture.

    Raises: ValueError for a malformed URL, a name that is too long, a NUL; OSError.
    """
    shown = f"{place[:200]!r}"
    if isinstance(files, LocalFiles):
        url = urlsplit(place) if "://" in place or place.startswith("file:") else None
        if url is not None and url.scheme != "file":
            raise _RowError(f"{shown} is not on this machine; fetch it first (img2dataset)")
        root = (files.root / folder).resolve()
        path = (root / (unquote(url.path) if url else place)).resolve()
        inside, is_file = path.is_relative_to(root), path.is_file()
        name = path.as_posix()
    else:
        rest = place.removeprefix(f"{files.url}/")
        if "://" in rest:
            raise _RowError(f"{shown} is not in the table's store; fetch it first (img2dataset)")
        name = normpath(f"{folder}/{place}" if rest == place else rest)
        outside = place.startswith("/") or name.startswith("../")
        inside, is_file = not outside and (folder == "." or name.startswith(f"{folder}/")), True
    if not inside:
        raise _RowError(f"{shown} leaves the table's folder; put the pictures there")
    if not is_file:
        raise _RowError(f"{shown} is not a file")
    if extension_of(PurePosixPath(name).name) not in EXTENSIONS:
        raise _RowError(f"{shown} is not a PNG, JPEG or WebP")
    return name
