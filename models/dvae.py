"""The discrete VAE: a convolutional encoder to code logits and a decoder back to pixels.

Source: arXiv 2102.12092, section 2.1 and appendix A; layer layout of the public `dall_e` package.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import DVAEConfig
from models.initialization import init_fan_in
from models.logit_laplace import logit_laplace_log_prob, squeeze_pixels, unsqueeze_pixels
from models.quantizers import build_quantizer

CHANNELS = 3
FIRST_DECODER_SCALE = 0.3
"""Factor by which `calibrate` shrinks the decoder's initial output weights."""
_conv = partial(nn.Conv2d, padding="same")


@dataclass(frozen=True, kw_only=True)
class DVAETerms:
    """The terms of the loss, as means, and the reconstruction."""

    log_likelihood: Tensor
    """Nats per pixel value."""
    penalty: Tensor
    """Of `models.quantizers.Quantized`."""
    location: Tensor
    """The likelihood's, (B, 3, S, S); `unsqueeze_pixels` turns it into pixels."""


class ResidualBlock(nn.Module):
    """id(x) + gain * (ReLU, conv) x 4, with a bottleneck."""

    def __init__(
        self, inward: int, outward: int, config: DVAEConfig, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.gain = config.gain or 1 / (config.groups * config.blocks) ** 2
        same = inward == outward
        self.identity = nn.Identity() if same else _conv(inward, outward, 1)
        hidden = max(outward // config.bottleneck, 1)
        widths = (inward, hidden, hidden, hidden, outward)
        self.convs = nn.ModuleList(
            _conv(widths[i], widths[i + 1], kernel) for i, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        out: Tensor = self.identity(x) + self.gain * h
        return out


class DVAE(nn.Module):
    """Encoder, codebook and decoder.

    Under autocast, convolutions run in 16 bits, except the two next to the codes (fp32).
    Shapes: pictures are (B, 3, pixels, pixels) float32 in [0, 1]; codes are (B, grid, grid).
    """

    def __init__(self, config: DVAEConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer = build_quantizer(config)
        self.decoder = build_decoder(config)
        one_hot = config.quantizer == "gumbel" and config.init == "calibrated"
        init_fan_in(self, seed, one_hot="decoder.input" if one_hot else "")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def logits(self, image: Tensor) -> Tensor:
        """Encoder outputs, K logits of a Gumbel dVAE: (B, 3, S, S) -> (B, C, grid, grid)."""
        squeezed = squeeze_pixels(image, self.config.epsilon)
        states = self.encoder[:-1](squeezed.contiguous(memory_format=torch.channels_last))
        with torch.autocast(image.device.type, enabled=False):
            out: Tensor = self.encoder[-1](_wide(states))
        return out

    def decode(self, codes_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale of the pixels: (B, C, grid, grid) -> twice (B, 3, S, S)."""
        with torch.autocast(codes_bchw.device.type, enabled=False):
            states = self.decoder[0](_wide(codes_bchw))
        mu, log_scale = _wide(self.decoder[1:](states)).chunk(2, dim=1)
        return mu, log_scale.clamp_min(self.config.min_log_scale)

    def tokens(self, image: Tensor) -> Tensor:
        """The most likely codes, without noise: (B, 3, S, S) -> (B, grid * grid) int64."""
        return self.quantizer.codes(self.logits(image)).flatten(1)

    def picture(self, tokens: Tensor) -> Tensor:
        """Pictures in [0, 1] from codes: (B, grid * grid) -> (B, 3, S, S)."""
        grid = tokens.view(-1, self.config.grid, self.config.grid)
        return unsqueeze_pixels(self.decode(self.quantizer.inputs(grid))[0], self.config.epsilon)

    @torch.no_grad()
    def calibrate(self, image: Tensor, seed: int = 0) -> None:
        """Fit the two output layers' scales to a first batch, so that training starts balanced.

        Encoder outputs get mean 0 and the quantizer's spread over the batch; the decoder starts at
        each channel's median and mean absolute deviation. Without this a flat background selects
        one code everywhere, and the codebook collapses (docs/LOG.md). VQ's codebook starts from
        the outputs; `seed` is of its draws.
        Shapes: (B, 3, S, S) in [0, 1].
        """
        logits, (weight, bias) = self.logits(image), _last(self.encoder)
        scale = self.quantizer.spread / logits.std((0, 2, 3)).clamp_min(1e-6)
        bias.sub_(logits.mean((0, 2, 3))).mul_(scale)
        weight.mul_(scale[:, None, None, None])
        self.quantizer.calibrate(self.logits(image), seed)
        pixels = torch.logit(squeeze_pixels(image, self.config.epsilon)).transpose(0, 1).flatten(1)
        median = pixels.median(1).values
        spread = (pixels - median[:, None]).abs().mean(1).clamp_min(1e-3)
        weight, bias = _last(self.decoder)
        weight.mul_(FIRST_DECODER_SCALE)
        bias.copy_(torch.cat([median, spread.log()]))

    def forward(self, image: Tensor, tau: Tensor, keys: Tensor) -> tuple[DVAETerms, Tensor]:
        """The loss's terms and the encoder outputs, for one relaxed draw.

        Shapes: `keys` is (B,) int64, one noise key per picture.
        """
        logits = self.logits(image)
        with torch.autocast(image.device.type, enabled=False):
            quantized = self.quantizer(logits, tau, keys)
        mu, log_scale = self.decode(quantized.inputs)
        squeezed = squeeze_pixels(image, self.config.epsilon)
        log_prob = logit_laplace_log_prob(squeezed, mu, log_scale)
        terms = DVAETerms(
            log_likelihood=log_prob.mean(),
            penalty=quantized.penalty,
            location=mu,
        )
        return terms, logits


def _last(net: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of the output layer."""
    layer = net[-1]
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    return layer.weight, layer.bias


def _wide(x: Tensor) -> Tensor:
    """At least 32 bits."""
    return x if x.dtype == torch.float64 else x.float()


def negative_bound(terms: DVAETerms, beta: Tensor | float, config: DVAEConfig) -> Tensor:
    """The loss: -(sum of log likelihoods - beta * sum of KLs) / number of pixel values.

    The codes of other quantizers are certain, with a constant KL; `beta` weighs VQ's commitment.
    Units: nats a pixel value.
    """
    values_a_token = CHANNELS * config.pixels**2 / config.tokens
    share = beta / values_a_token if config.quantizer == "gumbel" else beta
    return -(terms.log_likelihood - share * terms.penalty)


def build_encoder(config: DVAEConfig) -> nn.Sequential:
    """Pixels -> the quantizer's inputs, with torch's own initial weights."""
    layers: list[tuple[str, nn.Module]] = [("input", _conv(CHANNELS, config.width, 7))]
    width = config.width
    for group in range(config.groups):
        outward = config.width << group
        for block in range(config.blocks):
            layers.append(
                (f"g{group}b{block}", ResidualBlock(width, outward, config, (3, 3, 3, 1)))
            )
            width = outward
        if group < config.groups - 1:
            layers.append((f"g{group}pool", nn.MaxPool2d(2)))
    layers += [("relu", nn.ReLU()), ("output", _conv(width, config.code_channels, 1))]
    return nn.Sequential(OrderedDict(layers))


def build_decoder(config: DVAEConfig) -> nn.Sequential:
    """Relaxed codes -> location and log scale of each pixel value."""
    layers: list[tuple[str, nn.Module]] = [
        ("input", _conv(config.code_channels, config.code_width, 1))
    ]
    width = config.code_width
    for group in range(config.groups):
        outward = config.width << (config.groups - 1 - group)
        for block in range(config.blocks):
            layers.append(
                (f"g{group}b{block}", ResidualBlock(width, outward, config, (1, 3, 3, 3)))
            )
            width = outward
        if group < config.groups - 1:
            layers.append((f"g{group}up", nn.Upsample(scale_factor=2)))
    layers += [("relu", nn.ReLU()), ("output", _conv(width, 2 * CHANNELS, 1))]
    return nn.Sequential(OrderedDict(layers))
