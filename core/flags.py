"""Command lines from typed functions and configs, by tyro."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from core.config import to_json
from core.errors import InputError
from core.known_flags import known_flags, refuse_unknown_flags
from core.renamed import tell_renamed

T = TypeVar("T")
FLAT: Any = tyro.conf.OmitArgPrefixes
"""Annotation of a config: its flags have no prefix."""
PositionalText = Annotated[str, tyro.conf.Positional]
PositionalTexts = Annotated[tuple[str, ...], tyro.conf.Positional]
PositionalPath = Annotated[Path, tyro.conf.Positional]


def parse(function: Callable[..., T], arguments: Sequence[str], verb: str) -> T:
    """Call a function with arguments from the command line; every parameter is a flag.

    An unknown flag exits with code 2 and suggests the closest known one.
    """
    known = known_flags(function, flat=True)
    translated = with_new_flags(known.renamed, arguments)
    refuse_unknown_flags(known, translated, verb)
    return tyro.cli(function, args=translated, prog=f"tapir {verb}")


def parse_over(
    default: T,
    arguments: Sequence[str],
    verb: str,
    description: str | None = None,
    flat: bool = False,
    others: Sequence[str] = (),
) -> T:
    """Override fields of a preset by flags; `flat`: flags of nested configs have no prefix.

    `others`: further flags of the verb, to suggest for an unknown one.
    """
    known = known_flags(type(default), flat)
    translated = with_new_flags(known.renamed, arguments)
    refuse_unknown_flags(known, translated, verb, others)
    return tyro.cli(
        type(default),
        default=default,
        args=translated,
        prog=f"tapir {verb}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,) if flat else (),
    )


def with_new_flags(names: dict[str, str], arguments: Sequence[str]) -> list[str]:
    """Translate old flags of a command line; logs them once."""
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
