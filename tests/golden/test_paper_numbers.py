"""Numbers of the paper (arXiv 2102.12092) and of its published code."""

import math

import pytest
import torch

from models.config import DVAEConfig
from models.dvae import build_decoder, build_encoder
from models.likelihood import (
    gumbel_codes,
    kl_to_uniform,
    logit_laplace_log_prob,
    squeeze_pixels,
    unsqueeze_pixels,
)
from models.masks import full_mask, image_mask, layer_kind
from training.schedules import cosine


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
    config = DVAEConfig(
        pixels=256,
        width=256,
        groups=4,
        blocks=2,
        bottleneck=4,
        gain=0.0,
        codebook=8192,
        code_width=128,
    )
    with torch.device("meta"):
        encoder, decoder = build_encoder(config), build_decoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    assert config.grid == 32


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
