"""Functions that the ranks of the multi-process tests run."""

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.parity import train_rank
from core.storage.store import FolderStore
from parallel.world import join_world, leave_world
from training import worker
from training.tasks import prior


def fail_on_rank_one(payload: str) -> None:
    """Rank 1 raises while the others wait in a collective."""
    world = join_world()
    if world.rank == 1:
        raise ValueError("planted failure")
    world.barrier()


def sum_ranks(payload: str) -> None:
    """An all-reduce; each rank reports what it got."""
    world = join_world()
    value = torch.tensor([float(world.rank + 1)])
    dist.all_reduce(value)
    out = Path(json.loads(payload)["out"])
    (out / f"result-{world.rank}.json").write_text(json.dumps([value.item(), os.getpid()]))
    leave_world(world)


def train_case(payload: str) -> None:
    """Report this rank, then train a case of the parity benchmark."""
    out = Path(json.loads(payload)["out"])
    (out / f".pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    (out / f".pid-{os.environ['RANK']}").rename(out / f"pid-{os.environ['RANK']}")
    train_rank(payload)


def train_and_count_reads(payload: str) -> None:
    """Train a prior; this rank reports its reads of shards by split, and of the entropy."""
    body, lock = json.loads(payload), threading.Lock()
    reads: Counter[str] = Counter()
    entropies: list[float] = []
    get, entropy, of_task = FolderStore.get, prior.per_position_entropy, prior.PriorTask._entropy

    def counted(self: Any, name: str, start: int = 0, length: int | None = None) -> bytes:
        with lock:
            reads[name.partition("/")[0]] += name.endswith(".tar")
        return get(self, name, start, length)

    def computed(*arguments: Any) -> float:
        before = reads["train"]
        value = entropy(*arguments)
        reads["entropy"] += reads["train"] - before
        return value

    def told(self: Any) -> float:
        entropies.append(of_task(self))
        return entropies[-1]

    FolderStore.get, prior.per_position_entropy = counted, computed  # type: ignore[method-assign]
    prior.PriorTask._entropy = told  # type: ignore[method-assign]
    worker.run(body["train"])
    out = Path(body["out"], f"result-{os.environ['RANK']}.json")
    out.write_text(json.dumps({"reads": reads, "entropies": entropies}))
