"""Which tensors of a file do not fit the network of some sizes."""

from typing import Any

import torch

from checkpoint.tensors import Shapes
from training.export.weights import KINDS


def misfits(stage: str, config: Any, shapes: Shapes) -> list[str]:
    """Tensors whose shapes differ from a network of these sizes, including missing and extra ones.

    Each is its name with both shapes, in words.
    """
    with torch.device("meta"):
        network = KINDS[stage].build(config)
    prefix = KINDS[stage].prefix
    expected = {f"{prefix}{name}": tuple(p.shape) for name, p in network.named_parameters()}
    wrong = sorted(n for n in {*expected, *shapes} if expected.get(n) != shapes.get(n))
    return [_misfit(name, expected.get(name), shapes.get(name)) for name in wrong]


def _misfit(name: str, expected: tuple[int, ...] | None, stored: tuple[int, ...] | None) -> str:
    if stored is None:
        return f"{name}, which is missing"
    if expected is None:
        return f"{name}, which the network has not"
    return f"{name}, which is {stored} and should be {expected}"
