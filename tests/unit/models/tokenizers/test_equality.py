"""Codes and pictures of other projects' own networks, from the same keyed weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.third_party import foreign_module
from models.tokenizers.config import ReadOptions
from models.tokenizers.protocol import NetworkTokenizer
from tests.golden.record_llamagen import FILE, LEVELS, PIXELS, STRIDE
from tests.harness import DEVELOPERS, installed
from tests.support.tokenizer_weights import keyed_pictures, keyed_weights
from training.export.tokenizers import import_tokenizer, open_tokenizer

pytestmark = [
    pytest.mark.seconds,
    pytest.mark.skipif(not installed("diffusers"), reason=DEVELOPERS),
]
OPTIONS = ReadOptions(pixels=PIXELS, crop="random")
VQGANS = {
    "f16-1024": ((1, 1, 2, 2, 4), 1024),
    "f16-16384": ((1, 1, 2, 2, 4), 16384),
    "gumbel-f8-8192": ((1, 1, 2, 4), 8192),
}


class Vqgan(torch.nn.Module):
    """taming's VQModel and GumbelVQ from its modules; the originals are Lightning modules."""

    def __init__(self, levels: tuple[int, ...], codes: int, gumbel: bool) -> None:
        super().__init__()
        net = pytest.importorskip("taming.modules.diffusionmodules.model", reason=DEVELOPERS)
        heads = pytest.importorskip("taming.modules.vqvae.quantize", reason=DEVELOPERS)
        sizes: dict[str, Any] = {
            "ch": 32,
            "ch_mult": levels,
            "num_res_blocks": 2,
            "attn_resolutions": [PIXELS >> (len(levels) - 1)],
            "in_channels": 3,
            "out_ch": 3,
            "resolution": PIXELS,
            "z_channels": 64,
            "double_z": False,
        }
        self.encoder, self.decoder = net.Encoder(**sizes), net.Decoder(**sizes)
        self.quant_conv = torch.nn.Conv2d(64, 64, 1)
        self.post_quant_conv = torch.nn.Conv2d(64, 64, 1)
        if gumbel:
            self.quantize = heads.GumbelQuantize(64, 64, n_embed=codes)
        else:
            self.quantize = heads.VectorQuantizer2(codes, 64, beta=0.25)

    def codes(self, pictures: Tensor) -> Tensor:
        states = self.quant_conv(self.encoder(pictures * 2 - 1))
        if isinstance(getattr(self.quantize, "proj", None), torch.nn.Module):
            return self.quantize.proj(states).argmax(1).flatten(1)  # its noise left out
        return self.quantize(states)[2][2].view(len(pictures), -1)

    def pictures(self, codes: Tensor, grid: int) -> Tensor:
        table = getattr(self.quantize, "embed", None) or self.quantize.embedding
        vectors = table(codes).view(len(codes), grid, grid, -1).permute(0, 3, 1, 2)
        drawn: Tensor = self.decoder(self.post_quant_conv(vectors))
        return drawn.add(1).div(2).clamp(0, 1)


def same_as(model: torch.nn.Module) -> None:
    """Give a network keyed weights."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(keyed_weights(shapes))
    model.eval()


@pytest.mark.parametrize("name", VQGANS)
@torch.no_grad()
def test_vqgans_equal_the_modules_of_taming(name: str, tmp_path: Path) -> None:
    levels, count = VQGANS[name]
    theirs = Vqgan(levels, count, "gumbel" in name)
    same_as(theirs)
    beside = {"loss.discriminator.weight": torch.ones(2), **theirs.state_dict()}
    torch.save({"state_dict": beside, "global_step": 7}, tmp_path / "last.ckpt")
    facts = import_tokenizer(tmp_path / "last.ckpt", tmp_path / "run", "", OPTIONS)
    grid = PIXELS >> (len(levels) - 1)
    assert (facts.kind, facts.rows, facts.columns, facts.codebook) == ("taming", grid, grid, count)
    ours, pictures = open_tokenizer(tmp_path / "run"), keyed_pictures(3, PIXELS)
    codes = ours.codes(pictures)
    assert codes.equal(theirs.codes(pictures)) and len(codes.unique()) > codes.numel() // 2
    assert (ours.pictures(codes) - theirs.pictures(codes, grid)).abs().max() < 1e-5


@pytest.mark.parametrize("name", LEVELS)
def test_llamagen_equals_what_its_repository_computed(name: str, tmp_path: Path) -> None:
    recorded = json.loads(FILE.read_bytes())["models"][name]
    weights = keyed_weights({key: tuple(shape) for key, shape in recorded["shapes"].items()})
    torch.save({"model": weights, "steps": 3}, tmp_path / "vq.pt")
    facts = import_tokenizer(tmp_path, tmp_path / "run", "", OPTIONS)
    assert (facts.kind, facts.codebook) == ("llamagen", 16384)
    ours = open_tokenizer(tmp_path / "run")
    codes = ours.codes(keyed_pictures(2, PIXELS))
    assert codes.tolist() == recorded["codes"]
    drawn = ours.pictures(codes)[:, :, ::STRIDE, ::STRIDE].flatten()
    assert (drawn - torch.tensor(recorded["pixels"])).abs().max() < 1e-5


def vq_folder(folder: Path, **changes: Any) -> Any:
    """A folder of diffusers' VQModel with keyed weights, and the model."""
    module: Any = foreign_module("diffusers.models.autoencoders.vq_model")
    sizes = {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 8,
        "num_vq_embeddings": 64,
        "vq_embed_dim": 4,
        **changes,
    }
    model = module.VQModel(**sizes)
    same_as(model)
    folder.mkdir()
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(model.to_json_string())
    return model


@pytest.mark.parametrize("unit", [False, True])
@torch.no_grad()
def test_a_folder_of_diffusers_equals_its_own_codes(unit: bool, tmp_path: Path) -> None:
    theirs = vq_folder(tmp_path / "vq", lookup_from_codebook=unit)
    facts = import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)
    assert (facts.kind, facts.rows, facts.codebook) == ("diffusers", 8, 64)
    ours, pictures = open_tokenizer(tmp_path / "run"), keyed_pictures(2, PIXELS)
    states = theirs.encode(pictures if unit else pictures * 2 - 1).latents
    codes = theirs.quantize(states)[2][2].view(2, -1)
    assert ours.codes(pictures).equal(codes)
    drawn = theirs.decode(theirs.quantize(states)[0], force_not_quantize=not unit).sample
    expected = drawn.clamp(0, 1) if unit else drawn.add(1).div(2).clamp(0, 1)
    assert (ours.pictures(codes) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_movq_decodes_with_its_codes_as_condition(tmp_path: Path) -> None:
    theirs = vq_folder(
        tmp_path / "vq",
        norm_type="spatial",
        vq_embed_dim=8,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    import_tokenizer(tmp_path / "vq", tmp_path / "run", "diffusers", OPTIONS)
    ours = open_tokenizer(tmp_path / "run")
    codes = torch.arange(64, device="cpu").view(1, 64)
    vectors = theirs.quantize.embedding(codes).view(1, 8, 8, 8).permute(0, 3, 1, 2)
    drawn = theirs.decode(vectors, force_not_quantize=True).sample.add(1).div(2).clamp(0, 1)
    assert (ours.pictures(codes) - drawn).abs().max() < 1e-5


def test_bf16_finds_codes_of_16_bit_states_in_fp32(tmp_path: Path) -> None:
    vq_folder(tmp_path / "vq")
    import_tokenizer(tmp_path / "vq", tmp_path / "run", "", OPTIONS)
    half, pictures = open_tokenizer(tmp_path / "run", precision="bf16"), keyed_pictures(4, PIXELS)
    assert isinstance(half, NetworkTokenizer)
    network = half._network
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = network.quant_conv(network.encoder(pictures * 2 - 1))
    assert states.dtype == torch.bfloat16
    distances = torch.cdist(states.float().permute(0, 2, 3, 1).flatten(1, 2), _table(network))
    codes = half.codes(pictures)
    assert codes.equal(distances.argmin(2))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    whole = open_tokenizer(tmp_path / "run").codes(pictures)
    assert 0.9 < (whole == codes).float().mean() < 1


def _table(network: Any) -> Tensor:
    table: Tensor = network.quantize.embedding.weight
    return table.expand(4, -1, -1)
