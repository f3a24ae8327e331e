"""Functions that the ranks of test_start_up.py run."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.errors import TapirError
from core.storage.store import FolderStore
from data_pipeline.config import OrderConfig
from parallel.config import MeshConfig
from parallel.mesh import build_mesh
from parallel.world import join_world, leave_world
from training.presets import PRESETS
from training.stages import make_task

READS: Counter[str] = Counter()
"""Names that this process has asked the store for."""


def sockets() -> int:
    """Open sockets of this process."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.readlink(link).startswith("socket:") for link in links if link.is_symlink())


def _report(payload: str, value: Any) -> None:
    Path(json.loads(payload)["out"], f"result-{os.environ['RANK']}.json").write_text(
        json.dumps(value)
    )


def hand_on(payload: str) -> None:
    """Hand bytes of several lengths on to all ranks, to some, and to rank 0 alone."""
    world = join_world()
    sent = [bytes([i % 251 for i in range(length)]) for length in (0, 1, 100_000)]
    rows = []
    for ranks in (range(world.size), [0, 2, 3, 5], [0]):
        handed = [world.hand_on(data if world.rank == 0 else b"own", ranks) for data in sent]
        pairs = zip(handed, sent, strict=True)
        rows.append([data in (b"own", expected) for data, expected in pairs])
        rows.append([data == b"own" for data in handed])
    _report(payload, rows)
    leave_world(world)


def gather(payload: str) -> None:
    """Gather texts, short and long ones; report them and the messages that this rank exchanged."""
    messages = Counter[str]()

    def counted(name: str) -> None:
        function = getattr(dist, name)

        def call(*arguments: Any, **named: Any) -> Any:
            messages[name] += 1
            return function(*arguments, **named)

        setattr(dist, name, call)

    world = join_world()
    counted("send"), counted("recv")
    short = world.gather_text(f"\udcff, rank {world.rank}")
    once = dict(messages)
    long = [world.gather_text(f"{world.rank}" * length) for length in (0, 503, 504, 505, 3000)]
    aside = world.gather_aside(str(world.rank))
    _report(payload, {"short": short, "messages": once, "aside": aside, "long": long})
    leave_world(world)


def open_and_read(payload: str) -> None:
    """Make a prior's task on a pipeline, as training does; report reads and what came out."""
    for name in ("get", "exists"):
        _count(name)
    body = json.loads(payload)
    world = join_world()
    before = len(dist.distributed_c10d._world.pg_map)
    mesh = build_mesh(MeshConfig(pipeline=body["pipeline"], data=body["data"]), world)
    groups = len(dist.distributed_c10d._world.pg_map) - before
    tiny = PRESETS["prior"]["tiny"]()
    order = OrderConfig(lanes=body["data"], shuffle_buffer=1)
    loop = replace(tiny.loop, global_batch_size=4 * body["data"])
    settings = replace(tiny, data=body["place"], order=order, loop=loop)
    try:
        task = make_task("prior", settings, mesh)
    except TapirError as error:
        _report(payload, [type(error).__name__, str(error)])
        leave_world(world)
        return
    at_start, source = dict(READS), task.train
    first = source.read(0).ids.tolist()
    facts = [source.fingerprint, source.sizes.tolist(), source.variants, source.manifest.facts]
    shards = [shard.sha256 for shard in source.manifest.shards]
    _report(
        payload,
        {"start": at_start, "first": first, "facts": facts, "shards": shards}
        | {"needs": mesh.needs_data, "index": source.has_index, "ranks": mesh.data_ranks}
        | {"groups": groups},
    )
    world.barrier()
    leave_world(world)


def _count(name: str) -> None:
    original = getattr(FolderStore, name)

    def counted(store: FolderStore, key: str, *arguments: Any) -> Any:
        READS[f"{name} {key}"] += 1
        return original(store, key, *arguments)

    setattr(FolderStore, name, counted)


def count_sockets(payload: str) -> None:
    """Sockets of a rank before it joins, after, and after a sum over all ranks."""
    before = sockets()
    world = join_world()
    joined = sockets()
    total = world.mean(torch.ones(1)).item()
    _report(payload, [joined - before, sockets() - before, total])
    world.barrier()
    leave_world(world)


def die_before_contact(payload: str) -> None:
    """Rank 1 dies after the ranks met and before any two have connected; the others wait for it."""
    world = join_world()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()
