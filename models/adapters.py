"""Low-rank adapters of a prior (LoRA): names, initial values, and merging into the weights.

A linear of the blocks gets `lora_a` and `lora_b` beside its `weight`; everything else is frozen.
Source: arXiv 2106.09685, section 4.1: A is Gaussian, B zero, so that training starts at the base.
"""

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from models.config import LoraConfig
from models.initialization import draw_normal
from parallel.engines.protocol import Draw, Layer, Program
from parallel.placement import Placement, placement_of
from parallel.tensor.layers import ColumnLinear, RowLinear, VocabularyHead

A, B = ".lora_a", ".lora_b"
"""Endings of an adapter's two matrices."""


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's matrix."""
    return name.endswith((A, B))


def adapted(program: Program, lora: LoraConfig, seed: int) -> Program:
    """The program with adapters on its blocks' linears, which alone are trained and saved.

    Without a rank, the program itself.
    """
    if not lora.rank:
        return program
    layers = [_adapted(layer, lora, seed) for layer in program.layers]
    return replace(program, layers=layers, compressed=(), saves_frozen=False)


def _adapted(layer: Layer, lora: LoraConfig, seed: int) -> Layer:
    draw = partial(_draw, layer, seed)

    def build() -> nn.Module:
        module = attach(layer.build(), lora)
        for name, parameter in module.named_parameters():
            if is_adapter(name) and not parameter.is_meta:
                flat = parameter.detach().view(-1)
                draw(name, placement_of(parameter), 0, flat)
        return module

    return replace(layer, build=build, draw=draw if layer.draw else None)


def attach(module: nn.Module, lora: LoraConfig) -> nn.Module:
    """Freeze a layer, and add adapters of zeros to its linears, which are trained."""
    module.requires_grad_(False)
    for part in _linears(module):
        part.adapt(lora.rank, lora.scale)
    return module


def _linears(module: nn.Module) -> list[ColumnLinear | RowLinear]:
    """The linears of a block; the head keeps its own."""
    parts = [part for part in module.modules() if isinstance(part, ColumnLinear | RowLinear)]
    return [part for part in parts if not isinstance(part, VocabularyHead)]


def _draw(layer: Layer, seed: int, name: str, part: Placement, start: int, out: Tensor) -> None:
    """Fill a part of a parameter as `Layer.draw` does; A from N(0, 1 / inputs), B with zeros."""
    if name.endswith(B):
        out.zero_()
    elif name.endswith(A):
        std = max(part.shape) ** -0.5
        draw_normal(seed, {A: std}, f"{layer.name}.", name, part, start, out)
    else:
        inner: Draw | None = layer.draw
        assert inner is not None, "only a program whose layers draw asks for a part"
        inner(name, part, start, out)


def factors(rows: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """An adapter's matrices in the order whose product is added to a weight of `rows` rows.

    Shapes: of a column linear, stored (outputs, inputs): a (rank, inputs), b (outputs, rank); of a
    row linear, stored (inputs, outputs): a (inputs, rank), b (rank, outputs). The rank is below
    both -> (rows, rank), (rank, columns).
    """
    return (b, a) if len(b) == rows else (a, b)
