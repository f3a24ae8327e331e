"""The dVAE starts with codes that the decoder hears, whatever the size of the codebook."""

import pytest
import torch

from models.config import DVAEConfig
from models.dvae import DVAE


@pytest.mark.parametrize("codebook", [32, 128, 2048])
def test_code_vectors_start_with_unit_variance(codebook: int) -> None:
    model = DVAE(DVAEConfig(codebook=codebook, width=16, bottleneck=1))
    vectors = model.decoder.input.weight[:, :, 0, 0]
    assert 0.85 < float(vectors.std(0).mean()) < 1.1


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pictures_of_different_codes_differ_from_the_start(seed: int) -> None:
    model = DVAE(DVAEConfig(codebook=128, width=16, bottleneck=1), seed)
    codes = torch.arange(128).view(-1, 1, 1, 1) == torch.arange(128).view(1, -1, 1, 1)
    location = model.decode(codes.float().expand(128, 128, 8, 8))[0]
    assert float(location[:, :, 16, 16].std(0).min()) > 0.3
