"""Bytes between rank 0 and others, over a binomial tree of messages between two ranks.

The parent of rank r is r without its lowest set bit. So half of the ranks exchange one message,
none more than log2(n), and neighbours are 1, 2, 4, ... ranks apart, as in gloo's barrier: a gather
opens no connections that a barrier does not open, too.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

_FIRST = 512
"""Bytes of the first message, which begins with the length of all; a second one has the rest."""
_HEAD = 8


class Tree:
    """One rank's place in the tree; all ranks of the tree must call the same methods in order."""

    def __init__(self, rank: int, ranks: Sequence[int], group: "dist.ProcessGroup | None") -> None:
        """`ranks` are global ranks, the root first; `rank`, the caller, is one of them."""
        self._ranks, self._group = ranks, group
        self._mine, self._reach = list(ranks).index(rank), 1
        while self._reach < len(ranks) and not self._mine & self._reach:
            self._reach *= 2

    def spread(self, data: bytes) -> bytes:
        """The root's bytes, on every rank."""
        if self._mine:
            data = self._receive(self._parent)
        for child in reversed(self._children):
            self._send(data, child)
        return data

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of all ranks in their order, on the root; empty on the others."""
        parts = [_framed(data), *(self._receive(child) for child in self._children)]
        if self._mine:
            self._send(b"".join(parts), self._parent)
            return []
        return list(_unframed(b"".join(parts)))

    @property
    def _parent(self) -> int:
        return self._ranks[self._mine - self._reach]

    @property
    def _children(self) -> list[int]:
        """The ranks below this one; each stands for itself and those up to the next."""
        steps = (2**i for i in range(self._reach.bit_length() - 1))
        return [self._ranks[self._mine + s] for s in steps if self._mine + s < len(self._ranks)]

    def _send(self, data: bytes, rank: int) -> None:
        data = _framed(data)
        for part in (data[:_FIRST].ljust(_FIRST, b"\0"), data[_FIRST:]):
            if part:
                host = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                dist.send(host, rank, group=self._group)

    def _receive(self, rank: int) -> bytes:
        first = self._bytes_from(rank, _FIRST)
        length = _length(first, 0)
        rest = length + _HEAD - _FIRST
        return first[_HEAD : _HEAD + length] + (self._bytes_from(rank, rest) if rest > 0 else b"")

    def _bytes_from(self, rank: int, count: int) -> bytes:
        host = torch.empty(count, dtype=torch.uint8, device="cpu")
        dist.recv(host, rank, group=self._group)
        return host.numpy().tobytes()


def _framed(data: bytes) -> bytes:
    return np.int64(len(data)).tobytes() + data


def _length(data: bytes, at: int) -> int:
    return int(np.frombuffer(data, np.int64, 1, at)[0])


def _unframed(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        start, at = at + _HEAD, at + _HEAD + _length(data, at)
        yield data[start:at]
