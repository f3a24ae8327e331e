"""Reads a plan's predicted step time for a run, by the categories of a profile."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.renamed import LAYOUT, renamed, tell_old_keys
from models.config import PriorConfig
from models.counts import prior_parameters
from parallel.config import MeshConfig
from training.config import StageConfig
from training.profiling.categories import CATEGORIES, COMPUTE, DATA, OPTIMIZER, OTHER, PIPELINE

_OF_PART = {
    "gradients": DATA,
    "weights": DATA,
    "compress": COMPUTE,
    "crowding": COMPUTE,
    "update": OPTIMIZER,
    "overhead": OTHER,
}
"""Parts of a step in `tapir plan` -> categories."""
_VOCABULARY = 0.1
"""Maximum relative difference of the parameter counts: a plan assumes default vocabularies, a run
takes those of its data."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan's prediction for the layout of a run."""

    seconds: dict[str, float]
    """Seconds per step by category."""
    gpu: str = ""
    """The planned hardware; empty if the file does not name it."""


def read_plan(plan: Path, settings: StageConfig, on_gpu: bool | None = None) -> Planned:
    """Read the output of `tapir plan --json`, or {"time": {category: seconds}}.

    `on_gpu` is True if the run was on GPUs, None if unknown.
    Raises: InputError if the file is not a plan, or for another model, machine or layout.
    """
    try:
        text = plan.read_bytes().decode()
        body = json.loads(text)
        tell_old_keys(str(plan), text, LAYOUT, MeshConfig)
        gpu = str(body.get("gpu", ""))
        times = body["time"] if "time" in body else _of_run(body, settings)
        if gpu and on_gpu is not None and on_gpu == (gpu == "cpu"):
            raise InputError(f"{plan} is for {gpu}; the run was on {'a GPU' if on_gpu else 'CPUs'}")
        predicted = dict.fromkeys(CATEGORIES, 0.0)
        for name, seconds in times.items():
            predicted[_category(name, settings)] += float(seconds)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{plan} is not a plan: save the last line of `tapir plan --json`, or give "
            '{"time": {category: seconds}}'
        ) from error
    if not all(0 <= float(seconds) < math.inf for seconds in times.values()):
        raise InputError(f"{plan}: seconds must be finite and not negative")
    return Planned(seconds=predicted, gpu=gpu)


def _of_run(body: dict[str, Any], settings: StageConfig) -> dict[str, float]:
    """Seconds by part of the first planned layout that equals the run's."""
    model: Any = settings.model  # type: ignore[attr-defined]
    if not isinstance(model, PriorConfig):
        raise InputError("plans are made for priors alone; this run is none")
    parameters = prior_parameters(model).total
    if not abs(body["parameters"] - parameters) <= _VOCABULARY * parameters:
        raise InputError(
            f"the plan's model has {body['parameters']:,} parameters, the run's {parameters:,}; "
            "plan for the run's preset"
        )
    ours = _layout_of(settings)
    layouts = [
        _with_new_names(layout) for layout in (body["best"], *body["alternatives"]) if layout
    ]
    others = [
        {name: layout[name] for name, value in ours.items() if layout[name] != value}
        for layout in layouts
    ]
    for layout, other in zip(layouts, others, strict=True):
        if not other:
            times: dict[str, float] = layout["seconds"]
            return times
    nearest = min(others, key=len, default={})
    text = ", ".join(f"{name} {value} (run: {ours[name]})" for name, value in nearest.items())
    raise InputError(
        f"none of the plan's {len(layouts)} layouts is the run's; plan for as many ranks and the "
        f"same batch{'; the nearest one has ' + text if text else ''}"
    )


def _with_new_names(layout: dict[str, Any]) -> dict[str, Any]:
    """A layout of any version; older ones lack the newest settings."""
    mesh = {"sequence_parallel": False, **renamed(MeshConfig, layout["mesh"])}
    new = {"recompute_granularity": "full", "compress_payload": "fp32"}
    return {**new, **renamed(LAYOUT, {**layout, "mesh": mesh})}


def _layout_of(settings: StageConfig) -> dict[str, Any]:
    """The layout of a run, in the fields of a plan."""
    engine, mesh, rank = settings.engine, settings.mesh, settings.compress.rank
    return {
        "mesh": dict(vars(mesh)),
        "engine": engine.name,
        "zero_stage": engine.zero_stage if engine.name != "reference" else 0,
        "gradient_accumulation_steps": engine.gradient_accumulation_steps,
        "micro_batch": settings.loop.global_batch_size
        // mesh.data
        // engine.gradient_accumulation_steps,
        "recompute": engine.recompute,
        "recompute_granularity": engine.recompute_granularity,
        "precision": engine.precision,
        "moments": settings.optim.moments,
        "compress_payload": settings.compress.payload,
        **({"compress_rank": rank} if rank != "auto" else {}),
    }


def _category(name: str, settings: StageConfig) -> str:
    if name == "results":
        return PIPELINE if settings.mesh.pipeline > 1 else DATA
    return name if name in CATEGORIES else _OF_PART[name]
