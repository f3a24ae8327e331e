"""A light rank: the real training loop on an engine without a model and a stream without data.

All that ranks do together is real: the meeting, both process groups, votes, validations, gathers of
texts, checkpoints and their comparison, retention and resuming, metrics, heartbeats, a lease a
rank, and the finished model. It starts as on a cluster, at a TCPStore that rank 0 serves.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

import data_pipeline.streaming.ahead
import parallel.rendezvous
import training.trainer
from core.errors import Preempted
from core.heartbeat import Heart
from core.launch_environment import RENDEZVOUS
from core.stop import heed_stop_signals, stop_asked
from core.workers import JobWorker
from data_pipeline.jobs.leases import Leases
from parallel.diagnostics.flight_recorder import record_flight
from parallel.engines.protocol import EngineSettings, Program
from parallel.ledger import recorded
from parallel.mesh import Mesh, build_mesh
from parallel.world import World, join_world, leave_world
from planning.life.config import LEASES, MARKS, ROWS, STAGE, done, due, lease_of
from planning.life.counts import END, FIRST, SAVE, Counts, connections
from planning.life.engine import LightEngine
from planning.rehearsal.patches import Change, replaced
from planning.rehearsal.steps import AtOnce, EmptyStream, PriorWithoutData
from planning.start_up.light_ranks import cpu_seconds
from planning.start_up.store_proxy import HOST
from training.config import PriorTrain
from training.stages import settings_from_json
from training.trainer import Run

_LEASE_SECONDS = 60.0
_PAUSE = 0.1


def start(payload: str) -> None:
    """Train as in a run, from the newest checkpoint to the end or to a stop request."""
    body = json.loads(payload)
    settings: PriorTrain = settings_from_json(STAGE, body["settings"])
    os.environ.pop(RENDEZVOUS)
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(body["port"]))
    heed_stop_signals()
    record_flight()
    counts, place = Counts(), Path(body["place"])
    changes = _changes(counts, place, body["store_port"], body["events"])
    with replaced([*counts.changes(), *changes]):
        world = join_world()
        with _lease(counts, place, world):
            _train(settings, world, counts, place, body["store_port"])
        leave_world(world)


def _train(
    settings: PriorTrain, world: World, counts: Counts, place: Path, store_port: int
) -> None:
    heart = Heart(world.rank)
    mesh = build_mesh(settings.mesh, world)
    with recorded(mesh, heart) as ledger:
        run = Run(STAGE, PriorWithoutData(settings, mesh), settings, mesh, ledger, heart)
        try:
            run.train()
            _report(counts, place, run.step, store_port)
        except Preempted:
            _report(counts, place, run.step, store_port)
            raise
        finally:
            run.close()


def _report(counts: Counts, place: Path, step: int, store_port: int) -> None:
    """Write this rank's row; a later start of the job overwrites it."""
    rank = int(os.environ["RANK"])
    counts.mark(END, step)
    row = {"marks": counts.marks, "connections": connections(store_port), "cpu": cpu_seconds()}
    (place / ROWS / f"{rank}.json").write_text(json.dumps(row))


def _changes(counts: Counts, place: Path, store_port: int, events: Sequence[int]) -> list[Change]:
    """Patches of what would take data, a model, or be out of sight of the proxy."""

    def mark(what: str, step: int) -> None:
        mark = counts.mark(what, step)
        if first:
            with open(place / MARKS, "a") as file:
                file.write(json.dumps(mark) + "\n")

    def before_step(step: int) -> None:
        if not counts.marks:
            mark(FIRST, step)
        if first:
            _wait_for_events(place, events, step)

    def engine_of(_: Program, settings: EngineSettings, mesh: Mesh) -> LightEngine:
        return LightEngine(settings, mesh, before_step, lambda step: mark(SAVE, step))

    first = os.environ["RANK"] == "0"
    return [
        (training.trainer, "build_engine", engine_of),
        (training.trainer, "Stream", EmptyStream),
        (training.trainer, "open_store", counts.store),
        (data_pipeline.streaming.ahead, "ThreadPoolExecutor", AtOnce),
        (parallel.rendezvous, "TCPStore", _StoreApart(store_port)),
    ]


def _wait_for_events(place: Path, events: Sequence[int], step: int) -> None:
    """On rank 0: wait until what is to happen after this step, or before it, has begun."""
    for number, at in enumerate(events):
        if at <= step:
            (place / due(number)).touch()
            while not ((place / done(number)).exists() or stop_asked()):
                time.sleep(_PAUSE)


class _StoreApart:
    """torch's TCPStore, which rank 0 serves at a port of its own: it asks there as all ranks do."""

    def __init__(self, store_port: int) -> None:
        self._port = store_port
        self._served: TCPStore | None = None

    def __call__(self, host: str, port: int, size: int, is_master: bool, **named: Any) -> Any:
        if is_master:  # kept, since it serves as long as it lives
            self._served = TCPStore(host, self._port, size, is_master=True, **named)
        while True:
            with suppress(ConnectionRefusedError):  # the proxy has not seen the store yet
                socket.create_connection((host, port)).close()
                return TCPStore(host, port, size, is_master=False, **named)
            time.sleep(_PAUSE)


@contextmanager
def _lease(counts: Counts, place: Path, world: World) -> Iterator[None]:
    """Hold this rank's lease, which a dead process may have left."""
    member = JobWorker(number=world.rank, count=world.size)
    leases = Leases(counts.store(str(place / LEASES)), "", _LEASE_SECONDS, member)
    while (name := leases.claim(lease_of(world.rank))) is None:
        time.sleep(_PAUSE)
    with leases.held(name, {}):
        yield
