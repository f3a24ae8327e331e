"""Both ways to an orthonormal basis: a QR factorisation by hand, NumPy's, and edges of its checks.

P = (3, 1; 4, 3) has R = (5, 3; 0, 1) and Q = (0.6, -0.8; 0.8, 0.6).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.compress import orthogonal
from parallel.compress.orthogonal import cholesky_qr2, householder, orthonormal

P = torch.tensor([[[3.0, 1.0], [4.0, 3.0]]])
Q = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]])
BASE = torch.eye(3, 2)


def test_bases_by_hand() -> None:
    """The diagonal of R is positive, though LAPACK's is not; one of zeros leaves the basis."""
    for basis in (householder(P), cholesky_qr2(P)[0], orthogonal._once(P, P.mT @ P)[0]):
        torch.testing.assert_close(basis, Q, atol=1e-5, rtol=0)
    for cholesky in (None, False, True):
        torch.testing.assert_close(orthonormal([P], cholesky)[0], Q, atol=1e-5, rtol=0)
    assert householder(torch.zeros(1, 3, 2))[0].equal(BASE)


def test_bases_are_numpys_up_to_signs() -> None:
    draws = np.random.default_rng(0).standard_normal((4, 9, 3))
    given = torch.from_numpy(draws).float()
    basis, good = cholesky_qr2(given)
    assert good.tolist() == [True] * 4
    for i in range(4):
        q, r = np.linalg.qr(draws[i])
        expected = torch.from_numpy(q * np.sign(np.diag(r))).float()
        for ours in (basis[i], householder(given)[i]):
            torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_a_gram_matrix_has_a_factor_or_none() -> None:
    """Of I, and of 0, whose first pivot is no square of a positive number."""
    grams = torch.stack([torch.eye(2), torch.zeros(2, 2)])
    assert orthogonal._once(BASE.expand(2, 3, 2), grams)[1].tolist() == [True, False]


def _with_passes(monkeypatch: pytest.MonkeyPatch, *flags: list[bool]) -> None:
    """Both passes leave P as it is, and report these flags."""
    rows: Iterator[list[bool]] = iter(flags)
    monkeypatch.setattr(orthogonal, "_once", lambda p, gram: (p, torch.tensor(next(rows))))


def test_a_basis_needs_both_factors_and_a_first_pass_that_is_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of the last three lacks one; the third's squared columns are 1.15, 0.15 from 1."""
    p = torch.stack([BASE, BASE, 1.15**0.5 * BASE, BASE])
    _with_passes(monkeypatch, [True, False, True, True], [True, True, True, False])
    basis, good = orthogonal._two_passes(p)
    assert good.tolist() == [True, False, False, False] and basis.equal(p)


def test_near_is_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared columns of 1 + 1/4 are exactly a limit of 1/4 from orthonormal; 1.05 is near."""
    column = torch.tensor([[[1.0], [0.5], [0.0]]])
    _with_passes(monkeypatch, [True, True], [True, True], [True], [True])
    near = torch.cat([1.05**0.5 * BASE[None, :, :1], column])
    assert orthogonal._two_passes(near)[1].tolist() == [True, False]
    monkeypatch.setattr(orthogonal, "FIRST_ERROR", 0.25)
    assert orthogonal._two_passes(column)[1].tolist() == [False]


@pytest.mark.parametrize(("at_once", "parts"), [(13, [2, 2, 1]), (5, [1] * 5), (30, [5])])
def test_as_many_matrices_are_in_fp64_as_are_allowed(
    at_once: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five matrices of six elements; one at least."""
    sizes: list[int] = []
    both = orthogonal._two_passes

    def noted(p: Tensor) -> Any:
        sizes.append(len(p))
        return both(p)

    monkeypatch.setattr(orthogonal, "_two_passes", noted)
    monkeypatch.setattr(orthogonal, "AT_ONCE", at_once)
    basis, good = cholesky_qr2(BASE.repeat(5, 1, 1))
    assert sizes == parts and basis.equal(BASE.repeat(5, 1, 1)) and good.tolist() == [True] * 5


def test_the_device_chooses_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any stack on another device than the CPU, here `meta`, has all factored by Cholesky."""
    monkeypatch.setattr(orthogonal, "householder", lambda p: "householder")
    good = torch.tensor([True])
    monkeypatch.setattr(orthogonal, "cholesky_qr2", lambda p: ("cholesky", good))
    here, there = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, device="meta")
    assert orthonormal([here]) == ["householder"]
    assert orthonormal([here, there]) == ["cholesky"] * 2
    assert orthonormal([there], cholesky=False) == ["householder"]
    assert orthonormal([here], cholesky=True) == ["cholesky"]
    assert orthonormal([], cholesky=True) == []


def test_what_is_no_basis_is_householders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three matrices, the second; a stack without such a one stays as it was made."""
    made = torch.full((3, 2, 2), 7.0)
    flags = iter([torch.tensor([True, False, True]), torch.tensor([True] * 3)])
    monkeypatch.setattr(orthogonal, "cholesky_qr2", lambda p: (made.clone(), next(flags)))
    mended, kept = orthonormal([P.repeat(3, 1, 1)] * 2, cholesky=True)
    torch.testing.assert_close(mended, torch.stack([made[0], Q[0], made[2]]), atol=1e-5, rtol=0)
    assert kept.equal(made)
