"""The fastest layouts of engine torch that fit."""

from dataclasses import dataclass

from planning.estimate.hardware import Hardware
from planning.estimate.overlapped.layout import Layout, layouts
from planning.estimate.overlapped.memory import torch_bytes
from planning.estimate.overlapped.prior import TorchEstimate, estimate_torch, rough_torch
from planning.estimate.search import precision_of
from training.config import PriorTrain

PLAYED = 12
"""Layouts that are played through, after a rough estimate of all: the best of each mesh."""


@dataclass(frozen=True, kw_only=True)
class TorchRow:
    """A layout that fits, with its time and its bytes."""

    estimate: TorchEstimate
    bytes_: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes_.values())


def search_torch(settings: PriorTrain, world: int, hardware: Hardware) -> list[TorchRow]:
    """The best layout of each mesh, fastest first; none for fp32, adapters and frozen weights."""
    whole = not (settings.lora.rank or settings.freeze)
    if hardware.cores or world == 1 or not whole or precision_of(settings, hardware) == "fp32":
        return []
    best: list[tuple[float, Layout, dict[str, int]]] = []
    for group in layouts(settings, world, hardware):
        rows = []
        for layout in group:
            bytes_ = torch_bytes(settings, layout, hardware)
            if sum(bytes_.values()) <= hardware.usable:
                rows.append((rough_torch(settings, layout, hardware), layout, bytes_))
        best += sorted(rows, key=lambda row: row[0])[:1]
    best.sort(key=lambda row: row[0])
    rows_ = [
        TorchRow(estimate=estimate_torch(settings, layout, hardware), bytes_=bytes_)
        for _, layout, bytes_ in best[:PLAYED]
    ]
    return sorted(rows_, key=lambda row: row.estimate.seconds)
