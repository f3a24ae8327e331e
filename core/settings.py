"""Config dataclasses <-> JSON, with every problem reported at once."""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

from core.errors import ConfigError

T = TypeVar("T")


def to_json(config: Any) -> Any:
    """Turn a config into JSON values; paths become text."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, list | tuple):
        return [to_json(item) for item in config]
    if isinstance(config, dict):
        return {name: to_json(item) for name, item in config.items()}
    return config


def from_json(kind: type[T], value: dict[str, Any]) -> T:
    """Build a config of dataclasses from what `to_json` made.

    Raises: ConfigError for an unknown field, with the nearest right name.
    """
    hints = typing.get_type_hints(kind)
    unknown = [name for name in value if name not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{kind.__name__} has no field {unknown[0]!r}{hint}")
    fields = {name: _field(hints[name], item) for name, item in value.items()}
    return kind(**fields)


def check(problems: list[str]) -> None:
    """Raise ConfigError if there are problems."""
    if problems:
        raise ConfigError.from_problems(problems)


def _field(hint: Any, item: Any) -> Any:
    if item is None:
        return None
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), item)
    if hint is Path or Path in typing.get_args(hint):
        return Path(item)
    if typing.get_origin(hint) is tuple:
        return tuple(item)
    return item
