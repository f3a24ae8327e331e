"""Sizes of the three networks; imports no torch, so that `--help` stays fast."""

import math
from dataclasses import dataclass
from math import prod
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
    quantizer: Literal["gumbel", "vq", "fsq"] = "gumbel"
    """How encoder outputs become codes. gumbel: relaxed draws of K logits (the paper). vq: the
    nearest of K learned vectors. fsq: each of a few channels is rounded to one of its levels."""
    codebook: int = 512
    """Number of codes (K)."""
    vector: int = 8
    """vq: channels of a code's vector."""
    levels: tuple[int, ...] = (8, 8, 8)
    """fsq: levels of each channel; their product is the codebook."""
    code_width: int = 32
    """Channels of the decoder's first layer, which maps codes to vectors."""
    min_log_scale: float = -1.5
    """Floor of the likelihood's log scale; flat backgrounds would drive it to -inf and dominate the
    loss (the paper's photos need none: -20)."""
    init: Literal["calibrated", "paper"] = "calibrated"
    """Initial weights. calibrated: decoder inputs that do not shrink with the codebook, and output
    layers fitted to a first batch. paper: every convolution from N(0, 1 / fan-in)."""
    epsilon: float = 0.1
    """Pixels are mapped into (epsilon, 1 - epsilon) before the logit-Laplace likelihood."""

    @property
    def code_channels(self) -> int:
        """Channels of the encoder's outputs and of the decoder's inputs."""
        return {"gumbel": self.codebook, "vq": self.vector, "fsq": len(self.levels)}[self.quantizer]

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
        return problems + self._quantizer_problems()

    def _quantizer_problems(self) -> list[str]:
        if self.quantizer == "vq" and self.vector < 1:
            return [f"model.vector={self.vector} must be at least 1; try 8"]
        if self.quantizer != "fsq":
            return []
        levels, product = " ".join(map(str, self.levels)), prod(self.levels)
        if not self.levels or min(self.levels) < 3:
            return [f"model.levels={levels} must each be at least 3; try 8 8 8, of 512 codes"]
        if product != self.codebook:
            return [
                f"model.levels={levels} make {product} codes, not model.codebook={self.codebook}; "
                f"try --model.codebook {product}, or other levels"
            ]
        return []


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
    """Rows of the token grid; 0 = taken from the token manifest."""
    columns: int = 0
    """Columns of the token grid; 0 = as many as rows, or taken from the token manifest."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm of the residual stream. layer: mean and variance, with a bias (the paper). rms: root
    mean square alone, without a bias."""
    qk_norm: bool = False
    """Divide each head's queries and keys by their root mean square, with a learned gain per
    channel: attention logits stay bounded at high learning rates (the paper: none)."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned: an embedding per text position, row and column is added to the inputs (the paper).
    rotary: queries and keys are rotated, half of the pairs of channels by row, half by column."""
    mlp: Literal["gelu", "gated"] = "gelu"
    """gelu: two matrices, 4 dim wide (the paper). gated: silu(gate) * up, three matrices 8/3 dim
    wide, about as many parameters."""
    tied: bool = False
    """Use the token embeddings as output matrices too (the paper does not state it)."""

    @property
    def grid_columns(self) -> int:
        """Columns of the token grid."""
        return self.columns or self.grid

    @property
    def image_length(self) -> int:
        return self.grid * self.grid_columns

    @property
    def mask(self) -> tuple[int, int, int, int]:
        """Sizes of the masks after their kind: text, rows, window, columns."""
        return self.text_length, self.grid, self.conv_kernel, self.columns

    @property
    def hidden(self) -> int:
        """Channels inside the MLP; those of the gated one are a multiple of 64."""
        return 4 * self.dim if self.mlp == "gelu" else 64 * -(-self.dim // 24)

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
        if self.columns < 0:
            problems.append(f"model.columns={self.columns} is negative; 0 is a square grid")
        if self.positions == "rotary" and self.dim % (4 * self.heads):
            fit = [h for h in range(1, self.dim) if self.dim % (4 * h) == 0]
            nearest = min(fit, key=lambda h: abs(h - self.heads), default=0)
            problems.append(
                "model.positions=rotary needs a multiple of 4 channels a head; model.dim="
                f"{self.dim} over {self.heads} heads has {self.dim / self.heads:g}; "
                + (f"try heads {nearest}" if nearest else "try dim 64")
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of a prior's matrices, trained in place of its weights."""

    rank: int = 0
    """Rank of the adapters of the attention and MLP matrices; 0 = none: train the weights. Needs
    --init, the model to adapt."""
    alpha: float = 0.0
    """Adapters are multiplied by alpha / rank; 0 = by 1."""

    @property
    def scale(self) -> float:
        """Factor of the product of an adapter's two matrices."""
        return self.alpha / self.rank if self.alpha else 1.0

    def problems(self, dim: int, base: str, compresses: bool) -> list[str]:
        """Problems for a prior of this width, with this `init`, which compresses or not."""
        problems = []
        if not 0 <= self.rank < dim:
            problems.append(
                f"lora.rank={self.rank} must be 0 (no adapters) or a low rank, below model.dim="
                f"{dim}; try 8"
            )
        if not 0 <= self.alpha < math.inf:
            problems.append(f"lora.alpha={self.alpha} must not be negative; 0 = the rank")
        if self.rank > 0 and not base:
            problems.append("lora.rank adapts a trained prior: give its run as --init")
        if self.rank > 0 and compresses:
            problems.append(
                "compress.rank: adapters are smaller than their factors would be, and are sent "
                "whole; set --compress.rank 0"
            )
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
