"""The autoregressive transformer over text and image tokens, as layers that a pipeline can cut.

The stream has text_length + grid^2 inputs: start-of-text, the text but its last token, then
start-of-image and the image but its last token... position i predicts token i. Padding has a
learned embedding for each text position and is attended to, but is no target of the text loss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import PriorConfig
from models.draws import init_normal
from models.masks import full_mask, layer_kind

PAD = -1
"""Marks text positions behind the caption."""

Cache = tuple[Tensor, Tensor]


class PriorEmbedding(nn.Module):
    """Tokens -> states: (B, T) text ids and (B, I) codes -> (B, T + I, dim)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.text = nn.Embedding(config.text_vocabulary, dim)
        self.pad = nn.Embedding(config.text_length, dim)
        self.text_position = nn.Embedding(config.text_length, dim)
        self.image = nn.Embedding(config.image_vocabulary, dim)
        self.row = nn.Embedding(config.grid, dim)
        self.column = nn.Embedding(config.grid, dim)
        self.start = nn.Embedding(2, dim)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        text, image = self.embed_text(batch["text"]), self.embed_image(batch["image"])
        return torch.cat([text, image], dim=1)

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions: start-of-text, then the text shifted by one."""
        words = self.text(text.clamp_min(0))
        pads = self.pad.weight[None].expand_as(words)
        tokens = torch.where((text == PAD)[..., None], pads, words)
        start = self.start.weight[0].expand(len(text), 1, -1)
        shifted = torch.cat([start, tokens[:, :-1]], dim=1)
        return shifted + self.text_position.weight

    def embed_image(self, image: Tensor) -> Tensor:
        """Inputs of the first image positions: start-of-image, then the codes shifted by one.

        Shapes: (B, n) codes -> (B, n, dim); only the first n - 1 codes are read.
        """
        count = image.shape[1]
        start = self.start.weight[1].expand(len(image), 1, -1)
        shifted = torch.cat([start, self.image(image[:, : count - 1])], dim=1)
        return shifted + self.positions()[:count]

    def positions(self) -> Tensor:
        """Row + column embeddings in raster order, (grid * grid, dim)."""
        grid = self.config.grid
        both = self.row.weight[:, None] + self.column.weight[None]
        return both.reshape(grid * grid, -1)


class PriorBlock(nn.Module):
    """An attention resblock and an MLP resblock, normalised on the way in."""

    def __init__(self, config: PriorConfig, layer: int) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        kind = layer_kind(layer, config.layers)
        mask = full_mask(kind, config.text_length, config.grid, config.conv_kernel)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        x = x + self._join(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))
        return x + self._mlp(x)

    def extend(self, x: Tensor, cache: Cache, start: int) -> Tensor:
        """Run positions start.. with the keys and values of all earlier ones in the cache.

        Shapes: x is (B, n, dim); the caches are (B, heads, length, dim / heads).
        """
        q, k, v = self._heads(x)
        stop = start + x.shape[1]
        keys, values = cache
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        mask: Tensor = self.mask[start:stop, :stop]  # type: ignore[index]
        attended = F.scaled_dot_product_attention(
            q, keys[:, :, :stop], values[:, :, :stop], attn_mask=mask
        )
        x = x + self._join(attended)
        return x + self._mlp(x)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def _join(self, attended: Tensor) -> Tensor:
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return out


@dataclass(frozen=True, kw_only=True)
class PriorLogits:
    """Text logits over the text vocabulary, image logits over the codebook."""

    text: Tensor
    image: Tensor


class PriorHead(nn.Module):
    """States -> logits, split: text positions over text, image positions over codes."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.text_length = config.text_length
        self.norm = nn.LayerNorm(config.dim)
        self.text = nn.Linear(config.dim, config.text_vocabulary)
        self.image = nn.Linear(config.dim, config.image_vocabulary)

    def forward(self, x: Tensor) -> PriorLogits:
        """Logits in fp32, whatever the precision of the blocks (the paper, appendix D)."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.float())
            text, image = x[:, : self.text_length], x[:, self.text_length :]
            return PriorLogits(text=self.text(text), image=self.image(image))

    def image_logits(self, x: Tensor) -> Tensor:
        """Code logits of image states."""
        out: Tensor = self.image(self.norm(x))
        return out


def prior_layers(config: PriorConfig, seed: int) -> list[tuple[str, nn.Module]]:
    """The named layers of a prior, initialised by key and parameter name.

    Matrices start with a deviation of dim^-1/2 (0.016 at the paper's width), what enters the
    residual stream with that over the root of the resblocks. A fixed 0.02 makes narrow models
    learn slowly: docs/LOG.md.
    """
    blocks = [PriorBlock(config, layer) for layer in range(1, config.layers + 1)]
    layers: list[tuple[str, nn.Module]] = [("embedding", PriorEmbedding(config))]
    layers += [(f"block{i:03d}", block) for i, block in enumerate(blocks)]
    layers += [("head", PriorHead(config))]
    std = config.dim**-0.5
    deep = std / (2 * config.layers) ** 0.5
    scales = {"out.weight": deep, "down.weight": deep, "weight": std}
    init_normal(nn.ModuleDict(dict(layers)), seed, scales)
    return layers


def prior_loss(
    logits: PriorLogits, batch: dict[str, Tensor], text_weight: float
) -> dict[str, Tensor]:
    """The weighted loss: text_weight * text + (1 - text_weight) * image cross-entropy.

    The text loss of a sample is the mean over its own tokens, so that a batch's loss is the mean
    over its samples, however they are spread over ranks.
    Units: nats a token.
    """
    text = batch["text"]
    each = F.cross_entropy(
        logits.text.flatten(0, 1), text.flatten(), ignore_index=PAD, reduction="none"
    )
    counts = (text != PAD).sum(1).clamp_min(1)
    text_loss = (each.view_as(text).sum(1) / counts).mean()
    image_loss = F.cross_entropy(logits.image.flatten(0, 1), batch["image"].flatten())
    loss = text_weight * text_loss + (1 - text_weight) * image_loss
    return {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}
