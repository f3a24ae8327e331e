"""Sizes of the three networks; imports no torch, so that `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """A discrete VAE: pictures <-> a square grid of codes."""

    pixels: int = 32
    """Side of the square pictures, in pixels."""
    width: int = 32
    """Channels of the first encoder group; every later group doubles them."""
    groups: int = 3
    """Groups of residual blocks; a 2x2 max-pool follows each but the last."""
    blocks: int = 1
    """Residual blocks in a group."""
    bottleneck: int = 2
    """A block's hidden channels are its width divided by this (the paper: 4)."""
    gain: float = 1.0
    """Weight of a block's residual path; 0 = the paper's 1 / blocks^2."""
    codebook: int = 512
    """Number of codes (K)."""
    code_width: int = 32
    """Channels of a code's vector, the decoder's first layer."""
    min_log_scale: float = -1.5
    """Floor of the likelihood's log scale; flat backgrounds would drive it to -inf and dominate the
    loss (the paper's photos need none: -20)."""
    init: Literal["calibrated", "paper"] = "calibrated"
    """Initial weights. calibrated: decoder inputs that do not shrink with the codebook, and output
    layers fitted to a first batch. paper: every convolution from N(0, 1 / fan-in)."""
    epsilon: float = 0.1
    """Pixels are mapped into (epsilon, 1 - epsilon) before the logit-Laplace likelihood."""

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.pixels >> (self.groups - 1)

    @property
    def tokens(self) -> int:
        """Image tokens per picture."""
        return self.grid**2

    def problems(self) -> list[str]:
        sizes = (self.pixels, self.width, self.groups, self.blocks, self.bottleneck)
        if min(*sizes, self.code_width) < 1:
            return [
                "model.pixels, width, groups, blocks, bottleneck and code_width must be at least 1"
            ]
        problems = []
        step = 1 << (self.groups - 1)
        if self.pixels % step or self.pixels < step:
            nearest = max(step, round(self.pixels / step) * step)
            problems.append(
                f"model.pixels={self.pixels} is not a multiple of {step}, which {self.groups} "
                f"groups need; try {nearest}"
            )
        if not 2 <= self.codebook <= 65536:
            problems.append(f"model.codebook={self.codebook} must be 2 to 65536 (uint16 tokens)")
        if not 0 < self.epsilon < 0.5:
            problems.append(f"model.epsilon={self.epsilon} must be in (0, 0.5); the paper has 0.1")
        return problems


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The autoregressive transformer over text and image tokens."""

    dim: int = 192
    """Width of the residual stream."""
    heads: int = 3
    """Attention heads; each has dim / heads channels."""
    layers: int = 6
    """Pairs of an attention and an MLP resblock."""
    text_length: int = 24
    """Positions for text; shorter captions are padded with learned per-position embeddings."""
    text_weight: float = 0.125
    """Weight of the text loss; the image loss has the rest (the paper: 1/8 and 7/8)."""
    conv_kernel: int = 11
    """Side of the convolutional mask's window, odd (the paper: 11)."""
    text_vocabulary: int = 0
    """Entries of the tokenizer; 0 = taken from the token manifest."""
    image_vocabulary: int = 0
    """Codes of the dVAE; 0 = taken from the token manifest."""
    grid: int = 0
    """Side of the token grid; 0 = taken from the token manifest."""

    @property
    def image_length(self) -> int:
        return self.grid**2

    @property
    def length(self) -> int:
        """Positions of the whole stream."""
        return self.text_length + self.image_length

    def problems(self) -> list[str]:
        if min(self.dim, self.heads, self.layers, self.text_length, self.conv_kernel) < 1:
            return ["model.dim, heads, layers, text_length and conv_kernel must be at least 1"]
        problems = []
        if self.dim % self.heads:
            divisors = [h for h in range(1, 129) if self.dim % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - self.heads))
            problems.append(
                f"model.heads={self.heads} does not divide model.dim={self.dim}; try {nearest}"
            )
        if self.conv_kernel % 2 == 0:
            problems.append(
                f"model.conv_kernel={self.conv_kernel} must be odd; try {self.conv_kernel + 1}"
            )
        if not 0 <= self.text_weight <= 1:
            problems.append(f"model.text_weight={self.text_weight} must be in [0, 1]")
        return problems


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A small contrastive image/text model that ranks candidates."""

    pixels: int = 32
    """Side of the square pictures, in pixels."""
    patch: int = 4
    """Side of an image patch; must divide pixels."""
    dim: int = 128
    """Width of both transformers and of the shared space."""
    heads: int = 4
    """Attention heads of both transformers."""
    layers: int = 3
    """Layers of each transformer."""
    text_length: int = 24
    """Text positions."""
    text_vocabulary: int = 0
    """Entries of the tokenizer; 0 = taken from it."""

    def problems(self) -> list[str]:
        if min(self.pixels, self.patch, self.dim, self.heads, self.layers, self.text_length) < 1:
            return ["model.pixels, patch, dim, heads, layers and text_length must be at least 1"]
        problems = []
        if self.pixels % self.patch:
            problems.append(f"model.patch={self.patch} does not divide model.pixels={self.pixels}")
        if self.dim % self.heads:
            problems.append(f"model.heads={self.heads} does not divide model.dim={self.dim}")
        return problems
