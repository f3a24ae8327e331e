"""The record of faults: injection, outcome, seconds."""

import time

import pytest


class Record:
    """One fault: `fault(number, what)` when it is injected, `fault.outcome(text)` at the end."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties
        self._number, self._what = 0, ""
        self._began = time.monotonic()

    def __call__(self, number: int, what: str) -> None:
        self._number, self._what, self._began = number, what, time.monotonic()

    def outcome(self, text: str, seconds: float | None = None) -> None:
        """Record the outcome; seconds are counted from the injection unless given."""
        taken = time.monotonic() - self._began if seconds is None else seconds
        self._properties.append(("fault", (self._number, self._what, text, taken)))


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Record:
    """Records a fault of the table in docs/reliability.md; numbers above 25 are extra."""
    return Record(request.node.user_properties)
