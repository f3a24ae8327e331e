"""Keep-lists: a view of a set without the pairs that a condition or a comparison leaves out.

No picture is read: the records of a split, in order, are the kept rows of the catalogue with that
split, so that a choice of rows is a mask of the view.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from core.errors import CorruptError, InputError
from core.log import LOG
from core.storage.store import Store
from data_pipeline.catalogue.duplicates import drop_duplicates
from data_pipeline.catalogue.parts import FACT, Catalogue, place_of, put_catalogue
from data_pipeline.catalogue.query import Database
from data_pipeline.catalogue.schema import CATALOGUE
from data_pipeline.catalogue.verdict import (
    CONDITION,
    KEPT,
    REJECTED,
    Verdict,
    is_kept_by_unit,
    read_part,
)
from data_pipeline.config import FilterConfig
from data_pipeline.formats.manifest import NAME, RAW, SPLITS, Manifest, Shard, read_manifest
from data_pipeline.formats.raw_set import Base, Keep, write_view


def keep(
    store: Store,
    dest: Store,
    catalogue: Catalogue,
    database: Database,
    where: str,
    filters: FilterConfig,
) -> dict[str, Manifest]:
    """Write a view of the kept pairs for which `where` holds; of `filters`, duplicates and near.

    Duplicates are judged among the chosen pairs, and the first one is kept.
    Raises: InputError if the condition is wrong, nothing is left, or DEST holds something else.
    """
    base = {name: read_manifest(store, f"{name}/", RAW) for name in SPLITS}
    choice = {"where": where, "duplicates": filters.duplicates, "near": filters.near}
    facts = {"view": {name: row.fingerprint for name, row in base.items()}, "keep": choice}
    if views := _finished(dest, facts):
        LOG.info("%s already holds this view", dest.url)
        return views
    verdict = _judged(catalogue, database, where, filters)
    masks = {name: _mask(verdict, name, base[name], store) for name in SPLITS}
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        raise InputError(f"no pair of {empty[0]} is left; give a condition that leaves out fewer")
    parts = [replace(part, place=place_of(store, part)) for part in catalogue.parts]
    digest = put_catalogue(dest, parts, chain(_left_out(catalogue), verdict.left_out()))
    return {
        name: write_view(
            dest,
            f"{name}/",
            [Base(store=store, split=name, keep=_by_shard(masks[name], base[name].shards))],
            {**facts, "split": name, FACT: digest},
            dict(Counter(base[name].rejects) + Counter(verdict.counts)),
        )
        for name in SPLITS
    }


def _finished(dest: Store, facts: dict[str, Any]) -> dict[str, Manifest]:
    """The manifests of this view; empty if DEST is free or has a part of one.

    Raises: InputError if DEST holds something else.
    """
    if not dest.exists(f"{SPLITS[-1]}/{NAME}"):
        own = tuple(f"{split}/" for split in SPLITS)
        others = [n for n in dest.names() if not n.startswith((CATALOGUE, *own)) or _is_tar(n)]
        if others:
            raise InputError(f"{dest.url} holds other files ({others[0]}); choose an empty DEST")
        return {}
    views = {name: read_manifest(dest, f"{name}/", RAW) for name in SPLITS}
    if any({key: view.facts.get(key) for key in facts} != facts for view in views.values()):
        raise InputError(f"{dest.url} holds another data set; choose an empty DEST")
    return views


def _is_tar(name: str) -> bool:
    return name.endswith(".tar")


def _judged(catalogue: Catalogue, database: Database, where: str, filters: FilterConfig) -> Verdict:
    """What becomes of the catalogue's rows."""
    verdict = Verdict.all_kept(catalogue.paths, where)
    for number, path in enumerate(catalogue.paths):
        kept = is_kept_by_unit(read_part(path, ["split", "reject"]))
        verdict.of_part(number)[~kept] = REJECTED
    for table in _left_out(catalogue):
        rows = verdict.rows_of(table["unit"].to_numpy(), table["place"].to_numpy())
        verdict.kinds[rows] = REJECTED
    chosen = np.zeros(len(verdict.kinds), np.bool_)
    for units, places in database.chosen(where):
        chosen[verdict.rows_of(units, places)] = True
    verdict.kinds[(verdict.kinds == KEPT) & ~chosen] = CONDITION
    if filters.duplicates or filters.near >= 0:
        drop_duplicates(verdict, filters)
    return verdict


def _left_out(catalogue: Catalogue) -> Iterator[pa.Table]:
    """What the base leaves out."""
    if catalogue.left_out:
        with pq.ParquetFile(catalogue.left_out) as file:
            for batch in file.iter_batches():
                yield pa.Table.from_batches([batch])


def _mask(verdict: Verdict, split: str, base: Manifest, store: Store) -> NDArray[np.bool_]:
    """One bit a record of a split of the base.

    Raises: CorruptError if the catalogue has another number of them.
    """
    bits = [np.empty(0, np.bool_)]
    for number, path in enumerate(verdict.parts):
        is_here = pc.equal(read_part(path, ["split"])["split"], split).fill_null(False).to_numpy()
        kinds = verdict.of_part(number)[is_here]
        bits.append(kinds[kinds != REJECTED] == KEPT)
    mask = np.concatenate(bits)
    if len(mask) != base.samples:
        raise CorruptError(
            f"the catalogue of {store.url} has {len(mask)} kept pairs of {split}, its manifest "
            f"{base.samples}; pack it again with --again"
        )
    return mask


def _by_shard(mask: NDArray[np.bool_], shards: list[Shard]) -> Keep:
    ends = np.cumsum([0, *(shard.samples for shard in shards)])
    return lambda number: mask[ends[number] : ends[number + 1]]
