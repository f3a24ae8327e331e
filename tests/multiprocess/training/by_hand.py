"""PowerSGD training of one process in plain torch, to compare meshes with: none of its code is
theirs but the model's and its loss'."""

from typing import Any

import torch
from torch import Tensor

from bench.parity import MODEL, OPTIM, SEED, batch_of
from core.keys import key_int
from models.prior import COMPRESSED, build_prior, prior_loss

PARTS = 2
"""Every matrix is cut along its first axis into two, each with half of the rank."""


def train_by_hand(rank: int, steps: int) -> list[dict[str, float]]:
    """Losses and gradient norms: full-batch gradients, factored with error feedback, clipped."""
    layers = build_prior(MODEL, SEED)
    names = dict(layers.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in names.values() if p.dim() > 1]},
            {"params": [p for p in names.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
    )
    owed: dict[tuple[str, int], Tensor] = {}
    rows = []
    for step in range(steps):
        state: Any = batch_of(step, MODEL)
        for layer in layers.values():
            state = layer(state)
        loss = prior_loss(state, batch_of(step, MODEL), MODEL.text_weight)["loss"]
        loss.backward()
        for name, parameter in names.items():
            assert parameter.grad is not None
            for i, part in enumerate(
                parameter.grad.chunk(PARTS) if name.endswith(COMPRESSED) else ()
            ):
                whole = part + owed.get((name, i), 0)
                part.copy_(_carried(whole, name, i, rank // PARTS))
                owed[name, i] = whole - part
        norm = float(torch.nn.utils.clip_grad_norm_(names.values(), OPTIM.clip_norm))
        rows.append({"loss": float(loss.detach()), "grad_norm": norm})
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * min(1.0, (step + 1) / OPTIM.warmup)
        optimizer.step()
        optimizer.zero_grad()
    return rows


def _carried(matrix: Tensor, name: str, part: int, rank: int) -> Tensor:
    """The part of M that PowerSGD sends: the projection on an orthonormal P of M Q (appendix E)."""
    if matrix.shape[0] > matrix.shape[1]:
        return _carried(matrix.T, name, part, rank).T
    draws = torch.Generator().manual_seed(key_int(SEED, name, part, "powersgd"))
    product = matrix @ torch.randn(matrix.shape[1], rank, generator=draws)
    basis = torch.linalg.qr(product + 1e-6 * torch.eye(*product.shape)).Q
    return basis @ (basis.T @ matrix)
