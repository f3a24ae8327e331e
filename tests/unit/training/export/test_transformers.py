"""`transformers` loads an export in a process without Tapir, and draws the same codes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from core.config import to_json
from data_pipeline.text.bpe import load_tokenizer, save_tokenizer, train_bpe
from generation.config import DrawSettings, ModelPaths
from generation.sampling.decoder import Decoder
from generation.sampling.load_prior import load_local_prior
from generation.sampling.sampler import Keys, Prompt, Sampler
from generation.text_to_image import open_studio
from models.config import DVAEConfig, PriorConfig
from models.dvae import DVAE
from parallel.mesh import own_mesh
from tapir import PACKAGES
from tests.harness import ENVIRONMENT
from tests.unit.models.test_models import trained_like
from tests.unit.models.test_pins_modern import ALL
from tests.unit.training.initial.test_adapters import CONFIG as ADAPTED
from tests.unit.training.initial.test_adapters import _adapters, _write
from training.export.huggingface import export_parts, find_parts, import_parts
from training.export.tokenizers import open_tokenizer
from training.export.transformers import loads_elsewhere, write_transformers
from training.export.weights import KINDS, TOKENIZER, Weights, write_model

pytestmark = pytest.mark.seconds

CHILD = Path(__file__).with_name("without_tapir.py")
CAPTIONS = ["a small RED circle", "two Blaue Ström Σ", "a"]
SEED, COUNT, KEPT = 5, 3, 6
SETTINGS = DrawSettings(candidates=COUNT, seed=SEED)
GREEDY = replace(SETTINGS, temperature=0.0)
MODERN = {name: value for name, value in ALL.items() if name != "columns"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "modern": (MODERN, {"quantizer": "fsq", "levels": (4, 8)}),
}
"""Options of a prior and of its dVAE."""
IDS = torch.tensor([[3, 1, -1, -1], [19, 0, 7, 5]], device="cpu")
"""Of the run of adapters, which has no tokenizer."""
ROUNDING = {"rtol": 0.0, "atol": 1e-6}
"""Convolutions choose their kernels by threads and batch; test_custom_code.py compares all."""


def _save(folder: Path, stage: str, config: Any, network: nn.Module, facts: Any) -> str:
    prefix = KINDS[stage].prefix
    tensors = {f"{prefix}{name}": p.detach() for name, p in network.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    return write_model(folder, stage, to_json(config), facts, shapes, tensors.__getitem__)


def _write_runs(folder: Path, name: str) -> Path:
    """Run folders of a dVAE, a prior on its codes, and their tokenizer."""
    options, quantizer = RUNS[name]
    save_tokenizer(train_bpe(["a small red circle"], 270), folder / "bpe")
    tokenizer, text = load_tokenizer(folder / "bpe")
    sizes = DVAEConfig(pixels=16, width=8, codebook=32, code_width=8, **quantizer)
    dvae = _save(folder / "dvae", "dvae", sizes, DVAE(sizes, 1), {"raw": "r"})
    prior = PriorConfig(
        **{"dim": 48, "heads": 3, "layers": 5, "text_length": 14, "grid": 4, "conv_kernel": 3},
        **{"text_vocabulary": tokenizer.get_vocab_size(), "image_vocabulary": 32, **options},
    )
    facts = {"dvae": dvae, "tokenizer": text, "grid": 4, "step": 7}
    _save(folder / "prior", "prior", prior, trained_like(prior), facts)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and their exports: in one file and in many, of adapters, of a dVAE alone."""
    place = tmp_path_factory.mktemp("elsewhere")
    for name in RUNS:
        runs = _write_runs(place / name, name)
        export_parts(
            find_parts(runs, {}), place / f"{name}-hub", 30_000 if name == "paper" else 10**9
        )
    digest = _write(place / "base", dict(trained_like(ADAPTED).state_dict()))
    _adapters(place / "adapters", place / "base", digest)
    export_parts(find_parts(place / "adapters", {}), place / "adapters-hub", 10**9)
    export_parts(find_parts(place / "paper" / "dvae", {}), place / "dvae-hub", 10**9)
    return place


@pytest.fixture(scope="module")
def elsewhere(place: Path) -> dict[str, Tensor]:
    """What a process without Tapir draws from all of them."""
    common = {"captions": CAPTIONS, "seed": SEED, "candidates": COUNT, "kept": KEPT}
    jobs: dict[str, Any] = {name: {**common, "folder": f"{place / name}-hub"} for name in RUNS}
    some = {"ids": IDS.tolist(), "captions": CAPTIONS[:2], "kept": 2}
    jobs["adapters"] = {**common, **some, "folder": str(place / "adapters-hub")}
    codes = [[i % 32 for i in range(16)]]
    jobs["dvae"] = {**common, "captions": None, "codes": codes, "folder": str(place / "dvae-hub")}
    (place / "jobs.json").write_text(json.dumps(jobs))
    out = place / "drawn.safetensors"
    names = json.dumps(["tapir", *PACKAGES])
    done = subprocess.run(
        [sys.executable, "-S", "-P", str(CHILD), str(place / "jobs.json"), str(out), names],
        env={
            **ENVIRONMENT,
            "PYTHONPATH": str(Path(torch.__file__).parents[1]),
            "HF_HOME": str(place / "home"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "MISSING" not in done.stderr and "UNEXPECTED" not in done.stderr, done.stderr
    return load_file(out)


def _rows(drawn: Any, captions: int, length: int) -> Tensor:
    codes = torch.full((captions, COUNT, length), -1, device="cpu")
    for part in drawn:
        codes[part.captions, part.candidates] = part.codes
    return codes.flatten(0, 1)


@pytest.mark.parametrize("name", RUNS)
def test_codes_and_pictures_are_those_of_tapir(
    name: str, place: Path, elsewhere: dict[str, Tensor]
) -> None:
    folders = {part: place / name / part for part in ("prior", "dvae", "bpe")}
    studio = open_studio(ModelPaths(**folders), rerank=False)
    mine = {kind: elsewhere[f"{name}.{kind}"] for kind in ("greedy", "keyed", "top_k", "prompt")}
    greedy = _rows(studio.codes(CAPTIONS, GREEDY), 3, 16)
    keyed = _rows(studio.codes(CAPTIONS, SETTINGS), 3, 16)
    cool = replace(SETTINGS, top_k=3, temperature=0.5)
    assert mine["greedy"].equal(greedy) and mine["keyed"].equal(keyed)
    assert mine["top_k"].equal(_rows(studio.codes(CAPTIONS, cool), 3, 16))
    kept = torch.arange(16, device="cpu") < KEPT
    prompt = Prompt(codes=greedy[::COUNT], kept=kept)
    assert mine["prompt"].equal(_rows(studio.codes(CAPTIONS, SETTINGS, prompt), 3, 16))
    assert len(keyed.unique(dim=0)) == 9 and len(greedy.unique(dim=0)) == 3
    pictures = elsewhere[f"{name}.pictures"]
    torch.testing.assert_close(pictures, studio.decode(keyed), **ROUNDING)
    assert elsewhere[f"{name}.codes"].equal(studio.encode(pictures))
    half = elsewhere[f"{name}.half"]
    assert half.shape == pictures.shape and half.dtype == torch.float32


def test_a_run_of_adapters_draws_as_the_merged_model(
    place: Path, elsewhere: dict[str, Tensor]
) -> None:
    part, _ = load_local_prior(place / "adapters", None, own_mesh())
    base, _ = load_local_prior(place / "base", None, own_mesh())
    keys: Keys = [[(SEED, text, i) for i in range(COUNT)] for text in CAPTIONS[:2]]

    def drawn(prior: Any, settings: DrawSettings) -> Tensor:
        return _rows(Sampler(Decoder(prior)).draw(IDS, keys, settings), 2, 4)

    assert elsewhere["adapters.greedy"].equal(drawn(part, GREEDY))
    assert elsewhere["adapters.keyed"].equal(drawn(part, SETTINGS))
    assert not elsewhere["adapters.keyed"].equal(drawn(base, SETTINGS))


def test_a_dvae_alone_decodes(place: Path, elsewhere: dict[str, Tensor]) -> None:
    codes = torch.arange(16, device="cpu")[None]
    expected = open_tokenizer(place / "paper" / "dvae").pictures(codes)
    torch.testing.assert_close(elsewhere["dvae.pictures"], expected, **ROUNDING)


def test_the_folder_still_imports_byte_for_byte(place: Path, tmp_path: Path) -> None:
    for name in RUNS:
        import_parts(place / f"{name}-hub", tmp_path / name)
        for path in (place / name).rglob("*.*"):
            assert (
                tmp_path / name / path.relative_to(place / name)
            ).read_bytes() == path.read_bytes()
    card = (place / "paper-hub" / "README.md").read_text()
    assert "library_name: transformers" in card and "trust_remote_code=True" in card


def test_models_that_the_code_does_not_know_are_left_out(tmp_path: Path) -> None:
    shapes = {"weight": (2,)}
    other = Weights(
        **{"stage": TOKENIZER, "where": "", "config": {}, "facts": {}, "shapes": shapes},
        read=lambda name: torch.zeros(2, device="cpu"),
    )
    write_transformers(tmp_path, {"dvae": other}, {"dvae": {"model.safetensors": ["weight"]}})
    assert not list(tmp_path.iterdir()) and not loads_elsewhere({"dvae": other})
