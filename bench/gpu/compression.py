"""PowerSGD of the 12B prior's gradients: the orthogonalisation against its three products."""

import statistics
from functools import partial

import torch

from bench.gpu.report import GpuReport, Target, at_least, rates, seconds
from parallel.compress.orthogonal import orthonormal


def compression(report: GpuReport) -> None:
    """One matrix of each shape of a resblock pair at the paper's rank."""
    device = report.device
    dim, rank = (64, 14) if report.tiny else (3968, 896)
    for long in (dim, 4 * dim):
        error = torch.randn(1, dim, long, device=device)
        q = torch.randn(1, long, rank, device=device)
        p = error @ q

        def products(error: torch.Tensor = error, q: torch.Tensor = q, p: torch.Tensor = p) -> None:
            torch.bmm(error, q)
            torch.bmm(error.mT, p)
            torch.bmm(p, q.mT)

        alone = statistics.median(seconds(products, device, 2, 5))
        spent = seconds(partial(orthonormal, [p]), device, 1, 3)
        ratio, every = rates(alone, spent)
        name, beside = f"{dim} x {long} at {rank}", f"{statistics.median(spent) * 1e3:.2f} ms"
        report.row(
            f"{name}: products over orthogonalisation",
            ratio,
            "x",
            at_least(1.0),
            baseline=f"{beside}, the three fp32 products {alone * 1e3:.2f}",
            spread=every,
        )
        basis = orthonormal([p])[0][0].double()
        off = basis.T @ basis - torch.eye(rank, device=device, dtype=torch.float64)
        report.row(
            f"{name}: furthest from orthonormal", float(off.abs().max()), "", Target(most=1e-5)
        )
