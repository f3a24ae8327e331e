"""Model FLOPs per sample of the prior, dVAE and CLIP."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.clip import Clip, caption_keys, contrastive_loss
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.counts import prior_flops
from models.dvae import CHANNELS, build_decoder, build_encoder


def model_flops(config: Any) -> int:
    """Floating-point operations of one sample, forward and backward.

    The prior's attention is counted by its real masks (models.counts). The dVAE and CLIP are
    counted by torch's FlopCounterMode on the meta device, with full attention. Recomputation is
    excluded.
    """
    if isinstance(config, PriorConfig):
        return prior_flops(config)
    with torch.device("meta"):
        return _counted(_dvae(config) if isinstance(config, DVAEConfig) else _clip(config))


def _counted(loss: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return int(counter.get_total_flops())


def _dvae(config: DVAEConfig) -> Any:
    net = nn.Sequential(build_encoder(config), build_decoder(config))
    picture = torch.empty(1, CHANNELS, config.pixels, config.pixels, device="meta")
    return lambda: net(picture).sum()


def _clip(config: ClipConfig) -> Any:
    """CLIP on one pair; the comparison with other pairs is negligible."""
    net = Clip(config)
    batch = {
        "pixels": torch.empty(1, 3, config.pixels, config.pixels, device="meta"),
        "text": torch.empty(1, config.text_length, dtype=torch.int64, device="meta"),
    }
    keys = caption_keys(batch["text"])

    def loss() -> torch.Tensor:
        images, texts, scale = net(batch)
        return contrastive_loss(images, texts, scale, keys, lambda rows: rows, 0)["loss"]

    return loss
