"""Networks that rank candidates: our CLIP, or a local checkpoint of open_clip."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from core.errors import ConfigError, InputError
from data_pipeline.text.bpe import encode, load_tokenizer
from data_pipeline.tokenize.encode import to_bytes
from models.clip import Clip
from models.third_party import foreign_module
from parallel.device import CPU
from training.export.names import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from training.export.weights import build_model, open_model
from training.tasks.task import pad_text

CONFIG, WEIGHTS = OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
_TOKENIZER = "tokenizer.json"
_MODES = ("bicubic", "bilinear")
_PICKLES = (".bin", ".pt", ".pth")
_CONVERT = (
    "import torch, safetensors.torch as s; w = torch.load('{pickle}', weights_only=True); "
    "s.save_file({{k: v.clone() for k, v in w.get('state_dict', w).items()}}, '{weights}')"
)
"""Command for a user who trusts a pickle; Tapir itself loads none."""

CAPTIONS = 8
"""Captions that are embedded together."""
OPEN_CLIP_TOGETHER = 8
"""Pictures that a network of open_clip embeds together."""


class Ranker(Protocol):
    """Scores how well pictures fit captions."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def digest(self) -> str:
        """sha256 of its weights."""

    def scores(self, captions: list[str], pixels: Tensor, count: int) -> NDArray[Any]:
        """Cosine of each caption with its `count` pictures.

        Shapes: (captions * count, 3, S, S) in [0, 1] -> (captions, count).
        """


@dataclass(frozen=True, kw_only=True)
class TapirRanker:
    """A CLIP trained by Tapir."""

    clip: Clip
    tokenizer: Tokenizer
    digest: str
    name: str = "CLIP by Tapir"

    @torch.no_grad()
    def scores(self, captions: list[str], pixels: Tensor, count: int) -> NDArray[Any]:
        length = self.clip.config.text_length
        text = pad_text([encode(self.tokenizer, c) for c in captions], length)
        device, size = self.clip.log_scale.device, pictures_together(self.clip.config.pixels)
        text_vectors = in_parts(lambda part: self.clip.embed_text(part.to(device)), text, CAPTIONS)
        images = in_parts(lambda part: self.clip.embed_image(part.to(device)), pixels, size)
        return _cosines(text_vectors, images, count)


@dataclass(frozen=True, kw_only=True)
class OpenClipRanker:
    """A network of open_clip, with its own tokenizer and preprocessing."""

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    digest: str
    name: str

    @torch.no_grad()
    def scores(self, captions: list[str], pixels: Tensor, count: int) -> NDArray[Any]:
        device = next(self.model.parameters()).device
        text = self.tokenizer(captions).to(device)
        text_vectors = in_parts(
            lambda part: self.model.encode_text(part, normalize=True), text, CAPTIONS
        )

        def look(part: Tensor) -> Tensor:
            vectors: Tensor = self.model.encode_image(self.view(part).to(device), normalize=True)
            return vectors

        images = in_parts(look, pixels, OPEN_CLIP_TOGETHER)
        return _cosines(text_vectors, images, count)

    def view(self, pixels: Tensor) -> Tensor:
        """Preprocess pictures to the network's size, mean and standard deviation.

        Resizes whole bytes, as open_clip does with Pillow.
        Shapes: (B, 3, S, S) in [0, 1] -> the same.
        """
        config = self.model.visual.preprocess_cfg
        size, mode = config["size"], config["interpolation"]
        shape = (size, size) if isinstance(size, int) else tuple(size)
        whole = torch.from_numpy(to_bytes(pixels)).permute(0, 3, 1, 2).contiguous()
        resized = F.interpolate(whole, shape, mode=mode, antialias=True) / 255
        mean, deviation = (torch.tensor(config[key], device=CPU) for key in ("mean", "std"))
        return (resized - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def open_ranker(clip: Path, bpe: Path, device: torch.device = CPU, pixels: int = 0) -> Ranker:
    """The CLIP of a run folder, or the open_clip checkpoint in a folder.

    `pixels` is the side of the pictures to rank; 0 if unknown.
    Raises: InputError if the run's CLIP has another tokenizer than `bpe` or was trained on pictures
    of another size, or the folder of open_clip is incomplete.
    """
    if any((clip / name).is_file() for name in (CONFIG, WEIGHTS)):
        return _open_clip(clip, device)
    saved = open_model(clip, "clip")
    tokenizer, digest = load_tokenizer(bpe)
    if saved.facts["tokenizer"] != digest:
        raise InputError(f"the CLIP in {clip} was trained with another tokenizer than {bpe}")
    if pixels not in (0, saved.config["pixels"]):
        raise InputError(
            f"the CLIP in {clip} was trained on pictures of {saved.config['pixels']} pixels, the "
            f"dVAE's have {pixels}; train one with --model.pixels {pixels}"
        )
    model: Any = build_model(saved)
    return TapirRanker(clip=model.to(device), tokenizer=tokenizer, digest=saved.digest)


def _open_clip(folder: Path, device: torch.device) -> OpenClipRanker:
    """Load a folder as the Hugging Face hub lays it out; nothing is downloaded.

    Raises: InputError if something is missing or does not fit; ConfigError if open_clip is missing.
    """
    weights = _weights(folder)
    _refuse_foreign_parts(folder)
    open_clip = foreign_module("open_clip")
    place = f"local-dir:{folder}"
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights come from the global state
            model = open_clip.create_model(place, require_pretrained=True).eval()
        tokenizer = open_clip.get_tokenizer(place)
    except ImportError as error:
        raise ConfigError(
            f"the tokenizer of {folder} needs the package transformers ({error}); pip install "
            "transformers, or choose a checkpoint with open_clip's own tokenizer"
        ) from error
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{folder} holds no checkpoint that open_clip reads: {error}") from error
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{weights}: {broken[0]} holds values like NaN; copy the file again")
    if model.visual.preprocess_cfg["interpolation"] not in _MODES:
        raise InputError(f"{folder / CONFIG}: interpolation must be one of {', '.join(_MODES)}")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"open_clip {folder.absolute().name}"
    return OpenClipRanker(model=model.to(device), tokenizer=tokenizer, digest=digest, name=name)


def _weights(folder: Path) -> Path:
    weights = folder / WEIGHTS
    if weights.is_file():
        return weights
    pickles = sorted(p for p in folder.iterdir() if p.suffix in _PICKLES)
    if not pickles:
        raise InputError(f"there is no {weights}; copy it from where {CONFIG} is from")
    command = _CONVERT.format(pickle=pickles[0], weights=weights)
    raise InputError(
        f"{pickles[0]} is a pickle, which is not loaded; get {WEIGHTS} from where it is from, or, "
        f'if you trust it, convert it: python -c "{command}"'
    )


def _refuse_foreign_parts(folder: Path) -> None:
    """Raise InputError unless all that the config names is in the folder or in open_clip."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())["model_cfg"]
        text, images = config["text_cfg"], str(config["vision_cfg"].get("timm_model_name", ""))
        tower, tokenizer = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    except FileNotFoundError as error:
        raise InputError(f"there is no {path} beside {WEIGHTS}; copy it there") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a config of open_clip: {error!r}; copy it again"
        ) from error
    if tower or ":" in images:
        raise InputError(
            f"{path}: its tower {tower or images} is not in the folder, and nothing is downloaded; "
            "choose a checkpoint with open_clip's own towers"
        )
    if tokenizer and not (folder / _TOKENIZER).is_file():
        raise InputError(
            f"{folder} lacks the files of its tokenizer {tokenizer}; copy {_TOKENIZER} and "
            "tokenizer_config.json of the same checkpoint there (nothing is downloaded)"
        )


def _cosines(text_vectors: Tensor, images: Tensor, count: int) -> NDArray[Any]:
    """(captions, D) and (captions * count, D) unit vectors -> (captions, count)."""
    pairs = images.view(len(text_vectors), count, -1) * text_vectors[:, None]
    return np.asarray(pairs.sum(-1).cpu().numpy())


PIXELS_TOGETHER = 2**14
"""Pixels that go through a network at once: 16 pictures of 32x32, one of 128x128 or more."""


def in_parts(work: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """Apply `work` to parts of exactly `size` rows, the last one padded with zeros.

    A matmul or convolution of another batch size may sum in another order, so that the last bits
    of a picture would depend on its batch.
    """
    outputs = []
    for part in rows.split(size):
        filled = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
        outputs.append(work(filled)[: len(part)])
    return torch.cat(outputs)


def pictures_together(side: int) -> int:
    """Pictures of this side, in pixels, that go through a network at once."""
    return max(1, PIXELS_TOGETHER // side**2)
