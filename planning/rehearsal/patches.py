"""Patch modules and classes for the time of a rehearsal."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
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


class AtOnce:
    """An executor that works in the caller's thread, whose tensors are shadows."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:  # raised by result(), as from a thread
            done.set_exception(error)
        return done

    def shutdown(self, **_: Any) -> None:
        """Nothing is in work."""


def no_progress(*_: Any) -> AbstractContextManager[Any]:
    return nullcontext(SimpleNamespace(update=nothing))
