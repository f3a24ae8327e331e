"""Pins of cases that need several ranks, a full device or the last draw."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.formats.raw import RawRecord
from data_pipeline.text.dropout import DropoutEncoder
from generation.config import DrawSettings
from generation.evaluation import accuracy
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.pipeline import Pipeline
from generation.sampling.sampler import Sampler
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
