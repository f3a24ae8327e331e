"""Untrained models of the demo's sizes that fit each other: for figures of speed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config import to_json
from data_pipeline.text.bpe import load_tokenizer, save_tokenizer, train_bpe
from generation.config import ModelPaths
from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import build_prior
from training.export.weights import write_model


def write_untrained(
    folder: Path,
    captions: list[str],
    dvae: DVAEConfig,
    prior: PriorConfig,
    dropout: float = 0.1,
) -> ModelPaths:
    """Write dvae, prior, clip and bpe; vocabularies and grid of `prior` are filled in.

    `dropout`: above 0 the prior counts as trained for guidance.
    """
    models = ModelPaths(
        prior=folder / "prior", dvae=folder / "dvae", clip=folder / "clip", bpe=folder / "bpe"
    )
    save_tokenizer(train_bpe(captions, 400), models.bpe)
    tokenizer, digest = load_tokenizer(models.bpe)
    words = tokenizer.get_vocab_size()
    weights = {f"dvae.dvae.{k}": v for k, v in DVAE(dvae).state_dict().items()}
    facts = {
        "tokenizer": digest,
        "dvae": _write(models.dvae, "dvae", dvae, {}, weights),
        "caption_dropout": dropout,
    }
    sizes = to_json(prior) | {
        "text_vocabulary": words,
        "image_vocabulary": dvae.codebook,
        "grid": dvae.pixels >> (dvae.groups - 1),
    }
    prior = PriorConfig(**sizes)
    _write(models.prior, "prior", prior, facts, build_prior(prior).state_dict())
    clip = ClipConfig(pixels=dvae.pixels, text_vocabulary=words)
    weights = {f"clip.{k}": v for k, v in Clip(clip).state_dict().items()}
    _write(models.clip, "clip", clip, facts, weights)
    return models


def _write(folder: Path, stage: str, config: Any, facts: Any, tensors: Mapping[str, Tensor]) -> str:
    kept = {name: value.contiguous() for name, value in tensors.items()}
    shapes = {name: tuple(value.shape) for name, value in kept.items()}
    return write_model(folder, stage, to_json(config), facts, shapes, kept.__getitem__)
