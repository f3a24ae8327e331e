"""LPIPS: distance of two pictures in the features of VGG16, with weights from local files.

Source: arXiv 1801.03924, version 0.1 of its authors' code (`lpips`), which scales features to unit
length; without its linear weights the distance is that of its option lpips=False.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.errors import InputError

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions; a 2x2 max-pool precedes each stage but the first."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pixels in [-1, 1], per channel: the authors' scaling layer."""
SMALL = 1e-10
_HOW = "give torchvision's vgg16 and, for LPIPS, the linear weights of lpips 0.1 (vgg.pth)"


class Perceptual(nn.Module):
    """LPIPS of pairs of pictures; its weights are buffers, so that nothing trains or saves them."""

    def __init__(self) -> None:
        """Weights are not set: `fill` sets them."""
        super().__init__()
        inward = 3
        for stage, widths in enumerate(STAGES):
            for layer, outward in enumerate(widths):
                self._empty(f"weight{stage}{layer}", outward, inward, 3, 3)
                self._empty(f"bias{stage}{layer}", outward)
                inward = outward
            self._empty(f"linear{stage}", inward)
        self.register_buffer(
            "shift", torch.tensor(SHIFT, device="cpu").view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor(SCALE, device="cpu").view(3, 1, 1), persistent=False
        )

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Distances: twice (B, 3, S, S) in [0, 1] -> (B,)."""
        first, second = self._scaled(image), self._scaled(other)
        total = torch.zeros(len(image), device=image.device)
        for stage in range(len(STAGES)):
            first, second = self._stage(first, stage), self._stage(second, stage)
            apart = (_unit(first) - _unit(second)).square()
            linear: Tensor = getattr(self, f"linear{stage}")
            total = total + torch.einsum("bchw,c->bhw", apart, linear).mean((1, 2))
        return total

    def fill(self, vgg: Path, linear: Path | None) -> "Perceptual":
        """Take weights from torchvision's vgg16, and linear ones from lpips; returns itself.

        Raises: InputError if a file is missing or holds other weights.
        """
        tensors, at = read_tensors(vgg), 0
        for stage, widths in enumerate(STAGES):
            for layer in range(len(widths)):
                self._take(f"weight{stage}{layer}", tensors, f"features.{at}.weight", vgg)
                self._take(f"bias{stage}{layer}", tensors, f"features.{at}.bias", vgg)
                at += 2  # a ReLU has a number, too
            at += 1
        weights = read_tensors(linear) if linear else {}
        for stage in range(len(STAGES)):
            if linear:
                self._take(f"linear{stage}", weights, f"lin{stage}.model.1.weight", linear)
            else:
                getattr(self, f"linear{stage}").fill_(1.0)
        return self

    def _empty(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.empty(shape, device="cpu"), persistent=False)

    def _take(self, name: str, tensors: dict[str, Tensor], theirs: str, path: Path) -> None:
        mine: Tensor = getattr(self, name)
        if theirs not in tensors or tensors[theirs].numel() != mine.numel():
            raise InputError(f"{path} lacks {theirs} of {mine.numel()} values; {_HOW}")
        mine.copy_(tensors[theirs].view(mine.shape))

    def _scaled(self, image: Tensor) -> Tensor:
        return (2 * image - 1 - self.get_buffer("shift")) / self.get_buffer("scale")

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        if stage:
            x = F.max_pool2d(x, 2)
        for layer in range(len(STAGES[stage])):
            weight, bias = (
                getattr(self, f"weight{stage}{layer}"),
                getattr(self, f"bias{stage}{layer}"),
            )
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
        return x


def _unit(x: Tensor) -> Tensor:
    """Features of unit length over the channels, in at least 32 bits."""
    x = x if x.dtype == torch.float64 else x.float()
    squares = x.square().sum(1, keepdim=True)
    return x / (squares.clamp_min(SMALL**2).sqrt() + SMALL)  # the root's slope at 0 is infinite


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of torch.save without other objects.

    Both published files are in the format of torch before 1.6, in which no object can be replaced.
    Raises: InputError if there is no file, or it is neither.
    """
    if not path.is_file():
        raise InputError(f"there are no weights at {path}; {_HOW}")
    try:
        return load_file(path)
    except SafetensorError:
        pass
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise InputError(
            f"{path} is neither a safetensors file nor tensors that torch.load reads with "
            f"weights_only: {type(error).__name__}; {_HOW}"
        ) from error
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
