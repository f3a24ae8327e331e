"""Settings that no shape shows, weights that are tied, and places that are files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.config import to_json
from core.errors import ConfigError, InputError
from models.config import DVAEConfig, LoraConfig, PriorConfig
from models.prior import prior_program
from training.initial.carry_over import Vocabularies, carry
from training.initial.source import ADAPTERS, open_source
from training.initial.start import _facts
from training.initial.weights import DrawnWeights, differences_beside_shapes, remedy

SIZES: dict[str, Any] = {
    **{"dim": 48, "heads": 2, "layers": 2, "text_length": 4, "text_vocabulary": 20},
    **{"image_vocabulary": 10, "grid": 2},
}


def dvae(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = to_json(DVAEConfig(**changes))
    return sizes


def test_settings_that_no_shape_shows_are_compared() -> None:
    fsq = dvae(quantizer="fsq", levels=(8, 8), codebook=64)
    assert (
        differences_beside_shapes(fsq, fsq)
        == {}
        == differences_beside_shapes(dvae(pixels=64), dvae())
    )
    other = dvae(quantizer="fsq", levels=(4, 16), codebook=64)
    assert differences_beside_shapes(other, fsq) == {"levels": [[8, 8], [4, 16]]}
    assert differences_beside_shapes(dvae(levels=(4, 16)), dvae()) == {}, "levels of no FSQ"
    changed = differences_beside_shapes(dvae(quantizer="vq", gain=0.0, epsilon=0.2), fsq)
    assert changed == {"quantizer": ["fsq", "vq"], "gain": [1.0, 0.0], "epsilon": [0.1, 0.2]}
    prior = to_json(PriorConfig(**SIZES))
    assert differences_beside_shapes({**prior, "heads": 4}, prior) == {"heads": [2, 4]}
    assert differences_beside_shapes(prior, {**prior, "conv_kernel": 5}) == {"conv_kernel": [5, 11]}
    assert differences_beside_shapes(prior, {}) == {}, "settings that an older model lacks"


def test_rotary_positions_depend_on_a_grid_that_no_shape_shows() -> None:
    rotary = to_json(PriorConfig(**SIZES, positions="rotary"))
    wider = {**rotary, "columns": 3}
    assert differences_beside_shapes({**rotary, "columns": 2}, rotary) == {}, "0 = square"
    assert differences_beside_shapes(wider, rotary) == {"columns": [2, 3]}
    assert differences_beside_shapes({**rotary, "grid": 4}, rotary) == {
        "grid": [2, 4],
        "columns": [2, 4],
    }
    learned = to_json(PriorConfig(**SIZES))
    assert differences_beside_shapes({**learned, "grid": 4}, learned) == {}
    assert differences_beside_shapes({**learned, "grid": 4}, rotary) == {}, "other tensors, too"
    assert remedy("grid", 2) == "give tokens of a grid with rows=2"
    assert remedy("columns", 3) == "give tokens of a grid with columns=3"
    assert remedy("conv_kernel", 5) == "give --model.conv-kernel 5"
    assert remedy("levels", [4, 16]) == "give --model.levels 4 16"


@pytest.mark.parametrize(
    ("place", "warns"),
    [("/runs/a/checkpoints/step-20", 1), ("/step-2/prior", 0), ("s3://b/step-x", 0)],
)
def test_a_base_that_is_a_checkpoint_is_to_be_kept(
    place: str, warns: int, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    event = {"new": [], "resized": [], "left": [], "from": place, "digest": "d"}
    settings = SimpleNamespace(init=place, lora=LoraConfig(rank=2), out=tmp_path)
    with caplog.at_level("WARNING", "tapir"):
        assert _facts(settings, event)[ADAPTERS]["base"]["digest"] == "d"
    assert caplog.text.count("keep it from being deleted") == warns


@pytest.mark.parametrize("name", ["heads", "conv_kernel"])
def test_a_base_that_computes_something_else_is_none_for_adapters(name: str) -> None:
    event = {"new": ["block000.down.lora_a"], "resized": [], "left": [], "differs": {name: [2, 4]}}
    with pytest.raises(ConfigError, match=f"model.{name} is 2 there and 4 here") as raised:
        _facts(SimpleNamespace(init="base"), event)
    assert f"give --model.{name.replace('_', '-')} 2" in str(raised.value)


def test_copies_of_tied_weights_are_neither_new_nor_missing() -> None:
    tied = DrawnWeights(prior_program(PriorConfig(**SIZES, tied=True), 7)).shapes
    untied = DrawnWeights(prior_program(PriorConfig(**SIZES), 7)).shapes
    assert sorted(set(untied) - set(tied)) == ["head.image.weight", "head.text.weight"]
    carried = carry(tied, tied, Vocabularies())
    assert {each.how for each in carried.values()} == {"taken"}
    grown = carry(untied, tied, Vocabularies())
    new = [name for name, each in grown.items() if each.how == "new"]
    assert sorted(new) == ["head.image.weight", "head.text.weight"]


def test_a_file_is_no_place_to_start_from(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match=rf"is a file; give its folder, {tmp_path}$"):
        open_source(str(tmp_path / "model.safetensors"), "prior")
