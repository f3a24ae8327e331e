"""The place of a raw data set: claimed before any work, given back if there is nothing to write."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.config import S3
from core.errors import CorruptError, InputError
from core.files.atomic import canonical_json
from core.storage.store import FolderStore, Store, open_store
from data_pipeline.catalogue.schema import CATALOGUE
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.manifest import (
    INDEX,
    NAME,
    RAW,
    SPLITS,
    Manifest,
    Shard,
    manifest_name,
    read_json,
    read_manifest,
)
from data_pipeline.jobs.status import JOB
from data_pipeline.packing.rejects import REJECTS
from data_pipeline.sources.patterns import is_pattern

REQUEST = "request.json"
UNITS = "units/"
REFUSED = f"{UNITS}refused.json"
"""Why a worker has ended the job: too many rejects, or an empty split."""
_PARTS = re.compile(
    rf"({'|'.join(SPLITS)})/shard-\d{{6,}}(-\d{{3,}})?\.(tar|index\.safetensors)"
    rf"|{REJECTS}(\d{{6,}}|set)\.jsonl"
)
_OURS = re.compile(
    rf"{_PARTS.pattern}|({'|'.join(SPLITS)})/({INDEX}|{IDS}|{NAME})|{REQUEST}|{JOB}"
    rf"|({UNITS}|{CATALOGUE}).*"
)


@contextmanager
def given_back(store: Store, alone: bool = True) -> Iterator[None]:
    """On an InputError give a claimed, unfinished place back, so that it can be used again.

    `alone`: there are no other workers, and everything is deleted. Otherwise a note tells them, and
    the next request for the place deletes what they wrote (`claim`).
    """
    try:
        yield
    except InputError as error:
        if not was_finished(store):
            if alone:
                _clear(store)
            else:
                note = canonical_json({"reason": str(error)})
                store.put(REFUSED, note, if_absent=True)
        raise


def refuse_refused(store: Store, note: str = REFUSED) -> None:
    """Raise InputError if another worker has ended the job."""
    if store.exists(note):
        reason = read_json(store, note).get("reason", "")
        raise InputError(
            f"another worker has ended this job: {reason}; mend that, or write it all again with "
            "--again"
        )


def claim(store: Store, request: dict[str, Any], again: bool = False) -> None:
    """Claim DEST for this request, before any work; the same request may claim it again.

    Raises: InputError if DEST is taken by another request; StoreError if it cannot be written.
    """
    content = canonical_json(request)
    refused = store.exists(REFUSED)
    if refused and was_finished(store):  # by the other workers, after the refusal of one
        store.delete(REFUSED)
    elif refused and (again or store.get(REQUEST) != content):
        _clear(store)
    elif refused:
        refuse_refused(store)
    if not store.exists(REQUEST):
        _refuse_object(store)
        others = [name for split in SPLITS for name in store.names(f"{split}/")]
        if others and not store.exists(REQUEST):  # else a worker claimed it and has begun
            raise InputError(f"{store.url} holds other files ({others[0]}); choose an empty DEST")
        if store.put(REQUEST, content, if_absent=True):
            return
    if store.get(REQUEST) == content:
        return
    try:
        other = read_json(store, REQUEST)
    except CorruptError:
        if not again:
            raise
        store.put(REQUEST, content)
        return
    raise taken(store, other)


def refuse_pattern(store: Store) -> None:
    """Raise InputError if DEST looks like a pattern of sources: then DEST was left out."""
    if is_pattern(store.url) and not (isinstance(store, FolderStore) and store.root.exists()):
        raise InputError(
            f"DEST {store.url} is a pattern, and must be one folder or s3://bucket/prefix; it is "
            "the last place: tapir pack SRC ... DEST"
        )


def _refuse_object(store: Store) -> None:
    """Raise InputError if an object of a bucket stands where a prefix is needed."""
    above, _, name = store.url.rpartition("/")
    if above.startswith(S3) and open_store(above).exists(name):
        raise InputError(f"{store.url} is an object, and DEST must be a prefix; give another")


def taken(store: Store, other: dict[str, Any]) -> InputError:
    """The error for a place that holds another request's data set."""
    return InputError(
        f"{store.url} is taken by another data set ({other.get('source', 'tokens')!r}, or other "
        "settings or content); choose an empty DEST"
    )


def finished(store: Store) -> dict[str, Manifest]:
    """The manifests of a raw data set; empty unless it is finished."""
    manifests = {}
    for name in SPLITS:
        if not store.exists(f"{name}/{NAME}"):
            return {}
        manifests[name] = read_manifest(store, f"{name}/", RAW)
    return manifests


def was_finished(store: Store, version: int = 1) -> bool:
    """True for a version with a manifest: --again deletes that of one split before it mends."""
    return any(store.exists(f"{name}/{manifest_name(version)}") for name in SPLITS)


def refuse_empty(shards: dict[str, list[Shard]], advice: str) -> None:
    """Raise InputError if a split has no pair."""
    for name, rows in shards.items():
        if not rows:
            raise InputError(f"no pair fell into the {name} split; {advice}")


def delete_others(store: Store, shards: dict[str, list[Shard]], rejects: set[str]) -> None:
    """Delete shards and rejects of an earlier, unfinished attempt."""
    kept = {f"{name}/{shard.name}" for name, rows in shards.items() for shard in rows} | rejects
    kept |= {f"{name}/{shard.index_name}" for name, rows in shards.items() for shard in rows}
    for folder in (*(f"{name}/" for name in SPLITS), REJECTS):
        for name in filter(_PARTS.fullmatch, store.names(folder)):
            if name not in kept:
                store.delete(name)


def _clear(store: Store) -> None:
    for name in filter(_OURS.fullmatch, store.names()):
        if name not in (REQUEST, REFUSED):
            store.delete(name)
    store.delete(REQUEST)
    store.delete(REFUSED)
