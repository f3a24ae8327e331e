"""Config dataclasses <-> JSON; `wrong_types` lists every wrong value of a user's mapping."""

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from core.errors import ConfigError, did_you_mean
from core.renamed import new_names, renamed, tell_renamed

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


def from_json(kind: type[T], value: dict[str, Any], where: str = "") -> T:
    """Build a config dataclass from the JSON of `to_json`; old field names are translated.

    Raises: ConfigError for an unknown field, with the nearest right name.
    """
    return _build(kind, with_new_names(kind, value, where))


def with_new_names(kind: type, value: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Translate old field names in a config's JSON; logs them in one line if `where` is given."""
    body, pairs = _renamed(kind, value, "")
    if where:
        tell_renamed(where, pairs)
    return body


def _renamed(
    kind: type, value: dict[str, Any], prefix: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config under new names, and its dotted old names -> new names."""
    names = new_names(kind)
    pairs = {f"{prefix}{old}": f"{prefix}{names[old]}" for old in value if old in names}
    body = renamed(kind, value)
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(body.get(name), dict):
            body[name], more = _renamed(typing.cast(type, hint), body[name], f"{prefix}{name}.")
            pairs |= more
    return body, pairs


def _build(kind: type[T], value: dict[str, Any]) -> T:
    hints = typing.get_type_hints(kind)
    unknown = [name for name in value if name not in hints]
    if unknown:
        hint = did_you_mean(unknown[0], hints)
        raise ConfigError(f"{kind.__name__} has no field {unknown[0]!r}{hint}")
    fields = {name: _field(hints[name], item) for name, item in value.items()}
    return kind(**fields)


def wrong_types(kind: type, value: Any, where: str) -> list[str]:
    """One problem for each value of a user's mapping that does not fit the dataclass's field."""
    if not isinstance(value, dict):
        return [f"{where}: expected a mapping, got {value!r}"]
    hints, problems = typing.get_type_hints(kind), []
    for name, item in value.items():
        hint = hints.get(name)
        place = f"{where}.{name}" if where else str(name)
        if hint is None:
            hint_text = did_you_mean(name, hints) or f" (known: {', '.join(hints)})"
            problems.append(f"{where or 'the file'}: unknown {name!r}{hint_text}")
        elif dataclasses.is_dataclass(hint):
            problems += wrong_types(typing.cast(type, hint), item, place)
        elif not _fits(hint, item):
            problems.append(f"{place}={item!r} must be {describe_type(hint)}")
    return problems


def _fits(hint: Any, item: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return item in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(each, item) for each in typing.get_args(hint))
    if hint is types.NoneType:
        return item is None
    if typing.get_origin(hint) is tuple:
        part = typing.get_args(hint)[0]
        return isinstance(item, list | tuple) and all(_fits(part, each) for each in item)
    if hint is Path:
        return isinstance(item, str | Path)
    if hint is float:
        return isinstance(item, int | float) and not isinstance(item, bool)
    kind = typing.get_origin(hint) or hint
    return isinstance(item, kind) and (hint is bool or not isinstance(item, bool))


def describe_type(hint: Any) -> str:
    """Describe a type in plain words."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        numbers = {float: "numbers", int: "whole numbers"}
        return f"a list of {numbers.get(typing.get_args(hint)[0], 'texts')}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    names[types.NoneType] = "null"
    return names.get(hint, "a mapping" if typing.get_origin(hint) is dict else "a text")


def check(problems: list[str]) -> None:
    """Raise ConfigError if there are problems."""
    if problems:
        raise ConfigError.from_problems(problems)


def _field(hint: Any, item: Any) -> Any:
    if item is None:
        return None
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), item)
    if hint is Path or Path in typing.get_args(hint):
        return Path(item)
    if typing.get_origin(hint) is tuple:
        return tuple(item)
    return item


S3 = "s3://"


def place_problems(place: str, setting: str = "") -> list[str]:
    """Check the form of `s3://bucket/prefix` or a folder, without any I/O.

    `setting` names the place in the problems.
    """
    named = f"{setting}={place!r}" if setting else repr(place)
    if place.startswith(S3) and not place.removeprefix(S3).partition("/")[0]:
        return [f"{named} names no bucket; write s3://bucket/prefix"]
    if not place.startswith(S3) and ("://" in place or place.startswith("pipe:")):
        return [f"{named} is not a store that Tapir reads; give s3://bucket/prefix or a folder"]
    return []


def expression_problems(pattern: str, setting: str) -> list[str]:
    """Refuse what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{setting}={pattern!r} is not a regular expression: {error}"]
    return []


def folder_problems(folder: Path, setting: str) -> list[str]:
    """Refuse a URL where a folder is needed; as a path it would be a folder called `s3:`."""
    if re.match(r"\w+:/", str(folder)):
        return [f"{setting}={str(folder)!r} must be a folder that all nodes see"]
    return []
