"""Numbers of the paper (arXiv 2102.12092) and of its published code."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from models.attention.masks import full_mask, image_mask, layer_kind
from models.config import DVAEConfig, PriorConfig
from models.counts import attended_pairs, prior_parameters
from models.dvae import DVAE, build_decoder, build_encoder, negative_bound
from models.logit_laplace import (
    gumbel_codes,
    kl_to_uniform,
    logit_laplace_log_prob,
    squeeze_pixels,
    unsqueeze_pixels,
)
from models.prior import PriorBlock, PriorEmbedding, PriorHead
from parallel.tensor.ops import TensorParallel
from training.config import PriorTrain
from training.presets import dvae_paper, prior_paper_2_8b, prior_paper_5_6b, prior_paper_12b
from training.schedules import cosine, learning_rate


def test_layer_rule() -> None:
    kinds = [layer_kind(layer, 64) for layer in range(1, 65)]
    assert [kinds.count(kind) for kind in ("row", "column", "conv")] == [47, 16, 1]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"] and kinds[-1] == "conv"


@pytest.mark.parametrize(("kind", "keys"), [("row", 33), ("column", 32), ("conv", 61)])
def test_most_keys_of_each_mask(kind: str, keys: int) -> None:
    mask = image_mask(kind, 32)  # type: ignore[arg-type]
    assert int(mask.sum(1).max()) == keys
    assert not mask.triu(1).any() and mask.diagonal().all()


def test_row_then_column_reaches_every_earlier_cell() -> None:
    row, column = (image_mask(kind, 32).float() for kind in ("row", "column"))  # type: ignore[arg-type]
    assert ((column @ row) > 0).equal(torch.ones(1024, 1024).tril() > 0)


def test_text_is_seen_by_all_and_sees_no_image() -> None:
    mask = full_mask("column", 7, 4)
    assert mask[7:, :7].all() and not mask[:7, 7:].any()


def test_published_dvae_has_97_616_006_parameters() -> None:
    config = dvae_paper().model
    with torch.device("meta"):
        encoder, decoder = build_encoder(config), build_decoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    assert config.grid == 32 and encoder.g0b0.gain == 1 / 64


def test_first_weights_of_the_published_dvae() -> None:
    """Every convolution is N(0, 1 / fan-in), including the one that reads the codes; no bias."""
    dvae = DVAE(DVAEConfig(width=16, bottleneck=4, codebook=512, gain=0.0, init="paper"))
    for name, parameter in dvae.named_parameters():
        if parameter.dim() > 1 and parameter.numel() > 2000:
            fan_in = parameter[0].numel()
            assert float(parameter.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.1), name
        elif parameter.dim() == 1:
            assert not parameter.any(), name


def test_schedules_of_the_published_dvae() -> None:
    paper = dvae_paper()
    rate = partial(learning_rate, paper.optim, steps=paper.loop.steps)
    assert rate(step=0) == pytest.approx(1e-4) and rate(step=600_000) == pytest.approx(5.0625e-5)
    assert rate(step=1_200_000) == rate(step=2_900_000) == pytest.approx(1.25e-6)
    steps = paper.loop.steps
    tau = partial(cosine, paper.tau_first, paper.tau_last)
    beta = partial(cosine, paper.beta_first, paper.beta)
    assert tau(75_000 / steps / paper.tau_fraction) == pytest.approx(0.53125, rel=1e-12)
    assert tau(150_000 / steps / paper.tau_fraction) == pytest.approx(1 / 16)
    assert beta(2_500 / steps / paper.beta_fraction) == pytest.approx(3.3, rel=1e-12)
    assert (paper.optim.beta1, paper.optim.beta2, paper.optim.eps) == (0.9, 0.999, 1e-8)
    assert (paper.optim.weight_decay, paper.optim.ema, paper.optim.ema_every) == (1e-4, 0.999, 1)
    assert not paper.problems() and paper.loop.global_batch_size == 512


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("preset", "dim", "matrices", "total"),
    [
        (prior_paper_2_8b, 1920, 2_831_155_200, 2_928_139_776),
        (prior_paper_5_6b, 2688, 5_549_064_192, 5_684_832_768),
        (prior_paper_12b, 3968, 12_092_178_432, 12_292_587_008),
    ],
)
def test_parameters_of_the_published_priors(
    preset: Callable[[], PriorTrain], dim: int, matrices: int, total: int
) -> None:
    """2 * dim of the total are our choice: start-of-text and start-of-image vectors, which the
    paper's figure 10 shows and its text does not count.
    """
    sizes = {"text_vocabulary": 16_384, "image_vocabulary": 8_192, "grid": 32}
    config = PriorConfig(**{**vars(preset().model), **sizes})
    assert (config.dim, config.heads, config.layers) == (dim, dim // 64, 64)
    counted = prior_parameters(config)
    assert (counted.matrices, counted.total) == (matrices, total)
    with torch.device("meta"):
        alone = TensorParallel()
        block = PriorBlock(config, 1, alone)
        ends = [PriorEmbedding(config, alone), PriorHead(config, alone)]
    built = [sum(p.numel() for p in module.parameters()) for module in (block, *ends)]
    assert 64 * built[0] + built[1] + built[2] == total
    assert not preset().problems()


def test_optimiser_of_the_published_prior() -> None:
    optim = prior_paper_12b().optim
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.96, 1e-8, 4.5e-2)
    assert (optim.clip_norm, optim.max_variance) == (4.0, 5.0)
    assert (optim.ema, optim.ema_every) == (0.99, 25)
    assert learning_rate(optim, 2_499, 430_000) == pytest.approx(2.25e-4)
    assert learning_rate(optim, 5_000, 430_000) == 4.5e-4
    assert learning_rate(optim, 400_000, 430_000, halved=5) == pytest.approx(4.5e-4 / 32)


def test_share_of_pairs_that_the_masks_keep() -> None:
    """Relative to causal attention over the image: 6.34, 3.22 and 10.9%; 39.6% of all pairs."""
    causal = 1024 * 1025 // 2
    for kind, share in (("row", 0.0634), ("column", 0.0322), ("conv", 0.109)):
        assert int(image_mask(kind, 32).sum()) / causal == pytest.approx(share, rel=5e-3)  # type: ignore[arg-type]
    config = PriorConfig(dim=64, heads=1, layers=64, text_length=256, grid=32)
    assert attended_pairs(config) / (64 * 1280 * 1281 // 2) == pytest.approx(0.396, rel=3e-3)


@pytest.mark.parametrize(
    ("first", "last", "share", "value"),
    [(1.0, 1 / 16, 0.5, 0.53125), (1e-4, 1.25e-6, 0.5, 5.0625e-5), (0.0, 6.6, 0.5, 3.3)],
)
def test_cosine_check_values(first: float, last: float, share: float, value: float) -> None:
    assert cosine(first, last, share) == pytest.approx(value, rel=1e-12)
    assert cosine(first, last, 7.0) == pytest.approx(last)


def test_logit_laplace_integrates_to_one() -> None:
    x = torch.linspace(1e-6, 1 - 1e-6, 2_000_001, dtype=torch.float64)
    mu, log_scale = torch.tensor(0.7).double(), torch.tensor(-0.4).double()
    density = logit_laplace_log_prob(x, mu, log_scale).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-4)


def test_pixels_survive_the_squeeze() -> None:
    pixels = torch.linspace(0, 1, 256)
    squeezed = squeeze_pixels(pixels, 0.1)
    assert float(squeezed.min()) == pytest.approx(0.1) and float(squeezed.max()) == pytest.approx(
        0.9
    )
    assert torch.allclose(unsqueeze_pixels(torch.logit(squeezed), 0.1), pixels, atol=1e-6)


def test_kl_ends_and_gumbel_sums() -> None:
    flat, sharp = torch.zeros(1, 8192, 1, 1), torch.zeros(1, 8192, 1, 1)
    sharp[0, 3] = 1e4
    assert float(kl_to_uniform(flat)) == pytest.approx(0.0, abs=1e-5)
    assert float(kl_to_uniform(sharp)) == pytest.approx(math.log(8192), rel=1e-6)
    codes = gumbel_codes(torch.randn(2, 5, 3, 3), 0.5, torch.randn(2, 5, 3, 3))
    assert torch.allclose(codes.sum(1), torch.ones(2, 3, 3))


def test_every_parameter_of_the_dvaes_loss_by_finite_differences() -> None:
    """The logit-Laplace bound with beta 6.6 in float64, one parameter at a time."""
    config = DVAEConfig(
        pixels=2, width=1, groups=1, codebook=3, code_width=2, bottleneck=1, min_log_scale=-20
    )
    model = DVAE(config).double().to(memory_format=torch.contiguous_format)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws).double())
    image = torch.rand(2, 3, 2, 2, generator=draws).double()
    keys = torch.tensor([5, 6])

    def loss() -> torch.Tensor:
        return negative_bound(model(image, torch.tensor(0.7), keys)[0], 6.6, config)

    loss().backward()
    step, worst = 1e-6, 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            for i in range(parameter.numel()):
                flat, values = parameter.view(-1), []
                for sign in (1, -1):
                    flat[i] += sign * step
                    values.append(float(loss()))
                    flat[i] -= sign * step
                slope = (values[0] - values[1]) / (2 * step)
                worst = max(worst, abs(slope - float(parameter.grad.view(-1)[i])))
    assert worst < 1e-6
