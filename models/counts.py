"""Parameter and FLOP counts of a prior, from its sizes and real masks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from models.config import PriorConfig
from models.masks import Kind, image_mask, layer_kind


@dataclass(frozen=True, kw_only=True)
class PriorParameters:
    """Parameter counts of a prior, by kind."""

    matrices: int
    """Attention and MLP: 12 dim^2 per layer; the paper names its sizes by this count."""
    embeddings: int
    """Text and image tokens, text padding, text positions, rows and columns, start tokens."""
    unembeddings: int
    """Two untied matrices, one per vocabulary."""
    gains_and_biases: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.embeddings + self.unembeddings + self.gains_and_biases


def prior_parameters(config: PriorConfig) -> PriorParameters:
    """Count the parameters of a prior, without tensor-parallel padding."""
    dim, layers = config.dim, config.layers
    vocabularies = config.text_vocabulary + config.image_vocabulary
    places = 2 * config.text_length + 2 * config.grid
    starts = 2  # of text and of the image
    return PriorParameters(
        matrices=12 * dim * dim * layers,
        embeddings=(vocabularies + places + starts) * dim,
        unembeddings=vocabularies * dim,
        gains_and_biases=layers * (4 + 8) * dim + 2 * dim + vocabularies,
    )


def attended_pairs(config: PriorConfig) -> int:
    """Pairs of a query and a key that the masks of all layers allow, in one sample."""
    text, image = config.text_length, config.image_length
    around = text * (text + 1) // 2 + image * text
    kinds = [layer_kind(layer, config.layers) for layer in range(1, config.layers + 1)]
    return sum(around + _pairs(kind, config.grid, config.conv_kernel) for kind in kinds)


@lru_cache(maxsize=16)
def _pairs(kind: Kind, grid: int, conv_kernel: int) -> int:
    return int(image_mask(kind, grid, conv_kernel).sum())


def prior_flops(config: PriorConfig) -> int:
    """Floating-point operations of the matmuls of one sample, forward and backward.

    Attention counts only unmasked pairs; the head counts text positions over the text vocabulary,
    image positions over the codes. Backward counts twice; recomputation does not count.
    """
    matrices = 2 * 12 * config.dim**2 * config.layers * config.length
    attention = 4 * config.dim * attended_pairs(config)
    entries = config.text_length * config.text_vocabulary
    entries += config.image_length * config.image_vocabulary
    return 3 * (matrices + attention + 2 * config.dim * entries)


def step_flops(config: Any, batch: int) -> float:
    """FLOPs of a step over all ranks; 0 for models other than the prior."""
    return batch * prior_flops(config) if isinstance(config, PriorConfig) else 0.0
