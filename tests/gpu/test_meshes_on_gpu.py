"""All engines and meshes with 2 to 8 ranks on one card, through the staging backend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.parity import BOUND, CASES, difference
from tests.harness import run_world
from tests.meshes import Rows, train_meshes

HALF = ["TP2xPP2 pipe", "DP2 ZeRO-3"]
"""Cases that are trained in bf16, too."""
BF16 = [f"{name} bf16" for name in HALF]
ON_GPUS = [case for case in CASES if not case.engine.gpu_problems()]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> dict[str, Rows]:
    return train_meshes(tmp_path_factory.mktemp("meshes"), device.type, ("fp32",), BF16, ON_GPUS)


def test_every_operation_gives_what_gloo_gives(tmp_path: Path, device: torch.device) -> None:
    payload: dict[str, Any] = {"out": str(tmp_path), "kind": device.type}
    ranks = run_world("tests.operations:try_operations", payload, 3)
    assert len(ranks) == 3
    for rank, results in enumerate(ranks):
        for name, (staged, gloo) in results.items():
            assert staged == gloo, f"rank {rank}: {name}"


@pytest.mark.parametrize("name", [f"{case.name} fp32" for case in ON_GPUS] + BF16)
def test_a_mesh_trains_as_one_process_does(
    name: str, meshes: dict[str, Rows], record_property: Callable[[str, float], None]
) -> None:
    precision = name.split()[-1]
    single, other = meshes[f"one process {precision}"], meshes[name]
    assert max(row["grad_norm"] for row in single) > 1.0, "clipping never acted"
    worst = difference(single, other)
    record_property(f"difference in {precision}", worst)
    assert worst < BOUND[precision]
