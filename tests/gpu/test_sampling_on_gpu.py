"""Decoding on a GPU, compiled into one CUDA graph, gives the logits of the CPU."""

import torch

from generation.sampling.decoder import Decoder, LocalPrior
from models.config import PriorConfig
from models.prior import build_prior


def test_decoded_logits_equal_the_cpu(device: torch.device) -> None:
    config = PriorConfig(text_vocabulary=30, image_vocabulary=20, grid=8)
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(0, 30, (2, config.text_length), generator=draws)
    image = torch.randint(0, 20, (2, 64), generator=draws)
    logits = []
    for place in (torch.device("cpu"), device):
        layers = dict(build_prior(config).to(place).items())
        decoder = Decoder(LocalPrior(layers=layers, config=config))
        lane = decoder.start(text.to(place), image[:, :5].to(place), 1)
        rows = [decoder.next(lane, at, image[:, at - 1].to(place)) for at in range(5, 64)]
        logits.append(torch.stack([row.cpu() for row in rows if row is not None]))
    assert torch.allclose(*logits, atol=1e-4)
