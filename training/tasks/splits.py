"""The data sets of a training: rank 0 reads their manifests and indexes for all ranks."""

import json
from collections.abc import Callable, Mapping

import core.errors
from core.errors import TapirError
from core.storage.store import open_store
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.split import (
    OpenSplit,
    dump_split,
    load_split,
    newer_split,
    newest_splits,
    splits_at,
)
from parallel.mesh import Mesh

Splits = Mapping[str, OpenSplit]
"""Open splits by name; missing ones are read where they are used."""
UNREAD: Splits = {}
_READ, _FAILED, _NONE = b"+", b"-", b""
"""First byte of what rank 0 hands on."""


def open_splits(place: str, kind: str, mesh: Mesh) -> Splits:
    """The open splits of the newest version of a data set; collective over all ranks.

    Ranks that read no records get manifests without shards, and no index.
    Raises: on every rank, the error that rank 0 met.
    """
    return _handed_on(mesh, lambda: newest_splits(open_store(place), kind))


def open_version(place: str, kind: str, mesh: Mesh, train: str, held_out: str = "") -> Splits:
    """The splits of the versions with these fingerprints of train; `held_out` may be left out.

    Collective, and raises, as `open_splits`.
    """
    return _handed_on(mesh, lambda: splits_at(open_store(place), kind, train, held_out))


def open_newer(place: str, kind: str, mesh: Mesh, fingerprint: str) -> Splits:
    """The newest train split; empty if it has this fingerprint.

    Collective, and raises, as `open_splits`: one broadcast if there is no newer one.
    """
    newer: Splits | TapirError = UNREAD
    if mesh.world.rank == 0:
        try:
            newer = newer_split(open_store(place), kind, fingerprint)
        except TapirError as error:
            newer = error

    def read() -> Splits:
        if isinstance(newer, TapirError):
            raise newer
        return newer

    is_new = mesh.world.of_rank_0(newer != UNREAD)
    return _handed_on(mesh, read) if is_new else UNREAD


def _handed_on(mesh: Mesh, read: Callable[[], Splits]) -> Splits:
    """What rank 0 reads, on every rank."""
    world, readers = mesh.world, mesh.data_ranks
    others = [0, *sorted(set(range(world.size)) - set(readers))]
    if world.rank:
        ranks = readers if world.rank in readers else others
        opened = {name: _opened(world.hand_on(b"", ranks)) for name in SPLITS}
        return {name: split for name, split in opened.items() if split is not None}
    try:
        splits = read()
    except TapirError as error:
        failure = _FAILED + json.dumps([type(error).__name__, str(error)]).encode()
        for ranks in (readers, others):
            world.hand_on(failure, ranks)
        raise
    for split in map(splits.get, SPLITS) if world.size > 1 else ():
        world.hand_on(_READ + dump_split(split) if split else _NONE, readers)
        world.hand_on(_READ + dump_split(split.without_index()) if split else _NONE, others)
    return splits


def _opened(data: bytes) -> OpenSplit | None:
    if data[:1] == _FAILED:
        name, text = json.loads(data[1:])
        raise getattr(core.errors, name, TapirError)(text)
    return load_split(data[1:]) if data else None
