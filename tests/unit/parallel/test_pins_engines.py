"""Compression inside of engines, sequence parallelism, selective recompute: numbers by hand.

Other ranks of a group are played: a sum over it is four times our tensor.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.compress import advisor
from parallel.compress.advisor import Link, chosen_rank
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.config import CompressConfig, EngineConfig, OptimConfig
from parallel.device import CPU
from parallel.engines.modules import Compressor, add_stream_gradients
from parallel.engines.protocol import EngineSettings, Layer, Recomputed, Stage
from parallel.mesh import Group, Mesh
from parallel.placement import Placement
from parallel.replicas import flat_average
from parallel.scales import Scales
from parallel.tensor.ops import TensorParallel


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, Tensor]]:
    """The group and our tensor of each all-reduce, whose sum is four times that."""
    calls: list[tuple[object, Tensor]] = []

    def all_reduce(tensor: Tensor, group: object = None, **_: Any) -> None:
        calls.append((group, tensor.clone()))
        tensor *= 4

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return calls


def _compressor(payload: Any) -> Compressor:
    """Of two 2 x 3 matrices, the second with a padding row, in a bucket each."""
    place = Placement(shape=(2, 3), first=0, rows=2, split=False)
    compress = CompressConfig(rank=2, payload=payload)
    settings = EngineSettings(optim=OptimConfig(), engine=EngineConfig(), seed=5, compress=compress)
    shards = [MatrixShard(name=name, rows=2, columns=3) for name in ("a.w", "b.w")]
    bucket_of: Callable[[str], str] = lambda name: name.partition(".")[0]  # noqa: E731
    held = {"a.w": place, "b.w": place}
    return Compressor(held, shards, 2, settings, Group(), Group(), CPU, bucket_of)


@pytest.mark.parametrize(("payload", "width"), [("fp32", 4), ("bf16", 2)])
def test_an_engine_compresses_the_matrices_of_a_bucket(payload: Any, width: int) -> None:
    """Full rank returns the gradient; each matrix sends 2 x 2 and 3 x 2 values. Biases and padding
    rows stay as they are."""
    one = _compressor(payload)
    ramp = torch.arange(6.0)
    gradients = {
        "a.w": ramp.clone(),
        "b.w": torch.cat([2 * ramp, torch.full((3,), 7.0)]),
        "b.bias": torch.tensor([5.0]),
    }
    for bucket in ("b", "a"):
        one.start(bucket, {n: g for n, g in gradients.items() if n.startswith(bucket)})
    squares, fine, count = one.finish()
    assert bool(fine) and count == 2 * width * (2 * 2 + 3 * 2)
    assert {n: float(x) for n, x in squares.items()} == pytest.approx({"a.w": 55.0, "b.w": 220.0})
    one.settle(gradients, True, True)
    torch.testing.assert_close(gradients["a.w"], ramp, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients["b.w"][:6], 2 * ramp, atol=1e-5, rtol=0)
    assert gradients["b.w"][6:].tolist() == [7.0] * 3 and gradients["b.bias"].tolist() == [5.0]


def _mesh(sequence: bool) -> Mesh:
    shared = TensorParallel()
    shared.sequence = sequence
    return Mesh(shared=shared, tensor=Group(cast(Any, "tensor ranks"), 0, 4))


def test_gains_of_the_stream_are_summed_over_tensor_ranks(
    sent: list[tuple[object, Tensor]],
) -> None:
    """Each of four ranks has 3 of a gain's gradient: 12. What no rank holds here is not sent."""
    whole = Placement(shape=(1,), first=0, rows=1, split=False)
    places = {
        "gain": Placement(shape=(1,), first=0, rows=1, split=False, stream=True),
        "weight": whole,
        "empty": Placement(shape=(1,), first=0, rows=0, split=False, stream=True),
    }
    gradients = {name: torch.tensor([3.0]) for name in ("gain", "weight")}
    add_stream_gradients(gradients, places, _mesh(sequence=False))
    add_stream_gradients({"empty": torch.zeros(0)}, places, _mesh(sequence=True))
    add_stream_gradients({"weight": gradients["weight"]}, places, _mesh(sequence=True))
    assert not sent and gradients["gain"].item() == 3.0
    add_stream_gradients(gradients, places, _mesh(sequence=True))
    assert gradients["gain"].item() == 12.0 and gradients["weight"].item() == 3.0
    assert [(group, x.tolist()) for group, x in sent] == [("tensor ranks", [3.0])]


def test_a_flat_average_is_sent_in_its_payload(sent: list[tuple[object, Tensor]]) -> None:
    """1 + 2^-7 and 1 + 2^-8 are 1.0078125 and 1 in bf16. Parts are divided before they are rounded,
    and fp32 sums after: a mean over eight of four times our own is half of that.
    """
    given = [torch.tensor([1.0 + 2**-7]), torch.tensor([1.0 + 2**-8])]
    group = cast(Any, "replicas")
    rounded = flat_average(given, group, 8, torch.bfloat16)
    assert rounded.tolist() == [0.50390625, 0.5] and rounded.dtype == torch.float32
    exact = [0.5 + 2**-8, 0.5 + 2**-9]
    assert flat_average(given, group, 8, torch.float32).tolist() == exact
    assert flat_average(given, group, 8).tolist() == exact
    assert [x.dtype for _, x in sent] == [torch.bfloat16, torch.float32, torch.float32]
    assert sent[0][1].tolist() == [0.1259765625, 0.125]
    assert all(x.tolist() == [1.0 + 2**-7, 1.0 + 2**-8] for _, x in sent[1:])
    assert {group for group, _ in sent} == {"replicas"}


class _OnGpu(Tensor):
    """A flag that is said to be on a GPU, for which nothing waits."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def __bool__(self) -> bool:
        raise AssertionError("the host waits for the device")


@pytest.mark.parametrize("feedback", [True, False])
def test_on_a_gpu_nothing_waits_for_the_flag(feedback: bool) -> None:
    """2 is owed. A gradient of 3 is added to it, or is put in its place without feedback; one that
    is not finite changes nothing."""
    power = PowerSGD([MatrixShard(name="w", rows=1, columns=1)], rank=1, seed=0, group=None,
                     device=CPU, error_feedback=feedback)  # fmt: skip
    for fine, gradient, owed in ((False, torch.nan, 2.0), (True, 3.0, 5.0 if feedback else 3.0)):
        power._batches[0].error.fill_(2.0)
        flag = torch.tensor(fine).as_subclass(_OnGpu)
        power._accumulate({"w": torch.tensor([[gradient]])}, flag)
        assert power.errors()["w"].item() == owed


def test_flags_without_gradients_are_on_the_given_device() -> None:
    with torch.device("meta"):  # which holds no values
        none = PowerSGD([], rank=1, seed=0, group=None, device=CPU)
        reduced = none.reduce({})
    assert reduced.gradients == {} and (reduced.raw_bytes, reduced.sent_bytes) == (0, 4)
    assert Scales([], {}).broken(CPU).dtype == torch.float64, "as the squares that it goes with"


def test_factors_are_sent_in_fp32_unless_asked(
    sent: list[tuple[object, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is asked for 4 bytes a value; a gain of 1 ms takes the paper's rank."""
    asked: list[int] = []

    def advise(*given: Any) -> list[Any]:
        asked.append(given[-1])
        return [SimpleNamespace(rank=7, gained_ms=1.0, sent_bytes=1, raw_bytes=1, compute_ms=1.0,
                                break_even=1.0)] * len(advisor.SHARES)  # fmt: skip

    monkeypatch.setattr(advisor, "advise", advise)
    monkeypatch.setattr(advisor, "measure_link", lambda *_: Link(latency=0.0, bandwidth=1.0))
    shards = [MatrixShard(name="w", rows=2, columns=3)]
    group = cast(Any, "replicas")
    ranks = [chosen_rank(shards, 1, 1, group, CPU, *payload) for payload in ((), (2,))]
    assert asked == [4, 2] and ranks == [28, 28] and len(sent) == 4


class _Line(Recomputed):
    """A weight of 2 in a cheap part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def times(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


@pytest.mark.parametrize(
    ("selective", "grad", "times"),
    [(None, True, 1), (False, True, 1), (True, True, 2), (True, False, 1), (False, False, 1)],
)
def test_a_cheap_part_is_recomputed_if_selective_and_gradients_are_needed(
    selective: bool | None, grad: bool, times: int
) -> None:
    """The weight learns though the input needs no gradient: the slope of (2 * 3)^2 / 2 by the
    weight is 18. Not selective is the default."""
    line = _Line()
    if selective is not None:
        line.selective = selective
    with torch.set_grad_enabled(grad):
        y = line.run_cheap(line.times, torch.tensor(3.0)) ** 2 / 2
    assert y.item() == 18.0
    if grad:
        y.backward()
        assert line.weight.grad is not None and line.weight.grad.item() == 18.0
    assert line.calls == times


@pytest.mark.parametrize(
    ("selective", "grad", "calls"), [(False, True, 0), (True, True, 1), (True, False, 0)]
)
def test_a_value_is_rebuilt_if_selective_and_gradients_are_needed(
    selective: bool, grad: bool, calls: int
) -> None:
    """3 * 2 is kept for the slope by the weight, or computed again: once."""
    line, weight = _Line(), torch.nn.Parameter(torch.tensor(5.0))
    line.selective = selective
    x = torch.tensor(3.0)
    value = line.times(x).detach()
    line.calls = 0
    with torch.set_grad_enabled(grad):
        context = line.rebuilt(value, line.times, x)
        assert isinstance(context, nullcontext) == (calls == 0)
        with context:
            y = value * weight
    assert y.item() == 30.0
    if grad:
        y.backward()
        assert weight.grad is not None and weight.grad.item() == 6.0
    assert line.calls == calls


def test_recomputing_keeps_no_generators_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Tensor:
        raise AssertionError("a generator's state is read")

    monkeypatch.setattr(torch, "get_rng_state", read)
    line = _Line()
    line.recompute = line.selective = True
    for run in (line.run_branch, line.run_cheap):
        run(line.times, torch.tensor(3.0)).backward()
    assert line.weight.grad is not None and line.weight.grad.item() == 6.0


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_a_stage_recomputes_whole_branches_or_cheap_parts(on: bool, granularity: Any) -> None:
    engine = EngineConfig(recompute=on, recompute_granularity=granularity)
    made = cast(Any, Stage([Layer(name="a", build=Recomputed)], engine, CPU).layers["a"])
    selective = granularity == "selective"
    assert (made.recompute, made.selective) == (on and not selective, on and selective)
