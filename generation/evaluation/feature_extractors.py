"""Feature extractors of FID and IS: Inception, or CLIP as a proxy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor, nn

from core.errors import InputError
from core.files.atomic import sha256
from data_pipeline.text.bpe import encode
from data_pipeline.tokenize.encode import to_tensor
from generation.third_party import foreign_module
from models.clip import MOST_SCALE, Clip
from parallel.device import CPU
from training.tasks.task import pad_text

MOST_CLASSES = 1000
"""Maximum captions that the proxy uses as classes."""
_TOGETHER = 32
_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_MODULE = "torch_fidelity.feature_extractor_inceptionv3"
_HOW = (
    f"get {_WEIGHTS} from the releases of torch-fidelity (or pt_inception-2015-12-05-6726825d.pth "
    'from those of pytorch-fid) and turn it into safetensors:\n  python -c "import torch, '
    "safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load("
    f"'{_WEIGHTS}', weights_only=True).items()}}, 'inception.safetensors')\""
)

Features = tuple[NDArray[np.float32], NDArray[np.float32]]


class Network(Protocol):
    """A feature extractor."""

    label: str
    """Name of its scores in reports."""
    name: str
    """The network and its weights."""

    def __call__(self, pictures: NDArray[np.uint8]) -> Features:
        """(n, S, S, 3) -> features (n, D) and logits (n, C), float32."""


class Inception:
    """The Inception network of published FIDs; it resizes to 299 pixels itself."""

    label = "FID and IS (Inception features)"

    def __init__(self, path: Path, device: torch.device = CPU) -> None:
        tensors, digest = _read(path)
        self.name = f"inception {digest}"
        self._device = device
        self._network = _built(tensors, path).to(device)

    @torch.no_grad()
    def __call__(self, pictures: NDArray[np.uint8]) -> Features:
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        rows = [self._network(part.to(self._device)) for part in pixels.split(_TOGETHER)]
        features, logits = (torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True))
        return features, logits


class ClipProxy:
    """CLIP in Inception's place: its unit vectors are features, captions stand for classes.

    A picture's logits are CLIP's scaled cosines with the first MOST_CLASSES captions.
    """

    label = "proxy FID and IS (CLIP features), not comparable with published figures"

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


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise InputError(f"there are no Inception weights at {path}; {_HOW}")
    data = path.read_bytes()
    try:
        return load(data), sha256(data)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a safetensors file, and no pickle is loaded; {_HOW}"
        ) from error


def _built(tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's network with these weights: it would download a pickle when it is made."""
    module: Any = foreign_module(_MODULE)
    download = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: tensors
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = module.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"]
            )
            return network
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(
            f"{path} holds other weights than this Inception's ({first[0].strip()[:100]}); {_HOW}"
        ) from error
    finally:
        module.load_state_dict_from_url = download
