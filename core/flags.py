"""Command lines from typed functions and configs, by tyro."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from core.config import to_json

T = TypeVar("T")
FLAT: Any = tyro.conf.OmitArgPrefixes
"""Annotation of a config: its flags have no prefix."""
PositionalText = Annotated[str, tyro.conf.Positional]
PositionalPath = Annotated[Path, tyro.conf.Positional]


def parse(function: Callable[..., T], arguments: Sequence[str], verb: str) -> T:
    """Call a function with what the command line says; every parameter is a flag.

    A wrong flag ends in exit code 2 with the nearest right one.
    """
    return tyro.cli(function, args=list(arguments), prog=f"tapir {verb}")


def parse_over(
    default: T,
    arguments: Sequence[str],
    verb: str,
    description: str | None = None,
    flat: bool = False,
) -> T:
    """Change fields of a preset by flags; `flat`: without the names of the fields they lie in."""
    return tyro.cli(
        type(default),
        default=default,
        args=list(arguments),
        prog=f"tapir {verb}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,) if flat else (),
    )


def print_json(value: Any) -> None:
    """Print one JSON object as the last line of standard output."""
    sys.stdout.write(json.dumps(to_json(value)) + "\n")
    sys.stdout.flush()
