"""Orthonormal bases of tall matrices: CholeskyQR2 on GPUs, Householder's QR on CPUs.

On GPUs Householder's QR runs matrix after matrix, and column after column, while CholeskyQR2 is
four matmuls and two factorisations for a whole stack. It works in fp64, since its first Gram matrix
has the square of the condition number. On CPUs LAPACK's Householder is faster (docs/LOG.md).
Source: Fukaya et al. 2014, CholeskyQR2; Yamazaki et al. 2015 (wider Gram matrices).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SHIFT = 1e-6
"""Added to P's diagonal, so that a zero gradient still has an orthonormal basis."""
FIRST_ERROR = 0.1
"""Distance of the first pass' basis from orthonormal from which the second one mends it."""
AT_ONCE = 2**22
"""Elements that are in fp64 at a time."""


def orthonormal(stacks: Sequence[Tensor], cholesky: bool | None = None) -> list[Tensor]:
    """Orthonormal columns that span those of each matrix, in the order of its columns.

    The diagonal of R is positive, so that the bases of both methods are equal. One wait for the
    device covers all stacks. `cholesky`: None chooses by the device.
    Shapes: stacks of (n, rows, rank) float32, rank <= rows -> the same.
    """
    shifted = [p.clone() for p in stacks]
    for p in shifted:
        p.diagonal(dim1=1, dim2=2).add_(SHIFT)
    if cholesky is None:
        cholesky = any(p.device.type != "cpu" for p in shifted)
    if not cholesky or not shifted:
        return [householder(p) for p in shifted]
    made = [cholesky_qr2(p) for p in shifted]
    if bool(torch.cat([good for _, good in made]).all()):
        return [basis for basis, _ in made]
    return [_mended(p, *one) for p, one in zip(shifted, made, strict=True)]


def householder(p: Tensor) -> Tensor:
    """The basis by Householder's reflections; also of matrices with dependent columns."""
    basis, r = torch.linalg.qr(p)
    signs = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    turned: Tensor = basis * signs[:, None, :]
    return turned


def cholesky_qr2(p: Tensor) -> tuple[Tensor, Tensor]:
    """The basis by two Cholesky factorisations, and for each matrix whether it is one.

    A matrix is too ill-conditioned if a factorisation breaks down, or if the first pass leaves
    columns so far from orthonormal that the second cannot mend them. Nothing waits for the device.
    """
    parts = [_two_passes(part) for part in p.split(max(1, AT_ONCE // p[0].numel()))]
    bases, good = zip(*parts, strict=True)
    return torch.cat(bases), torch.cat(good)


def _two_passes(p: Tensor) -> tuple[Tensor, Tensor]:
    basis = p.double()
    eye = torch.eye(p.shape[-1], dtype=basis.dtype, device=p.device)
    basis, good = _once(basis, basis.mT @ basis)
    gram = basis.mT @ basis
    near = (gram - eye).abs().amax((1, 2)) < FIRST_ERROR  # False for NaN
    basis, again = _once(basis, gram)
    return basis.float(), good & near & again


def _once(p: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """P R^-1 for the Cholesky factor R of P's Gram matrix, and where that exists."""
    lower, info = torch.linalg.cholesky_ex(gram)
    basis: Tensor = torch.linalg.solve_triangular(lower.mT, p, upper=True, left=False)
    return basis, info == 0


def _mended(p: Tensor, basis: Tensor, good: Tensor) -> Tensor:
    """Householder's basis in place of those that are none."""
    bad = torch.nonzero(~good).flatten()
    if len(bad):
        basis[bad] = householder(p[bad])
    return basis
