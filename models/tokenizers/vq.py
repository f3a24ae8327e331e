"""VQ autoencoders: the convolutional body of diffusers' VQModel, and three ways to codes.

Source: taming-transformers, taming/modules/vqvae/quantize.py; LlamaGen,
tokenizer/tokenizer_image/vq_model.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError
from models.quantizers import nearest_codes
from models.third_party import foreign_module
from models.tokenizers.config import VQConfig
from models.tokenizers.protocol import TokenizerNetwork

_MODULE = "diffusers.models.autoencoders.vq_model"


class CodeHead(nn.Module):
    """From encoder states to codes, and from codes to what the decoder reads."""

    def vectors(self) -> Tensor:
        """The vectors that the decoder reads: (K, D)."""
        raise NotImplementedError

    def codes(self, states: Tensor) -> Tensor:
        """(B, D, rows, columns) float32 -> (B, rows, columns) int64."""
        raise NotImplementedError


class Codebook(CodeHead):
    """Codes by the smallest Euclidean distance to their vectors."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)

    def vectors(self) -> Tensor:
        return self.embedding.weight

    def codes(self, states: Tensor) -> Tensor:
        flat = self.compared(states.permute(0, 2, 3, 1).flatten(0, 2))
        return nearest_codes(flat, self.vectors()).view(len(states), *states.shape[2:])

    def compared(self, states_nd: Tensor) -> Tensor:
        """States as they are compared with the vectors, (n, D)."""
        return states_nd


class CosineCodebook(Codebook):
    """Codes by the angle: states and vectors have length 1."""

    def vectors(self) -> Tensor:
        return F.normalize(self.embedding.weight)

    def compared(self, states_nd: Tensor) -> Tensor:
        return F.normalize(states_nd)


class GumbelCodebook(CodeHead):
    """Codes by the largest logit of a 1x1 convolution; the noise of training is left out."""

    def __init__(self, codes: int, inward: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inward, codes, 1)
        self.embed = nn.Embedding(codes, width)

    def vectors(self) -> Tensor:
        return self.embed.weight

    def codes(self, states: Tensor) -> Tensor:
        logits: Tensor = self.proj(states)
        return logits.argmax(1)


class VQNetwork(TokenizerNetwork):
    """Encoder, codebook and decoder."""

    def __init__(self, config: VQConfig) -> None:
        """Raises: ConfigError if diffusers is missing, or does not know an argument of the body."""
        super().__init__()
        model = vq_model(config.body)
        self.config, latent = config, int(model.config.latent_channels)
        width = int(model.config.vq_embed_dim or latent)
        self.encoder, self.quant_conv = model.encoder, model.quant_conv
        if config.head == "gumbel":
            self.quantize: CodeHead = GumbelCodebook(config.codebook, width, width)
        else:
            kind = CosineCodebook if config.head == "cosine" else Codebook
            self.quantize = kind(config.codebook, width)
        self.post_quant_conv, self.decoder = model.post_quant_conv, model.decoder
        self._spatial = model.config.norm_type == "spatial"

    def encode(self, pictures: Tensor) -> Tensor:
        scaled = pictures if self.config.unit_range else pictures * 2 - 1
        states = self.quant_conv(self.encoder(scaled))
        with torch.autocast(states.device.type, enabled=False):
            return self.quantize.codes(states.float()).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        grid = codes.view(len(codes), self.config.rows, self.config.columns)
        vectors = F.embedding(grid, self.quantize.vectors()).permute(0, 3, 1, 2).contiguous()
        condition = vectors if self._spatial else None
        drawn: Tensor = self.decoder(self.post_quant_conv(vectors), condition)
        return drawn if self.config.unit_range else (drawn + 1) / 2


def vq_model(body: dict[str, Any]) -> Any:
    """diffusers' VQModel with these arguments.

    Raises: ConfigError if diffusers is missing, or does not know an argument.
    """
    module: Any = foreign_module(_MODULE, "pip install tapir[tokenizers], or diffusers alone")
    try:
        return module.VQModel(**body)
    except Exception as error:  # diffusers checks few of its arguments
        raise ConfigError(
            f"diffusers makes no VQModel of {body}: {error}; give the files of one"
        ) from error
