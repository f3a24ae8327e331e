"""Optional losses of the dVAE: one backward pass gives each network its own gradients."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import DVAEConfig
from models.critics.discriminator import hinge_loss
from models.dvae import DVAE, negative_bound
from models.initialization import generator
from models.logit_laplace import unsqueeze_pixels
from parallel.config import EngineConfig
from planning.dvae import _weigh
from planning.estimate.hardware import hardware_of
from tests.perceptual_weights import write_weights
from training.config import DVAETrain
from training.presets import dvae_tiny
from training.tasks.dvae_config import DiscriminatorConfig, PerceptualConfig
from training.tasks.dvae_program import DVAELayer, ExtraLosses, dvae_program

SIZES = DVAEConfig(
    pixels=16, width=8, groups=2, codebook=20, code_width=8, quantizer="vq", vector=3
)
RIVAL = DiscriminatorConfig(weight=0.5, width=4, layers=2)
EXTRA = ExtraLosses(
    perceptual=PerceptualConfig(weight=2.0, vgg=Path("x")), discriminator=RIVAL, seed=1
)


def _batch(adversarial: float = 1.0) -> dict[str, Tensor]:
    return {
        "pixels": torch.rand(3, 3, 16, 16, generator=generator(0, "pixels")),
        "keys": torch.tensor([1, 2, 3]),
        "tau": torch.tensor(1.0),
        "beta": torch.tensor(0.25),
        "adversarial": torch.tensor(adversarial),
    }


def _program(extra: ExtraLosses, folder: Path) -> tuple[Any, Any]:
    program = dvae_program(DVAE(SIZES, 1), SIZES, extra)
    layer: Any = program.layers[0].build()
    if layer.perceptual is not None:
        layer.perceptual.fill(*write_weights(folder))
    return program, layer


def _gradients(layer: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_one_backward_pass_is_two(adversarial: float, tmp_path: Path) -> None:
    """Against the dVAE's loss with the discriminator held, and the discriminator's alone."""
    batch = _batch(adversarial)
    program, layer = _program(EXTRA, tmp_path)
    losses = program.loss(layer(batch), batch)
    losses["loss"].backward()
    together = _gradients(layer)
    layer.zero_grad()

    terms, _ = layer.dvae(batch["pixels"], batch["tau"], batch["keys"])
    again = unsqueeze_pixels(terms.location, 0.1)
    apart = layer.perceptual(again, batch["pixels"]).mean()
    score = layer.discriminator(again).mean()
    visible = negative_bound(terms, 0.25, SIZES) + 2 * apart
    (visible - adversarial * 0.5 * score).backward()
    generator_side = {n: g.clone() for n, g in _gradients(layer).items() if n.startswith("dvae.")}
    layer.zero_grad()
    real, drawn = layer.discriminator(batch["pixels"]), layer.discriminator(again.detach())
    hinge_loss(real, drawn).backward()
    expected = {**generator_side, **_gradients(layer)}

    assert together.keys() == expected.keys() == dict(layer.named_parameters()).keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert float(losses["loss"].detach()) == pytest.approx(float(visible.detach()), rel=1e-6)
    assert float(losses["adversarial"].detach()) == pytest.approx(-float(score.detach()))
    assert float(losses["perceptual"].detach()) == pytest.approx(float(apart.detach()))
    names = ("log_likelihood", "commitment", "perceptual", "adversarial", "discriminator")
    assert program.losses == ("loss", *names) and losses.keys() == set(program.losses)


@pytest.mark.parametrize("alone", ["perceptual", "discriminator"])
def test_each_optional_loss_works_alone(alone: str, tmp_path: Path) -> None:
    extra = ExtraLosses(**{alone: getattr(EXTRA, alone)})
    program, layer = _program(extra, tmp_path)
    names = ["perceptual"] if alone == "perceptual" else ["adversarial", "discriminator"]
    _, more = layer(_batch())
    assert list(more) == names and program.losses[3:] == tuple(names)
    assert set(program.loss(layer(_batch()), _batch())) == set(program.losses)


@pytest.mark.parametrize(
    ("quantizer", "names"),
    [("gumbel", ("log_likelihood", "kl")), ("fsq", ("log_likelihood",))],
)
def test_losses_without_options(quantizer: Any, names: tuple[str, ...]) -> None:
    sizes = DVAEConfig(
        pixels=16, width=8, groups=2, codebook=20, quantizer=quantizer, levels=(4, 5)
    )
    program = dvae_program(DVAE(sizes, 1), sizes)
    assert program.losses == ("loss", *names)
    layer = program.layers[0].build()
    losses = program.loss(layer(_batch()), _batch())
    assert tuple(losses) == program.losses
    assert all(name.startswith("dvae.") for name, _ in layer.named_parameters())


def test_the_discriminator_depends_on_the_seed() -> None:
    def weight(seed: int) -> Tensor:
        extra = ExtraLosses(discriminator=RIVAL, seed=seed)
        discriminator: Any = DVAELayer(DVAE(SIZES), extra).discriminator
        return discriminator.output.weight.detach()

    assert weight(1).equal(weight(1)) and not weight(1).equal(weight(2))
    settings = DVAETrain(discriminator=RIVAL, perceptual=PerceptualConfig(weight=1.0))
    assert ExtraLosses.of(settings).discriminator == RIVAL
    assert ExtraLosses.of(settings).perceptual.weight == 1.0
    seeded = replace(settings, loop=replace(settings.loop, seed=7))
    assert ExtraLosses.of(seeded).seed == 7 and ExtraLosses().seed == 0


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ({"commitment": -1.0}, "commitment=-1.0 must not be negative"),
        ({"perceptual": PerceptualConfig(weight=-1.0, vgg=Path("x"))}, "perceptual.weight=-1.0"),
        ({"perceptual": PerceptualConfig(weight=1.0)}, "give --perceptual.vgg FILE"),
        ({"perceptual": PerceptualConfig(vgg=Path("x"))}, "but not --perceptual.weight"),
        ({"perceptual": PerceptualConfig(linear=Path("x"))}, "but not --perceptual.weight"),
        ({"discriminator": DiscriminatorConfig(weight=-1.0)}, "discriminator.weight=-1.0"),
        ({"discriminator": DiscriminatorConfig(start=1.0)}, "discriminator.start=1.0"),
        ({"discriminator": DiscriminatorConfig(start=-0.1)}, "discriminator.start=-0.1"),
        ({"discriminator": DiscriminatorConfig(layers=0)}, "must be at least 1"),
        ({"discriminator": DiscriminatorConfig(width=0)}, "must be at least 1"),
        ({"discriminator": DiscriminatorConfig(weight=1.0, layers=4)}, "of 32 pixels; try 3"),
        ({"discriminator": DiscriminatorConfig(weight=1.0, layers=3)}, ""),
        ({"discriminator": DiscriminatorConfig(layers=4)}, ""),
        ({"discriminator": DiscriminatorConfig(weight=math.inf)}, "discriminator.weight=inf"),
        ({"discriminator": DiscriminatorConfig(width=1, layers=1, start=0.0)}, ""),
        ({"perceptual": PerceptualConfig(weight=math.inf, vgg=Path("x"))}, "weight=inf"),
        ({"perceptual": PerceptualConfig(weight=0.5, vgg=Path("x"), linear=Path("y"))}, ""),
        ({"perceptual": PerceptualConfig(weight=1.0, vgg=Path("x"))}, ""),
        ({"model": DVAEConfig(quantizer="vq", init="paper")}, "needs --model.init calibrated"),
        ({"model": DVAEConfig(quantizer="fsq", init="paper")}, "needs --model.init calibrated"),
        ({"model": DVAEConfig(quantizer="vq")}, ""),
        ({"model": DVAEConfig(init="paper")}, ""),
    ],
)
def test_problems_of_optional_losses(losses: dict[str, Any], problem: str) -> None:
    problems = DVAETrain(**losses).model_problems()
    assert len(problems) == bool(problem) and problem in "".join(problems)


@pytest.mark.parametrize(
    ("pixels", "layers", "advice"),
    [(24, 3, ""), (23, 3, "try 2"), (6, 1, ""), (6, 2, "try 1"), (4, 1, "weight 0"),
     (2, 1, "weight 0")],
)  # fmt: skip
def test_convolutions_leave_three_pixels_a_side(pixels: int, layers: int, advice: str) -> None:
    problems = DiscriminatorConfig(weight=1.0, layers=layers).problems(pixels)
    assert len(problems) == bool(advice) and "".join(problems).endswith(advice)


@pytest.mark.parametrize(("pixels", "weight", "refused"), [(15, 1.0, 1), (16, 1.0, 0), (8, 0.0, 0)])
def test_max_pools_of_vgg_leave_a_pixel(pixels: int, weight: float, refused: int) -> None:
    problems = PerceptualConfig(weight=weight, vgg=Path("x") if weight else None).problems(pixels)
    assert len(problems) == refused and f"model.pixels={pixels}" * refused in "".join(problems)


def test_a_score_of_the_default_discriminator_sees_70_pixels() -> None:
    chosen, seen = DiscriminatorConfig(), 1
    for stride in (1, 1, *[2] * chosen.layers):
        seen = (seen - 1) * stride + 4
    assert (seen, chosen.width, chosen.start, chosen.weight) == (70, 64, 0.25, 0)


@pytest.mark.seconds
def test_a_plan_counts_the_networks_of_optional_losses() -> None:
    """A discriminator of 4, 8, 16 and 1 channels, and 59 MB of VGG16."""
    engine = EngineConfig(precision="fp32", gradient_accumulation_steps=32)
    plain = DVAETrain(model=SIZES, engine=engine, loop=dvae_tiny().loop)
    vgg = PerceptualConfig(weight=1.0, vgg=Path("absent"))
    rivalled = replace(plain, discriminator=RIVAL, perceptual=vgg)
    few, many = (_weigh(row, 1, hardware_of("h100")).bytes_ for row in (plain, rivalled))
    added = 3 * 4 * 16 + 4 + 4 * 8 * 16 + 8 + 8 * 16 * 16 + 16 + 16 * 16 + 1
    assert many["parameters"] - few["parameters"] == 4 * added
    assert many["temporary"] - few["temporary"] > 4 * 14_714_688
    assert many["activations"] > 2 * few["activations"]
