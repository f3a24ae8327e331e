"""A small contrastive image/text model; its cosine similarity ranks candidates.

Source: arXiv 2103.00020, with two bidirectional transformers.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ClipConfig
from models.initialization import init_normal

PAD = -1
INIT_STD = 0.03
FIRST_SCALE = math.log(1 / 0.07)
MOST_SCALE = math.log(100.0)
KEY_FACTOR = 0x5851F42D4C957F2D
"""Of a linear congruential generator modulo 2^64 (Knuth's MMIX)."""

Gather = Callable[[Tensor], Tensor]


class _Tower(nn.Module):
    """A transformer; its first position's output becomes the embedding."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.dim,
            config.heads,
            4 * config.dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.summary = nn.Embedding(1, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.project = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        summary = self.summary.weight.expand(len(x), 1, -1)
        if pad is not None:
            pad = F.pad(pad, (1, 0))
        states = self.layers(torch.cat([summary, x], dim=1), src_key_padding_mask=pad)
        return F.normalize(self.project(self.norm(states[:, 0])))


class Clip(nn.Module):
    """Image and text towers with a learned temperature."""

    def __init__(self, config: ClipConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        patches = (config.pixels // config.patch) ** 2
        self.patch = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.place = nn.Embedding(patches, config.dim)
        self.image_tower = _Tower(config)
        self.words = nn.Embedding(config.text_vocabulary, config.dim)
        self.word_place = nn.Embedding(config.text_length, config.dim)
        self.text_tower = _Tower(config)
        self.log_scale = nn.Parameter(self.place.weight.new_full((), FIRST_SCALE))
        init_normal(self, seed, {"in_proj_weight": INIT_STD * 2, "weight": INIT_STD * 2})

    def embed_image(self, image: Tensor) -> Tensor:
        """Unit vectors of pictures: (B, 3, S, S) in [0, 1] -> (B, dim)."""
        patches = self.patch(2 * image - 1).flatten(2).transpose(1, 2)
        out: Tensor = self.image_tower(patches + self.place.weight)
        return out

    def embed_text(self, text: Tensor) -> Tensor:
        """Unit vectors of captions: (B, T) ids, PAD after the caption -> (B, dim)."""
        words = self.words(text.clamp_min(0)) + self.word_place.weight
        out: Tensor = self.text_tower(words, text == PAD)
        return out

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.log_scale.clamp(max=MOST_SCALE).exp()
        return self.embed_image(batch["pixels"]), self.embed_text(batch["text"]), scale


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, captions: Tensor, gather: Gather, offset: int
) -> dict[str, Tensor]:
    """Symmetric cross-entropy of each pair against the pairs of all ranks with other captions.

    Pairs with an equal caption are masked out: as negatives, they would teach that a caption does
    not fit its pictures. `captions` are keys of the captions, (b,) int64. `gather` all-gathers
    (b, ...) with gradients; this rank's rows begin at `offset`.
    """
    targets = torch.arange(len(images), device=images.device) + offset
    same = captions[:, None] == gather(captions)
    same.scatter_(1, targets[:, None], False)
    by_image = (scale * images @ gather(texts).T).masked_fill(same, -torch.inf)
    by_text = (scale * texts @ gather(images).T).masked_fill(same, -torch.inf)
    loss = (F.cross_entropy(by_image, targets) + F.cross_entropy(by_text, targets)) / 2
    right = (by_image.argmax(1) == targets).float().mean()
    return {"loss": loss, "accuracy": right}


def caption_keys(text: Tensor) -> Tensor:
    """Hash of each caption: (B, T) ids -> (B,) int64."""
    keys = torch.zeros(len(text), dtype=torch.int64, device=text.device)
    for column in text.unbind(1):
        keys = (keys + column + 2) * KEY_FACTOR  # modulo 2^64
    return keys
