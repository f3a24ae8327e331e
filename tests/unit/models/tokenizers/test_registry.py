"""Kinds of image tokenizers, plug-ins by entry points, and what is known without weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError, InputError
from data_pipeline.formats.tokens import codes_per_image
from models.config import DVAEConfig
from models.dvae import DVAE
from models.tokenizers.config import TokenizerConfig, TokenizerFacts, VQConfig
from models.tokenizers.protocol import DVAETokenizer
from models.tokenizers.registry import (
    build_tokenizer,
    kind_of,
    known_kinds,
    recognised,
    size_problems,
    sizes_of,
)
from tests.support.tokenizer_weights import keyed_pictures

FACTS = {"kind": "dvae", "pixels": 16, "rows": 4, "columns": 4, "codebook": 16, "digest": "d"}
PLUG_IN = """
from dataclasses import dataclass
import torch
from models.tokenizers.protocol import TokenizerNetwork
from models.tokenizers.registry import TokenizerKind

@dataclass(frozen=True, kw_only=True)
class Sizes:
    pixels: int = 8

class Network(TokenizerNetwork):
    def __init__(self, config):
        super().__init__()
        self.register_buffer("table", torch.zeros(3), persistent=True)

KIND = TokenizerKind(config=Sizes, build=Network, matches=lambda path: False, read=None)
OTHER = 3
"""


def install(site: Path, points: dict[str, str]) -> None:
    """A package as pip lays it: a module, and metadata with entry points."""
    about = site / "third_party_tokenizers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: third-party-tokenizers\nVersion: 1\n"
    )
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[tapir.tokenizers]", *lines]) + "\n")
    (site / "third_party_tokenizers_of_a_test.py").write_text(PLUG_IN)


def test_plug_ins_are_listed_loaded_and_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "third_party_tokenizers_of_a_test"
    points = {"whole": f"{module}:KIND", "lacking": f"{module}:NONE", "number": f"{module}:OTHER"}
    install(tmp_path, points)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert known_kinds() == ["diffusers", "taming", "llamagen", "lacking", "number", "whole"]
    assert kind_of("whole").build is not None
    with pytest.raises(ConfigError, match="package third-party-tokenizers cannot be loaded: Attri"):
        kind_of("lacking")
    with pytest.raises(ConfigError, match="is a int, and must be a TokenizerKind"):
        kind_of("number")
    with pytest.raises(ConfigError, match=r"has buffers \(table\)"):
        build_tokenizer(TokenizerConfig(kind="whole", sizes={}))
    with pytest.raises(ConfigError, match=r"tokenizer 'whol'; did you mean 'whole'"):
        kind_of("whol")
    with pytest.raises(ConfigError, match="Sizes has no field 'pixel'"):
        sizes_of(TokenizerConfig(kind="whole", sizes={"pixel": 3}))
    assert "unknown 'pixel'" in size_problems(TokenizerConfig(kind="whole", sizes={"pixel": 3}))[0]


def test_all_problems_of_an_imported_tokenizers_sizes_are_named() -> None:
    sizes: dict[str, Any] = {"pixels": 8, "head": "nearest", "unit_range": False, "crop": "random"}
    sizes["body"] = {"num_vq_embeddings": 16, "block_out_channels": [32]}

    def problems(**changes: Any) -> list[str]:
        return size_problems(TokenizerConfig(kind="taming", sizes={**sizes, **changes}))

    assert problems() == []
    assert "must be" in problems(pixels="8")[0]
    assert "is not a multiple of 1" in problems(pixels=0)[0]
    few = {**sizes["body"], "num_vq_embeddings": 1}
    assert "has 1 codes" in problems(body=few)[0]


def test_files_of_no_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"knows \(diffusers, taming, llamagen\)"):
        recognised(tmp_path)
    with pytest.raises(InputError, match=r"there is no .*absent; give the file or folder"):
        recognised(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(InputError, match="holds none of the tokenizers"):
        recognised(tmp_path)
    with pytest.raises(InputError, match="is missing or not of diffusers"):
        kind_of("diffusers").read(tmp_path, None)  # type: ignore[arg-type]
    (tmp_path / "last.ckpt").write_bytes(b"1234567")
    with pytest.raises(InputError, match="is damaged, or in the format of torch before 1"):
        recognised(tmp_path)


def test_a_search_without_a_kind_tells_what_hinders_it(tmp_path: Path) -> None:
    for text in ('{"_class_name": "VQM', "[" * 100_000, "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config.json is no whole JSON \(.*; copy it again"):
            recognised(tmp_path)
    (tmp_path / "config.json").unlink()
    torch.save({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, tmp_path / "a.pt")
    for place in (tmp_path, tmp_path / "a.pt"):
        with pytest.raises(InputError, match="weights of diffusers' VQModel without its config"):
            recognised(place)
    torch.save({"encoder.down.0.block.0.conv1.weight": torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"several files of weights \(a.pt, b.pt\); give one"):
        recognised(tmp_path)
    assert recognised(tmp_path / "b.pt") == "taming"


def test_facts_of_a_manifest_name_columns_and_crops_only_where_they_are_not_the_usual() -> None:
    usual = TokenizerFacts(**FACTS)  # type: ignore[arg-type]
    assert usual.manifest() == {"dvae": "d", "grid": 4, "image_vocabulary": 16}
    assert usual.tokens == codes_per_image(usual.manifest()) == 16 and usual.problems() == []
    other = TokenizerFacts(**{**FACTS, "columns": 6, "crop": "center"})  # type: ignore[arg-type]
    assert other.manifest() == {**usual.manifest(), "columns": 6, "crop": "center"}
    assert other.tokens == codes_per_image(other.manifest()) == 24


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"codebook": 1}, "1 codes; it must have 2 to 65536"),
        ({"codebook": 65537}, "65537 codes"),
        ({"rows": 0}, "0 x 4 tokens of 16 pixels"),
        ({"columns": 0}, "4 x 0 tokens"),
        ({"pixels": 0}, "of 0 pixels"),
    ],
)
def test_facts_that_records_cannot_hold_are_problems(changes: dict[str, int], text: str) -> None:
    (problem,) = TokenizerFacts(**{**FACTS, **changes}).problems()  # type: ignore[arg-type]
    assert text in problem
    edge = {"codebook": 65536} if changes.get("codebook", 0) > 9 else {"codebook": 2}
    edge |= dict.fromkeys(("pixels", "rows", "columns"), 1)
    assert TokenizerFacts(**{**FACTS, **edge}).problems() == []  # type: ignore[arg-type]


def test_sizes_of_a_vq_tokenizer_follow_from_its_body() -> None:
    body = {
        **{"block_out_channels": [32] * 5, "num_vq_embeddings": 1024},
        **{"down_block_types": ["D"] * 5, "up_block_types": ["U"] * 5, "vq_embed_dim": None},
    }

    def of(pixels: int, body: dict[str, Any]) -> VQConfig:
        return VQConfig(pixels=pixels, head="nearest", unit_range=False, crop="random", body=body)

    config = of(48, body)
    assert (config.step, config.rows, config.columns, config.codebook) == (16, 3, 3, 1024)
    assert config.problems() == of(1, {}).problems() == []
    assert (of(8, {}).codebook, of(8, {}).step) == (256, 1)
    (problem,) = of(40, body).problems()
    assert "multiple of 16" in problem and "--pixels 32" in problem
    (problem,) = of(0, body).problems()
    assert "--pixels 16" in problem


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"num_vq_embeddings": "many"}, ["num_vq_embeddings='many' must be a whole number"]),
        ({"num_vq_embeddings": None}, ["num_vq_embeddings=None must be a whole number"]),
        ({"vq_embed_dim": "4"}, ["vq_embed_dim='4' must be a whole number or null"]),
        ({"vq_embed_dim": 0, "latent_channels": -1}, ["latent_channels=-1", "vq_embed_dim=0 must"]),
        ({"layers_per_block": 0}, ["layers_per_block=0 must be at least 1"]),
        ({"block_out_channels": 3}, ["block_out_channels=3 must be a list of whole numbers"]),
        ({"block_out_channels": []}, ["have 0, 2 and 2 levels"]),
        ({"down_block_types": ["D"]}, ["have 2, 1 and 2 levels"]),
        ({"up_block_types": ["U"] * 3}, ["have 2, 2 and 3 levels"]),
        ({"block_out_channels": [32, 40]}, ["has 40, not a multiple of the 32"]),
        ({"block_out_channels": [0, 32]}, ["has 0, not a multiple"]),
        ({"norm_num_groups": 0}, ["norm_num_groups=0 must be at least 1"]),
        ({"in_channels": 1, "out_channels": 4}, ["in_channels=1 must be 3", "out_channels=4"]),
        ({"norm_type": "layer"}, ["norm_type='layer' must be group or spatial"]),
    ],
)
def test_each_wrong_argument_of_a_body_is_a_problem(
    changes: dict[str, Any], texts: list[str]
) -> None:
    right = {
        **{"block_out_channels": [32, 64], "down_block_types": ["D"] * 2},
        **{"up_block_types": ["U"] * 2, "sample_size": "only diffusers knows"},
    }
    sizes: dict[str, Any] = {"pixels": 16, "head": "nearest", "unit_range": False, "crop": "random"}
    assert VQConfig(**sizes, body=right).problems() == []
    problems = VQConfig(**sizes, body={**right, **changes}).problems()
    assert len(problems) == len(texts)
    for problem, text in zip(problems, texts, strict=True):
        assert text in problem and problem.endswith("give the files of a VQModel")


def test_a_dvae_is_the_tokenizer_that_it_was() -> None:
    dvae = DVAE(DVAEConfig(pixels=16, width=4, codebook=16, code_width=8)).eval()
    ours, pictures = DVAETokenizer(dvae, "d"), keyed_pictures(5, 16)
    assert ours.facts == TokenizerFacts(**FACTS)  # type: ignore[arg-type]
    codes = ours.codes(pictures)
    assert codes.equal(dvae.tokens(pictures)) and codes.dtype == torch.int64
    assert ours.pictures(codes).equal(dvae.picture(codes))
    assert ours.device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in dvae.parameters())
