"""`tapir data join`: one raw set over the shards of several, which stay where they are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from core.log import LOG
from core.storage.store import Store
from data_pipeline.formats.ids import NAME as IDS
from data_pipeline.formats.ids import rows_of_table
from data_pipeline.formats.manifest import INDEX, NAME, RAW, SPLITS, Manifest, read_manifest
from data_pipeline.formats.raw_set import Base, write_view

_MIX = "sets that share pairs can be mixed instead: --data A:0.5,B:0.5"


def join(stores: Sequence[Store], dest: Store) -> dict[str, Manifest]:
    """Write DEST over the shards of finished sets, in their order; returns its manifests.

    Each split has those of all sets. No picture is read.
    Raises: InputError if an id occurs twice, or DEST holds something else.
    """
    bases = {
        split: [read_manifest(store, f"{split}/", RAW) for store in stores] for split in SPLITS
    }
    facts = {"join": {name: [row.fingerprint for row in rows] for name, rows in bases.items()}}
    if joined := _finished(stores, dest, facts):
        LOG.info("%s already holds this join", dest.url)
        return joined
    _refuse_held_out_in_train(stores, bases)
    try:
        return {
            split: write_view(
                dest,
                f"{split}/",
                [Base(store=store, split=split) for store in stores],
                {**facts, "split": split},
                dict(sum((Counter(row.rejects) for row in rows), Counter())),
            )
            for split, rows in bases.items()
        }
    except InputError as error:
        raise InputError(f"{error}; {_MIX}") from error


def _finished(stores: Sequence[Store], dest: Store, facts: dict[str, Any]) -> dict[str, Manifest]:
    """The manifests of this join; empty if DEST is free or has a part of one.

    Raises: InputError if DEST is one of the sets or holds something else.
    """
    urls = [store.url for store in stores]
    if dest.url in urls or len(set(urls)) < len(urls):
        raise InputError("the sets and DEST must all be different; name each set once")
    if not dest.exists(f"{SPLITS[-1]}/{NAME}"):
        files = {f"{split}/{name}" for split in SPLITS for name in (NAME, INDEX, IDS)}
        others = [name for name in dest.names() if name not in files]
        if others:
            raise InputError(f"{dest.url} holds other files ({others[0]}); choose an empty DEST")
        return {}
    joined = {split: read_manifest(dest, f"{split}/", RAW) for split in SPLITS}
    if any(row.facts.get("join") != facts["join"] for row in joined.values()):
        raise InputError(f"{dest.url} holds another data set; choose an empty DEST")
    return joined


def _refuse_held_out_in_train(stores: Sequence[Store], bases: dict[str, list[Manifest]]) -> None:
    """Raise InputError if a held-out pair of one set is trained on in another.

    Memory: 8 bytes a held-out pair.
    """
    train, validation = SPLITS
    parts = [
        rows["id"]
        for store, manifest in zip(stores, bases[validation], strict=True)
        for rows in _rows(store, validation, manifest)
    ]
    held_out: NDArray[np.uint64] = np.sort(np.concatenate(parts))
    for store, manifest in zip(stores, bases[train], strict=True):
        for rows in _rows(store, train, manifest):
            places = np.minimum(np.searchsorted(held_out, rows["id"]), len(held_out) - 1)
            both = rows["id"][held_out[places] == rows["id"]]
            if len(both):
                raise InputError(
                    f"the pair of the id {both[0]} is in {store.url}/{train} and in another set's "
                    f"{validation} split; {_MIX}"
                )


def _rows(store: Store, split: str, manifest: Manifest) -> Iterator[NDArray[Any]]:
    """The rows of a split's ids, in parts."""
    table = f"{split}/{manifest.file(IDS)}"
    return rows_of_table(store, table, manifest.samples, manifest.lookup)
