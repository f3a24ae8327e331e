"""Work ahead of the caller: in order, bounded, with its errors in their turn, and without rests."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from core.errors import ConfigError, CorruptError
from data_pipeline.config import LoaderConfig
from data_pipeline.streaming.ahead import depth_of, prepared_ahead
from tests.harness import PATIENCE


def _threads() -> set[str]:
    return {t.name.split("_")[0] for t in threading.enumerate()} & {"pull", "prepare"}


def _squares(number: int) -> list[Callable[[], int]]:
    return [partial(pow, number, 2), partial(pow, number, 3)]


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (2, 3), (8, 9)])
def test_results_come_in_the_order_of_items_and_jobs(workers: int, depth: int) -> None:
    rows = list(prepared_ahead(iter(range(20)), _squares, workers, depth))
    assert rows == [(i, [i**2, i**3]) for i in range(20)]
    assert not _threads()


def test_a_slow_first_item_does_not_change_the_order() -> None:
    """Its job ends after those of both items behind it have."""
    later = [threading.Event(), threading.Event()]

    def work(number: int) -> int:
        if number == 0:
            assert all(event.wait(PATIENCE) for event in later)
        elif number <= 2:
            later[number - 1].set()
        return number

    made = prepared_ahead(iter(range(5)), lambda i: [partial(work, i)], 3, 3)
    assert [results for _, results in made] == [[i] for i in range(5)]


class _AtOnce(ThreadPoolExecutor):
    """Does the work in the caller's thread, so that it is done when `submit` returns."""

    def submit(self, fn: Any, /, *arguments: Any, **named: Any) -> Any:
        done: Future[Any] = Future()
        done.set_result(fn(*arguments, **named))
        return done


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_are_ahead_of_the_caller(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller has the first item, and `depth` more are pulled, however fast the threads are."""
    monkeypatch.setattr("data_pipeline.streaming.ahead.ThreadPoolExecutor", _AtOnce)
    items, made = iter(range(100)), []
    ahead = prepared_ahead(items, lambda i: [partial(made.append, i)], 2, depth)
    next(ahead)
    assert made == [*range(1 + depth)]
    next(ahead)
    assert made == [*range(2 + depth)]
    ahead.close()
    assert next(items) == 2 + depth


def test_jobs_run_beside_the_caller_s_own_work() -> None:
    ready = threading.Event()
    made = prepared_ahead(iter(range(2)), lambda i: [ready.set if i else lambda: None], 1, 1)
    next(made)
    assert ready.wait(PATIENCE), "item 1 is made before the caller asks for it"
    made.close()


@pytest.mark.parametrize("where", ["item", "jobs_of", "job"])
def test_an_error_is_raised_in_its_turn(where: str) -> None:
    def fail(number: int, place: str) -> None:
        if number == 3 and place == where:
            raise CorruptError("train/shard-000000.tar: the block at offset 7 has crc32 1")

    def items() -> Iterator[int]:
        for i in range(9):
            fail(i, "item")
            yield i

    def jobs(number: int) -> list[Callable[[], Any]]:
        fail(number, "jobs_of")
        return [partial(fail, number, "job")]

    made, passed = prepared_ahead(items(), jobs, 2, 4), []
    with pytest.raises(CorruptError, match=r"shard-000000.tar: the block at offset 7"):
        for number, _ in made:
            passed.append(number)
    assert passed == [0, 1, 2] and not _threads()


def test_closing_waits_for_running_jobs_and_cancels_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, release, done = threading.Event(), threading.Event(), []
    shutdown = ThreadPoolExecutor.shutdown

    def ended(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait:  # the others are cancelled by now
            release.set()
        shutdown(pool, wait, cancel_futures=cancel_futures)

    def work(number: int) -> None:
        if number:
            begun.set()
            assert release.wait(PATIENCE)
        done.append(number)

    made = prepared_ahead(iter(range(50)), lambda i: [partial(work, i)], 1, 8)
    next(made)
    assert begun.wait(PATIENCE)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", ended)
    made.close()
    assert done == [0, 1] and not _threads()


def test_an_item_without_jobs_is_passed_on() -> None:
    assert list(prepared_ahead(iter("ab"), lambda _: [], 2, 2)) == [("a", []), ("b", [])]


@pytest.mark.parametrize(
    ("workers", "jobs", "depth"),
    [(1, 1, 2), (4, 1, 5), (4, 2, 3), (4, 3, 3), (4, 4, 2), (4, 64, 2)],
)
def test_all_workers_have_work_and_one_item_is_ready(workers: int, jobs: int, depth: int) -> None:
    assert depth_of(workers, jobs) == depth
    assert depth_of(3) == 4
    assert (depth - 1) * jobs >= workers > (depth - 2) * jobs


def test_a_loader_has_a_worker() -> None:
    with pytest.raises(ConfigError, match=r"loader.readers, prefetch and workers must be at least"):
        raise ConfigError.from_problems(LoaderConfig(workers=0).problems())
    assert LoaderConfig(workers=1).problems() == []
