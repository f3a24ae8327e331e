"""Untrained but complete models, for tests of the stages after training."""

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

PIXELS = 16


def write_models(folder: Path, captions: list[str], seed: int = 0) -> ModelPaths:
    """Writes a dVAE, a prior, a CLIP and a tokenizer that match."""
    models = ModelPaths(**{name: folder / name for name in ("prior", "dvae", "clip", "bpe")})
    save_tokenizer(train_bpe(captions, 280), models.bpe)
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
    _write(models.prior, "prior", to_json(prior), facts, build_prior(prior, seed).state_dict())
    ranker = ClipConfig(
        pixels=PIXELS, dim=16, heads=2, layers=2, text_length=8, text_vocabulary=vocabulary
    )
    clip = {f"clip.{k}": v for k, v in Clip(ranker, seed).state_dict().items()}
    _write(models.clip, "clip", to_json(ranker), facts, clip)
    return models


def _write(folder: Path, stage: str, config: Any, facts: Any, tensors: dict[str, Tensor]) -> str:
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return write_model(folder, stage, config, facts, shapes, tensors.__getitem__)
