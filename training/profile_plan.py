"""What a plan predicted for the mesh of a run, in the categories of a profile."""

import json
from pathlib import Path
from typing import Any

from core.errors import InputError
from training.config import StageConfig
from training.profile_categories import CATEGORIES, COMPUTE, DATA, OPTIMIZER, OTHER, PIPELINE

_OF_PART = {
    "gradients": DATA,
    "weights": DATA,
    "compress": COMPUTE,
    "update": OPTIMIZER,
    "overhead": OTHER,
}
"""Parts of a step as `tapir plan` names them -> categories."""


def predicted_times(plan: Path, settings: StageConfig) -> dict[str, float]:
    """Seconds of a step by category, from `tapir plan --json` or {"time": {category: seconds}}.

    Raises: InputError if the file is no plan, or its meshes are others than the run's.
    """
    try:
        body = json.loads(plan.read_text())
        times = body.get("time") or _of_mesh(body, settings)
        found = dict.fromkeys(CATEGORIES, 0.0)
        for name, seconds in times.items():
            found[_category(name, settings)] += float(seconds)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{plan} is no plan: save the last line of `tapir plan --json`, or give "
            '{"time": {category: seconds}}'
        ) from error


def _of_mesh(body: dict[str, Any], settings: StageConfig) -> dict[str, float]:
    """The parts of the first planned way with the run's mesh, engine and micro-batches."""
    engine = settings.engine
    zero = engine.zero_stage if engine.name != "reference" else 0
    wanted = (dict(vars(settings.mesh)), engine.name, zero, engine.accumulate)
    ways = [way for way in (body["best"], *body["alternatives"]) if way]
    for way in ways:
        if (way["mesh"], way["engine"], way["zero_stage"], way["accumulate"]) == wanted:
            times: dict[str, float] = way["seconds"]
            return times
    raise InputError(
        f"none of the plan's {len(ways)} ways has the run's mesh, engine, ZeRO stage and "
        f"accumulate: {wanted}; plan for as many ranks and the same batch"
    )


def _category(name: str, settings: StageConfig) -> str:
    if name == "results":
        return PIPELINE if settings.mesh.pipeline > 1 else DATA
    return name if name in CATEGORIES else _OF_PART[name]
