"""Keyed noise: NumPy's Philox bits, its authors' known answers, the Gumbel distribution."""

import math

import numpy as np
import pytest
import torch

from models.keyed_noise import draw_bits, gumbel_noise, philox_bits

KEYS = [0, 1, 7, 2**32 - 1, 2**32, 0x0123456789ABCDEF, 2**63 - 1]


def _numpy(key: int, position: int, count: int) -> list[int]:
    words = np.random.Philox(key=key, counter=[0, position, 0, 0]).random_raw(-(-count // 2))
    return [int(half) for word in words for half in (int(word) & 0xFFFFFFFF, int(word) >> 32)][
        :count
    ]


@pytest.mark.parametrize("position", [0, 1, 1023, 2**40])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096])
def test_bits_are_numpys(position: int, count: int) -> None:
    expected = [_numpy(key, position, count) for key in KEYS]
    assert draw_bits(torch.tensor(KEYS), count, position).tolist() == expected


def test_the_integers_of_other_devices_give_the_same_bits() -> None:
    for position in (0, 5, 2**40):
        bits = philox_bits(torch.tensor(KEYS), 3, position)
        assert bits.tolist() == [_numpy(key, position, 24) for key in KEYS]


def test_each_key_has_a_position_of_its_own() -> None:
    positions = [3, 0, 2**40, 1, 3, 7, 1023]
    expected = [_numpy(key, at, 16) for key, at in zip(KEYS, positions, strict=True)]
    keys, at = torch.tensor(KEYS), torch.tensor(positions)
    assert draw_bits(keys, 16, at).tolist() == philox_bits(keys, 2, at).tolist() == expected
    each = [gumbel_noise(keys[i : i + 1], (3, 2), p) for i, p in enumerate(positions)]
    assert gumbel_noise(keys, (3, 2), at).equal(torch.cat(each))


def test_a_known_answer_of_the_authors() -> None:
    """Random123's kat_vectors, philox4x64, 10 rounds, counter and key 0. NumPy begins at counter 1,
    so the test wraps the counter around.
    """
    wrapped = np.random.Philox(key=0, counter=[2**64 - 1] * 4).random_raw(4)
    assert [f"{word:016x}" for word in wrapped] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]  # fmt: skip


def test_noise_follows_from_the_bits() -> None:
    """-ln(-ln u), computed with Python's own logarithm."""
    keys = torch.tensor([5, 2**62 + 1])
    noise = gumbel_noise(keys, (3, 2, 2), 9)
    assert noise.shape == (2, 3, 2, 2) and noise.dtype == torch.float32
    for row, key in zip(noise.flatten(1).tolist(), (5, 2**62 + 1), strict=True):
        bits = _numpy(key, 9, 12)
        assert row == pytest.approx([-math.log(-math.log((b + 0.5) / 2**32)) for b in bits])


def test_noise_depends_on_key_and_position_alone() -> None:
    together = gumbel_noise(torch.tensor([1, 2, 1]), (3, 2, 2))
    assert together[0].equal(together[2]) and not together[0].equal(together[1])
    assert together[1:2].equal(gumbel_noise(torch.tensor([2]), (3, 2, 2), 0))
    assert not together.equal(gumbel_noise(torch.tensor([1, 2, 1]), (3, 2, 2), 1))


def test_a_hundred_thousand_draws_have_gumbels_distribution() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)): 1.95 / sqrt(n) is exceeded once in a thousand."""
    drawn = gumbel_noise(torch.arange(1000), (100,)).flatten().double().sort().values
    expected = torch.exp(-torch.exp(-drawn))
    steps = torch.arange(1, 100_001) / 100_000
    assert float((steps - expected).abs().max()) < 1.95 / 100_000**0.5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_softmax(temperature: float) -> None:
    """Chi-square of 100,000 draws over 8 codes: 24.3 (7 degrees) is exceeded once in a thousand."""
    from generation.config import DrawSettings
    from generation.sampling.draw import choose

    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -2.5, 0.7, 1.9])
    noise = gumbel_noise(torch.arange(100_000) + 77, (8,), 3)
    settings = DrawSettings(temperature=temperature)
    codes = choose(logits.expand(100_000, 8), noise, settings).codes
    expected = 100_000 * torch.softmax(logits.double() / temperature, 0)
    counts = torch.bincount(codes, minlength=8).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3


def test_relaxed_codes_follow_softmax_where_they_are_hard() -> None:
    """The arg max of the dVAE's relaxed codes, by the same chi-square (5 codes: 18.5)."""
    from models.logit_laplace import gumbel_codes

    logits = torch.tensor([0.5, -0.5, 1.5, 0.0, -2.0]).view(1, 5, 1, 1).expand(1000, 5, 10, 10)
    relaxed = gumbel_codes(logits, 1 / 16, gumbel_noise(torch.arange(1000), (5, 10, 10)))
    counts = torch.bincount(relaxed.argmax(1).flatten(), minlength=5).double()
    expected = 100_000 * torch.softmax(logits[0, :, 0, 0].double(), 0)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5
