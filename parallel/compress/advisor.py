"""Does compression pay on this link? Measured on the model's own shapes, in seconds.

A step without compression sends all gradient bytes; a step with it computes the factors and sends
them with the uncompressed rest. Below the break-even bandwidth, compression saves time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from core.log import LOG
from parallel.compress.powersgd import MatrixShard, PowerSGD, shard_rank
from parallel.device import wait_for

PAPER_SHARE = 0.226
"""Rank over width that costs no loss according to the paper (896 of 3968)."""
SHARES = (1 / 16, 1 / 8, PAPER_SHARE, 0.5)
PROBES = (2**16, 2**22)
"""Bytes of the two all-reduces from which latency and bandwidth are solved."""
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Link:
    """Cost model of an all-reduce over a group: latency + bytes / bandwidth."""

    latency: float
    """Seconds."""
    bandwidth: float
    """Bytes of payload a second."""

    def seconds(self, count: float) -> float:
        """Time of one all-reduce of `count` bytes."""
        return self.latency + count / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What compression at one rank gains."""

    rank: int
    """Total rank, over the shards of a matrix."""
    raw_bytes: int
    sent_bytes: int
    compute_ms: float
    """Factors, orthogonalisation and decompression of one step."""
    gained_ms: float
    """Time saved per step on this link; negative if compression costs time."""
    break_even: float
    """Bytes a second of all-reduce payload below which it pays."""


def measure_link(group: "dist.ProcessGroup", device: torch.device) -> Link:
    """Time all-reduces of two sizes on the device of the gradients.

    Collective: every rank of the group must call it, and all get the same result.
    """
    seconds = []
    for count in PROBES:
        payload = torch.ones(count // 4, device=device)
        dist.all_reduce(payload, group=group)
        best = min(_timed_all_reduce(payload, group) for _ in range(ROUNDS))
        seconds.append(best)
    agreed = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    short, long = agreed.tolist()
    bandwidth = (PROBES[1] - PROBES[0]) / max(long - short, 1e-9)
    return Link(latency=max(short - PROBES[0] / bandwidth, 0.0), bandwidth=bandwidth)


def measure_compute(shards: Sequence[MatrixShard], rank: int, device: torch.device) -> float:
    """Seconds that one step's factors take on this rank's device, without sending them."""
    powersgd = PowerSGD(shards, rank=rank, seed=0, group=None, device=device)
    gradients = {s.name: torch.randn(s.rows, s.columns, device=device) for s in shards}
    powersgd.reduce(gradients)
    best = float("inf")
    for _ in range(ROUNDS):
        wait_for(device)
        began = time.perf_counter()
        powersgd.reduce(gradients)
        wait_for(device)
        best = min(best, time.perf_counter() - began)
    return best


def advise(
    shards: Sequence[MatrixShard],
    others: int,
    parts: int,
    link: Link,
    shares: Sequence[float],
    device: torch.device,
    payload: int = 4,
) -> list[Advice]:
    """Estimate compression at some fractions of the width; `others` elements stay as they are.

    `payload`: bytes of a sent value of a factor.
    """
    width = min(shard.oriented[0] for shard in shards) * parts
    raw = 4 * (sum(s.rows * s.columns for s in shards) + others)
    advice = []
    for share in shares:
        total = max(parts, round(share * width))
        each = shard_rank(total, parts)
        sent = 4 * others
        sent += payload * sum(min(each, min(s.oriented)) * (s.rows + s.columns) for s in shards)
        compute = measure_compute(shards, each, device)
        extra = compute + 2 * link.latency
        saved = (raw - sent) / link.bandwidth
        advice.append(
            Advice(
                rank=total,
                raw_bytes=raw,
                sent_bytes=sent,
                compute_ms=1e3 * compute,
                gained_ms=1e3 * (saved - extra),
                break_even=(raw - sent) / extra,
            )
        )
    return advice


def chosen_rank(
    shards: Sequence[MatrixShard],
    others: int,
    parts: int,
    group: "dist.ProcessGroup",
    device: torch.device,
    payload: int = 4,
) -> int:
    """The paper's rank if it saves time on this link, else 0; the same on every rank."""
    link = measure_link(group, device)
    table = advise(shards, others, parts, link, SHARES, device, payload) if shards else []
    LOG.info("link: %.1f MB/s, latency %.2f ms", link.bandwidth / 1e6, 1e3 * link.latency)
    for row in table:
        LOG.info(
            "rank %d: %.1f of %.1f MB, %.1f ms of factors: %+.1f ms a step; pays below %.0f MB/s",
            *(row.rank, row.sent_bytes / 1e6, row.raw_bytes / 1e6, row.compute_ms, row.gained_ms),
            row.break_even / 1e6,
        )
    papers = table[SHARES.index(PAPER_SHARE)] if table else None
    gained = papers.gained_ms if papers else 0.0
    vote = torch.tensor([gained], dtype=torch.float64, device=device)
    best = torch.tensor([papers.rank if papers else 0], device=device)
    dist.all_reduce(vote)
    dist.all_reduce(best, op=dist.ReduceOp.MAX)
    return int(best) if float(vote) > 0 else 0


def _timed_all_reduce(payload: torch.Tensor, group: "dist.ProcessGroup") -> float:
    wait_for(payload.device)
    began = time.perf_counter()
    dist.all_reduce(payload, group=group)
    wait_for(payload.device)
    return time.perf_counter() - began
