"""PowerSGD, its advice, norms and scales: hand-computed numbers, and worlds of two ranks."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import ConfigError
from core.keys import key_int
from parallel.compress import advisor
from parallel.compress.advisor import Link, advise, chosen_rank, measure_compute, measure_link
from parallel.compress.orthogonal import orthonormal
from parallel.compress.powersgd import MatrixShard, PowerSGD, Reduced, shard_rank
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.control import Vote, accept_all
from parallel.device import CPU
from parallel.engines.modules import (
    Compressor,
    build_compressor,
    counts_once,
    decide_update,
    load_scales,
    mean_losses,
    placements,
    scale_slices,
)
from parallel.engines.protocol import EngineSettings, Layer, Program, Stage, Whole
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from parallel.replicas import flat_average
from parallel.scales import Branch, Counters, Scale, Scales
from parallel.world import World
from tests.forked import forked_ranks


def _power(group: Any = None, **flags: Any) -> PowerSGD:
    shards = [MatrixShard(name="w", rows=4, columns=3), MatrixShard(name="v", rows=3, columns=4)]
    return PowerSGD(shards, rank=1, seed=5, group=group, device=CPU, **flags)


def test_one_step_is_the_papers_by_hand() -> None:
    """P = M Q along the long side, orthonormalised, M^T P back; the same for 3 x 4 and 4 x 3."""
    draws = torch.Generator().manual_seed(2)
    tall = torch.randn(4, 3, generator=draws)
    wide = torch.randn(3, 4, generator=draws)
    reduced = _power().reduce({"w": tall, "v": wide, "b": torch.tensor([3.0, 4.0])})
    for name, matrix in (("w", tall.T), ("v", wide)):
        seed = torch.Generator().manual_seed(key_int(5, name, 0, "powersgd"))
        q = torch.randn(4, 1, generator=seed)
        p = matrix @ q
        p[0, 0] += 1e-6
        p /= p.norm()
        expected = p @ (p.T @ matrix)
        gradient = reduced.gradients[name]
        torch.testing.assert_close(gradient, expected.T if name == "w" else expected)
        assert float(reduced.squares[name]) == pytest.approx(float(expected.square().sum()), 1e-5)
    assert reduced.gradients["b"].tolist() == [3, 4] and float(reduced.squares["b"]) == 25.0
    assert reduced.raw_bytes == 4 * (12 + 12 + 2)
    assert reduced.sent_bytes == 4 * (3 + 3 + 4 + 4 + 2 + 1)


def test_a_square_matrix_is_not_turned_and_none_may_be_compressed() -> None:
    """M Q is (1, 3), of length sqrt(10), and M^T P is (10, 14) / sqrt(10)."""
    power = PowerSGD([MatrixShard(name="w", rows=2, columns=2)], rank=1, seed=0, group=None,
                     device=CPU)  # fmt: skip
    power._batches[0].q.copy_(torch.tensor([[[1.0], [0.0]]]))
    gradient = power.reduce({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}).gradients["w"]
    assert gradient.flatten().tolist() == pytest.approx([1.0, 1.4, 3.0, 4.2], rel=1e-5)
    none = PowerSGD([], rank=1, seed=0, group=None, device=CPU).reduce({"b": torch.tensor([3.0])})
    assert float(none.norm_squared) == 9.0


def test_a_zero_gradient_has_the_shifts_basis() -> None:
    assert orthonormal([torch.zeros(1, 3, 2)])[0][0].tolist() == [[1, 0], [0, 1], [0, 0]]


def test_ranks_below_one_are_refused_and_wide_ranks_are_cut() -> None:
    shard = MatrixShard(name="w", rows=2, columns=5)
    assert shard.oriented == (2, 5) and shard.shard == 0
    with pytest.raises(ValueError, match="at least 1"):
        PowerSGD([shard], rank=0, seed=0, group=None, device=CPU)
    assert PowerSGD([shard], rank=9, seed=0, group=None, device=CPU).bases()["w"].shape == (5, 2)
    assert PowerSGD([shard], rank=1, seed=0, group=None, device=CPU).rank == 1
    assert [shard_rank(*given) for given in ((896, 8), (7, 2), (1, 8))] == [112, 3, 1]


def test_means_over_two_ranks_are_those_of_the_definition(tmp_path: Path) -> None:
    """Ranks exchange the mean; both learn of an infinite value on one, and it harms no state.

    In a group of one the mean is the rank's own value.
    """
    draws = torch.Generator().manual_seed(3)
    given = [[torch.randn(4, 3, generator=draws) for _ in range(2)] for _ in range(2)]
    plain = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, -1.0])]

    def rank(number: int) -> Any:
        power = _power(dist.group.WORLD)
        results = []
        for step in range(2):
            rows = {"w": given[step][number], "v": torch.zeros(3, 4), "b": plain[number]}
            if number == 1 and step == 1:
                rows["b"] = torch.tensor([math.inf, 1.0])
            reduced = power.reduce(rows)
            results.append({n: g.tolist() for n, g in reduced.gradients.items()})
            results.append(float(reduced.norm_squared))
        alone = _power([dist.new_group([0]), dist.new_group([1])][number])
        own = alone.reduce({"w": given[0][number], "v": torch.zeros(3, 4), "b": plain[number]})
        return results, power.errors()["w"].tolist(), own.gradients["b"].tolist()

    (ours, error0, own0), (theirs, error1, own1) = forked_ranks(tmp_path, 2, rank)
    assert ours == theirs and [own0, own1] == [[1.0, 5.0], [3.0, -1.0]]
    mean = (given[0][0] + given[0][1]).T / 2
    q = torch.randn(4, 1, generator=torch.Generator().manual_seed(key_int(5, "w", 0, "powersgd")))
    p = mean @ q
    p[0, 0] += 1e-6
    p /= p.norm()
    handed = (p @ (p.T @ mean)).T
    torch.testing.assert_close(torch.tensor(ours[0]["w"]), handed)
    assert ours[0]["b"] == [2.0, 2.0] and ours[3] == math.inf
    total = torch.tensor(error0) + torch.tensor(error1)
    handed_out = torch.tensor(ours[0]["w"]) + torch.tensor(ours[2]["w"])
    owed = given[0][0] + given[0][1] - 2 * handed_out
    torch.testing.assert_close(total - given[1][0], owed, atol=1e-5, rtol=1e-4)


def test_a_link_s_seconds() -> None:
    assert Link(latency=2.0, bandwidth=10.0).seconds(50.0) == 7.0


@pytest.mark.parametrize(
    ("seconds", "latency", "bandwidth"),
    [
        ((3.0, 5.0), 3.0 - 2 * 65536 / 4128768, 4128768 / 2),
        ((1.0, 1.0), 1 - 65.536e-6 / 4128.768, 4128768e9),
    ],
)
def test_latency_and_bandwidth_follow_from_two_sizes(
    seconds: tuple[float, float], latency: float, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of three rounds of each size: 64 KiB and 4 MiB."""
    asked: list[int] = []

    def timed(payload: Tensor, group: Any) -> float:
        asked.append(payload.numel())
        return seconds[len(asked) > 3] + (len(asked) % 3 != 2)

    monkeypatch.setattr(advisor, "_timed_all_reduce", timed)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    link = measure_link(cast(Any, None), CPU)
    assert asked == [16384] * 3 + [1048576] * 3
    assert link.bandwidth == pytest.approx(bandwidth)
    assert link.latency == pytest.approx(latency, rel=1e-6)


def test_a_link_is_never_faster_than_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1e-3] * 3 + [1.0] * 3)
    monkeypatch.setattr(advisor, "_timed_all_reduce", lambda *_: next(times))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    assert measure_link(cast(Any, None), CPU).latency == 0.0


SHARDS = [MatrixShard(name="a", rows=8, columns=32), MatrixShard(name="b", rows=16, columns=8)]


def test_advice_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of width 8: a total width of 16, a quarter is 4 in all and 2 a part.

    Raw: 4 (256 + 128 + 10). Sent: 4 * 10 + 4 (2 * 40 + 2 * 24). Two seconds of factors.
    """
    ranks: list[int] = []

    def compute(shards: Any, rank: int, device: Any) -> float:
        ranks.append(rank)
        return 2.0

    monkeypatch.setattr(advisor, "measure_compute", compute)
    link = Link(latency=0.5, bandwidth=100.0)
    low, full = advise(SHARDS, 10, 2, link, (1 / 4, 2.0), CPU)
    assert ranks == [2, 16] and (low.rank, full.rank) == (4, 32)
    assert (low.raw_bytes, low.sent_bytes) == (1576, 552)
    assert full.sent_bytes == 40 + 4 * (8 * 40 + 8 * 24)
    assert low.compute_ms == 2000.0
    assert low.gained_ms == pytest.approx(1e3 * (1024 / 100 - 3))
    assert low.break_even == pytest.approx(1024 / 3)
    (least,) = advise(SHARDS, 10, 2, link, (0.01,), CPU)
    assert least.rank == 2
    assert advisor.SHARES == (0.0625, 0.125, 0.226, 0.5) and advisor.ROUNDS == 3


def test_factors_are_timed_at_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five reductions: one to warm up, and the shortest of three."""
    clock = iter([10.0, 13.0, 20.0, 22.0, 30.0, 37.0])
    monkeypatch.setattr(advisor.time, "perf_counter", lambda: next(clock))
    assert measure_compute(SHARDS, 2, CPU) == 2.0
    clock = iter([1.0, 1.5])
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    assert advisor._timed_all_reduce(torch.ones(1), cast(Any, None)) == 0.5


@pytest.mark.parametrize(("gains", "rank"), [((3.0, -1.0), 7), ((1.0, -1.0), 0), ((-2.0, 1.0), 0)])
def test_ranks_agree_on_the_sum_of_their_gains(
    gains: tuple[float, float], rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide(number: int) -> int:
        row = SimpleNamespace(rank=7 - number, gained_ms=gains[number], sent_bytes=1, raw_bytes=1,
                              compute_ms=1.0, break_even=1.0)  # fmt: skip
        other = SimpleNamespace(**{**vars(row), "rank": 99, "gained_ms": 100.0})
        monkeypatch.setattr(advisor, "advise", lambda *_: [other, other, row, other])
        monkeypatch.setattr(advisor, "measure_link", lambda *_: Link(latency=0.0, bandwidth=1.0))
        return chosen_rank(SHARDS, 1, 1, cast(Any, dist.group.WORLD), CPU)

    assert forked_ranks(tmp_path, 2, decide) == [rank, rank]


def test_a_stage_without_matrices_has_no_vote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two such stages give no rank; beside a stage that loses or gains half a millisecond, that
    stage decides. The default device is `meta`, which holds no values.
    """

    def decide(number: int) -> list[int]:
        ranks = []
        for gained in (None, -0.5, 0.5):
            row = SimpleNamespace(rank=7, gained_ms=gained, sent_bytes=1, raw_bytes=1,
                                  compute_ms=1.0, break_even=1.0)  # fmt: skip
            monkeypatch.setattr(advisor, "advise", lambda *_, row=row: [row] * 4)
            shards = SHARDS if gained and number else []
            with torch.device("meta"):
                ranks.append(chosen_rank(shards, 1, 1, cast(Any, dist.group.WORLD), CPU))
        return ranks

    monkeypatch.setattr(advisor, "measure_link", lambda *_: Link(latency=0.0, bandwidth=1.0))
    assert forked_ranks(tmp_path, 2, decide) == [[0, 0, 7]] * 2


def _mesh(number: int, **groups: Group) -> Mesh:
    world = World(rank=number, size=2, group=dist.group.WORLD, device=CPU)
    return Mesh(world=world, **groups)


def test_norms_losses_and_wishes_are_shared_by_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 + 16 on one and 24 + 0 on the other: a norm of 7; losses 1, 3 and 5: a mean of 3.

    Losses are averaged over replicas and stages, not over the world that holds them.
    """

    def rank(number: int) -> Any:
        losses = [[1.0, 3.0], [5.0]][number]
        vote = Vote(losses=[{"loss": torch.tensor(x)} for x in losses], wants_stop=number == 1)
        squares = [[torch.tensor(9.0), torch.tensor(16.0)], [torch.tensor(24.0)]][number]
        here = {"a": Scale()} if number == 0 else {"b": Scale()}
        scales = Scales(["a", "b"], here)
        first = decide_update(squares, _mesh(number), scales, vote, accept_all)
        results = [first.clipped_by, first.loss, first.stopping]
        if number == 0:
            here["a"].note(torch.tensor(math.inf))
        blind = replace(vote, losses=[])
        second = decide_update(squares, _mesh(number), scales, blind, accept_all)
        results += [second.clipped_by, second.loss]
        results.append(next(iter(here.values())).value / 2**13)
        squares, scales = [torch.tensor(math.inf)], Scales([], {})
        infinite = decide_update(squares, _mesh(number), scales, blind, accept_all)
        results.append(infinite.clipped_by)
        group, groups = Group(dist.new_group([0, 1]), number, 2), []

        def noting(call: Any) -> Any:
            return lambda *given, **how: groups.append(how.get("group")) or call(*given, **how)

        for name in ("all_reduce", "broadcast"):
            monkeypatch.setattr(dist, name, noting(getattr(dist, name)))
        seen = [{"x": torch.tensor(1.0 + number), "y": torch.tensor(8.0)},
                {"x": torch.tensor(3.0 + number), "y": torch.tensor(0.0)}]  # fmt: skip
        results.append(mean_losses(seen, ("x", "y"), _mesh(number, data=group)))
        last = seen if number == 1 else []
        results.append(mean_losses(last, ("y", "x"), _mesh(number, pipeline=group)))
        results.append([each is group.handle for each in groups])
        return results

    ours, theirs = forked_ranks(tmp_path, 2, rank)
    grown = 2 ** (1 / 1000)
    for results, scale in ((ours, grown * 2**-0.5), (theirs, grown**2)):
        assert results[:5] == [7.0, 3.0, True, math.inf, 0.0]
        assert results[5] == pytest.approx(scale)
        assert results[6] == math.inf
        assert results[7] == {"x": 2.5, "y": 4.0}
        assert results[8] == {"y": 4.0, "x": 3.0} and results[9] == [True, True]


def test_who_counts_and_who_saves() -> None:
    split = Placement(shape=(4, 2), first=0, rows=2, split=True)
    whole = replace(split, split=False)
    for number in (0, 1):
        mesh = Mesh(tensor=Group(None, number, 2))
        assert counts_once(split, mesh) and counts_once(whole, mesh) == (number == 0)
    scales = Scales(["a"], {"a": Scale(value=300.0, since_division=4)})
    with torch.device("meta"):  # stored from the CPU under any default device
        (stored,) = scale_slices(scales, Mesh())
    assert stored.data.tolist() == [300.0, 4.0]
    assert (stored.name, stored.kind, stored.shape, stored.start) == ("a", "scale", (2,), 0)
    assert not list(scale_slices(scales, Mesh(data=Group(None, 1, 2))))
    assert not list(scale_slices(scales, Mesh(tensor=Group(None, 1, 2))))
    kinds = {"a": ["scale"], "b": []}
    reader = SimpleNamespace(
        kinds=lambda name: kinds[name], tensor=lambda name, kind: torch.tensor([512.0, 9.0])
    )
    here = {"a": Scale(), "b": Scale()}
    load_scales(Scales(["a", "b"], here), cast(Any, reader))
    assert (here["a"].value, here["a"].since_division) == (512.0, 9)
    assert type(here["a"].since_division) is int and here["b"] == Scale()
    assert list(placements({"w": nn.Parameter(torch.zeros(3, 2))}).values()) == [
        Placement(shape=(3, 2), first=0, rows=3, split=False)
    ]


def _settings(**compress: Any) -> EngineSettings:
    return EngineSettings(
        optim=OptimConfig(), engine=EngineConfig(), compress=CompressConfig(**compress), seed=5
    )


def _program(*compressed: str) -> Program:
    return Program(layers=[], loss=lambda *_: {}, losses=(), compressed=compressed)


HELD = {
    "a.w": Placement(shape=(6, 3), first=2, rows=4, split=True),
    "a.x": Placement(shape=(6, 3), first=2, rows=4, split=True),
    "b.w": Placement(shape=(6, 3), first=6, rows=0, split=True),
    "a.b": Placement(shape=(5,), first=0, rows=5, split=False),
}


def test_what_is_compressed_and_at_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group, parts = Group(cast(Any, object()), 0, 1), Group(None, 1, 2)
    assert build_compressor(_program("w"), HELD, _settings(), group, parts, CPU) is None
    with pytest.raises(ConfigError, match="only the prior"):
        build_compressor(_program(), HELD, _settings(rank=4), group, parts, CPU)
    made = build_compressor(_program("w"), HELD, _settings(rank=4), group, parts, CPU)
    assert made is not None and made.rank == 2 and made._powersgd.names == {"a.w"}
    seed = torch.Generator().manual_seed(key_int(5, "a.w", 1, "powersgd"))
    assert made._powersgd.bases()["a.w"].equal(torch.randn(4, 2, generator=seed))
    asked: list[Any] = []

    def chosen(shards: Any, others: int, number: int, *rest: Any) -> int:
        assert rest == (group.handle, CPU, 4)
        asked.append((len(shards), shards[0].rows, shards[0].columns, others, number))
        return 6 if len(asked) == 1 else 0

    monkeypatch.setattr("parallel.engines.modules.chosen_rank", chosen)
    auto = build_compressor(_program("w"), HELD, _settings(rank="auto"), group, parts, CPU)
    assert auto is not None and auto.rank == 3
    assert asked == [(1, 4, 3, 12 + 0 + 5, 2)]
    assert build_compressor(_program("w"), HELD, _settings(rank="auto"), group, parts, CPU) is None


def test_a_compressors_gradients_bytes_and_flags() -> None:
    held = {"w": Placement(shape=(4, 3), first=0, rows=2, split=True)}
    shards = [MatrixShard(name="w", rows=2, columns=3)]
    group = Group(None, 0, 1)
    one = Compressor(held, shards, 2, _settings(rank=2), group, group, CPU)
    gradient = torch.arange(9.0)
    reductions: list[Reduced] = []
    for calls in (1, 2):
        reduced = one.reduce({"w": gradient, "b": torch.tensor([[2.0, 1.0]])})
        reductions.append(reduced)
        assert one.facts(reductions)["compress_raw_bytes"] == calls * 4 * 8
        assert one.facts(reductions)["compress_sent_bytes"] == calls * 4 * (2 * 2 + 3 * 2 + 2 + 1)
    assert isinstance(reduced, Reduced) and reduced.raw_bytes == 32 and reduced.sent_bytes == 52
    torch.testing.assert_close(reduced.gradients["w"][:6], gradient[:6], rtol=1e-4, atol=1e-4)
    assert reduced.gradients["w"][6:].tolist() == [0, 0, 0]
    assert reduced.gradients["b"].tolist() == [2.0, 1.0]
    assert float(reduced.squares["w"]) == pytest.approx(55.0, rel=1e-4)
    facts = one.facts(reductions)
    assert facts == {"compress_raw_bytes": 64, "compress_sent_bytes": 104, "compress_rank": 2}
    assert one.facts([]) == {"compress_rank": 2} and all(each.finite for each in reductions)
    broken = one.reduce({"w": torch.full((9,), math.nan)})
    assert not broken.finite and one.reduce({"w": gradient}).finite


def test_a_compressor_averages_in_place_and_each_replica_counts_its_share_of_the_norm() -> None:
    held = {"w": Placement(shape=(2, 2), first=0, rows=2, split=False)}
    replicas, alone = Group(None, 1, 4), Group(None, 0, 1)
    matrices = [MatrixShard(name="w", rows=2, columns=2)]
    compressor = Compressor(held, matrices, 2, _settings(rank=2), replicas, alone, CPU)
    gradients = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor([2.0])}
    shares, reduced = compressor.average(gradients)
    assert gradients["b"].tolist() == [2.0] and gradients["w"].shape == (2, 2)
    torch.testing.assert_close(gradients["w"], torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert sum(float(share) for share in shares) == pytest.approx((9 + 16 + 4) / 4, rel=1e-4)
    assert reduced.gradients == {} and reduced.raw_bytes == 4 * 5


def test_only_what_is_switched_on_is_passed_on_and_saved() -> None:
    held = {"w": Placement(shape=(8, 3), first=4, rows=2, split=True)}
    shards = [MatrixShard(name="w", rows=2, columns=3, shard=1)]
    parts = Group(None, 1, 2)
    for warm in (False, True):
        for number in (0, 1):
            group = Group(None, number, 1)
            settings = _settings(rank=2, warm_start=warm, error_feedback=False)
            one = Compressor(held, shards, 2, settings, group, parts, CPU)
            assert one._powersgd._warm == warm and not one._powersgd._feedback and one.rank == 1
            saved = {s.kind: s for s in one.slices()}
            assert (f"error@{number}" in saved) and (("basis" in saved) == (warm and number == 0))
            assert saved[f"error@{number}"].start == 12
            if "basis" in saved:
                assert (saved["basis"].shape, saved["basis"].start) == ((6, 1), 3)


def test_counters_and_defaults_of_scales() -> None:
    counters = Counters()
    assert (counters.seen, counters.flushed) == (0, 0)
    counters.note(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 2.0, 0.0]))
    counters.note(torch.tensor([1.0]), torch.tensor([0.0]))
    assert (counters.seen, counters.flushed) == (4, 3)
    scale = Scale()
    assert (scale.value, scale.since_division, scale.finite) == (8192.0, 125, True)
    least = Scale(value=128.0)
    least.update(False)
    assert least.value == 128.0 and least.since_division == 0
    facts = Scales([], {"a": Scale(value=256.0), "b": Scale(value=2048.0)}).facts()
    assert facts == {"scale_log2_min": 8.0, "scale_log2_max": 11.0} and Scales([], {}).facts() == {}
    flags = Scales(["a", "b"], {"b": Scale(flags=[torch.tensor(False)])}).broken(CPU)
    assert flags.tolist() == [0.0, 1.0] and flags.dtype == torch.float64, "as what it goes with"


def test_what_a_branch_rounds_and_where() -> None:
    """Into a branch in 16 bits; its gradient scaled by 8192, matrices' gradients rounded."""
    branch, scale = Branch(), Scale()
    x = torch.tensor([1.0 + 2**-12], requires_grad=True)
    assert branch.enter(x) is x and branch.leave(x) is x and branch.count is False
    matrix = nn.Parameter(torch.ones(1, 1))
    gain = nn.Parameter(torch.ones(1))
    branch.watch([matrix, gain], scale)
    inside = branch.enter(x)
    assert inside.dtype == torch.float32 and float(inside) == 1.0
    slope = 1.0 + 2**-12
    (branch.leave((inside * matrix)[0] + gain) * slope).sum().backward()
    assert float(matrix.grad) == 1.0, "8192 (1 + 2^-12) rounds to 8192"  # type: ignore[arg-type]
    assert float(gain.grad) == 1.0 and float(x.grad) == 1.0 and scale.finite  # type: ignore
    y = torch.ones(1, requires_grad=True)
    (branch.leave(y) * 3e-8).sum().backward()
    assert float(y.grad) == float(torch.tensor(3e-8 * 8192).half())  # type: ignore[arg-type]
    big = torch.ones(2, requires_grad=True)
    (branch.enter(big) * torch.tensor([1e6, 8.0])).sum().backward()
    assert big.grad.tolist() == [0.0, 8.0 / 8192]  # type: ignore[union-attr]


def test_a_branch_counts_only_where_it_is_asked_to() -> None:
    for counted in (False, True):
        branch, scale = Branch(), Scale()
        weight = nn.Parameter(torch.ones(2, 2))
        branch.watch([weight], scale)
        branch.count = counted
        y = torch.zeros(2, 2)
        (branch.leave(y + weight) * torch.tensor([1.0, 1e-13])).sum().backward()
        seen = (scale.counters.seen, scale.counters.flushed)
        assert seen == ((6, 2) if counted else (0, 0)), "4 of the output, 2 that are left"


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.branch = nn.Linear(4, 4), Branch()

    def forward(self, x: Any) -> Tensor:
        x = x["x"] if isinstance(x, dict) else x
        return self.line(x)  # type: ignore[no-any-return]

    def branches(self) -> Any:
        return {"b": (self.branch, list(self.line.parameters()))}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stage_runs_in_the_runs_precision_with_its_scales(precision: Any) -> None:
    layers = [Layer(name="two", build=_Line, branches=("b",)), Layer(name="one", build=_Line)]
    engine = EngineConfig(precision=precision)
    stage = Stage(layers, engine, CPU)
    assert list(stage.scales) == (["two.b"] if precision == "fp16" else [])
    out = stage({"x": torch.ones(1, 4)})
    assert out.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert list(stage.global_names()) == [
        "one.line.bias", "one.line.weight", "two.line.bias", "two.line.weight",
    ]  # fmt: skip
    program = Program(layers=layers, loss=lambda out, batch: {"loss": out.sum() * batch["k"]},
                      losses=("loss",))  # fmt: skip
    whole = Whole(program, EngineConfig(), CPU)
    batch = {"x": torch.ones(1, 4), "k": torch.tensor(2.0)}
    assert float(whole(batch)["loss"]) == pytest.approx(2 * float(whole.stage(batch).sum()))


def test_a_stage_recomputes_where_the_engine_says_so() -> None:
    from parallel.engines.protocol import Recomputed

    for on in (False, True):
        layer = Layer(name="a", build=Recomputed)
        plain = Layer(name="b", build=nn.Identity)
        stage = Stage([layer, plain], EngineConfig(recompute=on), CPU)
        assert stage.layers["a"].recompute is on
        assert not hasattr(stage.layers["b"], "recompute")


def test_a_flat_average_is_over_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[object] = []

    def all_reduce(flat: Tensor, group: object = None) -> None:
        groups.append(group)
        flat *= 4.0

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    group = cast(Any, "a group of two")
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])]
    assert flat_average(tensors, group, 2).tolist() == [2.0, 4.0, 6.0]
    assert groups == ["a group of two"]
    assert flat_average(tensors, None, 2).tolist() == [1.0, 2.0, 3.0] and len(groups) == 1


def test_error_buffers_are_held_by_the_number_of_replicas_unless_asked() -> None:
    assert _settings().errors == "auto"
