"""Tensors of several replicas: averaged in one all-reduce, and compared, bit by bit."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group


def flat_average(
    tensors: Sequence[Tensor],
    group: "dist.ProcessGroup | None",
    size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Concatenate tensors and average them over the `size` ranks of a group; None = one rank.

    `dtype`: type in which they are sent and added up; the result has that of the tensors.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if group is None:
        return flat
    if dtype is not None and dtype != flat.dtype:
        sent = (flat / size).to(dtype)
        dist.all_reduce(sent, group=group)
        return sent.to(flat.dtype)
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


def digest(tensors: Sequence[Tensor]) -> str:
    """A digest of the fingerprints of some tensors."""
    return sha256(repr(fingerprint(tensors).tolist()).encode()).hexdigest()


def different(rows: Sequence[Mapping[str, str]]) -> list[int]:
    """The ranks whose replica differs from the majority's; `rows` of all ranks: group -> digest.

    Two replicas that differ are both named: there is no majority.
    """
    wrong: set[int] = set()
    for name in {name for row in rows for name in row}:
        digests = {rank: row[name] for rank, row in enumerate(rows) if name in row}
        (usual, count), *_ = Counter(digests.values()).most_common(1)
        majority = usual if 2 * count > len(digests) else ""
        wrong |= {rank for rank, each in digests.items() if each != majority}
    return sorted(wrong)


def group_name(group: Group) -> str:
    """A name of this rank's group, which no other group of the grid has."""
    ranks = dist.get_process_group_ranks(group.handle)
    return f"{ranks[0]} to {ranks[-1]}, {len(ranks)} ranks"
