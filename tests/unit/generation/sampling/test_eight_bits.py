"""Weights in 8 bits: their rounding by hand, both kernels, and logits beside fp32's."""

import pytest
import torch
from torch import Tensor

from generation.sampling import packed_linear
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.packed_linear import EightBits, PackedLinear
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device without FBGEMM."""
    monkeypatch.setattr(packed_linear, "_fbgemm", lambda *_: None)


@pytest.mark.usefixtures("plain")
def test_an_output_s_largest_weight_is_127_steps() -> None:
    weight = torch.tensor([[1.27, -0.504, 0.006], [-2.54, 0.0, 0.031], [0.0, 0.0, 0.0]])
    layer = EightBits(weight, torch.tensor([0.0, 1.0, -1.0]))
    rounded = [[1.27, -0.50, 0.01], [-1.54, 1.0, 1.04], [-1.0, -1.0, -1.0]]
    assert torch.allclose(layer(torch.eye(3)).T, torch.tensor(rounded), atol=1e-6)
    assert layer.bytes == 9


def _inputs(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(rows)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(shape, generator=draws) for shape in shapes)
    return x, weight / inputs**0.5, bias


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_cpu_s_kernel_rounds_its_inputs_alone(rows: int, with_bias: bool) -> None:
    """Inputs of both signs in 8 bits of their range, in 7 without VNNI, are off by half a step."""
    x, weight, bias = _inputs(rows, 96, 40)
    fast = EightBits(weight, bias if with_bias else None)
    assert fast._packed is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_linear, "_fbgemm", lambda *_: None)
        exact = EightBits(weight, bias if with_bias else None)(x)
    step = float(x.max() - x.min()) / (255 if torch.cpu._is_vnni_supported() else 127)
    furthest = step / 2 * weight.abs().sum(1).max() * 1.02
    assert 0 < float((fast(x) - exact).abs().max()) < float(furthest)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("kernel", ["fbgemm", "plain"])
def test_logits_are_near_those_of_fp32(
    one_row: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "plain":
        monkeypatch.setattr(packed_linear, "_fbgemm", lambda *_: None)
    part, batch = LocalPrior(layers=trained_like(), config=CONFIG), prior_batch()
    logits = {}
    for precision in ("fp32", "bf16", "int8"):
        decoder = Decoder(part, precision, one_row)
        lane = decoder.start(batch["text"], batch["image"][:, :0], 1)
        rows = [
            decoder.next(lane, position, batch["image"][:, max(position - 1, 0)])
            for position in range(CONFIG.image_length)
        ]
        logits[precision] = torch.stack(rows)  # type: ignore[arg-type]
    off = {p: float((logits[p] - logits["fp32"]).norm()) for p in ("bf16", "int8")}
    assert 0 < off["int8"] < 0.1 * float(logits["fp32"].norm())  # a wrong scale is off by 1
    assert off["bf16"] < off["int8"]


def test_bytes_of_weights_are_counted() -> None:
    _, weight, bias = _inputs(1, 32, 8)
    sizes = [
        PackedLinear(weight, bias, torch.bfloat16, eight=eight).bytes for eight in (False, True)
    ]
    assert sizes == [2 * 256, 256]
    activated = PackedLinear(weight, bias, torch.bfloat16, gelu=True, eight=True)
    plain = PackedLinear(weight, bias, torch.bfloat16, eight=True)
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    expected = torch.nn.functional.gelu(plain(x).float(), approximate="tanh")
    assert activated(x).dtype == torch.bfloat16
    assert torch.allclose(activated(x).float(), expected, atol=0.02)
