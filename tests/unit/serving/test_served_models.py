"""Which models a server has, and what is told of wrong folders before it listens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import ConfigError, InputError
from core.files.atomic import seal, unseal
from generation import choose_models, shipped
from generation.config import ModelChoice
from serving.config import DEFAULT_MODEL, ServeConfig
from serving.models import served_models
from tests.harness import tapir
from tests.unit.finished import write_models

CAPTIONS = ["a small red circle", "two blue squares"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_models(folder / "models", CAPTIONS)
    return folder / "models"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of whole models, to be damaged."""
    shutil.copytree(made, tmp_path / "models")
    return tmp_path / "models"


def served(folder: Path, **more: object) -> list[str]:
    config = replace(ServeConfig(named=(f"x={folder}",)), **more)  # type: ignore[arg-type]
    return list(served_models(config))


def refused(folder: Path, **more: object) -> str:
    with pytest.raises(ConfigError) as raised:
        served(folder, **more)
    return str(raised.value)


def with_facts(run: Path, **facts: object) -> None:
    path = run / "model.json"
    body = unseal(path.read_bytes(), str(path))
    path.write_bytes(seal(json.loads(json.dumps({**body, "facts": {**body["facts"], **facts}}))))


def test_whole_models_are_served(folder: Path) -> None:
    assert served(folder) == ["x"]
    shutil.rmtree(folder / "clip")
    assert served(folder, rerank=False) == ["x"]


def test_a_folder_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == (
        f"x: there is no folder {tmp_path / 'none'}; give one with prior, dvae, clip and bpe"
    )


def test_everything_that_is_missing_is_named(folder: Path) -> None:
    for part in ("prior", "clip"):
        shutil.rmtree(folder / part)
    (folder / "bpe" / "tokenizer.json").unlink()
    text = refused(folder)
    for part in ("prior", "clip", "bpe"):
        assert f"tapir train {part}" in text and str(folder / part) in text
    assert "--no-rerank" in text and "dvae" not in text


def test_a_checkpoint_stands_for_a_finished_model(folder: Path) -> None:
    (folder / "prior" / "model.json").unlink()
    assert "prior" in refused(folder)
    (folder / "prior" / "checkpoints" / "step-4").mkdir(parents=True)
    assert served(folder) == ["x"]


@pytest.mark.parametrize(
    ("part", "facts", "told"),
    [
        ("prior", {"dvae": "0" * 64}, "another dVAE"),
        ("prior", {"tokenizer": "0" * 64}, "the prior in"),
        ("clip", {"tokenizer": "0" * 64}, "the CLIP in"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    folder: Path, part: str, facts: dict[str, object], told: str
) -> None:
    with_facts(folder / part, **facts)
    assert told in refused(folder)


def test_a_prior_for_guidance_needs_two_rows(folder: Path) -> None:
    assert served(folder, rows=1) == ["x"]
    with_facts(folder / "prior", caption_dropout=0.1)
    assert "--rows 2" in refused(folder, rows=1)
    assert served(folder, rows=2) == ["x"]


def test_a_damaged_description_and_another_stage_are_told(folder: Path) -> None:
    (folder / "dvae" / "model.json").write_text("{}")
    shutil.rmtree(folder / "prior")
    shutil.copytree(folder / "clip", folder / "prior")
    text = refused(folder)
    assert "dvae/model.json" in text and "holds a clip, not a prior" in text


def test_a_wrong_folder_ends_the_command_before_it_listens(tmp_path: Path) -> None:
    told = tapir("serve", f"x={tmp_path / 'none'}", "--port=0", code=2)
    assert "there is no folder" in told and "http://" not in told and "Traceback" not in told


def test_without_names_the_newest_own_set_is_served_else_shipped_ones(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(InputError, match="NAME=FOLDER"):
        served_models(ServeConfig())
    shutil.copytree(made, tmp_path / "runs" / "mine")
    assert choose_models.own_set(rerank=True) == Path("runs/mine")
    (models,) = served_models(ServeConfig()).values()
    assert models.prior == Path("runs/mine/prior")
    named = ServeConfig(models=ModelChoice(prior=made / "prior"))
    assert served_models(named)[DEFAULT_MODEL].clip == made / "clip"
