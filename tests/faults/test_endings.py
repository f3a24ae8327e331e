"""Every layout ends by itself, repeatedly: no rank keeps waiting for another."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import pytest

from bench.parity import CASES, train

EIGHT = "TP2xPP2xDP2 pipe"
TIMES = int(os.environ.get("TAPIR_ENDINGS", "1"))
LAYOUTS = [case.name for case in CASES] if TIMES > 1 else [EIGHT]
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


@pytest.mark.world
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_ends_by_itself(layout: str) -> None:
    case = next(case for case in CASES if case.name == layout)
    for _ in range(TIMES):
        with _limited():
            rows = train(replace(case.precise("fp32"), steps=1))
        assert len(rows) == 1
