"""Atomic file writes, and JSON files that carry their own digest."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from core.errors import CorruptError, InputError
from core.files.file_systems import LOCK, lock, sync_folder

Json = dict[str, Any]
_SELF_DIGEST = "digest"
TEMPORARY = ".tmp-"
_LARGE = 2**24
"""Bytes of a file whose pages are given back when it is on the disk: the next file reuses them. New
pages cost a virtual machine ten times the copy if its host has taken them back."""


def sha256(data: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Raises: OSError if the disk is full or the folder cannot be written.
    """
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """`write_atomic` for a file given in parts, so that it need not fit in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            if file.tell() >= _LARGE:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def refuse_folder(path: Path) -> None:
    """Check that a file can be written at a path, before the work that produces it.

    Raises: OSError if its folder cannot be made or written to, or there is a folder of that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def canonical_json(value: Json) -> bytes:
    """Serialise a JSON object deterministically: sorted keys, fixed white space."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # non-UTF-8 paths become JSON escapes


def seal(value: Json) -> bytes:
    """Serialise a JSON object together with its own digest."""
    body = {key: item for key, item in value.items() if key != _SELF_DIGEST}
    return canonical_json({**body, _SELF_DIGEST: sha256(canonical_json(body))})


def unseal(data: bytes, where: str) -> Json:
    """Read a sealed JSON object and check its digest.

    Raises: CorruptError if a byte changed since `seal`.
    """
    try:
        value = json.loads(data)
        body = {key: item for key, item in value.items() if key != _SELF_DIGEST}
        intact = seal(body) == data
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        raise damaged(where)
    return body


def damaged(where: str) -> CorruptError:
    """The error of a sealed file whose bytes changed."""
    return CorruptError(
        f"{where} is damaged: its digest does not match its content; restore it, or make it "
        "again by the command that wrote it (pack and tokenize: with --again)"
    )


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for one process at a time; creates it if needed.

    Raises: InputError if another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        context = lock(folder / LOCK)
        mine = context.__enter__()
    except OSError as error:
        raise InputError(f"cannot write the folder {folder}: {error.strerror}") from error
    with ExitStack() as stack:
        stack.push(context)
        if not mine:
            raise InputError(
                f"another {what} is working in {folder}; wait for it or give another --out"
            )
        yield


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder atomically: yields a staging folder that is renamed at the end.

    Raises: InputError if something is there already, or another process fills it.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} holds something already; give another folder")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to nothing; give another folder")
    staging = path.with_name(f"{TEMPORARY}{path.name}")
    with held(staging, "process"):
        for old in staging.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != LOCK:
                old.unlink()
        try:
            yield staging
            (staging / LOCK).unlink()
            os.replace(staging, path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files of writers that died; returns how many there were."""
    leftovers = list(folder.rglob(f"{TEMPORARY}*")) if folder.is_dir() else []
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
