"""Work that several ranks do, each its part, and that fails on all of them or on none."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from core.errors import (
    CheckpointError,
    ConfigError,
    CorruptError,
    InputError,
    StoreError,
    StoreInputError,
    TapirError,
    joined,
    of_files,
)
from core.files.atomic import Json

T = TypeVar("T")
Gather = Callable[[str], list[str]]
"""`World.gather_text`."""
_KINDS = {
    kind.__name__: kind
    for kind in (
        *(CheckpointError, ConfigError, CorruptError, InputError, StoreError, StoreInputError),
        TapirError,
    )
}


def together(gather: Gather, work: Callable[[], Any]) -> list[Any]:
    """Do this rank's part of some work; collective, also where it fails.

    Returns the results as JSON: on rank 0 of all ranks, on the others rank 0's alone.
    Raises: TapirError, on every rank, of the kind of the first rank's; it names each rank that
    failed and why. An OSError counts as `of_files` of it.
    """
    mine: Json = {}
    try:
        mine["result"] = work()
    except TapirError as error:
        mine = _told(error)
    except OSError as error:
        mine = _told(of_files(error))
    answers = [json.loads(text) for text in gather(json.dumps(mine))]
    errors = {at: answer for at, answer in enumerate(answers) if "error" in answer}
    outcome: Json = {}
    if errors:
        kind = next(iter(errors.values()))["kind"]
        outcome = {"kind": kind, "error": _joined(errors, len(answers))}
    outcome = json.loads(gather(json.dumps(outcome))[0])
    if outcome:
        raise _KINDS[outcome["kind"]](outcome["error"])
    return [answer["result"] for answer in answers if "result" in answer]


def by_all(gather: Gather, work: Callable[[], T]) -> T:
    """This rank's result of work that all ranks do, which need not be JSON; collective.

    Raises: the errors of `together`.
    """
    results: list[T] = []
    together(gather, lambda: results.append(work()))
    return results[0]


def _told(error: TapirError) -> Json:
    kind = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS)
    return {"error": str(error), "kind": kind}


def _joined(errors: dict[int, Json], ranks: int) -> str:
    """Each message once, with its first rank unless all ranks have it."""
    by_text: dict[str, list[int]] = {}
    for rank, answer in errors.items():
        by_text.setdefault(answer["error"], []).append(rank)
    return joined([_of_ranks(text, at, ranks) for text, at in by_text.items()])


def _of_ranks(text: str, at: list[int], ranks: int) -> str:
    if len(at) == ranks:
        return text
    return f"rank {at[0]}{f' and {len(at) - 1} more' if at[1:] else ''}: {text}"
