"""Pins of what two ranks, and two epochs, must agree on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import ConfigError
from data_pipeline.config import OrderConfig
from data_pipeline.streaming.order import LaneOrder
from generation.config import DrawSettings
from generation.sampling import draw as choosing
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.pipeline import Pipeline, Shared
from generation.sampling.sampler import Sampler
from parallel.compress.advisor import measure_link
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.device import CPU
from parallel.mesh import Group
from parallel.world import World
from tests.forked import forked_ranks
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like
from training.tasks.clip import _GatherRows


class _Noted(Pipeline):
    """Records how many codes it shares."""

    def share(self, codes: Tensor) -> Shared:
        self.sizes = {*getattr(self, "sizes", ()), len(codes)}
        return super().share(codes)


def test_two_stages_draw_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all codes are near ties here: both stages share the codes of a batch (of a lane of
    three), then draw them again and share them one by one.
    """
    monkeypatch.setattr(choosing, "CLOSE", 0.5)
    layers, text = trained_like(), prior_batch()["text"]
    names, keys = list(layers), cast(Any, [[(1, c, i) for i in range(2)] for c in "abc"])

    def drawn(part: LocalPrior) -> Any:
        with torch.device("meta"):  # all tensors are on the decoder's device
            (batch,) = Sampler(Decoder(part)).draw(text, keys, DrawSettings())
        return batch.codes.tolist()

    def stage(rank: int) -> Any:
        mine = {n: layers[n] for n in (names[:2] if rank == 0 else names[2:])}
        neighbours = _Noted(Group(dist.group.WORLD, rank, 2))
        codes = drawn(LocalPrior(layers=mine, config=CONFIG, neighbours=neighbours))
        return codes, neighbours.sizes

    whole = drawn(LocalPrior(layers=layers, config=CONFIG))
    assert forked_ranks(tmp_path, 2, stage) == [(whole, {3, 1})] * 2


def test_rows_are_summed_in_any_memory_layout_of_a_gradient(tmp_path: Path) -> None:
    def rank(number: int) -> Any:
        world = World(rank=number, size=2, group=dist.group.WORLD, device=CPU)
        ctx = SimpleNamespace(world=world, count=1)
        slope = torch.arange(6.0).view(2, 3)
        slope = slope.T.contiguous().T if number else slope
        return _GatherRows.backward(ctx, slope)[0].tolist()

    assert forked_ranks(tmp_path, 2, rank) == [[[0, 2, 4]], [[6, 8, 10]]]


def test_a_link_is_measured_on_the_device_of_the_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(number: int) -> set[str]:
        all_reduce, seen = dist.all_reduce, set()

        def noted(tensor: Tensor, **how: Any) -> Any:
            seen.add(tensor.device.type)
            return all_reduce(tensor, **how)

        monkeypatch.setattr(dist, "all_reduce", noted)
        with torch.device("meta"):
            measure_link(cast(Any, dist.group.WORLD), CPU)
        return seen

    assert forked_ranks(tmp_path, 1, measure) == [{"cpu"}]


def test_a_mean_factor_that_overflows_is_clamped() -> None:
    """P is (1/2, 1/2, 1/2, 1/2); 4 * 2e38 / 2 exceeds fp32's largest number, 3.4028e38. The update
    is skipped: it returns half of that number, and the error keeps the whole gradient.
    """
    shards = [MatrixShard(name="w", rows=4, columns=5)]
    power = PowerSGD(shards, rank=1, seed=0, group=None, device=CPU)
    power._batches[0].q.fill_(1e-3)
    gradient = torch.full((4, 5), 2e38)
    reduced = power.reduce({"w": gradient})
    assert reduced.norm_squared == torch.inf and power.errors()["w"].equal(gradient)
    assert reduced.gradients["w"].flatten().tolist() == pytest.approx([1.7014e38] * 20, rel=1e-3)


def test_the_first_epoch_must_have_a_step() -> None:
    """Blocks of 2, 2, 1 and 1 records for two lanes of 3: a step only if each lane has a 2."""
    sizes, config = np.array([2, 2, 1, 1]), OrderConfig(lanes=2, shuffle_buffer=1)
    whole = set()
    for seed in range(20):
        try:
            order = LaneOrder(sizes, seed, 6, config)
        except ConfigError:
            continue
        assert order.steps(0) == 1
        whole.add(order.steps(1))
    assert whole == {0, 1}
