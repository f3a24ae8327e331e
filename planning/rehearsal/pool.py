"""Run the ranks of a rehearsal as forks of one process that has imported everything.

At most `jobs` ranks run at a time; a rank that waits for a message does not count. When all wait,
no message can arrive any more, and each gets NeverSent.
"""

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

import numpy as np

from cluster.processes import die_with_parent
from core.errors import RankError
from core.log import set_up_logging
from parallel.engines.registry import import_engine
from planning.rehearsal.sequence import NeverSent
from planning.rehearsal.sequence import Sequence as RankSequence

Runner = Callable[[Any, Any], RankSequence]
"""(task, broker) -> the sequence of the task's rank."""
Link = Any
"""One end of a multiprocessing pipe."""
_PATIENCE = 5.0
"""Seconds in which the process may exit by itself."""


class Pool:
    """Context manager of a process that forks ranks; leaves no process running."""

    def __init__(self, device: str = "cuda") -> None:
        """`device`: type of each rank's device, real or fake."""
        self.device = device

    def __enter__(self) -> "Pool":
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._server = context.Process(target=_serve, args=(theirs, self.device))
        self._server.start()
        theirs.close()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._link.close()
        self._server.join(0 if error else _PATIENCE)
        self._server.kill()
        self._server.join()

    def run(
        self,
        tasks: Sequence[Any],
        runner: Runner,
        jobs: int,
        told: Callable[[int], None] = lambda done: None,
    ) -> list[RankSequence]:
        """The sequences of the tasks, in their order; `jobs` ranks run at a time.

        `told` is called with the number of finished ranks.
        Raises: RankError if a process dies.
        """
        try:
            self._link.send((list(tasks), runner, jobs))
            while isinstance(reply := self._link.recv(), int):
                told(reply)
        except (EOFError, BrokenPipeError):
            self._server.join()
            code = self._server.exitcode
            raise RankError(f"the process of the rehearsal died (exit code {code})") from None
        if isinstance(reply, str):
            raise RankError(reply)
        return list(reply)


def _serve(link: Link, device: str) -> None:
    """Import what the ranks need once, then fork them, until the other side closes the pipe."""
    die_with_parent()
    os.environ["DS_ACCELERATOR"] = device  # DeepSpeed asks for it when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging(1)
    while True:
        try:
            tasks, runner, jobs = link.recv()
        except EOFError:
            return
        mesh, engine = tasks[0].settings.mesh, tasks[0].settings.engine.name
        import_engine(engine, mesh.world > mesh.data)
        _import_compiler()
        gc.freeze()  # what is imported stays shared with the forks
        stage = _Ranks(tasks, runner, jobs, link.send)
        try:
            link.send(stage.play())
        except RankError as error:
            link.send(str(error))
        finally:
            stage.end()


def _import_compiler() -> None:
    """Import once what would take every rank seconds."""
    import torch._dynamo  # noqa: PLC0415 - in this process alone
    import torch._inductor.compile_fx  # noqa: F401, PLC0415


class _Ranks:
    """All ranks of a rehearsal, and the messages between them."""

    def __init__(
        self, tasks: list[Any], runner: Runner, jobs: int, tell: Callable[[int], None]
    ) -> None:
        self._tasks, self._runner, self._jobs, self._tell = tasks, runner, jobs, tell
        self._left = deque(range(len(tasks)))
        self._links: dict[Link, int] = {}
        self._processes: dict[int, Any] = {}
        self._messages: dict[Any, list[np.ndarray]] = {}
        self._waiting: dict[Link, tuple[Any, int]] = {}
        self._sequences: dict[int, RankSequence] = {}

    def play(self) -> list[RankSequence]:
        """Run all ranks to their ends."""
        while self._left or self._links:
            while self._left and len(self._links) - len(self._waiting) < self._jobs:
                self._start(self._left.popleft())
            if len(self._waiting) == len(self._links):
                for link in list(self._waiting):
                    self._answer(link, None)
            for link in connection.wait(list(self._links)):
                self._hear(link)
        return [self._sequences[i] for i in range(len(self._tasks))]

    def end(self) -> None:
        """Kill the processes that still run."""
        for process in self._processes.values():
            if process.is_alive():
                process.kill()
            process.join()

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("fork")
        mine, theirs = context.Pipe()
        arguments = (theirs, self._tasks[index], self._runner)
        process = context.Process(target=_be_rank, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._links[mine], self._processes[index] = index, process

    def _hear(self, link: Link) -> None:
        index = self._links[link]
        try:
            what, *rest = link.recv()
        except EOFError:
            self._processes[index].join()
            code = self._processes[index].exitcode
            rank = self._tasks[index].rank
            raise RankError(f"the process of rank {rank} died (exit code {code})") from None
        if what == "give":
            channel, message = rest
            self._messages.setdefault(channel, []).append(message)
            for other, expected in list(self._waiting.items()):
                if expected == (channel, len(self._messages[channel]) - 1):
                    self._answer(other, message)
        elif what == "take":
            channel, place = rest
            sent = self._messages.get(channel, [])
            if place < len(sent):
                link.send(sent[place])
            else:
                self._waiting[link] = (channel, place)
        else:
            self._sequences[index] = rest[0]
            self._tell(len(self._sequences))
            self._processes[index].join()
            del self._links[link]
            link.close()

    def _answer(self, link: Link, message: np.ndarray | None) -> None:
        del self._waiting[link]
        link.send(message)


class _Messenger:
    """The broker of one rank: passes its messages through the pool's process."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def give(self, channel: Any, message: np.ndarray) -> None:
        self._link.send(("give", channel, message.copy()))

    def take(self, channel: Any, place: int) -> np.ndarray:
        self._link.send(("take", channel, place))
        message: np.ndarray | None = self._link.recv()
        if message is None:
            raise NeverSent(f"nobody sends what it waits for from rank {channel[1]}")
        return message


def _be_rank(link: Link, task: Any, runner: Runner) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # a short life, without large memory
    link.send(("done", runner(task, _Messenger(link))))
    link.close()
