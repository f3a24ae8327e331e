"""Parameter and FLOP counts of a prior, from its sizes and real masks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from models.attention.masks import Kind, image_mask, layer_kind
from models.config import PriorConfig


@dataclass(frozen=True, kw_only=True)
class PriorParameters:
    """Parameter counts of a prior, by kind."""

    matrices: int
    """Attention and MLP: 12 dim^2 per layer; the paper names its sizes by this count."""
    embeddings: int
    """Text and image tokens, text padding, text positions, rows and columns, start tokens."""
    unembeddings: int
    """Two matrices, one per vocabulary; 0 if they are the embeddings."""
    gains_and_biases: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.embeddings + self.unembeddings + self.gains_and_biases


def prior_parameters(config: PriorConfig) -> PriorParameters:
    """Count the parameters of a prior, without tensor-parallel padding."""
    dim, layers = config.dim, config.layers
    vocabularies = config.text_vocabulary + config.image_vocabulary
    pads, starts = config.text_length, 2  # of text and of the image
    places = config.text_length + config.grid + config.grid_columns
    if config.positions == "rotary":
        places = 0
    norm = dim if config.norm == "rms" else 2 * dim
    biases = 4 * dim + (config.hidden if config.mlp == "gelu" else 0)  # q, v, out, down, up
    heads = 2 * dim if config.qk_norm else 0
    return PriorParameters(
        matrices=block_matrices(config) * layers,
        embeddings=(vocabularies + pads + places + starts) * dim,
        unembeddings=0 if config.tied else vocabularies * dim,
        gains_and_biases=layers * (2 * norm + biases + heads) + norm + vocabularies,
    )


def block_matrices(config: PriorConfig) -> int:
    """Parameters of a block's matrices, and multiplications per position."""
    matrices = 2 if config.mlp == "gelu" else 3
    return 4 * config.dim**2 + matrices * config.dim * config.hidden


def attended_pairs(config: PriorConfig) -> int:
    """Pairs of a query and a key that the masks of all layers allow, in one sample."""
    text, image = config.text_length, config.image_length
    around = text * (text + 1) // 2 + image * text
    kinds = [layer_kind(layer, config.layers) for layer in range(1, config.layers + 1)]
    shape = config.grid, config.conv_kernel, config.columns
    return sum(around + _pairs(kind, *shape) for kind in kinds)


@lru_cache(maxsize=16)
def _pairs(kind: Kind, grid: int, conv_kernel: int, columns: int) -> int:
    return int(image_mask(kind, grid, conv_kernel, columns).sum())


def prior_flops(config: PriorConfig) -> int:
    """Floating-point operations of the matmuls of one sample, forward and backward.

    Attention counts only unmasked pairs; the head counts text positions over the text vocabulary,
    image positions over the codes. Backward counts twice; recomputation does not count.
    """
    matrices = 2 * block_matrices(config) * config.layers * config.length
    attention = 4 * config.dim * attended_pairs(config)
    entries = config.text_length * config.text_vocabulary
    entries += config.image_length * config.image_vocabulary
    return 3 * (matrices + attention + 2 * config.dim * entries)


def step_flops(config: Any, batch: int) -> float:
    """FLOPs of a step over all ranks; 0 for models other than the prior."""
    return batch * prior_flops(config) if isinstance(config, PriorConfig) else 0.0
