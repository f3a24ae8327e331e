"""Spawn the ranks of a job on this machine, and end all of them when one dies.

Ranks start from a forkserver that has imported torch once. Each writes its error into a file; the
first one that fails decides the message and the exit code. No rank outlives the launcher.
"""

import atexit
import functools
import importlib
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.processes import die_with, die_with_parent, is_stopped
from core.errors import EXIT_FAILED, EXIT_WRONG_INPUT, RankError, TapirError, of_files
from core.files import private_folder
from core.log import set_up_logging

GRACE = 5.0
"""Seconds between TERM and KILL."""
STOPPED_SECONDS = 10.0
"""A rank that is stopped (SIGSTOP) for so long counts as lost."""


class RankInputError(RankError):
    """A rank found that the input is wrong."""

    exit_code = EXIT_WRONG_INPUT


def launch(target: str, payload: str, ranks: int, preload: list[str]) -> None:
    """Run `module:function` with the payload on every rank, and wait for all.

    Raises: RankError naming the first rank that failed, after all others have ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    with tempfile.TemporaryDirectory(dir=_session_folder()) as folder, _terminable():
        started: list[Any] = []
        try:
            for rank in range(ranks):
                arguments = (target, payload, rank, ranks, folder)
                process = context.Process(target=_run_rank, args=arguments, name=f"rank-{rank}")
                process.start()
                started.append(process)
            _wait(started, Path(folder))
        finally:
            _end(started)


@functools.cache
def _session_folder() -> Path:
    """This process's temporary folder; the forkserver's socket lies there too."""
    folder = private_folder("tapir-ranks")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    multiprocessing.process.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
    return folder


def _wait(processes: list[Any], folder: Path) -> None:
    waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
    stopped: dict[int, float] = {}
    while waiting:
        _refuse_stopped(processes, stopped)
        for sentinel in connection.wait(list(waiting), timeout=STOPPED_SECONDS / 4):
            rank = waiting.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            code = processes[rank].exitcode
            if code:
                raise _explain(rank, processes, folder)


def _refuse_stopped(processes: list[Any], since: dict[int, float]) -> None:
    """Raise RankError for a rank that has been stopped too long; the others wait for it."""
    for rank, process in enumerate(processes):
        if not is_stopped(process.pid):
            since.pop(rank, None)
        elif time.monotonic() - since.setdefault(rank, time.monotonic()) > STOPPED_SECONDS:
            raise RankError(
                f"rank {rank} of {len(processes)} is stopped (SIGSTOP) since {STOPPED_SECONDS:.0f} "
                "s; all ranks were ended; the same command goes on from the last checkpoint"
            )


def _explain(rank: int, processes: list[Any], folder: Path) -> TapirError:
    """Say why the world ended: a signal counts first, its victims' errors follow from it."""
    time.sleep(0.2)  # a rank that failed first may still be writing its reason, or dying
    killed = [i for i, process in enumerate(processes) if (process.exitcode or 0) < 0]
    rank = killed[0] if killed else rank
    code, ranks = processes[rank].exitcode, len(processes)
    reasons = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if code > 0 and reasons:
        text = reasons[0].read_text()
        first = int(reasons[0].stem.split("-")[1])
        if code == EXIT_WRONG_INPUT:
            return RankInputError(text)
        return RankError(f"rank {first} of {ranks} failed: {text}")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return RankError(
        f"rank {rank} of {ranks} died ({how}); all ranks were ended; the same command goes on "
        "from the last checkpoint"
    )


def _end(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


class _terminable:
    """Turn TERM into KeyboardInterrupt, so that both end the ranks."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt


def _run_rank(target: str, payload: str, rank: int, ranks: int, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None:
        die_with(parent.sentinel)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        TAPIR_RENDEZVOUS=f"file://{folder}/rendezvous",
    )
    set_up_logging(rank)
    try:
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(payload)
    except (TapirError, OSError) as error:
        known = error if isinstance(error, TapirError) else of_files(error)
        Path(folder, f"error-{rank}.txt").write_text(str(known))
        sys.exit(known.exit_code)
    except Exception:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.exit(EXIT_FAILED)
