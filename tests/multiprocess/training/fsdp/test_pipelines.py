"""Pipelines on torch's own stack, with every schedule, train as one process does."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode

from bench.parity import BOUND, CASES, MODEL, ONE, Case, difference, train
from models.prior import build_prior
from parallel.config import EngineConfig, MeshConfig
from parallel.pipelines.schedules import Schedule
from parallel.tensor.halves import only
from parallel.tensor.layers import VocabularyHead
from parallel.tensor.ops import TensorParallel
from tests.multiprocess.training.fsdp.poisoned import train_poisoned

SCHEDULES = ["1f1b", "interleaved", "zero-bubble"]
SHORT = 6
"""Steps of runs that show one more option."""
TIED = replace(MODEL, tied=True)


@cache
def _one(precision: str) -> list[dict[str, float]]:
    return train(ONE.precise(precision))


def _named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def _case(name: str) -> Case:
    return _named(f"{name} torch")


def _trained(name: str, precision: str = "fp32") -> list[dict[str, float]]:
    return train(_case(name).precise(precision))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mesh", ["PP2", "TP2xPP2xDP2"])
def test_a_schedule_trains_as_one_process_does(mesh: str, schedule: str) -> None:
    assert difference(_one("fp32"), _trained(f"{mesh} {schedule}")) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_four_stages(schedule: str) -> None:
    assert difference(_one("fp32"), _trained(f"PP4 {schedule}")) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("precision", "bound"), [("bf16", BOUND["bf16"]), ("fp16", 2e-3)])
def test_schedules_in_16_bits(precision: str, bound: float, schedule: str) -> None:
    assert difference(_one(precision), _trained(f"PP2 {schedule}", precision)) < bound


@pytest.mark.slow
def test_recompute_in_a_pipeline() -> None:
    case = _case("PP2 interleaved")
    again = replace(case, engine=replace(case.engine, recompute=True))
    assert difference(_one("fp32"), train(again)) < BOUND["fp32"]


@pytest.mark.slow
def test_four_stages_of_two_chunks_each() -> None:
    """Eight layers, a chunk for each, of which the first and the last have one more."""
    deep = replace(MODEL, layers=8)
    engine = EngineConfig(
        name="torch", schedule="interleaved", virtual_stages=2, gradient_accumulation_steps=4
    )
    case = Case(name="deep", mesh=MeshConfig(pipeline=4), engine=engine, model=deep, steps=SHORT)
    one = train(replace(ONE, model=deep, steps=SHORT))
    assert difference(one, train(case)) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "data"), [("1f1b", 1), ("interleaved", 2)])
def test_stages_share_tied_tables(schedule: Schedule, data: int) -> None:
    case = _case(f"PP2 {schedule}")
    tied = replace(case, mesh=MeshConfig(pipeline=2, data=data), model=TIED, steps=SHORT)
    assert difference(train(replace(ONE, model=TIED, steps=SHORT)), train(tied)) < BOUND["fp32"]


@pytest.mark.slow
def test_stages_send_each_other_a_part_under_sequence_parallelism() -> None:
    assert difference(_one("fp32"), _trained("SP2xPP2 zero-bubble")) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_stages_skip_a_step_that_is_not_finite_in_one(schedule: str, tmp_path: Path) -> None:
    """It changes nothing: the run goes on as one whose guard skips the step."""
    case = replace(_case(f"PP2 {schedule}"), steps=6)
    poisoned, _ = train_poisoned(case, tmp_path / "poisoned", poison=math.nan)
    guarded, _ = train_poisoned(case, tmp_path / "guarded", skipped=2)
    assert [bool(row["skipped"]) for row in poisoned] == [i == 2 for i in range(6)]
    assert [row["skipped"] for row in guarded] == ["planted" * (i == 2) for i in range(6)]
    for i, (one, other) in enumerate(zip(poisoned, guarded, strict=True)):
        assert one["loss"] == other["loss"], f"step {i}"
        assert i == 2 or one["grad_norm"] == other["grad_norm"], f"step {i}"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_branch_that_overflows_on_one_stage_lowers_its_scale(
    schedule: str, tmp_path: Path
) -> None:
    """fp16: as in DeepSpeed's pipeline."""
    rows = []
    for name in ("PP2 pipe", f"PP2 {schedule} torch"):
        case = replace(_named(name).precise("fp16"), steps=6)
        rows.append(train_poisoned(case, tmp_path / name, poison=1e6)[0])
    pipe, mine = rows
    assert [bool(row["skipped"]) for row in mine] == [i == 2 for i in range(6)]
    for field in ("scale_log2_min", "scale_log2_max", "skipped"):
        assert [row[field] for row in pipe] == [row[field] for row in mine]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_halves_of_a_blocks_backward_pass_cost_the_whole(precision: str) -> None:
    """As the zero bubble runs them: torch's two functions.

    FlopCounterMode knows no FLOPs of the attention kernel of CPUs, in the whole as in the halves.
    """
    block = build_prior(MODEL, 0)["block000"]
    shape = (2, MODEL.length, MODEL.dim)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return x, block(x)

    whole = FlopCounterMode(display=False)
    x, out = forward()
    with whole:
        out.backward(torch.ones(shape))
    expected = {name: p.grad for name, p in block.named_parameters()}
    states = x.grad
    block.zero_grad(set_to_none=True)
    x, out = forward()
    first, second = (FlopCounterMode(display=False) for _ in range(2))
    with first, only("input"):
        _, groups = stage_backward_input([out], [torch.ones(shape)], [x], block.parameters())
    with second, only("weights"):
        stage_backward_weight(block.parameters(), groups)
    assert first.get_total_flops() + second.get_total_flops() == whole.get_total_flops()
    matmuls = 2 * shape[0] * shape[1] * sum(p.numel() for p in block.parameters() if p.dim() > 1)
    assert second.get_total_flops() == matmuls
    assert states is not None and x.grad is not None and x.grad.equal(states)
    for name, parameter in block.named_parameters():
        grad, other = parameter.grad, expected[name]
        assert grad is not None and other is not None and grad.equal(other), name


def test_both_halves_of_the_heads_backward_pass_cost_the_whole() -> None:
    head = VocabularyHead(8, 12, TensorParallel())
    x = torch.randn(2, 3, 8, requires_grad=True)
    flops = {}
    for half in ("both", "input", "weights"):
        loss = head(x, half=True).sum()
        with FlopCounterMode(display=False) as counter, only(half):  # type: ignore[arg-type]
            loss.backward()
        flops[half] = counter.get_total_flops()
    assert flops["input"] == flops["weights"] > 0
    assert flops["input"] + flops["weights"] == flops["both"]
