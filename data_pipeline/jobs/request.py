"""What the place of a job was claimed for: one object for each version of its result.

request.json             the first version; put if absent: the first job wins
request-000002.json      the next one, when the input has grown
"""

import re
from typing import Any

from core.errors import CorruptError
from core.files.atomic import canonical_json
from core.storage.store import Store
from data_pipeline.formats.manifest import read_json, versioned

REQUEST = "request.json"
_NAMES = re.compile(r"request(-\d{6})?\.json")


def request_name(version: int) -> str:
    """The object that claims a version."""
    return REQUEST if version == 1 else versioned(REQUEST, version)


def newest_version(store: Store) -> int:
    """The number of the newest version that was claimed; 0 if there is none."""
    return sum(1 for name in store.names("request") if _NAMES.fullmatch(name))


def claimed(store: Store, version: int, request: dict[str, Any], again: bool) -> dict[str, Any]:
    """Claim a version, unless another job did; returns the request that counts.

    Raises: CorruptError for a damaged one; with `again` it is written anew.
    """
    name, content = request_name(version), canonical_json(request)
    if store.put(name, content, if_absent=True) or store.get(name) == content:
        return request
    try:
        return read_json(store, name)
    except CorruptError:
        if not again:
            raise
        store.put(name, content)
        return request
