"""The plan of a pack job in its place, so that all workers have the same units.

units/plan.json           the units in order; put if absent: the first counts
units/files-000000.json   a slice of a listing: pictures with their captions, and rejects
units/plan-000002.json, files-000002-000000.json     of the second version, and so on
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from core.errors import InputError
from core.files.atomic import seal, unseal
from core.storage.store import Store
from data_pipeline.config import PackConfig
from data_pipeline.formats.manifest import versioned
from data_pipeline.sources.files import FilePair
from data_pipeline.sources.listed import Packed, place_of
from data_pipeline.sources.pair import Unusable, printable
from data_pipeline.sources.plan import Source, plan_units, stem_of
from data_pipeline.sources.units import FileRow, Unit

PLAN = "units/plan.json"
_FIELDS = [field.name for field in fields(Unit)]


def plan_name(version: int) -> str:
    """The plan of a version."""
    return PLAN if version == 1 else versioned(PLAN, version)


def shared_plan(
    store: Store, sources: Sequence[Source], config: PackConfig, version: int = 1
) -> list[Unit]:
    """The units of a version, by the first worker that lists its sources.

    Raises: InputError if a source cannot be packed, or a later version would have nothing new;
    CorruptError for a damaged plan.
    """
    name = plan_name(version)
    if not store.exists(name):
        plan = plan_units(sources, config, _packed(store, version - 1))
        if version > 1 and not plan.units:
            raise InputError(f"SRC holds nothing that {store.url} does not have already")
        own = {file: _listing(file, version) for file in plan.listings}
        for file, rows in plan.listings.items():
            store.put(own[file], seal({"rows": [json.dumps(_row_json(row)) for row in rows]}))
        rows_of_units = [
            json.dumps([own.get(value, value) for value in _values(unit)]) for unit in plan.units
        ]
        texts = [printable(source.text) for source in sources]
        body = {"fields": _FIELDS, "sources": texts, "units": rows_of_units}
        store.put(name, seal(body), if_absent=True)
    return read_plan(store, version)[0]


def read_plan(store: Store, version: int) -> tuple[list[Unit], list[str]]:
    """The units of a version, and its SRC. Raises: CorruptError if it is damaged."""
    body = _read(store, plan_name(version))
    names, texts = body["fields"], body["units"]
    units = [Unit(**dict(zip(names, json.loads(text), strict=True))) for text in texts]
    return units, body["sources"]


def _values(unit: Unit) -> list[Any]:
    return [getattr(unit, name) for name in _FIELDS]


def _listing(name: str, version: int) -> str:
    """The object of a slice of a listing."""
    return name if version == 1 else name.replace("files-", f"files-{version:06d}-")


def _packed(store: Store, versions: int) -> Packed:
    """What the first versions of a set were made of."""
    archives, files, names, count = set(), set(), set(), 0
    for version in range(1, versions + 1):
        units, texts = read_plan(store, version)
        count += len(texts)
        for unit in units:
            text = texts[unit.source]
            if unit.kind == "files":
                rows = read_rows(store, unit.name)
                files |= {
                    printable(place_of(text, row.picture)) if isinstance(row, FilePair) else row.key
                    for row in rows
                }
                above = f"{unit.archive}/" if unit.archive else ""
                names |= {above + stem for row in rows if (stem := stem_of(row))}
            elif unit.archive:
                archives.add((printable(place_of(text, unit.name)), unit.tag))
                names.add(unit.archive)
    return Packed(
        sources=count,
        archives=frozenset(archives),
        files=frozenset(files),
        names=frozenset(names),
    )


def read_rows(store: Store, name: str) -> list[FileRow]:
    """A slice of a listing. Raises: CorruptError if it is damaged."""
    rows = map(json.loads, _read(store, name)["rows"])
    return [FilePair(*row) if isinstance(row, list) else Unusable(**row) for row in rows]


def _read(store: Store, name: str) -> dict[str, Any]:
    return unseal(store.get(name), f"{store.url}/{name}")


def _row_json(row: FileRow) -> Any:
    return list(row) if isinstance(row, FilePair) else vars(row)
