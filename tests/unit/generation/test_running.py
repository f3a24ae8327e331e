"""In a running batch a key has the picture of `Sampler`, whatever joins and leaves beside it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ConfigError
from generation.config import DrawSettings
from generation.sampling import draw as choosing
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.kv_cache import CacheShape, Lane, reads_of
from generation.sampling.pipeline import Leader, Neighbours
from generation.sampling.running import Candidate, Progress, RunningBatch
from generation.sampling.sampler import Prompt, Sampler
from models.attention.masks import Kind, image_mask
from models.config import PriorConfig
from models.prior import PAD
from tests.unit.models.test_models import CONFIG, trained_like
from tests.unit.models.test_pins_modern import ALL

GUIDED = DrawSettings(guidance=2.0)
SETTINGS = [
    DrawSettings(),
    DrawSettings(temperature=0.0),
    DrawSettings(temperature=0.7, top_k=5),
    DrawSettings(top_p=0.8, candidates=3, seed=4),
    DrawSettings(guidance=3.0, top_k=7, top_p=0.9),
    DrawSettings(guidance=0.5, temperature=1.3),
]


def candidates(config: PriorConfig, count: int = 10) -> list[Candidate]:
    """Candidates of 4 captions, with all kinds of settings and prompts."""
    draws, length = torch.Generator().manual_seed(3), config.image_length
    text = torch.randint(0, 30, (4, config.text_length), generator=draws)
    text[1, 2:], text[3] = PAD, text[0]
    codes = torch.randint(0, 20, (count, length), generator=draws)
    kept = torch.rand(count, length, generator=draws) < 0.4
    kept[::4], kept[:, -3] = torch.arange(length) < 6, False
    return [
        Candidate(
            text=text[i % 4],
            key=(7, f"caption {i % 4}", i),
            settings=SETTINGS[i % len(SETTINGS)],
            prompt=Prompt(codes=codes[i], kept=kept[i]) if i % 5 > 2 else None,
        )
        for i in range(count)
    ]


def alone(decoder: Decoder, of: Sequence[Candidate]) -> list[list[int]]:
    """The codes of each candidate by `Sampler`, one at a time."""
    drawn = []
    for each in of:
        keys: Any = [[each.key]]
        (part,) = Sampler(decoder).draw(each.text[None], keys, each.settings, each.prompt)
        drawn.append(part.codes[0, 0].tolist())
    return drawn


def story(batch: RunningBatch, of: Sequence[Candidate], seed: int = 0) -> list[list[int]]:
    """The codes of each candidate; they join in turn, and some leave and come again later."""
    draws, waiting = random.Random(seed), list(range(len(of)))
    running, done = dict[int, int](), dict[int, list[int]]()
    known = dict[int, list[list[int]]]()
    while waiting or running:
        while waiting and batch.fits(of[waiting[0]].settings) and draws.random() < 0.5:
            number = waiting.pop(0)
            running[batch.join(of[number])] = number
            known[number] = []
        if running and draws.random() < 0.06:
            row = draws.choice(list(running))
            batch.leave(row)
            waiting.append(running.pop(row))
        for each in batch.step():
            number = running[each.row]
            known[number].append(each.codes.tolist())
            if each.finished:
                done[running.pop(each.row)] = each.codes.tolist()
            else:
                assert len(each.codes) == each.position + 1
    assert batch.free == batch.rows and sorted(done) == list(range(len(of)))
    for number, parts in known.items():
        lengths = [len(part) for part in parts]
        assert lengths[:-1] == list(range(lengths[0], lengths[0] + len(parts) - 1))
        assert all(part == done[number][: len(part)] for part in parts), "codes change later"
    return [done[i] for i in range(len(of))]


def together(batch: RunningBatch, of: Sequence[Candidate]) -> list[list[int]]:
    """The codes of candidates that all have rows at once."""
    rows, done = [batch.join(each) for each in of], dict[int, list[int]]()
    while len(done) < len(of):
        done |= {each.row: each.codes.tolist() for each in batch.step() if each.finished}
    return [done[row] for row in rows]


def decoder_of(config: PriorConfig = CONFIG, precision: str = "fp32") -> Decoder:
    return Decoder(LocalPrior(layers=trained_like(config), config=config), precision)


@pytest.fixture(scope="module")
def layers() -> nn.ModuleDict:
    return trained_like()


@pytest.fixture
def decoder(layers: nn.ModuleDict) -> Decoder:
    return Decoder(LocalPrior(layers=layers, config=CONFIG))


@pytest.mark.parametrize(
    "options,rows,close",
    [
        ({}, 2, choosing.CLOSE),
        ({"layers": 3, "conv_kernel": 3}, 5, 0.3),
        ({**ALL, "grid": 5, "columns": 2}, 5, choosing.CLOSE),
    ],
    ids=["few rows", "most draws recomputed", "all options"],
)
def test_a_key_has_its_picture_whatever_joins_and_leaves(
    options: dict[str, Any], rows: int, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "CLOSE", close)
    config = replace(CONFIG, **options)
    decoder, of = decoder_of(config), candidates(config)
    assert story(RunningBatch(decoder, rows), of, rows) == alone(decoder, of)


def test_the_step_of_gpus_has_one_shape_and_draws_the_same(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, sizes = candidates(CONFIG, 6), set[int]()
    expected, run = alone(decoder, of), decoder._run

    def sized(x: Tensor, *rest: Any) -> Tensor:
        sizes.add(len(x))
        return run(x, *rest)

    monkeypatch.setattr(decoder, "_compiled", sized)
    assert story(RunningBatch(decoder, 4), of) == expected and sizes == {4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("one_row", [False, True])
def test_one_row_is_the_sampler_s(layers: nn.ModuleDict, precision: str, one_row: bool) -> None:
    decoder = Decoder(LocalPrior(layers=layers, config=CONFIG), precision, one_row)
    of = [each for each in candidates(CONFIG, 5) if each.settings.guidance == 1]
    assert story(RunningBatch(decoder, 1), of) == alone(decoder, of)


def test_bf16_draws_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without draws from canonical logits, as `Sampler`."""
    monkeypatch.setattr(Decoder, "canonical_logits", None)
    drawn = torch.tensor(
        story(RunningBatch(decoder_of(precision="bf16"), 6), candidates(CONFIG, 6))
    )
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 20


def test_all_caches_are_allocated_at_the_start(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RunningBatch(decoder, 5)
    caches = batch._lanes[0]._caches
    assert caches.bytes == 5 * decoder.caches.of_one().bytes
    before = [x.data_ptr() for block in caches.blocks for x in vars(block).values()]
    monkeypatch.setattr(CacheShape, "lane", None)
    story(batch, candidates(CONFIG, 6))
    assert before == [x.data_ptr() for block in caches.blocks for x in vars(block).values()]


def test_rows_that_do_not_fit_are_refused_with_those_that_do(decoder: Decoder) -> None:
    """A tenth of the free memory is reserved; a guided candidate has two streams of 22 tokens."""
    one, states = decoder.caches.of_one().bytes, 2 * 22 * 48 * 40
    free = int((3 * one + states) / 0.9) + 2
    assert RunningBatch(decoder, 3, lambda device: free).rows == 3
    with pytest.raises(ConfigError, match=r"4 rows take .*; 3 fit on every rank"):
        RunningBatch(decoder, 4, lambda device: free)
    with pytest.raises(ConfigError, match=r"2 rows take .*; 0 fit"):
        RunningBatch(decoder, 2, lambda device: 10)
    decoder.least = lambda rows: min(rows, 1)
    with pytest.raises(ConfigError, match="; 1 fit on every rank"):
        RunningBatch(decoder, 3, lambda device: free)
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        RunningBatch(decoder, 0)


def test_a_text_that_is_in_the_caches_is_copied(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a row whose candidate has finished; given codes are prefilled with their text."""
    prefilled, prefill = list[tuple[int, ...]](), decoder.prefill

    def noted(lane: Lane, text: Tensor, given: Tensor) -> None:
        prefilled.append(tuple(given.shape))
        prefill(lane, text, given)

    monkeypatch.setattr(decoder, "prefill", noted)
    batch, first = RunningBatch(decoder, 7), candidates(CONFIG)[0]
    both = first.settings, GUIDED
    of = [replace(first, key=(1, i), settings=both[i % 2]) for i in range(5)]
    prompt = Prompt(codes=torch.arange(16), kept=torch.arange(16) < 3)
    for some, expected in ((of, [(1, 0), (1, 0)]), ([replace(first, prompt=prompt)], [(1, 3)])):
        codes = alone(decoder, some)
        for again in (False, True):
            prefilled.clear()
            assert together(batch, some) == codes
            assert prefilled == ([] if again and len(some) > 1 else expected)


def test_rows_are_free_until_they_are_taken(decoder: Decoder) -> None:
    batch, first = RunningBatch(decoder, 3), candidates(CONFIG)[0]
    assert batch.free == 3 and batch.fits(GUIDED) and batch.step() == []
    guided = batch.join(replace(first, settings=GUIDED))
    assert batch.free == 1 and batch.fits(DrawSettings()) and not batch.fits(GUIDED)
    with pytest.raises(ConfigError, match="1 of 3 rows are free, and this candidate takes 2"):
        batch.join(replace(first, settings=GUIDED))
    plain = batch.join(first)
    assert {guided, plain} == {0, 2} and batch.free == 0 and not batch.fits(DrawSettings())
    assert {each.row for each in batch.step()} == {0, 2}
    batch.leave(guided)
    assert batch.free == 2
    assert batch.join(first) == 0
    batch.leave(0)  # before it was decoded
    assert [each.row for each in batch.step()] == [plain] and batch.free == 2
    with pytest.raises(ConfigError, match="row 0 has no candidate"):
        batch.leave(0)


class Stages(Neighbours):
    """Two stages, of which this process is both."""

    size = 2


class ThreeStages(Neighbours):
    """Three stages, of which this process is all."""

    size = 3


def test_lanes_take_turns(layers: nn.ModuleDict) -> None:
    """Of 5 rows, the first 2 are a lane. The second lane's codes come a step late."""
    decoder = Decoder(LocalPrior(layers=layers, config=CONFIG, neighbours=Stages()))
    of = candidates(CONFIG, 7)
    assert story(RunningBatch(decoder, 5), of, 4) == alone(decoder, of)
    batch, first = RunningBatch(decoder, 5), of[0]
    assert [batch.join(first) for _ in range(3)] == [2, 0, 3]
    assert [batch.fits(GUIDED), batch.join(first), batch.fits(GUIDED)] == [False, 1, False]
    assert [(each.row, each.position) for each in batch.step()] == [(0, 0), (1, 0)]
    batch.leave(2)  # its code is on its way
    assert batch.free == 2 and batch.fits(GUIDED) and batch.join(first) == 2
    seen = [(each.row, each.position) for each in batch.step()]
    assert seen == [(3, 0), (0, 1), (1, 1)]
    assert [(each.row, each.position) for each in batch.step()][:2] == [(3, 1), (2, 0)]
    for rows, lanes in ((1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (9, [4, 5])):
        assert [each._size for each in RunningBatch(decoder, rows)._lanes] == lanes


def test_with_three_lanes_two_codes_come_a_step_late(layers: nn.ModuleDict) -> None:
    decoder = Decoder(LocalPrior(layers=layers, config=CONFIG, neighbours=ThreeStages()))
    batch, first = RunningBatch(decoder, 6), candidates(CONFIG)[0]
    assert [batch.join(first) for _ in range(3)] == [0, 2, 4]
    assert [(each.row, each.position) for each in batch.step()] == [(0, 0)]
    seen = [(each.row, each.position) for each in batch.step()]
    assert seen == [(2, 0), (4, 0), (0, 1)]


class Tape(Leader):
    """Rank 0, whose words are recorded, or another rank, that hears them."""

    def __init__(self, words: list[list[int]], rank: int) -> None:
        self.words, self.rank = words, rank

    def tell(self, words: list[int]) -> list[int]:
        if self.rank:
            return self.words.pop(0)
        self.words.append(words)
        return words


def test_another_rank_decodes_what_rank_0_decides(
    layers: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[list[int]] = []
    heard = list[list[tuple[int, list[int]]]]()

    def note(batch: RunningBatch, words: list[int]) -> list[Progress]:
        progress = advance(batch, words)
        heard[-1] += [(each.position, each.codes.tolist()) for each in progress]
        return progress

    advance = RunningBatch._advance
    monkeypatch.setattr(RunningBatch, "_advance", note)
    for rank in range(2):
        part = LocalPrior(layers=layers, config=CONFIG, lead=Tape(words, rank))
        batch = RunningBatch(Decoder(part), 4)
        heard.append([])
        if rank:
            batch.follow()
        else:
            story(batch, candidates(CONFIG, 3))
            batch.close()
    assert not words and heard[0] == heard[1] and len(heard[0]) > 40


def test_a_candidate_that_cannot_be_drawn_is_refused(decoder: Decoder) -> None:
    batch, good = RunningBatch(decoder, 2), candidates(CONFIG)[0]
    codes, some = torch.arange(16), torch.arange(16) < 3
    wrong: dict[str, dict[str, Any]] = {
        "6 tokens, padded with -1": {"text": good.text[:5]},
        "tokens must be -1 to 29": {"text": good.text * 0 + 30},
        "temperature=-1": {"settings": DrawSettings(temperature=-1.0)},
        "16 codes, and say": {"prompt": Prompt(codes=codes[:9], kept=some)},
        "nothing would be drawn": {"prompt": Prompt(codes=codes, kept=some | True)},
        "kept codes must be 0 to 19": {"prompt": Prompt(codes=codes * 0 + 20, kept=some)},
    }
    for text, change in wrong.items():
        with pytest.raises(ConfigError, match=text):
            batch.join(replace(good, **change))
    for edge in (good.text.clamp(max=0) - 1, good.text * 0 + 29):
        assert not replace(good, text=edge).problems(CONFIG)
    ends = Prompt(codes=codes * 0 + 19, kept=some)
    assert not replace(good, prompt=ends).problems(CONFIG) and batch.free == 2


@pytest.mark.parametrize("kind,dense", [("row", True), ("column", False), ("conv", False)])
def test_each_row_reads_the_slots_of_its_position(kind: Kind, dense: bool) -> None:
    """Keys are the position's number; all rows walk through the picture, each ahead of the last."""
    grid, heads, rows = 12, 2, 3
    mask, reads = image_mask(kind, grid, 3), reads_of(kind, grid, 3)
    store = torch.full((rows * heads, reads.slots, 1), -1.0)
    places = [0] * rows
    for step in range(grid * grid + 5 * rows):
        at = torch.tensor([min(max(step - 5 * i, 0), grid * grid - 1) for i in range(rows)])
        row = reads.row_positions(at, heads)
        row.write(store, at.repeat_interleave(heads)[:, None, None].float())
        assert (row.reads is None) == dense
        got = row.read(store).view(rows, heads, -1)
        for i, place in enumerate(at.tolist()):
            shown = row.bias[i, 0] == 0
            assert row.bias[i, 0, ~shown].eq(-torch.inf).all()
            for head in range(heads):
                visible = got[i, head, shown].sort().values
                assert visible.tolist() == mask[place].nonzero().flatten().tolist()
        places = at.tolist()
    assert places == [grid * grid - 1] * rows
