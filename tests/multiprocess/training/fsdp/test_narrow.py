"""Gradients of residual branches that are added up in 16 bits."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.parity import CASES, Case, difference, train
from parallel.config import EngineConfig, MeshConfig
from tests.multiprocess.training.fsdp.narrow import by_hand, mean_gradients
from tests.multiprocess.training.fsdp.poisoned import train_poisoned
from tests.multiprocess.training.rounding import LEAST

MESHES = ["DP2 torch", "2 nodes of 2 torch", "PP2 1f1b torch"]


def _case(name: str, precision: str = "fp32") -> Case:
    case = next(case for case in CASES if case.name.startswith(name)).precise(precision)
    return replace(case, engine=replace(case.engine, reduce_precision="16-bit"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sums_over_ranks_are_rounded_and_nothing_else(name: str, tmp_path: Path) -> None:
    """By hand in plain torch. A value near the middle of two may be rounded the other way, which a
    matrix's norm shows by less than a tenth of what rounding all of it does."""
    case = _case(name)
    if case.mesh.pipeline > 1:  # with replicas
        case = replace(case, mesh=MeshConfig(pipeline=2, data=2))
    ours = mean_gradients(case, tmp_path / "out")
    rounded, exact = by_hand(case, torch.bfloat16), by_hand(case, torch.float32)
    blocks = [n for n in ours if n.startswith("block")]
    assert len(blocks) == 6 * 5 and len(ours) > len(blocks)
    for n, gradient in ours.items():
        size = gradient.norm()
        assert (gradient - rounded[n]).norm() < LEAST / 10 * size, n
        if n in blocks:
            assert (gradient - exact[n]).norm() > LEAST / 2 * size, n


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DP4 torch", "2 nodes of 2 torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_goes_on_as_with_fp32_sums(name: str, precision: str) -> None:
    """Half of the bytes of blocks' gradients; the losses as near as another mesh's."""
    narrow = _case(name, precision)
    wide = replace(narrow, engine=replace(narrow.engine, reduce_precision="fp32"))
    one, other = train(wide), train(narrow)
    assert difference(one[:1], other[:1], ("loss",)) < 1e-6
    assert difference(one, other) < 2e-3
    group = "machine" if narrow.mesh.nodes > 1 else "data"
    sent = [rows[-1]["comm"][group]["reduce_scatter_tensor"]["bytes"] for rows in (one, other)]
    assert sent[1] < 0.7 * sent[0]


@pytest.mark.slow
def test_a_sum_that_overflows_lowers_the_scale(tmp_path: Path) -> None:
    rows, _ = train_poisoned(
        replace(_case("DP4 torch", "fp16"), steps=6), tmp_path / "a", poison=1e6
    )
    assert [bool(row["skipped"]) for row in rows] == [False, False, True, False, False, False]
    assert rows[-1]["scale_log2_min"] < 13 < rows[-1]["scale_log2_max"]
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_other_engines_refuse_it() -> None:
    mesh = _case("DP4 torch").mesh
    for name in ("reference", "deepspeed_zero"):
        engine = EngineConfig(name=name, reduce_precision="16-bit")  # type: ignore[arg-type]
        (problem,) = engine.problems(4, mesh, compress=False)
        assert "--engine.name torch, or --engine.reduce-precision fp32" in problem
