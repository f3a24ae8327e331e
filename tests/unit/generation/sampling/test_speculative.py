"""Speculative decoding draws the codes of plain decoding, in fewer passes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generation.config import DrawSettings, SampleConfig, SampleRun
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.kv_cache import reads_of
from generation.sampling.sampler import Prompt, Sampler
from generation.sampling.speculative import SpeculativeSampler
from models.attention.masks import image_mask
from tests.unit.generation.test_sampling import LENGTH, keys_of
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like

SETTINGS = {
    "plain": DrawSettings(),
    "most likely": DrawSettings(temperature=0),
    "few": DrawSettings(top_k=5, temperature=0.7),
    "nucleus": DrawSettings(top_p=0.8),
    "guidance": DrawSettings(guidance=2.5),
}


@pytest.fixture(scope="module")
def layers() -> nn.ModuleDict:
    return trained_like()


def drawn(sampler: Sampler, settings: DrawSettings, prompt: Prompt | None = None) -> Tensor:
    """(3 captions, 2 candidates, LENGTH)."""
    text = prior_batch(3)["text"]
    codes = torch.full((3, 2, LENGTH), -1)
    for part in sampler.draw(text, keys_of(3, 2), settings, prompt):
        codes[part.captions, part.candidates] = part.codes
    return codes


def speculative(layers: nn.ModuleDict, together: int, batch: int = 128) -> SpeculativeSampler:
    part = LocalPrior(layers=layers, config=CONFIG)
    return SpeculativeSampler(Decoder(part, together=together), batch=batch)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("together", [2, 5, LENGTH])
def test_codes_are_those_of_plain_decoding(layers: nn.ModuleDict, together: int, name: str) -> None:
    plain = drawn(Sampler(Decoder(LocalPrior(layers=layers, config=CONFIG))), SETTINGS[name])
    sampler = speculative(layers, together)
    assert torch.equal(drawn(sampler, SETTINGS[name]), plain)
    assert sampler.decoded == 6 * LENGTH > sampler.passes


@pytest.mark.parametrize(("first", "end"), [(5, LENGTH), (0, 9), (6, 12)])
def test_a_prompt_s_codes_are_kept(layers: nn.ModuleDict, first: int, end: int) -> None:
    kept = torch.ones(LENGTH, dtype=torch.bool)
    kept[first:end] = False
    kept[end - 2] = True  # a kept code among those that are drawn
    draws = torch.Generator().manual_seed(3)
    codes = torch.randint(0, CONFIG.image_vocabulary, (3, LENGTH), generator=draws)
    prompt = Prompt(codes=codes, kept=kept)
    plain = Sampler(Decoder(LocalPrior(layers=layers, config=CONFIG)))
    expected = drawn(plain, DrawSettings(), prompt)
    assert torch.equal(drawn(speculative(layers, 4), DrawSettings(), prompt), expected)
    assert expected[:, :, kept].equal(codes[:, None, kept].expand(-1, 2, -1))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_change_nothing(layers: nn.ModuleDict, batch: int) -> None:
    expected = drawn(speculative(layers, 4), DrawSettings())
    assert torch.equal(drawn(speculative(layers, 4, batch), DrawSettings()), expected)


MODERN: dict[str, Any] = {"positions": "rotary", "mlp": "gated", "norm": "rms", "qk_norm": True}


@pytest.mark.parametrize("layers_count", [1, 3, 6])
@pytest.mark.parametrize("options", [{}, MODERN])
def test_every_mask_and_kind_of_layer(layers_count: int, options: dict[str, Any]) -> None:
    config = replace(CONFIG, layers=layers_count, **options)
    part = LocalPrior(layers=trained_like(config), config=config)
    expected = drawn(Sampler(Decoder(part)), DrawSettings())
    for together in (3, 8):
        graphed = Decoder(part, together=together)
        graphed._compiled = graphed._run
        for decoder in (Decoder(part, together=together), graphed):
            assert torch.equal(drawn(SpeculativeSampler(decoder), DrawSettings()), expected)


def test_slots_of_several_positions_hold_what_is_read() -> None:
    mask, reads = image_mask("row", 6, 3), reads_of("row", 6, 3, together=4)
    for first in range(36 - 3):
        held = torch.full((reads.slots,), -1)
        for position in range(first + 4):  # the last ones are written before the first reads
            held[reads.slot[position]] = position
        for position in range(first, first + 4):
            earlier = mask[position].nonzero().flatten()
            assert held[reads.slot[earlier]].equal(earlier)
    assert reads_of("row", 6, 3).slots + 3 == reads.slots


def test_auto_is_for_few_rows_of_one_cpu_rank() -> None:
    run = SampleRun(captions=("a", "b"), draw=SampleConfig(candidates=4))
    assert run.together(2, "cpu") == 8
    assert run.together(3, "cpu") == run.together(2, "cuda") == 1
    guided = replace(run, draw=replace(run.draw, guidance=2.0))
    assert (guided.together(1, "cpu"), guided.together(2, "cpu")) == (8, 1)
    assert replace(guided, draw=replace(guided.draw, batch=4)).together(2, "cpu") == 8
    assert replace(run, tensor=2).together(1, "cpu") == 1
    assert replace(run, tensor=2, speculate=3).together(9, "cuda") == 4
    assert replace(run, speculate=0).together(1, "cpu") == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"speculate": -1}, "speculate=-1 must be auto, or 0 to 63"),
        ({"speculate": 64}, "speculate=64 must be auto, or 0 to 63"),
        ({"speculate": 2, "pipeline": 2}, "--speculate needs a prior in one stage"),
    ],
)
def test_what_cannot_be_guessed_is_refused(changes: dict[str, Any], problem: str) -> None:
    (told,) = SampleRun(captions=("a",), **changes).problems()
    assert problem in told
    for fine in ({"speculate": 0, "pipeline": 2}, {"pipeline": 2}, {"speculate": 63}):
        assert not SampleRun(captions=("a",), **fine).problems()
