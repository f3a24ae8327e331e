"""What the training loop asks of a stage, and what all stages share."""

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
"""Images, (H, W, 3) uint8, and whole numbers, (n,), to be shown as a histogram."""


Means = Callable[..., dict[str, float]]
"""(records, change of a batch or None) -> mean losses over all replicas."""


class Task(Protocol, Generic[Record]):
    """What the loop needs to know about a stage."""

    train: BlockSource[Records]
    held_out: BlockSource[Records]
    program: Program
    units: int
    """Tokens (or pixels' tokens) of a sample, for tokens/s."""
    model_config: Any
    """The network's sizes, all filled in."""

    @property
    def unreadable(self) -> int:
        """Pairs that this rank met and passed over, for their pictures do not decode."""

    def batch(self, records: Sequence[Record], step: int, training: bool = True) -> Batch:
        """Tensors of some samples; randomness is keyed by (seed, step, sample)."""

    def facts(self) -> dict[str, Any]:
        """What a reader of the finished model must know."""

    def figures(
        self, means: Means, mine: Sequence[Record], records: Sequence[Record]
    ) -> tuple[dict[str, float], Pictures]:
        """Extra validation figures and pictures; all ranks call it together.

        `means` evaluates this replica's records (`mine`) of all held-out ones.
        """


def pad_text(texts: Sequence[Any], length: int) -> Tensor:
    """Ragged ids -> (B, length) int64, cut at `length`, PAD behind the end."""
    out = torch.full((len(texts), length), PAD, device="cpu")
    for row, text in zip(out, texts, strict=True):
        ids = np.asarray(text, np.int64)[:length]
        row[: len(ids)] = torch.from_numpy(ids)
    return out


def split_records(records: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Parts of equal size."""
    size = len(records) // parts
    return [records[i * size : (i + 1) * size] for i in range(parts)]


def hand_over(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; to a GPU from pinned memory and without waiting."""
    if device.type != "cuda":
        return {name: x.to(device) for name, x in batch.items()}
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}


def perplexity(codes: Tensor) -> float:
    """exp of the entropy of how often each code is used: 1 = collapsed, K = uniform."""
    shares = torch.bincount(codes.flatten()).double() / codes.numel()
    return math.exp(float(torch.special.entr(shares).sum()))
