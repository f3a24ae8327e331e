"""The two halves of a linear's backward pass: gradients of its input, and of its weights.

Zero-bubble schedules run them apart. torch's own functions compute what is asked for alone; a
custom autograd function sees `needs_input_grad == (True, True)` in both, and asks here instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Half = Literal["both", "input", "weights"]
_asked: list[Half] = ["both"]


@contextmanager
def only(half: Half) -> Iterator[None]:
    """Ask for one half of the backward passes that run in the context."""
    _asked.append(half)
    try:
        yield
    finally:
        _asked.pop()


def wants_input() -> bool:
    """True if gradients of inputs are asked for."""
    return _asked[-1] != "weights"


def wants_weights() -> bool:
    """True if gradients of weights are asked for."""
    return _asked[-1] != "input"
