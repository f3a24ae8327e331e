"""Intervals and agreement of votes; imports no torch.

Counts are (captions, choices) integers: how many raters picked each choice for each caption.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.keys import KeyPart, keyed_rng

Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution: two-sided 95%."""
RESAMPLES = 2000
_TAILS = (0.025, 0.975)
Interval = tuple[float, float] | None
Counts = NDArray[np.int64]


def wilson(successes: int, trials: int) -> Interval:
    """95% interval of a share; None without trials.

    Source: Wilson, Probable inference, JASA 22, 1927.
    """
    if not trials:
        return None
    share, z2 = successes / trials, Z * Z / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled(captions: int, *key: KeyPart) -> NDArray[Any]:
    """How often each caption is drawn, with replacement, in each of RESAMPLES bootstrap samples.

    Captions are drawn, not votes: votes on the same pictures depend on one another.

    Shapes: (RESAMPLES, captions).
    """
    draw = keyed_rng("bootstrap", *key)
    return draw.multinomial(captions, np.full(captions, 1 / captions), size=RESAMPLES)


def percentiles(values: NDArray[Any]) -> Interval:
    """95% percentile interval of bootstrap values; undefined ones (NaN) are left out."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, _TAILS)
    return float(low), float(high)


def shares(counts: Counts, weights: NDArray[Any]) -> NDArray[Any]:
    """Share of each choice among all votes, with each caption counted `weights` times.

    Shapes: (captions, choices), (R, captions) -> (R, choices); NaN without votes.
    """
    totals = weights @ counts
    with np.errstate(invalid="ignore"):
        return np.asarray(totals / totals.sum(1, keepdims=True))


def alpha(counts: Counts, weights: NDArray[Any]) -> NDArray[Any]:
    """Krippendorff's alpha of nominal votes; captions may have different numbers of votes.

    1 is full agreement, 0 that of chance. NaN if all votes are the same choice, or no caption has
    two votes.

    Shapes: (captions, choices), (R, captions) -> (R,).
    Source: Krippendorff, Computing Krippendorff's alpha-reliability, 2011, section C.
    """
    paired = counts.sum(1) >= 2
    counts, weights = counts[paired].astype(np.float64), weights[:, paired]
    sizes = counts.sum(1)
    unlike = (sizes**2 - (counts**2).sum(1)) / (sizes - 1)
    totals = weights @ counts
    votes = totals.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = weights @ unlike / votes
        expected = (votes**2 - (totals**2).sum(1)) / (votes * (votes - 1))
        return np.asarray(np.where(expected > 0, 1 - observed / expected, np.nan))


def agreeing_pairs(counts: Counts) -> float | None:
    """Share of pairs of raters who picked the same, averaged over captions; None without pairs.

    Source: Fleiss, Measuring nominal scale agreement among many raters, 1971: the mean of P_i.
    """
    counts = counts[counts.sum(1) >= 2]
    if not len(counts):
        return None
    sizes = counts.sum(1)
    return float(((counts * (counts - 1)).sum(1) / (sizes * (sizes - 1))).mean())


def majority(row: NDArray[Any]) -> int | None:
    """The choice with more than half of a caption's votes; None if there is none."""
    best = int(row.argmax())
    return best if 2 * row[best] > row.sum() else None
