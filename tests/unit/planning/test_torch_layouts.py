"""Engine torch in a plan: schedules as torch orders them, layouts, bytes and what is assumed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from models.config import LoraConfig
from parallel.pipelines.schedules import Schedule, whole_rounds
from planning.config import settings_of
from planning.estimate.hardware import hardware_of
from planning.estimate.overlapped.layout import IN_BUILD, Layout, layouts
from planning.estimate.overlapped.memory import torch_bytes
from planning.estimate.overlapped.prior import estimate_torch, factor_work, rough_torch
from planning.estimate.overlapped.schedules import order, pipelined
from planning.estimate.overlapped.search import search_torch
from planning.estimate.search import SearchResult
from planning.report import plan_json
from planning.tails import tails

H100 = hardware_of("h100")
PAPER = settings_of("paper_12b")
"""1,024 samples a step."""
SMALL = settings_of("paper_2_8b")
KINDS = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "backward",
    "BACKWARD_WEIGHT": "weights",
}
CLASSES = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero-bubble": torch_schedules.ScheduleInterleavedZeroBubble,
}


@pytest.mark.parametrize("schedule", CLASSES)
@pytest.mark.parametrize(
    ("stages", "micro", "chunks"), [(2, 4, 2), (4, 8, 1), (4, 8, 2), (4, 4, 2)]
)
def test_schedules_are_those_of_torch(
    schedule: Schedule, stages: int, micro: int, chunks: int
) -> None:
    for stage in range(stages):
        rounds = max(1, micro // stages)
        fields = {
            "pp_group_size": stages,
            "n_local_stages": chunks,
            "microbatches_per_round": micro // rounds,
            "number_of_rounds": rounds,
            "_n_microbatches": micro,
            "rank": stage,
        }
        actions = CLASSES[schedule]._calculate_single_rank_operations(
            SimpleNamespace(**fields), stage
        )
        expected = [
            (KINDS[a.computation_type.name], a.stage_index // stages, a.microbatch_index)
            for a in actions
            if a is not None
        ]
        ours = [(p.kind, p.chunk, p.micro) for p in order(schedule, stage, stages, micro, chunks)]
        assert ours == expected


@pytest.mark.parametrize(
    ("schedule", "chunks", "bubble"),
    [("1f1b", 1, 3 * 3.0), ("interleaved", 2, 3 * 1.5), ("zero-bubble", 1, 3 * 1.0)],
)
def test_bubbles_are_those_of_the_papers(schedule: Schedule, chunks: int, bubble: float) -> None:
    """4 stages, a forward pass of 1 s and a backward pass of 2 s: (P-1)(F+B), /chunks, (P-1)F."""
    for micro in (8, 64):
        played = pipelined(schedule, [1.0] * 4, [2.0] * 4, micro, chunks=chunks)
        assert played.busy == pytest.approx(3.0 * micro)
        assert played.seconds == pytest.approx(3.0 * micro + bubble)
    slow = pipelined(schedule, [1.0] * 4, [2.0] * 4, 8, chunks=chunks, transfer=0.1)
    assert slow.seconds > 24.0 + bubble


def test_rounds_are_whole() -> None:
    assert [m for m in range(1, 13) if whole_rounds(m, 4)] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]


def test_zero_bubble_is_only_asked_for_what_it_can_do() -> None:
    """Eager blocks without recompute: the rest is no candidate."""
    every = [layout for group in layouts(PAPER, 1024, H100) for layout in group]
    zero = [layout for layout in every if layout.schedule == "zero-bubble"]
    assert zero and all(layout.eager and layout.recompute == "none" for layout in zero)
    assert all(layout.world == 1024 for layout in every)
    assert {0, 897} <= {layout.rank for layout in every if layout.nodes > 1}
    assert not any(layout.rank for layout in every if layout.nodes == 1 or layout.tensor > 1)


@pytest.fixture(scope="module")
def shard() -> Layout:
    return Layout(replicas=1024, shards=8, samples=1)


def test_bytes_of_shards(shard: Layout) -> None:
    parameters = 12_292_587_008 // 8
    sizes = torch_bytes(PAPER, shard, H100)
    assert sizes["parameters"] == pytest.approx(2 * parameters, rel=1e-6)
    assert sizes["optimizer"] == pytest.approx(12 * parameters, rel=1e-6)
    assert sizes["compression"] == 0
    assert torch_bytes(PAPER, replace(shard, rank=897), H100)["compression"] > 0
    more = replace(shard, samples=4, micro=4)
    fewer = replace(more, recompute="full")
    assert (
        torch_bytes(PAPER, more, H100)["activations"]
        > torch_bytes(PAPER, fewer, H100)["activations"]
        > sizes["activations"] / 4
    )


def test_what_is_assumed_makes_a_step_faster(shard: Layout) -> None:
    step = estimate_torch(PAPER, shard, H100)
    assert 0.1 < step.bare_mfu < step.mfu < 0.5
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.parts["slowed"] > 0 and step.parts["exposed"] > 0
    slow = replace(H100, network=H100.network / 16)
    assert estimate_torch(PAPER, shard, slow).seconds > step.seconds
    packed = replace(shard, rank=897)
    assert estimate_torch(PAPER, packed, slow).seconds < estimate_torch(PAPER, shard, slow).seconds
    assert estimate_torch(PAPER, packed, H100).parts["factors"] > 0


def test_rough_and_played_steps_agree() -> None:
    for group in list(layouts(SMALL, 64, H100))[::9]:
        for layout in group[:2]:
            played = estimate_torch(SMALL, layout, H100).seconds
            assert rough_torch(SMALL, layout, H100) == pytest.approx(played, rel=0.35)


def test_factor_work_counts_three_products() -> None:
    matmuls = [k for k in factor_work(496, 3968, 112) if k.rows and k.half]
    assert [k.flops for k in matmuls] == [2.0 * 496 * 3968 * 112] * 3


def test_the_papers_batch_and_16_times_of_it() -> None:
    """What issue 30 wants of 12B on 1,024 GPUs."""
    cases = [("h100", 1024, 0.30), ("h100", 16 * 1024, 0.45), ("v100-16gb", 1024, 0.22)]
    for gpu, batch, least in cases:
        hardware = hardware_of(gpu)
        best = search_torch(settings_of("paper_12b", batch), 1024, hardware)[0]
        assert best.estimate.mfu >= least and best.total <= hardware.usable


def test_engine_torch_is_shown_apart_until_it_is_in_the_build() -> None:
    rows = search_torch(SMALL, 64, H100)
    body: dict[str, Any] = plan_json(SearchResult(timed=[], rejected=[]), 1, 1, H100, rows)
    assert body["torch"]["in_build"] is IN_BUILD and body["torch"]["assumed"]
    assert not any("flags" in row for row in body["torch"]["rows"])
    times = [row["step_seconds"] for row in body["torch"]["rows"]]
    assert times == sorted(times)
    assert not search_torch(SMALL, 1, H100) and not search_torch(SMALL, 4, hardware_of("cpu"))
    adapted = replace(SMALL, lora=LoraConfig(rank=4))
    assert not search_torch(adapted, 64, H100)


def test_a_run_does_little_beside_its_steps() -> None:
    beside = tails(PAPER, 0.3, 245_100_000_000, H100)
    assert beside.validation == pytest.approx(0.3 / 3 / 5000)
    assert beside.checkpoints == pytest.approx(245.1e9 / 1024 / 20e9 / 500)
    assert 0 < beside.share < 0.01 and f"{beside.share:.2%}" in beside.text()
