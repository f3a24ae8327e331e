"""Optional losses of the dVAE beside its likelihood; imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """A perceptual loss: distance in the features of VGG16."""

    weight: float = 0.0
    """Weight of the loss; 0 = none (VQGAN: 1)."""
    vgg: Path | None = None
    """torchvision's VGG16 weights, as safetensors or its own .pth file."""
    linear: Path | None = None
    """Linear weights of lpips 0.1 for VGG16 (vgg.pth), which make it LPIPS; default: every channel
    counts equally."""

    def problems(self, pixels: int) -> list[str]:
        """Problems for pictures of this side."""
        problems = []
        if not 0 <= self.weight < math.inf:
            problems.append(f"perceptual.weight={self.weight} must not be negative; 0 = none")
        if self.weight and self.vgg is None:
            problems.append(
                "perceptual.weight needs the weights of VGG16; give --perceptual.vgg FILE, or "
                "--perceptual.weight 0"
            )
        if self.weight and pixels < _HALVED:
            problems.append(
                f"perceptual.weight: VGG16 halves pictures four times, and model.pixels={pixels} "
                f"leave none; give at least {_HALVED}, or --perceptual.weight 0"
            )
        for name in ("vgg", "linear"):
            if not self.weight and getattr(self, name) is not None:
                problems.append(f"perceptual.{name} is given, but not --perceptual.weight; try 1")
        return problems


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """A patch discriminator, trained beside the dVAE by the same optimiser."""

    weight: float = 0.0
    """Weight of the dVAE's adversarial loss; 0 = no discriminator (try 0.1)."""
    start: float = 0.25
    """Fraction of the run before the dVAE's adversarial loss begins; the discriminator learns from
    the first step."""
    width: int = 64
    """Channels of its first convolution."""
    layers: int = 3
    """Its convolutions of stride 2; with 3 a score sees 70 x 70 pixels."""

    def problems(self, pixels: int) -> list[str]:
        problems = []
        if not 0 <= self.weight < math.inf:
            problems.append(
                f"discriminator.weight={self.weight} must not be negative; 0 = no discriminator"
            )
        if not 0 <= self.start < 1:
            problems.append(f"discriminator.start={self.start} must be in [0, 1); try 0.25")
        if min(self.width, self.layers) < 1:
            problems.append("discriminator.width and layers must be at least 1")
        elif self.weight and (pixels >> self.layers) < _LEAST:
            most = (pixels // _LEAST).bit_length() - 1
            problems.append(
                f"discriminator.layers={self.layers} leave fewer than {_LEAST} x {_LEAST} of "
                f"{pixels} pixels; try " + (f"{most}" if most > 0 else "--discriminator.weight 0")
            )
        return problems


_HALVED = 16
"""Pixels a side of which VGG16's four max-pools leave one."""
_LEAST = 3
"""Pixels a side that its two convolutions of stride 1 need."""
