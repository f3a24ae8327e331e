"""Feature extractors of FID and IS: models/critics/inception.py, or CLIP as a proxy."""

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.text.bpe import encode
from data_pipeline.tokenize.encode import to_tensor
from models.clip import MOST_SCALE, Clip
from models.critics.inception import Features
from training.tasks.task import pad_text

MOST_CLASSES = 1000
"""Maximum captions that the proxy uses as classes."""
_TOGETHER = 32


class Network(Protocol):
    """A feature extractor."""

    label: str
    """Name of its scores in reports."""
    proxy: bool
    """True if its scores are not comparable with published ones."""
    name: str
    """The network and its weights."""

    def __call__(self, pictures: NDArray[np.uint8]) -> Features:
        """(n, S, S, 3) -> features (n, D) and logits (n, C), float32."""


class ClipProxy:
    """CLIP in Inception's place: its unit vectors are features, captions stand for classes.

    A picture's logits are CLIP's scaled cosines with the first MOST_CLASSES captions.
    """

    label = "proxy FID and IS (CLIP features), not comparable with published figures"
    proxy = True

    def __init__(self, clip: Clip, digest: str, tokenizer: Tokenizer, captions: Sequence[str]):
        self._clip, self._device = clip, clip.log_scale.device
        classes = list(captions[:MOST_CLASSES])
        self.name = f"clip {digest}, {len(classes)} captions as classes"
        text = pad_text([encode(tokenizer, c) for c in classes], clip.config.text_length)
        with torch.no_grad():
            parts = text.to(self._device).split(_TOGETHER)
            class_vectors = torch.cat([clip.embed_text(part) for part in parts])
            self._classes: Tensor = clip.log_scale.clamp(max=MOST_SCALE).exp() * class_vectors

    @torch.no_grad()
    def __call__(self, pictures: NDArray[np.uint8]) -> Features:
        parts = to_tensor(pictures).split(_TOGETHER)
        features = torch.cat([self._clip.embed_image(part.to(self._device)) for part in parts])
        return features.cpu().numpy(), (features @ self._classes.T).cpu().numpy()


def blurred(pictures: NDArray[np.uint8], radius: float) -> NDArray[np.uint8]:
    """Blur pictures by a Gaussian.

    Shapes: (n, S, S, 3) -> the same. Units: the radius is the Gaussian's standard deviation in
    pixels of the pictures before the network resizes them; 0 = no blur.
    The paper's figure 9 says "blur kernel radius" and no more; its pictures have 256 pixels.
    """
    if radius == 0:
        return pictures
    rows = [cv2.GaussianBlur(picture, (0, 0), radius) for picture in pictures]
    return np.stack(rows).astype(np.uint8)
