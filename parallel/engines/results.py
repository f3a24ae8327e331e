"""Means of losses over micro-batches and ranks."""

import torch

from parallel.engines.protocol import Losses
from parallel.world import World


def mean_losses(seen: list[Losses], world: World) -> dict[str, float]:
    """Average each loss over the micro-batches of a step, then over the ranks.

    All ranks must hold batches of one size, so that the mean of means is the mean.
    """
    names = list(seen[0])
    values = torch.stack(
        [torch.stack([row[name].detach().float() for name in names]) for row in seen]
    )
    averaged = world.mean(values.mean(0))
    return dict(zip(names, averaged.tolist(), strict=True))
