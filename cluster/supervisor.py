"""Restart the ranks when one dies or hangs, until the run ends or makes no more progress."""

import signal
from pathlib import Path
from types import FrameType

from cluster.config import SupervisorConfig
from cluster.launcher import StopRequest, launch
from core.errors import Preempted, RankError
from core.log import LOG
from core.stop import stop_asked

_LONGEST = 60.0
"""Maximum seconds between two starts."""


def supervise(
    target: str,
    payload: str,
    ranks: int,
    preload: list[str],
    config: SupervisorConfig,
    reports: Path,
) -> None:
    """Run `module:function` on every rank; after a failure all restart from the forkserver.

    SIGTERM and SIGUSR1 are forwarded to the ranks, which save and exit. `reports` is a folder for
    the stacks of ranks that hang.
    Raises: RankError after config.max_restarts failures without progress, or for wrong input;
    Preempted if the ranks were asked to stop and saved.
    """
    failures, best = 0, -1
    with _Forwarded() as stop:
        while True:
            if stop.asked:
                raise Preempted("asked to stop while no rank was running; start the same again")
            try:
                launch(target, payload, ranks, preload, config, stop, reports)
                return
            except RankError as error:
                if not error.retry or stop.asked or config.max_restarts == 0:
                    raise
                if error.step > best:
                    failures, best = 0, error.step
                failures += 1
                if failures > config.max_restarts:
                    raise _crash_loop(error, failures, best) from error
                pause = min(config.backoff_seconds * 2 ** (failures - 1), _LONGEST)
                LOG.warning("%s; all ranks start again in %.1f s", error, pause)
                stop.sleep(pause)


def _crash_loop(error: RankError, failures: int, best: int) -> RankError:
    where = f"after step {best}" if best >= 0 else "before the first step"
    failure = RankError(f"{failures} failures in a row {where}, giving up; the last one: {error}")
    failure.retry, failure.step = False, best
    return failure


class _Forwarded:
    """Forward SIGTERM and SIGUSR1 to the ranks; a second SIGTERM ends all at once."""

    def __enter__(self) -> StopRequest:
        self._stop = StopRequest()
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._heed) for number in numbers}
        if stop_asked():
            self._stop.ask()
        return self._stop

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heed(self, number: int, _frame: FrameType | None) -> None:
        if self._stop.asked and number == signal.SIGTERM:
            raise KeyboardInterrupt
        LOG.warning("asked to stop (%s): saving first", signal.Signals(number).name)
        self._stop.ask()
