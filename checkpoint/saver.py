"""Asynchronous saving: copy the state, then digest and write it in a thread."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from checkpoint.format import StateSlice
from checkpoint.writer import Gather, write_checkpoint
from core.errors import StoreError
from core.files.atomic import Json
from core.storage.store import Store


class Saver:
    """Writes this rank's part of the checkpoints of a run, one at a time.

    In the background, a save blocks training only for a copy in memory. Later saves reuse the
    buffers of that copy, which take as much memory as the state.
    """

    def __init__(self, store: Store, rank: int, gather: Gather, background: bool) -> None:
        """`gather` must not share a process group with training: the thread calls it."""
        self._store, self._rank, self.gather = store, rank, gather
        self._pool = ThreadPoolExecutor(1, "save") if background else None
        self._pending: Future[None] | None = None
        self._buffers: dict[tuple[str, str, int], Tensor] = {}

    def save(
        self, name: str, slices: Iterable[StateSlice], facts: Json, then: Callable[[], None]
    ) -> float:
        """Write a checkpoint, then call `then`; returns the seconds that training was blocked.

        Waits for the previous save. Call `failure` to learn whether a save failed.
        """
        began = time.perf_counter()
        if self._pool is None:
            self._pending = _done(lambda: self._write(name, slices, facts, then))
            return time.perf_counter() - began
        if self._pending is not None:
            self._pending.exception()
        copies, devices = [], set()
        for part in slices:
            devices.add(part.data.device)
            copies.append(self._copy(part))
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._pending = self._pool.submit(self._write, name, copies, facts, then)
        return time.perf_counter() - began

    def failure(self) -> StoreError | None:
        """The error of the last save, returned once; None while it runs or if it succeeded."""
        if self._pending is None or not self._pending.done():
            return None
        error, self._pending = self._pending.exception(), None
        if error is not None and not isinstance(error, StoreError):
            raise error
        return error

    def settle(self) -> None:
        """Wait for a background save; `failure` still returns its error."""
        if self._pending is not None:
            self._pending.exception()

    def wait(self) -> None:
        """Wait for a background save. Raises: StoreError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self, name: str, slices: Iterable[StateSlice], facts: Json, then: Callable[[], None]
    ) -> None:
        write_checkpoint(self._store, name, slices, facts, self._rank, self.gather)
        then()

    def _copy(self, part: StateSlice) -> StateSlice:
        key, data = (part.name, part.kind, part.start), part.data.detach().reshape(-1)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            pinned = data.device.type == "cuda"
            buffer = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=pinned)
            self._buffers[key] = buffer
        buffer.copy_(data, non_blocking=True)
        return StateSlice(
            name=part.name, kind=part.kind, shape=part.shape, start=part.start, data=buffer
        )


def _done(work: Callable[[], None]) -> "Future[None]":
    """Run some work now and return its outcome as a future."""
    outcome: Future[None] = Future()
    try:
        work()
        outcome.set_result(None)
    except StoreError as error:
        outcome.set_exception(error)
    return outcome
