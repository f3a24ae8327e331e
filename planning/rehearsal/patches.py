"""Patch modules and classes for the time of a rehearsal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Change = tuple[Any, str, Any]
"""(module or class, name of an attribute, its new value)."""
_ABSENT = object()


@contextmanager
def replaced(changes: Iterable[Change]) -> Iterator[None]:
    """Replace attributes within the context."""
    changes = list(changes)
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing, with any arguments."""
