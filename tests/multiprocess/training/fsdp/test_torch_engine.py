"""Engine torch against one process and other engines, in every precision, also when it skips."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from bench.parity import BOUND, CASES, ONE, STEPS, Case, difference, train
from parallel.config import CompressConfig, EngineConfig, MeshConfig
from tests.multiprocess.training.by_hand import train_by_hand
from tests.multiprocess.training.fsdp.poisoned import Report, train_poisoned

MESHES = ["DP2 torch", "DP4 torch", "TP2xDP2 torch", "SP2xDP2 torch", "2 nodes of 2 torch"]
RANK = CompressConfig(rank=8)
LAST = 6
"""Steps of a run with a planted fault in its third one."""


def _case(name: str, precision: str = "fp32", rank: int = 0) -> Case:
    case = next(case for case in CASES if case.name.startswith(name)).precise(precision)
    return replace(case, compress=CompressConfig(rank=rank))


@cache
def _trained(name: str, precision: str, rank: int = 0) -> list[dict[str, float]]:
    return train(_case(name, precision, rank))


@cache
def _same_batches(precision: str) -> list[dict[str, float]]:
    """Plain torch with the micro-batches of 4 replicas, so that it rounds the same gradients."""
    accumulate = _case("DP4 torch").engine.gradient_accumulation_steps
    engine = EngineConfig(gradient_accumulation_steps=accumulate)
    case = Case(name="plain", mesh=MeshConfig(data=4), engine=engine)
    return train(case.precise(precision))


@cache
def _one(precision: str) -> list[dict[str, float]]:
    return train(ONE.precise(precision))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_it_trains_as_one_process_does(name: str) -> None:
    single, other = _one("fp32"), _trained(name, "fp32")
    assert max(row["grad_norm"] for row in single) > 1.0, "clipping never acted"
    assert difference(single, other) < BOUND["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["DP4 torch", "2 nodes of 2 torch"])
def test_16_bits_round_what_plain_torch_rounds(name: str, precision: str) -> None:
    """1e-5 while the weights are equal; from the second step on last bits of weights are rounded
    otherwise, on any mesh."""
    plain, other = _same_batches(precision), _trained(name, precision)
    assert difference(plain[:1], other[:1]) < 1e-5
    assert difference(plain, other) < 2e-3
    assert plain[-1].get("scale_log2_min") == other[-1].get("scale_log2_min")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("bf16", BOUND["bf16"]), ("fp16", 2e-3)])
def test_tensor_ranks_in_16_bits(precision: str, bound: float) -> None:
    assert difference(_one(precision), _trained("TP2xDP2 torch", precision)) < bound


@pytest.mark.slow
def test_compressed_it_is_the_papers_layout_and_training_by_hand() -> None:
    overlapped = _trained("2 nodes of 2 torch", "fp32", 8)
    assert difference(train_by_hand(8, STEPS), overlapped) < BOUND["fp32"]
    assert difference(_trained("paper", "fp32", 8), overlapped) < BOUND["fp32"]
    assert difference(_one("fp32"), overlapped) > 1e-2
    full = _trained("2 nodes of 2 torch", "fp32", 10**6)
    assert difference(_trained("2 nodes of 2 torch", "fp32"), full) < 1e-4
    assert all(row["compress_sent_bytes"] > row["compress_raw_bytes"] > 0 for row in full)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_adapters_recompute_and_small_moments_change_as_little(warm: bool) -> None:
    """Every option that other engines have: recompute, 16-bit moments, a warm Q."""
    case, paper = (_case(name, "fp32", 8) for name in ("2 nodes of 2 torch", "paper"))
    options = {"moments": "bf16", "compress": CompressConfig(rank=8, warm_start=warm)}
    again = replace(case.engine, recompute=True)
    one = train(replace(case, engine=again, **options))  # type: ignore[arg-type]
    other = train(replace(paper, **options))  # type: ignore[arg-type]
    assert difference(one, other) < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("poisoned")


def _pair(folder: Path, precision: str = "fp32", **plant: float) -> tuple[Report, Report]:
    """The paper's layout on DeepSpeed's stack and on torch's, with the same plant."""
    made = []
    for name in ("paper", "2 nodes of 2 torch"):
        case = replace(_case(name, precision, 8), steps=LAST)
        out = folder / f"{name} {precision} {plant}".replace(" ", "_")
        made.append(train_poisoned(case, out, **plant))  # type: ignore[arg-type]
    return made[0], made[1]


def _equal_buffers(one: Report, other: Report, bound: float) -> None:
    """Rows, and the error buffers of every rank."""
    rows = [
        [row for row in report[0] if math.isfinite(row["grad_norm"])] for report in (one, other)
    ]
    assert difference(*rows) < bound
    assert [row["skipped"] for row in one[0]] == [row["skipped"] for row in other[0]]
    assert one[1].keys() == other[1].keys() and len(one[1]) == 4 * 30
    for name, buffer in one[1].items():
        assert float((buffer - other[1][name]).norm() / buffer.norm()) < 10 * bound, name


@pytest.mark.slow
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_first_block_alone_is_not_finite_on_one_rank(poison: float, folder: Path) -> None:
    """Its gradients come last: all other blocks have been reduced by then."""
    zero, mine = _pair(folder, poison=poison)
    assert [bool(row["skipped"]) for row in mine[0]] == [False, False, True, False, False, False]
    _equal_buffers(zero, mine, 1e-5)
    _, fine = train_poisoned(
        replace(_case("2 nodes of 2 torch", "fp32", 8), steps=LAST), folder / f"fine {poison}"
    )
    apart = [float((fine[name] - buffer).norm()) for name, buffer in mine[1].items()]
    assert min(apart) > 1e-6, "the plant changed nothing"


@pytest.mark.slow
def test_a_guard_skips_and_the_error_buffers_go_on(folder: Path) -> None:
    zero, mine = _pair(folder, skipped=2)
    assert [row["skipped"] for row in mine[0]] == ["", "", "planted", "", "", ""]
    _equal_buffers(zero, mine, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 8])
def test_a_branch_that_overflows_on_one_rank_lowers_its_scale_on_all(
    rank: int, folder: Path
) -> None:
    """fp16: 1e6 is infinite; the branch's scale is divided, the others grow, all ranks skip."""
    reports = []
    for name in ("paper", "2 nodes of 2 torch"):
        case = replace(_case(name, "fp16", rank), steps=LAST)
        reports.append(train_poisoned(case, folder / f"{name} {rank} overflow", poison=1e6))
    zero, mine = reports
    assert [bool(row["skipped"]) for row in mine[0]] == [False, False, True, False, False, False]
    assert mine[0][-1]["scale_log2_min"] < 13 < mine[0][-1]["scale_log2_max"]
    for field in ("scale_log2_min", "scale_log2_max", "skipped"):
        assert [row[field] for row in zero[0]] == [row[field] for row in mine[0]]
    finite = [[row for row in rows if not row["skipped"]] for rows, _ in reports]
    assert difference(finite[0][:2], finite[1][:2]) < 1e-5
    assert difference(*finite) < 2e-3


@pytest.mark.slow
def test_tensor_ranks_skip_together(folder: Path) -> None:
    case = replace(_case("TP2xDP2 torch"), steps=LAST)
    rows, _ = train_poisoned(case, folder / "tensor", poison=math.nan)
    assert [bool(row["skipped"]) for row in rows] == [False, False, True, False, False, False]
    assert all(math.isfinite(row["loss"]) for row in rows)
