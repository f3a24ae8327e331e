"""Which part of a global tensor a rank's parameter holds.

Tensor parallelism cuts every matrix along axis 0 (matrices whose input is cut are stored as
(in, out)), so that a part is a run of rows, followed by padding rows if the degree does not
divide. Padding is zero, stays zero, and is never saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from checkpoint.format import Reader, StateSlice


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Rows [first, first + rows) of a global tensor; a scalar is whole."""

    shape: tuple[int, ...]
    """Global shape."""
    first: int
    rows: int
    """Real rows; a parameter may have padding rows after them."""
    split: bool
    """True if each tensor rank has rows of its own, False if all hold the same."""
    tied_to: str = ""
    """Global name of the parameter that this one is a copy of; empty = it is none."""
    stream: bool = False
    """A gain or bias of the residual stream: with sequence parallelism a tensor rank's gradient of
    it comes from its own positions."""

    @property
    def numel(self) -> int:
        """Real elements."""
        return self.rows * prod(self.shape[1:]) if self.shape else 1

    @property
    def first_element(self) -> int:
        """First element of the rows in the flat global tensor."""
        return self.first * prod(self.shape[1:]) if self.shape else 0

    def flat_shard(self, rank: int, count: int) -> "Placement | None":
        """The matrix rows in the rank-th run of `count` elements; None if a row is cut in two.

        ZeRO-3 cuts the flat parameter into such runs.
        """
        columns = self.shape[-1] if len(self.shape) == 2 else 0
        if not columns or count % columns:
            return None
        each = count // columns
        before = min(each * rank, self.rows)
        return Placement(
            shape=self.shape,
            first=self.first + before,
            rows=min(each, self.rows - before),
            split=True,
        )

    def slice(self, name: str, kind: str, start: int, data: Tensor) -> StateSlice | None:
        """The slice of elements start.. of the flat local parameter; None if all are padding."""
        real = min(data.numel(), max(0, self.numel - start))
        if real == 0:
            return None
        flat = data.detach().reshape(-1)[:real]
        first = self.first_element + start
        return StateSlice(name=name, kind=kind, shape=self.shape, start=first, data=flat)

    def read(self, reader: Reader, name: str, kind: str, start: int, count: int) -> Tensor:
        """Read elements [start, start + count) of the flat local parameter; padding is zero."""
        elements = torch.zeros(count, device="cpu")
        real = min(count, max(0, self.numel - start))
        first = self.first_element + start
        elements[:real] = reader.flat(name, kind, first, first + real)
        return elements


def place(parameter: nn.Parameter, placement: Placement) -> None:
    """Attach its placement to a parameter."""
    parameter.tapir_placement = placement  # type: ignore[attr-defined]


def placement_of(parameter: nn.Parameter) -> Placement:
    """The placement that `place` attached; by default a parameter is whole."""
    noted: Placement | None = getattr(parameter, "tapir_placement", None)
    if noted is not None:
        return noted
    shape = tuple(parameter.shape)
    return Placement(shape=shape, first=0, rows=shape[0] if shape else 1, split=False)


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device; its parameters keep their placements.

    torch may create new parameters when the device type changes.
    """
    noted = {name: getattr(p, "tapir_placement", None) for name, p in module.named_parameters()}
    module.to(device)
    for name, parameter in module.named_parameters():
        if (placement := noted[name]) is not None:
            place(parameter, placement)
    return module


def tie(layers: Mapping[str, nn.Module]) -> None:
    """Replace copies by the parameters that they are tied to, where these are on this rank."""
    for layer in layers.values():
        for name, parameter in list(layer.named_parameters()):
            owner, _, inner = placement_of(parameter).tied_to.partition(".")
            if owner in layers:
                module, _, last = name.rpartition(".")
                setattr(layer.get_submodule(module), last, layers[owner].get_parameter(inner))


def global_names(layers: nn.Module) -> dict[str, nn.Parameter]:
    """Global name -> parameter of named layers, sorted; copies have their owner's name."""
    named = {placement_of(p).tied_to or name: p for name, p in layers.named_parameters()}
    return {name: named[name] for name in sorted(named)}


def rows_of(rows: int, unit: int, rank: int, size: int) -> tuple[int, int, int]:
    """Split `rows` in whole units (e.g. heads) over `size` ranks.

    Returns (first row, real rows, rows with padding) of a rank; all ranks have equal padded rows.
    """
    units = -(-rows // unit)
    each = -(-units // size) * unit
    first = min(rank * each, rows)
    return first, min(each, rows - first), each
