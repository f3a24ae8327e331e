"""`flags` of a run file's stages: checked by name and value, written as a command's arguments."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from typing import Any

from core.config import describe_type
from core.known_flags import KnownFlags, flag_text

Value = str | int | float | bool
Flags = Mapping[str, Value | list[Value]]


def flag_problems(where: str, known: KnownFlags, flags: Flags, verb: str) -> dict[str, str]:
    """Problems by flag: unknown ones, booleans that are none, and lists for one value."""
    problems = {}
    for name, value in flags.items():
        hint = known.types.get(name)
        if hint is None:
            if value is True and known.negated(name):
                continue
            text = known.hint(name, _in_file) or f"; `tapir {verb} --help` lists the flags"
            problems[name] = f"{where}.{name}: unknown{text}"
        elif (hint is bool) != isinstance(value, bool) or (
            isinstance(value, list) and not _takes_list(hint)
        ):
            problems[name] = _wrong_value(where, known, name, value)
    return problems


def parsed(
    where: str, known: KnownFlags, flags: Flags, parse: Callable[[list[str]], Any]
) -> tuple[Any, list[str]]:
    """The settings that `parse` makes of flags, or one problem for each value that does not fit."""
    settings, message = _quietly(parse, arguments_of(flags))
    if settings is not None:
        return settings, []
    wrong = {n: v for n, v in flags.items() if _quietly(parse, _arguments(n, v))[0] is None}
    texts = [_wrong_value(where, known, name, value) for name, value in wrong.items()]
    return None, texts or [f"{where}: {message}"]


def _quietly(parse: Callable[[list[str]], Any], arguments: list[str]) -> tuple[Any, str]:
    """Settings, else None and what tyro wrote."""
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            return parse(arguments), ""
    except SystemExit:
        return None, message.getvalue()


def arguments_of(flags: Flags) -> list[str]:
    """Flags as arguments of tyro; a list becomes several values after its flag."""
    return [text for name, value in flags.items() for text in _arguments(name, value)]


def _arguments(name: str, value: Value | list[Value]) -> list[str]:
    if isinstance(value, bool):
        return [flag_text(name, not value)]
    if isinstance(value, list):
        return [flag_text(name), *map(str, value)]
    return [f"{flag_text(name)}={value}"]


def _takes_list(hint: Any) -> bool:
    """True for a flag of several values."""
    return getattr(hint, "__origin__", None) is tuple


def _wrong_value(where: str, known: KnownFlags, name: str, value: object) -> str:
    return f"{where}.{name}={value!r} must be {describe_type(known.types[name])}"


def _in_file(name: str, negated: bool) -> str:
    """A flag as a run file has it."""
    return f"{name}: false" if negated else name
