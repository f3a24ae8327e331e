"""Pipelines on torch's own stack, with every schedule, train as one process does."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.parity import BOUND, CASES, ONE, difference, train
from parallel.tensor.halves import only
from parallel.tensor.layers import VocabularyHead
from parallel.tensor.ops import TensorParallel

SCHEDULES = ["1f1b", "interleaved", "zero-bubble"]


@cache
def _one(precision: str) -> list[dict[str, float]]:
    return train(ONE.precise(precision))


def _trained(name: str, precision: str = "fp32") -> list[dict[str, float]]:
    case = next(case for case in CASES if case.name == f"{name} torch")
    return train(case.precise(precision))


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
    case = next(case for case in CASES if case.name == "PP2 interleaved torch").precise("fp32")
    again = replace(case, engine=replace(case.engine, recompute=True))
    assert difference(_one("fp32"), train(again)) < BOUND["fp32"]


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
