"""The config.json of a run folder."""

import json
from pathlib import Path
from typing import Any

from core.errors import InputError


def config_of(run: Path) -> dict[str, Any]:
    """The settings of a run, with its stage. Raises: InputError if the folder holds no run."""
    path = run / "config.json"
    try:
        body: dict[str, Any] = json.loads(path.read_bytes())
        if {"stage", "loop"} <= body.keys():
            return body
        reason = f"{path} is of something else"
    except FileNotFoundError:
        reason = "no config.json"
    except (ValueError, AttributeError):
        reason = f"{path} is damaged"
    raise InputError(f"{run} is no run folder ({reason}); give the --out of `tapir train`")
