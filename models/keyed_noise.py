"""Keyed noise: the bits of numpy.random.Philox, and Gumbel noise computed from them.

A draw is a function of (key, position, place in the sample) and of nothing else: not of the
device, the batch, the rank, or how many draws came before. Philox4x64-10 turns a counter and a key
into 256 bits; block j of a position is that of counter (j + 1, position, 0, 0) under key (key, 0),
where NumPy begins as well: `Philox(key=key, counter=[0, position, 0, 0])`. A word is two 32-bit
draws, its low half first. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".
"""

from math import prod

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_A_BLOCK = 8
"""32-bit draws of a block."""


def gumbel_noise(keys: Tensor, shape: tuple[int, ...], position: int | Tensor = 0) -> Tensor:
    """Standard Gumbel noise for some samples, drawn on their keys' device.

    -log(-log(u)) with u = (bits + 1/2) / 2^32, in float64 and rounded at the end, so that devices
    agree except for the last bit of rare values.
    Shapes: keys (B,) int64, not negative; a position of all, or (B,) int64 -> (B, *shape) float32.
    """
    bits = draw_bits(keys, prod(shape), position)
    uniform = bits.double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().float().view(len(keys), *shape)


def draw_bits(keys: Tensor, count: int, position: int | Tensor = 0) -> Tensor:
    """The first 32-bit draws of each key at a position.

    Shapes: keys (B,) int64, not negative; a position of all, or (B,) int64 -> (B, count) int64 in
    [0, 2^32).
    """
    if keys.device.type == "cpu":
        return _by_numpy(keys, count, position)
    return philox_bits(keys, -(-count // _A_BLOCK), position)[:, :count]


def _by_numpy(keys: Tensor, count: int, position: int | Tensor) -> Tensor:
    words = -(-count // 2)
    draws = np.empty((len(keys), words), "<u8")
    positions = [position] * len(keys) if isinstance(position, int) else position.tolist()
    philox = np.random.Philox(key=0)
    state = philox.state  # setting it is ten times faster than creating a generator
    for row, key, place in zip(draws, keys.tolist(), positions, strict=True):
        state["state"]["key"][0], state["state"]["counter"][1] = key, place
        philox.state = state
        row[:] = philox.random_raw(words)
    return torch.from_numpy(draws.view("<u4")[:, :count].astype(np.int64))


def philox_bits(keys: Tensor, blocks: int, position: int | Tensor) -> Tensor:
    """The same draws in torch integers, on any device: (B,) -> (B, 8 * blocks)."""
    first = torch.arange(1, blocks + 1, device=keys.device)
    zero = torch.zeros_like(first)
    places = torch.full_like(first, position) if isinstance(position, int) else position[:, None]
    counter = [first, places, zero, zero]
    pair = [keys[:, None], torch.zeros_like(keys)[:, None]]
    for number in range(ROUNDS):
        if number:
            pair = [key + _signed(step) for key, step in zip(pair, _WEYL, strict=True)]
        high0, low0 = _product(_MULTIPLIERS[0], counter[0])
        high1, low1 = _product(_MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ pair[0], low1, high0 ^ counter[3] ^ pair[1], low0]
    words = torch.stack(torch.broadcast_tensors(*counter), -1)
    return torch.stack([words & _LOW, _upper(words)], -1).flatten(1)


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 64 bits of a product of 64-bit words."""
    high, low = factor >> 32, factor & _LOW
    upper, lower = _upper(words), words & _LOW
    cross, other, least = lower * high, upper * low, lower * low
    carried = _upper(least) + (cross & _LOW) + (other & _LOW)
    top = upper * high + _upper(cross) + _upper(other) + _upper(carried)
    return top, words * _signed(factor)


def _upper(words: Tensor) -> Tensor:
    """The upper 32 bits; torch's shift copies the sign."""
    return (words >> 32) & _LOW


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word
