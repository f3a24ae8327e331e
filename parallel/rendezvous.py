"""Ranks wait for each other here before torch creates their process group.

Inside torch a process reacts neither to Ctrl-C nor to SIGTERM while its peers are late. So all
ranks first wait here, in Python: each registers in the common store, and the last one writes that
all have arrived. A rank that stops or times out writes that instead. The first entry written is
valid for all ranks.

torchrun's store survives restarts, and its restart counters differ between nodes. There rank 0
draws a name for the round and gives it to each rank that asks; entries of earlier rounds are never
read again.
"""

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from core.errors import EXIT_PREEMPTED, InputError, Preempted, TapirError
from core.launch_environment import RENDEZVOUS, address_of_ranks
from core.log import LOG
from core.stop import stop_asked

EXIT_INTERRUPTED = 130
NOTICE_SECONDS = 5.0
"""A rank that waits longer logs once which ranks are missing."""
RESOLVE_SECONDS = 10.0
"""How long a host name may fail to resolve: a pod's DNS record appears after the pod."""
_CONNECT_SECONDS = 1.0
_STORE_SECONDS = 60.0
_HEARD_SECONDS = 2.0
"""How long the rank that serves the store stays for ranks that have not yet read the reason."""
_SHOWN = 8
_BITS = 60
"""Ranks that share a word of arrival bits in the store, a signed 64-bit number."""
_PATIENCE = {signal.SIGINT: 2.0, signal.SIGTERM: 10.0, signal.SIGUSR1: 10.0}
"""Seconds that Python's handler of a signal has before the process is ended."""
_CAME, _END, _MET = "came", "end", "met"
_STOPPED = "was asked to stop"


def met_store(rank: int, size: int, timeout: timedelta) -> Store:
    """The ranks' common store, after all have arrived; see `Meeting.store`."""
    return Meeting(rank, size, timeout).store()


class Meeting:
    """One rank's wait for the others."""

    def __init__(self, rank: int, size: int, timeout: timedelta) -> None:
        self._rank, self._size, self._timeout = rank, size, timeout
        self._began = time.monotonic()
        self._store: Store | None = None
        self._place, self._told = "", False

    def store(self) -> Store:
        """Open the common store and wait until all ranks have arrived.

        Raises: InputError if the place is wrong; Preempted if this rank or another is asked to
        stop; KeyboardInterrupt, naming the missing ranks; TapirError after the timeout.
        """
        try:
            return self._gather(self._open())
        except KeyboardInterrupt:
            self._leave("was interrupted")
            raise KeyboardInterrupt(f"interrupted: {self.sentence()}") from None

    def sentence(self) -> str:
        """Describe which rank waits for which, where and how long."""
        seconds = time.monotonic() - self._began
        missing = _listed(self._missing())
        if self._store is None and self._rank == 0:
            missing = "that address to be known"
        who = f"rank {self._rank} of {self._size}"
        return f"{who} has waited {seconds:.0f} s {self._place} for {missing}"

    def _open(self) -> Store:
        path = os.environ.get(RENDEZVOUS, "")
        if path:
            self._place = "on this machine"
            return FileStore(path.removeprefix("file://"), self._size)
        host, port = address_of_ranks()
        self._place = f"at {host}:{port}"
        holds = self._rank == 0 and not _is_agents()
        self._reach(host, port, holds)
        try:
            store = TCPStore(
                host,
                port,
                self._size,
                is_master=holds,
                timeout=timedelta(seconds=_STORE_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            raise _refused(self._rank, self._place, holds, error) from error
        store.set_timeout(self._timeout)
        return PrefixStore("tapir", store)

    def _reach(self, host: str, port: int, holds: bool) -> None:
        """Wait until the name resolves and, unless this rank serves the store, the port is open."""
        while True:
            try:
                if holds:
                    socket.getaddrinfo(host, port)
                else:
                    socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
                return
            except (socket.gaierror, UnicodeError) as error:
                if time.monotonic() - self._began >= RESOLVE_SECONDS:
                    raise InputError(
                        f"rank {self._rank}: MASTER_ADDR={host!r} does not resolve on this machine "
                        f"({error}); set it to the IP address of rank 0's node, or put "
                        "the name into /etc/hosts or DNS"
                    ) from None
            except OSError:
                pass  # rank 0 may not listen yet
            self._look()
            time.sleep(0.1)

    def _gather(self, common: Store) -> Store:
        seats = Seats(common) if _is_agents() else None
        try:
            store = self._store = self._round(seats) if seats else common
            if store.add(_key(self._rank), 1) == 1 and self._arrive(store) == self._size:
                store.compare_set(_END, "", _MET)
            for pause in _pauses():
                if store.check([_END]):
                    break
                if seats and self._rank == 0:
                    seats.give()
                self._look()
                time.sleep(pause)
            end = store.get(_END).decode()
        except RuntimeError as error:
            self._store = None
            if stop_asked():
                raise self._stopped() from None
            text = f"rank 0 has ended meanwhile, see its output; {self.sentence()}"
            raise TapirError(text) from error
        if end != _MET:
            self._end_as_told(end)
        return store

    def _arrive(self, store: Store) -> int:
        """Register this rank; returns how many ranks have arrived."""
        store.add(_word(self._rank // _BITS), 1 << self._rank % _BITS)
        return int(store.add(_CAME, 1))

    def _round(self, seats: "Seats") -> Store:
        """Wait for a seat in the round of the present rank 0."""
        if self._rank == 0:
            return seats.store(seats.name)
        seats.ask(self._rank)
        for pause in _pauses():
            if name := seats.taken(self._rank):
                return seats.store(name)
            self._look()
            time.sleep(pause)
        raise AssertionError("pauses never end")

    def _look(self) -> None:
        """Check for a stop request and the timeout; log once if it takes long."""
        waited = time.monotonic() - self._began
        if stop_asked() and self._leave(_STOPPED):
            raise self._stopped()
        if waited > self._timeout.total_seconds() and self._leave("gave up"):
            raise TapirError(
                f"{self.sentence()}: giving up; see whether they were started and what they say, "
                "and that the port is open between the nodes"
            )
        if waited > NOTICE_SECONDS and not self._told:
            self._told = True
            if self._is_first_to_tell():
                LOG.warning("%s; Ctrl-C ends it", self.sentence())

    def _is_first_to_tell(self) -> bool:
        """True on one of the ranks that have reached the store, and on those that have not."""
        if self._store is not None:
            with suppress(RuntimeError):
                return int(self._store.add("told", 1)) == 1
        return True

    def _stopped(self) -> Preempted:
        return Preempted(f"asked to stop: {self.sentence()}; start the same again")

    def _leave(self, why: str) -> bool:
        """Tell the others that this rank leaves; False if all have already met."""
        if self._store is None:
            return True
        with suppress(RuntimeError):
            end = self._store.compare_set(_END, "", f"rank {self._rank} {why}").decode()
            self._linger()
            return end != _MET
        return True

    def _end_as_told(self, end: str) -> None:
        """Raise the error that follows from another rank's leaving."""
        text = f"{end}, so that the {self._size} ranks will not meet {self._place}"
        assert self._store is not None, "what was told came out of the store"
        with suppress(RuntimeError):
            self._store.add("heard", 1)
            self._linger()
        raise Preempted(text) if end.endswith(_STOPPED) else TapirError(text)

    def _linger(self) -> None:
        """On rank 0, which may serve the store, wait until the others have read the reason."""
        until = time.monotonic() + _HEARD_SECONDS
        store = self._store
        while self._rank == 0 and store is not None and time.monotonic() < until:
            if store.add("heard", 0) >= store.add(_CAME, 0) - 1:
                return
            time.sleep(0.05)

    def _missing(self) -> list[int] | None:
        """Ranks that have not arrived; None if the store does not answer.

        Takes a request for each _BITS ranks: at worst all ranks ask.
        """
        store = self._store
        if store is None:
            return None
        with suppress(RuntimeError):
            words = [store.add(_word(i), 0) for i in range(-(-self._size // _BITS))]
            return [r for r in range(self._size) if not words[r // _BITS] >> r % _BITS & 1]
        return None


class Seats:
    """Membership of a round in a store that outlives it: ranks ask, the round's rank 0 answers.

    Requests of dead processes are answered too; nobody reads the answer.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._read = store, 0
        self.name = secrets.token_hex(8)
        """Random name of this process; rank 0's names the round."""

    def store(self, name: str) -> Store:
        """The store of one round."""
        return PrefixStore(name, self._store)

    def ask(self, rank: int) -> None:
        """Ask rank 0 for a seat."""
        self._store.set(f"asked-{self._store.add('asked', 1)}", f"{rank} {self.name}")

    def taken(self, rank: int) -> str:
        """The round that has accepted this process; empty if none has yet."""
        if not self._store.check([f"seat-{rank}"]):
            return ""
        name, whose = self._store.get(f"seat-{rank}").decode().split()
        return name if whose == self.name else ""

    def give(self) -> None:
        """On rank 0: answer all new requests."""
        asked = self._store.add("asked", 0)
        while self._read < asked and self._store.check([f"asked-{self._read + 1}"]):
            self._read += 1
            rank, whose = self._store.get(f"asked-{self._read}").decode().split()
            self._store.set(f"seat-{rank}", f"{self.name} {whose}")


def _is_agents() -> bool:
    """True if torchrun's agent serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _pauses() -> Iterator[float]:
    """Growing seconds between two polls."""
    pause = 0.005
    while True:
        yield pause
        pause = min(1.2 * pause, 0.5)


def _key(rank: int) -> str:
    return f"rank-{rank}"


def _word(number: int) -> str:
    return f"ranks-{number}"


def _listed(missing: list[int] | None) -> str:
    """Describe the missing ranks."""
    if missing is None:
        return "rank 0, which does not answer yet"
    if not missing:
        return "nobody: all are there"
    shown = ", ".join(map(str, missing[:_SHOWN]))
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return f"{len(missing)} rank{'s'[: len(missing) > 1]} that did not come: {shown}{more}"


def _refused(rank: int, place: str, holds: bool, error: RuntimeError) -> TapirError:
    """Explain why torch's store could not be opened."""
    text = str(error).partition("\n")[0]
    if holds and "EADDRINUSE" in text:
        return InputError(
            f"rank 0 cannot listen {place}: another program has the port; end it "
            f"(ss -ltnp), or choose another MASTER_PORT"
        )
    whose = "its own store: MASTER_ADDR must be the address of this machine" if holds else "rank 0"
    fix = "is it another program's port, or does a firewall close it?"
    return TapirError(f"rank {rank} does not reach {whose}, {place} ({text}); {fix}")


@contextmanager
def heard(waits: str) -> Iterator[None]:
    """End this process on a signal even if Python's handlers do not run, inside torch or MPI.

    `waits` describes the wait. Python's own handlers get some seconds first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    left, began = threading.Event(), time.monotonic()

    def listen() -> None:
        while numbers := ours.recv(16):
            for number in numbers:
                if number not in _PATIENCE or left.wait(_PATIENCE[signal.Signals(number)]):
                    continue
                name, seconds = signal.Signals(number).name, time.monotonic() - began
                LOG.error("%s: %s, for %.0f s now; ended", name, waits, seconds)
                interrupted = number == signal.SIGINT
                os._exit(EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED)

    thread = threading.Thread(target=listen, name="rendezvous", daemon=True)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join()
        ours.close()
