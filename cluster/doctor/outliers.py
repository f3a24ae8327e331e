"""Find ranks and links that are slower than the others in the burn-in."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.doctor.finding import Finding, bad, ok, warning

SLOW_RATE, NOTED_RATE = 0.5, 0.8
"""Fraction of the median rate of matmuls."""
SLOW_LINK, NOTED_LINK = 0.33, 0.6
"""Fraction of the median bandwidth of links of the same kind."""
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Burned:
    """What the burn-in measured on a rank."""

    rank: int
    host: str
    rate: float
    """FLOP/s of matmuls."""
    link: float
    """Bytes/s to the next rank; 0 if another rank measures this link."""
    reduce: float
    """Bytes/s of the all-reduce on the wire; 0 on one rank."""


def burn_rows(burned: Sequence[Burned]) -> list[Finding]:
    """Rows of matmuls, links and the all-reduce, the outliers first."""
    rows = [*_rates(burned), *_links(burned)]
    reduce = statistics.median(each.reduce for each in burned)
    if reduce:
        text = f"{reduce / GIGA:.3g} GB/s over {_ranks(burned)}"
        rows.append(ok("all-reduce", text))
    return rows


def _rates(burned: Sequence[Burned]) -> list[Finding]:
    middle = statistics.median_high(each.rate for each in burned)
    rows = []
    for each in burned:
        share = each.rate / middle
        speed = f"{each.rate / TERA:.3g} TFLOP/s, {share:.0%} of the median of {_ranks(burned)}"
        fix = (
            "another job on its cores or GPU, a power or heat limit, or wrong CPU binding: look at "
            "top and nvidia-smi there; exclude the node if it stays slow"
        )
        if share < NOTED_RATE:
            row = (bad if share < SLOW_RATE else warning)("matmul", speed, fix)
            rows.append(replace(row, host=each.host, rank=each.rank))
    text = f"{middle / TERA:.3g} TFLOP/s, the median of {_ranks(burned)}"
    return rows or [ok("matmul", text)]


def _links(burned: Sequence[Burned]) -> list[Finding]:
    """Compare each link with the median of its kind: within or between nodes."""
    rows, medians = [], []
    for inside in (True, False):
        kind = "within a node" if inside else "between nodes"
        pairs = [
            (a, b)
            for a, b in zip(burned, [*burned[1:], *burned[:1]], strict=True)
            if a.link and (a.host == b.host) == inside
        ]
        if not pairs:
            continue
        middle = statistics.median_high(a.link for a, _ in pairs)
        medians.append(f"{middle / GIGA:.3g} GB/s {kind}")
        for a, b in pairs:
            share = a.link / middle
            if share >= NOTED_LINK:
                continue
            text = (
                f"rank {a.rank} ({a.host}) to rank {b.rank} ({b.host}): {a.link / GIGA:.3g} GB/s, "
                f"{share:.0%} of the median {kind}"
            )
            fix = "look at cable, port errors (ethtool -S, ibstat) and load of both; exclude one"
            row = (bad if share < SLOW_LINK else warning)("link", text, fix)
            rows.append(replace(row, host=a.host, rank=a.rank))
    return rows or ([ok("link", ", ".join(medians))] if medians else [])


def _ranks(burned: Sequence[Burned]) -> str:
    return "1 rank" if len(burned) == 1 else f"{len(burned)} ranks"
