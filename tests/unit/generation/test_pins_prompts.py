"""Pins of how a picture begins: what is given to a lane, and the inputs of rows apart."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from generation.config import DrawSettings
from generation.evaluation.suites import panels
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.sampler import Prompt, _Lane
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(LocalPrior(layers=trained_like(), config=CONFIG))


def test_a_decoder_is_compiled_once_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(LocalPrior(layers=trained_like(), config=CONFIG))
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    assert not decoder.compiled
    decoder.compile()
    assert decoder.compiled


@torch.no_grad()
def test_each_row_is_embedded_at_its_own_position(decoder: Decoder) -> None:
    """As all rows are at one position; only position 0 does not read the code before."""
    positions, before = torch.tensor([0, 1, 2, 15, 0]), torch.tensor([3, 4, 5, 6, 7])
    rows = [decoder._embed(int(at), before[i : i + 1]) for i, at in enumerate(positions)]
    assert decoder._embed(positions, before).equal(torch.cat(rows))
    start, codes = rows[0], torch.cat(rows[1:4])
    layer: Any = decoder._embedding
    first, *others = layer.row.weight[[0, 0, 0, 3]] + layer.column.weight[[0, 1, 2, 3]]
    assert start.equal((layer.start.weight[1] + first)[None])
    assert codes.equal(layer.image(before[1:4]) + torch.stack(others))


@pytest.mark.parametrize(("guidance", "times"), [(1.0, 1), (2.0, 2)])
def test_the_given_codes_are_those_of_each_caption(
    guidance: float, times: int, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more for the empty captions of guidance; none is given twice."""
    batch, given = prior_batch(), list[Any]()
    monkeypatch.setattr(decoder, "start", lambda text, codes, each: given.append((codes, each)))
    prompt = Prompt(codes=batch["image"], kept=torch.tensor([True] * 3 + [False] * 13))
    keys = [[(1, "a", i) for i in range(2)]] * 3
    _Lane(decoder, batch["text"], cast(Any, keys), DrawSettings(guidance=guidance), prompt)
    assert [(codes.tolist(), each) for codes, each in given] == [
        (batch["image"][:, :3].tolist() * times, 2)
    ]


def test_pixels_are_bytes_by_255() -> None:
    bytes_ = np.array([[[[0, 51, 255], [102, 153, 204]]]], np.uint8)
    pixels = panels._pixels(bytes_)
    assert pixels.shape == (1, 3, 1, 2)
    expected = [[0.0, 0.4], [0.2, 0.6], [1.0, 0.8]]
    assert torch.tensor(expected).allclose(pixels[0, :, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("length", [16, 24])
def test_the_upper_half_of_the_codes_is_kept(length: int) -> None:
    """Under another default device."""
    asked: list[Prompt] = []

    class Studio:
        images = SimpleNamespace(facts=SimpleNamespace(pixels=32, rows=4, columns=length // 4))
        sampler = SimpleNamespace(config=SimpleNamespace(image_length=length))

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            assert pixels.shape == (1, 3, 32, 32)
            return torch.zeros(1, length, dtype=torch.int64, device="cpu")

        def codes(self, captions: Any, draws: Any, prompt: Prompt, own: Any) -> list[Any]:
            asked.append(prompt)
            return []

    top = panels.Panel(form="circle", colour="blue", row=3, column=5)
    upper = {"form": "circle", "colour": "blue", "row": 3, "column": 5}
    rows: Any = [{"caption": "c", "key": "k", "top": upper}]
    suite = object.__new__(panels.PanelsSuite)
    suite.prompts, suite._settings, suite._tops = rows, panels.PanelsConfig(candidates=2), [top]
    with torch.device("meta"):
        pictures = suite._draw(cast(Any, Studio()), [top], "drawn")
    assert pictures.shape == (1, 2, 32, 32, 3)
    (prompt,) = asked
    assert prompt.kept.tolist() == [True] * (length // 2) + [False] * (length // 2)
