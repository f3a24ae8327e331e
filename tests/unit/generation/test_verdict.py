"""The verdict of a demo: losses by caption, nearest neighbours, and what is said of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.storage.store import FolderStore
from data_pipeline.config import PackConfig
from data_pipeline.formats.tokens import TokenRecord, TokenSource
from data_pipeline.packing.pack import pack
from data_pipeline.streaming.stream import first_records
from generation.config import DrawSettings, ModelPaths
from generation.evaluation.findings import findings_of
from generation.evaluation.verdict import (
    caption_losses,
    judge,
    looks_of,
    mean_interval,
    nearest,
)
from tests.harness import tapir
from tests.unit.finished import write_models
from training.export.weights import load_prior
from training.tasks.task import pad_text

CAPTIONS = ["a small red circle", "two blue squares"]
GOOD: dict[str, Any] = {
    "held_out": 40,
    "loss": 2.0,
    "train_loss": 1.9,
    "shuffled_caption_loss": 2.3,
    "caption_gain": 0.3,
    "caption_gain_low95": 0.2,
    "caption_gain_high95": 0.4,
    "held_out_twins": 0,
    "drawn_validation": 96,
    "copies_validation": 5,
    "copies_validation_low95": 0.02,
    "drawn_train": 96,
    "copies_train": 6,
    "copies_train_low95": 0.03,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPaths:
    return write_models(tmp_path_factory.mktemp("models"), CAPTIONS)


def _records(texts: list[list[int]]) -> list[TokenRecord]:
    draws = np.random.Generator(np.random.Philox(3))
    return [
        TokenRecord(
            id=i,
            image=draws.integers(0, 16, 16).astype(np.uint16),
            text=np.array(text, np.uint16),
        )
        for i, text in enumerate(texts)
    ]


@torch.no_grad()
def _loss(models: ModelPaths, record: TokenRecord, text: TokenRecord) -> float:
    layers, config, _ = load_prior(models.prior)
    image = torch.from_numpy(record.image.astype(np.int64))[None]
    state: Any = {"text": pad_text([text.text.tolist()], config.text_length), "image": image}
    for layer in layers.values():
        state = layer(state)
    return float(F.cross_entropy(state.image[0], image[0]))


def test_losses_are_those_of_single_pairs_with_each_caption(models: ModelPaths) -> None:
    records = _records([[i, i + 1, 9] for i in range(18)])  # more than one forward pass
    losses = caption_losses(models.prior, records)
    for i in (0, 7, 17):
        assert losses.own[i] == pytest.approx(_loss(models, records[i], records[i]), rel=1e-5)
        others = [_loss(models, records[i], records[(i + s) % 18]) for s in (1, 5, 9, 13)]
        assert losses.shuffled[i] == pytest.approx(np.mean(others), rel=1e-5)


def test_equal_captions_are_no_other_captions(models: ModelPaths) -> None:
    records = _records([[1, 2], [1, 2], [3, 4], [1, 2]])
    losses = caption_losses(models.prior, records)
    assert losses.shuffled[0] == pytest.approx(_loss(models, records[0], records[2]), rel=1e-5)
    same = caption_losses(models.prior, _records([[1, 2]] * 3))
    assert np.isnan(same.shuffled).all()
    assert np.isnan(caption_losses(models.prior, _records([[1, 2]])).shuffled).all()


def test_the_interval_is_that_of_the_mean() -> None:
    mean, half = mean_interval(np.array([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0 and half == pytest.approx(1.96 * math.sqrt(14 / 3 / 4))
    assert all(map(math.isnan, mean_interval(np.array([1.0]))))


def test_the_nearest_is_that_of_all_pairs() -> None:
    draws = np.random.Generator(np.random.Philox(5))
    a, b = (draws.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8) for n in (5, 9))
    b[4] = a[2]
    x, y = looks_of(a), looks_of(b)
    by_hand = a[0, :2, 2:4, 1].mean() / 255  # the second averaged pixel's green
    assert x.shape == (5, 768) and x[0, 256 + 1] == pytest.approx(by_hand)
    distances, places = nearest(x, y)
    everything = np.sqrt(((x[:, None] - y[None]) ** 2).mean(2))
    assert np.array_equal(places, everything.argmin(1)) and places[2] == 4
    assert distances == pytest.approx(everything.min(1)) and distances[2] == 0
    assert looks_of(a[:, :8, :8]).shape == (5, 192)


@pytest.mark.parametrize(
    ("changes", "enough", "text"),
    [
        ({}, "yes", "no sign of copying"),
        ({"caption_gain_low95": -0.01}, "no", "not beyond chance"),
        ({"caption_gain_low95": -0.01, "train_loss": 1.95}, "unknown", "Give more minutes"),
        ({"caption_gain": None, "train_loss": 1.95}, "no", "All captions are equal"),
        ({"copies_train_low95": 0.06}, "partly", "memorised"),
        ({"copies_validation_low95": 0.2}, "partly", "memorised"),
        ({"train_loss": 1.6}, "yes", "20% below"),
        ({"held_out_twins": 3}, "yes", "3 of 40 held-out pictures are also training"),
    ],
)
def test_findings_follow_the_figures(changes: dict[str, Any], enough: str, text: str) -> None:
    answer, findings = findings_of({**GOOD, **changes})
    assert answer == enough and text in " ".join(findings)
    assert ("More pairs" in " ".join(findings)) == (enough in ("partly", "no"))


@pytest.mark.seconds
def test_a_verdict_is_written_with_its_pictures(tmp_path: Path) -> None:
    """Of an untrained prior over tokens of shapes: it neither follows captions nor copies them."""
    raw, tokens = FolderStore(tmp_path / "raw"), FolderStore(tmp_path / "tokens")
    pack("shapes", raw, PackConfig(count=80, validation=0.3, pixels=16, block=8))
    models = write_models(tmp_path / "models", CAPTIONS)
    folders = [f"--dvae={models.dvae}", f"--bpe={models.bpe}"]
    tapir("tokenize", str(raw.root), str(tokens.root), *folders, "--block=8")
    body = judge(models, raw, tokens, tmp_path / "out", DrawSettings(candidates=2), 3)
    assert body == json.loads((tmp_path / "out" / "verdict.json").read_bytes())
    figures, held_out = body["figures"], first_records(TokenSource(tokens, "validation"), 512)
    assert figures["held_out"] == len(held_out) and figures["drawn_train"] == 6
    assert figures["loss"] == pytest.approx(caption_losses(models.prior, held_out).own.mean())
    assert body["enough"] == "unknown" and len(figures["nearest"]) == 8
    assert (tmp_path / "out" / "nearest.png").stat().st_size > 0
