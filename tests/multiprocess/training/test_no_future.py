"""What a block's outputs depend on, by jacobian: exactly what its mask allows, on 1 and 2 ranks."""

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.functional import jacobian

from models.attention.masks import full_mask, layer_kind
from models.config import PriorConfig
from models.initialization import init_normal
from models.prior import PriorBlock
from parallel.config import MeshConfig
from parallel.mesh import build_mesh
from parallel.tensor.ops import TensorParallel
from parallel.world import join_world, leave_world
from tests.harness import run_world

CONFIG = PriorConfig(dim=12, heads=3, layers=8, text_length=5, grid=4, conv_kernel=3)
LAYERS = {"row": 1, "column": 2, "conv": 8}


def _reach(layer: int, tensor: TensorParallel) -> torch.Tensor:
    """(length, length) bool: does this output position depend on that input position?"""
    block = PriorBlock(CONFIG, layer, tensor)
    init_normal(block, 0, {"weight": 0.5}, "block.")
    x = torch.randn(CONFIG.length, CONFIG.dim, generator=torch.Generator().manual_seed(1))
    slopes = jacobian(lambda states: block(states[None])[0], x)
    reach: torch.Tensor = slopes.abs().amax((1, 3)) > 0
    return reach


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_a_block_sees_what_its_mask_allows(kind: str) -> None:
    assert layer_kind(LAYERS[kind], CONFIG.layers) == kind
    reach = _reach(LAYERS[kind], TensorParallel())
    assert reach.equal(full_mask(kind, 5, 4, 3))  # type: ignore[arg-type]
    assert not reach.triu(1).any()


@pytest.mark.world
def test_two_tensor_ranks_see_the_same(tmp_path: Path) -> None:
    """Three heads on two ranks: one of them is padding, which must reach nothing."""
    results = run_world(
        "tests.multiprocess.training.test_no_future:reach_rank", {"out": str(tmp_path)}, 2
    )
    for rank in results:
        for kind, rows in rank.items():
            assert torch.tensor(rows).equal(full_mask(kind, 5, 4, 3)), kind


def reach_rank(payload: str) -> None:
    """Report every kind's reach on this tensor rank."""
    world = join_world()
    mesh = build_mesh(MeshConfig(tensor=2), world)
    reached = {kind: _reach(layer, mesh.shared).tolist() for kind, layer in LAYERS.items()}
    Path(json.loads(payload)["out"], f"result-{world.rank}.json").write_text(json.dumps(reached))
    leave_world(world)
