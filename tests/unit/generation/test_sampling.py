"""Cached decoding equals the definition, a key gives the same picture in any batch."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError, InputError
from core.keys import key_int
from data_pipeline.images.crops import encode_png
from generation.config import DrawSettings, PromptConfig, SampleConfig
from generation.sampling import draw as choosing
from generation.sampling import packed_linear as packed
from generation.sampling.decoder import DTYPES, Decoder, LocalPrior
from generation.sampling.draw import choose
from generation.sampling.prompts import kept_tokens
from generation.sampling.sampler import Keys, Prompt, Sampler
from models.keyed_noise import gumbel_noise
from models.prior import PAD
from tests.harness import ENVIRONMENT
from tests.unit.models.test_models import CONFIG, prior_batch, prior_logits, trained_like

LENGTH = CONFIG.image_length
MASKS = [(1, 11), (2, 3), (3, 3), (4, 11), (6, 5)]
"""(layers, kernel): only a convolution; with rows; with columns; all of them, wide and narrow."""


def keys_of(captions: int, count: int) -> Keys:
    return [[(7, f"caption {i}", j) for j in range(count)] for i in range(captions)]


def draw(
    decoder: Decoder,
    text: Tensor,
    keys: Keys,
    settings: DrawSettings,
    prompt: Prompt | None = None,
    batch: int = 128,
) -> Tensor:
    """(captions, candidates, grid * grid)."""
    codes = torch.full((len(text), len(keys[0]), LENGTH), -1)
    for drawn in Sampler(decoder, batch=batch).draw(text, keys, settings, prompt):
        codes[drawn.captions, drawn.candidates] = drawn.codes
    return codes


def by_definition(
    layers: nn.ModuleDict, text: Tensor, keys: Keys, settings: DrawSettings
) -> Tensor:
    """The same draws, with the whole stream recomputed for every token."""
    rows = torch.tensor([key_int(*key, "sample") for row in keys for key in row])
    text = text.repeat_interleave(len(keys[0]), 0)
    empty = torch.full_like(text, PAD)
    image = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    with torch.no_grad():
        for position in range(LENGTH):
            logits = prior_logits(layers, {"text": text, "image": image})[:, position]
            if settings.guidance != 1:
                free = prior_logits(layers, {"text": empty, "image": image})[:, position]
                logits = free + settings.guidance * (logits - free)
            noise = gumbel_noise(rows, (20,), position)
            image[:, position] = choose(
                logits, noise if settings.temperature else None, settings, canonical=True
            ).codes
    return image.view(len(keys), -1, LENGTH)


@pytest.fixture(scope="module")
def layers() -> nn.ModuleDict:
    return trained_like()


@pytest.fixture(scope="module")
def decoder(layers: nn.ModuleDict) -> Decoder:
    return Decoder(LocalPrior(layers=layers, config=CONFIG))


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("number,kernel", MASKS)
def test_logits_with_the_cache_equal_the_whole_stream(
    number: int, kernel: int, one_row: bool
) -> None:
    config = replace(CONFIG, layers=number, conv_kernel=kernel)
    layers, batch = trained_like(config), prior_batch()
    decoder = Decoder(LocalPrior(layers=layers, config=config), one_row=one_row)
    with torch.no_grad():
        expected = prior_logits(layers, batch)
    for given in (0, 1, 7, 13):
        lane = decoder.start(batch["text"], batch["image"][:, :given], 1)
        for position in range(given, LENGTH):
            logits = decoder.next(lane, position, batch["image"][:, max(position - 1, 0)])
            assert logits is not None
            assert float((logits - expected[:, position]).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        DrawSettings(temperature=0.0),
        DrawSettings(),
        DrawSettings(temperature=0.7, top_k=5),
        DrawSettings(top_p=0.8),
        DrawSettings(guidance=3.0, top_k=7, top_p=0.9),
    ],
    ids=["most likely", "plain", "top-k", "top-p", "guided"],
)
def test_draws_are_those_of_the_definition(
    layers: nn.ModuleDict, decoder: Decoder, settings: DrawSettings
) -> None:
    text, keys = prior_batch()["text"], keys_of(3, 4)
    assert draw(decoder, text, keys, settings).equal(by_definition(layers, text, keys, settings))


@pytest.mark.seconds
@pytest.mark.parametrize("close", [choosing.CLOSE, 0.5], ids=["as is", "most draws recomputed"])
def test_a_key_gives_one_picture_whatever_the_batch(
    layers: nn.ModuleDict, decoder: Decoder, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "CLOSE", close)
    text, keys = prior_batch()["text"], keys_of(3, 2)
    settings = DrawSettings(top_k=9, top_p=0.95, guidance=2.0)
    whole = draw(decoder, text, keys, settings)
    for batch in (1, 3):
        assert draw(decoder, text, keys, settings, batch=batch).equal(whole)
    alone = [draw(decoder, text[i : i + 1], keys[i : i + 1], settings) for i in range(3)]
    assert torch.cat(alone).equal(whole)
    other = [[(8, *key[1:]) for key in row] for row in keys]
    assert not draw(decoder, text, other, settings).equal(whole)


def test_near_ties_are_drawn_again_one_by_one(
    layers: nn.ModuleDict, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "CLOSE", 0.3)
    text, keys, settings = prior_batch()["text"], keys_of(3, 4), DrawSettings(guidance=1.5)
    made: list[tuple[int, int]] = []
    alone = Decoder.canonical_logits

    def counted(self: Decoder, text: Tensor, image: Tensor) -> Tensor | None:
        made.append(tuple(image.shape))
        return alone(self, text, image)

    monkeypatch.setattr(Decoder, "canonical_logits", counted)
    codes = draw(decoder, text, keys, settings)
    assert len(made) > 10, "no draw was close"
    assert codes.equal(by_definition(layers, text, keys, settings))


def test_guidance_of_one_changes_nothing(decoder: Decoder) -> None:
    text, keys = prior_batch()["text"], keys_of(3, 4)
    plain = draw(decoder, text, keys, DrawSettings())
    assert draw(decoder, text, keys, DrawSettings(guidance=1.0)).equal(plain)
    assert not draw(decoder, text, keys, DrawSettings(guidance=2.0)).equal(plain)
    free = draw(decoder, torch.full_like(text, PAD), keys, DrawSettings())
    assert draw(decoder, text, keys, DrawSettings(guidance=0.0)).equal(free)


@pytest.mark.parametrize("top_k,top_p", [(0, 0.5), (3, 1.0), (1, 1.0), (10, 0.7), (64, 1e-6)])
def test_only_what_is_allowed_is_drawn(top_k: int, top_p: float) -> None:
    draws = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(500, 64, generator=draws)
    settings = DrawSettings(top_k=top_k, top_p=top_p, temperature=1.3)
    noise = -torch.empty(500, 64).exponential_(generator=draws).log()
    codes = choose(logits, noise, settings).codes
    ordered = logits.sort(1, descending=True)
    ranks = ordered.indices.argsort(1).gather(1, codes[:, None])[:, 0]
    assert int(ranks.max()) < (top_k or 64)
    shares = (logits / 1.3).masked_fill(ordered.indices.argsort(1) >= (top_k or 64), -torch.inf)
    shares = shares.softmax(1)
    above = shares.masked_fill(shares <= shares.gather(1, codes[:, None]), 0).sum(1)
    assert bool((above < top_p).all())
    if top_k == 10:
        assert len(ranks.unique()) > 3


@pytest.mark.parametrize("keep", [("0:2,:",), ("1:3,1:3",), ("0:1,:", "2:4,0:2"), (":,2:4",)])
def test_what_a_prompt_keeps_is_kept_exactly(decoder: Decoder, keep: Sequence[str]) -> None:
    batch, keys = prior_batch(), keys_of(3, 5)
    kept = kept_tokens(PromptConfig(image=Path("x"), keep=tuple(keep)), 4)
    prompt = Prompt(codes=batch["image"][0], kept=kept)
    drawn = draw(decoder, batch["text"], keys, DrawSettings(), prompt)
    assert (drawn[:, :, kept] == prompt.codes[kept]).all()
    free = drawn[:, :, ~kept].flatten(0, 1)
    assert len(free.unique(dim=0)) == len(free)
    again = draw(decoder, batch["text"], keys, DrawSettings(), prompt, batch=2)
    assert again.equal(drawn)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_prompt_for_each_caption_equals_one_caption_at_a_time(
    decoder: Decoder, guidance: float
) -> None:
    batch, keys = prior_batch(), keys_of(3, 5)
    kept, settings = torch.arange(LENGTH) < LENGTH // 2, DrawSettings(guidance=guidance)
    codes = batch["image"]
    assert len(codes[:, kept].unique(dim=0)) == 3
    alone = [
        draw(decoder, batch["text"][i : i + 1], keys[i : i + 1], settings, prompt)
        for i in range(3)
        for prompt in [Prompt(codes=codes[i], kept=kept)]
    ]
    for size in (2, 7, 128):
        prompt = Prompt(codes=codes, kept=kept)
        together = draw(decoder, batch["text"], keys, settings, prompt, batch=size)
        assert together.equal(torch.cat(alone))
    with pytest.raises(ConfigError, match="3 captions need as many prompts, not 2"):
        draw(decoder, batch["text"], keys, settings, Prompt(codes=codes[:2], kept=kept))


def test_kept_tokens_follow_from_rows_rectangles_and_masks(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(encode_png(np.zeros((32, 32, 3), np.uint8)))

    def grid(**flags: object) -> list[str]:
        kept = kept_tokens(PromptConfig(image=image, **flags), 4)  # type: ignore[arg-type]
        return ["".join(".#"[int(x)] for x in row) for row in kept.view(4, 4)]

    assert grid(keep_rows=2) == ["####", "####", "....", "...."]
    assert grid(keep=("1:3,:2",)) == ["....", "##..", "##..", "...."]
    assert grid(redraw=("2:,2:",)) == ["####", "####", "##..", "##.."]
    assert grid(keep_rows=3, redraw=("0:1,0:1",)) == [".###", "####", "####", "...."]
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[40:, 33:] = 255
    (tmp_path / "mask.png").write_bytes(encode_png(mask))
    assert grid(mask=tmp_path / "mask.png") == ["####", "####", "##..", "##.."]
    for flags, text in [
        ({"keep": ("0:9,:",)}, "within"),
        ({"keep": ("1,2",)}, "rectangle"),
        ({"keep_rows": 4}, "keeps all"),
        ({"keep_rows": 7}, "has 4 rows"),
    ]:
        with pytest.raises(ConfigError, match=text):
            grid(**flags)
    with pytest.raises(InputError, match="no picture"):
        grid(mask=tmp_path / "none.png")
    image.write_bytes(encode_png(np.zeros((32, 64, 3), np.uint8)))
    with pytest.raises(InputError, match="has 64x64 pixels"):
        grid(mask=tmp_path / "mask.png")


@pytest.mark.parametrize("one_row", [False, True])
def test_bf16_is_no_further_off_than_in_training(layers: nn.ModuleDict, one_row: bool) -> None:
    """On average over all positions: the rounding of a single position's logits is random."""
    batch = prior_batch()
    half = Decoder(LocalPrior(layers=layers, config=CONFIG), "bf16", one_row)
    lane, rows = half.start(batch["text"], batch["image"][:, :0], 1), []
    for position in range(LENGTH):
        rows.append(half.next(lane, position, batch["image"][:, max(position - 1, 0)]))
    with torch.no_grad():
        expected = prior_logits(layers, batch)
        with torch.autocast("cpu", torch.bfloat16):
            trained = prior_logits(layers, batch)
    ours = torch.stack(rows, 1)  # type: ignore[arg-type]
    assert not ours.equal(expected)
    assert float((ours - expected).abs().mean()) < 1.5 * float((trained - expected).abs().mean())


@pytest.mark.parametrize("outputs", [40, 16])
@pytest.mark.parametrize("largest", [1.0, 4e5], ids=["usual", "beyond fp16"])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_weight_layout_computes_its_layer(
    outputs: int, largest: float, one_row: bool, precision: str
) -> None:
    draws = torch.Generator().manual_seed(0)
    weight = largest * torch.rand(outputs, 24, generator=draws) - largest / 2
    bias, x = torch.rand(outputs, generator=draws), torch.rand(1, 3, 24, generator=draws)
    dtype = DTYPES[precision]
    layer = packed.PackedLinear(weight, bias, dtype, one_row=one_row)
    expected = F.linear(x.double(), weight.to(dtype).double(), bias.to(dtype).double())
    bound = (1e-6 if precision == "fp32" else 1e-2) * largest * 24
    for layout in (layer, layer.in_order()):
        assert float((layout(x[:, :1]) - expected[:, :1]).abs().max()) < bound
        assert float((layout(x) - expected).abs().max()) < bound and layout(x).dtype == x.dtype
    held = layer._weight
    assert layer._half is None or held.untyped_storage().nbytes() == 0, "weights are held twice"


@pytest.mark.seconds
def test_bf16_needs_no_instructions_of_its_own() -> None:
    """In a new process: oneDNN reads its instruction limit when it is loaded."""
    code = (
        "import torch; from generation.sampling.packed_linear import PackedLinear as Packed; "
        "output = Packed(torch.eye(24), None, torch.bfloat16)(torch.ones(1, 2, 24)); "
        "print(output.tolist())"
    )
    environment = {**ENVIRONMENT, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, check=True, timeout=120, stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == [[[1.0] * 24] * 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_stays_broken(value: float) -> None:
    weight = torch.full((40, 24), value)
    layer = packed.PackedLinear(weight, None, torch.bfloat16, one_row=True)
    assert not layer(torch.ones(1, 24)).isfinite().any()


@pytest.mark.slow
def test_the_compiled_step_of_gpus_equals_the_plain_one(
    layers: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_packs", lambda weight: False)
    text, keys = prior_batch()["text"], keys_of(3, 2)
    plain = Decoder(LocalPrior(layers=layers, config=CONFIG))
    compiled = Decoder(LocalPrior(layers=layers, config=CONFIG))
    compiled.compile()
    assert draw(compiled, text, keys, DrawSettings()).equal(draw(plain, text, keys, DrawSettings()))


def test_wrong_settings_are_named() -> None:
    wrong = SampleConfig(candidates=0, temperature=-1.0, top_k=-1, top_p=0.0, guidance=-1.0)
    assert len(wrong.problems()) == 5
    for value in (1e-30, math.inf, math.nan):
        assert f"temperature={value}" in SampleConfig(temperature=value).problems()[0]
    assert "guidance=1e+30" in SampleConfig(guidance=1e30).problems()[0]
    assert PromptConfig(keep_rows=3).problems() and PromptConfig(image=Path("x")).problems()
    assert not SampleConfig().problems() and not PromptConfig().problems()
