"""Accounting of step time: owners of each moment, the files, the warnings."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from bench.profile import BLOCK, PAIRS, interval, with_first
from models.config import ClipConfig, PriorConfig
from models.counts import prior_flops
from models.dvae import DVAE
from parallel.config import EngineConfig, MeshConfig
from parallel.ledger import recorded
from parallel.mesh import Group, Mesh
from parallel.world import World
from tests.harness import tapir
from training.presets import dvae_tiny, prior_tiny
from training.profiling.accounts import Accounts
from training.profiling.advice import accumulate_to_halve, warnings_for
from training.profiling.categories import (
    BUBBLE,
    CATEGORIES,
    COMPUTE,
    DATA,
    DATA_WAIT,
    OPTIMIZER,
    OTHER,
    PIPELINE,
    TENSOR,
    VALIDATION,
    ProfileConfig,
)
from training.profiling.clock import HostClock, Operation, Owner, Stretch, Timeline
from training.profiling.figures import over_peers, slowest, time_of
from training.profiling.flops import model_flops
from training.profiling.heat import as_svg, as_text, heat_of
from training.profiling.ring import HEADER, RECORDS, Ring, read_rings

ALL_REDUCE = Operation("data", "all_reduce", 8)


class _Ticks:
    """A clock in which every interval takes one second."""

    def __init__(self, account: Callable[[Owner, float], None]) -> None:
        self._account = account

    def mark(self, owner: Owner) -> None:
        self._account(owner, 1.0)

    def cut(self, then: Callable[[], None]) -> None:
        then()


def _named(seconds: list[float]) -> dict[str, float]:
    return {name: value for name, value in zip(CATEGORIES, seconds, strict=True) if value}


def test_each_moment_belongs_to_the_innermost_owner() -> None:
    accounts = Accounts(stages=1)
    line = Timeline(_Ticks(accounts.add))
    with Stretch(line, COMPUTE), Stretch(line, ALL_REDUCE), Stretch(line, OPTIMIZER):
        pass
    with Stretch(line, VALIDATION), Stretch(line, ALL_REDUCE):
        pass
    line.cut(lambda: None)
    accounted = _named(accounts.take_step())
    assert accounted == {COMPUTE: 2, DATA: 2, OPTIMIZER: 1, VALIDATION: 3, OTHER: 3}
    assert accounts.take_row() == (
        [accounted.get(name, 0) for name in CATEGORIES],
        {"data": {"all_reduce": 2}},
    )
    assert _named(accounts.take_step()) == {}


def test_nothing_of_the_real_clock_is_lost() -> None:
    accounts = Accounts(stages=1)
    began = time.perf_counter()
    line = Timeline(HostClock(accounts.add))
    for _ in range(100):
        with Stretch(line, COMPUTE), Stretch(line, ALL_REDUCE):
            pass
    before = time.perf_counter()
    line.cut(lambda: None)
    assert before - began <= sum(accounts.take_step()) + 1e-3 <= time.perf_counter() - began + 2e-3


def test_waits_between_stages_are_bubble_beyond_the_shortest() -> None:
    accounts = Accounts(stages=2)
    receive, norm = Operation("pipeline", "recv", 64), Operation("world", "all_reduce", 8)
    for seconds in (0.5, 0.1, 0.4):
        accounts.add(receive, seconds)
    accounts.add(Operation("pipeline", "recv", 32), 0.2)
    accounts.add(norm, 0.3)
    accounts.add(norm, 0.7)
    accounts.add(Operation("tensor", "all_reduce", 8), 1.0)
    accounted = _named(accounts.take_step())
    assert accounted == pytest.approx({PIPELINE: 0.7 + 0.2 + 0.6, BUBBLE: 0.3 + 0.4, TENSOR: 1.0})


def test_the_wait_for_a_handle_counts_as_its_operation(tmp_path: Path) -> None:
    """A real process group of one rank; nested operations are not timed twice."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    seen: list[tuple[str, str, int]] = []

    def timer(*place: Any) -> AbstractContextManager[None]:
        seen.append(place)
        return nullcontext()

    try:
        world = World(group=dist.group.WORLD)
        with (
            recorded(Mesh(world=world, data=Group(world.group))) as ledger,
            ledger.counted() as traffic,
        ):
            ledger.timer = timer
            value, out = torch.ones(2), torch.zeros(2)
            works = [
                dist.all_reduce(value, async_op=True),
                dist.all_gather_into_tensor(out, value, async_op=True),
            ]
            dist.all_reduce(torch.ones(4))
            for work in reversed(works):
                work.wait()
                work.wait()
            dist.barrier()
            reduced, gathered = ("data", "all_reduce", 8), ("data", "all_gather_into_tensor", 8)
            assert seen == [reduced, gathered, ("data", "all_reduce", 16), gathered, reduced]
            counts = traffic.counts["data"]
            assert [row["calls"] for row in counts.values()] == [2, 1]
    finally:
        dist.destroy_process_group()


def test_a_ring_keeps_the_last_steps(tmp_path: Path) -> None:
    ring = Ring(tmp_path, 0, 2, 0, 0)
    for step in range(1, RECORDS + 11):
        ring.add(step, [float(step)] * len(CATEGORIES))
    ring.close()
    (rows,) = read_rings(tmp_path)
    assert (rows.steps[0], rows.steps[-1], len(rows.steps)) == (11, RECORDS + 10, RECORDS)
    assert (rows.seconds == rows.steps[:, None]).all()


def test_a_resumed_ring_forgets_what_came_after(tmp_path: Path) -> None:
    for rank in (0, 1):
        ring = Ring(tmp_path, rank, 2, 0, 0)
        for step in (1, 2, 3):
            ring.add(step, [1.0] * len(CATEGORIES))
        ring.close()
    Ring(tmp_path, 0, 2, 0, 2).close()
    assert [list(ring.steps) for ring in read_rings(tmp_path)] == [[1, 2], [1, 2, 3]]
    Ring(tmp_path, 0, 1, 0, 2).close()
    assert [(ring.rank, len(ring.steps)) for ring in read_rings(tmp_path)] == [(0, 0)]
    path = tmp_path / "profile" / "rank-0.bin"
    path.write_bytes(path.read_bytes()[: HEADER // 2])
    assert read_rings(tmp_path) == []


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    ring = Ring(tmp_path, 0, 1, 0, 0)
    ring.add(1, [1.0] * len(CATEGORIES))
    ring.close()
    assert (tmp_path / "profile").read_text().startswith("a file")
    assert read_rings(tmp_path) == []


def test_rows_name_the_rank_that_took_most() -> None:
    ranks = [
        {"stage": 0, "busy": 1.0, "seconds": [1.0] * len(CATEGORIES)},
        {"stage": 1, "busy": 3.0, "seconds": [3.0] * len(CATEGORIES)},
        {"stage": 1, "busy": 6.0, "seconds": [2.0] * len(CATEGORIES)},
    ]
    assert slowest(ranks) == {"slowest_rank": 2, "slowest_ratio": 2.0}
    assert slowest([ranks[0], {**ranks[0], "busy": 2.5}])["slowest_ratio"] == 2.5
    row = time_of(ranks)
    assert (row["time"][COMPUTE], row["time_max"][COMPUTE]) == (2.0, [3.0, 1])
    assert slowest(ranks[:1]) == {}


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("micro", [1, 4, 16])
def test_the_advised_accumulate_halves_the_bubble(stages: int, micro: int) -> None:
    settings = replace(
        prior_tiny(),
        mesh=MeshConfig(pipeline=stages),
        engine=EngineConfig(name="deepspeed_pipe", gradient_accumulation_steps=micro),
        loop=replace(prior_tiny().loop, global_batch_size=720720),
    )

    def share(count: int) -> float:
        return (stages - 1) / (count + stages - 1)

    advised = accumulate_to_halve(settings)
    assert 720720 % advised == 0
    assert share(advised) <= share(micro) / 2 < share(2 * micro + stages - 2)


def test_warnings_come_with_what_to_do() -> None:
    shares = dict.fromkeys(CATEGORIES, 0.0)
    settings = prior_tiny()
    assert warnings_for(settings, shares, {0: 1.0, 1: 1.0}) == []
    bad = {**shares, DATA_WAIT: 0.2, BUBBLE: 0.3, "checkpoint": 0.1, OTHER: 0.15}
    texts = warnings_for(settings, bad, {0: 1.0, 1: 1.8, 3: 1.0})
    assert len(texts) == 5 and texts[0].startswith("rank 1 takes 1.80 times")
    assert "--engine.gradient-accumulation-steps" in texts[1] and "--loader.prefetch 32" in texts[2]
    assert f"--checkpoint.every {2 * settings.checkpoint.every}" in texts[4]


def test_the_heat_map_shows_the_slow_rank() -> None:
    ratios = np.ones((3, 40))
    ratios[1, 20:] = 1.7
    heat = heat_of(ratios, np.array([0, 2, 3]), np.arange(1, 41), columns=4, most_ranks=2)
    assert heat.ranks == [0, 2] and heat.first == [1, 11, 21, 31]
    assert "rank     2 ..##  1.35" in as_text(heat).plain
    assert as_svg(heat).count("<title>rank 2, from step") == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_peers_are_the_other_ranks_of_the_stage(ranks: int) -> None:
    work = np.random.default_rng(ranks).integers(1, 5, (ranks, 6)).astype(float)
    stages = np.array([0] * ranks + [1])
    ratios = over_peers(np.vstack([work, work[:1]]), stages)
    assert (ratios[-1] == 1).all()
    for rank in range(ranks):
        others = np.delete(work, rank, 0)
        expected = work[rank] / np.median(others, 0) if ranks > 1 else np.ones(6)
        assert ratios[rank] == pytest.approx(expected)


def test_flops_are_those_of_the_real_models() -> None:
    config = dvae_tiny().model
    with FlopCounterMode(display=False) as counter:
        terms, _ = DVAE(config)(
            torch.rand(1, 3, config.pixels, config.pixels), torch.tensor(1.0), torch.tensor([1])
        )
        (terms.penalty + terms.log_likelihood).backward()
    assert model_flops(config) == counter.get_total_flops()
    prior = PriorConfig(text_vocabulary=300, image_vocabulary=64, grid=8)
    assert model_flops(prior) == prior_flops(prior)
    small, large = (ClipConfig(text_vocabulary=300, layers=layers) for layers in (1, 2))
    assert model_flops(small) < model_flops(large) < 2 * model_flops(small)


def test_the_cost_of_pairs_has_an_interval() -> None:
    firsts = np.array([with_first(i) for i in range(PAIRS)]).reshape(-1, 2, BLOCK)
    assert (firsts[:, 0] != firsts[:, 1]).all() and 0.3 < firsts[:, 0].mean() < 0.7
    mean, low, high = interval([(1.01, 1.0), (1.03, 1.0), (0.99, 1.0), (1.01, 1.0)])
    assert mean == pytest.approx(1.0)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(196 * 0.0163299 / 2, rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "20"},
        {"steps": "5:3"},
        {"steps": "0:3"},
        {"ranks": "0,x"},
        {"ranks": "-1"},
        {"peak_tflops": -1.0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    assert len(ProfileConfig(**wrong).problems()) == 1  # type: ignore[arg-type]
    assert ProfileConfig(steps="20:25", ranks="all").problems() == []


def test_tensorboard_reads_what_a_run_wrote(dvae: Path) -> None:
    events = EventAccumulator(str(dvae / "tensorboard"), {"histograms": 0}).Reload()
    expected = {"train/loss", "train/memory_bytes", "train/data_wait_fraction", "time/compute"}
    assert expected <= set(events.Tags()["scalars"])
    assert events.Scalars("time/compute")[-1].value > 0
    codes = events.Histograms("codebook")[-1].histogram_value
    assert codes.num > 0 and codes.max < dvae_tiny().model.codebook
    assert "reconstructions" in events.Tags()["images"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"codebook": 64' in text


def test_a_profile_of_one_rank(dvae: Path, tmp_path: Path) -> None:
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    plan.write_text(json.dumps({"time": {COMPUTE: 0.25}}))
    text = tapir("profile", str(dvae), "--json", f"--plan={plan}", f"--html={page}", "--last=4")
    report = next(json.loads(line) for line in text.splitlines() if line.startswith("{"))
    assert (report["steps"], report["last_step"], report["ranks"]) == (4, 6, 1)
    assert sum(row["share"] for row in report["time"].values()) == pytest.approx(1)
    assert report["time"][VALIDATION]["mean"] > 0 and report["time"]["checkpoint"]["mean"] > 0
    assert report["mfu"] == pytest.approx(report["model_tflops"] / report["peak_tflops"])
    assert report["peak_source"] == "of the run"
    assert "250.00" in text and "predicted" in text and "<svg" in page.read_text()
