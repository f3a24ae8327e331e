"""One rank of a rehearsal: the real engine runs its steps in a fake process group."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel.world
from parallel.mesh import build_mesh
from parallel.world import join_world
from planning.rehearsal.arithmetic import without_arithmetic
from planning.rehearsal.fake_cuda import CPU, GPU, claimed_gpu
from planning.rehearsal.fake_tensors import Broker, Shadows
from planning.rehearsal.patches import nothing, replaced
from planning.rehearsal.recorder import Recorder, backends_of, groups_noted, places, texts_noted
from planning.rehearsal.sequence import NeverSent, Sequence
from planning.rehearsal.steps import play
from training.config import StageConfig


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """The rehearsal of one rank; all sizes of its model are filled in."""

    stage: str
    settings: StageConfig
    rank: int
    steps: int
    """Training steps before the validation."""
    device: str = "cuda"
    """Type of each rank's device."""


def run_rank(task: RankTask, broker: Broker) -> Sequence:
    """Run one rank and record its sequence.

    The sequence ends early at an error, which it records, or at a message that nobody sends.
    """
    recorder = Recorder(task.rank)
    try:
        with (
            claimed_world(task, recorder),
            claimed_gpu() if task.device == "cuda" else nullcontext(),
            without_arithmetic(),
            Shadows(recorder, broker),
        ):
            train(task, recorder)
    except NeverSent:
        pass  # the matcher finds the call that ends the sequence
    except Exception as error:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        lines = "".join(f"\n      at {place}" for place in places(list(frames)[-1]))
        text = str(error).split("\n\n")[0]  # torch adds its tables of kernels
        recorder.sequence.failure = f"{type(error).__name__}: {text}{lines}"
    return recorder.sequence


def train(task: RankTask, recorder: Recorder | None = None) -> None:
    """Train as in a run, on any rank of any world, without data."""
    mesh = build_mesh(task.settings.mesh, join_world())
    play(task.stage, task.settings, task.steps, mesh, recorder)


@contextmanager
def claimed_world(task: RankTask, recorder: Recorder) -> Iterator[None]:
    """Pretend that a launcher started this process as a rank of a whole world."""
    rank, size, asked = task.rank, task.settings.mesh.world, ""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
    original = dist.init_process_group

    def init_process_group(backend: str, *_: Any, device_id: Any = None, **__: Any) -> None:
        nonlocal asked
        asked = backend
        original(_fakes(backend), rank=rank, world_size=size, store=FakeStore())
        recorder.note_backends(dist.group.WORLD, backend)
        if device_id is not None and dist.group.WORLD is not None:
            dist.group.WORLD.bound_device_id = device_id

    def claim(named: dict[str, Any]) -> str:
        backend = str(named.get("backend") or asked)
        named["backend"] = _fakes(backend)
        named.pop("pg_options", None)
        return backend

    device = GPU if task.device == "cuda" else CPU
    changes = [
        (dist, "init_process_group", init_process_group),
        (parallel.world, "rank_device", lambda: device),
        (parallel.world, "met_store", lambda *_: FakeStore()),
        (parallel.world, "refuse_shared_gpus", nothing),
    ]
    recorder.sequence.device = device.type
    try:
        with (
            replaced(changes),
            groups_noted(recorder, claim),
            texts_noted(recorder, rehearsed=True),
        ):
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fakes(config: str) -> str:
    """torch's fake backend for the devices of the requested backends."""
    devices = backends_of(config)
    return "fake" if "cpu" in devices else ",".join(f"{device}:fake" for device in devices)
