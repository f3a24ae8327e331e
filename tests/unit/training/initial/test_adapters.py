"""A run of adapters is read as the model that they make of their base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config import to_json
from core.errors import CorruptError, InputError
from generation.sampling.load_prior import load_local_prior
from models.adapters import adapted, is_adapter
from models.config import LoraConfig, PriorConfig
from models.prior import build_prior, prior_program
from parallel.config import EngineConfig
from parallel.engines.protocol import Whole
from parallel.mesh import own_mesh
from training.export.weights import load_prior, open_model, read_model, write_model
from training.initial.source import ADAPTERS, MERGED, adapter_facts, open_source

CONFIG = PriorConfig(
    dim=48, heads=2, layers=2, text_length=4, text_vocabulary=20, image_vocabulary=10, grid=2
)
LORA = LoraConfig(rank=3, alpha=6.0)


def _write(folder: Path, tensors: dict[str, Tensor], **facts: Any) -> str:
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    told = {"dvae": "d", "tokenizer": "t", "step": 3, **facts}
    return write_model(folder, "prior", to_json(CONFIG), told, shapes, tensors.__getitem__)


def _adapters(folder: Path, base: Path, digest: str, leave: str = "-") -> Whole:
    """Write a base and random adapters of it; returns the network that computes with both."""
    whole = Whole(adapted(prior_program(CONFIG, 7), LORA, 7), EngineConfig(), torch.device("cpu"))
    names, draws = whole.stage.global_names(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in names.items():
            if is_adapter(name) and leave not in name:
                parameter.normal_(std=0.1, generator=draws)
    mine = {n: p.detach() for n, p in names.items() if is_adapter(n) and leave not in n}
    noted = adapter_facts(LORA, str(base), digest, folder)
    _write(folder, mine, **{ADAPTERS: noted})
    return whole


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Whole]:
    """A base, adapters of it, and the network of both."""
    base, folder = tmp_path / "base", tmp_path / "adapters"
    digest = _write(base, dict(build_prior(CONFIG, 7).state_dict()))
    return base, folder, _adapters(folder, base, digest)


@torch.no_grad()
def _losses(layers: Any, whole: Whole) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(3)
    state: Any = {
        "text": torch.randint(0, 20, (4, 4), generator=draws),
        "image": torch.randint(0, 10, (4, 4), generator=draws),
    }
    expected = whole.stage(state)
    for layer in layers.values():
        state = layer(state)
    return torch.cat([state.text.flatten(), state.image.flatten()]), torch.cat(
        [expected.text.flatten(), expected.image.flatten()]
    )


def test_merged_weights_compute_what_base_and_adapters_do(
    models: tuple[Path, Path, Whole],
) -> None:
    base, folder, whole = models
    layers, _, facts = load_prior(folder)
    merged, unmerged = _losses(layers, whole)
    assert float((merged - unmerged).abs().max() / unmerged.abs().max()) < 1e-6
    plain, _ = _losses(load_prior(base)[0], whole)
    assert float((plain - unmerged).abs().max()) > 0.05, "the adapters changed nothing"
    assert facts[MERGED]["base"] == open_source(str(base), "prior").digest
    assert ADAPTERS not in facts and facts["step"] == 3
    assert read_model(folder, "prior")[1].keys() == build_prior(CONFIG).state_dict().keys()


def test_a_sampler_draws_from_the_merged_weights(models: tuple[Path, Path, Whole]) -> None:
    _, folder, _ = models
    part, facts = load_local_prior(folder, None, own_mesh())
    weight = part.layers["block001"].get_parameter("up.weight")
    assert torch.equal(weight, open_model(folder, "prior").read("block001.up.weight"))
    assert facts["tokenizer"] == "t"


def test_a_range_of_a_merged_tensor_is_that_of_the_whole(models: tuple[Path, Path, Whole]) -> None:
    _, folder, _ = models
    source, weights = open_source(str(folder), "prior"), open_model(folder, "prior")
    for name in ("block001.q.weight", "block000.down.weight", "head.norm.weight"):
        flat = weights.read(name).flatten()
        count = flat.numel()
        for start, stop in ((7, min(131, count)), (count // 2 + 1, count - 1)):
            part = source.flat(name, start, stop)
            torch.testing.assert_close(part, flat[start:stop], rtol=1e-6, atol=1e-7)
        assert torch.equal(source.tensor(name), weights.read(name))
    assert source.verify(0, 1) == [] and source.digest != weights.digest


def test_adapters_that_were_frozen_are_those_of_the_base(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapters"
    digest = _write(base, dict(build_prior(CONFIG, 7).state_dict()))
    whole = _adapters(folder, base, digest, leave="block001")
    merged, unmerged = _losses(load_prior(folder)[0], whole)
    assert float((merged - unmerged).abs().max() / unmerged.abs().max()) < 1e-6
    weight = open_model(folder, "prior").read("block001.up.weight")
    assert torch.equal(weight, open_model(base, "prior").read("block001.up.weight"))


def test_models_that_moved_together_are_opened(models: tuple[Path, Path, Whole]) -> None:
    base, folder, _ = models
    before = open_model(folder, "prior").digest
    home = folder.parent / "moved"
    home.mkdir()
    shutil.move(base, home / "base")
    with pytest.raises(InputError, match="which is not there; put it back"):
        open_model(folder, "prior")
    shutil.move(folder, home / "adapters")
    assert open_model(home / "adapters", "prior").digest == before


def test_another_base_and_a_damaged_one_are_refused(models: tuple[Path, Path, Whole]) -> None:
    base, folder, _ = models
    file = base / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptError, match="is damaged"):
        open_model(folder, "prior")
    _write(base, dict(build_prior(CONFIG, 8).state_dict()))
    with pytest.raises(InputError, match="holds another one now"):
        open_model(folder, "prior")


def test_a_run_starts_from_adapters_as_from_any_model(models: tuple[Path, Path, Whole]) -> None:
    _, folder, _ = models
    source = open_source(str(folder), "prior")
    assert set(source.shapes) == set(build_prior(CONFIG).state_dict())
    assert MERGED in source.facts
