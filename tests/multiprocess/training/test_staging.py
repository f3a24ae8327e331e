"""The staging backend gives gloo's results, and trains every mesh and engine."""

from pathlib import Path
from typing import Any

import pytest

from bench.parity import BOUND, CASES, difference
from tests.harness import run_world
from tests.meshes import STEPS, Rows, train_meshes

RANKS = 3


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    return train_meshes(tmp_path_factory.mktemp("meshes"), "cpu", ("fp32",))


@pytest.mark.world
def test_every_operation_gives_what_gloo_gives(tmp_path: Path) -> None:
    payload: dict[str, Any] = {"out": str(tmp_path), "kind": "cpu"}
    ranks = run_world("tests.operations:try_operations", payload, RANKS)
    assert len(ranks) == RANKS
    for rank, results in enumerate(ranks):
        for name, (staged, gloo) in results.items():
            assert staged == gloo, f"rank {rank}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_staged_mesh_trains_as_one_process_does(name: str, meshes: dict[str, Rows]) -> None:
    single, other = meshes["one process fp32"], meshes[f"{name} fp32"]
    assert len(single) == STEPS
    assert max(row["grad_norm"] for row in single) > 1.0, "clipping never acted"
    assert difference(single, other) < BOUND["fp32"]
