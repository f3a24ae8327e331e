"""A patch discriminator, trained beside a dVAE in the same backward pass and by the same optimiser.

Source: arXiv 1611.07004 (PatchGAN), 2012.09841 (hinge loss beside a VQGAN). Features are normalised
over each picture alone: statistics of a batch would differ between meshes.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialization import init_normal

SLOPE = 0.2
FIRST_SCALE = 0.02
"""Standard deviation of the initial weights."""
KERNEL, PADDING = 4, 1


class PatchConv(nn.Conv2d):
    """A convolution whose weights can be held constant for one call."""

    def forward(self, x: Tensor, fixed: bool) -> Tensor:  # type: ignore[override]
        """(B, C, h, w); `fixed`: gradients reach the input alone."""
        assert self.bias is not None, "every layer has one"
        weight, bias = self.weight, self.bias
        if fixed:
            weight, bias = weight.detach(), bias.detach()
        return F.conv2d(x, weight, bias, self.stride, PADDING)


class Discriminator(nn.Module):
    """Scores of patches: positive for real ones."""

    def __init__(self, width: int, layers: int, seed: int = 0) -> None:
        """`layers`: convolutions of stride 2; each after the first doubles the width, up to 8 times
        `width`."""
        super().__init__()
        widths = [3, *(width * min(2**i, 8) for i in range(layers + 1))]
        self.convs = nn.ModuleList(
            PatchConv(inward, outward, KERNEL, stride=2 if i < layers else 1)
            for i, (inward, outward) in enumerate(pairwise(widths))
        )
        self.output = PatchConv(widths[-1], 1, KERNEL)
        init_normal(self, seed, {"weight": FIRST_SCALE}, "discriminator.")

    def forward(self, image: Tensor, fixed: bool = False) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, 1, h, w); `fixed`: the weights get no gradient."""
        x = 2 * image - 1
        for i, conv in enumerate(self.convs):
            x = conv(x, fixed)
            x = F.leaky_relu(F.group_norm(x, 1) if i else x, SLOPE)
        out: Tensor = self.output(x, fixed)
        return out if out.dtype == torch.float64 else out.float()


def hinge_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """The discriminator's loss, for scores of real pictures and of reconstructions."""
    return (F.relu(1 - real).mean() + F.relu(1 + drawn).mean()) / 2
