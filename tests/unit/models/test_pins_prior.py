"""The prior's numbers, by hand or by torch's own transformer."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention.banded import band_of
from models.attention.flexible import mask_mod
from models.attention.masks import full_mask, image_mask
from models.config import ClipConfig, DVAEConfig, PriorConfig
from models.counts import attended_pairs, prior_flops, prior_parameters
from models.prior import (
    PAD,
    TABLES,
    PriorBlock,
    PriorEmbedding,
    PriorHead,
    PriorLogits,
    _gated,
    prior_layers,
    prior_loss,
    prior_program,
)
from parallel.tensor.ops import TensorParallel

ALONE = TensorParallel()
LN2, LN3, LN7 = math.log(2), math.log(3), math.log(7)


def test_the_loss_of_three_captions_by_hand() -> None:
    """Pads are ignored, an empty caption has no text loss, each caption has the same weight.

    Row 1: ln 4/3 and ln 2, their mean 0.490415. Row 2: ln 8. Row 3 is empty: 0.
    """
    text = torch.tensor([[0, 1, PAD], [1, PAD, PAD], [PAD, PAD, PAD]])
    of_text = torch.tensor(
        [
            [[LN3, 0.0], [0.0, 0.0], [5.0, 0.0]],
            [[LN7, 0.0], [9.0, 0.0], [0.0, 4.0]],
            [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]],
        ]
    )
    of_image = torch.tensor([[[LN3, 0.0]], [[LN3, 0.0]], [[0.0, 0.0]]])
    logits = PriorLogits(text=of_text, image=of_image, tensor=ALONE)
    batch = {"text": text, "image": torch.tensor([[0], [1], [0]])}
    losses = prior_loss(logits, batch, PriorConfig().text_weight)
    assert float(losses["text_loss"]) == pytest.approx(0.8566187, rel=1e-6)
    assert float(losses["image_loss"]) == pytest.approx(0.7890412, rel=1e-6)
    assert float(losses["loss"]) == pytest.approx(0.7974884, rel=1e-6)
    program = prior_program(_tiny(), 0)
    assert float(program.loss(logits, batch)["loss"]) == pytest.approx(0.7974884, rel=1e-6)
    assert float(prior_loss(logits, batch, 0.5)["loss"]) == pytest.approx(0.82283, rel=1e-5)


def _tiny(**changes: int) -> PriorConfig:
    sizes = {
        "dim": 1, "heads": 1, "layers": 1, "text_length": 3, "text_vocabulary": 4,
        "image_vocabulary": 3, "grid": 2,
    }  # fmt: skip
    return PriorConfig(**{**sizes, **changes})


def test_inputs_are_shifted_by_one_and_every_pad_has_its_own_embedding() -> None:
    embedding = PriorEmbedding(_tiny(), ALONE)
    values = {
        "text": [1, 2, 3, 4], "pad": [10, 20, 30], "text_position": [100, 200, 300],
        "image": [1000, 2000, 3000], "row": [0.5, 0.25], "column": [8, 16], "start": [7, 9],
    }  # fmt: skip
    with torch.no_grad():
        for name, rows in values.items():
            table = getattr(embedding, name)
            getattr(table, "table", table).weight.copy_(torch.tensor(rows)[:, None])
    text = torch.tensor([[2, PAD, PAD], [PAD, PAD, PAD], [0, 1, 3]])
    image = torch.tensor([[1, 0, 2, 1]]).expand(3, 4)
    embedded = embedding({"text": text, "image": image})[..., 0]
    pictures = [9 + 8.5, 2000 + 16.5, 1000 + 8.25, 3000 + 16.25]
    assert embedded.tolist() == [
        [107, 203, 320, *pictures],
        [107, 210, 320, *pictures],
        [107, 201, 302, *pictures],
    ]
    assert embedding.embed_image(image[:1, :2])[0, :, 0].tolist() == pictures[:2]


ROW = """#........
##.......
###......
####.....
.####....
..####...
...####..
....####.
.....####"""
COLUMN = """#........
.#.......
..#......
#..#.....
.#..#....
..#..#...
#..#..#..
.#..#..#.
..#..#..#"""
CONV = """#........
##.......
###......
####.....
#####....
.#####...
..#####..
...#####.
....#####"""


@pytest.mark.parametrize(("kind", "drawn"), [("row", ROW), ("column", COLUMN), ("conv", CONV)])
def test_masks_of_a_grid_of_three_as_drawn(kind: str, drawn: str) -> None:
    """A convolution of 3 reads its row's left neighbour and three codes of the row above: 2 to 4
    positions back, with wrap-around.
    """
    mask = image_mask(kind, 3, 3)  # type: ignore[arg-type]
    assert ["".join(".#"[int(x)] for x in row) for row in mask] == drawn.split("\n")
    whole = full_mask(kind, 2, 3, 3)  # type: ignore[arg-type]
    assert whole[:2].tolist() == [[True] + 10 * [False], [True, True] + 9 * [False]]
    assert whole[2:, :2].all() and whole[2:, 2:].equal(mask)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("text", "grid", "kernel"), [(2, 4, 11), (3, 3, 3), (1, 5, 3), (0, 4, 4)])
def test_the_gpus_masks_are_the_drawn_ones(kind: str, text: int, grid: int, kernel: int) -> None:
    length = text + grid * grid
    places = torch.arange(length)
    if kind == "column":  # over the transposed image
        turned = text + torch.arange(grid * grid).view(grid, grid).T.flatten()
        places = torch.cat([places[:text], turned])
    allowed = mask_mod(kind, text, grid, kernel)  # type: ignore[arg-type]
    at = torch.arange(length)
    result = allowed(at, at, at[:, None], at[None])
    mask = full_mask(kind, text, grid, kernel)[places][:, places]  # type: ignore[arg-type]
    assert result.equal(mask)


@pytest.mark.parametrize(("number", "kind"), [(1, "row"), (2, "column"), (4, "conv")])
def test_a_block_is_torchs_own_transformer_layer(number: int, kind: str) -> None:
    config = _tiny(dim=12, heads=3, layers=4)
    block = PriorBlock(config, number, ALONE)
    torchs = nn.TransformerEncoderLayer(
        12, 3, 48, 0.0, nn.GELU(approximate="tanh"), batch_first=True, norm_first=True
    )
    draws = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=draws))
        attention = torchs.self_attn
        assert attention.in_proj_bias is not None
        attention.in_proj_weight.copy_(torch.cat([block.q.weight, block.k.weight, block.v.weight]))
        none = torch.zeros(12)
        attention.in_proj_bias.copy_(torch.cat([block.q.bias, none, block.v.bias]))
        attention.out_proj.weight.copy_(block.out.weight.T)
        attention.out_proj.bias.copy_(block.out.bias)
        torchs.linear1.load_state_dict(block.up.state_dict())
        torchs.linear2.weight.copy_(block.down.weight.T)
        torchs.linear2.bias.copy_(block.down.bias)
        torchs.norm1.load_state_dict(block.attention_norm.state_dict())
        torchs.norm2.load_state_dict(block.mlp_norm.state_dict())
    x = torch.randn(2, 7, 12, generator=draws)
    expected = torchs(x, src_mask=~full_mask(kind, 3, 2, 11))  # type: ignore[arg-type]
    assert torch.allclose(block(x), expected, atol=1e-5)


def test_heads_are_joined_by_position() -> None:
    """Two heads of 0..3 and 4..7, (head, position, channel); the output matrix is I."""
    block = PriorBlock(_tiny(dim=4, heads=2), 1, ALONE)
    with torch.no_grad():
        block.out.weight.copy_(torch.eye(4))
        block.out.bias.zero_()
    joined = block._join(torch.arange(8.0).view(1, 2, 2, 2))
    assert joined.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.mark.parametrize("changes", [{}, {"mlp": "gated"}, {"norm": "rms", "mlp": "gated"}])
def test_a_selective_block_computes_cheap_parts_again(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are those of a block that keeps all; LayerNorm's kernel keeps only its input."""
    block = PriorBlock(replace(_tiny(dim=12, heads=3), **changes), 1, ALONE)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=draws))
    given = torch.randn(2, 7, 12, generator=draws)
    parts, run_cheap = list[object](), block.run_cheap

    def noted(part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        parts.append(part)
        return run_cheap(part, *inputs)

    monkeypatch.setattr(block, "run_cheap", noted)
    gradients = []
    for selective in (False, True):
        block.selective = selective
        x = given.clone().requires_grad_()
        block(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in block.parameters())])
        block.zero_grad()
    for kept, again in zip(*gradients, strict=True):
        assert kept is not None and again is not None and kept.equal(again)
    rms, gated = changes.get("norm") == "rms", changes.get("mlp") == "gated"
    cheap = [block.attention_norm] * rms + [block._attended] + [block.mlp_norm] * rms
    assert parts == 2 * [*cheap, *[_gated] * gated]


def test_the_head_reads_text_from_text_and_codes_from_the_image() -> None:
    head = PriorHead(_tiny(dim=2), ALONE)
    with torch.no_grad():
        head.text.weight.copy_(torch.tensor([[1.0, 0], [2, 0], [0, 0], [0, 3]]))
        head.text.bias.copy_(torch.tensor([0.0, 0, 5, 0]))
        head.image.weight.copy_(torch.tensor([[0.0, 1], [0, 0], [4, 0]]))
        head.image.bias.copy_(torch.tensor([0.0, 7, 0]))
    x = torch.tensor([[3.0, 1.0]]).expand(1, 7, 2)  # normalised: (1, -1)
    logits = head(x)
    assert logits.text.shape == (1, 3, 4) and logits.image.shape == (1, 4, 3)
    torch.testing.assert_close(
        logits.text[0, 0], torch.tensor([1.0, 2, 5, -3]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(logits.image[0, 3], torch.tensor([-1.0, 7, 4]), rtol=1e-4, atol=1e-4)


def test_first_weights_have_the_width_s_deviation_and_branches_end_fainter() -> None:
    """dim^-1/2 = 1/8 at 64, over sqrt(2 * 8) = 4 at the end of a branch; gains 1, biases 0."""
    config = _tiny(dim=64, heads=2, layers=8)
    layers = {layer.name: layer for layer in prior_layers(config, 3)}
    block = layers["block004"].build()
    for name, p in block.named_parameters():
        if p.dim() > 1:
            expected = 1 / 32 if name in ("out.weight", "down.weight") else 1 / 8
            assert float(p.detach().std()) == pytest.approx(expected, rel=0.06), name
            assert abs(float(p.detach().mean())) < expected / 20
        else:
            assert p.eq(1.0 if "norm" in name and "weight" in name else 0.0).all(), name
    assert list(layers) == ["embedding", *(f"block{i:03d}" for i in range(8)), "head"]
    assert layers["block000"].branches == ("attention", "mlp")


def test_costs_of_layers_by_hand() -> None:
    """An embedding: dim. A block: 12 dim^2 + dim * length. The head: dim * entries / length."""
    config = _tiny(dim=8, heads=2, layers=2)  # length 3 + 4; entries 3 * 4 + 4 * 3
    assert [layer.cost for layer in prior_layers(config, 0)] == [8, 824, 824, 8 * 24 // 7]


def test_a_stream_of_a_single_code_has_its_cost() -> None:
    """Length 1: 12 dim^2 + dim * 1."""
    one = prior_layers(_tiny(dim=8, heads=2, text_length=0, grid=1), 0)
    assert one[1].cost == 776


def test_states_between_stages_are_a_tensor_rank_s_positions() -> None:
    """Of 2 captions: 4 + 3 * 3 positions, whole or split over 13 ranks; tied tables are named."""
    config = PriorConfig(dim=8, heads=2, text_length=4, grid=3)
    batch = {"text": torch.zeros(2, 4, dtype=torch.long)}
    split, whole = TensorParallel(), TensorParallel()
    split.size = whole.size = 13
    split.sequence = True
    for tensor, positions in ((None, 13), (ALONE, 13), (whole, 13), (split, 1)):
        state = prior_program(config, 0, tensor).state
        assert state is not None and state(batch) == (2, positions, 8)
    assert prior_program(config, 0).tied == ()
    assert prior_program(replace(config, tied=True), 0).tied == TABLES


def test_streams_of_up_to_128_positions_are_short() -> None:
    for text, grid, short in ((112, 4, True), (113, 4, False), (64, 8, True), (65, 8, False)):
        assert (band_of("row", text, grid, 11).dense is not None) == short


def test_counts_by_hand() -> None:
    """dim 8, a row and a conv layer, text 3 of 4 entries, grid 2 of 3 codes."""
    config = _tiny(dim=8, heads=2, layers=2)
    counts = prior_parameters(config)
    assert counts.matrices == 12 * 64 * 2 == 1536
    assert counts.embeddings == (4 + 3 + 3 + 3 + 2 + 2 + 2) * 8 == 152
    assert counts.unembeddings == 56
    assert counts.gains_and_biases == 2 * 12 * 8 + 16 + 7 == 215
    assert counts.total == 1959
    # text on text 6, image on text 12; row: 1 + 2 + 3 + 3; conv: 1 + 2 + 3 + 4
    assert attended_pairs(config) == (18 + 9) + (18 + 10)
    # 3 * (2 * 12 * 64 * 2 * 7 + 4 * 8 * 55 + 2 * 8 * 24)
    assert prior_flops(config) == 3 * (21504 + 1760 + 384)


def test_defaults_of_the_networks() -> None:
    def of(kind: type) -> dict[str, object]:
        return {f.name: f.default for f in fields(kind)}

    assert of(PriorConfig) == {
        "dim": 192, "heads": 3, "layers": 6, "text_length": 24, "text_weight": 1 / 8,
        "conv_kernel": 11, "text_vocabulary": 0, "image_vocabulary": 0, "grid": 0,
        "columns": 0, "norm": "layer", "qk_norm": False, "positions": "learned", "mlp": "gelu",
        "tied": False,
    }  # fmt: skip
    assert of(DVAEConfig) == {
        "pixels": 32, "width": 32, "groups": 3, "blocks": 1, "bottleneck": 2, "gain": 1.0,
        "codebook": 512, "code_width": 32, "min_log_scale": -1.5, "init": "calibrated",
        "epsilon": 0.1, "quantizer": "gumbel", "vector": 8, "levels": (8, 8, 8),
    }  # fmt: skip
    assert of(ClipConfig) == {
        "pixels": 32, "patch": 4, "dim": 128, "heads": 4, "layers": 3, "text_length": 24,
        "text_vocabulary": 0,
    }  # fmt: skip
    assert DVAEConfig().grid == 8 and DVAEConfig().tokens == 64
    assert _tiny().image_length == 4 and _tiny().length == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, ""),
        ({"dim": 0}, "at least 1"),
        ({"heads": 0}, "at least 1"),
        ({"layers": 0}, "at least 1"),
        ({"text_length": 0}, "at least 1"),
        ({"conv_kernel": 0}, "at least 1"),
        ({"dim": 1, "heads": 1, "layers": 1, "text_length": 1, "conv_kernel": 1}, ""),
        ({"dim": 1, "heads": 2}, "try 1"),
        ({"dim": 256, "heads": 127}, "try 128"),
        ({"dim": 257, "heads": 200}, "try 1"),
        ({"dim": 258, "heads": 200}, "try 86"),
        ({"dim": 12, "heads": 5}, "try 4"),
        ({"conv_kernel": 4}, "must be odd; try 5"),
        ({"conv_kernel": 3}, ""),
        ({"text_weight": -0.1}, "must be in [0, 1]"),
        ({"text_weight": 1.1}, "must be in [0, 1]"),
        ({"text_weight": 0.0}, ""),
        ({"text_weight": 1.0}, ""),
    ],
)
def test_problems_of_a_prior(flags: dict[str, float], message: str) -> None:
    _assert_told(PriorConfig(**flags).problems(), message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, ""),
        *(({name: 0}, "at least 1") for name in (
            "pixels", "width", "groups", "blocks", "bottleneck", "code_width")),
        ({"width": 1, "blocks": 1, "bottleneck": 1, "code_width": 1, "groups": 1, "pixels": 1}, ""),
        ({"pixels": 30}, "try 32"),
        ({"pixels": 29}, "try 28"),
        ({"pixels": 1}, "multiple of 4, which 3 groups need; try 4"),
        ({"pixels": 8, "groups": 5}, "multiple of 16, which 5 groups need; try 16"),
        ({"pixels": 4}, ""),
        ({"codebook": 1}, "2 to 65536"),
        ({"codebook": 65537}, "2 to 65536"),
        ({"codebook": 2}, ""),
        ({"codebook": 65536}, ""),
        ({"epsilon": 0.0}, "must be in (0, 0.5)"),
        ({"epsilon": 0.5}, "must be in (0, 0.5)"),
    ],
)  # fmt: skip
def test_problems_of_a_dvae(flags: dict[str, float], message: str) -> None:
    _assert_told(DVAEConfig(**flags).problems(), message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, ""),
        *(({name: 0}, "at least 1") for name in (
            "pixels", "patch", "dim", "heads", "layers", "text_length")),
        ({"pixels": 1, "patch": 1, "dim": 1, "heads": 1, "layers": 1, "text_length": 1}, ""),
        ({"patch": 5}, "does not divide model.pixels"),
        ({"heads": 5}, "does not divide model.dim"),
    ],
)  # fmt: skip
def test_problems_of_clip(flags: dict[str, int], message: str) -> None:
    _assert_told(ClipConfig(**flags).problems(), message)


def _assert_told(problems: list[str], message: str) -> None:
    assert len(problems) == bool(message)
    assert message in "".join(problems)


def test_a_column_layer_is_transposed_and_back() -> None:
    from models.attention.flexible import transposed

    x = torch.arange(7.0).view(1, 1, 7, 1)
    turned: Tensor = transposed(x, 3, 2)
    assert turned.flatten().tolist() == [0, 1, 2, 3, 5, 4, 6]
