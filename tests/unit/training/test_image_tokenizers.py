"""Importing image tokenizers: files that are not whole, and models of other pixels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ConfigError, InputError
from generation.text_to_image import open_studio
from models.tokenizers.config import ReadOptions
from tests.harness import DEVELOPERS, installed
from tests.unit.finished import write_models
from tests.unit.models.tokenizers.test_equality import vq_folder
from training.export.tokenizers import (
    describe_tokenizer,
    facts_of,
    import_tokenizer,
    open_weights_of,
)
from training.export.weights import read_model, write_model

pytestmark = [
    pytest.mark.seconds,
    pytest.mark.skipif(not installed("diffusers"), reason=DEVELOPERS),
]
WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = ReadOptions(pixels=16, crop="center")


def test_an_import_is_a_finished_model_with_one_digest(tmp_path: Path) -> None:
    vq_folder(tmp_path / "vq")
    made = import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)
    describe_tokenizer(tmp_path / "run")
    assert facts_of(open_weights_of(tmp_path / "run")) == made and made.crop == "center"
    tensors = load_file(tmp_path / "vq" / WEIGHTS)
    (tmp_path / "vq" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "vq" / "model.bin")
    again = import_tokenizer(tmp_path / "vq", tmp_path / "again", "diffusers", OPTIONS)
    assert again.digest == made.digest
    with pytest.raises(InputError, match="holds a finished model already"):
        import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)


def test_files_that_are_not_one_tokenizer_are_refused(tmp_path: Path) -> None:
    vq_folder(tmp_path / "vq")
    whole = load_file(tmp_path / "vq" / WEIGHTS)
    name = "encoder.conv_in.bias"
    cases: list[tuple[dict[str, Any], str]] = [
        ({key: value for key, value in whole.items() if key != name}, f"{name}, which is missing"),
        ({**whole, name: torch.zeros(7)}, rf"{name}, which is \(7,\)"),
        ({**whole, name: torch.full_like(whole[name], torch.nan)}, f"{name} holds values like NaN"),
    ]
    for tensors, reason in cases:
        save_file(tensors, tmp_path / "vq" / WEIGHTS)
        with pytest.raises(InputError, match=reason):
            import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)
    save_file(whole, tmp_path / "vq" / WEIGHTS)
    with pytest.raises(ConfigError, match="not a multiple of 4"):
        import_tokenizer(tmp_path / "vq", tmp_path / "run", "", replace(OPTIONS, pixels=18))
    torch.save({"encoder.down.0.block.0.conv1.weight": torch.ones(2)}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"quantize.embedding.weight is missing"):
        import_tokenizer(tmp_path / "last.ckpt", tmp_path / "run", "", OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_prior_of_other_pixels_is_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path, ["a red circle"])
    body, tensors = read_model(models.dvae, "dvae")
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    larger = {**body["config"], "pixels": 32}
    write_model(tmp_path / "large", "dvae", larger, {}, shapes, tensors.__getitem__)
    with pytest.raises(InputError, match=r"draws 16 tokens, and the pictures of .* have 64"):
        open_studio(replace(models, dvae=tmp_path / "large"), rerank=False)
    assert open_studio(models, rerank=False).images.facts.tokens == 16
