"""Pins of the layers that travel with an export: widths, masks, layouts and devices by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.config import to_json
from models.attention.masks import full_mask
from parallel.device import CPU
from tests.unit.models.test_models import CONFIG
from training.export.custom_code import prior_tapir
from training.export.custom_code.dvae_tapir import Quantizer, coder
from training.export.custom_code.prior_tapir import PriorBlock, _Linear, _linear, _mask, _turns

DVAE: dict[str, Any] = {
    "quantizer": "gumbel", "codebook": 6, "vector": 3, "levels": (), "gain": 0.0,
    "groups": 1, "blocks": 1, "bottleneck": 8, "width": 4, "code_width": 5,
}  # fmt: skip
META = torch.device("meta")


def test_widths_of_a_coder_by_hand() -> None:
    """The encoder is 4 wide and the decoder begins with 5; an eighth of 4 channels is 1."""
    encoder, decoder = (coder(DVAE, each).eval() for each in (False, True))
    assert encoder.get_parameter("input.weight").shape == (4, 3, 7, 7)
    assert decoder.get_parameter("input.weight").shape == (5, 6, 1, 1)
    for each, inward in ((encoder, 4), (decoder, 5)):
        widths = [each.get_parameter(f"g0b0.convs.{i}.weight").shape[:2] for i in range(4)]
        assert widths == [(1, inward), (1, 1), (1, 1), (4, 1)]


@pytest.mark.parametrize("default", [CPU, META])
def test_bounds_of_three_levels_are_a_thousandth_wider(default: torch.device) -> None:
    """1.001 tanh(x / 32) is rounded: 0.4992 becomes 0.4997, and 0.4998 becomes 0.5003.

    Wherever new tensors are made by default.
    """
    quantizer = Quantizer({**DVAE, "quantizer": "fsq", "levels": (3,), "codebook": 3})
    rows = [32 * math.atanh(share) for share in (0.4992, 0.4998, -0.4992, -0.4998)]
    outputs = torch.tensor(rows, device=CPU).view(1, 1, 1, 4)
    with default:
        codes = quantizer.codes(outputs)
        inputs = quantizer.inputs(codes)
    assert codes.tolist() == [[[1, 2, 1, 0]]] and inputs.tolist() == [[[[0.0, 1.0, 0.0, -1.0]]]]


@pytest.mark.parametrize(
    ("widths", "strides"),
    [([(2, 3), (2, 1)], (1, 4)), ([(2, 2)], (2, 1)), ([(3, 1), (3, 1)], (3, 1))],
)
def test_canonical_weights_are_one_matrix(
    widths: list[tuple[int, int]], strides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored by inputs if it has more outputs than inputs; a square by outputs."""
    seen: list[Any] = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        seen.append((tuple(weight.shape), weight.stride()))
        return x

    monkeypatch.setattr(prior_tapir, "F", SimpleNamespace(linear=linear))
    layers, x = [_Linear(*each) for each in widths], torch.zeros(1, widths[0][0])
    _linear(x, layers, canonical=True)
    assert seen == [((sum(outputs for _, outputs in widths), widths[0][0]), strides)]
    seen.clear()
    _linear(x, layers, canonical=False)
    assert [shape for shape, _ in seen] == [(outputs, inputs) for inputs, outputs in widths]


def test_every_fourth_layer_attends_to_columns() -> None:
    sizes = {**to_json(CONFIG), "layers": 11}
    kinds = [PriorBlock(sizes, layer)._kind[0] for layer in range(11)]
    row = ["row", "column", "row", "row"]
    assert kinds == [*row, *row, "row", "column", "conv"]


@pytest.mark.parametrize(("mlp", "hidden"), [("gated", 192), ("gelu", 200)])
def test_widths_of_an_mlp_by_hand(mlp: str, hidden: int) -> None:
    """Of 50 channels: 50 / 24 is above 2, so 3 times 64; else 4 times 50."""
    block = PriorBlock({**to_json(CONFIG), "dim": 50, "heads": 5, "mlp": mlp}, 0)
    assert block.up.weight.shape == block.down.weight.shape == (hidden, 50)


def test_masks_and_turns_are_on_the_cpu_under_another_default() -> None:
    kinds, grid = ("row", "column", "conv"), (2, 4, 3)
    _mask.cache_clear()
    _turns.cache_clear()
    with META:
        masks = {kind: _mask(kind, *grid, 3) for kind in kinds}
        cosines, sines = _turns(*grid, 8)
    for kind, mask in masks.items():
        assert mask.equal(full_mask(kind, 2, 4, 3, 3))
    ones = (cosines.square() + sines.square()).flatten().tolist()
    assert cosines.shape == (14, 1, 4) and ones == pytest.approx([1.0] * 56)
    last = [5.0, 0.05, 4.0, 0.04]  # row 2 + 3 and column 2 + 2; the second rate is 1 / 100
    assert cosines[-1, 0].tolist() == pytest.approx([math.cos(angle) for angle in last])
