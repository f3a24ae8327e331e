"""suite.json: prompts, keys, models, settings and versions of one evaluation, and its figures.

It has no paths, times or batch sizes, so that the same evaluation writes the same bytes elsewhere.
A file of `suite`, and if wanted `settings` and `prompts`, may be written by hand.
"""

import importlib.metadata
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from core.config import from_json, to_json, wrong_types
from core.errors import ConfigError, InputError
from core.files.atomic import Json
from generation.config import SampleConfig
from generation.evaluation.suites.registry import SUITES, suite_called

FILE, FORMAT = "suite.json", 1
GALLERY = "gallery.json"
"""Index of the pictures that a suite writes beside suite.json, if it does: title, text, and rows of
caption and file."""
KEYS = "candidate c of a caption is drawn by the key (settings.seed, caption, c)"
_LIBRARIES = (
    *("tapir", "torch", "numpy", "opencv-python-headless", "tokenizers", "safetensors"),
    *("open_clip_torch", "torch-fidelity", "vector-quantize-pytorch", "diffusers"),
)
_ASKED = ("suite", "models", "facts", "settings", "prompts")
"""What decides the figures, on the same machine and libraries."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A suite.json that was given to be repeated."""

    path: Path
    body: Json
    settings: SampleConfig
    prompts: list[Json] | None = None
    """None: the suite chooses them."""

    @property
    def name(self) -> str:
        return str(self.body["suite"])


def read_recorded(path: Path) -> Recorded:
    """Read a suite.json, also one written by hand.

    Raises: InputError if it is none; ConfigError with every wrong setting.
    """
    try:
        body = json.loads(path.read_bytes())
        name, prompts = body["suite"], body.get("prompts")
        given = body.get("settings", {})
        captions = [row["caption"] for row in prompts or ()]
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {path}; give a suite ({', '.join(SUITES)}) or the path of a suite.json"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a suite.json: {error!r} in it") from error
    if body.get("format", FORMAT) != FORMAT or not all(isinstance(c, str) for c in captions):
        raise InputError(
            f"{path} is of another format ({body.get('format')}) than {FORMAT}, or has prompts "
            "without a caption; write it again by `tapir evaluate --suite NAME`"
        )
    kind = suite_called(name).settings
    if problems := wrong_types(kind, given, f"{path}: settings"):
        raise ConfigError.from_problems(problems)
    return Recorded(path=path, body=body, settings=from_json(kind, given), prompts=prompts)


def settings_json(settings: SampleConfig) -> Json:
    """The settings that decide figures: without paths, and in fp32 without the batch size."""
    body: Json = to_json(settings)
    free = {each.name for each in fields(settings) if _is_path(each.type)}
    if settings.precision == "fp32":
        free.add("batch")
    return {name: value for name, value in body.items() if name not in free}


def versions() -> dict[str, str]:
    """Versions of the libraries that decide figures; "" = not installed."""
    return {name: _version(name) for name in _LIBRARIES}


def differences(earlier: Json, now: Json) -> list[str]:
    """Names of what decides the figures and differs; names that the earlier file lacks are left."""
    names = []
    for part in (each for each in _ASKED if each in earlier):
        old, new = earlier[part], now[part]
        if isinstance(old, dict) and part != "prompts":
            names += [f"{part}.{key}" for key in sorted(old) if old[key] != new.get(key)]
        elif old != new:
            names.append(part)
    return names


def other_software(earlier: Json, now: Json) -> list[str]:
    """Names of libraries and numerics that differ."""
    return [
        f"{part}.{key}"
        for part in ("versions", "numerics")
        for key, value in sorted(earlier.get(part, {}).items())
        if value != now[part].get(key)
    ]


def prompt_problems(recorded: Recorded, settings: SampleConfig) -> list[str]:
    """Problems of settings that ask for another number of prompts than a file has."""
    count = suite_called(recorded.name).count
    if recorded.prompts is None or not count:
        return []
    if getattr(settings, count) == getattr(recorded.settings, count):
        return []
    flag = f"--{count.replace('_', '-')}"
    return [f"{recorded.path} has its own prompts; leave {flag} out, or give the suite's name"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_path(hint: Any) -> bool:
    return hint is Path or Path in get_args(hint)
