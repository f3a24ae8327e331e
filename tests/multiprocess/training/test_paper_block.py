"""One block of the 12B prior (width 3968, 62 heads, 1280 positions): two tensor ranks equal one."""

import json
from pathlib import Path

import pytest
import torch

from models.config import PriorConfig
from models.initialization import init_normal
from models.prior import PriorBlock
from parallel.config import MeshConfig
from parallel.mesh import build_mesh
from parallel.placement import placement_of
from parallel.world import join_world, leave_world
from tests.harness import run_world

CONFIG = PriorConfig(dim=3968, heads=62, layers=64, text_length=256, grid=32)
LAYERS = {"row": 1, "column": 2, "conv": 64}


@pytest.mark.big
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_two_tensor_ranks_equal_one(kind: str, tmp_path: Path) -> None:
    by_ranks = {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        body = {"out": str(out), "layer": LAYERS[kind], "tensor": ranks}
        target = "tests.multiprocess.training.test_paper_block:run_block"
        by_ranks[ranks] = run_world(target, body, ranks)[0]
    for name, expected in by_ranks[1].items():
        one, two = torch.tensor(expected).double(), torch.tensor(by_ranks[2][name]).double()
        assert float((one - two).norm() / one.norm()) < 1e-5, name


def run_block(payload: str) -> None:
    """Forward and backward on this rank; rank 0 reports samples of outputs and gradients."""
    body = json.loads(payload)
    torch.set_float32_matmul_precision("highest")
    world = join_world()
    mesh = build_mesh(MeshConfig(tensor=body["tensor"]), world)
    block = PriorBlock(CONFIG, body["layer"], mesh.shared)
    init_normal(block, 0, {"weight": CONFIG.dim**-0.5}, "block.")
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(1, CONFIG.length, CONFIG.dim, generator=draws).requires_grad_()
    output = block(x)
    weights = torch.randn(output.shape, generator=draws)
    (output * weights).sum().backward()
    assert x.grad is not None
    sampled = {"output": output[0, ::97, ::31], "states": x.grad[0, ::97, ::31]}
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad[: placement_of(parameter).rows]
        sampled[name] = rows[:40, ::31] if rows.dim() > 1 else rows[:40]
    if world.rank == 0:
        report = {name: value.flatten().tolist() for name, value in sampled.items()}
        Path(body["out"], "result-0.json").write_text(json.dumps(report))
    leave_world(world)
