"""Settings of a preset with the sizes that training takes from its data; imports no torch."""

from dataclasses import replace
from typing import Any

from models.config import ClipConfig, PriorConfig
from training.config import StageConfig
from training.presets import PRESETS

_FAMILIES = {"tiny": ("tiny", "tiny"), "small": ("small", "paper_bpe")}
"""Size of a preset -> the dVAE and the tokenizer that its data come from; others: the paper's."""


def filled(preset: str, settings: StageConfig) -> Any:
    """The settings with the sizes that training takes from its data: those of the preset's kin."""
    model: Any = settings.model  # type: ignore[attr-defined]
    dvae_name, bpe_name = _FAMILIES.get(preset, ("paper_dvae", "paper_bpe"))
    dvae, bpe = PRESETS["dvae"][dvae_name]().model, PRESETS["bpe"][bpe_name]()
    if isinstance(model, PriorConfig | ClipConfig):
        model = replace(model, text_vocabulary=model.text_vocabulary or bpe.vocabulary)
    if isinstance(model, PriorConfig):
        codes, grid = model.image_vocabulary or dvae.codebook, model.grid or dvae.grid
        model = replace(model, image_vocabulary=codes, grid=grid)
    return replace(settings, model=model)  # type: ignore[call-arg]
