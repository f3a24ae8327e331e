"""Export to and import from the layout of OpenAI's `dall_e` package, with the package itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import InputError
from tests.harness import DEVELOPERS, tapir
from training.export.openai_dvae import PARTS, import_dvae
from training.export.weights import load_dvae

SIZES = ["--model.groups=4", "--model.bottleneck=4", "--model.gain=0", "--model.blocks=2"]


@pytest.fixture(scope="module")
def exported(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dVAE trained here, as a run and in the package's layout."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("openai")
    short = ["--loop.steps=4", "--loop.global-batch-size=32", "--mesh.data=1", "--augment"]
    tapir("train", "dvae", "tiny", f"--data={raw}", f"--out={run}", *short, *SIZES)
    tapir("export", str(run), str(out), "--to=openai-dvae")
    return run, out


@pytest.mark.slow
@torch.no_grad()
def test_the_packages_own_networks_give_the_same(exported: tuple[Path, Path]) -> None:
    dall_e = pytest.importorskip("dall_e", reason=DEVELOPERS)
    run, out = exported
    ours, _ = load_dvae(run)
    sizes = {"n_hid": 16, "n_blk_per_group": 2, "vocab_size": 64}
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(n_init=32, **sizes)
    encoder.load_state_dict(load_file(out / "encoder.safetensors"))
    decoder.load_state_dict(load_file(out / "decoder.safetensors"))
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = encoder(dall_e.map_pixels(image))
    assert (theirs - ours.logits(image)).abs().max() < 1e-5
    codes = theirs.argmax(1)
    assert codes.flatten(1).equal(ours.tokens(image))
    one_hot = torch.nn.functional.one_hot(codes, 64).permute(0, 3, 1, 2).float()
    stats = decoder(one_hot).float()
    picture = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3]))
    assert (picture - ours.picture(codes.flatten(1))).abs().max() < 1e-5


@pytest.mark.slow
def test_what_was_exported_comes_back(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = exported
    tapir("import", str(out), str(tmp_path / "back"), "--from=openai-dvae", "--pixels=32")
    (before, _), (after, _) = load_dvae(run), load_dvae(tmp_path / "back")
    assert all(
        a.equal(b)
        for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    text = tapir("import", str(out), str(tmp_path / "back"), code=2)
    assert "holds a finished model already" in text
    assert "not a multiple of 8" in tapir(
        "import", str(out), str(tmp_path / "x"), "--pixels=33", code=2
    )


@pytest.mark.slow
def test_what_does_not_fit_is_refused(dvae: Path, tmp_path: Path) -> None:
    text = tapir("export", str(dvae), str(tmp_path), "--to=openai-dvae", code=2)
    assert "model.groups must be 4, not 3" in text and "model.gain must be 0.0" in text
    openai = ["import", str(tmp_path), str(tmp_path / "y"), "--from=openai-dvae"]
    assert "pickles are not loaded" in tapir(*openai, code=2)
    for part in ("encoder", "decoder"):
        save_file({"blocks.evil": torch.zeros(1)}, tmp_path / f"{part}.safetensors")
    text = tapir("import", str(tmp_path), str(tmp_path / "y"), code=2)
    assert "it has a tensor 'blocks.evil'" in text


@pytest.mark.slow
def test_files_that_are_not_one_dvae_are_refused(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = {part: load_file(exported[1] / f"{part}.safetensors") for part in PARTS}
    name = "blocks.group_1.block_1.res_path.conv_2.w"
    few = {k: v[:32] if k.startswith("blocks.output") else v for k, v in whole["encoder"].items()}
    less = {k: v for k, v in whole["encoder"].items() if k != name}
    broken = {**whole["encoder"], name: torch.full_like(whole["encoder"][name], torch.nan)}
    cases = [
        ({"encoder": whole["decoder"], "decoder": whole["encoder"]}, "tensors do not fit"),
        ({**whole, "encoder": few}, "output.bias, 32 instead of 64"),
        ({**whole, "encoder": less}, "missing instead of"),
        ({**whole, "encoder": broken}, "holds values like NaN"),
    ]
    for tensors, reason in cases:
        for part in PARTS:
            save_file(tensors[part], tmp_path / f"{part}.safetensors")
        with pytest.raises(InputError, match=reason):
            import_dvae(tmp_path, tmp_path / "run", 32)
    (tmp_path / "decoder.safetensors").write_bytes(b"1234567")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        import_dvae(tmp_path, tmp_path / "run", 32)
