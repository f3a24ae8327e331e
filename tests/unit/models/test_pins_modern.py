"""Options of the prior that the paper has not: by hand, by another definition, by counting."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import flexible as flex
from models.attention.banded import band_of, banded_attention
from models.attention.flexible import mask_mod, transposed
from models.attention.masks import Kind, full_mask, image_mask
from models.attention.rotary import rotary_table, rotary_table_on, rotate
from models.config import PriorConfig
from models.counts import attended_pairs, prior_flops, prior_parameters
from models.prior import (
    TABLES,
    PriorBlock,
    PriorEmbedding,
    PriorHead,
    build_prior,
    prior_layers,
    prior_program,
)
from parallel.placement import global_names, placement_of, tie
from parallel.tensor.layers import HeadNorm
from parallel.tensor.ops import TensorParallel

ALONE = TensorParallel()
TINY = PriorConfig(
    dim=16, heads=2, layers=2, text_length=3, text_vocabulary=5, image_vocabulary=4, grid=2
)
OPTIONS: dict[str, dict[str, Any]] = {
    "rms": {"norm": "rms"},
    "qk_norm": {"qk_norm": True},
    "rotary": {"positions": "rotary"},
    "gated": {"mlp": "gated"},
    "tied": {"tied": True},
    "columns": {"columns": 3},
}
ALL = {name: value for option in OPTIONS.values() for name, value in option.items()}


def _random(module: nn.Module, seed: int = 0) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return module


def test_text_turns_in_one_dimension_and_the_image_in_two() -> None:
    """Two words, then 2 rows of 3 columns; 8 channels are 4 pairs, of rates 1 and 1/100 each."""
    cosines, sines = rotary_table(2, 2, 3, 8)
    places = [(0, 0), (1, 1), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)]
    rows = [[r, r / 100, c, c / 100] for r, c in places]
    angles = torch.tensor(rows)[:, None]
    torch.testing.assert_close(cosines, angles.cos())
    torch.testing.assert_close(sines, angles.sin())
    there = rotary_table_on(torch.device("cpu"), 2, 2, 3, 8)
    assert there[0].equal(cosines) and there[1].equal(sines)


def test_turns_of_a_long_text_are_exact_and_on_the_cpu() -> None:
    """Against double precision; fp32 angles of position 29,999 would be 1e-3 off."""
    rotary_table.cache_clear()
    with torch.device("meta"):
        turns = rotary_table(30_000, 1, 2, 24)
    for place in (0, 1, 777, 29_999):
        angles = [place * 10_000 ** (-i / 6) for i in range(6)] * 2
        for made, exact in zip(turns, (math.cos, math.sin), strict=True):
            assert made[place, 0].tolist() == pytest.approx(list(map(exact, angles)), abs=1e-7)
    assert turns[0].shape == turns[1].shape == (30_002, 1, 12)


def test_turning_is_multiplication_by_complex_numbers() -> None:
    turns = rotary_table(2, 2, 3, 8)
    x = torch.randn(5, 8, 2, 8, generator=torch.Generator().manual_seed(1))
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(*turns)
    torch.testing.assert_close(rotate(x, turns), torch.cat([turned.real, turned.imag], -1))
    assert rotate(x.bfloat16(), turns).dtype == torch.bfloat16


def test_attention_sees_distances_alone() -> None:
    """Equal queries and keys at all positions: logits depend on the rows and columns between."""
    cosines, sines = rotary_table(0, 3, 4, 8)
    draws = torch.Generator().manual_seed(2)
    q, k = (
        rotate(torch.randn(8, generator=draws).expand(12, 1, 8), (cosines, sines))[:, 0]
        for _ in range(2)
    )
    logits = (q @ k.T).view(3, 4, 3, 4)
    assert torch.allclose(logits[1, 1, 0, 3], logits[2, 0, 1, 2], atol=1e-5)
    assert torch.allclose(logits[2, 3, 2, 1], logits[0, 2, 0, 0], atol=1e-5)
    assert not torch.allclose(logits[1, 1, 0, 3], logits[1, 1, 0, 2], atol=1e-2)


def test_a_head_is_divided_by_its_root_mean_square() -> None:
    """1e-5 is added to the mean square: 12.5e-6 becomes 22.5e-6. 3, 4 have the mean 12.5."""
    norm = HeadNorm(4, ALONE, 2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
    x = torch.tensor([[[0.003, 0.004], [3.0, 4.0]]])
    small, large = math.sqrt(22.5e-6), math.sqrt(12.5 + 1e-5)
    expected = [[[0.003 / small, 0.008 / small], [9 / large, 16 / large]]]
    torch.testing.assert_close(norm(x), torch.tensor(expected))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert placement_of(norm.weight).shape == (4,)


class _Rank(TensorParallel):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_gains_of_heads_are_cut_with_the_heads() -> None:
    """6 channels are 3 heads, two a rank: the second rank has one head, and one of padding."""
    norms = [HeadNorm(6, _Rank(rank, 2), 2) for rank in range(2)]
    assert [norm.weight.shape for norm in norms] == [(4,), (4,)]
    places = [placement_of(norm.weight) for norm in norms]
    assert [(p.first, p.rows, p.split) for p in places] == [(0, 4, True), (4, 2, True)]


@pytest.mark.parametrize("options", [{"norm": "rms"}, {"qk_norm": True}, {"mlp": "gated"}, ALL])
def test_a_block_is_its_dense_definition(options: dict[str, Any]) -> None:
    config = replace(TINY, **options)
    block: Any = _random(PriorBlock(config, 2, ALONE), 7)  # a convolutional layer
    x = torch.randn(2, config.length, 16, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(block(x), _dense(block, config, x), atol=1e-5)


def _dense(block: Any, config: PriorConfig, x: Tensor) -> Tensor:
    """A block from the options' formulas, without its code."""

    def norm(x: Tensor, layer: Any) -> Tensor:
        if config.norm == "layer":
            return F.layer_norm(x, (16,), layer.weight, layer.bias)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight

    def turned(x: Tensor, gain: Any) -> Tensor:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        if gain is not None:
            heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            heads = heads * gain.weight.view(2, 1, 8)
        if config.positions == "learned":
            return heads
        places = [(i, i) for i in range(3)]
        places += [(3 + r, 3 + c) for r in range(2) for c in range(config.grid_columns)]
        angles = torch.tensor([[r, r / 100, c, c / 100] for r, c in places])
        product = torch.complex(*heads.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([product.real, product.imag], -1)

    inner = norm(x, block.attention_norm)
    q, k = turned(block.q(inner), block.q_norm), turned(block.k(inner), block.k_norm)
    v = block.v(inner).unflatten(-1, (2, 8)).transpose(1, 2)
    logits = q @ k.transpose(-1, -2) / 8**0.5
    mask = full_mask("conv", 3, 2, 11, config.columns)
    heads = logits.masked_fill(~mask, -math.inf).softmax(-1) @ v
    x = x + block.out(heads.transpose(1, 2).flatten(2))
    inner = norm(x, block.mlp_norm)
    if config.mlp == "gelu":
        return x + block.down(F.gelu(block.up(inner), approximate="tanh"))
    gate, up = inner @ block.gate.weight.T, inner @ block.up.weight.T
    return x + (gate * gate.sigmoid() * up) @ block.down.weight + block.down.bias


@pytest.mark.parametrize("options", [{}, ALL])
def test_each_parameter_of_a_block_has_the_scale_of_its_branch(options: dict[str, Any]) -> None:
    block = PriorBlock(replace(TINY, **options), 1, ALONE)
    owners = {id(p): name for name, (_, own) in block.branches().items() for p in own}
    parts = {name: owners.pop(id(p)) for name, p in block.named_parameters()}
    mlp = {"mlp_norm", "gate", "up", "down"}
    assert parts and not owners
    assert all((branch == "mlp") == (name.split(".")[0] in mlp) for name, branch in parts.items())


def test_a_gated_mlp_is_about_as_large_as_the_other() -> None:
    """8/3 of 192 is 512; of 64, 171, rounded up to 192; of 3968, 10,581 to 10,624."""
    widths = {dim: PriorConfig(dim=dim, mlp="gated").hidden for dim in (192, 64, 3968)}
    assert widths == {192: 512, 64: 192, 3968: 10_624}
    assert PriorConfig(dim=64).hidden == 256


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL])
def test_parameters_are_counted_as_built(options: dict[str, Any]) -> None:
    config = replace(TINY, **options)
    built = sum(p.numel() for p in build_prior(config).parameters())
    assert prior_parameters(config).total == built


def test_counts_of_all_options_by_hand() -> None:
    """dim 16, hidden 64, 2 layers, text 3, grid 2 x 3, 5 words, 4 codes."""
    counts = prior_parameters(replace(TINY, **ALL))
    assert counts.matrices == 2 * (4 * 256 + 3 * 16 * 64) == 8192
    assert counts.embeddings == (5 + 4 + 3 + 2) * 16
    assert counts.unembeddings == 0
    # a block: 2 norms, biases of q, v, out and down, gains of queries and keys
    assert counts.gains_and_biases == 2 * (2 + 4 + 2) * 16 + 16 + 9
    plain = prior_parameters(replace(TINY, columns=3))
    assert plain.embeddings == (5 + 4 + 3 + 3 + 2 + 3 + 2) * 16


def test_operations_of_a_gated_wide_grid_by_hand() -> None:
    """Text on text 6, image on text 18; row: 1 + 2 + 3 + 4 + 4 + 4; the convolution of one row and
    column around: 1, 2, 3, then 4, 5 and 5 of the second row."""
    config = replace(TINY, mlp="gated", columns=3)
    assert attended_pairs(config) == (24 + 18) + (24 + 20)
    matrices = 2 * 2 * 4096 * 9
    assert prior_flops(config) == 3 * (matrices + 4 * 16 * 86 + 2 * 16 * (3 * 5 + 6 * 4))
    assert prior_layers(config, 0)[1].cost == 4096 + 16 * 9


ROW = """#.....
##....
###...
####..
.####.
..####"""
COLUMN = """#.....
.#....
..#...
#..#..
.#..#.
..#..#"""
CONV = """#.....
##....
###...
####..
#####.
.#####"""


@pytest.mark.parametrize(("kind", "drawn"), [("row", ROW), ("column", COLUMN), ("conv", CONV)])
def test_masks_of_two_rows_of_three(kind: Kind, drawn: str) -> None:
    mask = image_mask(kind, 2, 3, 3)
    assert ["".join(".#"[int(x)] for x in row) for row in mask] == drawn.split("\n")
    assert full_mask(kind, 2, 2, 3, 3)[2:, 2:].equal(mask)
    assert image_mask(kind, 3, 3).equal(image_mask(kind, 3, 3, 3))


WIDE = [(5, 2, 3, 11), (3, 4, 2, 3), (2, 1, 6, 3), (0, 6, 1, 3), (65, 4, 16, 11), (60, 16, 6, 5)]
"""(text, rows, columns, kernel); the last two are cut into tiles."""


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("text", "rows", "columns", "kernel"), WIDE)
def test_banded_attention_of_any_grid_equals_the_dense_definition(
    kind: Kind, text: int, rows: int, columns: int, kernel: int
) -> None:
    length = text + rows * columns
    draws = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(2, 3, length, 16, generator=draws) for _ in range(4))
    mask = full_mask(kind, text, rows, kernel, columns)
    band = band_of(kind, text, rows, kernel, columns)
    bands = [band] if band.dense is None else [band, replace(band, dense=None)]
    if not text:
        bands = bands[:1]
    results = []
    dense = partial(F.scaled_dot_product_attention, attn_mask=mask)
    for attend in (dense, *(partial(banded_attention, band=band) for band in bands)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for ours in results[1:]:
        for a, b in zip(results[0], ours, strict=True):
            assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize(("text", "rows", "columns", "kernel"), WIDE)
def test_the_gpus_masks_of_any_grid(
    kind: Kind, text: int, rows: int, columns: int, kernel: int
) -> None:
    places = torch.arange(text + rows * columns)
    expected = full_mask(kind, text, rows, kernel, columns)
    if kind == "column":
        order = transposed(places[None, None, :, None], text, rows, columns).flatten()
        expected = expected[order][:, order]
    allowed = mask_mod(kind, text, rows, kernel, columns)
    assert allowed(places, places, places[:, None], places[None]).equal(expected)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_flexible_attention_of_a_wide_grid(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    draws = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 5 + 12, 16, generator=draws) for _ in range(3))
    mask = full_mask(kind, 5, 3, 3, 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.no_grad():
        output = flex.flexible_attention(q, k, v, kind, 5, 3, 3, 4)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_positions_of_a_wide_grid_are_in_raster_order() -> None:
    embedding = PriorEmbedding(replace(TINY, dim=1, heads=1, columns=3), ALONE)
    with torch.no_grad():
        embedding.row.weight.copy_(torch.tensor([[10.0], [20]]))
        embedding.column.weight.copy_(torch.tensor([[1.0], [2], [3]]))
    assert embedding.positions().flatten().tolist() == [11, 12, 13, 21, 22, 23]


def test_rotary_inputs_are_the_tokens_alone() -> None:
    embedding = PriorEmbedding(replace(TINY, positions="rotary"), ALONE)
    _random(embedding)
    assert {name for name, _ in embedding.named_parameters()} == {
        "text.table.weight", "pad.weight", "image.table.weight", "start.weight"
    }  # fmt: skip
    batch = {"text": torch.tensor([[1, 2, 3]]), "image": torch.tensor([[3, 2, 1, 0]])}
    states: Any = embedding(batch)[0]
    words, codes = embedding.text.table.weight, embedding.image.table.weight  # type: ignore
    assert states[1].equal(words[1]) and states[4].equal(codes[3])
    assert states[0].equal(embedding.start.weight[0])
    assert states[3].equal(embedding.start.weight[1])


def test_tied_heads_are_the_embeddings() -> None:
    layers = build_prior(replace(TINY, tied=True), 5)
    embedding, head = layers["embedding"], layers["head"]
    assert isinstance(embedding, PriorEmbedding) and isinstance(head, PriorHead)
    assert head.text.weight is embedding.text.table.weight
    assert head.image.weight is embedding.image.table.weight
    names = global_names(layers)
    assert set(TABLES) < names.keys() and not {"head.text.weight", "head.image.weight"} & set(names)
    assert sorted(names) == list(names)
    assert prior_program(replace(TINY, tied=True), 0).tied == TABLES
    assert prior_program(TINY, 0).tied == ()


def test_a_tied_head_on_a_stage_of_its_own_starts_as_the_embedding() -> None:
    config = replace(TINY, tied=True)
    layers = {layer.name: layer for layer in prior_layers(config, 5)}
    owner, head = layers["embedding"].build(), layers["head"].build()
    alone = nn.ModuleDict({"head": head})
    tie({"head": head})
    names = global_names(alone)
    for name in TABLES:
        assert names[name].equal(owner.get_parameter(name.removeprefix("embedding.")))
        assert placement_of(names[name]).tied_to == name
    assert placement_of(names["head.text.bias"]).tied_to == ""


def test_the_defaults_are_the_paper_and_say_so() -> None:
    assert TINY.mask == (3, 2, 11, 0) and TINY.grid_columns == 2
    assert (TINY.norm, TINY.mlp, TINY.positions) == ("layer", "gelu", "learned")
    assert not TINY.qk_norm and not TINY.tied
    assert replace(TINY, columns=3).mask == (3, 2, 11, 3)
    assert replace(TINY, columns=3).image_length == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ALL, ""),
        ({"columns": -1}, "model.columns=-1 is negative"),
        ({"positions": "rotary", "dim": 12, "heads": 2}, "2 heads has 6; try heads 1"),
        ({"positions": "rotary", "dim": 12, "heads": 3}, ""),
        ({"positions": "rotary", "dim": 12, "heads": 4}, "4 heads has 3; try heads 3"),
        ({"positions": "rotary", "dim": 48, "heads": 8}, "try heads 6"),
        ({"positions": "rotary", "dim": 40, "heads": 20}, "try heads 10"),
        ({"positions": "learned", "dim": 12, "heads": 4}, ""),
        ({"positions": "rotary", "dim": 6, "heads": 2}, "try dim 64"),
    ],
)
def test_problems_of_the_options(flags: dict[str, Any], message: str) -> None:
    problems = replace(TINY, **flags).problems()
    assert len(problems) == bool(message) and message in "".join(problems)
