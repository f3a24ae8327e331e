"""Finished models as safetensors + JSON, and back."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from checkpoint.format import Reader
from core.errors import CorruptError, InputError
from core.files import seal, sha256, unseal, write_atomic
from models.clip import Clip
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.dvae import DVAE
from models.prior import build_prior
from training.average import EMA

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def save_model(
    folder: Path, stage: str, config: dict[str, Any], facts: dict[str, Any], reader: Reader
) -> None:
    """Write a checkpoint's fp32 weights, averaged if it has the average, and their digest."""
    tensors = {
        name: reader.tensor(name, EMA if EMA in reader.kinds(name) else "master")
        for name in reader.shapes()
    }
    write_model(folder, stage, config, facts, tensors)


def write_model(
    folder: Path,
    stage: str,
    config: dict[str, Any],
    facts: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Write a finished model: weights by their global names, sizes, facts and a digest."""
    data = save(tensors)
    write_atomic(folder / WEIGHTS, data)
    body = {"stage": stage, "config": config, "facts": facts, "sha256": sha256(data)}
    write_atomic(folder / DESCRIPTION, seal(json.loads(json.dumps(body))))


def read_model(folder: Path, stage: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a finished model of this stage: its description and its weights.

    Raises: InputError if there is none; CorruptError if a byte changed.
    """
    body = read_description(folder, stage)
    data = (folder / WEIGHTS).read_bytes() if (folder / WEIGHTS).is_file() else b""
    if sha256(data) != body["sha256"]:
        raise CorruptError(
            f"{folder / WEIGHTS} is damaged or missing; the same `tapir train` makes it again"
        )
    return body, load(data)


def read_description(folder: Path, stage: str) -> dict[str, Any]:
    """Read a finished model's sizes, facts and digest without its weights.

    Raises: InputError if there is none; CorruptError if a byte changed.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"there is no finished {stage} in {folder}; run `tapir train {stage}`")
    body = unseal(path.read_bytes(), str(path))
    if body["stage"] != stage:
        raise InputError(f"{folder} holds a {body['stage']}, not a {stage}")
    return body


def model_is_whole(folder: Path, stage: str) -> bool:
    """Say whether a finished model is there and undamaged."""
    try:
        read_model(folder, stage)
    except (CorruptError, InputError):
        return False
    return True


def load_dvae(folder: Path) -> tuple[DVAE, str]:
    """A finished dVAE and the hash of its weights."""
    body, tensors = read_model(folder, "dvae")
    dvae = DVAE(DVAEConfig(**body["config"]))
    _fill(dvae, tensors, "dvae.dvae.")
    return dvae.eval(), str(body["sha256"])


def load_prior(folder: Path) -> tuple[nn.ModuleDict, PriorConfig, dict[str, Any]]:
    """A finished prior's layers, its sizes and its facts."""
    body, tensors = read_model(folder, "prior")
    config = PriorConfig(**body["config"])
    layers = build_prior(config)
    _fill(layers, tensors, "")
    return layers.eval(), config, body["facts"]


def load_clip(folder: Path) -> tuple[Clip, dict[str, Any]]:
    """A finished reranker and its facts."""
    body, tensors = read_model(folder, "clip")
    clip = Clip(ClipConfig(**body["config"]))
    _fill(clip, tensors, "clip.")
    return clip.eval(), body["facts"]


def _fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    named = {name.removeprefix(prefix): value for name, value in tensors.items()}
    missing = module.load_state_dict(named, strict=False).missing_keys
    wanted = {name for name, _ in module.named_parameters()}
    if wanted & set(missing):
        raise CorruptError(f"the model lacks {sorted(wanted & set(missing))[:3]}")
