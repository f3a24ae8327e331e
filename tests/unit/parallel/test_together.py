"""Work of several ranks fails on all of them, by one error, or on none."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from checkpoint.together import by_all, together
from core.errors import AbsentError, CorruptError, InputError, StoreInputError, TapirError

RANKS = 3


def each(work: Callable[[int, Any], Any]) -> list[Any]:
    """`work` of (rank, gather) on every rank, each a thread; its result, or its error."""
    texts, barrier = [""] * RANKS, threading.Barrier(RANKS, timeout=20)

    def rank(number: int) -> Any:
        def gather(text: str) -> list[str]:
            texts[number] = text
            barrier.wait()
            every = list(texts) if number == 0 else texts[:1]
            barrier.wait()
            return every

        try:
            return work(number, gather)
        except TapirError as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(rank, range(RANKS)))


def failing(errors: dict[int, Exception]) -> list[Any]:
    def work(rank: int) -> int:
        if rank in errors:
            raise errors[rank]
        return rank

    return each(lambda rank, gather: together(gather, lambda: work(rank)))


def test_rank_0_hears_all_results_and_the_others_its_own() -> None:
    assert failing({}) == [[0, 1, 2], [0], [0]]
    own = each(lambda rank, gather: by_all(gather, lambda: {rank}))
    assert own == [{0}, {1}, {2}], "they need not be JSON"


@pytest.mark.parametrize(
    ("errors", "kind", "message"),
    [
        ({1: InputError("gone")}, InputError, "rank 1: gone"),
        ({0: CorruptError("bad")}, CorruptError, "rank 0: bad"),
        ({2: AbsentError("no key")}, StoreInputError, "rank 2: no key"),
        ({1: InputError("gone"), 2: InputError("gone")}, InputError, "rank 1 and 1 more: gone"),
        ({r: InputError("gone") for r in range(3)}, InputError, "gone"),
        ({1: CorruptError("a"), 2: InputError("b")}, CorruptError, "- rank 1: a\n- rank 2: b"),
        (
            {2: FileNotFoundError(2, "No such file", "/x")},
            InputError,
            "rank 2: cannot use the path",
        ),
        ({1: OSError(28, "No space left", "/x")}, TapirError, "rank 1: cannot read or write /x"),
    ],
)
def test_every_rank_raises_the_same(
    errors: dict[int, Exception], kind: type[TapirError], message: str
) -> None:
    raised = failing(errors)
    assert [type(error) for error in raised] == [kind] * RANKS
    assert len({str(error) for error in raised}) == 1
    assert str(raised[0]).startswith(message)
