"""The versions of a raw set: `tapir pack SRC DEST --append` writes the next one.

    request-000002.json, units/plan-000002.json     its request and its plan
    <split>/manifest-000002.json                    written last (formats/manifest.py)

Units are numbered on from those of the version before, whose shards stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from core.config import to_json
from core.errors import AbsentError, InputError
from core.files.atomic import canonical_json, sha256
from core.storage.store import Store
from data_pipeline.catalogue.schema import part_name
from data_pipeline.config import DRAWN
from data_pipeline.formats.manifest import (
    NAME,
    RAW,
    SPLITS,
    Manifest,
    manifest_name,
    read_json,
    read_manifest,
    versioned,
)
from data_pipeline.jobs.ledger import sweep_ledgers
from data_pipeline.jobs.request import claimed, newest_version, request_name
from data_pipeline.packing.place import (
    REFUSED,
    UNITS,
    given_back,
    refuse_refused,
    taken,
    was_finished,
)
from data_pipeline.packing.plan_file import plan_name, read_plan
from data_pipeline.packing.rejects import Rejects
from data_pipeline.packing.unit import UnitTask
from data_pipeline.sources.units import Unit


def claim_next(store: Store, request: dict[str, Any], again: bool) -> int:
    """Claim the next version of a set for a request, or join the job that did; its number.

    Raises: InputError if there is no finished set of the same settings to append to.
    """
    newest = newest_version(store)
    if not newest:
        raise InputError(f"there is no data set at {store.url} to append to; leave --append out")
    before = read_json(store, request_name(newest))
    refused = _refused(newest)
    if newest > 1 and store.exists(refused):
        if before == request and not again:
            refuse_refused(store, refused)
        _clear(store, newest)
        newest -= 1
        before = read_json(store, request_name(newest))
    if before == request:
        return newest
    if not finished_version(store, newest):
        raise InputError(
            f"version {newest} of {store.url} is not finished; end it first, by the command that "
            f"began it (of {before.get('source')!r})"
        )
    _refuse_other_settings(store, before, request)
    made = claimed(store, newest + 1, request, again)
    if made != request:
        raise taken(store, made)
    return newest + 1


def finished_version(store: Store, version: int) -> dict[str, Manifest]:
    """The manifests of a version; empty unless it is finished."""
    if not all(store.exists(f"{split}/{manifest_name(version)}") for split in SPLITS):
        return {}
    return {split: read_manifest(store, f"{split}/", RAW, version) for split in SPLITS}


def result_of(store: Store, version: int) -> str:
    """The object that is written last for a version."""
    last = f"{SPLITS[-1]}/"
    is_grown = version > 1 or store.exists(last + versioned(NAME, 2))
    return last + (versioned(NAME, version) if is_grown else NAME)


def tasks_of(store: Store, version: int) -> list[UnitTask]:
    """The units of a version that has a plan, numbered on from those of earlier versions.

    Raises: InputError if an older Tapir packed the set.
    """
    first = sum(len(_groups(store, number)) for number in range(1, version))
    digest = sha256(canonical_json(read_json(store, request_name(version))))
    return [
        _task(number, group, digest) for number, group in enumerate(_groups(store, version), first)
    ]


@contextmanager
def place_given_back(store: Store, version: int, alone: bool) -> Iterator[None]:
    """On an InputError give the claim of an unfinished version back; `alone`: no other workers."""
    if version == 1:
        with given_back(store, alone):
            yield
        return
    try:
        yield
    except InputError as error:
        if not was_finished(store, version):
            if alone:
                _clear(store, version)
            else:
                note = canonical_json({"reason": str(error)})
                store.put(_refused(version), note, if_absent=True)
        raise


def _refused(version: int) -> str:
    """The object that says why a worker has ended the job of a version."""
    return versioned(REFUSED, version)


def _clear(store: Store, version: int) -> None:
    """Delete what the unfinished job of a later version wrote; its claim last."""
    for task in tasks_of(store, version) if store.exists(plan_name(version)) else ():
        store.delete(task.marker)
        for name in outputs_of(store, task.number):
            store.delete(name)
    sweep_ledgers(store, UNITS)
    for name in (plan_name(version), _refused(version), request_name(version)):
        store.delete(name)


def outputs_of(store: Store, number: int) -> list[str]:
    """Names of the objects that a unit may have written."""
    shards = [name for split in SPLITS for name in store.names(f"{split}/shard-{number:06d}")]
    return [*shards, part_name(number), Rejects(store, 0.0, number).name]


def _refuse_other_settings(store: Store, before: dict[str, Any], request: dict[str, Any]) -> None:
    old, new = dict(before["config"]), dict(request["config"])
    names = sorted({*old, *new} - {"count"})
    other = [name for name in names if old.get(name) != new.get(name)]
    if other:
        raise InputError(
            f"{store.url} was packed with other settings ({', '.join(other)}); append with the same"
        )


def _groups(store: Store, version: int) -> list[tuple[Unit, ...]]:
    """The units of each task of a version; with --count one task reads them all."""
    try:
        units, _ = read_plan(store, version)
    except (AbsentError, KeyError) as error:
        raise InputError(
            f"{store.url} was packed by an older version and cannot grow; pack all of it anew"
        ) from error
    limited = bool(read_json(store, request_name(version))["config"]["count"])
    if limited and any(unit.kind not in DRAWN for unit in units):
        return [tuple(units)]
    return [(unit,) for unit in units]


def _task(number: int, units: Sequence[Unit], request: str) -> UnitTask:
    body = [to_json(unit) for unit in units]
    sizes = [unit.count if unit.kind in DRAWN else 0 for unit in units]
    return UnitTask(
        prefix=UNITS,
        name=sha256(canonical_json({"request": request, "number": number, "units": body})),
        shown=f"unit {number}: {units[0].shown}",
        size=sum(sizes) if all(sizes) else 0,
        number=number,
        units=tuple(units),
        bytes=sum(unit.size for unit in units),
    )
