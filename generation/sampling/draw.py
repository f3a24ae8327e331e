"""From logits to a code: temperature, top-k, top-p and guidance, with keyed noise.

A draw is the argmax of the logits plus Gumbel noise. Logits of the same row differ by rounding
between batch sizes, which changes a draw only if two codes are that close. `choose` reports such
rows, so that the sampler can draw them from canonical logits (`Decoder.canonical_logits`): then a
key gives the same picture in every batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from generation.config import DrawSettings

CLOSE = 2e-4
"""Two logits closer than this may swap places by rounding; their error is at most 1e-4."""
_NEVER = -torch.inf
_TIES = 32
"""Codes after the first top_k that are searched for ties."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One code a row, and whether rounding could have changed it."""

    codes: Tensor
    """(B,) int64."""
    sure: Tensor
    """(B,) bool."""


def guided(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from the empty caption's logits towards and beyond the caption's.

    Shapes: (2 B, K), the captions' rows before the empty caption's -> (B, K).
    Source: arXiv 2207.12598, with 1 as no guidance.
    """
    with_text, without = logits.chunk(2)
    return without + scale * (with_text - without)


def choose(
    logits: Tensor, noise: Tensor | None, settings: DrawSettings, canonical: bool = False
) -> Choice:
    """Pick one code a row: (B, K) logits, and Gumbel noise unless the temperature is 0.

    `canonical`: the logits are those of `Decoder.canonical_logits`, free of rounding differences.
    """
    close = 0.0 if canonical else CLOSE * max(1.0, 2 * settings.guidance - 1)
    allowed = _allowed(logits, settings, close)
    scores = logits if noise is None else logits / settings.temperature + noise
    if allowed is not None:
        scores = scores.masked_fill(logits < allowed.limit[:, None], _NEVER)
    best, codes = scores.topk(2, 1)
    sure = best[:, 0] - best[:, 1] > close / (settings.temperature or 1.0)
    if allowed is not None:
        won = logits.gather(1, codes[:, :1])[:, 0]
        sure &= won > allowed.doubtful + close
    return Choice(codes=codes[:, 0], sure=sure)


@dataclass(frozen=True, kw_only=True)
class _Allowed:
    """Which codes may be drawn."""

    limit: Tensor
    """(B,) lower cutoff with rounding tolerance: codes below it may not be drawn."""
    doubtful: Tensor
    """(B,) upper cutoff with rounding tolerance: codes above it may certainly be drawn."""


def _allowed(logits: Tensor, settings: DrawSettings, close: float) -> _Allowed | None:
    count = logits.shape[1]
    top_k = min(settings.top_k or count, count)
    nucleus = settings.top_p < 1
    if settings.temperature == 0 or (top_k == count and not nucleus):
        return None
    few = not nucleus and top_k + _TIES < count
    ordered = logits.topk(top_k + _TIES if few else count, 1).values
    last = ordered[:, top_k - 1 : top_k]
    most = (ordered >= last - close).sum(1)
    tied = most > top_k
    least = torch.where(tied, (ordered > last + close).sum(1), top_k)
    most = torch.where(tied, most, top_k)
    if nucleus:
        warm = ordered / settings.temperature
        places = torch.arange(count, device=logits.device)
        shares = torch.softmax(warm.masked_fill(places >= top_k, _NEVER), 1)
        before = shares.cumsum(1) - shares
        most = torch.minimum(most, (before < settings.top_p + close).sum(1).clamp_min(1))
        least = torch.minimum(least, (before < settings.top_p - close).sum(1))
    at = least.clamp(max=ordered.shape[1] - 1)[:, None]
    edge = ordered.gather(1, at)[:, 0].masked_fill(least >= most, _NEVER)
    return _Allowed(limit=ordered.gather(1, most[:, None] - 1)[:, 0], doubtful=edge)
