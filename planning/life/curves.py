"""Costs of a rank over world sizes: a table, and whether they grow faster than the logarithm."""

import math
from collections.abc import Sequence
from typing import Any

from core.config import to_json
from planning.life.life import Life, Spread

MARGIN = 1.25
RULE = (
    "a median or a worst rank at n ranks may be at most "
    f"{MARGIN:g} * log2(n) / log2(least world) times that of the least world"
)


def too_fast(lives: Sequence[Life]) -> list[str]:
    """The counts that grow faster than the logarithm of the world, by RULE."""
    lives = sorted(lives, key=lambda life: life.plan.world)
    problems = []
    for life in lives[1:]:
        first, world = lives[0].plan.world, life.plan.world
        factor = MARGIN * math.log2(world) / math.log2(first)
        for name, spread in life.counts.items():
            for kind, at_first in to_json(lives[0].counts[name]).items():
                value = getattr(spread, kind)
                if value > factor * at_first:
                    problems.append(
                        f"{name} ({kind} rank): {at_first:g} at {first} ranks, "
                        f"{value:g} at {world}, above {factor * at_first:.4g}"
                    )
    return problems


def table(lives: Sequence[Life]) -> list[str]:
    """Lines for the terminal: a column for each world; counts as median and worst rank."""
    lives = sorted(lives, key=lambda life: life.plan.world)
    rows = [["ranks", *(f"{life.plan.world:,}" for life in lives)]]
    for name in lives[0].seconds:
        rows.append([f"{name}, s", *(f"{life.seconds.get(name, 0):.1f}" for life in lives)])
    rows.append(["median rank / worst rank:", *("" for _ in lives)])
    for name in lives[0].counts:
        rows.append([name, *(_text(life.counts[name]) for life in lives)])
    rows.append(["with time, not in the rule:", *("" for _ in lives)])
    for name in lives[0].with_time:
        rows.append([name, *(_text(life.with_time[name]) for life in lives)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]


def facts(lives: Sequence[Life]) -> dict[str, Any]:
    """The table for --json; one world says nothing about growth."""
    problems = too_fast(lives)
    grows = not problems if len(lives) > 1 else None
    return {"grows_with_log": grows, "rule": RULE, "problems": problems} | {
        "worlds": [to_json(life) for life in lives]
    }


def _text(spread: Spread) -> str:
    return f"{_number(spread.median)} / {_number(spread.worst)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"
