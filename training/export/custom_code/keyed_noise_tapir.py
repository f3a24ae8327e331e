"""Tapir's keyed draws as a `LogitsProcessor`: a key gives the codes that `tapir sample` draws.

The argmax of logits / temperature + Gumbel noise is a draw from their softmax. The noise is a
function of key and position alone: bits of Philox4x64-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3"). Runs on CPUs and CUDA; needs float64.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from transformers import LogitsProcessor

CLOSE = 2e-4
"""Two logits closer than this may swap places by rounding."""
LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10


def candidate_key(seed: int, caption: str, candidate: int) -> int:
    """The key of a candidate of `tapir sample CAPTION --seed SEED`, 63 bits."""
    text = f"i:{seed}/s:{caption}/i:{candidate}/s:sample"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class KeyedNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds each row's keyed noise to its logits; use it with do_sample=False.

    In fp32, rows whose two best codes rounding could swap are computed again by `canonical`, so
    that a row's codes do not depend on its batch. Temperature 0: the most likely codes.
    """

    def __init__(
        self,
        keys: Sequence[int],
        text_length: int,
        temperature: float = 1.0,
        canonical: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`keys`: one a row of `input_ids`; `canonical`: logits (rows, codes) of `input_ids`."""
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature} must be 0 (the most likely code) or above")
        self._keys, self._text, self._temperature = list(keys), text_length, temperature
        self._canonical = canonical

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Shapes: (B, text_length + n), (B, codes) -> (B, codes)."""
        if len(self._keys) != len(scores):
            raise ValueError(
                f"{len(scores)} rows of input_ids need as many keys, not {len(self._keys)}"
            )
        position, scale = input_ids.shape[1] - self._text, self._temperature or 1.0
        noise = torch.zeros_like(scores)
        if self._temperature:
            keys = torch.tensor(self._keys, device=scores.device)
            noise = gumbel_noise(keys, scores.shape[1], position)
        noisy = scores / scale + noise
        if self._canonical is not None:
            best = noisy.topk(2, 1).values
            for row in (best[:, 0] - best[:, 1] <= CLOSE / scale).nonzero().flatten().tolist():
                logits = self._canonical(input_ids[row : row + 1])[0]
                allowed = logits.masked_fill(scores[row].isneginf(), -torch.inf)
                noisy[row] = allowed / scale + noise[row]
        return noisy


def gumbel_noise(keys: Tensor, count: int, position: int) -> Tensor:
    """Standard Gumbel noise of some keys at a position, (B,) int64 -> (B, count) float32."""
    bits = philox_bits(keys, -(-count // 8), position)[:, :count]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log().float()


def philox_bits(keys: Tensor, blocks: int, position: int) -> Tensor:
    """32-bit draws in int64, those of NumPy's Philox: (B,) -> (B, 8 * blocks)."""
    first = torch.arange(1, blocks + 1, device=keys.device)
    zero = torch.zeros_like(first)
    counter = [first, torch.full_like(first, position), zero, zero]
    pair = [keys[:, None], torch.zeros_like(keys)[:, None]]
    for number in range(ROUNDS):
        if number:
            pair = [key + _signed(step) for key, step in zip(pair, WEYL, strict=True)]
        high0, low0 = _product(MULTIPLIERS[0], counter[0])
        high1, low1 = _product(MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ pair[0], low1, high0 ^ counter[3] ^ pair[1], low0]
    words = torch.stack(torch.broadcast_tensors(*counter), -1)
    return torch.stack([words & LOW, _upper(words)], -1).flatten(1)


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 64 bits of a product of 64-bit words."""
    high, low = factor >> 32, factor & LOW
    upper, lower = _upper(words), words & LOW
    cross, other, least = lower * high, upper * low, lower * low
    carried = _upper(least) + (cross & LOW) + (other & LOW)
    return (
        upper * high + _upper(cross) + _upper(other) + _upper(carried),
        words * _signed(factor),
    )


def _upper(words: Tensor) -> Tensor:
    return (words >> 32) & LOW


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word
