"""Importing image tokenizers: files that are not whole, and models of other pixels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.export import import_
from core.errors import ConfigError, InputError, TapirError
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
        ({**whole, name: torch.zeros(7)}, rf"{name}, which is \(7,\) and should be \(32,\)"),
        ({**whole, name: torch.zeros(())}, rf"{name}, which is \(\) and should be"),
        ({**whole, "encoder.x": torch.zeros(2)}, "encoder.x, which the network has not; give all"),
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


def test_a_config_of_another_model_is_told_from_damage(tmp_path: Path) -> None:
    vq_folder(tmp_path / "vq")
    config = tmp_path / "vq" / "config.json"
    whole = json.loads(config.read_bytes())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vq_embed_dim": 8}, r"4 tensors do not fit its sizes, .* with the sizes of the same"),
        ({"num_vq_embeddings": 128}, r"which is \(64, 4\) and should be \(128, 4\); give all"),
        ({"num_vq_embeddings": "many"}, "num_vq_embeddings='many' must be a whole number"),
        ({"block_out_channels": []}, "have 0, 3 and 3 levels"),
        ({"down_block_types": ["No"] * 3}, "diffusers makes no VQModel of"),
        ({"act_fn": 3}, "act_fn=3 must be a text"),
        ({"act_fn": "no"}, "diffusers makes no VQModel of"),
        ({"layers": 3}, "diffusers makes no VQModel of"),
    ]
    for changes, text in cases:
        config.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(TapirError, match=text) as raised:
            import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)
        assert raised.value.exit_code == 2 and "copy it again" not in str(raised.value)
    del whole["block_out_channels"]
    config.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="have 1, 3 and 3 levels"):
        import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)
    assert not (tmp_path / "run").exists()


CONV, TABLE = "encoder.down.0.block.0.conv1.weight", "quantize.embedding.weight"
ODD: list[tuple[dict[str, Any], str]] = [
    ({}, "90 tensors do not fit its sizes, such as decoder.conv_in.bias, which is missing"),
    ({CONV: torch.ones(())}, r"resnets.0.conv1.weight has the shape \(\), not 4 dimensions"),
    ({CONV: torch.ones(0, 3, 3, 3)}, r"block_out_channels=\[0\] has 0, not a multiple"),
    ({TABLE: torch.ones(2, 16, 4)}, r"has the shape \(2, 16, 4\), not 2 dimensions"),
    ({TABLE: torch.ones(16)}, r"has the shape \(16,\), not 2 dimensions"),
    ({CONV: None}, "resnets.0.conv1.weight is missing|none of the tokenizers that Tapir knows"),
    (
        {"encoder.down.x.block.0.conv1.weight": torch.ones(3)},
        "91 tensors do not fit|blocks.1.* is missing",
    ),
    ({"encoder.down.9.block.0.conv1.weight": torch.ones(32, 3, 3, 3)}, "blocks.1.* is missing"),
    ({"decoder.up.9.block.0.conv1.weight": torch.ones(1)}, "91 tensors do not fit"),
    ({"post_quant_conv.weight": torch.ones(4)}, r"shape \(4,\), not 4 dimensions"),
]
LLAMAGEN = {
    "encoder.down.": "encoder.conv_blocks.",
    "decoder.up.": "decoder.conv_blocks.",
    ".block.": ".res.",
}
"""Its names by those of taming."""
OTHERS = [("diffusers", "config.json is missing"), ("openai-dvae", "there is neither")]


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        *((kind, *odd) for kind in ("", "taming", "llamagen") for odd in ODD),
        *((kind, {}, reason) for kind, reason in OTHERS),
    ],
)
def test_whatever_a_file_holds_an_import_answers_with_a_sentence(
    kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(TapirError, match=reason) as raised:
        _import_of(kind, changes, tmp_path)
    assert raised.value.exit_code == 2 and not (tmp_path / "run").exists()
    assert "cannot be read as" not in str(raised.value), "an error that no check foresees"


def test_an_error_that_no_check_foresees_is_a_sentence(tmp_path: Path) -> None:
    changes = {f"decoder.up.{'9' * 5000}.block.0.conv1.weight": torch.ones(1)}
    with pytest.raises(InputError, match=r"cannot be read as a taming tokenizer \(ValueError"):
        _import_of("taming", changes, tmp_path)
    assert not (tmp_path / "run").exists()


def _import_of(kind: str, changes: dict[str, Any], folder: Path) -> None:
    """Import a file with three tensors of a tokenizer, changed, under the names of its kind."""
    few = {
        **{CONV: torch.ones(32, 32, 3, 3), TABLE: torch.ones(16, 4)},
        "post_quant_conv.weight": torch.ones(4, 4, 1, 1),
    }
    body = {name: value for name, value in {**few, **changes}.items() if value is not None}
    if kind == "llamagen":
        for old, new in LLAMAGEN.items():
            body = {name.replace(old, new): value for name, value in body.items()}
    torch.save(body, folder / "last.ckpt")
    arguments = [str(folder / "last.ckpt"), str(folder / "run"), "--pixels=16"]
    import_([*arguments, *([f"--from={kind}"] if kind else [])])


def test_a_prior_of_other_pixels_is_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path, ["a red circle"])
    body, tensors = read_model(models.dvae, "dvae")
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    larger = {**body["config"], "pixels": 32}
    write_model(tmp_path / "large", "dvae", larger, {}, shapes, tensors.__getitem__)
    with pytest.raises(InputError, match=r"draws 16 tokens, and the pictures of .* have 64"):
        open_studio(replace(models, dvae=tmp_path / "large"), rerank=False)
    assert open_studio(models, rerank=False).images.facts.tokens == 16
