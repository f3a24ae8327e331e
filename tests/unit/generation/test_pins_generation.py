"""Draws, shares and scores: hand-computed numbers, and statistics against softmax."""

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import ConfigError, InputError
from data_pipeline.formats.raw import RawRecord
from generation.config import DrawSettings, EvaluateConfig
from generation.evaluation import accuracy
from generation.evaluation.accuracy import best_of_shares, counts_up_to, wilson_low
from generation.sampling.decoder import Decoder, LocalPrior
from generation.sampling.draw import choose, guided
from generation.sampling.sampler import Prompt, Sampler, _split, span
from models.config import PriorConfig
from models.critics.fid import ClassSums, Moments, frechet_distance, inception_score, part_of
from parallel.tensor.ops import TensorParallel
from tests.unit.models.test_models import CONFIG, prior_batch, prior_logits, trained_like


def test_guidance_by_hand() -> None:
    logits = torch.tensor([[4.0, 1.0], [6.0, 0.0], [1.0, 3.0], [2.0, 2.0]])
    assert guided(logits, 3.0).tolist() == [[10.0, -3.0], [14.0, -4.0]]
    assert guided(logits, 0.5).tolist() == [[2.5, 2.0], [4.0, 1.0]]


@pytest.mark.parametrize(
    ("gap", "flags", "canonical", "sure"),
    [
        (3e-4, {}, False, True),
        (1e-4, {}, False, False),
        (1e-4, {}, True, True),
        (0.0, {}, True, False),
        (9e-4, {"guidance": 3.0}, False, False),
        (1.1e-3, {"guidance": 3.0}, False, True),
        (1.5e-4, {"guidance": 0.5}, False, False),
        (2.5e-4, {"guidance": 0.5}, False, True),
        (1.5e-4, {"temperature": 0.5}, False, False),
        (2.5e-4, {"temperature": 0.5}, False, True),
        (2.5e-4, {"temperature": 4.0}, False, True),
    ],
)
def test_a_draw_is_sure_where_rounding_could_not_change_it(
    gap: float, flags: dict[str, float], canonical: bool, sure: bool
) -> None:
    logits = torch.tensor([[0.0, gap, -1.0]], dtype=torch.float64)
    choice = choose(logits, torch.zeros(1, 3), DrawSettings(**flags), canonical)  # type: ignore[arg-type]
    assert choice.sure.tolist() == [sure]
    if gap:
        assert choice.codes.tolist() == [1]


def _drawable(logits: list[float], canonical: bool = True, **flags: Any) -> dict[int, bool]:
    """Code -> whether its draw is sure, for each code that some noise selects."""
    drawable = {}
    for code in range(len(logits)):
        noise = torch.zeros(1, len(logits))
        noise[0, code] = 1e3
        choice = choose(torch.tensor([logits]), noise, DrawSettings(**flags), canonical)
        if int(choice.codes) == code:
            drawable[code] = bool(choice.sure)
    return drawable


def test_which_codes_may_be_drawn_by_hand() -> None:
    assert _drawable([5.0, 3.0, 4.0, 1.0]) == dict.fromkeys(range(4), True)
    assert _drawable([5.0, 3.0, 4.0, 1.0], top_k=2) == {0: True, 2: True}
    assert _drawable([5.0, 3.0, 4.0, 1.0], top_k=1) == {0: True}
    assert _drawable([5.0, 3.0, 4.0, 1.0], top_k=9) == dict.fromkeys(range(4), True)
    assert _drawable([5.0, 4.0, 4.0, 1.0], top_k=2) == {0: True, 1: False, 2: False}
    near = [5.0, 4.0, 4.0 - 1e-4, 1.0]
    assert _drawable(near, False, top_k=2) == {0: True, 1: False, 2: False}
    assert _drawable(near, True, top_k=2) == {0: True, 1: True}
    far = [5.0, 4.0, 4.0 - 3e-4, 1.0]
    assert _drawable(far, False, top_k=2) == {0: True, 1: True}
    assert _drawable([4.0 + 1e-4, 4.0, 2.0, 1.0], False, top_k=1) == {0: False, 1: False}
    # all may be drawn, however unlikely: none is at the edge of a nucleus
    assert _drawable([20.0, 0.0, -1.0], False) == dict.fromkeys(range(3), True)


def test_nuclei_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.2: a code is kept if those before it sum to less than top_p."""
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert list(_drawable(logits, top_p=0.45)) == [0]
    assert list(_drawable(logits, top_p=0.55)) == [0, 1]
    assert list(_drawable(logits, top_p=0.79)) == [0, 1]
    assert list(_drawable(logits, top_p=0.81)) == [0, 1, 2]
    assert list(_drawable(logits, top_p=1e-6)) == [0]
    assert list(_drawable(logits, top_p=0.6, temperature=0.5)) == [0]  # 0.658 before the second
    assert list(_drawable(logits, top_p=0.6, top_k=2)) == [0]  # 0.625 of the two
    assert list(_drawable(logits, top_p=0.64, top_k=2)) == [0, 1]
    assert list(_drawable(logits, top_p=0.999, top_k=2)) == [0, 1]
    edge = {"top_p": 0.4999}
    assert _drawable(logits, True, **edge) == {0: True}
    assert _drawable(logits, False, **edge) == {0: True, 1: False}
    assert _drawable(logits, False, top_p=0.5001) == {0: True, 1: False}
    assert _drawable(logits, False, top_p=0.5005) == {0: True, 1: True}
    assert choose(torch.tensor([logits]), None, DrawSettings(temperature=0.0, top_p=0.6)).sure


def test_ties_beyond_top_k_are_seen_in_a_large_codebook() -> None:
    logits = [9.0, 8.0, *([7.0] * 4), *(-float(i) for i in range(60))]
    assert _drawable(logits, top_k=3) == {0: True, 1: True, **dict.fromkeys(range(2, 6), False)}
    assert list(_drawable(logits, top_k=6)) == [0, 1, 2, 3, 4, 5]
    assert list(_drawable([1.0] * 34, top_k=2)) == list(range(34))
    assert len(_drawable([1.0] * 50, top_k=2)) == 50


@pytest.fixture(scope="module")
def small() -> tuple[Any, Decoder, PriorConfig]:
    """A prior of one image position with 8 codes."""
    config = PriorConfig(
        dim=8, heads=2, layers=2, text_length=3, text_vocabulary=5, image_vocabulary=8, grid=1
    )
    layers = trained_like(config)
    return layers, Decoder(LocalPrior(layers=layers, config=config)), config


@pytest.mark.parametrize("flags", [{}, {"temperature": 0.6}, {"guidance": 2.0}])
def test_sampled_codes_follow_softmax(small: Any, flags: dict[str, float]) -> None:
    """Chi-square of 20,000 candidates of one caption; 24.3 is exceeded once in a thousand."""
    layers, decoder, _ = small
    text = torch.tensor([[3, 1, -1]])
    settings = DrawSettings(**flags)  # type: ignore[arg-type]
    sampler = Sampler(decoder, batch=20_000)
    keys = [[(0, "a caption", i) for i in range(20_000)]]
    drawn = torch.cat([d.codes.flatten() for d in sampler.draw(text, cast(Any, keys), settings)])
    with torch.no_grad():
        image = torch.zeros(1, 1, dtype=torch.int64)
        logits = prior_logits(layers, {"text": text, "image": image})[0, 0]
        free = prior_logits(layers, {"text": torch.full_like(text, -1), "image": image})[0, 0]
    logits = (free + settings.guidance * (logits - free)).double() / settings.temperature
    expected = 20_000 * torch.softmax(logits, 0)
    assert float(expected.min()) > 5, "chi-square needs some of each"
    counts = torch.bincount(drawn, minlength=8).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3


def test_candidates_are_dealt_to_lanes_and_spans_are_drawn() -> None:
    keys = [[(c, i) for i in range(5)] for c in "ab"]
    parts = _split(cast(Any, keys), 2)
    assert [[len(row) for row in part] for part in parts] == [[2, 2], [3, 3]]
    assert parts[1][1] == [("b", 2), ("b", 3), ("b", 4)]
    assert [len(part[0]) for part in _split(cast(Any, [keys[0][:2]]), 4)] == [1, 1]
    kept = torch.tensor([True, True, False, True, False, True])
    assert span(Prompt(codes=torch.zeros(6), kept=kept), 6) == (2, 5)
    assert span(None, 6) == (0, 6)


def test_captions_without_equally_many_keys_are_refused(small: Any) -> None:
    _, decoder, _ = small
    text, one = torch.zeros(2, 3, dtype=torch.int64), ("a", 1)
    for keys in ([[one]], [[one], [one, one]]):
        with pytest.raises(ConfigError, match="2 captions need as many"):
            list(Sampler(decoder).draw(text, cast(Any, keys), DrawSettings()))
    assert not list(Sampler(decoder).draw(text[:0], [], DrawSettings()))
    assert not list(Sampler(decoder).draw(text, [[], []], DrawSettings()))


@pytest.mark.parametrize(
    ("right", "count", "low"),
    [(81, 263, 0.2553), (15, 148, 0.0624), (0, 20, 0.0), (1, 29, 0.0061), (29, 29, 0.8830)],
)
def test_wilson_s_interval_is_newcombes(right: int, count: int, low: float) -> None:
    """Statistics in Medicine 17 (1998), table I, method 3; and by symmetry 29 of 29: 1 - 0.1170."""
    assert wilson_low(right / count, count) == pytest.approx(low, abs=6e-5)


def test_counts_and_shares_by_hand() -> None:
    assert [counts_up_to(n) for n in (1, 2, 5, 16)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16]]
    right = np.array([[True, False, False, True]])
    scores = np.array([[0.1, 0.9, 0.5, 0.7]])  # ranked: 1 wrong, 3 right, 2 wrong, 0 right
    shares = best_of_shares(right, scores)
    assert shares == pytest.approx({1: 0.5, 2: 2 / 6, 4: 0.0})
    tied = best_of_shares(np.array([[True, False]]), np.array([[1.0, 1.0]]))
    assert tied == {1: 0.5, 2: 1.0}


class _Studio:
    """Records what is drawn; a picture is its caption."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, DrawSettings]] = []
        self.images = SimpleNamespace(facts=SimpleNamespace(pixels=4))

    def draw(self, captions: list[str], settings: DrawSettings) -> list[Any]:
        self.drawn.append((len(captions), settings))
        wrong = [c if i % 2 else "x" for i, c in enumerate(captions)]
        return [SimpleNamespace(pictures=[c], drawn=[0], scores=[1.0]) for c in wrong]

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels + 1

    def decode(self, codes: Tensor) -> Tensor:
        return codes * 2


def test_captions_are_drawn_in_chunks_of_32() -> None:
    studio = _Studio()
    captions = [str(i) for i in range(70)]
    drawn = accuracy.draw_all(cast(Any, studio), captions, DrawSettings(), "sample")
    assert [n for n, _ in studio.drawn] == [32, 32, 6] and len(drawn) == 70
    assert drawn[33].pictures == ["33"]


def _records(*captions: str) -> list[RawRecord]:
    return [cast(Any, SimpleNamespace(caption=c)) for c in captions]


def test_accuracy_of_four_captions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws come best first, with their places; chance shuffles the captions."""
    monkeypatch.setattr(accuracy, "matches", lambda caption, picture: caption == picture)
    monkeypatch.setattr(accuracy, "parse_caption", lambda caption: None)
    pictures = {"truth": ["a", "b", "c", "d"], "again": ["a", "b", "c", "x"]}
    monkeypatch.setattr(accuracy, "pictures_of", lambda records, pixels: ("pixels", pixels))
    sets = {("pixels", 4): "truth", "decoded": "again"}
    monkeypatch.setattr(accuracy, "to_bytes", lambda pixels: pictures[sets[pixels]])
    studio = _Studio()
    studio.encode = lambda pixels: ("codes", pixels)  # type: ignore[method-assign, assignment, return-value]
    studio.decode = lambda codes: "decoded"  # type: ignore[method-assign, assignment, return-value]
    rows = [
        SimpleNamespace(pictures=["a", "x"], drawn=[1, 0], scores=[0.9, 0.1]),
        SimpleNamespace(pictures=["x", "b"], drawn=[0, 1], scores=[0.8, 0.2]),
        SimpleNamespace(pictures=["c", "c"], drawn=[1, 0], scores=[0.7, 0.3]),
        SimpleNamespace(pictures=["x", "x"], drawn=[0, 1], scores=[0.6, 0.4]),
    ]
    records = _records("a", "b", "c", "d")
    result = accuracy.caption_accuracy(cast(Any, studio), records, cast(Any, rows), 1)
    assert (result["prompts"], result["best_of_1"], result["best_of_2"]) == (4, 0.5, 0.5)
    assert result["best_of_2_low95"] == pytest.approx(0.1500, abs=1e-4)  # Wilson, 2 of 4
    assert result["chance"] == 0.0 and "best_of_2_prompts" not in result
    assert (result["reconstruction"], result["checker_on_truth"]) == (0.75, 1.0)
    right, scores = accuracy._judged(["a", "b"], cast(Any, rows[:2]))
    assert right.tolist() == [[False, True], [False, True]]
    assert scores.tolist() == [pytest.approx([0.1, 0.9]), pytest.approx([0.8, 0.2])]
    with pytest.raises(InputError, match="no held-out captions"):
        accuracy.caption_accuracy(cast(Any, studio), [], [], 1)


def test_larger_counts_are_measured_on_the_captions_that_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captions a and b have 4 draws, c and d 2: best of 1 and 2 over all, of 4 over a and b."""
    monkeypatch.setattr(accuracy, "matches", lambda caption, picture: caption == picture)
    rows = [
        SimpleNamespace(pictures=["x", "a", "a", "a"], drawn=[3, 0, 1, 2], scores=[4, 3, 2, 1]),
        SimpleNamespace(pictures=["b", "x", "b", "x"], drawn=[2, 0, 1, 3], scores=[4, 3, 2, 1]),
        SimpleNamespace(pictures=["c", "x"], drawn=[0, 1], scores=[2, 1]),
        SimpleNamespace(pictures=["x", "x"], drawn=[1, 0], scores=[2, 1]),
    ]
    shares = accuracy._best_of(["a", "b", "c", "d"], cast(Any, rows))
    # first draws: a, a | x, b | c, x | x, x; best of two: a, x, c, x; of four: x, b
    assert shares == {1: ((1 + 0.5 + 0.5 + 0) / 4, 4), 2: (0.5, 4), 4: (0.5, 2)}
    same = accuracy._best_of(["c", "d"], cast(Any, rows[2:]))
    assert same == {1: (0.25, 2), 2: (0.5, 2)}
    two = accuracy._best_of(["b", "c"], cast(Any, rows[1:3]))
    assert two == {1: (0.5, 2), 2: (0.5, 2), 4: (1.0, 1)}


def test_the_figures_say_how_many_captions_a_larger_count_is_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accuracy, "matches", lambda caption, picture: caption == picture)
    monkeypatch.setattr(accuracy, "parse_caption", lambda caption: None)
    monkeypatch.setattr(accuracy, "pictures_of", lambda records, pixels: torch.zeros(2))
    monkeypatch.setattr(accuracy, "to_bytes", lambda pixels: ["a", "b"])
    rows = [
        SimpleNamespace(pictures=["a", "x"], drawn=[0, 1], scores=[2, 1]),
        SimpleNamespace(pictures=["x"], drawn=[0], scores=[1]),
    ]
    result = accuracy.caption_accuracy(cast(Any, _Studio()), _records("a", "b"), cast(Any, rows), 1)
    assert (result["best_of_1"], result["best_of_2"], result["best_of_2_prompts"]) == (0.5, 1.0, 1)
    assert "best_of_1_prompts" not in result
    assert result["best_of_2_low95"] == pytest.approx(wilson_low(1.0, 1))


def test_of_equal_scores_the_first_draw_wins() -> None:
    """40 draws whose scores are 0 and 1 in turn: their order is 1, 3, ..., 39, 0, 2, ..., 38."""
    scores = np.tile(np.array([0.0, 1.0], np.float32), 20)[None]
    right = np.zeros((1, 40), bool)
    right[0, 1:20:2] = True  # the first ten in that order win whenever one of them is chosen
    for count, share in best_of_shares(right, scores).items():
        assert share == pytest.approx(1 - math.comb(30, count) / math.comb(40, count))


def test_the_first_few_captions_get_more_draws() -> None:
    studio, captions = _Studio(), ["a", "b", "c"]
    accuracy.draw_for(cast(Any, studio), captions, DrawSettings(candidates=2), most=8, few=2)
    assert [(c, s.candidates) for c, s in studio.drawn] == [(2, 8), (1, 2)]
    studio.drawn.clear()
    accuracy.draw_for(cast(Any, studio), captions, DrawSettings(candidates=2), most=0, few=64)
    assert [(c, s.candidates) for c, s in studio.drawn] == [(3, 2)]
    studio.drawn.clear()
    accuracy.draw_for(cast(Any, studio), captions, DrawSettings(candidates=2), most=2, few=2)
    assert [c for c, _ in studio.drawn] == [3], "nothing to draw more of"
    assert EvaluateConfig(candidates=16, max_candidates=8).problems()  # type: ignore[call-arg]


def test_a_derangement_has_no_fixed_point() -> None:
    for seed in range(20):
        for count in (2, 3, 7):
            order = accuracy.derangement(count, seed)
            assert sorted(order) == list(range(count))
            assert all(order[i] != i for i in range(count))
    assert accuracy.derangement(50, 1).tolist() != accuracy.derangement(50, 2).tolist()
    cycle, at = accuracy.derangement(9, 5), 0
    for _ in range(9):
        at = int(cycle[at])
    assert at == 0, "one cycle of all"


def test_guidance_is_measured_on_single_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "matches", lambda caption, picture: caption == picture)
    studio = _Studio()
    settings, records = DrawSettings(candidates=9), _records("a", "b", "c", "d")
    shares = accuracy.guidance_accuracy(cast(Any, studio), records, settings, (1.0, 2.5))
    assert shares == {"1": 0.5, "2.5": 0.5}
    assert [(s.candidates, s.guidance) for _, s in studio.drawn] == [(1, 1.0), (1, 2.5)]
    accuracy.guidance_accuracy(cast(Any, studio), records, settings, (2.5,), guided=2)
    assert studio.drawn[-1][0] == 2


def test_moments_and_a_distance_by_hand() -> None:
    """Points -1, 1 and 1, 5: means 0 and 3, variances 2 and 8: 9 + 2 + 8 - 2 * 4 = 11."""
    moments = Moments.of(np.array([[1, 2], [3, 6]], np.float32))
    assert moments.count == 2 and moments.total.tolist() == [4, 8]
    assert moments.products.tolist() == [[10, 20], [20, 40]]
    assert moments.mean.tolist() == [2, 4] and moments.covariance.tolist() == [[2, 4], [4, 8]]
    both = moments + moments
    assert both.count == 4 and both.total.tolist() == [8, 16]
    assert both.products.tolist() == [[20, 40], [40, 80]]
    one, two = (Moments.of(np.array(x, np.float32)) for x in ([[-1], [1]], [[1], [5]]))
    assert frechet_distance(one, two) == pytest.approx(11.0)
    single = Moments.of(np.array([[1]], np.float32))
    for pair in ((single, two), (two, single)):
        with pytest.raises(InputError, match="at least two"):
            frechet_distance(*pair)


def test_scores_of_classes_by_hand() -> None:
    """(1/4, 3/4) twice: exp 0 = 1; with (3/4, 1/4): exp(ln 2 - H(1/4))."""
    odds = math.log(3)
    one = ClassSums.of(np.array([[0.0, odds]], np.float32))
    assert one.chances.tolist() == pytest.approx([0.25, 0.75])
    assert one.negentropy == pytest.approx(-0.5623351) and one.count == 1
    same = one + one
    assert same.count == 2 and same.score == pytest.approx(1.0)
    both = one + ClassSums.of(np.array([[1000 + odds, 1000.0]], np.float32))
    assert both.score == pytest.approx(math.exp(math.log(2) - 0.5623351), rel=1e-4)
    sure = ClassSums.of(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32))
    assert sure.score == pytest.approx(2.0)
    assert ClassSums.of(np.array([[1e4, 0.0]], np.float32)).score == pytest.approx(1.0)
    assert inception_score([sure, same]) == pytest.approx((1.5, 0.5))


def test_parts_of_a_set() -> None:
    assert [part_of(i, 10, 3) for i in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [part_of(i, 3, 10) for i in range(3)] == [0, 1, 2]
    assert [part_of(i, 20) for i in (0, 1, 2, 19)] == [0, 0, 1, 9]


def test_a_tensor_group_adds_the_biases_to_the_sum_once() -> None:
    """Two ranks with equal halves of the residual stream's input sum to the whole."""

    class Two(TensorParallel):
        size = 2

        def leave(self, x: Tensor) -> Tensor:
            return 2 * x

    layers, text = trained_like(CONFIG), prior_batch()["text"]
    keys, halves = cast(Any, [[(1, c, 0)] for c in "abc"]), trained_like(CONFIG)
    with torch.no_grad():
        for name, weight in halves.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                weight.div_(2)
    parts = (
        LocalPrior(layers=layers, config=CONFIG),
        LocalPrior(layers=halves, config=CONFIG, tensor=Two()),
    )
    one, two = (next(Sampler(Decoder(part)).draw(text, keys, DrawSettings())) for part in parts)
    assert one.codes.equal(two.codes)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_draw_that_rounding_cannot_change_is_computed_once(
    guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, recompute = [], Decoder.canonical_logits
    monkeypatch.setattr(
        Decoder,
        "canonical_logits",
        lambda *given: again.append(1) or recompute(*given),  # type: ignore[func-returns-value]
    )
    decoder = Decoder(LocalPrior(layers=trained_like(CONFIG), config=CONFIG))
    keys = cast(Any, [[(1, c, 0)] for c in "abc"])
    settings = DrawSettings(guidance=guidance)
    list(Sampler(decoder).draw(prior_batch()["text"], keys, settings))
    assert len(again) < 3 * CONFIG.image_length // 4
