"""Worlds of two ranks that are forks of the test itself, so that they see its patches."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist


def forked_ranks(folder: Path, ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(rank)` on some gloo ranks; returns what each returned.

    Raises: AssertionError with a rank's traceback if it failed.
    """
    context = multiprocessing.get_context("fork")
    ends = []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(rank, ranks, folder, work, theirs))
        process.start()
        theirs.close()
        ends.append((process, mine))
    values = []
    for process, mine in ends:
        fine, value = mine.recv()
        process.join()
        assert fine, value
        values.append(value)
    return values


def _rank(
    rank: int, ranks: int, folder: Path, work: Callable[[int], Any], answers: Connection
) -> None:
    try:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        value = True, work(rank)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        value = False, traceback.format_exc()
    answers.send(value)
