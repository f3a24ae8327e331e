"""The data sets of a training: rank 0 reads their manifests and indexes for all ranks."""

import json
from collections.abc import Callable, Mapping, Sequence

import core.errors
from core.errors import TapirError
from core.storage.mixture import data_sets
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

Splits = Mapping[str, Sequence[OpenSplit]]
"""Open splits of each data set, by name; those of none are read where they are used."""
UNREAD: Splits = dict.fromkeys(SPLITS, ())
_READ, _FAILED, _NONE = b"+", b"-", b""
"""First byte of what rank 0 hands on."""


def open_splits(data: str, kind: str, mesh: Mesh) -> Splits:
    """The open splits of the newest version of each data set; collective over all ranks.

    Ranks that read no records get manifests without shards, and no index.
    Raises: on every rank, the error that rank 0 met.
    """
    stores = [open_store(each.place) for each in data_sets(data)]
    return _handed_on(mesh, len(stores), lambda: [newest_splits(store, kind) for store in stores])


def open_versions(
    data: str, kind: str, mesh: Mesh, train: Sequence[str], held_out: Sequence[str] = ()
) -> Splits:
    """The splits of the versions of each set with these fingerprints of train; `held_out` may be
    left out.

    Collective, and raises, as `open_splits`.
    """
    stores = [open_store(each.place) for each in data_sets(data)]
    rows = list(zip(stores, train, held_out or [""] * len(stores), strict=True))
    read = lambda: [splits_at(store, kind, now, first) for store, now, first in rows]  # noqa: E731
    return _handed_on(mesh, len(stores), read)


def open_newer(place: str, kind: str, mesh: Mesh, fingerprint: str) -> Splits:
    """The newest train split of one data set; UNREAD if it has this fingerprint.

    Collective, and raises, as `open_splits`: one broadcast if there is no newer one.
    """
    newer: dict[str, OpenSplit] | TapirError = {}
    if mesh.world.rank == 0:
        try:
            newer = newer_split(open_store(place), kind, fingerprint)
        except TapirError as error:
            newer = error

    def read() -> list[dict[str, OpenSplit]]:
        if isinstance(newer, TapirError):
            raise newer
        return [newer]

    is_new = mesh.world.of_rank_0(newer != {})
    return _handed_on(mesh, 1, read) if is_new else UNREAD


def _handed_on(mesh: Mesh, sets: int, read: Callable[[], list[dict[str, OpenSplit]]]) -> Splits:
    """What rank 0 reads of some sets, on every rank."""
    world, readers = mesh.world, mesh.data_ranks
    others = [0, *sorted(set(range(world.size)) - set(readers))]
    if world.rank:
        ranks = readers if world.rank in readers else others
        opened = {
            name: [_opened(world.hand_on(b"", ranks)) for _ in range(sets)] for name in SPLITS
        }
        return {name: [each for each in row if each is not None] for name, row in opened.items()}
    try:
        splits = read()
    except TapirError as error:
        failure = _FAILED + json.dumps([type(error).__name__, str(error)]).encode()
        for ranks in (readers, others):
            world.hand_on(failure, ranks)
        raise
    rows = {name: [each.get(name) for each in splits] for name in SPLITS}
    for split in [each for row in rows.values() for each in row] if world.size > 1 else ():
        world.hand_on(_READ + dump_split(split) if split else _NONE, readers)
        world.hand_on(_READ + dump_split(split.without_index()) if split else _NONE, others)
    return {name: [each for each in row if each is not None] for name, row in rows.items()}


def _opened(data: bytes) -> OpenSplit | None:
    if data[:1] == _FAILED:
        name, text = json.loads(data[1:])
        raise getattr(core.errors, name, TapirError)(text)
    return load_split(data[1:]) if data else None
