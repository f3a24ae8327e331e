"""suite.json: prompts, keys, models, settings and versions of one evaluation, and its figures.

It has no paths, times or batch sizes, so that the same evaluation writes the same bytes elsewhere.
A file of `suite`, and if wanted `settings` and `prompts`, may be written by hand.
"""

import importlib.metadata
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from core.config import check, from_json, to_json, wrong_types
from core.errors import InputError, did_you_mean
from core.files.atomic import Json
from generation.config import SampleConfig
from generation.evaluation.suites.registry import SUITES, suite_called

FILE, FORMAT = "suite.json", 1
REQUEST = "suite-request.json"
"""What was asked of a suite, beside suite.json, written before anything is drawn."""
GALLERY = "gallery.json"
"""Index of the pictures that a suite writes beside suite.json, if it does: title, text, and rows of
caption and file."""
_LIBRARIES = (
    *("tapir", "torch", "numpy", "opencv-python-headless", "tokenizers", "safetensors"),
    *("open_clip_torch", "torch-fidelity", "vector-quantize-pytorch", "diffusers"),
)
ASKED = ("suite", "keys", "models", "facts", "settings", "prompts")
"""What decides the figures, on the same machine and libraries."""
_SOFTWARE = ("versions", "numerics")


_KEYS: dict[str, type] = {
    **{"suite": str, "settings": dict, "prompts": list, "format": int, "keys": str},
    **{"models": dict, "facts": dict, "versions": dict, "numerics": dict},
    **{"results": dict, "headline": list},
}
"""Keys of a suite.json and their JSON types."""
_TYPES = {str: "a text", dict: "a mapping", list: "a list", int: "a whole number"}


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
    """Read a suite.json, also one written by hand, and check all of it.

    Raises: InputError if it is none; ConfigError with every wrong key, setting and prompt.
    """
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {path}; give a suite ({', '.join(SUITES)}) or the path of a suite.json"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not a suite.json: {error}") from error
    if not isinstance(body, dict):
        raise InputError(f"{path} is not a suite.json: {body!r:.80} is no mapping")
    if body.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path} is of another format ({body['format']!r}) than {FORMAT}; write it again by "
            "`tapir evaluate --suite NAME`"
        )
    check([f"{path}: {text}" for text in _problems(body)])
    kind = suite_called(body["suite"]).settings
    settings = from_json(kind, body.get("settings", {}))
    return Recorded(path=path, body=body, settings=settings, prompts=body.get("prompts"))


def _problems(body: Json) -> list[str]:
    """Every problem of a suite.json: its keys, their types, its settings and its prompts."""
    problems = []
    for name, value in body.items():
        if name not in _KEYS:
            hint = did_you_mean(name, _KEYS) or f" (known: {', '.join(_KEYS)})"
            problems.append(f"unknown {name!r}{hint}")
        elif not isinstance(value, _KEYS[name]):
            problems.append(f"{name}={value!r:.80} must be {_TYPES[_KEYS[name]]}")
    asked, given, prompts = (body.get(key) for key in ("suite", "settings", "prompts"))
    if not isinstance(asked, str):
        missing = f"suite: missing; it is one of {', '.join(SUITES)}"
        return problems + [missing] * ("suite" not in body)
    try:
        suite = suite_called(asked)
    except InputError as error:
        return [*problems, str(error)]
    if isinstance(given, dict):
        wrong = wrong_types(suite.settings, given, "settings")
        made = [] if wrong else from_json(suite.settings, given).problems()
        problems += wrong + [f"settings: {text}" for text in made]
    return problems + (suite.problems(prompts) if isinstance(prompts, list) else [])


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
    for part in (each for each in ASKED if each in earlier):
        old, new = earlier[part], now[part]
        if isinstance(old, dict) and part != "prompts":
            names += [f"{part}.{key}" for key in sorted(old) if old[key] != new.get(key)]
        elif old != new:
            names.append(part)
    return names


def unrecorded(earlier: Json, now: Json) -> list[str]:
    """Names of what decides the figures and the earlier file lacks."""
    names = [part for part in (*ASKED, *_SOFTWARE) if part not in earlier]
    return names + [
        f"{part}.{key}"
        for part in (*ASKED, *_SOFTWARE)
        if isinstance(now[part], dict) and part in earlier
        for key in sorted(now[part])
        if key not in earlier[part]
    ]


def other_software(earlier: Json, now: Json) -> list[str]:
    """Names of libraries and numerics that differ."""
    return [
        f"{part}.{key}"
        for part in _SOFTWARE
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
