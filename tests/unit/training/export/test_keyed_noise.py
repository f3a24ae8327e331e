"""The noise that travels with an export is Tapir's, and rows in doubt are drawn again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from core.keys import key_int
from models.keyed_noise import draw_bits, gumbel_noise
from models.third_party import foreign_module

pytestmark = pytest.mark.seconds
KEYS = [0, 7, 2**63 - 1, 0x123456789ABCDEF]
IDS = torch.zeros(4, 5, dtype=torch.int64, device="cpu")
"""Three ids of text, and two codes."""


@pytest.fixture(scope="module")
def noise() -> Any:
    return foreign_module("training.export.custom_code.keyed_noise_tapir")


@pytest.mark.parametrize("count", [1, 8, 20, 1000])
@pytest.mark.parametrize("position", [0, 3, 2**40])
def test_bits_and_noise_are_those_of_tapir(noise: Any, count: int, position: int) -> None:
    keys = torch.tensor(KEYS, device="cpu")
    blocks = -(-count // 8)
    bits = noise.philox_bits(keys, blocks, position)
    assert bits.equal(draw_bits(keys, 8 * blocks, position))
    mine = noise.gumbel_noise(keys, count, position)
    assert mine.equal(gumbel_noise(keys, (count,), position)) and mine.dtype == torch.float32


def test_a_word_is_the_signed_number_of_its_bits(noise: Any) -> None:
    assert noise._signed(2**64 - 1) == -1 and noise._signed(2**63) == -(2**63)
    assert noise._signed(2**63 - 1) == 2**63 - 1 and noise._signed(1) == 1


def test_seventeen_codes_take_three_blocks(noise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 draws each."""
    asked: list[int] = []

    def bits(keys: Tensor, blocks: int, position: int) -> Tensor:
        asked.append(blocks)
        return torch.zeros(len(keys), 8 * blocks, dtype=torch.int64, device="cpu")

    monkeypatch.setattr(noise, "philox_bits", bits)
    assert noise.gumbel_noise(torch.tensor(KEYS, device="cpu"), 17, 0).shape == (4, 17)
    assert asked == [3]


@pytest.mark.parametrize("caption", ["a small red circle", "Ünï/i:3", ""])
def test_a_key_is_that_of_the_sampler(noise: Any, caption: str) -> None:
    assert noise.candidate_key(5, caption, 11) == key_int(5, caption, 11, "sample")


def test_logits_are_cooled_and_noise_is_that_of_the_position(noise: Any) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), device="cpu")
    expected = logits / 0.5 + gumbel_noise(torch.tensor(KEYS, device="cpu"), (9,), 2)
    assert noise.KeyedNoise(KEYS, 3, temperature=0.5)(IDS, logits).equal(expected)
    assert noise.KeyedNoise(KEYS, 3, temperature=0.0)(IDS, logits).equal(logits)


@pytest.mark.parametrize(("temperature", "gap"), [(0.0, 2e-4), (1.0, 2e-4), (0.25, 2e-4)])
def test_only_rows_in_doubt_are_computed_again(noise: Any, temperature: float, gap: float) -> None:
    """Two codes as close as rounding is wide, but for the noise; another row is beyond that."""
    keys = torch.tensor(KEYS[:2], device="cpu")
    drawn = gumbel_noise(keys, (4,), 2) if temperature else torch.zeros(2, 4, device="cpu")
    scale = temperature or 1.0
    level = torch.tensor([[9.0, 9.0, 0.0, -torch.inf]] * 2, device="cpu")
    logits = level - scale * drawn
    logits[0, 1] -= 0.9 * gap
    logits[1, 1] -= 1.1 * gap
    asked: list[Tensor] = []

    def canonical(ids: Tensor) -> Tensor:
        asked.append(ids)
        return torch.tensor([[0.0, 1.0, 2.0, 50.0]], device="cpu")

    ids = torch.arange(10, device="cpu").view(2, 5)
    scores = noise.KeyedNoise(KEYS[:2], 3, temperature, canonical)(ids, logits)
    assert [each.tolist() for each in asked] == [[[0, 1, 2, 3, 4]]]
    again = torch.tensor([0.0, 1.0, 2.0, -torch.inf], device="cpu") / scale + drawn[0]
    assert scores[0].equal(again), "a code that is not allowed stays so"
    assert scores[1].equal(logits[1] / scale + drawn[1])


def test_noise_is_drawn_at_temperature_1_where_the_logits_are(noise: Any) -> None:
    """Under another default device."""
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), device="cpu")
    expected = logits + gumbel_noise(torch.tensor(KEYS, device="cpu"), (9,), 2)
    with torch.device("meta"):
        scores = noise.KeyedNoise(KEYS, 3)(IDS, logits)
    assert scores.equal(expected)


def test_two_codes_are_as_close_as_rounding_is_wide(noise: Any) -> None:
    """The row of a gap of exactly CLOSE is computed again, the next larger float is not."""
    close = torch.tensor(noise.CLOSE, device="cpu")
    further = close.nextafter(torch.tensor(1.0, device="cpu"))
    logits = torch.tensor([[float(close), 0.0], [0.0, float(further)]], device="cpu")
    again = torch.tensor([[1.0, 2.0]], device="cpu")
    scores = noise.KeyedNoise(KEYS[:2], 3, 0.0, lambda ids: again)(IDS[:2], logits)
    assert scores.equal(torch.cat([again, logits[1:]]))


def test_wrong_settings_are_named(noise: Any) -> None:
    with pytest.raises(ValueError, match="must be 0"):
        noise.KeyedNoise(KEYS, 3, temperature=-1.0)
    with pytest.raises(ValueError, match="4 rows of input_ids need as many keys, not 2"):
        noise.KeyedNoise(KEYS[:2], 3)(IDS, torch.zeros(4, 9, device="cpu"))
