"""Every layout ends by itself, again and again: no rank is left waiting for another."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import pytest

from bench.parity import CASES, train

TIMES = int(os.environ.get("TAPIR_ENDINGS", "1"))
LAYOUTS = ["DP2 reference", "TP2xPP2xDP2 pipe", "PP4 pipe", "TP2xDP2 ZeRO-3", "DP2 ZeRO-2", "paper"]
LIMIT = 120
"""Seconds of one run, start-up included."""


@contextmanager
def _limited() -> Iterator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("the ranks did not end by themselves")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if TIMES > 1 else LAYOUTS[1:2])
def test_a_layout_ends_by_itself(layout: str) -> None:
    case = next(case for case in CASES if case.name.startswith(layout))
    for _ in range(TIMES):
        with _limited():
            rows = train(replace(case.precise("fp32"), steps=1))
        assert len(rows) == 1
