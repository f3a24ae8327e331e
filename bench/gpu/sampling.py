"""Decoding against no cache, and against the memory bandwidth."""

import statistics
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.gpu.kernels import copy_rates
from bench.gpu.report import GpuReport, Target, at_least, rates, wall_seconds
from bench.gpu.training import LARGE, TINY, drawn_on
from generation.config import DrawSettings
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.sampler import Keys, Sampler
from models.config import PriorConfig
from models.prior import build_prior

SMALL = replace(TINY, layers=4)
FIRST = 5
"""Given codes before the first decoded one."""
AT = 37
"""A position in the middle of a row."""
CLOSE = 1e-4
"""Largest difference of a logit."""


def decoding(report: GpuReport) -> None:
    """Logits of every position with caches on the device, against one pass on the CPU."""
    worst = largest_difference(report.device)
    report.row("logits differ from those without a cache", worst, "", Target(most=CLOSE))
    _graphs(report)


def largest_difference(device: torch.device) -> float:
    """Largest difference of a logit of a small prior, over all positions."""
    draws = torch.Generator().manual_seed(0)
    text = torch.randint(0, SMALL.text_vocabulary, (2, SMALL.text_length), generator=draws)
    image = torch.randint(0, SMALL.image_vocabulary, (2, SMALL.image_length), generator=draws)
    layers = build_prior(SMALL)
    exact = _whole(layers, {"text": text, "image": image})
    decoder = Decoder(LocalPrior(layers=dict(layers.to(device).items()), config=SMALL))
    lane = decoder.start(text.to(device), image[:, :FIRST].to(device), 1)
    worst = 0.0
    for at in range(FIRST, SMALL.image_length):
        logits = decoder.next(lane, at, image[:, at - 1].to(device))
        assert logits is not None, "one process has the last stage"
        worst = max(worst, float((logits.cpu() - exact[:, at]).abs().max()))
    return worst


@torch.no_grad()
def _whole(layers: nn.ModuleDict, batch: dict[str, Tensor]) -> Tensor:
    state: object = batch
    for layer in layers.values():
        state = layer(state)
    return state.image  # type: ignore[attr-defined, no-any-return]


def _graphs(report: GpuReport) -> None:
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    report.row("CUDA graphs that were skipped", skipped, "", Target(most=0))


def sampling(report: GpuReport) -> None:
    """A token of a slice of the 1.3B prior, and whole pictures with the noise that they draw."""
    config = SMALL if report.tiny else replace(LARGE, layers=6)
    with drawn_on(report.device):
        layers = build_prior(config).eval()
    decoder = Decoder(LocalPrior(layers=dict(layers.items()), config=config), "bf16")
    bandwidth, _ = copy_rates(report)
    for batch in (1, 64):
        _token(report, decoder, config, batch, bandwidth)
        _pictures(report, decoder, config, batch)
    _graphs(report)


def _token(
    report: GpuReport, decoder: Decoder, config: PriorConfig, batch: int, bandwidth: float
) -> None:
    device = report.device
    text = torch.zeros(1, config.text_length, dtype=torch.int64, device=device)
    given = torch.zeros(1, 0, dtype=torch.int64, device=device)
    lane = decoder.start(text, given, batch)
    before = torch.zeros(batch, dtype=torch.int64, device=device)
    compiled = sum(wall_seconds(lambda: decoder.next(lane, AT, before), device, 3))
    spent = wall_seconds(lambda: decoder.next(lane, AT, before), device, 20)
    bound = (decoder.bytes + lane.bytes) / bandwidth
    share, every = rates(bound, spent)
    name = f"{config.layers} layers of {config.dim}, batch {batch}"
    beside = f"{statistics.median(spent) * 1e3:.3f} ms a token, reading weights and caches "
    beside += f"{bound * 1e3:.3f}; {compiled:.0f} s to compile; target 0.7, gpt-fast 0.7"
    report.row(
        f"{name}: share of the bandwidth", share, "", at_least(0.5), baseline=beside, spread=every
    )


def _pictures(report: GpuReport, decoder: Decoder, config: PriorConfig, batch: int) -> None:
    text = torch.zeros(1, config.text_length, dtype=torch.int64)
    keys: Keys = [[("bench", i) for i in range(batch)]]
    settings, sampler = DrawSettings(), Sampler(decoder, batch=batch)
    spent = wall_seconds(lambda: list(sampler.draw(text, keys, settings)), report.device, 1)
    rate, _ = rates(batch * config.image_length, spent)
    report.row(f"batch {batch}: whole pictures, noise included", rate, "tokens/s")
