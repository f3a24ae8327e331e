"""Initial weights, keyed by parameter name."""

import math
import re
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from core.keys import KeyPart, key_int
from parallel.placement import Placement, placement_of

ROWS_A_KEY = 64
"""Rows of a matrix that are drawn together."""
_BIAS, _GAIN = re.compile(r"bias$"), re.compile(r"norm\d?\.weight$")


def generator(*parts: KeyPart) -> torch.Generator:
    """Open a CPU generator that depends on the key alone."""
    return torch.Generator().manual_seed(key_int(*parts))


def init_normal(module: nn.Module, seed: int, std: dict[str, float], prefix: str = "") -> None:
    """Draw every matrix of a module from N(0, std^2), keyed by `prefix` + the parameter's name.

    `std` maps a name's suffix to its standard deviation; the first match counts. Biases become
    zero and gains one: torch would draw some of them from its global state. A rank draws only its
    rows of a sharded matrix, with the same values as on one rank. Meta parameters are skipped.
    Raises: KeyError if a matrix has no entry.
    """
    for name, parameter in module.named_parameters():
        known = parameter.dim() > 1 or _BIAS.search(name) or _GAIN.search(name)
        if known and not parameter.is_meta:
            flat = parameter.detach().view(-1)
            draw_normal(seed, std, prefix, name, placement_of(parameter), 0, flat)


def draw_normal(
    seed: int,
    std: dict[str, float],
    prefix: str,
    name: str,
    part: Placement,
    start: int,
    out: Tensor,
) -> None:
    """Fill `out` with what `init_normal` puts at elements start.. of a flat parameter.

    Shapes: (n,); elements after the placement's real ones are zero.
    Raises: KeyError if a parameter is neither bias nor gain and has no entry in `std`.
    """
    if len(part.shape) > 1:
        scale = next((value for end, value in std.items() if name.endswith(end)), None)
        if scale is None:
            raise KeyError(f"{name} has no initial scale")
        key = part.tied_to or prefix + name  # a copy starts as its owner
        for at, values in _runs(part, seed, key, start, out.numel()):
            out[at : at + values.numel()].copy_(values.mul_(scale))
    elif _BIAS.search(name):
        out.zero_()
    elif _GAIN.search(name):
        out.fill_(1.0)
    else:
        raise KeyError(f"{name} is neither a matrix nor a bias nor a gain")
    out[max(0, part.numel - start) :].zero_()


def _runs(
    part: Placement, seed: int, name: str, start: int, count: int
) -> Iterator[tuple[int, Tensor]]:
    """Standard normal values of elements [start, start + count) of a placement, run by run.

    They are drawn in blocks of rows whose keys hold the row number of the global matrix.
    Yields (offset of the run, its values); the buffer is reused by the next run.
    """
    width = prod(part.shape[1:])
    begin = part.first_element + start
    end = part.first_element + min(start + count, part.numel)
    size = ROWS_A_KEY * width
    values = torch.empty(size, device="cpu")
    for block in range(begin // size, -(-end // size)):
        values.normal_(generator=generator(seed, name, block, "init"))
        first, last = max(block * size, begin), min((block + 1) * size, end)
        yield first - begin, values[first - block * size : last - block * size]


@torch.no_grad()
def init_fan_in(module: nn.Module, seed: int, one_hot: str = "") -> None:
    """Draw convolutions from N(0, 1 / fan-in) and set biases to zero, keyed by name.

    The layer named `one_hot` has one non-zero input, so its fan-in is one: divided by the codebook
    size, the decoder would ignore the codes (docs/LOG.md).
    Source: openai/DALL-E, its Conv2d.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue  # shapes only
        if parameter.dim() > 1:
            fan_in = 1 if name == f"{one_hot}.weight" else parameter[0].numel()
            draws = generator(seed, name, "init")
            drawn = torch.randn(parameter.shape, generator=draws, device="cpu")
            parameter.copy_(drawn / math.sqrt(fan_in))
        else:
            parameter.zero_()
