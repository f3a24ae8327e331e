"""Runs each contender of a benchmark in its own process; they take turns."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class TurnWorker:
    """A contender in its own process, so that thread and allocator settings stay its own."""

    def __init__(self, make: Callable[[], Callable[[], Any]]) -> None:
        """`make` runs in the process and returns the timed function; it must be importable."""
        spawn = multiprocessing.get_context("spawn")
        self._here, there = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(make, there), daemon=True)
        self._process.start()
        there.close()

    def turn(self) -> tuple[float, Any]:
        """Run it once; returns the seconds and its result.

        Raises: EOFError if the process died.
        """
        self._here.send("turn")
        result: tuple[float, Any] = self._here.recv()
        return result

    def end(self) -> None:
        """Ask the process to end, and wait."""
        if self._process.is_alive():
            self._here.send("end")
        self._process.join()


def _serve(make: Callable[[], Callable[[], Any]], pipe: Connection) -> None:
    work = make()
    while pipe.recv() == "turn":
        began = time.perf_counter()
        value = work()
        pipe.send((time.perf_counter() - began, value))
