"""Spawn the ranks of a job on this machine, and end all of them when one dies.

Ranks start from a forkserver that has imported torch once. Each writes its error to a file; the
first rank that fails determines the message and the exit code. No rank outlives the launcher.
"""

import atexit
import contextlib
import faulthandler
import functools
import importlib
import json
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.config import SupervisorConfig
from cluster.hangs import Watch
from cluster.processes import die_with, die_with_parent
from core.errors import (
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    Preempted,
    RankError,
    TapirError,
    of_files,
)
from core.files.temporary import private_folder
from core.heartbeat import FOLDER, read_beats
from core.log import set_up_logging
from core.stop import STOP, heed_stop_signals

_LOOK = 0.5
"""Seconds between two polls of the ranks."""
_STOPS = (signal.SIGTERM, signal.SIGUSR1)


class RankInputError(RankError):
    """A rank failed because of wrong input."""

    exit_code = EXIT_WRONG_INPUT
    retry = False


class StopRequest:
    """A stop request, forwarded to the running ranks."""

    def __init__(self) -> None:
        self.asked = False
        self.since = 0.0
        self._folder: Path | None = None

    def ask(self) -> None:
        """Forward the request, also to ranks that start later; they save and exit."""
        self.asked, self.since = True, time.monotonic()
        if self._folder is not None:
            (self._folder / STOP).touch()

    @contextlib.contextmanager
    def told_in(self, folder: Path) -> Iterator[None]:
        """Ranks that run in this context watch the folder."""
        self._folder = folder
        try:
            yield
        finally:
            self._folder = None

    def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or a stop is requested."""
        until = time.monotonic() + seconds
        while not self.asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def call_target(target: str, *arguments: Any) -> Any:
    """Import and call a function given as `module:function`.

    A process that only starts ranks thus never imports the ranks' modules.
    """
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def launch(
    target: str,
    payload: str,
    ranks: int,
    preload: list[str],
    config: SupervisorConfig | None = None,
    stop: StopRequest | None = None,
    reports: Path | None = None,
) -> None:
    """Run `module:function` with the payload on every rank, and wait for all.

    `reports` is a folder for the stacks of ranks that hang.
    Raises: RankError naming the first rank that failed, after all others have ended; Preempted if
    the ranks were asked to stop and saved.
    """
    config, supervised, stop = config or SupervisorConfig(), stop is not None, stop or StopRequest()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["PYTHONSAFEPATH"] = "1"  # else the forkserver imports from the current folder
    # preloaded modules query GPUs; without this, CUDA is initialised and unusable after a fork
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    started: list[Any] = []
    with (
        tempfile.TemporaryDirectory(dir=_session_folder()) as name,
        _terminable(supervised),
        stop.told_in(Path(name)),
    ):
        folder = Path(name)
        _start_forkserver()
        try:
            for rank in range(ranks):
                arguments = (target, payload, rank, ranks, name, dict(os.environ))
                process = context.Process(target=_run_rank, args=arguments, name=f"rank-{rank}")
                _start(process)
                started.append(process)
            _wait(started, folder, config, stop, Watch(started, folder, config, reports))
        except RankError as error:
            error.step = max((beat.step for beat in read_beats(folder, ranks)), default=-1)
            raise
        finally:
            _end(started)


def _start_forkserver() -> None:
    """Start the forkserver with stop signals blocked: `timeout` and systemd send them to the whole
    process group, and without a forkserver no rank can be awaited while it saves."""
    resource_tracker.ensure_running()  # its start unblocks them
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _start(process: Any) -> None:
    """Start a rank. Raises: RankError if the forkserver dies meanwhile, e.g. during imports."""
    try:
        process.start()
    except (EOFError, ConnectionError) as error:
        raise RankError(
            f"the process that starts the ranks (multiprocessing's forkserver) died before "
            f"{process.name} had begun: was it killed, maybe for memory (dmesg tells)? Its own "
            "output, if any, is above"
        ) from error


@functools.cache
def _session_folder() -> Path:
    """This process's temporary folder, which also holds the forkserver's socket."""
    folder = private_folder("tapir-ranks")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    multiprocessing.process.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]
    return folder


def _wait(
    processes: list[Any],
    folder: Path,
    config: SupervisorConfig,
    stop: StopRequest,
    watch: Watch,
) -> None:
    waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
    saved, looked = False, -_LOOK
    while waiting:
        if time.monotonic() - looked >= _LOOK:  # not once for each rank that ends
            watch.look()
            looked = time.monotonic()
        if stop.asked:
            late = time.monotonic() - stop.since - config.grace_seconds
            if late > 0:
                raise RankError(
                    f"the ranks did not save within {config.grace_seconds:.0f} s of the stop "
                    "request; all were ended, the last checkpoint is whole"
                )
        for sentinel in connection.wait(list(waiting), timeout=_LOOK):
            rank = waiting.pop(sentinel)  # type: ignore[arg-type]
            processes[rank].join()
            code = processes[rank].exitcode
            if code == EXIT_PREEMPTED:
                saved = True
            elif code:
                raise _explain(rank, processes, folder)
    if saved:
        raise Preempted("stopped with a checkpoint saved; the same command goes on from it")


def _explain(rank: int, processes: list[Any], folder: Path) -> TapirError:
    """Explain the failure: a killed rank comes first, because it causes the other ranks' errors."""
    time.sleep(0.2)  # a rank that failed first may still be writing its reason, or dying
    killed = [i for i, process in enumerate(processes) if (process.exitcode or 0) < 0]
    rank = killed[0] if killed else rank
    code, ranks = processes[rank].exitcode, len(processes)
    reasons = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if code > 0 and reasons:
        reason = json.loads(reasons[0].read_text())
        first = int(reasons[0].stem.split("-")[1])
        if reason["code"] == EXIT_WRONG_INPUT:
            return RankInputError(reason["text"])
        error = RankError(f"rank {first} of {ranks} failed: {reason['text']}")
        error.retry = reason["retry"]
        return error
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    last = {beat.rank: beat for beat in read_beats(folder, ranks)}.get(rank)
    where = f" at step {last.step + 1}, last in {last.doing}" if last else ""
    return RankError(
        f"rank {rank} of {ranks} died ({how}){where}; all ranks were ended; the same command goes "
        "on from the last checkpoint"
    )


def _end(processes: list[Any]) -> None:
    """Kill the remaining ranks: files are written atomically, and a broken world cannot save."""
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


class _terminable:
    """Turn SIGTERM into KeyboardInterrupt, unless a supervisor handles signals."""

    def __init__(self, supervised: bool) -> None:
        self._supervised = supervised

    def __enter__(self) -> None:
        if not self._supervised:
            self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if not self._supervised:
            signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt


def _run_rank(
    target: str, payload: str, rank: int, ranks: int, folder: str, environment: dict[str, str]
) -> None:
    """Main function of a rank; sets the environment, since the forkserver's may be outdated."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heed_stop_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None:
        die_with(parent.sentinel)
    stacks = open(Path(folder, f"stacks-{rank}.txt"), "w")  # noqa: SIM115 - until the rank ends
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    os.environ.clear()
    os.environ.update(
        {
            **environment,
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "TAPIR_RENDEZVOUS": f"file://{folder}/rendezvous",
            FOLDER: folder,
        }
    )
    set_up_logging(rank)
    try:
        call_target(target, payload)
    except (TapirError, OSError) as error:
        known = error if isinstance(error, TapirError) else of_files(error)
        _leave_reason(folder, rank, str(known), known.retry, known.exit_code)
        sys.exit(known.exit_code)
    except Exception:
        _leave_reason(folder, rank, traceback.format_exc(), True, EXIT_FAILED)
        sys.exit(EXIT_FAILED)


def _leave_reason(folder: str, rank: int, text: str, retry: bool, code: int) -> None:
    reason = {"text": text, "retry": retry, "code": code}
    Path(folder, f"error-{rank}.json").write_text(json.dumps(reason))
