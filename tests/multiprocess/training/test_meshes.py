"""Every mesh and engine trains as one process does; compression at full rank changes nothing."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.parity import BOUND, CASES, ONE, STEPS, Case, difference, train
from models.config import PriorConfig
from models.prior import build_prior
from parallel.config import CompressConfig
from parallel.control import FIELDS
from tests.multiprocess.training.by_hand import train_by_hand
from tests.multiprocess.training.rounding import (
    least_of_gradients,
    most_of_losses,
    train_beside_exact,
)

QUICK = [
    "DP2 reference",
    "TP2 pipe",
    "TP4 pipe",
    "PP2 pipe",
    "TP2xPP2xDP2 pipe",
    "DP2 ZeRO-2",
    "TP2xDP2 ZeRO-3",
    "paper",
    "SP2xPP2 pipe",
]
"""All of them: tests/multiprocess/training/test_staging.py. TP4 pads its heads."""
MORE = ["DP2 reference", "DP2 ZeRO-1", "DP2 ZeRO-2", "TP2xDP2 ZeRO-1"]
COMPRESSED = ["DP2 pipe", "paper", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
"""Every optimiser class and hook that compression can reach."""
LONGER = PriorConfig(
    dim=64, heads=4, layers=3, text_length=16, text_vocabulary=50, image_vocabulary=30, grid=8
)


@cache
def _trained(name: str, precision: str) -> list[dict[str, float]]:
    return train(_case(name).precise(precision))


def _case(name: str) -> Case:
    return next(case for case in [ONE, *CASES] if case.name.startswith(name))


@pytest.mark.world
@pytest.mark.parametrize("name", QUICK)
def test_a_mesh_trains_as_one_process_does(name: str) -> None:
    single, other = _trained("one", "fp32"), _trained(name, "fp32")
    assert max(row["grad_norm"] for row in single) > 1.0, "clipping never acted"
    assert difference(single, other) < BOUND["fp32"]


@pytest.mark.world
@pytest.mark.parametrize("name", ["TP2xPP2 pipe", "DP2 ZeRO-3", "SP2xDP2 ZeRO-1"])
def test_bf16_stays_within_its_bound(name: str) -> None:
    assert difference(_trained("one", "bf16"), _trained(name, "bf16")) < BOUND["bf16"]


@pytest.mark.world
@pytest.mark.parametrize("name", COMPRESSED)
def test_full_rank_compression_equals_none(name: str) -> None:
    """Factors of full rank have more bytes than gradients, which shows that they were sent."""
    forced = train(replace(_case(name).precise("fp32"), compress=CompressConfig(rank=10**6)))
    assert difference(_trained(name, "fp32"), forced) < 1e-4
    assert all(row["compress_sent_bytes"] > row["compress_raw_bytes"] > 0 for row in forced)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DP2 reference", "DP2 ZeRO-2", "DP2 pipe", "paper"])
def test_full_rank_compression_equals_none_in_bf16(name: str, tmp_path: Path) -> None:
    """What it adds is less than bf16 rounds off anyway: of each mean gradient at every step, and of
    loss and norm while the weights are equal. From then on last bits of weights are rounded
    otherwise, which losses show: they alone would not tell rank 31 from 64 (docs/LOG.md)."""
    case = replace(_case(name).precise("bf16"), model=LONGER)
    compress = CompressConfig(rank=10**6, warm_start=True)
    forced, off = train_beside_exact(replace(case, compress=compress), tmp_path)
    plain, least = train(case), least_of_gradients(case)
    assert off < least and difference(plain[:1], forced[:1]) < least
    assert difference(plain, forced, ("loss",)) < most_of_losses(LONGER)
    assert all(row["compress_sent_bytes"] > row["compress_raw_bytes"] > 0 for row in forced)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DP2 ZeRO-1", "paper", "PP2 pipe"])
def test_16_bit_moments_equal_one_process(name: str) -> None:
    """Also at full rank: AdamW16 is an optimiser class of its own to DeepSpeed."""
    single = train(replace(ONE.precise("fp32"), moments="bf16"))
    full = CompressConfig(rank=10**6) if name != "PP2 pipe" else CompressConfig()
    other = train(replace(_case(name).precise("fp32"), moments="bf16", compress=full))
    assert difference(single, other) < 1e-4
    assert difference(single, _trained("one", "fp32")) > 1e-5, "the moments were not rounded"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2xPP2 pipe", "DP2 ZeRO-3"])
def test_fp16_scales_move_together_on_every_mesh(name: str) -> None:
    single, other = _trained("one", "fp16"), _trained(name, "fp16")
    assert difference(single, other) < 2e-3
    assert [row["scale_log2_min"] for row in single] == [row["scale_log2_min"] for row in other]


@pytest.mark.world
def test_low_rank_is_the_same_for_tensor_shards_zero3_shards_and_a_pipeline() -> None:
    """All cut every matrix along axis 0 into two, and factor each part at half of the rank; TP x
    PP x DP does it on the stages that hold the matrices, whose norms are added. What they share,
    the factors of mean gradients and what is owed, is that of one process in plain torch."""
    compress = CompressConfig(rank=8)
    tensor, paper, three = (
        train(replace(_case(name).precise("fp32"), compress=compress))
        for name in ("TP2xDP2 ZeRO-1", "paper", "TP2xPP2xDP2 pipe")
    )
    assert difference(train_by_hand(8, STEPS), tensor) < BOUND["fp32"]
    assert difference(tensor, paper) < BOUND["fp32"]
    assert difference(tensor, three) < BOUND["fp32"]
    assert 0 < three[0]["compress_sent_bytes"] < tensor[0]["compress_sent_bytes"]
    assert tensor[0]["compress_sent_bytes"] < 0.3 * tensor[0]["compress_raw_bytes"]
    assert difference(_trained("one", "fp32"), tensor) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("name", ["TP2xPP2 pipe", "SP2xPP2 pipe", "SP2xDP2 ZeRO-3"])
def test_recomputed_activations_change_nothing(name: str, granularity: Any) -> None:
    case = _case(name).precise("fp32")
    engine = replace(case.engine, recompute=True, recompute_granularity=granularity)
    again = train(replace(case, engine=engine))
    assert difference(_trained("one", "fp32"), again) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DP2 reference", "DP2 ZeRO-2", "SP2xDP2 ZeRO-1"])
def test_factors_in_16_bits_train_as_those_in_32(name: str) -> None:
    """Half of the factors' bytes; the residual of one step, with what is rounded, goes into the
    next ones."""
    case = replace(_case(name).precise("fp32"), compress=CompressConfig(rank=8))
    wide = train(case)
    half = train(replace(case, compress=CompressConfig(rank=8, payload="bf16")))
    assert 0 < difference(wide, half) < BOUND["bf16"]
    parameters = sum(p.numel() for p in build_prior(ONE.model).parameters())
    assert half[0]["compress_sent_bytes"] < wide[0]["compress_sent_bytes"] < 4 * parameters
    sent = [row[0]["comm"]["data"]["all_reduce"]["bytes"] for row in (wide, half)]
    saved = wide[0]["compress_sent_bytes"] - half[0]["compress_sent_bytes"]
    assert sent[0] - sent[1] == saved


@pytest.mark.world
def test_the_ledger_holds_every_byte() -> None:
    parameters = sum(p.numel() for p in build_prior(ONE.model).parameters())
    comm = _trained("DP2 reference", "fp32")[-1]["comm"]
    losses, norm = 3 * 4, 8 * (1 + FIELDS)
    assert comm == {"data": {"all_reduce": {"calls": 3, "bytes": 4 * parameters + losses + norm}}}
    zero = _trained("DP2 ZeRO-2", "fp32")[-1]["comm"]
    assert zero["data"]["all_gather_into_tensor"]["bytes"] == 4 * parameters
    micro, layers = 4, ONE.model.layers
    tensor = _trained("TP2 pipe", "fp32")[-1]["comm"]["tensor"]["all_reduce"]
    embeddings, losses_, head, norm_of_both = 2, 2 * 3, 1, 1
    assert tensor["calls"] == micro * (4 * layers + embeddings + losses_ + head) + norm_of_both


@pytest.mark.world
def test_the_ledger_and_the_compressor_agree() -> None:
    case = replace(_case("DP2 reference").precise("fp32"), compress=CompressConfig(rank=8))
    row = train(case)[-1]
    losses, norm = 3 * 4, 8 * (1 + FIELDS)
    sent = row["comm"]["data"]["all_reduce"]["bytes"] - losses - norm
    assert sent == row["compress_sent_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank"),
    [("DP2 reference", 0), ("DP2 ZeRO-2", 8), ("DP2 pipe", 8), ("paper", 0), ("paper", 8)],
)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_all(
    name: str, rank: int
) -> None:
    """The skipped step leaves weights and moments unchanged; error buffers are still consumed,
    as in the paper (appendix E, step 12)."""
    case = replace(_case(name).precise("fp32"), compress=CompressConfig(rank=rank))
    broken = train(replace(case, steps=5, broken_step=2))
    assert [math.isfinite(row["grad_norm"]) for row in broken] == [True, True, False, True, True]
    if not rank:
        single = train(replace(ONE.precise("fp32"), steps=5, broken_step=2))
        kept = [0, 1, 3, 4]
        assert difference([single[i] for i in kept], [broken[i] for i in kept]) < BOUND["fp32"]
