"""Shipped models: 16-bit weights with cards, and which models `tapir sample` chooses."""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError, CorruptError, InputError
from core.log import LOG
from generation import choose_models
from generation import shipped as shipped_module
from generation.config import ModelPaths, SampleConfig, SampleRun
from generation.sample import sample
from generation.shipped import (
    CARD,
    Card,
    Score,
    read_card,
    shipped_models,
    shipped_names,
)
from generation.text_to_image import open_studio
from tests.unit.finished import write_models as write_runs
from training.export.weights import describe, open_model, write_model
from workflow.chain.here import stages_of
from workflow.weights.make import run_of, write_card, write_models
from workflow.weights.recipes import COSINE, RECIPES, Recipe, longer, miniature
from workflow.weights.score import score_of

CAPTIONS = ("a small red circle", "two blue squares")
SHIPPED = shipped_names()
DRAW = SampleConfig(candidates=2, batch=2)


def _card(name: str, value: float = 0.0) -> Card:
    score = Score(name=COSINE, captions=CAPTIONS, candidates=2, temperature=1, guidance=1)
    return Card(
        name=name,
        title="a test",
        pixels=16,
        license="Apache-2.0",
        source="nowhere",
        command="make weights",
        parameters=1,
        seed=0,
        seeds=({"seed": 0, "image_loss": 1.5, "score": value},),
        score=replace(score, value=value),
        files={},
    )


def _ship(root: Path, name: str, captions: tuple[str, ...]) -> Path:
    write_models(
        Path(write_runs(root / "trained" / name, list(captions)).prior.parent), root / name
    )
    write_card(_card(name), root / name)
    return root / name


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two shipped sets, in a folder without own runs."""
    folder = tmp_path / "shipped"
    _ship(folder, "shapes", CAPTIONS)
    _ship(folder, "emoji", ("grinning face", "red heart"))
    monkeypatch.setattr(shipped_module, "WEIGHTS", folder)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    yield folder


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level(logging.INFO, "tapir")
    return caplog


def test_models_in_16_bits_are_the_rounded_ones_and_fit_together(tmp_path: Path) -> None:
    runs = write_runs(tmp_path / "runs", list(CAPTIONS))
    half = write_models(tmp_path / "runs", tmp_path / "half")
    for stage in ("dvae", "prior", "clip"):
        before, after = (open_model(getattr(m, stage), stage) for m in (runs, half))
        assert dict(after.shapes) == dict(before.shapes) and after.facts["trained"] == before.digest
        for name in before.shapes:
            value = after.read(name)
            assert value.dtype == torch.float32
            assert torch.equal(value, before.read(name).half().float())
        sizes = [(getattr(m, stage) / "model.safetensors").stat().st_size for m in (runs, half)]
        assert sizes[1] < 0.65 * sizes[0]
    assert describe(half.prior, "prior")["facts"]["dvae"] == open_model(half.dvae, "dvae").digest
    assert open_studio(half).ranker is not None  # all digests match
    assert score_of(half, _card("x").score) == score_of(half, _card("x").score)


def test_a_weight_beyond_16_bits_is_refused(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, list(CAPTIONS))
    dvae = open_model(runs.dvae, "dvae")
    tensors = {name: dvae.read(name) for name in dvae.shapes}
    first = next(iter(tensors))
    tensors[first] = torch.full_like(tensors[first], 1e6)
    write_model(runs.dvae, "dvae", dvae.config, {}, dvae.shapes, tensors.__getitem__)
    with pytest.raises(InputError, match="do not fit 16 bits"):
        write_models(tmp_path, tmp_path / "half")


def test_a_changed_file_is_named(shipped: Path) -> None:
    assert set(shipped_models("shapes").prior.parent.iterdir()) >= {shipped / "shapes" / CARD}
    assert "README.md" in read_card("shapes").files
    (shipped / "shapes" / "bpe" / "words.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"words\.json"):
        shipped_models("shapes")
    with pytest.raises(InputError, match="emoji, shapes"):
        shipped_models("photos")
    with pytest.raises(InputError, match="photos"):
        sample(SampleRun(captions=CAPTIONS, weights="photos"))


def test_without_flags_the_shipped_set_that_knows_the_words_draws(
    shipped: Path, told: pytest.LogCaptureFixture
) -> None:
    sample(SampleRun(captions=("a Red heart, purple",), draw=DRAW))
    assert Path("runs/samples/a-red-heart-purple.png").stat().st_size > 0
    text = told.text
    assert "models: emoji, shipped with Tapir" in text
    assert "no training caption of these models has 'purple'" in text and "grinning" in text
    told.clear()
    sample(SampleRun(captions=CAPTIONS, draw=DRAW))
    assert Path("runs/samples/a-small-red-circle-and-1-more.png").exists()
    assert "models: shapes, shipped" in told.text and "no training" not in told.text


def test_own_runs_win_the_newest_first_and_the_log_says_so(
    shipped: Path, told: pytest.LogCaptureFixture
) -> None:
    for age, name in ((2000, "old"), (1000, "new")):
        own = write_runs(Path("runs") / name, list(CAPTIONS))
        time = (own.prior / "model.json").stat().st_mtime - age
        os.utime(own.prior / "model.json", (time, time))
    write_runs(Path("runs") / "half-done", list(CAPTIONS)).dvae.joinpath("model.json").unlink()
    sample(SampleRun(captions=CAPTIONS, draw=DRAW))
    assert "models: your own in runs/new" in told.text
    (Path("runs") / "new" / "clip" / "model.json").unlink()
    told.clear()
    sample(SampleRun(captions=CAPTIONS, draw=DRAW))
    assert "runs/new has no finished CLIP" in told.text
    assert "models: your own in runs/old" in told.text
    told.clear()
    sample(SampleRun(captions=CAPTIONS, draw=DRAW, rerank=False))
    assert "models: your own in runs/new" in told.text
    told.clear()
    sample(SampleRun(captions=CAPTIONS, draw=DRAW, weights="shapes"))
    assert "models: shapes, shipped" in told.text


def test_no_models_at_all_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped_module, "WEIGHTS", tmp_path)
    with pytest.raises(InputError, match="tapir demo"):
        sample(SampleRun(captions=CAPTIONS))
    both = SampleRun(captions=CAPTIONS, weights="shapes", models=ModelPaths())
    with pytest.raises(ConfigError, match="leave out --prior"):
        sample(both)


def test_folders_that_are_not_given_are_beside_the_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "dvae").mkdir(parents=True)
    chosen = choose_models.ModelChoice(prior=tmp_path / "mine" / "prior").paths
    assert chosen.dvae == tmp_path / "mine" / "dvae" and chosen.clip == Path("runs/clip")
    assert choose_models.ModelChoice().paths == ModelPaths()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_are_runs_that_the_commands_accept(recipe: Recipe, tmp_path: Path) -> None:
    for each in (recipe, longer(recipe, 0.5), miniature(recipe)):
        stages = {s.name: s.commands[0] for s in stages_of(run_of(each, 2, tmp_path))}
        assert list(stages) == ["pack", "bpe", "dvae", "tokens", "prior", "clip"]
        assert all("--loop.seed=2" in stages[name] for name in ("dvae", "prior", "clip"))
    steps = [int(r.flags["prior"]["loop.steps"]) for r in (recipe, longer(recipe, 0.5))]
    assert steps[0] == 2 * steps[1] > 0


def test_shipped_weights_match_their_digests_and_load() -> None:
    for name in SHIPPED:
        card = read_card(name)
        assert {row["seed"] for row in card.seeds} == {0, 1, 2}
        studio = open_studio(shipped_models(name))
        assert studio.images.facts.pixels == card.pixels


@pytest.mark.slow
def test_shipped_weights_score_as_their_card_says() -> None:
    for name in SHIPPED:
        card = read_card(name)
        score = score_of(shipped_models(name), card.score)
        assert score == pytest.approx(card.score.value, rel=0.02)
