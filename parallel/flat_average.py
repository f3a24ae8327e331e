"""Average tensors over a group of ranks as one flat tensor, in one all-reduce."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def flat_average(tensors: Sequence[Tensor], group: "dist.ProcessGroup | None", size: int) -> Tensor:
    """The tensors end to end, averaged over the `size` ranks of a group; None has one rank."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if group is not None:
        dist.all_reduce(flat, group=group)
        flat /= size
    return flat


def copy_parts(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a flat tensor's parts into the tensors that it was made of."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
