"""Pins of tensor shards, sub-groups of ranks and 16-bit gradients."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from generation.config import DrawSettings
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.decoder_block import DecoderBlock
from generation.sampling.draw import CLOSE, choose
from generation.sampling.kv_cache import Lane
from generation.sampling.sampler import Sampler
from models.initialization import init_normal
from models.keyed_noise import draw_bits
from models.prior import PriorBlock
from parallel.compress import advisor
from parallel.compress.advisor import Link, chosen_rank, measure_link
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.device import CPU
from parallel.engines.modules import Compressor
from parallel.engines.protocol import EngineSettings
from parallel.mesh import Group
from parallel.placement import Placement
from parallel.scales import Scale
from parallel.tensor.ops import TensorParallel
from tests.forked import forked_ranks
from tests.unit.generation.test_pins_generation import _drawable
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like


class _Shard(TensorParallel):
    """One of two ranks that share a block; gloo adds the partial sums."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def leave(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total


def _cut(block: PriorBlock, rank: int) -> PriorBlock:
    """One rank's half of the heads and of the hidden channels."""
    mine = copy.deepcopy(block)
    for name in ("q", "k", "v", "out", "up", "down"):
        line = getattr(mine, name)
        rows = line.weight.chunk(2)[rank]
        line.weight = nn.Parameter(rows.detach().clone())
        if name in ("q", "v", "up"):
            line.bias = nn.Parameter(line.bias.chunk(2)[rank].detach().clone())
    return mine


@torch.no_grad()
def test_two_shards_of_a_block_decode_as_the_whole(tmp_path: Path) -> None:
    """The biases of both row-parallel matrices differ, and are added once."""
    config = replace(CONFIG, heads=4)
    block = cast(PriorBlock, trained_like(config)["block000"])
    assert not block.out.bias.allclose(block.down.bias)
    x = torch.randn(2, 9, CONFIG.dim, generator=torch.Generator().manual_seed(3))

    def through(part: LocalPrior, mine: PriorBlock) -> list[Any]:
        packed = DecoderBlock(mine, 1, part.config, part.tensor, dtype=torch.float32, one_row=False)
        return [packed._whole(x)[0].tolist(), packed.canonical(x).tolist(), packed.heads]

    def rank(number: int) -> list[Any]:
        part = LocalPrior(layers={}, config=config, tensor=_Shard(number))
        return through(part, _cut(block, number))

    whole = through(LocalPrior(layers={}, config=config), block)
    for states, again, heads in forked_ranks(tmp_path, 2, rank):
        assert heads * 2 == whole[2]
        for output in (states, again):
            torch.testing.assert_close(torch.tensor(output), torch.tensor(whole[0]))


def test_a_stage_may_hold_one_layer() -> None:
    layers = trained_like()
    for name in layers:
        decoder = Decoder(LocalPrior(layers={name: layers[name]}, config=CONFIG))
        assert decoder.device == CPU and len(decoder.caches.kinds) == ("block" in name)
        assert isinstance(decoder.caches.lane(2, 1, CPU), Lane)


def test_lanes_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lanes, as two stages have, of which the second has more candidates."""
    from generation.sampling import sampler as sampling

    fitting, needs = sampling.fitting, []
    monkeypatch.setattr(
        sampling, "fitting", lambda need, *rest: needs.append(need) or fitting(need, *rest)
    )
    decoder, text = Decoder(LocalPrior(layers=trained_like(), config=CONFIG)), prior_batch()["text"]
    keys = cast(Any, [[(1, c, i) for i in range(3)] for c in "abc"])
    (one,) = Sampler(decoder, batch=9).draw(text, keys, DrawSettings())
    monkeypatch.setattr(decoder.neighbours, "size", 2)
    (two,) = Sampler(decoder, batch=9).draw(text, keys, DrawSettings())
    assert one.codes.equal(two.codes) and one.codes.shape == (3, 3, 16)
    assert [need.lanes for need in needs] == [1, 2]


def test_edges_of_what_may_be_drawn() -> None:
    """A codebook of two codes; without noise a gap below CLOSE is a near tie; a probability at the
    edge of the tolerance is unsure; if all codes are kept, none is unsure.
    """
    pair = choose(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), DrawSettings())
    assert (pair.codes.tolist(), pair.sure.tolist()) == ([1], [True])
    greedy = choose(torch.tensor([[0.0, 0.75 * CLOSE, -1.0]]), None, DrawSettings(temperature=0.0))
    assert (greedy.codes.tolist(), greedy.sure.tolist()) == ([1], [False])
    assert not any(_drawable([0.0, 0.0], False, top_p=0.5 + CLOSE).values())
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    assert _drawable(logits, False, top_p=0.9) == dict.fromkeys(range(3), True)


def test_a_link_is_measured_within_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas of one stage may have faster links than the rest of the world."""

    def measure(number: int) -> list[bool]:
        group, all_reduce = dist.new_group([0]), dist.all_reduce
        asked: list[bool] = []

        def noted(*given: Any, group: Any = None, **more: Any) -> Any:
            asked.append(group is not None and group is mine)
            return all_reduce(*given, group=group, **more)

        mine = group
        monkeypatch.setattr(dist, "all_reduce", noted)
        with torch.device("meta"):  # payloads are on the device that is asked for
            measure_link(cast(Any, group), CPU)
        return asked

    (asked,) = forked_ranks(tmp_path, 1, measure)
    assert all(asked) and len(asked) == 2 * (1 + advisor.ROUNDS) + 1


def test_a_nanosecond_is_seen_beside_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0] * 3 + [1.0 + 2.0**-29] * 3)
    monkeypatch.setattr(advisor, "_timed_all_reduce", lambda *_: next(times))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    bandwidth = measure_link(cast(Any, None), CPU).bandwidth
    assert bandwidth == pytest.approx(4128768 * 2.0**29)


def test_stages_agree_on_a_small_gain_and_on_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^25 + 1 and -2^25 sum to 1, which 32-bit floats cannot hold; 7 and 7 give 7."""

    def decide(number: int) -> int:
        row = SimpleNamespace(rank=7, gained_ms=(2.0**25 + 1, -(2.0**25))[number], sent_bytes=1,
                              raw_bytes=1, compute_ms=1.0, break_even=1.0)  # fmt: skip
        monkeypatch.setattr(advisor, "advise", lambda *_: [row] * 4)
        monkeypatch.setattr(advisor, "measure_link", lambda *_: Link(latency=0.0, bandwidth=1.0))
        shards = [MatrixShard(name="w", rows=2, columns=2)]
        return chosen_rank(shards, 1, 1, cast(Any, dist.group.WORLD), CPU)

    assert forked_ranks(tmp_path, 2, decide) == [7, 7]


def _compressor(group: Group, rank: int = 10**6) -> Compressor:
    held = {"w": Placement(shape=(2, 3), first=0, rows=2, split=False)}
    shards = [MatrixShard(name="w", rows=2, columns=3)]
    settings = EngineSettings(
        optim=OptimConfig(), engine=EngineConfig(), seed=5, compress=CompressConfig(rank=rank)
    )
    return Compressor(held, shards, rank, settings, group, Group(), CPU)


def test_replicas_average_at_full_rank_in_the_gradients_own_type(tmp_path: Path) -> None:
    """Means of 0..5 and twice 0..5, and of 1 and 3."""

    def reduce(number: int) -> list[Any]:
        one = _compressor(Group(dist.group.WORLD, number, 2))
        ramp = (1 + number) * torch.arange(6.0).view(2, 3)
        gradients = one.reduce({"w": ramp, "b": torch.tensor([1.0 + 2 * number])}).gradients
        half = one.reduce({"w": ramp.bfloat16(), "b": torch.ones(1)}).gradients["w"]
        return [gradients["w"].tolist(), gradients["b"].tolist(), str(half.dtype)]

    for weights, bias, kind in forked_ranks(tmp_path, 2, reduce):
        assert weights == pytest.approx([1.5 * i for i in range(6)], abs=1e-5)
        assert bias == [2.0] and kind == "torch.bfloat16"


def test_buffers_of_as_many_other_replicas_are_averaged() -> None:
    """Replica 0 of two loads those of 1 and 2: 0..5 and four times 0..5."""

    class Stored:
        def kinds(self, name: str) -> list[str]:
            return ["error@1", "error@2"]

        def flat(self, name: str, kind: str, start: int, stop: int) -> Tensor:
            return (1.0 if kind == "error@1" else 4.0) * torch.arange(6.0)[start:stop]

    one = _compressor(Group(None, 0, 2), rank=1)
    one.load(cast(Any, Stored()))
    assert one._powersgd.errors()["w"].flatten().tolist() == [2.5 * i for i in range(6)]


def test_what_a_skipped_update_did_not_carry_stays_owed() -> None:
    """A factor overflows and the update is skipped, so the error keeps the whole gradient. The
    other factor, computed from a clamped basis, is finite.
    """
    power = PowerSGD([MatrixShard(name="w", rows=1, columns=2)], rank=1, seed=0, group=None,
                     device=CPU)  # fmt: skip
    power._batches[0].q.copy_(torch.tensor([[[4.0], [4.0]]]))
    gradient = torch.tensor([[1e38, 1e38]])
    assert power.reduce({"w": gradient}).norm_squared == torch.inf
    assert power.errors()["w"].equal(gradient)


def test_a_scale_grows_to_its_ceiling() -> None:
    scale = Scale(value=2.0**24)
    scale.update(finite=True)
    assert scale.value == 2.0**24


def test_vectors_of_another_kind_keep_their_values_and_draws_begin_at_position_0() -> None:
    module = nn.Module()
    module.offset = nn.Parameter(torch.full((3,), 5.0))
    init_normal(module, 0, {"weight": 1.0})
    assert module.offset.tolist() == [5.0] * 3
    keys = torch.tensor([3, 4])
    assert draw_bits(keys, 5).equal(draw_bits(keys, 5, 0))
    assert not draw_bits(keys, 5).equal(draw_bits(keys, 5, 1))
