"""The protocol between the training loop and a stage, and shared helpers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_pipeline.streaming.stream import BlockSource, Records
from models.prior import PAD
from parallel.engines.protocol import Batch, Program

Record = TypeVar("Record", contravariant=True)


Pictures = dict[str, Any]
"""Name -> image, (H, W, 3) uint8, or integers, (n,), to show as a histogram."""


Means = Callable[..., dict[str, float]]
"""(records, optional change of a batch) -> mean losses over all replicas."""

Beat = Callable[[str], None]
"""Gives a sign of life: `Heart.beat`."""


def no_beat(doing: str) -> None:
    """A beat without a supervisor."""


class Task(Protocol, Generic[Record]):
    """A stage, as the training loop sees it."""

    train: BlockSource[Records]
    held_out: BlockSource[Records]
    program: Program
    units: int
    """Tokens per sample, for tokens/s."""
    model_config: Any
    """The network's sizes, including those from the data."""

    @property
    def unreadable(self) -> int:
        """Number of pairs that this rank replaced, because their pictures do not decode."""

    def note_used(self, records: Sequence[Record]) -> None:
        """Count the samples of a batch as used: batches are made ahead, and some never used."""

    def batch(self, records: Sequence[Record], step: int, training: bool = True) -> Batch:
        """Tensors of these samples; randomness is keyed by (seed, step, sample).

        Called by several threads at a time.
        """

    def facts(self) -> dict[str, Any]:
        """Facts to store with the model, e.g. the digests of its dVAE and tokenizer."""

    def figures(
        self, means: Means, mine: Sequence[Record], records: Sequence[Record], beat: Beat = no_beat
    ) -> tuple[dict[str, float], Pictures]:
        """Extra validation figures and pictures; collective over all ranks.

        `means` evaluates this replica's share `mine` of the held-out `records`; figures that take
        long call `beat`.
        """


def pad_text(texts: Sequence[Any], length: int) -> Tensor:
    """Ragged ids -> (B, length) int64, truncated to `length` and padded with PAD."""
    out = torch.full((len(texts), length), PAD, device="cpu")
    for row, text in zip(out, texts, strict=True):
        ids = np.asarray(text, np.int64)[:length]
        row[: len(ids)] = torch.from_numpy(ids)
    return out


def split_records(records: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Split records into parts of equal size."""
    size = len(records) // parts
    return [records[i * size : (i + 1) * size] for i in range(parts)]


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in pinned memory if the device is a GPU; pinning takes as long as a copy."""
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):
        return {name: x.pin_memory() for name, x in batch.items()}


def hand_over(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; asynchronously from pinned memory if it is a GPU."""
    if device.type != "cuda":
        return {name: x.to(device) for name, x in batch.items()}
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}


def perplexity(codes: Tensor) -> float:
    """exp of the entropy of the code frequencies: 1 = collapsed, K = uniform."""
    shares = torch.bincount(codes.flatten()).double() / codes.numel()
    return math.exp(float(torch.special.entr(shares).sum()))
