"""Ranks that train while one weight's gradient on one rank is not finite, or a guard skips a step.

They report each step, and the error buffers after the last one.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd import Function

from bench.parity import OPTIM, PRELOAD, SEED, Case, batch_of, program_of
from cluster.launcher import launch
from core.config import from_json
from parallel.engines.protocol import Engine, EngineSettings
from parallel.engines.registry import build_engine
from parallel.mesh import Mesh, build_mesh
from parallel.world import join_world, leave_world

Report = tuple[list[dict[str, Any]], dict[str, Tensor]]


def train_poisoned(
    case: Case, out: Path, *, poison: float = 0.0, at: int = 2, skipped: int = -1
) -> Report:
    """Rows of rank 0, and all ranks' error buffers by name, kind and first element.

    `poison`: the gradient of q.weight in the last rank's first block at step `at`; 0 = its own.
    `skipped`: the step that a guard refuses.
    """
    out.mkdir()
    body = {"case": asdict(case), "out": str(out), "poison": repr(poison)}
    payload = json.dumps({**body, "at": at, "skipped": skipped})
    launch(f"{__name__}:run", payload, case.mesh.world, [*PRELOAD, __name__])
    errors: dict[str, Tensor] = {}
    for rank in range(case.mesh.world):
        errors |= load_file(out / f"errors-{rank}.safetensors")
    return json.loads((out / "rows.json").read_text()), errors


def run(payload: str) -> None:
    """One rank."""
    body = json.loads(payload)
    case, out = from_json(Case, body["case"]), Path(body["out"])
    torch.set_float32_matmul_precision("highest")
    world = join_world()
    mesh = build_mesh(case.mesh, world)
    step = [0]

    def judge(_norm: float, _loss: float) -> str:
        return "planted" if step[0] == body["skipped"] else ""

    settings = EngineSettings(
        optim=replace(OPTIM, moments=case.moments),
        engine=case.engine,
        compress=case.compress,
        seed=SEED,
        judge=judge,
    )
    engine = build_engine(program_of(case, mesh), settings, mesh)
    layers = engine.layers()
    q: Any = layers[min(name for name in layers if name.startswith("block"))].q
    value, own = float(body["poison"]), q.forward
    rows = []
    for step[0] in range(case.steps):
        here = value and step[0] == body["at"] and world.rank == world.size - 1
        q.forward = (lambda x: F.linear(x, _Poison.apply(q.weight, value), q.bias)) if here else own
        rows.append(_step(case, engine, mesh, step[0]))
    parts = {f"{p.name} {p.kind} {p.start}": p.data.clone() for p in engine.error_slices()}
    save_file(parts, out / f"errors-{world.rank}.safetensors")
    if world.rank == 0:
        (out / "rows.json").write_text(json.dumps(rows))
    engine.close()
    leave_world(world)


def _step(case: Case, engine: Engine, mesh: Mesh, step: int) -> dict[str, Any]:
    whole, times = batch_of(step, case.model), case.engine.gradient_accumulation_steps
    mine = {name: x[mesh.data.rank :: mesh.data.size] for name, x in whole.items()}
    parts = {name: x.chunk(times) for name, x in mine.items()}
    micro = [{name: x[i] for name, x in parts.items()} for i in range(times)]
    result = engine.step(micro, OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup))
    facts = {"grad_norm": result.grad_norm, "skipped": result.skipped, **result.facts}
    return {**result.losses, **facts}


class _Poison(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.value = value
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(gradients[0], ctx.value), None
