"""Guards: when an update is a spike, and that their history resumes exactly."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.formats.tokens import TokenRecord
from data_pipeline.streaming.state import StreamState
from parallel.control import FIELDS, Vote, decide
from parallel.device import CPU
from parallel.engines.protocol import StepResult
from parallel.mesh import Mesh
from parallel.replicas import different, fingerprint
from training.config import GuardConfig
from training.recovery.guards import Guard
from training.recovery.rewind import Recovery, checkpoints_of_capsules


def _fed(guard: Guard, count: int, seed: int = 0) -> Guard:
    draws = random.Random(seed)
    for _ in range(count):
        assert guard.judge(math.exp(draws.gauss(0, 0.3)), draws.gauss(3, 0.1)) == ""
    return guard


def test_nothing_is_a_spike_before_half_of_the_window() -> None:
    guard = _fed(Guard(GuardConfig(window=64)), 31)
    assert guard.judge(1e6, 1e6) == ""
    guard = _fed(Guard(GuardConfig(window=64)), 32)
    assert "loss 1e+06 is" in guard.judge(1.0, 1e6)
    assert "log of the gradient norm" in guard.judge(1e6, 3.0)


def test_six_deviations_up_are_a_spike_and_down_are_none() -> None:
    guard = _fed(Guard(GuardConfig()), 128)
    assert guard.judge(1.0, 3.5) == ""
    assert guard.judge(1.0, 3.8) != ""
    assert guard.judge(1e-9, 0.1) == ""
    assert Guard(GuardConfig(sigma_factor=0)).judge(1e9, 1e9) == ""


def test_a_flat_curve_makes_no_spike_of_noise() -> None:
    guard = Guard(GuardConfig(window=16))
    for _ in range(16):
        guard.judge(1.0, 2.0)
    assert guard.judge(1.5, 2.1) == ""
    assert guard.judge(1.0, 2.2) != ""


def test_a_skipped_update_leaves_the_history_alone_and_it_resumes() -> None:
    guard = _fed(Guard(GuardConfig(window=32)), 40)
    before = json.dumps(guard.state())
    assert guard.judge(1.0, 99.0)
    assert json.dumps(guard.state()) == before
    other = Guard(GuardConfig(window=32))
    other.load(json.loads(before))
    assert other.state() == guard.state() and len(other.state()["losses"]) == 32


def test_what_all_ranks_decide() -> None:
    judge = lambda norm, loss: "too much" if loss > 5 else ""  # noqa: E731
    vote = Vote(losses=[{"loss": torch.tensor(2.0)}, {"loss": torch.tensor(4.0)}])
    share = vote.share(CPU)
    assert share.tolist() == [6.0, 2.0, 0.0] and len(share) == FIELDS
    kept = decide(1.5, share, judge)
    assert kept.clipped_by == 1.5 and (kept.loss, kept.skipped) == (3.0, "")
    left = decide(1.5, torch.tensor([60.0, 2.0, 1.0]), judge)
    assert left.clipped_by == math.inf
    assert left.stopping and left.skipped == "too much" and left.norm == 1.5
    broken = decide(math.inf, share, judge)
    assert broken.clipped_by == math.inf and "not finite" in broken.skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_flipped_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype)
    before = fingerprint([weight, weight])
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for place in range(8 * dtype.itemsize - 1):
        bits.view(-1)[9] ^= 1 << place
        assert not fingerprint([weight, weight]).equal(before)
        bits.view(-1)[9] ^= 1 << place


def test_replicas_that_differ_from_the_majority_of_their_group_are_named() -> None:
    alike = [{"data": "a", "tensor": "x"}, {"data": "a", "tensor": "y"}]
    assert different([{}, {}]) == [] == different([*alike[:1] * 3, {"data": "a"}])
    assert different([{"data": "a"}, {"data": "b"}, {"data": "a"}]) == [1]
    assert different([{"data": "a"}, {"data": "b"}]) == [0, 1], "there is no majority of two"
    assert different([*alike, {"other": "b"}, {"other": "c"}, {"other": "c"}]) == [0, 1, 2]


def test_capsules_are_few_and_name_the_checkpoints_to_keep(tmp_path: Path) -> None:
    recovery = Recovery(GuardConfig(rewind_after=1000), Mesh(), tmp_path)
    record = TokenRecord(id=7, image=np.zeros(4, np.uint16), text=np.ones(2, np.uint16))
    result = StepResult(losses={"loss": math.nan}, grad_norm=math.inf, skipped="planted")
    state = StreamState(
        fingerprint="", seed=0, batch=1, lanes=1, window=1, version=1, epoch=0, step=1
    )
    for step in range(1, 31):
        facts = {"step": step, "checkpoint": step // 10 * 10 or None}
        assert not recovery.must_rewind(result, [record], state, facts)
        kept = {int(path.stem[5:]) for path in (tmp_path / "capsules").iterdir()}
        assert kept == set(range(max(1, step - 19), step + 1))
    assert checkpoints_of_capsules(tmp_path) == {20, 30}
    (tmp_path / "capsules" / "step-30.json").write_text("garbage")
    assert checkpoints_of_capsules(tmp_path) == {10, 20}
