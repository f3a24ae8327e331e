"""The dVAE's initialisation, its views of pictures and its precisions."""

import numpy as np
import pytest
import torch

from core.keys import keyed_rng
from data_pipeline.images.crops import dvae_crop
from models.code_encoder import CodeReader
from models.config import DVAEConfig
from models.dvae import DVAE


@pytest.mark.parametrize("codebook", [32, 128, 2048])
def test_code_vectors_start_with_unit_variance(codebook: int) -> None:
    model = DVAE(DVAEConfig(codebook=codebook, width=16, bottleneck=1))
    vectors = model.decoder.input.weight[:, :, 0, 0]
    assert 0.85 < float(vectors.detach().std(0).mean()) < 1.1


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pictures_of_different_codes_differ_from_the_start(seed: int) -> None:
    model = DVAE(DVAEConfig(codebook=128, width=16, bottleneck=1), seed)
    codes = torch.arange(128).view(-1, 1, 1, 1) == torch.arange(128).view(1, -1, 1, 1)
    location = model.decode(codes.float().expand(128, 128, 8, 8))[0]
    assert float(location[:, :, 16, 16].std(0).min()) > 0.3


def test_views_of_the_papers_first_listing() -> None:
    """A random square is scaled to at most 9/8 to 3/2 of the size; the view is cut from it."""
    ramp = np.zeros((96, 160, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(160), np.arange(96)[:, None]
    flips, scales, lefts = set(), [], []
    for i in range(200):
        view = dvae_crop(ramp, 32, keyed_rng(i)).astype(int)
        assert view.shape == (32, 32, 3)
        slope = (view[16, -1, 0] - view[16, 0, 0]) / 31
        flips.add(slope > 0)
        scales.append(96 / abs(slope))
        lefts.append(view[16, :, 0].min())
    assert flips == {True, False}
    assert min(scales) > 34 and max(scales) < 51 and max(scales) - min(scales) > 8
    assert min(lefts) < 12 and max(lefts) > 64
    small = ramp[:20, :24]
    assert dvae_crop(small, 32, keyed_rng(0)).shape == (32, 32, 3)
    assert (
        dvae_crop(ramp, 32, keyed_rng(7)).tobytes() == dvae_crop(ramp, 32, keyed_rng(7)).tobytes()
    )


@torch.no_grad()
def test_the_layers_beside_the_codes_stay_in_fp32() -> None:
    model = DVAE(DVAEConfig(width=16, codebook=64))
    kinds: dict[str, torch.dtype] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda _, __, out, name=name: kinds.__setitem__(name, out.dtype)  # type: ignore[misc]
            )
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.logits(torch.rand(1, 3, 32, 32)).softmax(1)
        mu, log_scale = model.decode(codes)
    wide = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert wide == {"encoder.output", "decoder.input"}
    assert mu.dtype == log_scale.dtype == torch.float32


@torch.no_grad()
def test_codes_of_the_reader_are_the_models() -> None:
    """All of them in fp32; in bf16 all but near ties, and those are among the model's best."""
    config = DVAEConfig(width=16, blocks=2, groups=3, codebook=300, bottleneck=4, gain=0.0)
    model = DVAE(config).eval()
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, logits = model.tokens(image), model.logits(image).permute(0, 2, 3, 1).flatten(1, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert CodeReader(model).codes(image).equal(expected)
    half = CodeReader(model, "bf16").codes(image)
    lost = logits.amax(-1) - logits.gather(-1, half[..., None])[..., 0]
    assert float((half == expected).float().mean()) > 0.95 and float(lost.max()) < 0.05
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
