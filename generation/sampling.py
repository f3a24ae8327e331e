"""Draw image tokens from a prior with key/value caches, keyed for each candidate."""

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.keys import KeyPart
from generation.config import SampleConfig
from models.config import PriorConfig
from models.draws import gumbel_noise


class Sampler:
    """A prior on one process, ready to decode."""

    def __init__(self, layers: nn.ModuleDict, config: PriorConfig) -> None:
        self.config = config
        modules = list(layers.values())
        self._embedding, self._blocks, self._head = modules[0], modules[1:-1], modules[-1]

    @torch.no_grad()
    def draw(
        self,
        text: Tensor,
        keys: list[tuple[KeyPart, ...]],
        settings: SampleConfig,
        given: Tensor | None = None,
    ) -> Tensor:
        """Draw one picture's codes for each row.

        Shapes: text (B, text_length) int64; given (B, n) codes that are kept -> (B, grid^2).
        """
        if len(keys) != len(text):
            raise ConfigError(f"{len(text)} captions but {len(keys)} keys")
        parts = []
        for start in range(0, len(text), settings.batch):
            part = slice(start, start + settings.batch)
            kept = given[part] if given is not None else None
            parts.append(self._draw(text[part], keys[part], settings, kept))
        return torch.cat(parts)

    def _draw(
        self,
        text: Tensor,
        keys: list[tuple[KeyPart, ...]],
        settings: SampleConfig,
        given: Tensor | None,
    ) -> Tensor:
        config, rows = self.config, len(text)
        shape = (config.image_length, config.image_vocabulary)
        noise = torch.stack([gumbel_noise(shape, *key, "sample") for key in keys])
        shape_kv = (rows, config.heads, config.length, config.dim // config.heads)
        caches = [(torch.zeros(shape_kv), torch.zeros(shape_kv)) for _ in self._blocks]
        codes = torch.zeros(rows, config.image_length, dtype=torch.int64)
        kept = 0 if given is None else given.shape[1]
        if given is not None:
            codes[:, :kept] = given
        first = self._embedding.embed_image(codes[:, : kept + 1])
        states = torch.cat([self._embedding.embed_text(text), first], dim=1)
        places = self._embedding.positions()
        start = 0
        for position in range(kept, config.image_length):
            logits = self._advance(states, caches, start)
            codes[:, position] = choose(logits, noise[:, position], settings)
            start += states.shape[1]
            if position + 1 < config.image_length:
                token = self._embedding.image(codes[:, position : position + 1])
                states = token + places[position + 1]
        return codes

    def _advance(self, x: Tensor, caches: list[tuple[Tensor, Tensor]], start: int) -> Tensor:
        for block, cache in zip(self._blocks, caches, strict=True):
            x = block.extend(x, cache, start)
        logits: Tensor = self._head.image_logits(x[:, -1])
        return logits


def choose(logits: Tensor, noise: Tensor, settings: SampleConfig) -> Tensor:
    """Pick one code a row: (B, K) logits and Gumbel noise -> (B,)."""
    if settings.top_k:
        least = logits.topk(min(settings.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.temperature == 0:
        return logits.argmax(1)
    return (logits / settings.temperature + noise).argmax(1)
