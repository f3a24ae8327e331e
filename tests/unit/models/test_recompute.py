"""Recomputed activations change no bit, and are not kept."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.adapters import attach
from models.config import LoraConfig, PriorConfig
from models.prior import PriorBlock
from parallel.config import EngineConfig
from parallel.device import CPU
from parallel.engines.protocol import Layer, Stage
from parallel.engines.rebuilt import rebuilt, watched
from parallel.tensor.ops import TensorParallel

CONFIG = PriorConfig(
    dim=32, heads=2, layers=3, text_length=6, text_vocabulary=9, image_vocabulary=9, grid=4
)
MODERN: dict[str, Any] = {"norm": "rms", "qk_norm": True, "positions": "rotary", "mlp": "gated"}
CASES: dict[str, dict[str, Any]] = {"paper": {}, "modern": MODERN, "gated": {"mlp": "gated"}}
SAMPLES = 3


def _stage(options: dict[str, Any], engine: EngineConfig, lora: int = 0) -> Stage:
    config = PriorConfig(**{**vars(CONFIG), **options})

    def build() -> nn.Module:
        block = PriorBlock(config, 1, TensorParallel())
        if lora:
            attach(block, LoraConfig(rank=lora))
        draws = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            parameter.detach().copy_(torch.randn(parameter.shape, generator=draws) / 5)
        return block

    layer = Layer(name="block000", build=build, branches=("attention", "mlp"))
    return Stage([layer], engine, CPU)


def _states() -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, CONFIG.length, CONFIG.dim, generator=draws)


def _run(stage: Stage) -> tuple[list[Tensor], int]:
    """Output and all gradients; bytes kept for the backward pass, each storage once."""
    x, kept = _states().requires_grad_(), {}
    weights = {p.untyped_storage()._cdata for p in stage.parameters()}

    def keep(y: Tensor) -> Tensor:
        place = y.untyped_storage()._cdata
        if place not in weights:
            kept[place] = y
        return y

    with watched(keep, lambda y: y):
        out = stage(x)
    count = sum(y.untyped_storage().nbytes() for y in kept.values())
    kept.clear()
    (out * _states().cos()).sum().backward()
    gradients = [p.grad for p in stage.parameters() if p.requires_grad]
    assert x.grad is not None
    return [out.detach(), x.grad, *(g for g in gradients if g is not None)], count


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_recomputing_changes_no_bit(name: str, precision: Any, lora: int) -> None:
    engines = [
        EngineConfig(precision=precision),
        EngineConfig(precision=precision, recompute=True),
        EngineConfig(precision=precision, recompute=True, recompute_granularity="selective"),
    ]
    (plain, most), (full, least), (selective, some) = (
        _run(_stage(CASES[name], engine, lora)) for engine in engines
    )
    assert least < some < most
    for other in (full, selective):
        assert all(a.equal(b) for a, b in zip(plain, other, strict=True))


def test_what_a_selective_block_keeps() -> None:
    """Per channel in bf16: two fp32 inputs of norms; q, k, v, the attended values; 4 hidden ones,
    whose GELU is not kept. Two numbers of each norm per position; 16-bit weights."""
    engine = EngineConfig(precision="bf16", recompute=True, recompute_granularity="selective")
    _, count = _run(_stage({}, engine))
    _, twice = _run(_stage({"layers": 9}, engine))
    assert count == twice
    positions = SAMPLES * CONFIG.length
    weights = 2 * 12 * CONFIG.dim**2
    each = CONFIG.dim * (2 * 4 + 3 * 2 + 2 + 4 * 2) + 2 * 2 * 4
    assert count == positions * each + weights


def test_a_value_is_rebuilt_once_for_all_that_read_it() -> None:
    calls: list[Tensor] = []

    def square(x: Tensor) -> Tensor:
        calls.append(x)
        return x * x

    x = torch.tensor([2.0, 3.0], requires_grad=True)
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    value = square(x)
    with rebuilt(value, square, x):
        total = (value * weights[0]).sum() + (value[1:] * weights[1][1:]).sum()
    for _ in range(2):
        calls.clear()
        total.backward(retain_graph=True)
        assert len(calls) == 1 and not calls[0].requires_grad
    assert weights[0].grad is not None and weights[0].grad.tolist() == [8.0, 18.0]
    assert weights[1].grad is not None and weights[1].grad.tolist() == [0.0, 18.0]
