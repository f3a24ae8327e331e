"""Candidates ranked by an open_clip checkpoint, compared with open_clip itself."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core.errors import InputError
from core.files.atomic import sha256
from data_pipeline.tokenize.encode import to_bytes
from generation.ranking import CONFIG, WEIGHTS, OpenClipRanker, open_ranker
from models.initialization import generator
from models.third_party import foreign_module
from tests.unit.finished import SIZES, VIEW, write_open_clip

CAPTIONS = ["a small red circle", "two blue squares, side by side"]


def _pixels(count: int) -> torch.Tensor:
    """Low-resolution pictures, (count, 3, 32, 32), of whole byte values."""
    drawn = torch.randint(0, 256, (count, 3, 8, 8), generator=generator("pixels"))
    return (drawn / 255).repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny open_clip checkpoint."""
    return write_open_clip(tmp_path)


def _write(folder: Path, config: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config))


@torch.no_grad()
def test_scores_are_those_of_open_clip(folder: Path) -> None:
    state = torch.get_rng_state()
    ranker = open_ranker(folder, Path("/nowhere"))
    assert torch.get_rng_state().equal(state)
    assert isinstance(ranker, OpenClipRanker)
    assert ranker.digest == sha256((folder / WEIGHTS).read_bytes())
    assert ranker.name == f"open_clip {folder.name}"
    pixels = _pixels(6)
    scores = ranker.scores(CAPTIONS, pixels, 3)
    open_clip = foreign_module("open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    words = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS))
    seen = torch.stack([preprocess(Image.fromarray(picture)) for picture in to_bytes(pixels)])
    levels = (ranker.view(pixels) - seen) * torch.tensor(VIEW["std"]).view(3, 1, 1) * 255
    assert levels.round().abs().max() <= 2 and (levels.round() != 0).float().mean() < 0.01
    images = model.encode_image(ranker.view(pixels))
    expected = torch.cosine_similarity(words.repeat_interleave(3, 0), images).view(2, 3).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.std() > 0.01


def test_folders_that_are_not_whole_are_refused(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    text, images = SIZES["text_cfg"], SIZES["vision_cfg"]
    configs = [
        ({"text_cfg": {**text, "hf_model_name": "roberta-base"}}, "nothing is downloaded"),
        ({"vision_cfg": {**images, "timm_model_name": "hf-hub:a/b"}}, "nothing is downloaded"),
        ({"text_cfg": {**text, "hf_tokenizer_name": "timm/SigLIP"}}, "lacks the files of its tok"),
        ({"text_cfg": {**text, "width": 64}}, "no checkpoint that open_clip reads"),
        ({"text_cfg": {**text, "colour": 1}}, "no checkpoint that open_clip reads"),
        ({"text_cfg": 3}, "not a config of open_clip"),
    ]
    for change, reason in configs:
        _write(folder, {"model_cfg": {**SIZES, **change}})
        with pytest.raises(InputError, match=reason):
            open_ranker(folder, folder)
    (folder / CONFIG).unlink()
    with pytest.raises(InputError, match=r"there is no .*open_clip_config\.json"):
        open_ranker(folder, folder)
    _write(folder, {"model_cfg": SIZES, "preprocess_cfg": {"interpolation": "random"}})
    with pytest.raises(InputError, match="must be one of bicubic, bilinear"):
        open_ranker(folder, folder)
    _write(folder, {"model_cfg": SIZES})
    save_file({**weights, "text_projection": weights["text_projection"] / 0}, folder / WEIGHTS)
    with pytest.raises(InputError, match="text_projection holds values like NaN"):
        open_ranker(folder, folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(InputError, match="no checkpoint that open_clip reads"):
        open_ranker(folder, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"there is no .*open_clip_model\.safetensors"):
        open_ranker(folder, folder)


@pytest.mark.seconds
def test_a_pickle_is_refused_with_the_command_that_converts_it(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    torch.save({"state_dict": weights}, folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="is a pickle, which is not loaded") as caught:
        open_ranker(folder, folder)
    command = str(caught.value).partition("convert it: ")[2]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    again = load_file(folder / WEIGHTS)
    assert again.keys() == weights.keys() and all(again[n].equal(weights[n]) for n in weights)
    open_ranker(folder, folder)
