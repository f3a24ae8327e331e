"""The prior sees no future, CLIP ranks, draws depend on their keys."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from generation.evaluation.accuracy import best_of_shares, wilson_low
from models.clip import Clip, caption_keys, contrastive_loss
from models.config import ClipConfig, PriorConfig
from models.prior import PAD, build_prior, prior_loss

CONFIG = PriorConfig(
    dim=48, heads=3, layers=4, text_length=6, text_vocabulary=30, image_vocabulary=20, grid=4
)


def prior_batch(rows: int = 3) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    text = torch.randint(0, 30, (rows, 6), generator=draws)
    text[0, 3:] = PAD
    return {"text": text, "image": torch.randint(0, 20, (rows, 16), generator=draws)}


def prior_logits(layers: nn.ModuleDict, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    state = batch
    for layer in layers.values():
        state = layer(state)
    return state.image  # type: ignore[attr-defined, no-any-return]


def trained_like(config: PriorConfig = CONFIG) -> nn.ModuleDict:
    """A prior whose weights are all far from zero."""
    layers = build_prior(config)
    with torch.no_grad():
        for i, p in enumerate(layers.parameters()):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return layers


def test_no_position_sees_the_future() -> None:
    layers, batch = trained_like(), prior_batch()
    before = prior_logits(layers, batch)
    for position in range(16):
        changed = {**batch, "image": batch["image"].clone()}
        changed["image"][:, position] = (changed["image"][:, position] + 1) % 20
        after = prior_logits(layers, changed)
        assert after[:, : position + 1].equal(before[:, : position + 1])
        if position < 15:
            assert not after[:, position + 1 :].equal(before[:, position + 1 :])


def test_every_caption_token_and_pad_matters() -> None:
    layers, batch = trained_like(), prior_batch()
    before = prior_logits(layers, batch)
    for position in range(5):
        changed = {**batch, "text": batch["text"].clone()}
        changed["text"][1, position] = PAD
        assert not prior_logits(layers, changed)[1].equal(before[1])


def test_loss_weights_and_pads() -> None:
    layers, batch = build_prior(CONFIG), prior_batch()
    state = batch
    for layer in layers.values():
        state = layer(state)
    losses = prior_loss(state, batch, 0.125)  # type: ignore[arg-type]
    expected = losses["text_loss"] / 8 + losses["image_loss"] * 7 / 8
    assert torch.allclose(losses["loss"], expected)
    assert 3.0 < losses["image_loss"].item() < 4.0, "logits of unit variance: ln 20 + 1/2"
    parts = [
        prior_loss(
            replace(state, text=state.text[i : i + 1], image=state.image[i : i + 1]),  # type: ignore
            {name: value[i : i + 1] for name, value in batch.items()},
            0.125,
        )["loss"]
        for i in range(3)
    ]
    assert torch.allclose(torch.stack(parts).mean(), losses["loss"])


def test_clip_learns_pairs() -> None:
    clip = Clip(ClipConfig(pixels=8, patch=4, dim=32, heads=2, layers=1, text_vocabulary=9))
    text = torch.full((4, 24), PAD)
    text[:, 0] = torch.arange(4)
    batch = {
        "pixels": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "text": text,
    }
    optimizer = torch.optim.AdamW(clip.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        losses = contrastive_loss(*clip(batch), caption_keys(batch["text"]), lambda rows: rows, 0)
        losses["loss"].backward()
        optimizer.step()
    assert float(losses["accuracy"]) == 1.0


def test_pictures_of_the_same_caption_are_no_wrong_answers() -> None:
    draws = torch.Generator().manual_seed(2)
    images, texts = (torch.randn(4, 8, generator=draws) for _ in range(2))
    text = torch.tensor([[1, 2, PAD], [2, 1, PAD], [1, 2, PAD], [1, 2, 3]])
    keys = caption_keys(text)
    assert (keys[:, None] == keys).int().tolist() == [
        [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]
    ]  # fmt: skip
    losses = contrastive_loss(images, texts, torch.tensor(2.0), keys, lambda rows: rows, 0)
    logits = 2 * images @ texts.T
    logits[0, 2] = logits[2, 0] = -torch.inf
    expected = -(logits.log_softmax(1).diag() + logits.log_softmax(0).diag()).mean() / 2
    assert torch.allclose(losses["loss"], expected)


def test_best_of_n_is_the_mean_over_all_choices_of_n_draws() -> None:
    draws = np.random.default_rng(0)
    right, scores = draws.random((3, 9)) < 0.5, draws.standard_normal((3, 9))
    for count, share in best_of_shares(right, scores).items():
        fits = [
            right[row, max(chosen, key=lambda draw: scores[row, draw])]
            for row in range(3)
            for chosen in itertools.combinations(range(9), count)
        ]
        assert share == pytest.approx(np.mean(fits), abs=1e-12)
    many = best_of_shares(np.eye(512, dtype=bool)[:1], -np.arange(512.0)[None])
    assert many[1] == pytest.approx(1 / 512) and many[256] == pytest.approx(0.5)
    assert list(many) == [2**i for i in range(10)]
    assert 0.21 < wilson_low(0.25, 512) < 0.22
