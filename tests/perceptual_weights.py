"""Weights of VGG16 and of LPIPS's linear layers, drawn by key: the real ones may not be shipped."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.critics.perceptual import STAGES
from models.initialization import generator


def drawn_vgg() -> dict[str, Tensor]:
    """Under torchvision's names, scaled so that features keep their size."""
    tensors, at, inward = {}, 0, 3
    for widths in STAGES:
        for outward in widths:
            for kind, shape in (("weight", (outward, inward, 3, 3)), ("bias", (outward,))):
                name = f"features.{at}.{kind}"
                scale = (2 / (9 * inward)) ** 0.5 if kind == "weight" else 0.1
                tensors[name] = scale * torch.randn(shape, generator=generator(0, name))
            inward, at = outward, at + 2
        at += 1
    return tensors


def drawn_linear() -> dict[str, Tensor]:
    """Under the names of lpips 0.1."""
    names = {f"lin{i}.model.1.weight": (1, w[-1], 1, 1) for i, w in enumerate(STAGES)}
    return {n: torch.rand(shape, generator=generator(0, n)) for n, shape in names.items()}


def drawn_pictures() -> tuple[Tensor, Tensor]:
    """Two batches of two pictures, (2, 3, 32, 32) in [0, 1]."""
    first, second = torch.rand(2, 2, 3, 32, 32, generator=generator(0, "pictures"))
    return first, second


def write_weights(folder: Path) -> tuple[Path, Path]:
    """Both as files: VGG16's as safetensors, the linear ones as torch saves them."""
    vgg, linear = folder / "vgg.safetensors", folder / "linear.pth"
    save_file(drawn_vgg(), vgg)
    torch.save(drawn_linear(), linear)
    return vgg, linear
