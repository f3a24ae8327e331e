"""Files that appear whole or not at all, with digests computed before they are written."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from core.errors import CorruptError

Json = dict[str, Any]
_SELF_DIGEST = "digest"
TEMPORARY = ".tmp-"


def sha256(data: bytes) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Raises: OSError if the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def canonical_json(value: Json) -> bytes:
    """The one byte string of a JSON object: sorted keys, no spaces that vary."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


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
        raise CorruptError(
            f"{where} is damaged: its digest does not match its content; restore it or make it "
            "again with the command that wrote it"
        )
    return body


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files of writers that died; returns how many there were."""
    leftovers = list(folder.rglob(f"{TEMPORARY}*")) if folder.is_dir() else []
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
