"""Command lines from typed functions and configs, by tyro."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from core.config import to_json
from core.errors import InputError
from core.renamed import new_names, tell_renamed

T = TypeVar("T")
FLAT: Any = tyro.conf.OmitArgPrefixes
"""Annotation of a config: its flags have no prefix."""
PositionalText = Annotated[str, tyro.conf.Positional]
PositionalPath = Annotated[Path, tyro.conf.Positional]


def parse(function: Callable[..., T], arguments: Sequence[str], verb: str) -> T:
    """Call a function with arguments from the command line; every parameter is a flag.

    An unknown flag exits with code 2 and suggests the closest known one.
    """
    names: dict[str, str] = {}
    for hint in get_type_hints(function, include_extras=True).values():
        kind = next(iter(get_args(hint)), hint)
        names |= renamed_flags(kind, flat=True)
    return tyro.cli(function, args=with_new_flags(names, arguments), prog=f"tapir {verb}")


def parse_over(
    default: T,
    arguments: Sequence[str],
    verb: str,
    description: str | None = None,
    flat: bool = False,
) -> T:
    """Override fields of a preset by flags; `flat`: flags of nested configs have no prefix."""
    return tyro.cli(
        type(default),
        default=default,
        args=with_new_flags(renamed_flags(type(default), flat), arguments),
        prog=f"tapir {verb}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,) if flat else (),
    )


def renamed_flags(kind: Any, flat: bool = False) -> dict[str, str]:
    """Old name -> new name of a config's flags, without dashes; `flat` as in `parse_over`."""
    return dict(_renamed_flags(kind, "", flat))


def _renamed_flags(kind: Any, prefix: str, flat: bool) -> Iterator[tuple[str, str]]:
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return
    for old, new in new_names(kind).items():
        yield prefix + old, prefix + new
    for name, hint in get_type_hints(kind).items():
        yield from _renamed_flags(hint, prefix if flat else f"{prefix}{name}.", flat)


def with_new_flags(names: dict[str, str], arguments: Sequence[str]) -> list[str]:
    """Translate old flags of a command line; logs them in one line."""
    translated, pairs = [], {}
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    for argument in arguments[:end]:
        flag, equals, value = argument.partition("=")
        if new := _new_flag(names, flag):
            pairs[flag], argument = new, f"{new}{equals}{value}"
        translated.append(argument)
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments[:end]}
    for old, new in pairs.items():
        if new in given:
            raise InputError(f"{old} and {new} are the same setting: give {new} alone")
    tell_renamed("the command line", pairs)
    return [*translated, *arguments[end:]]


def _new_flag(names: dict[str, str], flag: str) -> str:
    """The new spelling of an old flag, else ""; `--a.no-old` is the negation of `--a.old`."""
    if not flag.startswith("--"):
        return ""
    dotted = flag.removeprefix("--").replace("-", "_")
    owner, dot, field = dotted.rpartition(".")
    no = "no_" if field.startswith("no_") and dotted not in names else ""
    old = f"{owner}{dot}{field.removeprefix(no)}"
    if old not in names:
        return ""
    owner, dot, field = names[old].rpartition(".")
    return f"--{owner}{dot}{no}{field}".replace("_", "-")


def print_json(value: Any) -> None:
    """Print one JSON object as the last line of standard output."""
    sys.stdout.write(json.dumps(to_json(value)) + "\n")
    sys.stdout.flush()
