"""Priors of other options than the paper's train on every mesh as on one process."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from bench.parity import BOUND, CASES, MODEL, ONE, Case, difference, train
from models.config import PriorConfig
from parallel.config import CompressConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "qk_norm": {"qk_norm": True},
    "rotary": {"positions": "rotary"},
    "gated": {"mlp": "gated"},
    "tied": {"tied": True},
    "columns": {"columns": 5},
}
ALL = {name: value for option in OPTIONS.values() for name, value in option.items()}
TOGETHER = ["TP2xPP2xDP2 pipe", "TP4 pipe", "TP2xDP2 ZeRO-3"]
"""TP4 pads its heads: gains of padding heads are zero."""
ALONE = ["TP2xPP2 pipe", "DP2 ZeRO-2", "DP2 ZeRO-3", "paper"]


@cache
def _trained(name: str, model: PriorConfig, rank: int = 0) -> list[dict[str, float]]:
    case = replace(_case(name).precise("fp32"), model=model, compress=CompressConfig(rank=rank))
    return train(replace(case, steps=10))


def _case(name: str) -> Case:
    return next(case for case in [ONE, *CASES] if case.name.startswith(name))


@pytest.mark.world
@pytest.mark.parametrize("name", TOGETHER)
def test_all_options_train_as_on_one_process(name: str) -> None:
    model = replace(MODEL, **ALL)
    single, other = _trained("one", model), _trained(name, model)
    assert max(row["grad_norm"] for row in single) > 0.5, "clipping never acted"
    assert difference(single, other) < BOUND["fp32"]
    if name == "TP4 pipe":  # whose ranks read the whole batch
        assert difference(single[-1:], other[-1:], ("validation",)) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ALONE)
def test_each_option_trains_as_on_one_process(name: str, option: str) -> None:
    model = replace(MODEL, **OPTIONS[option])
    single = _trained("one", model)
    assert difference(single, _trained(name, model)) < BOUND["fp32"]
    assert difference(single, _trained("one", MODEL)) > 1e-3, "the option changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2xPP2xDP2 pipe", "paper"])
def test_all_options_are_compressed_at_full_rank_as_without(name: str) -> None:
    model = replace(MODEL, **ALL)
    forced = _trained(name, model, 10**6)
    assert difference(_trained(name, model), forced) < 1e-4
    assert all(row["compress_sent_bytes"] > row["compress_raw_bytes"] > 0 for row in forced)
