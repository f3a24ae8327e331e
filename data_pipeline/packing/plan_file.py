"""The plan of a pack job in its place, so that all workers have the same units.

units/plan.json           the units in order; put if absent: the first counts
units/files-000000.json   a slice of a listing: pictures with their captions, and rejects
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from core.files.atomic import seal, unseal
from core.storage.store import Store
from data_pipeline.config import PackConfig
from data_pipeline.sources.files import FilePair
from data_pipeline.sources.pair import Unusable
from data_pipeline.sources.plan import Source, plan_units
from data_pipeline.sources.units import FileRow, Unit

PLAN = "units/plan.json"
_FIELDS = [field.name for field in fields(Unit)]


def shared_plan(store: Store, sources: Sequence[Source], config: PackConfig) -> list[Unit]:
    """The units of a job, by the first worker that lists its sources.

    Raises: InputError if a source cannot be packed; CorruptError for a damaged plan.
    """
    if not store.exists(PLAN):
        plan = plan_units(sources, config)
        for name, rows in plan.listings.items():
            store.put(name, seal({"rows": [json.dumps(_row_json(row)) for row in rows]}))
        units = [json.dumps([getattr(unit, name) for name in _FIELDS]) for unit in plan.units]
        store.put(PLAN, seal({"fields": _FIELDS, "units": units}), if_absent=True)
    body = _read(store, PLAN)
    names, texts = body["fields"], body["units"]
    return [Unit(**dict(zip(names, json.loads(text), strict=True))) for text in texts]


def read_rows(store: Store, name: str) -> list[FileRow]:
    """A slice of a listing. Raises: CorruptError if it is damaged."""
    rows = map(json.loads, _read(store, name)["rows"])
    return [FilePair(*row) if isinstance(row, list) else Unusable(**row) for row in rows]


def _read(store: Store, name: str) -> dict[str, Any]:
    return unseal(store.get(name), f"{store.url}/{name}")


def _row_json(row: FileRow) -> Any:
    return list(row) if isinstance(row, FilePair) else vars(row)
