"""The config.json of a run folder."""

import json
from pathlib import Path
from typing import Any

from core.config import check
from core.errors import ConfigError, InputError
from training.config import StageConfig
from training.stages import STAGES, config_with_new_names, settings_from_json

_REMEDY = (
    "the run's own command writes it again when it resumes; that of another version of Tapir is "
    "read by that version"
)


def config_of(run: Path) -> dict[str, Any]:
    """Read a run's settings and stage. Raises: InputError if the folder is not a run folder."""
    path = run / "config.json"
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        if not {"stage", "loop"} <= body.keys():
            reason = f"{path} is of something else"
        elif isinstance(body["stage"], str) and isinstance(body["loop"]["steps"], int):
            return config_with_new_names(body, str(path))
        else:
            reason = f"{path} is damaged"
    except FileNotFoundError:
        reason = "no config.json"
        if run.is_dir():
            reason += "; a run that has just been started writes it in its first minute"
    except (ValueError, AttributeError, KeyError, TypeError):
        reason = f"{path} is damaged"
    raise InputError(f"{run} is not a run folder ({reason}); give the --out of `tapir train`")


def settings_of_run(run: Path) -> tuple[str, StageConfig]:
    """(stage, settings) of a training run. Raises: InputError if it is none, or damaged."""
    body = config_of(run)
    stage = body.pop("stage")
    path = run / "config.json"
    if stage not in STAGES:
        raise InputError(f"{path} is of stage {stage!r}, not of {', '.join(STAGES)}")
    try:
        settings = settings_from_json(stage, body)
        check(settings.problems())
        return stage, settings
    except ConfigError as error:
        raise InputError(f"{path} is damaged or of another version: {error}; {_REMEDY}") from error
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); {_REMEDY}") from error
