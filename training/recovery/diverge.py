"""`tapir diverge A B`: the first tensor in which two runs differ, from one checkpoint and batch.

Each run does one step with its own mesh and engine, and records the output and output gradient of
every layer, then every updated weight. Samples are matched by their position in the global batch,
so that any two meshes can be compared.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.reader import CheckpointReader, finished_steps, open_checkpoint
from checkpoint.writer import write_checkpoint
from cluster.launcher import launch
from core.config import to_json
from core.errors import InputError
from core.heartbeat import Heart
from core.storage.store import open_store
from parallel.engines.registry import modules_of
from parallel.ledger import recorded
from parallel.mesh import build_mesh
from parallel.tensor.ops import TensorParallel
from parallel.world import join_world, leave_world
from training.launch import PRELOAD
from training.stages import make_task, settings_from_json
from training.trainer import Run

AFTER = "after"
"""Folder of a traced run's state after its step."""
KINDS = {"exp_avg": "gradient", "master": "weight"}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference between two runs."""

    direction: str
    """forward, backward or update."""
    layer: str
    tensor: str
    rank: int
    """Rank of the second run; -1 for the global state."""
    relative: float
    """Norm of the difference over the norm of the first run's tensor."""


def diverge(
    first: Path, second: Path, checkpoint: Path | None, tolerance: float | None
) -> list[Difference]:
    """All differences above the tolerance, in the order of computation.

    Raises: InputError if the folders hold no runs, or no common checkpoint can be read.
    """
    bodies = [_config(first), _config(second)]
    if tolerance is None:
        exact = all(settings.engine.precision == "fp32" for _, settings in bodies)
        tolerance = 1e-5 if exact else 2e-2
    start = str(checkpoint) if checkpoint else _newest(first, bodies[0][1])
    with tempfile.TemporaryDirectory(prefix="tapir-diverge-") as name:
        traces = []
        for i, (stage, settings) in enumerate(bodies):
            out = Path(name) / str(i)
            out.mkdir()
            _trace(stage, settings, start, out)
            traces.append(out)
        return [d for d in _compare(*traces) if d.relative > tolerance]


def trace_rank(payload: str) -> None:
    """Do one step on this rank, and write its tensors to `out`; started by the launcher."""
    body = json.loads(payload)
    out, settings = Path(body["out"]), settings_from_json(body["stage"], body["settings"])
    world = join_world()
    mesh = build_mesh(settings.mesh, world)
    with recorded(mesh) as ledger:
        task = make_task(body["stage"], settings, mesh)
        run = Run(body["stage"], task, settings, mesh, ledger, Heart(world.rank))
        run.resume_from(open_checkpoint(body["checkpoint"]))
        notes: dict[str, list[Tensor]] = {}
        local = settings.loop.global_batch_size // mesh.data.size
        for name, layer in run.engine.layers().items():
            _note(layer, name, notes, local, mesh.shared)
        order = {"layers": [layer.name for layer in task.program.layers]}
        next(run.steps())
        tensors = {key: torch.cat(parts).contiguous().cpu() for key, parts in notes.items()}
        save_file(tensors, out / f"rank-{world.rank}.safetensors")
        place = {"replica": mesh.data.rank, "size": local, **order}
        (out / f"rank-{world.rank}.json").write_text(json.dumps(place))
        slices, store = run.engine.state_slices(), open_store(str(out))
        write_checkpoint(store, AFTER, slices, {}, world.rank, world.gather_text)
        run.close()
    leave_world(world)


def _note(
    layer: Any, name: str, notes: dict[str, list[Tensor]], local: int, shared: TensorParallel
) -> None:
    """Record a layer's outputs and their gradients; ignores activation recomputation.

    `shared` gathers states whose positions tensor ranks share.
    """

    def forward(_module: Any, _inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, Tensor) else None
        if parts is None or not parts.requires_grad or _is_backward():
            return
        states = shared.whole_states(parts.detach().float())
        notes.setdefault(f"forward/{name}", []).append(states.clone())

        def backward(gradient: Tensor) -> None:
            scaled = shared.whole_states(gradient.detach().float()) * local
            notes.setdefault(f"backward/{name}", []).append(scaled)

        parts.register_hook(backward)

    layer.register_forward_hook(forward)


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _config(folder: Path) -> tuple[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a run folder (no config.json); give `tapir train`'s --out"
        )
    body = json.loads(path.read_text())
    stage = body.pop("stage")
    return stage, settings_from_json(stage, body, str(path))


def _newest(folder: Path, settings: Any) -> str:
    store = open_store(settings.checkpoint.to or str(folder / "checkpoints"))
    steps = finished_steps(store)
    if not steps:
        raise InputError(f"{folder} holds no checkpoint; give one by --checkpoint")
    return f"{store.url}/step-{steps[-1]}"


def _trace(stage: str, settings: Any, checkpoint: str, out: Path) -> None:
    step = int(open_checkpoint(checkpoint).facts["step"])
    loop = dataclasses.replace(settings.loop, steps=max(settings.loop.steps, step + 1))
    settings = dataclasses.replace(settings, out=out / "run", loop=loop)
    body = {
        "stage": stage,
        "settings": to_json(settings),
        "checkpoint": checkpoint,
        "out": str(out),
    }
    split = settings.mesh.world > settings.mesh.data
    preload = [*PRELOAD, *modules_of(settings.engine.name, split)]
    launch("training.recovery.diverge:trace_rank", json.dumps(body), settings.mesh.world, preload)


def _compare(first: Path, second: Path) -> Iterator[Difference]:
    one, two = _load(first), _load(second)
    layers: list[str] = one[0][1]["layers"]
    whole = _global_batch(one)
    passes = [("forward", name) for name in layers]
    passes += [("backward", name) for name in reversed(layers)]
    for direction, layer in passes:
        key = f"{direction}/{layer}"
        for rank, (tensors, place) in sorted(two.items()):
            if key in tensors and key in whole:
                start = place["replica"] * place["size"]
                expected = whole[key][start : start + place["size"]]
                relative = _relative(expected, tensors[key])
                what = "output" if direction == "forward" else "gradient of the output"
                yield Difference(
                    direction=direction, layer=layer, tensor=what, rank=rank, relative=relative
                )
    yield from _compare_states(
        open_checkpoint(f"{first}/{AFTER}"), open_checkpoint(f"{second}/{AFTER}"), layers
    )


def _compare_states(
    one: CheckpointReader, two: CheckpointReader, layers: list[str]
) -> Iterator[Difference]:
    for kind, what in KINDS.items():
        for name in sorted(one.shapes(), key=lambda name: layers.index(name.split(".")[0])):
            relative = _relative(one.tensor(name, kind), two.tensor(name, kind))
            layer, _, tensor = name.partition(".")
            yield Difference(
                direction="update",
                layer=layer,
                tensor=f"{what} of {tensor}",
                rank=-1,
                relative=relative,
            )


def _load(folder: Path) -> dict[int, tuple[dict[str, Tensor], dict[str, Any]]]:
    traces = {}
    for path in folder.glob("rank-*.json"):
        rank = int(path.stem.split("-")[1])
        traces[rank] = (load_file(path.with_suffix(".safetensors")), json.loads(path.read_text()))
    return traces


def _global_batch(
    ranks: dict[int, tuple[dict[str, Tensor], dict[str, Any]]],
) -> dict[str, Tensor]:
    """Concatenate each tensor over the replicas; uses the first rank of each replica."""
    parts: dict[str, dict[int, Tensor]] = {}
    for _, (tensors, place) in sorted(ranks.items()):
        for key, value in tensors.items():
            parts.setdefault(key, {}).setdefault(place["replica"], value)
    return {key: torch.cat([row[i] for i in sorted(row)]) for key, row in parts.items()}


def _relative(expected: Tensor, actual: Tensor) -> float:
    scale = float(expected.double().norm())
    return float((expected.double() - actual.double()).norm()) / max(scale, 1e-30)
