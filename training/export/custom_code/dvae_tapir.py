"""The dVAE of a Tapir export: pictures <-> a grid of codes; needs torch alone.

Source: arXiv 2102.12092, section 2.1 and appendix A; VQ: arXiv 1711.00937; FSQ: arXiv 2309.15505.
"""

from collections import OrderedDict
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FSQ_SPREAD = 32.0
"""FSQ bounds outputs divided by this."""


class _Residual(nn.Module):
    """id(x) + gain * (ReLU, conv) x 4, with a bottleneck."""

    def __init__(
        self, inward: int, outward: int, dvae: dict[str, Any], sides: Iterable[int]
    ) -> None:
        super().__init__()
        self._gain = dvae["gain"] or 1 / (dvae["groups"] * dvae["blocks"]) ** 2
        self.identity = nn.Identity() if inward == outward else _conv(inward, outward, 1)
        hidden = max(outward // dvae["bottleneck"], 1)
        widths = (inward, hidden, hidden, hidden, outward)
        pairs = zip(widths, widths[1:], sides, strict=False)
        self.convs = nn.ModuleList(_conv(a, b, side) for a, b, side in pairs)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        out: Tensor = self.identity(x) + self._gain * h
        return out


def _conv(inward: int, outward: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, side, padding="same")


def coder(dvae: dict[str, Any], decoder: bool) -> nn.Sequential:
    """The encoder, or the decoder, of a dVAE."""
    groups, blocks = range(dvae["groups"]), range(dvae["blocks"])
    channels = {"gumbel": dvae["codebook"], "vq": dvae["vector"], "fsq": len(dvae["levels"])}
    codes, width = channels[dvae["quantizer"]], dvae["code_width"] if decoder else dvae["width"]
    first = _conv(codes, width, 1) if decoder else _conv(3, width, 7)
    layers: list[tuple[str, nn.Module]] = [("input", first)]
    for group in groups:
        outward = dvae["width"] << (groups[-1] - group if decoder else group)
        for block in blocks:
            sides = (1, 3, 3, 3) if decoder else (3, 3, 3, 1)
            layers.append((f"g{group}b{block}", _Residual(width, outward, dvae, sides)))
            width = outward
        if group < groups[-1]:
            up = (f"g{group}up", nn.Upsample(scale_factor=2))
            layers.append(up if decoder else (f"g{group}pool", nn.MaxPool2d(2)))
    layers += [("relu", nn.ReLU()), ("output", _conv(width, 6 if decoder else codes, 1))]
    return nn.Sequential(OrderedDict(layers))


class Quantizer(nn.Module):
    """Encoder outputs -> codes -> decoder inputs."""

    def __init__(self, dvae: dict[str, Any]) -> None:
        super().__init__()
        self._kind, self._levels, self._count = dvae["quantizer"], dvae["levels"], dvae["codebook"]
        if self._kind == "vq":
            self.codebook = nn.Embedding(dvae["codebook"], dvae["vector"])

    def codes(self, outputs: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w) int64."""
        if self._kind == "gumbel":
            return outputs.argmax(1)
        x = outputs.permute(0, 2, 3, 1)
        if self._kind == "vq":
            table = self.codebook.weight
            squares = table.square().sum(1)
            return (
                torch.addmm(squares, x.flatten(0, 2), table.T, alpha=-2).argmin(1).view(x.shape[:3])
            )
        levels, steps = self._steps(x.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = (x / FSQ_SPREAD + (offset / half).atanh()).tanh() * half - offset
        return ((bounded.round() + levels // 2) * steps).sum(-1).round().long()

    def inputs(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, C, h, w)."""
        if self._kind == "gumbel":
            x = F.one_hot(codes, self._count).float()
        elif self._kind == "vq":
            x = self.codebook(codes)
        else:
            levels, steps = self._steps(codes.device)
            half = levels // 2
            x = (codes[..., None] // steps % levels - half) / half
        return x.permute(0, 3, 1, 2)

    def _steps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        steps = [prod(self._levels[:i]) for i in range(len(self._levels))]
        levels, basis = (torch.tensor(x, device=device) for x in (self._levels, steps))
        return levels, basis
