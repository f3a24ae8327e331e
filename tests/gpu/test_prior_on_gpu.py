"""The prior's logits on a GPU equal those on the CPU."""

import torch

from models.config import PriorConfig
from models.prior import build_prior


def test_logits_equal_the_cpu(device: torch.device) -> None:
    config = PriorConfig(text_vocabulary=30, image_vocabulary=20, grid=8)
    layers = build_prior(config)
    batch = {
        "text": torch.zeros(2, config.text_length, dtype=torch.int64),
        "image": torch.zeros(2, 64, dtype=torch.int64),
    }

    def image_logits(place: torch.device) -> torch.Tensor:
        state = {name: value.to(place) for name, value in batch.items()}
        for layer in layers.to(place).values():
            state = layer(state)
        return state.image.cpu()  # type: ignore[attr-defined, no-any-return]

    assert torch.allclose(image_logits(torch.device("cpu")), image_logits(device), atol=1e-4)
