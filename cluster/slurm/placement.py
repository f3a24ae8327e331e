"""Puts each start of a Slurm job's command on sound nodes of the job."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.slurm.job import leave_out, queue_again
from cluster.slurm.nodes import (
    Node,
    allocated,
    bad_nodes,
    chosen,
    environment_of,
    live_nodes,
    on_nodes,
)
from core.errors import EXIT_GAVE_UP, EXIT_PREEMPTED
from core.launch_environment import FIRST_PORT
from core.log import LOG

_PATIENCE_SECONDS, _PAUSE_SECONDS = 300.0, 5.0
"""slurmctld may be away for a while."""


class Placement:
    """The nodes of a job's starts; a job with spares replaces lost and bad ones between them."""

    def __init__(self, out: Path, name: str, gpus: int, used: int, check: bool) -> None:
        """`used`: nodes of the command, others are spares; 0 = all, without spares."""
        self._out, self._name, self._gpus = out, name, gpus
        self._spares, self._check = used > 0, check
        self._number = os.environ["SLURM_JOB_ID"]
        self._port = int(os.environ.get("MASTER_PORT", FIRST_PORT))
        self._names = os.environ.get("TAPIR_NODES", "").split()
        self._used = used or len(self._names)
        self._bad: dict[str, str] = {}
        self._start = -1

    def place(self, command: Sequence[str]) -> list[str]:
        """The command of the next start, on sound nodes; empty if the job has too few.

        With spares, sets the variables of `environment_of` for it.
        """
        self._start += 1
        if not self._spares:
            self._find_bad(self._names)
            return [] if self._bad else list(command)
        self._wait_for_slurm()
        nodes = live_nodes(self._number)
        self._find_bad([node.name for node in nodes])
        sound = [node for node in nodes if node.name not in self._bad]
        if len(sound) < self._used:
            LOG.error("the command needs %d nodes, the job has %d", self._used, len(sound))
            return []
        if self._bad:
            leave_out(self._out, self._bad, self._used)
        self._choose(sound)
        return on_nodes(command, self._names)

    def lost(self) -> list[str]:
        """Nodes of the last start that the job has lost, all if it does not run any more.

        srun may end with 0 when a node of its step is lost, so that this must be asked, too.
        """
        if len(self._names) < 2:
            return []
        self._wait_for_slurm()
        return sorted(set(self._names) - set(allocated(self._number)))

    def queue_again(self) -> int:
        """Queue the job again, without its bad nodes; returns its exit code."""
        if self._bad and not leave_out(self._out, self._bad, self._used):
            LOG.error("too few other nodes are left: mend the above, then `tapir resume`")
            return EXIT_GAVE_UP
        queue_again(EXIT_PREEMPTED, self._out)
        return EXIT_PREEMPTED

    def _find_bad(self, names: Sequence[str]) -> None:
        self._bad = {}
        if self._check and names:
            self._bad = bad_nodes(self._out, self._name, self._gpus, names)
        for node, problem in self._bad.items():
            LOG.error("node %s: %s", node, problem)

    def _choose(self, sound: Sequence[Node]) -> None:
        nodes = chosen(sound, self._used)
        names = [node.name for node in nodes]
        spares = [node.name for node in sound if node.name not in names]
        if self._start and (gone := sorted(set(self._names) - set(names))):
            new = sorted(set(names) - set(self._names))
            LOG.warning("nodes %s replaced by %s", ", ".join(gone), ", ".join(new))
        LOG.info("nodes %s; spares: %s", ", ".join(names), ", ".join(spares) or "none")
        self._names = names
        os.environ.update(environment_of(nodes, self._port, self._start))

    def _wait_for_slurm(self) -> None:
        until = time.monotonic() + _PATIENCE_SECONDS
        while not allocated(self._number) and time.monotonic() < until:
            time.sleep(_PAUSE_SECONDS)
