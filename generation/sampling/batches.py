"""Batches of candidates of the requested size, or of the size that fits into free memory."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from core.errors import ConfigError
from core.launch_environment import local_ranks
from core.log import LOG
from core.memory import host_memory
from generation.sampling.kv_cache import CacheShape

_GB = 1e9
_KEPT = 0.1
"""Fraction of the free memory that is reserved for what is not counted."""
_START = 40
"""Bytes per element of the hidden states during prefill: heads and an MLP layer in fp32."""

_OTHERWISE = "with --precision bf16, without --guidance, or on more ranks (--tensor, --pipeline)"


def free_memory(device: torch.device) -> int:
    """Bytes that a rank may take: free memory, and what torch's allocator has cached."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory()[0] // local_ranks(os.environ)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some candidates of some captions."""

    captions: slice
    candidates: slice

    @property
    def rows(self) -> int:
        """Candidates in all."""
        return _length(self.captions) * _length(self.candidates)

    def halves(self) -> list["Batch"]:
        """Two halves: of the captions, or of the candidates of a single caption."""
        if _length(self.captions) > 1:
            rows = _cut(self.captions, 2)
            return [Batch(captions=part, candidates=self.candidates) for part in rows]
        return [Batch(captions=self.captions, candidates=part) for part in _cut(self.candidates, 2)]


def batches(captions: int, count: int, most: int) -> Iterator[Batch]:
    """Split `count` candidates of each caption evenly into batches of at most `most`.

    A batch holds all candidates of some captions, or some candidates of one caption.
    """
    together = max(1, most // count)
    for part in _cut(slice(0, captions), -(-captions // together)):
        for candidates in _cut(slice(0, count), -(-count // most)):
            yield Batch(captions=part, candidates=candidates)


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory that decoding takes on this rank, by the size of the batch."""

    caches: CacheShape
    captions: int
    candidates: int
    """Of each caption."""
    given: int = 0
    """Image tokens that are prefilled with the text."""
    streams: int = 1
    """2 with guidance: each candidate again with the empty caption."""
    lanes: int = 1
    """Pipeline stages; a batch's candidates are split into as many lanes."""

    def bytes(self, batch: int) -> int:
        """Bytes of the largest of `batches`: its caches, and the hidden states of its prefill."""
        config, one = self.caches.config, self.caches.of_one()
        captions = min(self.captions, max(1, batch // self.candidates))
        each = min(self.candidates, batch)
        text = captions * min(self.lanes, each) * one.text_bytes
        start = captions * (config.text_length + self.given) * config.dim * _START
        return self.streams * (text + captions * each * one.image_bytes + start)

    def most(self, batch: int, free: int) -> int:
        """Candidates up to `batch` that fit together into free memory; 0 if not even one does."""
        rows = range(1, min(batch, self.captions * self.candidates) + 1)
        return bisect_right(rows, int(free * (1 - _KEPT)), key=self.bytes)


def fitting(
    need: Need, batch: int, free: int, device: torch.device, least: Callable[[int], int]
) -> int:
    """The batch size that fits on all ranks; logs a line if it is smaller than `batch`.

    `least`: minimum over all ranks, which decode together.
    Raises: ConfigError if not even one candidate fits.
    """
    requested = min(batch, need.captions * need.candidates)
    mine = need.most(batch, free)
    agreed = least(mine)
    where = f"{free / _GB:.2f} GB are free on {device}" if mine == agreed else "a rank has less"
    if not agreed:
        raise ConfigError(
            f"decoding one candidate takes {need.bytes(1) / _GB:.2f} GB beside the weights, "
            f"{where}: end what holds memory there, or decode {_OTHERWISE}"
        )
    if agreed < requested:
        LOG.info(
            "a batch of %d candidates takes %.2f GB, %s: it is split, %d or fewer together",
            *(requested, need.bytes(requested) / _GB, where, agreed),
        )
    return agreed


def check_rows(
    caches: CacheShape, rows: int, free: int, device: torch.device, least: Callable[[int], int]
) -> None:
    """Check that a running batch fits into free memory on all ranks.

    Beside its caches it takes the hidden states of one candidate, with guidance, from its text to
    its last code, for prefill and for draws from canonical logits.
    Raises: ConfigError with the number of rows that fit.
    """
    config, one = caches.config, max(1, caches.of_one().bytes)
    states = 2 * (config.text_length + config.image_length) * config.dim * _START
    most = least(max(0, int(free * (1 - _KEPT)) - states) // one)
    if most < rows:
        raise ConfigError(
            f"{rows} rows take {(rows * one + states) / _GB:.2f} GB beside the weights, and "
            f"{free / _GB:.2f} GB are free on {device}; {most} fit on every rank: start with as "
            f"many, or {_OTHERWISE}"
        )


def without_memory(batch: Batch, device: torch.device, alone: bool) -> list[Batch]:
    """Halve a batch that ran out of device memory, with a warning.

    Raises: ConfigError for a batch of one candidate, or if other ranks wait in the same batch.
    """
    if not alone or batch.rows == 1:
        raise ConfigError(
            f"{device} ran out of memory while {batch.rows} candidates were decoded together: "
            f"decode with a smaller --batch, {_OTHERWISE}"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    halves = batch.halves()
    LOG.warning(
        "%s ran out of memory while %d candidates were decoded together; drawing them again, %d "
        "together",
        *(device, batch.rows, halves[-1].rows),
    )
    return halves


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)


def _cut(whole: slice, parts: int) -> list[slice]:
    """Cut into parts whose lengths differ by at most one."""
    first, length = int(whole.start), _length(whole)
    bounds = [first + length * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]
