"""CholeskyQR2 against Householder's QR, also for matrices that it must leave to the latter."""

import pytest
import torch
from torch import Tensor

from parallel.compress import orthogonal
from parallel.compress.orthogonal import cholesky_qr2, householder, orthonormal

ROWS, LONG, RANK = 60, 90, 8


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _gradient(singular: Tensor) -> Tensor:
    """A matrix with these singular values, in fp32."""
    left, right = (torch.linalg.qr(_draw(n, len(singular), seed=n).double()).Q for n in (60, 90))
    return ((left * singular) @ right.T).float()


GRADIENTS = {
    "gaussian": _draw(ROWS, LONG),
    "condition 1e4": _gradient(torch.logspace(0, -4, 30, dtype=torch.float64)),
    "condition 1e8": _gradient(torch.logspace(0, -8, 30, dtype=torch.float64)),
    "large, condition 1e8": 1e12 * _gradient(torch.logspace(0, -8, 30, dtype=torch.float64)),
    "rank 3": _gradient(torch.ones(3, dtype=torch.float64)),
    "large, rank 3": 1e12 * _gradient(torch.ones(3, dtype=torch.float64)),
    "zero": torch.zeros(ROWS, LONG),
}


def _factor(gradient: Tensor) -> Tensor:
    return gradient @ _draw(LONG, RANK, seed=1)


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_projected_gradient_is_that_of_householder(name: str) -> None:
    """Bases of factors with dependent columns differ, but not where the gradient is."""
    gradient = GRADIENTS[name]
    p = _factor(gradient)[None]
    ours, theirs = (orthonormal([p], cholesky=on)[0][0] for on in (True, False))
    for basis in (ours, theirs):
        torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=2e-6, rtol=0)
    projected = theirs @ (theirs.T @ gradient)
    largest = float(gradient.abs().max())
    torch.testing.assert_close(ours @ (ours.T @ gradient), projected, atol=2e-6 * largest, rtol=0)


def test_the_bases_of_well_conditioned_factors_are_equal() -> None:
    """Also their signs, so that a replica with another device has the same basis."""
    p = torch.stack([_factor(GRADIENTS["gaussian"]), _draw(ROWS, RANK, seed=5)])
    basis, good = cholesky_qr2(p)
    assert good.tolist() == [True, True]
    torch.testing.assert_close(basis, householder(p), atol=2e-6, rtol=0)


def test_householder_takes_over_matrix_by_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack, only matrices without a Cholesky factor, or far from orthonormal after it."""
    twice = 1e12 * _draw(ROWS, RANK)
    twice[:, 4] = twice[:, 2]
    p = torch.stack([_factor(GRADIENTS["gaussian"]), twice, _factor(GRADIENTS["condition 1e4"])])
    assert cholesky_qr2(p)[1].tolist() == [True, False, True]
    given: list[Tensor] = []
    monkeypatch.setattr(
        orthogonal, "householder", lambda bad: (given.append(bad), householder(bad))[1]
    )
    basis = orthonormal([p, p[:1]], cholesky=True)[0]
    assert [len(bad) for bad in given] == [1] and given[0].equal(p[1:2])
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK).expand(3, -1, -1), atol=2e-6,
                               rtol=0)  # fmt: skip


def test_what_is_called_a_basis_is_one() -> None:
    """Of matrices with equal columns rounding decides whether a Cholesky factor exists."""
    refused = 0
    for seed in range(20):
        p = 1e12 * _draw(1, ROWS, RANK, seed=seed)
        p[0, :, 5] = p[0, :, 4] = p[0, :, seed % 4] * 2.0 ** (seed % 3)
        basis, good = cholesky_qr2(p)
        refused += not good
        off = float((basis.mT @ basis - torch.eye(RANK)).abs().max())
        assert not good or off < 2e-6
        mended = orthonormal([p], cholesky=True)[0]
        torch.testing.assert_close(mended.mT @ mended, torch.eye(RANK)[None], atol=2e-6, rtol=0)
    assert refused


def test_many_matrices_are_factored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    p = _draw(5, ROWS, RANK)
    whole = cholesky_qr2(p)[0]
    monkeypatch.setattr(orthogonal, "AT_ONCE", 2 * ROWS * RANK + 1)
    assert cholesky_qr2(p)[0].equal(whole)


def test_non_finite_factors_are_no_reason_to_fail() -> None:
    p = torch.full((1, ROWS, RANK), float("nan"))
    assert not cholesky_qr2(p)[1].item()
    assert orthonormal([], cholesky=True) == []
