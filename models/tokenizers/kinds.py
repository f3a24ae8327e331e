"""Readers of the tokenizers that Tapir knows itself: file or folder -> sizes and weights."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from core.errors import InputError
from models.tokenizers.config import Head, ReadOptions, VQConfig
from models.tokenizers.files import read_weights, weights_file, weights_files
from models.tokenizers.renames import config_of, of_diffusers, of_llamagen, of_taming

TAMING, LLAMAGEN = "encoder.down.0.block.0.conv1.weight", "encoder.conv_blocks.0.res.0.conv1.weight"
"""A tensor by which a layout is recognised."""
DIFFUSERS = "encoder.down_blocks.0.resnets.0.conv1.weight"
"""The same of diffusers' layout, whose sizes are in a config.json."""
GUMBEL = "quantize.embed.weight"
"""A tensor that VQGANs with a Gumbel head alone have."""
CONFIG = "config.json"
MODEL = "VQModel"

Read = tuple[VQConfig, dict[str, Tensor]]


def has(path: Path, name: str) -> bool:
    """True if a file of weights, or the only one in a folder, holds a tensor of this name.

    Raises: InputError if it cannot be read, or there are several.
    """
    return bool(weights_files(path)) and name in read_weights(weights_file(path))


def is_diffusers(path: Path) -> bool:
    """True if the folder's config.json is of diffusers' VQModel.

    Raises: InputError if it is damaged, or missing beside the weights of one.
    """
    if (path / CONFIG).is_file():
        return _config(path).get("_class_name") == MODEL
    if not has(path, DIFFUSERS):
        return False
    raise InputError(
        f"{path} holds weights of diffusers' {MODEL} without its {CONFIG}, which names the sizes; "
        "give the folder that holds both"
    )


def _config(path: Path) -> dict[str, Any]:
    """What a folder's config.json holds; empty if it is no JSON object."""
    try:
        body = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path / CONFIG} is no whole JSON ({error}); copy it again") from error
    return body if isinstance(body, dict) else {}


def read_taming(path: Path, options: ReadOptions) -> Read:
    """A VQGAN of taming-transformers: its Lightning checkpoint, or its state_dict.

    Raises: InputError if it is none.
    """
    tensors = of_taming(read_weights(weights_file(path)))
    head: Head = "gumbel" if GUMBEL in tensors else "nearest"
    return config_of(tensors, str(path), options, head), tensors


def read_llamagen(path: Path, options: ReadOptions) -> Read:
    """A VQ model of LlamaGen, 8 or 16 pixels a token.

    Raises: InputError if it is none.
    """
    tensors = of_llamagen(read_weights(weights_file(path)))
    return config_of(tensors, str(path), options, "cosine"), tensors


def read_diffusers(path: Path, options: ReadOptions) -> Read:
    """A folder of diffusers' VQModel: config.json and a file of weights.

    Pictures are in [0, 1] for configs with lookup_from_codebook (aMUSEd), else in [-1, 1].
    Raises: InputError if it is none.
    """
    body = _config(path) if (path / CONFIG).is_file() else {}
    if body.get("_class_name") != MODEL:
        raise InputError(
            f"{path / CONFIG} is missing or not of diffusers' {MODEL}; give its folder"
        )
    body = {name: value for name, value in body.items() if not name.startswith("_")}
    tensors = of_diffusers(read_weights(weights_file(path)))
    config = VQConfig(
        pixels=options.pixels,
        crop=options.crop,
        head="nearest",
        unit_range=bool(body.get("lookup_from_codebook", False)),
        body=body,
    )
    return config, tensors
