"""The data sets of a training: rank 0 reads their manifests and indexes for all ranks."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain

import core.errors
from core.errors import TapirError
from core.storage.mixture import data_sets
from core.storage.store import open_store
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.split import OpenSplit, dump_split, load_split, open_split
from parallel.mesh import Mesh

Splits = Mapping[str, Sequence[OpenSplit]]
"""Open splits of each data set, by name; without them each is read where it is used."""
UNREAD: Splits = dict.fromkeys(SPLITS, ())
_READ, _FAILED = b"+", b"-"
"""First byte of what rank 0 hands on."""


def open_splits(data: str, kind: str, mesh: Mesh) -> Splits:
    """The open splits of a data set or a mixture of this format; collective over all ranks.

    Ranks that read no records get manifests without shards, and no index.
    Raises: on every rank, the error that rank 0 met.
    """
    world, readers, places = mesh.world, mesh.data_ranks, [s.place for s in data_sets(data)]
    others = [0, *sorted(set(range(world.size)) - set(readers))]
    if world.rank:
        ranks = readers if world.rank in readers else others
        return {name: [_opened(world.hand_on(b"", ranks)) for _ in places] for name in SPLITS}
    try:
        splits = {
            name: [open_split(open_store(place), name, kind) for place in places] for name in SPLITS
        }
    except TapirError as error:
        failure = _FAILED + json.dumps([type(error).__name__, str(error)]).encode()
        for ranks in (readers, others):
            world.hand_on(failure, ranks)
        raise
    for split in chain.from_iterable(splits.values()) if world.size > 1 else ():
        world.hand_on(_READ + dump_split(split), readers)
        world.hand_on(_READ + dump_split(split.without_index()), others)
    return splits


def _opened(data: bytes) -> OpenSplit:
    if data[:1] == _FAILED:
        name, text = json.loads(data[1:])
        raise getattr(core.errors, name, TapirError)(text)
    return load_split(data[1:])
