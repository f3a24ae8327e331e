"""The record of faults: what was injected, what came of it, how long it took."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

_ROWS: list[tuple[int, str, str, float]] = []


class Record:
    """One fault: `fault(number, what)` when it is injected, `fault.outcome(text)` at the end."""

    def __init__(self) -> None:
        self._number, self._what = 0, ""
        self._began = time.monotonic()

    def __call__(self, number: int, what: str) -> None:
        self._number, self._what, self._began = number, what, time.monotonic()

    def outcome(self, text: str, seconds: float | None = None) -> None:
        """Note what came of it; seconds since the injection unless they are given."""
        taken = time.monotonic() - self._began if seconds is None else seconds
        _ROWS.append((self._number, self._what, text, taken))


@pytest.fixture
def fault() -> Iterator[Record]:
    """Notes a fault of the list in docs/reliability.md; numbers above 25 are the extra ones."""
    yield Record()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print fault -> outcome -> seconds."""
    if _ROWS:
        terminalreporter.section("faults")
    for number, what, outcome, seconds in sorted(_ROWS):
        terminalreporter.write_line(f"{number:>3}  {what} -> {outcome} -> {seconds:.1f} s")
