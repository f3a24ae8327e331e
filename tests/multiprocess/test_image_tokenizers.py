"""Imported image tokenizers from pairs to pictures, by the command line alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.storage.store import FolderStore
from data_pipeline.formats.manifest import TOKENS, read_manifest
from data_pipeline.formats.raw import RawSource
from data_pipeline.formats.tokens import TokenSource
from data_pipeline.images.decode import decode_rgb
from data_pipeline.streaming.stream import first_records
from data_pipeline.tokenize.encode import pictures_of
from tests.harness import DEVELOPERS, PATH, ROOT, cold_tapir, installed, tapir
from tests.unit.models.tokenizers.test_equality import vq_folder
from training.export.tokenizers import open_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed("diffusers"), reason=DEVELOPERS),
]
SHORT = ["--loop.steps=3", "--loop.global-batch-size=16", "--loop.validation-samples=16"]
SHORT += ["--mesh.data=1", "--order.lanes=2", "--engine.name=reference", "--model.layers=1"]


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ tokenizer of 8 x 8 pixels a token, imported from a folder of diffusers."""
    folder = tmp_path_factory.mktemp("vq")
    levels = {"block_out_channels": (32,) * 4}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    vq_folder(folder / "hub", **levels, **types, up_block_types=("UpDecoderBlock2D",) * 4)
    tapir("import", str(folder / "hub"), str(folder / "run"), "--pixels=32")
    return folder / "run"


def test_pairs_to_pictures_with_vq_f8(vq: Path, raw: Path, bpe: Path, tmp_path: Path) -> None:
    place = {name: str(tmp_path / name) for name in ("tokens", "prior", "clip", "out", "hub")}
    tapir("tokenize", str(raw), place["tokens"], f"--dvae={vq}", f"--bpe={bpe}", "--block=8")
    facts = read_manifest(FolderStore(tmp_path / "tokens"), "train/", TOKENS).facts
    ours = open_tokenizer(vq).facts
    assert facts["dvae"] == ours.digest and (facts["grid"], facts["image_vocabulary"]) == (4, 64)
    assert "columns" not in facts
    tapir(
        "train",
        "prior",
        "tiny",
        f"--data={place['tokens']}",
        f"--out={place['prior']}",
        *SHORT,
        "--model.dim=48",
    )
    tapir(
        "train",
        "clip",
        "tiny",
        f"--data={raw}",
        f"--out={place['clip']}",
        f"--bpe={bpe}",
        *SHORT,
        "--model.dim=32",
    )
    models = [f"--prior={place['prior']}", f"--dvae={vq}", f"--bpe={bpe}"]
    ranked = [*models, f"--clip={place['clip']}"]
    png = tmp_path / "drawn.png"
    tapir("sample", "a red fox", f"--out={png}", *ranked, "--candidates=2", "--show=2")
    grid = decode_rgb(png.read_bytes(), str(png))
    assert grid.shape == (34 * 4, 2 * 34 * 4, 3)  # two pictures with gaps of 2, enlarged 4 times
    few = ["--prompts=4", "--candidates=4", "--max-candidates=0"]
    tapir("evaluate", str(raw), f"--out={place['out']}", *ranked, *few)
    figures = json.loads((tmp_path / "out" / "accuracy.json").read_bytes())
    assert (tmp_path / "out" / "reconstructions.png").is_file() and figures
    tapir("export", place["prior"], place["hub"], *models)
    tapir("import", place["hub"], str(tmp_path / "back"))
    assert open_tokenizer(tmp_path / "back" / "dvae").facts == ours
    assert "model.json" in tapir("verify", str(vq))


def test_the_example_package_installs_and_works(
    raw: Path, bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, palette = tmp_path / "site", tmp_path / "colours.json"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", f"--target={site}", str(ROOT / "examples" / "image_tokenizer")]
    subprocess.run(pip, check=True, cwd=tmp_path)
    colours = [[r, g, b] for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 128, 255)]
    palette.write_text(json.dumps({"patch": [4, 8], "colours": colours}))
    arguments = ["import", str(palette), str(tmp_path / "run"), "--pixels=32"]
    assert "Tapir knows (diffusers, taming, llamagen)" in tapir(*arguments, code=2)
    inside = {"PYTHONPATH": f"{site}:{PATH}"}
    wide = [*arguments[:3], "--pixels=28"]
    assert "give --pixels 24" in cold_tapir(*wide, code=2, **inside)
    cold_tapir(*arguments, "--crop=center", **inside)
    made = [str(tmp_path / "tokens"), f"--dvae={tmp_path / 'run'}", f"--bpe={bpe}", "--block=8"]
    assert "would all be the same" in cold_tapir(
        "tokenize", str(raw), *made, "--variants=2", code=2, **inside
    )
    cold_tapir("tokenize", str(raw), *made, **inside)
    source = TokenSource(FolderStore(tmp_path / "tokens"), "train")
    known = source.manifest.facts
    assert [known[name] for name in ("grid", "columns", "image_vocabulary")] == [8, 4, 27]
    assert known["crop"] == "center" and source.read(0).image.shape == (8, 32)
    monkeypatch.syspath_prepend(str(site))
    images = open_tokenizer(tmp_path / "run")
    records = first_records(RawSource(FolderStore(raw), "train"), 8)
    pictures = pictures_of(records, 32)
    codes = images.codes(pictures)
    stored = source.read(0)
    by_id = dict(zip(stored.ids.tolist(), stored.image.tolist(), strict=True))
    assert [by_id[record.id] for record in records] == codes.tolist()
    again = images.pictures(codes)
    means = torch.nn.functional.avg_pool2d(pictures, (4, 8))
    assert (again[:, :, ::4, ::8] - means).abs().max() <= 64 / 255  # half of 0 to 128
