"""Functions that the ranks of the multi-process tests run."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from bench.parity import train_rank
from parallel.world import join_world, leave_world


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
