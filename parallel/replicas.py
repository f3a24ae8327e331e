"""Tensors of several replicas: averaged in one all-reduce, and compared, bit by bit."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group


def flat_average(tensors: Sequence[Tensor], group: "dist.ProcessGroup | None", size: int) -> Tensor:
    """Concatenate tensors and average them over the `size` ranks of a group; None = one rank."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if group is not None:
        dist.all_reduce(flat, group=group)
        flat /= size
    return flat


def copy_parts(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy the parts of a flat tensor back into its tensors."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 per tensor: the sum of its bit patterns; any single bit flip changes it."""
    sums = [t.detach().reshape(-1).view(_INTEGER[t.element_size()]).sum() for t in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device="cpu")


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def different(tensors: Sequence[Tensor], group: Group) -> list[int]:
    """Global ranks of the group whose tensors differ from the majority's; the same on all ranks.

    Two replicas that differ are both named: there is no majority.
    """
    if group.handle is None or group.size == 1:
        return []
    mine = fingerprint(tensors)
    fingerprints = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(fingerprints, mine, group=group.handle)
    rows = [tuple(row.tolist()) for row in fingerprints]
    (usual, count), *_ = Counter(rows).most_common(1)
    ranks = dist.get_process_group_ranks(group.handle)
    if 2 * count <= group.size and len(set(rows)) > 1:
        return list(ranks)
    return [rank for rank, row in zip(ranks, rows, strict=True) if row != usual]
