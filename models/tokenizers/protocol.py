"""What all parts of Tapir know of an image tokenizer, and what a network must do to be one."""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from models.code_encoder import CodeReader
from models.dvae import DVAE
from models.tokenizers.config import TokenizerFacts

Precision = Literal["fp32", "bf16"]


class ImageTokenizer(Protocol):
    """Pictures <-> codes on a grid, in raster order; frozen."""

    @property
    def facts(self) -> TokenizerFacts:
        """Its sizes and digest."""

    @property
    def device(self) -> torch.device:
        """Device that pictures and codes must be on."""

    def codes(self, pictures: Tensor) -> Tensor:
        """Encode: (B, 3, pixels, pixels) in [0, 1] -> (B, rows * columns) int64."""

    def pictures(self, codes: Tensor) -> Tensor:
        """Decode: (B, rows * columns) int64 -> (B, 3, pixels, pixels) float32 in [0, 1]."""


class TokenizerNetwork(nn.Module):
    """A network that the registry builds; all of its weights are parameters, none are buffers."""

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, pixels, pixels) in [0, 1] -> (B, rows * columns) int64."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """(B, rows * columns) int64 -> (B, 3, pixels, pixels) in [0, 1]."""
        raise NotImplementedError


class NetworkTokenizer:
    """A tokenizer whose network the registry built.

    In bf16 the encoder runs under autocast; a network finds the codes in fp32 by switching it off.
    """

    def __init__(
        self, network: TokenizerNetwork, facts: TokenizerFacts, precision: Precision
    ) -> None:
        self._network, self._half = network.eval().requires_grad_(False), precision == "bf16"
        self._facts = facts

    @property
    def facts(self) -> TokenizerFacts:
        return self._facts

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    @torch.no_grad()
    def codes(self, pictures: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self._half):
            return self._network.encode(pictures)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        return self._network.decode(codes).float().clamp(0, 1)


class DVAETokenizer:
    """A dVAE that Tapir trained, or of OpenAI's layout."""

    def __init__(self, dvae: DVAE, digest: str, precision: Precision = "fp32") -> None:
        self._dvae = dvae.eval().requires_grad_(False)
        self._reader = CodeReader(dvae, precision)
        self._facts = TokenizerFacts.of_dvae(dvae.config, digest)

    @property
    def facts(self) -> TokenizerFacts:
        return self._facts

    @property
    def device(self) -> torch.device:
        return self._reader.device

    def codes(self, pictures: Tensor) -> Tensor:
        return self._reader.codes(pictures)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        return self._dvae.picture(codes)
