"""A job that reads some steps and records what it read: a training run's data side alone."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from core.files.atomic import write_atomic
from data_pipeline.config import OrderConfig
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.streaming.mixed_source import open_source
from data_pipeline.streaming.mixture import open_stream
from data_pipeline.streaming.state import position_of
from parallel.world import join_world, leave_world
from tests.harness import run_world

LANES, BATCH = 16, 32
ORDER = OrderConfig(lanes=LANES, shuffle_buffer=4)


def stream_of(data: str, rank: int = 0, ranks: int = 1) -> Any:
    """The stream of one rank over a data set or a mixture."""
    source = open_source(TokenSource, data, "train")
    return open_stream(source, seed=3, batch=BATCH, order=ORDER, rank=rank, ranks=ranks)


def read_steps(payload: str) -> None:
    """Continue from state.json; rank 0 saves the position after each step that all recorded."""
    given = json.loads(payload)
    world, out = join_world(), Path(given["out"])
    stream = stream_of(given["data"], world.rank, world.size)
    if (out / "state.json").exists():
        stream.resume(position_of(json.loads((out / "state.json").read_text())))
    batches = iter(stream)
    with open(out / f"read-{given['attempt']}-{world.rank:02d}.jsonl", "w") as notes:
        while stream.state.step < given["steps"]:
            records, state = next(batches)
            row = {"step": state.step - 1, "rank": world.rank, "ids": records.ids.tolist()}
            notes.write(json.dumps(row) + "\n")
            notes.flush()
            world.barrier()
            if world.rank == 0:
                write_atomic(out / "state.json", json.dumps(dataclasses.asdict(state)).encode())
    leave_world(world)
    os._exit(0)


if __name__ == "__main__":
    body = {"data": sys.argv[1], "out": sys.argv[2]}
    attempt, ranks, steps = map(int, sys.argv[3:])
    body |= {"attempt": attempt, "steps": steps}
    run_world("tests.multiprocess.readers:read_steps", body, ranks)
