"""`tapir doctor`: check one process, or compare ranks that meet and run a burn-in.

Imports torch only where it is needed: `tapir doctor --node` runs first in every submitted job.
"""

import json as texts
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.doctor.compare import compare
from cluster.doctor.config import DoctorConfig
from cluster.doctor.finding import Finding, bad, placed
from cluster.doctor.meeting import Lost, Rendezvous, meet, missing_row, rendezvous_of
from cluster.doctor.node import node_findings
from cluster.launcher import launch
from core.config import from_json, to_json
from core.errors import EXIT_FAILED, TapirError
from core.launch_environment import as_number, free_port

Deliver = Callable[[list[Finding]], None]
PRELOAD = ["torch", "torch.distributed", "parallel.diagnostics.checks"]
BURN_SECONDS = 120.0
"""Time limit of the burn-in beyond its matmuls: for messages, and the engine's imports."""
_GO = "go on"
_JOIN_FIX = (
    "all TCP ports between the nodes must be open, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
    "must name an interface that reaches them; see whether all ranks started"
)


class Visit:
    """The checks of one rank."""

    def __init__(self, config: DoctorConfig, size: int, deliver: Deliver) -> None:
        """`deliver` is called with all rows on rank 0, and with its own rows on a lost rank."""
        self._config, self._size, self._deliver = config, size, deliver
        self._rank = own_rank() or 0
        self._rows: list[Finding] = []

    def run(self) -> list[Finding]:
        """Check, meet, compare and burn in; returns the delivered rows, none on other ranks."""
        rendezvous = rendezvous_of() if self._size > 1 else None
        self._rows = node_findings(self._config, own_rank())
        try:
            together = True
            if rendezvous is not None:
                together = self._meet(rendezvous)
            unmet = rendezvous is None and self._size > 1
            if together and (unmet or not self._config.quick):
                self._join(unmet)
        except Lost as lost:
            self._rows += placed([lost.row], self._rank)
        else:
            if self._rank:
                return []
        self._deliver(self._rows)
        return self._rows

    def _meet(self, rendezvous: Rendezvous) -> bool:
        """Compare with the ranks that reach the rendezvous; returns whether all did."""
        wait = self._config.wait
        with meet(rendezvous, wait) as meeting:
            self._rows = compare(rendezvous.rank, self._rows, self._config.out, meeting.gather)
            missing = meeting.missing if rendezvous.rank == 0 else []
            if missing:
                self._rows += placed([missing_row(rendezvous, missing, wait)], 0)
            return meeting.gather("" if missing else _GO)[0] == _GO

    def _join(self, unmet: bool) -> None:
        """Join torch's process group, compare if the ranks have not met, and burn in."""
        try:
            from parallel import world as worlds  # noqa: PLC0415 - torch, which --node must not need
            from parallel.diagnostics import checks  # noqa: PLC0415
        except Exception as error:
            text = f"torch cannot be imported: {type(error).__name__}: {error}"
            raise Lost(bad("torch", text, "install requirements.txt again in this venv")) from error
        seconds = self._config.wait
        with self._limit(seconds, f"not all of {self._size} ranks had joined after {seconds:g} s"):
            world = self._joined(worlds)
        self._rank = world.rank
        late = f"a rank froze in it: not done after {BURN_SECONDS + self._config.seconds:g} s"
        with self._limit(BURN_SECONDS + self._config.seconds, late):
            try:
                self._burn_in(checks, world, unmet)
            except Exception as error:
                what = f"it failed: {type(error).__name__}: {error}"
                fix = "look at the network between the nodes, and at other ranks' output"
                raise Lost(bad("burn-in", what, fix)) from error
        worlds.leave_world(world)

    def _joined(self, worlds: Any) -> Any:
        try:
            return worlds.join_world()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise Lost(bad("process group", text, _JOIN_FIX)) from error

    def _burn_in(self, checks: Any, world: Any, unmet: bool) -> None:
        rank = world.rank if world.size > 1 else None
        if unmet:
            rows = placed((replace(row, rank=rank) for row in self._rows), rank)
            self._rows = compare(world.rank, rows, self._config.out, world.gather_text)
        if self._config.quick:
            return
        mine = placed(checks.torch_findings(world), rank)
        gathered = world.gather_text(texts.dumps([asdict(row) for row in mine]))
        burned = placed(checks.burn_in(world, self._config.seconds), rank)
        if world.rank == 0:
            self._rows += [Finding(**row) for text in gathered for row in texts.loads(text)]
            self._rows += burned

    @contextmanager
    def _limit(self, seconds: float, late: str) -> Iterator[None]:
        """Deliver the rows and exit if the context takes longer, since a join cannot be stopped."""

        def give_up() -> None:
            row = bad("process group", late, _JOIN_FIX)
            self._deliver([*self._rows, *placed([row], self._rank)])
            sys.stdout.flush()
            os._exit(EXIT_FAILED)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def rank_main(payload: str) -> None:
    """Entry point of a rank that `--ranks` spawned; it writes its rows to a file."""
    body = texts.loads(payload)

    def deliver(rows: list[Finding]) -> None:
        path = Path(body["out"], f"rows-{os.environ['RANK']}.json")
        path.write_text(texts.dumps([asdict(row) for row in rows]))

    config = from_json(DoctorConfig, body["config"])
    Visit(config, int(os.environ["WORLD_SIZE"]), deliver).run()


def spawn_visits(config: DoctorConfig) -> list[Finding]:
    """Spawn ranks on this machine, and collect their rows."""
    rows: list[Finding] = []
    lost: list[Finding] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            payload = texts.dumps({"config": to_json(config), "out": folder})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
            preload = [] if config.quick else PRELOAD
            try:
                launch("workflow.doctor:rank_main", payload, config.ranks, preload)
            finally:
                for path in sorted(Path(folder).glob("rows-*.json")):
                    rows += [Finding(**row) for row in texts.loads(path.read_text())]
    except (TapirError, OSError) as error:
        fix = "see the other rows, and this machine's memory and temporary folder"
        lost = placed([bad("ranks", str(error), fix)], None)
    return [*(rows or node_findings(config, None)), *lost]


def own_rank() -> int | None:
    """The rank in the variable RANK; None for a single process, or before it is known."""
    return as_number(os.environ.get("RANK", ""))
