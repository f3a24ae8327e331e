"""Adapters are the dense definition, start as zeros, and are drawn by key."""

from dataclasses import replace

import pytest
import torch

from models.adapters import A, B, adapted, factors
from models.config import LoraConfig, PriorConfig
from models.prior import prior_layers, prior_program
from parallel.config import EngineConfig
from parallel.engines.protocol import Layer, Whole
from parallel.placement import Placement, placement_of
from parallel.tensor.layers import ColumnLinear, RowLinear
from parallel.tensor.ops import TensorParallel

CONFIG = PriorConfig(
    dim=48, heads=2, layers=2, text_length=4, text_vocabulary=20, image_vocabulary=10, grid=2
)
LORA = LoraConfig(rank=3, alpha=6.0)
CPU = torch.device("cpu")


def _drawn(linear: ColumnLinear | RowLinear) -> ColumnLinear | RowLinear:
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=draws)
    return linear.double()


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_an_adapted_linear_is_its_dense_definition(kind: type[ColumnLinear | RowLinear]) -> None:
    """x (W + scale B A)^T + b of a column linear, x (W + scale A B) + b of a row linear."""
    linear = kind(7, 5, TensorParallel())
    linear.adapt(2, 1.5)
    linear = _drawn(linear)
    x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert linear.lora_a is not None and linear.lora_b is not None and linear.bias is not None
    a, b, weight = linear.lora_a, linear.lora_b, linear.weight
    column = kind is ColumnLinear
    whole = (weight + 1.5 * b @ a).T if column else weight + 1.5 * a @ b
    torch.testing.assert_close(linear(x), x @ whole + linear.bias, rtol=1e-12, atol=1e-12)
    assert a.shape == ((2, 7) if column else (7, 2)) and b.shape == ((5, 2) if column else (2, 5))
    left, right = factors(len(weight), a, b)
    torch.testing.assert_close(weight + 1.5 * left @ right, whole.T if column else whole)


def test_a_linear_without_adapter_has_no_parameters_of_one() -> None:
    names = [name for name, _ in ColumnLinear(3, 3, TensorParallel()).named_parameters()]
    assert names == ["weight", "bias"]


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_an_adapter_is_cut_as_its_weight(kind: type[ColumnLinear | RowLinear]) -> None:
    group = TensorParallel()
    group.rank, group.size = 1, 2
    linear = kind(6, 6, group, unit=2)
    linear.adapt(2, 1.0)
    assert linear.lora_a is not None and linear.lora_b is not None
    cut, whole = linear.lora_b, linear.lora_a
    if kind is RowLinear:
        cut, whole = whole, cut
    rows = placement_of(linear.weight)
    assert placement_of(cut) == replace(rows, shape=(6, 2)) and rows.split and rows.first == 4
    assert not placement_of(whole).split and len(cut) == len(linear.weight) == 4


def test_the_six_matrices_alone_are_adapted_and_the_rest_is_frozen() -> None:
    program = adapted(prior_program(CONFIG, 0), LORA, 0)
    assert not program.saves_frozen and program.compressed == ()
    assert prior_program(CONFIG, 0).saves_frozen
    whole = Whole(program, EngineConfig(), CPU)
    names = whole.stage.global_names()
    trained = {name for name, p in names.items() if p.requires_grad}
    linears = [f"block00{i}.{n}" for i in range(2) for n in ("q", "k", "v", "out", "up", "down")]
    assert trained == {f"{linear}{end}" for linear in linears for end in (A, B)}
    assert adapted(program, LoraConfig(), 0) is program


def test_training_starts_at_the_base() -> None:
    plain, other = (
        Whole(program, EngineConfig(), CPU)
        for program in (prior_program(CONFIG, 0), adapted(prior_program(CONFIG, 0), LORA, 0))
    )
    draws = torch.Generator().manual_seed(3)
    batch = {
        "text": torch.randint(0, 20, (2, 4), generator=draws),
        "image": torch.randint(0, 10, (2, 4), generator=draws),
    }
    assert torch.equal(plain(batch)["loss"], other(batch)["loss"])


def test_a_is_normal_by_its_inputs_and_b_zero_and_parts_are_drawn_alike() -> None:
    wide = PriorConfig(**{**vars(CONFIG), "dim": 512, "layers": 1})
    plain = prior_layers(wide, 4)[1]
    layer = adapted(replace(prior_program(wide, 4), layers=[plain]), LoraConfig(rank=64), 4)
    names = dict(layer.layers[0].build().named_parameters())
    for name, inputs in (("q", 512), ("out", 512), ("up", 512), ("down", 2048)):
        drawn = names[f"{name}{A}"].detach()
        assert float(drawn.std() * inputs**0.5) == pytest.approx(1, abs=0.02)
        assert abs(float(drawn.mean())) < 0.05 * inputs**-0.5
        assert not names[f"{name}{B}"].any()
    assert not torch.equal(names[f"q{A}"], names[f"k{A}"])
    _check_parts(layer.layers[0], names)
    assert torch.equal(names["q.weight"], plain.build().get_parameter("q.weight"))


def _check_parts(layer: Layer, names: dict[str, torch.nn.Parameter]) -> None:
    """A part that is drawn alone, as ZeRO-3 does, is that of the whole."""
    assert layer.draw is not None
    for name in (f"q{A}", f"down{A}", f"down{B}", "q.weight", "attention_norm.weight"):
        part: Placement = placement_of(names[name])
        out = torch.full((90,), 7.0)
        layer.draw(name, part, 70, out)
        assert torch.equal(out, names[name].detach().flatten()[70:160]), name


def test_layers_that_draw_no_parts_are_adapted_too() -> None:
    """ZeRO-3 alone asks for parts: a layer without `draw` is built, and has none afterwards."""
    plain = prior_layers(CONFIG, 4)[1]
    program = replace(prior_program(CONFIG, 4), layers=[plain, replace(plain, draw=None)])
    drawn, built = adapted(program, LORA, 4).layers
    assert drawn.draw is not None and built.draw is None
    first, second = (dict(layer.build().named_parameters()) for layer in (drawn, built))
    assert all(first[name].equal(second[name]) for name in first) and first.keys() == second.keys()


def test_problems_name_their_fix() -> None:
    assert LORA.problems(48, "runs/prior", False) == []
    assert LoraConfig().problems(48, "", True) == []
    assert "below model.dim=3" in LORA.problems(3, "runs/prior", False)[0]
    texts = LoraConfig(rank=-1, alpha=-2.0).problems(48, "", False)
    assert len(texts) == 2 and "low rank" in texts[0] and "lora.alpha" in texts[1]
    texts = LORA.problems(48, "", True)
    assert "--init" in texts[0] and "--compress.rank 0" in texts[1]
    assert LORA.scale == 2.0 and LoraConfig(rank=3).scale == 1.0
    assert "lora.alpha=inf" in LoraConfig(alpha=float("inf")).problems(48, "", False)[0]
    one = LoraConfig(rank=1)
    assert len(one.problems(48, "", True)) == 2 and not one.problems(2, "runs/prior", False)
