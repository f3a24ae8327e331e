"""PowerSGD a bucket at a time: numbers by hand, and the blocking form in the same process.

The second rank of the group is played: its gradients are three times ours, so that a sum over the
group is four times our tensor, and a mean twice.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.compress.overlapped import OverlappedPowerSGD
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.device import CPU

SHAPES = {"c.wide": (4, 9), "c.tall": (9, 4), "b.wide": (3, 8), "a.tall": (7, 2), "a.even": (5, 5)}
BUCKETS = ("c", "b", "a")
GROUP = cast(Any, "a group of two")


class _Peer:
    """The group's other rank; a reduced tensor has its sum once its work was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)
        monkeypatch.setattr(dist, "get_world_size", lambda group: {GROUP: 2}[group])

    def _all_reduce(self, tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        assert group is GROUP
        if not async_op:
            tensor *= 4
            return None
        count = tensor.numel()
        self.calls.append(f"send {count}")

        def wait() -> None:
            self.calls.append(f"wait {count}")
            tensor.mul_(4)

        return SimpleNamespace(wait=wait)


def _bucket(name: str) -> str:
    return name.partition(".")[0]


def _built(kind: Callable[..., Any], shapes: dict[str, tuple[int, int]], **options: Any) -> Any:
    shards = [MatrixShard(name=n, rows=r, columns=c) for n, (r, c) in shapes.items()]
    chosen = {"rank": 2, "seed": 0, "device": CPU, "bucket_of": _bucket, **options}
    return kind(shards, **chosen)


def _gradients(step: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return {n: torch.randn(s, generator=draws, device="cpu") for n, s in SHAPES.items()}


def _start_all(power: OverlappedPowerSGD, gradients: dict[str, Tensor]) -> None:
    for bucket in BUCKETS:
        power.start(bucket, {n: g for n, g in gradients.items() if _bucket(n) == bucket})


def _square(group: Any, **options: Any) -> Any:
    power = _built(OverlappedPowerSGD, {"a.w": (2, 2)}, rank=1, group=group, **options)
    power._batches[0].q.copy_(torch.tensor([[[1.0], [0.0]]]))
    return power


@pytest.mark.parametrize("payload", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feedback", [True, False])
def test_one_matrix_by_hand(
    feedback: bool, payload: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M Q is (1, 3), of length sqrt(10), and M^T P is (10, 14) / sqrt(10), whose mean with three
    times itself is twice that. The mean is 2 (1, 1.4; 3, 4.2), and M less the mean is owed. Two
    factors of two values each are sent. bf16 rounds 14 / sqrt(10) to 4.4375, 10 / sqrt(10) to
    3.15625; halves of the sums are exact in it.
    """
    peer = _Peer(monkeypatch)
    power = _square(GROUP, warm_start=True, error_feedback=feedback, payload=payload)
    given = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    gradients = {"a.w": given.clone()}
    power.start("a", gradients)
    squares, fine, sent = power.finish()
    power.settle(gradients, True, True)
    root = math.sqrt(10)
    q = (10 / root, 14 / root) if payload == torch.float32 else (3.15625, 4.4375)
    mean = torch.tensor([[p * 2 * x for x in q] for p in (1 / root, 3 / root)])
    torch.testing.assert_close(gradients["a.w"], mean, rtol=1e-5, atol=1e-5)
    assert power.bases()["a.w"].flatten().tolist() == pytest.approx([2 * x for x in q], rel=1e-5)
    assert float(squares["a.w"]) == pytest.approx(4 * (q[0] ** 2 + q[1] ** 2), rel=1e-5)
    assert bool(fine) and sent == 4 * payload.itemsize
    owed = given - mean if feedback else given
    torch.testing.assert_close(power.errors()["a.w"], owed, rtol=1e-5, atol=1e-5)
    assert peer.calls == ["send 2", "wait 2", "send 2", "wait 2"]


CASES = [
    (None, True, False, torch.float32),
    (None, False, True, torch.float32),
    (GROUP, True, True, torch.float32),
    (GROUP, True, False, torch.bfloat16),
    (GROUP, False, True, torch.bfloat16),
]


@pytest.mark.parametrize("broken", ["", "a.even"])
@pytest.mark.parametrize(("group", "feedback", "warm", "payload"), CASES)
def test_buckets_equal_one_piece(
    group: Any,
    feedback: bool,
    warm: bool,
    payload: torch.dtype,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four updates of both forms, of which the third has a NaN in `broken`: it is refused, and
    reduced again in one piece."""
    _Peer(monkeypatch)
    options = {"group": group, "warm_start": warm, "error_feedback": feedback, "payload": payload}
    whole, parts = (_built(kind, SHAPES, **options) for kind in (PowerSGD, OverlappedPowerSGD))
    for step in range(4):
        gradients = _gradients(step)
        here = not (broken and step == 2)
        if not here:
            gradients[broken][3, 1] = math.nan
        reduced = whole.reduce({name: g.clone() for name, g in gradients.items()})
        _start_all(parts, gradients)
        squares, fine, sent = parts.finish()
        parts.settle(gradients, bool(fine), here)
        assert bool(fine) == here == reduced.finite
        assert sent == reduced.sent_bytes - 4  # the flag, which the engine sends
        assert squares.keys() == SHAPES.keys()
        for name, mean in reduced.gradients.items():
            torch.testing.assert_close(gradients[name], mean)
            torch.testing.assert_close(squares[name], reduced.squares[name])
            torch.testing.assert_close(parts.errors()[name], whole.errors()[name])
            torch.testing.assert_close(parts.bases()[name], whole.bases()[name])


def test_a_bucket_waits_for_the_next_ones_p(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rank 1, P of the buckets has 8, 3 and 7 elements, Q 18, 8 and 12: short and long sides."""
    peer = _Peer(monkeypatch)
    power = _built(OverlappedPowerSGD, SHAPES, rank=1, group=GROUP)
    gradients = _gradients(0)
    _start_all(power, gradients)
    started = ["send 8", "send 3", "wait 8", "send 18", "send 7", "wait 3", "send 8"]
    assert peer.calls == started
    power.finish()
    ended = ["wait 7", "send 12", "wait 18", "wait 8", "wait 12"]
    assert peer.calls == [*started, *ended]
    power.settle(gradients, True, True)
    assert power.finish()[0] == {} and peer.calls == [*started, *ended], "nothing is under way"


def test_a_bucket_without_matrices_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _Peer(monkeypatch)
    power = _built(OverlappedPowerSGD, {"a.w": (2, 3)}, group=GROUP)
    power.start("b", {})
    squares, fine, sent = power.finish()
    assert (squares, bool(fine), sent, peer.calls) == ({}, True, 0, [])
    assert fine.dtype == torch.bool


def test_an_infinite_factor_makes_all_squares_infinite() -> None:
    """On the gradients' device, whatever the default one; `meta` holds no values."""
    power = _built(OverlappedPowerSGD, SHAPES, group=None)
    gradients = _gradients(0)
    gradients["b.wide"][0, 0] = math.inf
    with torch.device("meta"):
        _start_all(power, gradients)
        squares, fine, _ = power.finish()
    assert not bool(fine) and fine.device == CPU
    assert {name: float(square) for name, square in squares.items()} == dict.fromkeys(
        SHAPES, math.inf
    )
