"""Finished models in 16 bits: the same run folders at half the bytes, which every command reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from core.errors import InputError
from core.files.atomic import Json, sha256, write_atomic
from training.export.files import WEIGHTS, WeightsFile
from training.export.weights import open_model, write_description

LEFT_OUT = ("history", "numerics")
"""Facts of a run that say nothing about the weights."""


def write_half(run: Path, stage: str, out: Path, facts: Mapping[str, Any]) -> str:
    """Write a run's finished model in fp16, with changed facts; returns its digest.

    Raises: InputError if a weight does not fit 16 bits.
    """
    model = open_model(run, stage)
    tensors = {name: _half(model.read(name), f"{run}: {name}") for name in model.shapes}
    data = save(tensors)
    write_atomic(out / WEIGHTS, data)
    kept = {name: value for name, value in model.facts.items() if name not in LEFT_OUT}
    body: Json = {**kept, **facts, "trained": model.digest}
    file = WeightsFile(file=WEIGHTS, bytes=len(data), sha256=sha256(data))
    write_description(out, stage, model.config, body, [file])
    return file.sha256


def _half(value: Tensor, where: str) -> Tensor:
    half = value.to(torch.float16).contiguous()
    if not half.isfinite().all():
        raise InputError(f"{where} holds values that do not fit 16 bits; train it again")
    return half
