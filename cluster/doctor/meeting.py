"""Connect all ranks at the rendezvous address before torch does, to see a blocked port in seconds.

Rank 0 listens at MASTER_ADDR:MASTER_PORT and the others send it their rank. In each gather every
rank sends a text to rank 0 and gets rank 0's text back. The protocol is lines of JSON over TCP.
"""

import errno
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from cluster.doctor.finding import Finding, bad
from core.launch_environment import as_number

Gather = Callable[[str], list[str]]
"""On rank 0 the texts by rank, empty for silent ranks; on other ranks rank 0's text alone."""
_GREETING = "tapir-doctor"
_LONGEST = 2**24
"""Maximum length of a text, in characters; a longer one is not from `tapir doctor`."""
_HELLO_SECONDS = 5.0
_AGAIN = 0.1
_CHECK = "rendezvous"
_OWN_FILES = 256


class Lost(Exception):
    """This rank has lost the others; carries the finding that explains why."""

    def __init__(self, row: Finding) -> None:
        super().__init__(row.observed)
        self.row = row


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Rank, world size, and rank 0's address and port."""

    rank: int
    size: int
    address: str
    port: int

    @property
    def text(self) -> str:
        return f"{self.address}:{self.port}"


def rendezvous_of(environment: Mapping[str, str] = os.environ) -> Rendezvous | None:
    """The rendezvous in the environment, if rank 0 can listen at its port; else None.

    torchrun's agent holds the port itself; ranks of srun and mpirun agree on one later.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = [environment.get(name, "") for name in names]
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, size, port = (as_number(values[i]) for i in (0, 1, 3))
    if agent or not values[2] or rank is None or size is None or port is None:
        return None
    return Rendezvous(rank=rank, size=size, address=values[2], port=port)


@dataclass(kw_only=True)
class RankLinks:
    """One rank's connections to other ranks."""

    rendezvous: Rendezvous
    wait: float
    links: dict[int, "_Link"] = field(default_factory=dict)
    """On rank 0 one to each rank that connected; on other ranks the one to rank 0."""

    @property
    def missing(self) -> list[int]:
        """Ranks that did not connect or fell silent; known only on rank 0."""
        return [rank for rank in range(1, self.rendezvous.size) if rank not in self.links]

    def gather(self, text: str) -> list[str]:
        """A `Gather` over the connected ranks."""
        if self.rendezvous.rank:
            return [self._ask_first(text)]
        texts = [text] + [""] * (self.rendezvous.size - 1)
        for rank, link in list(self.links.items()):
            try:
                texts[rank] = link.receive()
            except OSError:
                self.links.pop(rank)
        for rank, link in list(self.links.items()):
            try:
                link.send(text)
            except OSError:
                self.links.pop(rank)
        return texts

    def _ask_first(self, text: str) -> str:
        try:
            self.links[0].send(text)
            return self.links[0].receive()
        except OSError as error:
            raise Lost(_silent(self.rendezvous, error)) from error


@contextmanager
def meet(rendezvous: Rendezvous, wait: float) -> Iterator[RankLinks]:
    """Meet the other ranks, for at most `wait` seconds.

    Raises: Lost if this rank cannot listen, or does not reach rank 0.
    """
    with ExitStack() as stack:
        meeting = RankLinks(rendezvous=rendezvous, wait=wait)
        if rendezvous.rank:
            meeting.links[0] = _greet(
                rendezvous, stack.enter_context(closing(_reach(rendezvous, wait))), wait
            )
        else:
            _await_all(stack.enter_context(closing(_listen(rendezvous))), meeting, stack)
        yield meeting


def missing_row(rendezvous: Rendezvous, missing: list[int], wait: float) -> Finding:
    """The row for ranks that did not connect."""
    shown = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    text = (
        f"of {rendezvous.size} ranks, {shown} did not come to {rendezvous.text} within {wait:g} s"
    )
    fix = (
        f"open TCP port {rendezvous.port} between the nodes (firewall, network policy), or see "
        "why those ranks did not start; each of them prints its own finding"
    )
    return bad(_CHECK, text, fix)


class _Link:
    """Texts over a connection."""

    def __init__(self, connection: socket.socket, wait: float) -> None:
        connection.settimeout(wait)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    def send(self, text: str) -> None:
        self._connection.sendall((json.dumps(text) + "\n").encode())

    def receive(self) -> str:
        try:
            line = self._lines.readline(_LONGEST)
            if line.endswith("\n"):
                return str(json.loads(line))
            raise ConnectionResetError(errno.ECONNRESET, "the other side has gone")
        except ValueError as error:
            raise ConnectionAbortedError(
                errno.EPROTO, "the other side is not `tapir doctor`"
            ) from error


def _listen(rendezvous: Rendezvous) -> socket.socket:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _OWN_FILES + rendezvous.size
    if soft < files <= hard:  # one connection per rank, like torch's store
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        where, backlog = ("", rendezvous.port), max(128, rendezvous.size)
        return socket.create_server(where, family=family, backlog=backlog, dualstack_ipv6=both)
    except OSError as error:
        text = f"rank 0 cannot listen at port {rendezvous.port}: {error.strerror}"
        holder = f"ss -ltnp sport = :{rendezvous.port}"
        fix = f"end what holds the port ({holder}), or choose another MASTER_PORT"
        raise Lost(bad(_CHECK, text, fix)) from error


def _await_all(listener: socket.socket, meeting: RankLinks, stack: ExitStack) -> None:
    until = time.monotonic() + meeting.wait
    while meeting.missing and (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        with suppress(OSError, ValueError):
            connection = stack.enter_context(closing(listener.accept()[0]))
            link = _Link(connection, min(left, _HELLO_SECONDS))
            greeting, _, rank = link.receive().partition(" ")
            if greeting == _GREETING and int(rank) in meeting.missing:
                connection.settimeout(2 * meeting.wait)
                meeting.links[int(rank)] = link


def _reach(rendezvous: Rendezvous, wait: float) -> socket.socket:
    """Connect to rank 0, which may not have started to listen yet."""
    until, last = time.monotonic() + wait, OSError(errno.ETIMEDOUT, "timed out")
    while (left := until - time.monotonic()) > 0:
        try:
            return socket.create_connection((rendezvous.address, rendezvous.port), timeout=left)
        except OSError as error:
            last = error
            time.sleep(min(_AGAIN, max(0.0, until - time.monotonic())))
    raise Lost(_unreached(rendezvous, last)) from last


def _greet(rendezvous: Rendezvous, connection: socket.socket, wait: float) -> _Link:
    link = _Link(connection, 3 * wait)
    try:
        link.send(f"{_GREETING} {rendezvous.rank}")
    except OSError as error:
        raise Lost(_silent(rendezvous, error)) from error
    return link


def _unreached(rendezvous: Rendezvous, error: Any) -> Finding:
    if isinstance(error, socket.gaierror):
        text = f"the name {rendezvous.address} of rank 0's node does not resolve here"
        fix = "set MASTER_ADDR to its IP address, or put the name into /etc/hosts or DNS"
        return bad(_CHECK, text, fix)
    if isinstance(error, ConnectionRefusedError):
        reason = "rank 0 does not listen, or the port is rejected"
        text = f"{rendezvous.text} refuses connections: {reason}"
        fix = f"see rank 0's output; open TCP port {rendezvous.port} between the nodes"
    elif isinstance(error, TimeoutError):
        whole = _answers(rendezvous.address)
        node = "its node answers at another port" if whole else "its node does not answer either"
        text = f"{rendezvous.text} does not answer: packets are dropped ({node})"
        fix = f"open TCP port {rendezvous.port} between the nodes (firewall, network policy)"
        if not whole:
            fix = f"is {rendezvous.address} the address of rank 0's node? {fix}"
    else:
        text = f"{rendezvous.text} cannot be reached: {error.strerror or error}"
        fix = f"look at this machine's routes and firewall: ip route get {rendezvous.address}"
    return bad(_CHECK, text, fix)


def _silent(rendezvous: Rendezvous, error: OSError) -> Finding:
    text = f"{rendezvous.text} accepted the connection, but is not rank 0 of this job ({error})"
    fix = "another program holds that port (choose another), or rank 0 has ended: see its output"
    return bad(_CHECK, text, fix)


def _answers(address: str) -> bool:
    """True if a node answers at all: a closed port refuses the connection."""
    try:
        with socket.create_connection((address, 1), timeout=1):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
