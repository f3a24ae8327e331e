"""The folder of a demo: whose it is, and the manifests of its private store."""

import json
from pathlib import Path

from cluster.object_server import ObjectServer
from core.errors import InputError
from core.files.atomic import Json, canonical_json, write_atomic
from core.storage.s3 import S3Store

BUCKET, NOTE = "tapir-demo", "demo.json"


def claim(folder: Path, mine: Json, free: tuple[str, ...] = ()) -> None:
    """Store a demo's settings; raises InputError if the folder holds another demo.

    `free`: settings that may still change.
    """
    note = folder / NOTE
    if not note.exists():
        write_atomic(note, canonical_json(mine))
    try:
        other = dict(json.loads(note.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{note} is damaged: {error}; delete it, or give another --out") from error
    for name, value in mine.items():
        if other.get(name) != value and name not in free:
            raise InputError(
                f"the demo in {folder} has another --{name}: {other.get(name)}, not {value}; give "
                "that one, or another --out"
            )
    if (now := {**other, **mine}) != other:
        write_atomic(note, canonical_json(now))


def copy_manifests(name: str, folder: Path, server: ObjectServer) -> None:
    """Copy the manifests of the stage pack or tokens beside its log."""
    with server.credentials():
        store = S3Store(BUCKET, "raw" if name == "pack" else "tokens")
        for split in ("train", "validation"):
            data = store.get(f"{split}/manifest.json")
            write_atomic(folder / name / f"{split}-manifest.json", data)
