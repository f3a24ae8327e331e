"""Ranks that hand out their mean gradients, and the same means by hand."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.parity import MODEL, OPTIM, PRELOAD, SEED, Case, batch_of, program_of
from cluster.launcher import launch
from core.config import from_json
from models.prior import build_prior, prior_loss
from parallel.config import CompressConfig
from parallel.engines.protocol import EngineSettings
from parallel.engines.registry import build_engine
from parallel.mesh import build_mesh
from parallel.world import join_world, leave_world


def mean_gradients(case: Case, out: Path) -> dict[str, Tensor]:
    """Matrices' mean gradients of the first step, put together from all ranks' shards."""
    out.mkdir()
    payload = json.dumps({"case": asdict(case), "out": str(out)})
    launch(f"{__name__}:run", payload, case.mesh.world, [*PRELOAD, __name__])
    whole = {
        n: torch.zeros(p.shape, device="cpu")
        for n, p in build_prior(MODEL, SEED).named_parameters()
    }
    names = set()
    for path in sorted(out.glob("*.safetensors")):
        for key, shard in load_file(path).items():
            name, start = key.split("@")
            whole[name].view(-1)[int(start) : int(start) + shard.numel()] = shard.view(-1)
            names.add(name)
    return {name: whole[name] for name in sorted(names)}


def run(payload: str) -> None:
    """One rank."""
    body = json.loads(payload)
    case = from_json(Case, body["case"])
    torch.set_float32_matmul_precision("highest")
    world = join_world()
    mesh = build_mesh(case.mesh, world)
    settings = EngineSettings(optim=OPTIM, engine=case.engine, compress=CompressConfig(), seed=SEED)
    engine: Any = build_engine(program_of(case, mesh), settings, mesh)
    batch = batch_of(0, MODEL)
    engine._passes(micro_batches(batch, case, mesh.data.rank))
    engine._reduce()
    parts = {
        f"{name}@{engine._parts[name].start}": gradient.clone()
        for name, gradient in engine._buckets.gradients().items()
    }
    save_file(parts, Path(body["out"], f"{world.rank}.safetensors"))
    engine.close()
    leave_world(world)


def micro_batches(batch: dict[str, Tensor], case: Case, rank: int) -> list[dict[str, Tensor]]:
    """A replica's micro-batches of a step."""
    times = case.engine.gradient_accumulation_steps
    parts = {name: x[rank :: case.mesh.data].chunk(times) for name, x in batch.items()}
    return [{name: x[i] for name, x in parts.items()} for i in range(times)]


def by_hand(case: Case, sent: torch.dtype) -> dict[str, Tensor]:
    """Mean gradients of one process in plain torch, whose sums over ranks are rounded to `sent`."""
    each = [
        [_gradients(micro, case) for micro in micro_batches(batch_of(0, MODEL), case, rank)]
        for rank in range(case.mesh.data)
    ]
    return {
        name: _mean([[g[name] for g in row] for row in each], case, sent if _narrow(name) else None)
        for name in each[0][0]
    }


def _narrow(name: str) -> bool:
    return name.startswith("block")


def _mean(each: Sequence[Sequence[Tensor]], case: Case, sent: torch.dtype | None) -> Tensor:
    """`each`: of each replica, of each micro-batch."""
    local, nodes = case.mesh.local, case.mesh.nodes
    if case.mesh.pipeline > 1:  # micro-batches add up first, in fp32
        each = [[torch.stack(list(row)).sum(0)] for row in each]
    sums = []
    for node in range(nodes):
        rows = each[node * local : (node + 1) * local]
        micro = [_sum([row[i] for row in rows], sent) for i in range(len(rows[0]))]
        sums.append(torch.stack(micro).sum(0) / local)
    return (_sum(sums, sent) if nodes > 1 else sums[0]) / nodes


def _sum(pair: Sequence[Tensor], sent: torch.dtype | None) -> Tensor:
    """Of two ranks' tensors, each rounded, and their sum rounded."""
    one, other = pair
    return (one.to(sent) + other.to(sent)).float() if sent else one + other


def _gradients(micro: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    layers = build_prior(MODEL, SEED)
    state: Any = micro
    for layer in layers.values():
        state = layer(state)
    loss = prior_loss(state, micro, MODEL.text_weight)["loss"]
    (loss / case.engine.gradient_accumulation_steps).backward()
    return {n: p.grad for n, p in layers.named_parameters() if p.grad is not None}
