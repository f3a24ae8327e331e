"""Settings of `tapir serve`: names, addresses, limits and the token."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InputError
from generation.config import ModelChoice, ModelPaths
from serving.config import DEFAULT_MODEL, TOKEN_VARIABLE, Limits, ServeConfig, token_of

TOKEN = "0123456789abcdef"


def test_models_have_names() -> None:
    own = ModelChoice(prior=Path("a"))
    assert ServeConfig(models=own).paths() == {DEFAULT_MODEL: own.paths}
    assert ServeConfig().paths() == {}
    config = ServeConfig(named=("red=runs/red", "blue=runs/blue"))
    assert list(config.paths()) == ["red", "blue"] and not config.problems()
    assert config.paths()["blue"] == ModelPaths(
        prior=Path("runs/blue/prior"),
        dvae=Path("runs/blue/dvae"),
        clip=Path("runs/blue/clip"),
        bpe=Path("runs/blue/bpe"),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"named": ("runs/red",)},
        {"named": ("../x=runs/red",)},
        {"named": ("a=x", "a=y")},
        {"named": ("a=x",), "models": ModelChoice(prior=Path("b"))},
        {"port": 65536},
        {"port": -1},
        {"hosts": ("http://a",)},
        {"hosts": ("a:80",)},
        {"rows": 0},
        {"tensor": 0},
        {"pipeline": 0},
        {"limits": Limits(seconds=0)},
        {"limits": Limits(megapixels=-1)},
    ],
)
def test_each_wrong_setting_is_a_problem(change: dict[str, object]) -> None:
    assert len(replace(ServeConfig(), **change).problems()) == 1  # type: ignore[arg-type]


def test_loopback_needs_no_token() -> None:
    assert token_of("127.0.0.1", None, {}) is None
    assert token_of("127.0.0.1", None, {TOKEN_VARIABLE: TOKEN}) == TOKEN


def test_another_address_needs_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a token"):
        token_of("0.0.0.0", None, {})
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert token_of("0.0.0.0", file, {}) == TOKEN
    assert token_of("0.0.0.0", file, {TOKEN_VARIABLE: "x" * 20}) == TOKEN


@pytest.mark.parametrize("text", ["", "short", "0123456789\nabcdef", "ä" * 20])
def test_a_weak_token_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(InputError, match="token"):
        token_of("127.0.0.1", file, {})
    with pytest.raises(InputError, match="cannot be read"):
        token_of("127.0.0.1", tmp_path / "none", {})
