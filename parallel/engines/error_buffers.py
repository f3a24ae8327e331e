"""The error buffers of compression in a checkpoint: one a replica, or their mean.

Gradients are averaged over the replicas, so what a resumed run owes is the mean of the buffers,
whatever its number of replicas. The mean is sharded: the flat matrices of a rank, joined, are cut
into one run a replica, which that replica stores, and reads again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.format import MEAN_ERROR, Reader, StateSlice
from parallel.mesh import Group
from parallel.placement import Placement

OWN = "error@"
"""Kind of the buffer of replica R is `error@R`."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flat local matrix, which one replica stores."""

    name: str
    start: int
    stop: int
    owner: int
    """Index of the replica in its group."""


def pieces(places: Mapping[str, Placement], replicas: int) -> Iterator[Piece]:
    """Cut the flat matrices, joined in order, into `replicas` runs of equal length."""
    each = -(-sum(place.numel for place in places.values()) // replicas)
    at = 0
    for name, place in places.items():
        start = 0
        while start < place.numel:
            owner = (at + start) // each
            stop = min(place.numel, (owner + 1) * each - at)
            yield Piece(name, start, stop, owner)
            start = stop
        at += place.numel


def own_slices(
    errors: Mapping[str, Tensor], places: Mapping[str, Placement], group: Group
) -> Iterator[StateSlice]:
    """This replica's buffers, whole."""
    for name, error in errors.items():
        part = places[name].slice(name, f"{OWN}{group.rank}", 0, error.contiguous())
        if part is not None:
            yield part


def mean_slices(
    errors: Mapping[str, Tensor], places: Mapping[str, Placement], group: Group
) -> Iterator[StateSlice]:
    """This replica's run of the mean; collective over the group: all must exhaust it.

    Reduced piece by piece, so that it takes the memory of one matrix and not of all buffers.
    """
    for name, cut in groupby(pieces(places, group.size), lambda piece: piece.name):
        flat = errors[name].reshape(-1)
        for piece in cut:
            part = flat[piece.start : piece.stop].clone()
            if group.handle is not None:
                dist.reduce(part, group=group.handle, group_dst=piece.owner)
            if piece.owner == group.rank:
                mean = places[name].slice(name, MEAN_ERROR, piece.start, part / group.size)
                if mean is not None:
                    yield mean


def read_errors(
    reader: Reader, places: Mapping[str, Placement], group: Group, device: torch.device
) -> dict[str, Tensor]:
    """The buffers that this replica starts with, flat; collective over the group.

    Its own if the checkpoint has one for each replica of the group, else the mean of the stored
    ones; zero if there are none. Each replica reads its run of the mean, and gets the other runs
    from the other replicas.
    """
    whole = {f"{OWN}{replica}" for replica in range(group.size)}
    errors, owed = {}, {}
    for name, place in places.items():
        kinds = _kinds(reader, name)
        if set(kinds) == whole:
            errors[name] = place.read(reader, name, f"{OWN}{group.rank}", 0, place.numel)
            continue
        errors[name] = torch.zeros(place.numel, device="cpu")
        if kinds:
            owed[name] = place
    runs = list(pieces(owed, group.size))
    if group.handle is None:
        for piece in runs:
            errors[piece.name][piece.start : piece.stop] = _mean(reader, owed, piece)
        return errors
    read = {piece: _mean(reader, owed, piece) for piece in runs if piece.owner == group.rank}
    for piece in runs:
        sent = torch.empty(piece.stop - piece.start, device=device)
        if piece in read:
            sent.copy_(read.pop(piece))
        dist.broadcast(sent, group=group.handle, group_src=piece.owner)
        errors[piece.name][piece.start : piece.stop] = sent
    return errors


def _kinds(reader: Reader, name: str) -> list[str]:
    """The stored kinds of a matrix's buffers."""
    return [kind for kind in reader.kinds(name) if kind == MEAN_ERROR or kind.startswith(OWN)]


def _mean(reader: Reader, places: Mapping[str, Placement], piece: Piece) -> Tensor:
    """The mean over the replicas that stored a buffer."""
    kinds, place, count = _kinds(reader, piece.name), places[piece.name], piece.stop - piece.start
    total = torch.zeros(count, device="cpu")
    for kind in kinds:
        total += place.read(reader, piece.name, kind, piece.start, count)
    return total / len(kinds)
