"""PowerSGD a bucket at a time equals PowerSGD in one piece, also when an update is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.compress.overlapped import OverlappedPowerSGD
from parallel.compress.powersgd import MatrixShard, PowerSGD
from parallel.device import CPU
from tests.forked import forked_ranks

SHAPES = {"last.wide": (6, 20), "last.tall": (20, 6), "first.wide": (6, 20), "first.even": (8, 8)}
BROKEN = 2
"""The step at which one rank's gradient of the first layer, which is the last to come, is not
finite."""


def _gradients(step: int, rank: int, broken: bool) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(100 * rank + step)
    made = {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}
    if broken and step == BROKEN and rank == 1:
        made["first.even"][3, 4] = math.nan
    return made


def _built(kind: Any, warm: bool, feedback: bool) -> Any:
    shards = [MatrixShard(name=n, rows=r, columns=c) for n, (r, c) in SHAPES.items()]
    return kind(
        shards,
        rank=2,
        seed=0,
        group=torch.distributed.group.WORLD,
        device=CPU,
        warm_start=warm,
        error_feedback=feedback,
        bucket_of=lambda name: name.partition(".")[0],
    )


@pytest.mark.parametrize(
    ("warm", "feedback", "broken"),
    [(False, True, False), (True, True, False), (False, False, False), (True, True, True)],
)
def test_buckets_equal_one_piece(warm: bool, feedback: bool, broken: bool, tmp_path: Path) -> None:
    def rank(number: int) -> list[float]:
        whole = _built(PowerSGD, warm, feedback)
        parts = _built(OverlappedPowerSGD, warm, feedback)
        apart = [0.0]
        for step in range(5):
            gradients = _gradients(step, number, broken)
            reduced = whole.reduce({name: g.clone() for name, g in gradients.items()})
            for bucket in ("last", "first"):
                mine = {name: g for name, g in gradients.items() if name.startswith(bucket)}
                parts.start(bucket, mine)
            squares, flag, sent = parts.finish()
            assert bool(flag) == (not broken or step != BROKEN)
            assert bool(flag) == reduced.finite
            here = all(bool(torch.isfinite(g).all()) for g in gradients.values())
            parts.settle(gradients, bool(flag), here)
            assert sent == reduced.sent_bytes - 4  # the flag, which goes with other gradients here
            for name, mean in reduced.gradients.items():
                apart.append(float((gradients[name] - mean).norm() / mean.norm()))
                if flag:
                    apart.append(abs(float(squares[name] / reduced.squares[name]) - 1))
                else:
                    assert math.isinf(squares[name]) and math.isinf(reduced.squares[name])
            for one, other in ((whole.errors(), parts.errors()), (whole.bases(), parts.bases())):
                apart += [float((one[n] - other[n]).norm() / one[n].norm()) for n in SHAPES]
        return apart

    for apart in forked_ranks(tmp_path, 2, rank):
        assert max(apart) < 1e-5 and len(apart) > 50
