"""What is known of an image tokenizer without its weights; imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from core.config import wrong_types
from models.config import DVAEConfig

CODEBOOK = 65_536
"""Maximum codes: token records hold uint16."""
Crop = Literal["random", "center"]
"""random: the prior's keyed crops (arXiv 2102.12092, listing 2); center: the central square."""
Head = Literal["nearest", "cosine", "gumbel"]
DOWN, DOWN_WITH_ATTENTION = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
PICTURE_CHANNELS = 3
UP, UP_WITH_ATTENTION = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


class TokenizerSizes(Protocol):
    """The sizes that the config of every tokenizer has."""

    @property
    def pixels(self) -> int:
        """Side of the square pictures."""

    @property
    def rows(self) -> int:
        """Rows of the token grid."""

    @property
    def columns(self) -> int:
        """Columns of the token grid."""

    @property
    def codebook(self) -> int:
        """Number of codes."""

    @property
    def crop(self) -> Crop:
        """How pictures are cropped to squares."""

    def problems(self) -> list[str]:
        """All problems of the sizes, each with its fix."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """All that the token job, the prior, sampling, scores and reports know of a tokenizer."""

    kind: str
    """dvae, or the name of a kind of the registry."""
    pixels: int
    """Side of the square pictures."""
    rows: int
    """Rows of the token grid."""
    columns: int
    """Columns of the token grid."""
    codebook: int
    """Number of codes."""
    digest: str
    """sha256 of its weights as one file."""
    crop: Crop = "random"
    """How pictures are cropped to squares."""

    @staticmethod
    def of(kind: str, sizes: TokenizerSizes, digest: str) -> "TokenizerFacts":
        """The facts of a tokenizer with these sizes and weights."""
        return TokenizerFacts(
            kind=kind,
            pixels=sizes.pixels,
            rows=sizes.rows,
            columns=sizes.columns,
            codebook=sizes.codebook,
            digest=digest,
            crop=sizes.crop,
        )

    @staticmethod
    def of_dvae(config: DVAEConfig, digest: str) -> "TokenizerFacts":
        """The facts of a dVAE with these sizes and weights."""
        return TokenizerFacts(
            kind="dvae",
            pixels=config.pixels,
            rows=config.grid,
            columns=config.grid,
            codebook=config.codebook,
            digest=digest,
        )

    @property
    def tokens(self) -> int:
        """Image tokens per picture."""
        return self.rows * self.columns

    def manifest(self) -> dict[str, object]:
        """Facts in the manifest of token records; `columns` only of a grid that is not square."""
        columns = {"columns": self.columns} if self.columns != self.rows else {}
        crop = {"crop": self.crop} if self.crop != "random" else {}
        return {
            "dvae": self.digest,
            "grid": self.rows,
            "image_vocabulary": self.codebook,
            **columns,
            **crop,
        }

    def problems(self) -> list[str]:
        problems = []
        if min(self.pixels, self.rows, self.columns) < 1:
            problems.append(
                f"the image tokenizer has {self.rows} x {self.columns} tokens of {self.pixels} "
                "pixels; all three must be at least 1"
            )
        if not 2 <= self.codebook <= CODEBOOK:
            problems.append(
                f"the image tokenizer has {self.codebook} codes; it must have 2 to {CODEBOOK} "
                "(uint16 tokens)"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the user says of a tokenizer's files."""

    pixels: int
    """Side of the square pictures."""
    crop: Crop
    """How pictures are cropped to squares."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """An imported tokenizer: its kind, and the sizes in that kind's own fields."""

    kind: str
    """Name of a kind of the registry."""
    sizes: dict[str, Any]
    """Fields of the kind's config."""


@dataclass(frozen=True, kw_only=True)
class VQBody:
    """Arguments of diffusers' VQModel, by its names, that Tapir checks; defaults are its own."""

    in_channels: int = 3
    """Channels of a picture, which are red, green and blue."""
    out_channels: int = 3
    """Channels of a drawn picture, the same three."""
    down_block_types: tuple[str, ...] = (DOWN,)
    """Blocks of the encoder, one a level."""
    up_block_types: tuple[str, ...] = (UP,)
    """Blocks of the decoder, one a level."""
    block_out_channels: tuple[int, ...] = (64,)
    """Channels of each level."""
    layers_per_block: int = 1
    """Residual blocks of a level."""
    act_fn: str = "silu"
    """Activation function."""
    latent_channels: int = 3
    """Channels between the body and the 1x1 convolutions at the codebook."""
    num_vq_embeddings: int = 256
    """Codes."""
    norm_num_groups: int = 32
    """Groups of every group norm."""
    vq_embed_dim: int | None = None
    """Width of a code's vector; None: the latent channels."""
    norm_type: Literal["group", "spatial"] = "group"
    """spatial: the decoder's norms read the codes too (MoVQ)."""
    mid_block_add_attention: bool = True
    """The middle blocks attend."""
    lookup_from_codebook: bool = False
    """Pictures are in [0, 1]."""

    @classmethod
    def problems_of(cls, body: dict[str, Any]) -> list[str]:
        """All problems of a network's arguments; those that only diffusers knows are left to it."""
        known = {name: value for name, value in body.items() if name in cls.__dataclass_fields__}
        return wrong_types(cls, known, "") or cls(**known).problems()

    def problems(self) -> list[str]:
        counts = {
            name: getattr(self, name)
            for name in ("layers_per_block", "latent_channels", "norm_num_groups", "vq_embed_dim")
        }
        problems = [
            f"{name}={value} must be at least 1"
            for name, value in counts.items()
            if value is not None and value < 1
        ]
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) != PICTURE_CHANNELS:
                problems.append(f"{name}={getattr(self, name)} must be 3: pictures are RGB")
        channels = list(self.block_out_channels)
        if wrong := [each for each in channels if each < 1 or each % max(self.norm_num_groups, 1)]:
            problems.append(
                f"block_out_channels={channels} has {wrong[0]}, not a multiple of the "
                f"{self.norm_num_groups} norm_num_groups"
            )
        levels = [len(channels), len(self.down_block_types), len(self.up_block_types)]
        if len(set(levels)) > 1 or not channels:
            problems.append(
                "block_out_channels, down_block_types and up_block_types have "
                f"{levels[0]}, {levels[1]} and {levels[2]} levels; all three need the same, at "
                "least 1"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """A VQ autoencoder with the convolutional body of diffusers' VQModel."""

    pixels: int
    """Side of the square pictures, in pixels."""
    head: Head
    """From encoder states to codes. nearest: smallest Euclidean distance to a code's vector.
    cosine: the same between vectors of length 1, which the decoder reads too. gumbel: the largest
    logit of a 1x1 convolution, without noise."""
    unit_range: bool
    """The network reads and draws pictures in [0, 1]; else in [-1, 1]."""
    crop: Crop
    """How pictures are cropped to squares."""
    body: dict[str, Any]
    """Arguments of diffusers' VQModel."""

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return int(self.body.get("num_vq_embeddings", 256))

    @property
    def step(self) -> int:
        """Pixels of a token's side."""
        levels = self.body.get("block_out_channels") or [None]
        return 1 << (len(levels) - 1)

    @property
    def rows(self) -> int:
        """Rows of the token grid."""
        return self.pixels // self.step

    @property
    def columns(self) -> int:
        """Columns of the token grid."""
        return self.rows

    def problems(self) -> list[str]:
        if wrong := VQBody.problems_of(self.body):
            return [f"the tokenizer's body: {each}; give the files of a VQModel" for each in wrong]
        if self.pixels < 1 or self.pixels % self.step:
            nearest = max(self.step, round(self.pixels / self.step) * self.step)
            return [
                f"pixels={self.pixels} is not a multiple of {self.step}, the side of a token of "
                f"this tokenizer; try --pixels {nearest}"
            ]
        return []
