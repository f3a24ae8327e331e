"""Work on the next items of an iterator by threads, while the caller uses the present one.

    items (one thread, in order) -> jobs of each item (worker threads) -> results, in order

Threads are enough for pictures: Pillow and OpenCV release the GIL while they decode and resize
(docs/data.md compares them with processes). A job draws nothing from global state, so results do
not depend on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def depth_of(workers: int, jobs: int = 1) -> int:
    """Items in work or ready: as many as keep all workers busy, and one more.

    `jobs` is the number of jobs of an item.
    """
    return 1 + -(-workers // jobs)


def prepared_ahead(
    items: Iterator[Item],
    jobs_of: Callable[[Item], Sequence[Callable[[], Result]]],
    workers: int,
    depth: int,
) -> Generator[tuple[Item, list[Result]], None, None]:
    """Each item with the results of its jobs, in order; at most `depth` further ones are held.

    `jobs_of` is called in the order of the items, in one thread. An exception of an item or of a
    job is raised in its turn, after all items before it. When the generator is closed, jobs that
    have not begun are cancelled, the others are waited for, and no thread remains.
    """
    puller, pool = ThreadPoolExecutor(1, "pull"), ThreadPoolExecutor(workers, "prepare")

    def pull() -> tuple[Item, list[Future[Result]]] | None:
        for item in items:
            return item, [pool.submit(job) for job in jobs_of(item)]
        return None

    try:
        waiting = deque(puller.submit(pull) for _ in range(depth))
        while (pulled := waiting.popleft().result()) is not None:
            item, futures = pulled
            results = [future.result() for future in futures]
            waiting.append(puller.submit(pull))
            yield item, results
            del item, futures, results, pulled
    finally:
        puller.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False, cancel_futures=True)
        puller.shutdown()
        pool.shutdown()
