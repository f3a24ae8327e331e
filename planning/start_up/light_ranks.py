"""Ranks without a model: a process, its process groups, and the data set's manifest.

They start as training's ranks do, from the launcher, and meet at a TCPStore of rank 0, as on a
cluster. A proxy counts what the others ask of that store.
"""

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.config import SupervisorConfig
from cluster.launcher import launch
from core.errors import TapirError
from core.heartbeat import Heart
from core.launch_environment import RENDEZVOUS, free_port
from data_pipeline.formats.manifest import TOKENS
from parallel.config import MeshConfig
from parallel.mesh import Mesh, build_mesh
from parallel.world import join_world, leave_world
from planning.start_up.store_proxy import HOST, StoreProxy
from training.tasks.splits import open_splits

TARGET = "planning.start_up.light_ranks:start"
PRELOAD = [
    *("torch", "torch.distributed", "parallel.tensor.megatron"),
    "planning.start_up.light_ranks",
]
_SECONDS = 500.0
"""How long light ranks may go without a sign of life: several hundred share a core."""


@dataclass(frozen=True, kw_only=True)
class LightRun:
    """What the light ranks of one world reported."""

    rows: list[dict[str, Any]]
    """One row a rank."""
    requests: Counter[str]
    """Requests to the store of all ranks but 0, by name."""


class LightRank:
    """This process's place in a world of light ranks."""

    def __init__(self, payload: str) -> None:
        self.body: dict[str, Any] = json.loads(payload)
        self.rank = int(os.environ["RANK"])
        os.environ.pop(RENDEZVOUS, None)
        port = self.body["ports"][min(self.rank, 1)]
        os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(port))
        self.heart = Heart(self.rank)

    def meet(self) -> Mesh:
        """Join the world and build the mesh."""
        self.heart.beat("join")
        world = join_world()
        self.heart.beat("groups")
        return build_mesh(MeshConfig(**self.body["mesh"]), world)

    def report(self, **row: Any) -> None:
        """Write this rank's row, with its CPU seconds so far."""
        row |= {"rank": self.rank, "seconds": cpu_seconds(), "sockets": sockets()}
        Path(self.body["out"], f"row-{self.rank}.json").write_text(json.dumps(row))


def run_light_ranks(mesh: MeshConfig, target: str = TARGET, **payload: Any) -> LightRun:
    """Start the light ranks of a mesh on this machine; each calls `target` with the payload.

    Raises: RankError if a rank fails; TapirError if torch's store speaks another protocol.
    """
    with TemporaryDirectory() as folder, StoreProxy(free_port()) as proxy:
        body = {**payload, "mesh": asdict(mesh), "out": folder}
        body["ports"] = [proxy.store_port, proxy.port]
        config = SupervisorConfig(hang_seconds=_SECONDS)
        launch(target, json.dumps(body), mesh.world, PRELOAD, config)
        paths = [Path(folder, f"row-{rank}.json") for rank in range(mesh.world)]
        rows = [json.loads(path.read_text()) for path in paths]
    if proxy.failure:
        raise TapirError(f"the requests of torch's TCPStore cannot be counted: {proxy.failure}")
    return LightRun(rows=rows, requests=proxy.counts)


def start(payload: str) -> None:
    """A rank that starts as one of training does, up to its first exchanges."""
    me = LightRank(payload)
    mesh = me.meet()
    me.heart.beat("data")
    if me.body.get("place"):
        open_splits(me.body["place"], TOKENS, mesh)
    me.heart.beat("exchange")
    mesh.world.gather_text("ready")
    mesh.world.barrier()
    me.report()
    mesh.world.barrier()
    leave_world(mesh.world)


def cpu_seconds() -> dict[str, float]:
    """CPU seconds of this process by kind of thread: rank, store, or gloo's loops.

    A loop of gloo, one for each process group, wakes 100 times a second, also while nothing comes.
    """
    seconds = {"rank": 0.0, "store": 0.0, "loops": 0.0}
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            name = (task / "comm").read_text().strip()
            kind = {"gloo_tcp_loop": "loops", "pt_tcpstore_uv": "store"}.get(name, "rank")
            seconds[kind] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def sockets() -> int:
    """Open sockets of this process."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            count += os.readlink(link).startswith("socket:")
    return count
