"""Pins of cases that need several ranks, a full device, a prompt or the last draw."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.formats.raw import RawRecord
from data_pipeline.text.dropout import DropoutEncoder
from generation.config import DrawSettings
from generation.evaluation import accuracy
from generation.evaluation.suites import panels
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.pipeline import Pipeline
from generation.sampling.sampler import Prompt, SampledLane, Sampler
from parallel.engines.protocol import Recomputed
from parallel.mesh import Group
from tests.forked import forked_ranks
from tests.unit.models.test_models import CONFIG, prior_batch, trained_like


@torch.no_grad()
def _decoded(decoder: Decoder) -> list[Any]:
    """Logits after three given codes: of the next position, and recomputed without the cache."""
    batch = prior_batch()
    text, image = batch["text"], batch["image"]
    lane = decoder.start(text, image[:, :3], 1)
    logits = [decoder.next(lane, 3, image[:, 2]), decoder.canonical_logits(text, image[:, :4])]
    return [None if x is None else x.tolist() for x in logits]


@pytest.mark.seconds
def test_two_stages_decode_as_one_does(tmp_path: Path) -> None:
    layers = trained_like()
    names = list(layers)

    def stage(rank: int) -> list[Any]:
        mine = names[:2] if rank == 0 else names[2:]
        neighbours = Pipeline(Group(dist.group.WORLD, rank, 2))
        part = LocalPrior(layers={n: layers[n] for n in mine}, config=CONFIG, neighbours=neighbours)
        logits = _decoded(Decoder(part))
        neighbours.share(torch.zeros(1)).wait()  # buffers live until the send completes
        return logits

    first, last = forked_ranks(tmp_path, 2, stage)
    assert first == [None, None]
    whole = _decoded(Decoder(LocalPrior(layers=layers, config=CONFIG)))
    for mine, expected in zip(last, whole, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_batch_without_memory_is_drawn_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 of 5 candidates fit: 5 fail and are split in 2 and 3; 3 fail and are split in 1 and 2. From
    then on requests have the size of the halves.
    """
    decoder, tried = Decoder(LocalPrior(layers=trained_like(), config=CONFIG)), []
    start = decoder.start

    def little(text: Tensor, given: Tensor, each: int) -> Any:
        tried.append(each)
        if each > 2:
            raise torch.OutOfMemoryError("no memory")
        return start(text, given, each)

    text, keys = prior_batch()["text"][:1], [[(1, "a", i) for i in range(10)]]
    plain = list(Sampler(decoder, batch=5).draw(text, cast(Any, keys), DrawSettings()))
    monkeypatch.setattr(decoder, "start", little)
    halved = list(Sampler(decoder, batch=5).draw(text, cast(Any, keys), DrawSettings()))
    assert tried == [5, 2, 3, 1, 2, 2, 1, 2]
    assert torch.cat([d.codes for d in halved], 1).equal(torch.cat([d.codes for d in plain], 1))


def test_weights_learn_in_a_recomputed_branch_whose_input_needs_no_gradient() -> None:
    """As in a first layer; the slope of (3 w)^2 / 2 is 9 w."""

    class Line(Recomputed):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.run_branch(lambda y: (y * self.weight) ** 2 / 2, x)

    line = Line()
    line.recompute = True
    line(torch.tensor(3.0)).backward()
    assert line.weight.grad is not None and float(line.weight.grad) == 18.0


def _words(*symbols: str, merges: tuple[str, ...] = ()) -> Any:
    model = {"vocab": {symbol: i for i, symbol in enumerate(symbols)}, "merges": merges}
    return cast(Any, SimpleNamespace(to_str=lambda: json.dumps({"model": model})))


def test_only_ascii_letters_are_merged_anew() -> None:
    """`é` is lower case, but more than one byte; `a1` is lower case, but not a word."""
    encoder = DropoutEncoder(_words("é", "a1", "ab"), 0.0)
    assert encoder.encode([2 - 1, 0]).tolist() == [1, 0]


def test_a_merge_is_passed_over_with_the_rate_exactly() -> None:
    """A draw is in [0, 1): below the rate with probability `rate`; never at rate 0."""
    for rate, drawn, tokens in ((0.0, 0.0, [2]), (0.5, 0.5, [2]), (0.5, 0.499, [0, 1])):
        encoder = DropoutEncoder(_words("a", "b", "ab", merges=("a b",)), rate)
        assert encoder._merged(["a", "b"], lambda drawn=drawn: drawn) == tokens  # type: ignore[misc]


def test_chance_judges_the_best_ranked_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two captions, deranged: each one's best picture fits the other caption."""
    monkeypatch.setattr(accuracy, "matches", lambda caption, picture: caption == picture)
    monkeypatch.setattr(accuracy, "parse_caption", lambda caption: None)
    monkeypatch.setattr(accuracy, "pictures_of", lambda records, pixels: ["a", "b"])
    monkeypatch.setattr(accuracy, "to_bytes", lambda pixels: pixels)
    studio = SimpleNamespace(
        images=SimpleNamespace(facts=SimpleNamespace(pixels=4)), encode=list, decode=list
    )
    rows = [
        SimpleNamespace(pictures=["b", "a"], drawn=[0, 1], scores=[0.9, 0.1]),
        SimpleNamespace(pictures=["a", "b"], drawn=[0, 1], scores=[0.9, 0.1]),
    ]
    records = [cast(RawRecord, SimpleNamespace(caption=c)) for c in "ab"]
    result = accuracy.caption_accuracy(cast(Any, studio), records, cast(Any, rows), 1)
    assert (result["chance"], result["best_of_1"], result["best_of_2"]) == (1.0, 0.5, 0.0)


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
    SampledLane(decoder, batch["text"], cast(Any, keys), DrawSettings(guidance=guidance), prompt)
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
