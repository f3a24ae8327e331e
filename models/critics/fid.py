"""FID and IS from sums over blocks, so that any worker may compute any block."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError

SPLITS = 10
"""Parts over which the IS is averaged, as in its authors' code."""

Array = NDArray[np.float64]
_TOO_FEW = "a FID needs at least two drawn and two real pictures; give more captions"


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over feature vectors, in float64."""

    count: int
    total: Array
    """(D,)"""
    products: Array
    """(D, D): sum of outer products."""

    @staticmethod
    def of(features: NDArray[np.float32]) -> "Moments":
        """Sums of (n, D) features."""
        wide = features.astype(np.float64)
        return Moments(count=len(wide), total=wide.sum(0), products=wide.T @ wide)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            count=self.count + other.count,
            total=self.total + other.total,
            products=self.products + other.products,
        )

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / self.count)

    @property
    def covariance(self) -> Array:
        """The unbiased estimate, (D, D)."""
        centred = self.products - self.count * np.outer(self.mean, self.mean)
        return np.asarray(centred / (self.count - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Frechet distance of the normal distributions that have these moments: the FID.

    The trace of (C1 C2)^(1/2) is that of (C1^(1/2) C2 C1^(1/2))^(1/2), whose eigenvalues are real
    and not negative, also where a covariance is singular.
    Raises: InputError for fewer than two vectors.
    Source: arXiv 1706.08500, equation 6.
    """
    if min(first.count, second.count) < 2:
        raise InputError(_TOO_FEW)
    one, two = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    apart = first.mean - second.mean
    return float(apart @ apart + np.trace(one) + np.trace(two) - 2 * common)


def frechet_distance_of_few(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The same of few vectors with many features, (n, D) and (m, D), without a (D, D) matrix.

    With centred vectors A and B, divided by the roots of n - 1 and m - 1, the covariances are
    A^T A and B^T B, and the trace of their product's root is the sum of A B^T's singular values.
    Raises: InputError for fewer than two vectors.
    """
    if min(len(first), len(second)) < 2:
        raise InputError(_TOO_FEW)
    one, two = _centred(first), _centred(second)
    common = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    apart = first.astype(np.float64).mean(0) - second.astype(np.float64).mean(0)
    return float(apart @ apart + (one**2).sum() + (two**2).sum() - 2 * common)


def frechet_distance_of_sets(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The same by the smaller matrix: by (n, m) or, of more vectors than features, by (D, D).

    Raises: InputError for fewer than two vectors.
    """
    if min(len(first), len(second)) <= first.shape[1]:
        return frechet_distance_of_few(first, second)
    return frechet_distance(Moments.of(first), Moments.of(second))


def _centred(features: NDArray[Any]) -> Array:
    """(n, D) rows whose outer products sum to the unbiased covariance."""
    wide = features.astype(np.float64)
    return np.asarray((wide - wide.mean(0)) / np.sqrt(len(wide) - 1))


@dataclass(frozen=True, kw_only=True)
class ClassSums:
    """Sums over predicted distributions of classes, in float64."""

    count: int
    chances: Array
    """(C,): sum of p."""
    negentropy: float
    """Sum of p log p."""

    @staticmethod
    def of(logits: NDArray[np.float32]) -> "ClassSums":
        """Sums of the softmax of (n, C) logits."""
        wide = logits.astype(np.float64)
        log = wide - wide.max(1, keepdims=True)
        log -= np.log(np.exp(log).sum(1, keepdims=True))
        chances = np.exp(log)
        return ClassSums(
            count=len(wide), chances=chances.sum(0), negentropy=float((chances * log).sum())
        )

    def __add__(self, other: "ClassSums") -> "ClassSums":
        return ClassSums(
            count=self.count + other.count,
            chances=self.chances + other.chances,
            negentropy=self.negentropy + other.negentropy,
        )

    @property
    def score(self) -> float:
        """exp of the mean KL divergence of p from the mean p."""
        mean = self.chances / self.count
        positive = mean[mean > 0]
        return float(np.exp(self.negentropy / self.count - (positive * np.log(positive)).sum()))


def inception_score(parts: list[ClassSums]) -> tuple[float, float]:
    """Mean and standard deviation over parts of a set.

    Source: arXiv 1606.03498, section 4.
    """
    scores = [part.score for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def part_of(place: int, count: int, parts: int = SPLITS) -> int:
    """Index of the part that holds picture `place` when `count` pictures are cut equally."""
    parts = min(parts, count)
    return ((place + 1) * parts - 1) // count
