"""The data sets of a training: rank 0 reads their manifests and indexes for all ranks."""

import json
from collections.abc import Mapping

import core.errors
from core.errors import TapirError
from core.storage.store import open_store
from data_pipeline.formats.manifest import SPLITS
from data_pipeline.formats.split import OpenSplit, dump_split, load_split, open_split
from parallel.mesh import Mesh

Splits = Mapping[str, OpenSplit]
"""Open splits by name; missing ones are read where they are used."""
UNREAD: Splits = {}
_READ, _FAILED = b"+", b"-"
"""First byte of what rank 0 hands on."""


def open_splits(place: str, kind: str, mesh: Mesh) -> Splits:
    """The open splits of a data set of this format; collective over all ranks.

    Ranks that read no records get manifests without shards, and no index.
    Raises: on every rank, the error that rank 0 met.
    """
    world, readers = mesh.world, mesh.data_ranks
    others = [0, *sorted(set(range(world.size)) - set(readers))]
    if world.rank:
        ranks = readers if world.rank in readers else others
        return {name: _opened(world.hand_on(b"", ranks)) for name in SPLITS}
    try:
        splits = {name: open_split(open_store(place), name, kind) for name in SPLITS}
    except TapirError as error:
        failure = _FAILED + json.dumps([type(error).__name__, str(error)]).encode()
        for ranks in (readers, others):
            world.hand_on(failure, ranks)
        raise
    for split in splits.values() if world.size > 1 else ():
        world.hand_on(_READ + dump_split(split), readers)
        world.hand_on(_READ + dump_split(split.without_index()), others)
    return splits


def _opened(data: bytes) -> OpenSplit:
    if data[:1] == _FAILED:
        name, text = json.loads(data[1:])
        raise getattr(core.errors, name, TapirError)(text)
    return load_split(data[1:])
