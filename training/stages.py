"""The registry of training stages; imports no torch.

A new model needs a settings class in training/config.py, a module in training/tasks/ with a
function `build(settings, mesh)`, and a row here.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.config import from_json, to_json, with_new_names
from training.config import ClipTrain, DVAETrain, PriorTrain, StageConfig


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """The settings and the task of a stage."""

    settings: type[StageConfig]
    task: str
    """Module of training/tasks/ that builds its task; only ranks import it."""


STAGES = {
    "dvae": StageEntry(settings=DVAETrain, task="training.tasks.dvae"),
    "prior": StageEntry(settings=PriorTrain, task="training.tasks.prior"),
    "clip": StageEntry(settings=ClipTrain, task="training.tasks.clip"),
}


def make_task(stage: str, settings: StageConfig, mesh: Any) -> Any:
    """Build the task (training.tasks.task.Task) of a stage on this rank's mesh."""
    build: Callable[..., Any] = importlib.import_module(STAGES[stage].task).build
    return build(settings, mesh)


def to_payload(stage: str, settings: StageConfig) -> str:
    """Serialise a stage and its settings for ranks in other processes."""
    return json.dumps({"stage": stage, "settings": to_json(settings)})


def parse_payload(payload: str) -> tuple[str, Any]:
    """Parse the output of `to_payload`."""
    body = json.loads(payload)
    return body["stage"], settings_from_json(body["stage"], body["settings"])


def settings_from_json(stage: str, body: dict[str, Any], where: str = "") -> Any:
    """Parse the settings of a stage. Raises: ConfigError for unknown fields or types."""
    return from_json(STAGES[stage].settings, body, where)


def config_with_new_names(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A run's stored config with renamed fields under new names; unchanged for other stages."""
    entry = STAGES.get(str(config.get("stage")))
    return config if entry is None else with_new_names(entry.settings, config, where)
