"""The files of a set's catalogue, and digest-checked copies of them on a local disk.

catalogue/<unit:06d>.parquet              the rows of a unit (schema.py)
catalogue/left-out-<digest>.parquet       the rows that the whole set leaves out (verdict.py)
catalogue/parts-<digest>.json             names, counts and digests of both; the manifests name its
                                          digest as `catalogue`
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import AbsentError, CorruptError, InputError
from core.files.atomic import TEMPORARY, sha256
from core.storage.store import FolderStore, Store, open_store
from data_pipeline.catalogue.schema import CATALOGUE, PARQUET, part_name
from data_pipeline.catalogue.verdict import LEFT_OUT
from data_pipeline.formats.fetch import fetched
from data_pipeline.formats.manifest import NAME, RAW, kind_of, read_manifest

FACT = "catalogue"
"""The fact of a manifest that names the digest of the list of parts."""
_TOGETHER, _THREADS, _SHORT = 2**23, 8, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One parquet file."""

    name: str
    rows: int
    bytes: int
    sha256: str
    place: str = ""
    """Its path or URL, if another set holds it."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """A catalogue on a local disk."""

    parts: Sequence[Part]
    paths: Sequence[Path]
    """The rows of the units, in order."""
    left_out: Path | None
    """The rows that the whole set leaves out; None if it leaves out none."""


def part_of(unit: int, rows: int, data: bytes) -> Part:
    """The entry of a unit's file."""
    return Part(name=part_name(unit), rows=rows, bytes=len(data), sha256=sha256(data))


def put_catalogue(store: Store, parts: Sequence[Part], left_out: Iterable[pa.Table] = ()) -> str:
    """Write what the whole set leaves out, and the list of parts; returns the manifests' FACT.

    `left_out`: tables of LEFT_OUT (`Verdict.left_out`), in a stream.
    """
    body: dict[str, Any] = {"parts": [asdict(part) for part in parts]}
    with TemporaryFile(prefix="tapir-left-out-") as file:
        with pq.ParquetWriter(file, LEFT_OUT, **PARQUET) as writer:
            rows = sum(_written(writer, table) for table in left_out)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if rows:
            name = f"{CATALOGUE}left-out-{digest[:_SHORT]}.parquet"
            file.seek(0)
            store.put_parts(name, iter(lambda: file.read(_TOGETHER), b""))
            body["left_out"] = asdict(Part(name=name, rows=rows, bytes=size, sha256=digest))
    data = json.dumps(body, sort_keys=True).encode()
    store.put(_list_name(sha256(data)), data)
    return sha256(data)


def _written(writer: pq.ParquetWriter, table: pa.Table) -> int:
    writer.write_table(table)
    return len(table)


def open_catalogue(store: Store, cache: Path) -> Catalogue:
    """The catalogue of a finished set; what is not on a local disk is copied to `cache`, once.

    Every file is compared with its digest each time.
    Raises: InputError if the set has none; CorruptError, naming the file.
    """
    digest = read_manifest(store, "train/", RAW).facts.get(FACT)
    if not isinstance(digest, str):
        raise InputError(
            f"{store.url} has no catalogue: an older version packed it, or it joins several sets; "
            "pack its source again, or name one of the sets"
        )
    body = read_list(store, digest)
    copies = _Copies(store, cache)
    parts = [Part(**row) for row in body["parts"]]
    left_out = copies.path(Part(**body["left_out"])) if "left_out" in body else None
    paths = list(fetched(copies.path, parts, _THREADS))
    return Catalogue(parts=parts, paths=paths, left_out=left_out)


def verify_catalogue(store: Store) -> int:
    """Compare the catalogue's files with their digests; returns their number, 0 without one.

    Raises: CorruptError, naming the first damaged file.
    """
    if not store.exists(f"train/{NAME}") or kind_of(store, "train/") != RAW:
        return 0
    digest = read_manifest(store, "train/", RAW).facts.get(FACT)
    if not isinstance(digest, str):
        return 0
    body = read_list(store, digest)
    files = _Copies(store, Path())
    parts = [Part(**row) for row in (*body["parts"], body.get("left_out")) if row]

    def check(part: Part) -> None:
        for _ in _checked(*files.of(part), part):
            pass

    return sum(1 for _ in fetched(check, parts, _THREADS))


def read_list(store: Store, digest: str) -> dict[str, Any]:
    """The list of a catalogue's parts; `digest`: the FACT of the manifest.

    Raises: CorruptError if it is missing or has another digest.
    """
    name = _list_name(digest)
    try:
        data = store.get(name)
    except AbsentError:
        data = b""
    if sha256(data) != digest:
        raise _damaged(f"{store.url}/{name}")
    body: dict[str, Any] = json.loads(data)
    return body


def place_of(store: Store, part: Part) -> str:
    """The path or URL of a part."""
    if part.place:
        return part.place
    root = store.root.absolute().as_posix() if isinstance(store, FolderStore) else store.url
    return f"{root}/{part.name}"


class _Copies:
    """Local files of parts: those of a folder, or checked copies in the cache."""

    def __init__(self, store: Store, cache: Path) -> None:
        self._stores: dict[str, Store] = {"": store}
        self._cache = cache

    def path(self, part: Part) -> Path:
        """A local file with the bytes of a part.

        Raises: CorruptError if the stored file is missing or has another digest.
        """
        store, name = self.of(part)
        if isinstance(store, FolderStore):
            path = store.root / name
            if not path.is_file() or not _has_digest(path, part):
                raise _damaged(str(path))
            return path
        path = self._cache / f"{part.sha256}.parquet"
        if not path.is_file() or not _has_digest(path, part):
            _write(path, _checked(store, name, part))
        return path

    def of(self, part: Part) -> tuple[Store, str]:
        """The store of a part, and its name there."""
        folder, _, name = part.place.rpartition("/")
        if folder not in self._stores:
            self._stores[folder] = open_store(folder)
        return self._stores[folder], name or part.name


def _checked(store: Store, name: str, part: Part) -> Iterator[bytes]:
    """The bytes of a part, some at a time: what a set leaves out may be larger than memory.

    Raises: CorruptError, at the end, if it is missing or has another digest.
    """
    digest = hashlib.sha256()
    with suppress(AbsentError):
        for start in range(0, part.bytes, _TOGETHER):
            data = store.get(name, start, _TOGETHER)
            digest.update(data)
            yield data
    if digest.hexdigest() != part.sha256:
        raise _damaged(f"{store.url}/{name}")


def _write(path: Path, data: Iterable[bytes]) -> None:
    """Write a file of the cache, without fsync: a damaged one is fetched again."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(data)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"the cache {path.parent} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _has_digest(path: Path, part: Part) -> bool:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == part.sha256


def _list_name(digest: str) -> str:
    return f"{CATALOGUE}parts-{digest[:_SHORT]}.json"


def _damaged(where: str) -> CorruptError:
    return CorruptError(
        f"{where} is missing or differs from its digest; mend it by the `tapir pack` that made it, "
        "with --again"
    )
