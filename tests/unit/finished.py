"""Untrained but complete models, for tests of the stages after training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.config import to_json
from data_pipeline.text.bpe import count_words, load_tokenizer, save_tokenizer, train_bpe
from data_pipeline.text.words import known_words, save_words
from generation.config import ModelPaths
from generation.ranking import CONFIG, WEIGHTS
from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.initialization import generator
from models.prior import build_prior
from models.third_party import foreign_module
from training.export.weights import write_model

PIXELS = 16
SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
VIEW = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.2]}
"""Of a network of open_clip: sizes and preprocessing."""


def write_models(
    folder: Path, captions: list[str], seed: int = 0, dropout: float = 0.0
) -> ModelPaths:
    """Writes a dVAE, a prior, a CLIP and a tokenizer that match.

    `dropout`: above 0 the prior counts as trained for guidance.
    """
    models = ModelPaths(**{name: folder / name for name in ("prior", "dvae", "clip", "bpe")})
    save_tokenizer(train_bpe(captions, 280), models.bpe)
    save_words(known_words(count_words(captions)), models.bpe)
    tokenizer, digest = load_tokenizer(models.bpe)
    vocabulary = tokenizer.get_vocab_size()
    sizes = DVAEConfig(pixels=PIXELS, width=4, groups=3, codebook=16, code_width=8)
    dvae = {f"dvae.dvae.{k}": v.contiguous() for k, v in DVAE(sizes).state_dict().items()}
    digest_of_dvae = _write(models.dvae, "dvae", to_json(sizes), {}, dvae)
    facts = {"tokenizer": digest, "dvae": digest_of_dvae}
    prior = PriorConfig(
        dim=16,
        heads=2,
        layers=2,
        text_length=8,
        text_vocabulary=vocabulary,
        image_vocabulary=16,
        grid=4,
    )
    learned = {**facts, "caption_dropout": dropout} if dropout else facts
    _write(models.prior, "prior", to_json(prior), learned, build_prior(prior, seed).state_dict())
    ranker = ClipConfig(
        pixels=PIXELS, dim=16, heads=2, layers=2, text_length=8, text_vocabulary=vocabulary
    )
    clip = {f"clip.{k}": v for k, v in Clip(ranker, seed).state_dict().items()}
    _write(models.clip, "clip", to_json(ranker), facts, clip)
    return models


def write_open_clip(folder: Path) -> Path:
    """Writes a tiny open_clip checkpoint with keyed weights, as the hub lays it out."""
    open_clip = foreign_module("open_clip")
    weights = {
        name: value if value.dim() == 0 else torch.randn(value.shape, generator=generator(name)) / 4
        for name, value in open_clip.model.CLIP(**SIZES).state_dict().items()
    }
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": SIZES, "preprocess_cfg": VIEW}))
    save_file(weights, folder / WEIGHTS)
    return folder


def _write(folder: Path, stage: str, config: Any, facts: Any, tensors: dict[str, Tensor]) -> str:
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return write_model(folder, stage, config, facts, shapes, tensors.__getitem__)
