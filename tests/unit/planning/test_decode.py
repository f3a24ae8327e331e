"""What pictures take beside a step: cores, memory and waits; and the plan of a dVAE."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cli.plan import plan
from core.errors import ConfigError
from data_pipeline.config import LoaderConfig
from models.config import ClipConfig, DVAEConfig
from models.dvae import DVAE, negative_bound
from parallel.config import EngineConfig, MeshConfig
from planning.config import settings_of
from planning.decode import (
    HAND_OVER_SECONDS,
    PICTURE_SECONDS,
    Decoding,
    buffer_bytes,
    decoding,
    sample_bytes,
)
from planning.dvae import micro_batch, search_dvae
from planning.estimate.hardware import KNOWN, hardware_of
from planning.estimate.kernels import flops
from planning.estimate.layers import noted
from planning.estimate.reserve import PROCESS, StartUp
from planning.estimate.search import weigh
from training.presets import clip_tiny, dvae_paper, dvae_tiny

PAPER = replace(dvae_paper(), mesh=MeshConfig(data=8))
H100 = hardware_of("h100")


def _decoding(step: float, **change: Any) -> Decoding:
    return decoding(PAPER, 256, step, replace(H100, **change))


def test_workers_that_keep_up_leave_the_hand_over() -> None:
    """64 pictures of 0.64 s: 100 a second and rank; 8 ranks of 96 cores."""
    row = _decoding(0.64)
    assert (row.pictures, row.workers, row.cores, row.ranks) == (64, 4, 11.0, 8)
    assert row.needed_per_second == pytest.approx(100)
    assert row.made_per_second == pytest.approx(4 / PICTURE_SECONDS)
    assert row.busy_cores == pytest.approx(800 * PICTURE_SECONDS)
    assert row.wait_seconds == HAND_OVER_SECONDS
    assert row.wait_fraction == pytest.approx(HAND_OVER_SECONDS / (0.64 + HAND_OVER_SECONDS))


def test_workers_that_do_not_keep_up_hold_the_step_up() -> None:
    row = _decoding(0.01)
    late = 64 * PICTURE_SECONDS / 4 - 0.01
    assert late > 0 and row.wait_seconds == pytest.approx(HAND_OVER_SECONDS + late)
    assert row.wait_fraction == pytest.approx(row.wait_seconds / (0.01 + row.wait_seconds))
    assert row.busy_cores == pytest.approx(8 * 4), "all workers of 8 ranks are busy"


def test_few_cores_are_shared_with_the_steps_threads() -> None:
    """A rank's own thread has a core of its share, or half of it."""
    assert _decoding(1.0, host_cores=24).cores == 2.0
    assert _decoding(1.0, host_cores=8).cores == 0.5
    assert _decoding(1.0, host_cores=24).made_per_second == pytest.approx(2 / PICTURE_SECONDS)
    cpu = decoding(replace(PAPER, mesh=MeshConfig(data=2)), 256, 1.0, hardware_of("cpu"))
    assert cpu.ranks == 2 and cpu.cores == 0.5
    assert all(gpu.host_cores >= 32 for gpu in KNOWN.values() if not gpu.cores)


def test_smaller_pictures_take_less_time() -> None:
    assert decoding(PAPER, 128, 1.0, H100).picture_seconds == pytest.approx(PICTURE_SECONDS / 4)


def test_a_plan_prints_what_it_assumes() -> None:
    text = _decoding(0.64).text()
    assert "takes 100 a second" in text and "JPEG of 512x384" in text and "0.08%" in text
    assert "302.0 MB of host memory a rank" in text
    assert set(_decoding(0.64).json()) >= {"wait_fraction", "busy_cores", "buffer_bytes"}


def test_batches_ahead_are_counted_in_host_memory() -> None:
    """4 workers: 5 batches ahead, and one in use; with 4 micro-batches a step, 2 and one."""
    sample = 4 * 3 * 256 * 256 + 8
    assert sample_bytes(PAPER) == sample and buffer_bytes(PAPER) == 6 * 64 * sample
    four = replace(PAPER, engine=EngineConfig(gradient_accumulation_steps=4))
    assert buffer_bytes(four) == 3 * 64 * sample
    one = replace(PAPER, loader=LoaderConfig(workers=1))
    assert buffer_bytes(one) == 3 * 64 * sample
    clip = replace(clip_tiny(), model=ClipConfig(pixels=8, text_length=5))
    assert sample_bytes(clip) == 4 * 3 * 64 + 8 * 5
    assert sample_bytes(settings_of("paper_12b")) == 8 * (256 + 1024)
    assert StartUp(host=3, device=0, ranks=2, loader=7).node == 2 * (PROCESS + 7)
    assert StartUp(host=9, device=0, ranks=2, loader=7).node == 2 * (PROCESS + 9)


@pytest.mark.parametrize("gpu", ["cpu", "h100"])
def test_a_prior_s_batches_count_too(gpu: str) -> None:
    """On CPUs they share the ranks' memory; on GPUs they are in the node's."""
    settings = replace(settings_of("tiny"), mesh=MeshConfig(), engine=EngineConfig())
    few, many = (
        weigh(replace(settings, loader=LoaderConfig(workers=n)), 1, hardware_of(gpu))
        for n in (1, 9)
    )
    added = buffer_bytes(replace(settings, loader=LoaderConfig(workers=9)))
    added -= buffer_bytes(replace(settings, loader=LoaderConfig(workers=1)))
    assert added == 8 * 32 * 8 * (24 + 64)
    assert many.total - few.total == (added if gpu == "cpu" else 0)
    if many.start and few.start:
        assert many.start.loader - few.start.loader == added


SMALL = DVAEConfig(pixels=16, width=8, groups=2, codebook=16, code_width=8)


def test_operations_and_saved_bytes_are_those_of_a_real_step() -> None:
    """torch's own counter, on a real forward and backward pass."""
    dvae, saved = DVAE(SMALL), {}
    pixels, keys = torch.rand(3, 3, 16, 16), torch.tensor([1, 2, 3])
    tau = torch.tensor(1.0)
    outside = [*dvae.parameters(), pixels, keys, tau]
    with FlopCounterMode(display=False) as counted:
        with noted(saved, "all", outside):
            terms, _ = dvae(pixels, tau, keys)
            loss = negative_bound(terms, 6.6, SMALL)
        loss.backward()
    mine = micro_batch(SMALL, 3, "fp32")
    assert flops(mine.work) == counted.get_total_flops()
    assert mine.saved == pytest.approx(saved["all"], rel=0.01)
    assert micro_batch(SMALL, 6, "fp32").saved == pytest.approx(2 * mine.saved, rel=0.01)


def test_16_bits_save_memory_and_leave_the_codes_in_32() -> None:
    half, full = micro_batch(SMALL, 2, "bf16"), micro_batch(SMALL, 2, "fp32")
    assert half.saved < full.saved and flops(half.work) == flops(full.work)
    wide = [k for k in half.work if k.rows and not k.half]
    assert {k.inner for k in wide} == {16} and len(wide) == 6, "both, with two gradients each"
    assert all(not k.half for k in full.work if k.rows)


@pytest.mark.seconds
def test_a_dvae_is_planned_with_a_micro_batch_that_fits() -> None:
    loop = replace(dvae_tiny().loop, global_batch_size=64)
    settings = replace(dvae_tiny(), model=SMALL, loop=loop)
    result = search_dvae(settings, 8, H100)
    assert {row.candidate.settings.engine.name for row in result.timed} == {
        "reference",
        "deepspeed_zero",
    }
    best = result.timed[0]
    assert best.candidate.settings.engine.gradient_accumulation_steps == 1
    assert sum(best.estimate.parts.values()) == pytest.approx(best.estimate.seconds)
    assert best.estimate.decoding is not None
    assert best.estimate.parts["data"] == best.estimate.decoding.wait_seconds
    whole = best.candidate.bytes_["activations"]
    tight = H100.context + best.candidate.total - whole // 2
    smaller = search_dvae(settings, 8, replace(H100, memory=tight))
    rows = [row.candidate.settings.engine.gradient_accumulation_steps for row in smaller.timed]
    assert rows and min(rows) > 1
    none = search_dvae(settings, 8, replace(H100, memory=H100.context + 1e6))
    assert not none.timed and "1.0 MB of h100 can be used" in none.rejected[0].why
    assert "3 data-parallel ranks" in search_dvae(settings, 3, H100).rejected[0].why
    slow = search_dvae(settings, 8, hardware_of("v100")).timed[0].candidate.settings.engine
    assert slow.precision == "fp32", "without bf16, and fp16 needs scales that a dVAE lacks"


@pytest.mark.seconds
def test_the_papers_dvae_on_8_gpus_waits_for_under_a_hundredth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.svg"
    plan(["paper_dvae", "--world=8", "--json", f"--picture={picture}"])
    text = capsys.readouterr().out
    body = json.loads(text.splitlines()[-1])
    assert body["fits"] and body["parameters"] == 97_616_006
    best = body["best"]
    assert best["mesh"]["data"] == 8 and best["micro_batch"] * 8 <= 512
    pictures = best["pictures"]
    assert pictures["wait_fraction"] < 0.01
    assert pictures["needed_per_second"] < pictures["made_per_second"]
    assert best["start_up"]["loader"] == pictures["buffer_bytes"]
    assert "4 loader.workers make" in text and picture.read_text().startswith("<?xml")


def test_a_dvae_s_batch_must_be_dealt_to_its_lanes() -> None:
    with pytest.raises(ConfigError, match=r"order.lanes=512; try 512"):
        plan(["paper_dvae", "--batch=100"])
    with pytest.raises(
        ConfigError, match=r"no preset 'paper_clip' of a prior or dVAE; .*paper_dvae"
    ):
        plan(["paper_clip"])
