"""Keyed randomness for torch: initial weights by parameter name, noise by sample."""

import math
import re

import torch
from torch import Tensor, nn

from core.keys import KeyPart, key_int
from parallel.placement import Placement, placement_of

ROWS_A_KEY = 64
"""Rows of a matrix that are drawn together."""


def generator(*parts: KeyPart) -> torch.Generator:
    """Open a CPU generator that depends on the key alone."""
    return torch.Generator().manual_seed(key_int(*parts))


def gumbel_noise(shape: tuple[int, ...], *parts: KeyPart) -> Tensor:
    """Standard Gumbel noise for one sample, from its key."""
    return _gumbel(shape, key_int(*parts), torch.device("cpu"))


def gumbel_noises(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel noise for some samples, drawn on their device, from one key each.

    Shapes: (B,) int64 -> (B, *shape).
    """
    return torch.stack([_gumbel(shape, key, keys.device) for key in keys.tolist()])


def _gumbel(shape: tuple[int, ...], key: int, device: torch.device) -> Tensor:
    draws = torch.Generator(device).manual_seed(key)
    drawn = torch.empty(shape, device=device).exponential_(generator=draws)
    return -drawn.clamp_min(1e-20).log_()


@torch.no_grad()
def init_normal(module: nn.Module, seed: int, std: dict[str, float], prefix: str = "") -> None:
    """Draw every matrix of a module from N(0, std^2), keyed by `prefix` + the parameter's name.

    `std` maps a name's ending to its standard deviation, the first match counts. Biases become
    zero and gains one: torch would draw some of them from its global state. A rank that holds
    some rows of a matrix draws these alone, with the values that one rank would draw.
    Raises: KeyError if a matrix has no entry.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue  # laid out only
        if parameter.dim() > 1:
            scale = next((value for end, value in std.items() if name.endswith(end)), None)
            if scale is None:
                raise KeyError(f"{name} has no initial scale")
            part = placement_of(parameter)
            parameter[part.rows :].zero_()
            parameter[: part.rows].copy_(_rows(part, seed, prefix + name) * scale)
        elif name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("norm.weight") or re.search(r"norm\d\.weight$", name):
            parameter.fill_(1.0)


def _rows(part: Placement, seed: int, name: str) -> Tensor:
    """Standard normal rows of a placement, drawn in blocks whose keys hold the row number."""
    width = part.shape[1:]
    if part.rows == 0:
        return torch.zeros(0, *width, device="cpu")
    first, last = part.first // ROWS_A_KEY, (part.first + part.rows - 1) // ROWS_A_KEY
    blocks = [
        torch.randn(
            ROWS_A_KEY, *width, generator=generator(seed, name, block, "init"), device="cpu"
        )
        for block in range(first, last + 1)
    ]
    start = part.first - first * ROWS_A_KEY
    return torch.cat(blocks)[start : start + part.rows]


@torch.no_grad()
def init_fan_in(module: nn.Module, seed: int, one_hot: str = "") -> None:
    """Draw convolutions from N(0, 1 / fan-in) and set biases to zero, keyed by name.

    The layer named `one_hot` sees one input at a time, so its fan-in is one: scaled by the size
    of a codebook, the codes would be too faint for the decoder to hear (docs/LOG.md).
    Source: openai/DALL-E, its Conv2d.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue  # laid out only
        if parameter.dim() > 1:
            fan_in = 1 if name == f"{one_hot}.weight" else parameter[0].numel()
            draws = generator(seed, name, "init")
            drawn = torch.randn(parameter.shape, generator=draws, device="cpu")
            parameter.copy_(drawn / math.sqrt(fan_in))
        else:
            parameter.zero_()
