"""Ranks that wait for peers react to Ctrl-C and SIGTERM, and name the missing ranks and hosts."""

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import core.stop
import tapir as front_door
from core.errors import EXIT_PREEMPTED
from core.launch_environment import free_port
from core.log import LOG
from core.stop import heed_stop_signals
from parallel import rendezvous
from parallel.rendezvous import heard, met_store

_SECONDS = 120.0
"""A rank that hears nothing answers never; this is for a machine that is busy."""


class _Rank:
    """A fork of the test that waits; sends its warnings and its outcome through a pipe."""

    def __init__(self, work: Callable[[], Any], environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("fork")
        self._link, theirs = context.Pipe()
        self.process = context.Process(target=_be, args=(work, environment, theirs))
        self.process.start()
        theirs.close()

    def hear(self) -> tuple[str, str]:
        """The next message: ("told", a warning) or the outcome."""
        assert self._link.poll(_SECONDS), "the rank says nothing"
        what, text = self._link.recv()
        return what, text

    def end(self) -> tuple[str, str]:
        """The outcome, after all warnings."""
        while (outcome := self.hear())[0] == "told":
            pass
        self.process.join()
        return outcome

    def kill(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)


def _be(work: Callable[[], Any], environment: dict[str, str], link: Any) -> None:
    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            link.send(("told", record.getMessage()))

    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    heed_stop_signals()
    core.stop._asked = False
    LOG.handlers[:] = [Told()]
    rendezvous.NOTICE_SECONDS = 0.0
    try:
        outcome = "met", str(work() or "")
    except BaseException as error:
        outcome = type(error).__name__, str(error)
    link.send(outcome)


def waits(rank: int, size: int, environment: dict[str, str], seconds: float = 600) -> _Rank:
    """A rank of a world that waits for the others."""
    return _Rank(lambda: met_store(rank, size, timedelta(seconds=seconds)) and "", environment)


def tcp() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Preempted")]
)
@pytest.mark.parametrize(
    ("rank", "files", "missing"),
    [
        (0, False, "2 ranks that did not come: 1, 2"),
        (1, False, "rank 0, which does not answer yet"),
        (1, True, "2 ranks that did not come: 0, 2"),
    ],
)
def test_a_rank_that_waits_hears_signals(
    number: int, error: str, rank: int, files: bool, missing: str, tmp_path: Path
) -> None:
    where = {"TAPIR_RENDEZVOUS": f"file://{tmp_path}/r"} if files else tcp()
    waiting = waits(rank, 3, where)
    kind, text = waiting.hear()
    place = "on this machine" if files else f"at 127.0.0.1:{where['MASTER_PORT']}"
    assert kind == "told" and f"rank {rank} of 3 has waited" in text
    assert f"{place} for {missing}" in text
    waiting.kill(number)
    kind, text = waiting.end()
    assert kind == error and f"rank {rank} of 3 has waited" in text, text
    assert f"s {place} for {missing}" in text


def test_a_rank_that_stops_ends_those_that_wait_with_it() -> None:
    where = tcp()
    first = waits(0, 3, where)
    assert "1, 2" in first.hear()[1]
    second = waits(1, 3, where)
    while rendezvous_came(where) < 2:
        pass
    second.kill(signal.SIGUSR1)
    assert second.end()[0] == "Preempted"
    kind, text = first.end()
    assert kind == "Preempted" and "rank 1 was asked to stop" in text


def rendezvous_came(where: dict[str, str]) -> int:
    """How many ranks have registered in the store."""
    host, port = where["MASTER_ADDR"], int(where["MASTER_PORT"])
    seconds = timedelta(seconds=60)
    store = rendezvous.TCPStore(host, port, None, False, seconds, wait_for_workers=False)
    return int(rendezvous.PrefixStore("tapir", store).add("came", 0))


def test_ranks_that_all_come_meet_in_any_order() -> None:
    """Rank 0, which holds the store, stays until all have met, as it does in a training."""
    where, all_met = tcp(), multiprocessing.get_context("fork").Barrier(3)

    def meet(rank: int) -> None:
        common = met_store(rank, 3, timedelta(seconds=600))
        all_met.wait(_SECONDS)
        del common

    ranks = [_Rank(partial(meet, rank), where) for rank in (2, 0, 1)]
    assert [rank.end()[0] for rank in ranks] == ["met"] * 3


def test_rounds_of_one_store_are_independent() -> None:
    """torchrun's agents keep their store over restarts, and count these differently."""
    store = rendezvous.TCPStore(
        "127.0.0.1", 0, None, True, timedelta(seconds=_SECONDS), wait_for_workers=False
    )
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    where["TORCHELASTIC_USE_AGENT_STORE"] = "True"

    def meet(rank: int) -> str:
        common = met_store(rank, 2, timedelta(seconds=600))
        return "fresh" if common.add(f"trained-{rank}", 1) == 1 else "stale"

    def start(rank: int, count: int) -> _Rank:
        return _Rank(partial(meet, rank), {**where, "TORCHELASTIC_RESTART_COUNT": str(count)})

    for counts in ((0, 0), (0, 1)):
        both = [start(rank, count) for rank, count in enumerate(counts)]
        assert [rank.end() for rank in both] == [("met", "fresh")] * 2
    left = start(1, 1)
    assert "rank 1 of 2 has waited" in left.hear()[1]
    left.kill(signal.SIGKILL)
    left.process.join()
    alone = start(0, 1)
    assert "rank 0 of 2 has waited" in alone.hear()[1]
    alone.kill(signal.SIGUSR1)
    assert alone.end()[0] == "Preempted"
    both = [start(rank, 1) for rank in (1, 0)]
    assert [rank.end() for rank in both] == [("met", "fresh")] * 2


@pytest.mark.parametrize("name", ["rank0.invalid", "rank..0"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_does_not_resolve_is_refused(
    rank: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.0)
    kind, text = waits(rank, 2, {**tcp(), "MASTER_ADDR": name}).end()
    assert kind == "InputError" and f"MASTER_ADDR='{name}' does not resolve" in text


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("", 0)) as other:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        kind, text = waits(0, 2, where).end()
    assert kind == "InputError" and "another program has the port" in text


def test_a_wait_ends_by_itself() -> None:
    kind, text = waits(0, 2, tcp(), 0.01).end()
    assert kind == "TapirError" and "1 rank that did not come: 1: giving up" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_a_rank_that_waits_inside_torch(number: int, code: int) -> None:
    """torch's own wait for its ranks runs no handler of Python's."""

    def stuck() -> None:
        rendezvous._PATIENCE = dict.fromkeys(rendezvous._PATIENCE, 0.05)
        signal.signal(signal.SIGINT, lambda *_: None)  # the signal may arrive before torch waits
        with heard("rank 0 of 2 waits in torch"):
            LOG.warning("begins")
            rendezvous.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=_SECONDS * 2))

    rank = _Rank(stuck, {})
    assert rank.hear() == ("told", "begins")
    rank.kill(number)
    assert f"{signal.Signals(number).name}: rank 0 of 2 waits in torch, for" in rank.hear()[1]
    rank.process.join()
    assert rank.process.exitcode == code
    assert EXIT_PREEMPTED == 75 and rendezvous.EXIT_INTERRUPTED == 130


def test_an_interrupt_says_what_was_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt("interrupted: rank 0 of 2 has waited")

    monkeypatch.setattr("cli.train.train", interrupted)
    monkeypatch.setattr("sys.argv", ["tapir", "train"])
    handlers = list(LOG.handlers)
    with pytest.raises(SystemExit) as ended:
        front_door.main()
    LOG.handlers[:] = handlers
    assert ended.value.code == 130
    assert "tapir: interrupted: rank 0 of 2 has waited" in capsys.readouterr().err


class _Sums:
    """A store of sums that counts its requests."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.requests = 0

    def add(self, key: str, amount: int) -> int:
        self.requests += 1
        self.sums[key] = self.sums.get(key, 0) + amount
        return self.sums[key]


def test_missing_ranks_take_a_request_for_sixty_ranks() -> None:
    """1,024 ranks that each ask for each other are a million requests of one store."""
    store, late = _Sums(), [0, 59, 60, 119, 120, 1023]
    ranks = [rendezvous.Meeting(rank, 1024, timedelta(seconds=1)) for rank in range(1024)]
    for rank in ranks:
        rank._store = store  # type: ignore[assignment]
    came = [ranks[i]._arrive(store) for i in range(1024) if i not in late]  # type: ignore[arg-type]
    assert came == list(range(1, 1019))
    store.requests = 0
    assert ranks[5]._missing() == late
    assert store.requests == 18
    assert all(0 <= number < 2**63 for number in store.sums.values())


def test_one_rank_of_those_in_the_store_tells() -> None:
    store = _Sums()
    ranks = [rendezvous.Meeting(rank, 8, timedelta(seconds=1)) for rank in range(8)]
    for rank in ranks[:6]:
        rank._store = store  # type: ignore[assignment]
    told = [rank._is_first_to_tell() for rank in ranks]
    assert told == [True] + [False] * 5 + [True] * 2
    assert store.requests == 6
