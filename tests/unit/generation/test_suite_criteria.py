"""Sub-scores of shapes, prompts by task, and best-of-N groups, by values worked out by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.keys import keyed_rng
from data_pipeline.sources.drawn.shapes import (
    Seen,
    Thing,
    matches,
    parse_caption,
    read_picture,
    render,
)
from generation.evaluation.accuracy import derangement
from generation.evaluation.suites.best_of_n import best_places
from generation.evaluation.suites.clipscore import ClipscoreSuite, clip_scores
from generation.evaluation.suites.config import ClipscoreConfig, ShapesConfig
from generation.evaluation.suites.criteria import CRITERIA
from generation.evaluation.suites.geneval import TASKS, chosen
from generation.evaluation.suites.shapes import ShapesSuite
from generation.text_to_image import Candidates
from models.critics.fid import (
    Moments,
    frechet_distance,
    frechet_distance_of_few,
    frechet_distance_of_sets,
)

ONE = "a small red circle"
TWO = "a small red circle left of a large blue square"


def _seen(*objects: tuple[str, float, float]) -> list[Seen]:
    rows = [(text.split(), x, y) for text, x, y in objects]
    return [
        Seen(thing=Thing(size=size, colour=colour, shape=shape), x=x, y=y)
        for (size, colour, shape), x, y in rows
    ]


RED, BLUE = ("small red circle", 4, 8), ("large blue square", 12, 8)
PICTURES = [
    (ONE, [RED], "exact counting colour size shape"),
    (ONE, [RED, BLUE], "colour size shape"),
    (ONE, [], ""),
    (ONE, [("large red circle", 4, 8)], "counting colour shape"),
    (ONE, [("small red square", 4, 8)], "counting colour size"),
    (TWO, [RED, BLUE], "exact counting colour size shape two objects position"),
    (TWO, [BLUE, RED], "exact counting colour size shape two objects position"),
    (TWO, [("small red circle", 12, 8), ("large blue square", 4, 8)],
     "counting colour size shape two objects"),
    (TWO, [("small blue circle", 4, 8), ("large red square", 12, 8)],
     "counting colour size shape position"),
    (TWO, [("large blue circle", 4, 8), ("small red square", 12, 8)],
     "counting colour size shape"),
    (TWO, [RED, RED], "counting"),
    (TWO, [RED], ""),
    (TWO, [RED, BLUE, BLUE], "colour size shape two objects position"),
    (TWO, [RED, ("large blue square", 6, 15)], "counting colour size shape two objects"),
]  # fmt: skip


@pytest.mark.parametrize(("caption", "objects", "expected"), PICTURES)
def test_each_sub_score_sees_its_attribute_alone(caption: str, objects: Any, expected: str) -> None:
    scene, seen = parse_caption(caption), _seen(*objects)
    applicable = {name for name, each in CRITERIA.items() if each.applies(scene)}
    assert applicable == set(CRITERIA) - ({"two objects", "position"} if caption == ONE else set())
    holds = [name for name in CRITERIA if name in applicable and CRITERIA[name].holds(scene, seen)]
    assert " ".join(holds) == expected


def test_rendered_pictures_fulfil_all_sub_scores() -> None:
    for i, caption in enumerate([ONE, TWO, "a large red square above a large red square"]):
        scene = parse_caption(caption)
        picture = render(scene, 32, 0, i)
        assert matches(caption, picture)
        seen = read_picture(picture)
        assert all(each.holds(scene, seen) for each in CRITERIA.values() if each.applies(scene))


def test_prompts_of_a_task_are_distinct_captions_that_suit_it() -> None:
    for name, task in TASKS.items():
        captions = chosen(task, name, 36, 0)
        assert len(set(captions)) == 36 == len(captions)
        assert captions == chosen(task, name, 36, 0) and captions[:5] == chosen(task, name, 5, 0)
        scenes = [parse_caption(caption) for caption in captions]
        pairs = [(scene.first, scene.second) for scene in scenes if scene.second is not None]
        if name in ("single object", "colours", "size"):
            assert not pairs
        elif name in ("two objects", "position"):
            assert len(pairs) == 36 and all(a.shape != b.shape for a, b in pairs)
        elif name == "colour attribution":
            assert len(pairs) == 36 and all(a.colour != b.colour for a, b in pairs)
    singles = {name: set(chosen(TASKS[name], name, 99, 0)) for name in ("colours", "size")}
    assert len(singles["colours"]) == 36 and singles["colours"] == singles["size"]
    assert chosen(TASKS["colours"], "colours", 36, 0) != chosen(TASKS["colours"], "colours", 36, 1)
    pairs = [parse_caption(c) for c in chosen(TASKS["colour attribution"], "colours", 6000, 0)]
    assert len(pairs) == 4 * 36 * 30
    assert all(p.second is not None and p.first.colour != p.second.colour for p in pairs)


TASK_PICTURES = [
    ("single object", ONE, [("large blue circle", 1, 1)], True),
    ("single object", ONE, [BLUE], False),
    ("two objects", TWO, [("large red square", 1, 1), ("small red circle", 2, 2)], True),
    ("two objects", TWO, [RED], False),
    ("counting", TWO, [RED, RED], True),
    ("counting", TWO, [RED, RED, RED], False),
    ("colours", ONE, [("large red circle", 1, 1)], True),
    ("colours", ONE, [("small red square", 1, 1), ("small blue circle", 1, 1)], False),
    ("size", ONE, [("small blue circle", 1, 1)], True),
    ("size", ONE, [("large red circle", 1, 1), ("small red square", 1, 1)], False),
    ("position", TWO, [("large red circle", 1, 1), ("large red square", 9, 1)], True),
    ("position", TWO, [("large red circle", 9, 1), ("large red square", 1, 1)], False),
    ("position", TWO, [RED, ("large blue triangle", 12, 8)], False),
    ("colour attribution", TWO, [("large red circle", 1, 1), ("small blue square", 9, 1)], True),
    ("colour attribution", TWO, [("small blue circle", 1, 1), ("large red square", 9, 1)], False),
]


@pytest.mark.parametrize(("task", "caption", "objects", "expected"), TASK_PICTURES)
def test_a_task_judges_what_it_is_named_for(
    task: str, caption: str, objects: Any, expected: bool
) -> None:
    assert TASKS[task].holds(parse_caption(caption), _seen(*objects)) == expected


def test_a_sub_score_has_best_of_n_chance_and_upper_bound() -> None:
    captions = [ONE, "a large blue square", "a small green triangle"]
    suite = ShapesSuite([{"caption": c} for c in captions], ShapesConfig(candidates=2))
    true = [read_picture(render(parse_caption(c), 32, 0, i)) for i, c in enumerate(captions)]
    objects = [[true[0], []], [[], true[1]], [[], []]]
    scores = np.array([[0.1, 0.9], [0.1, 0.9], [0.9, 0.1]], np.float32)
    best = [[], true[1], []]
    row = suite._row("exact", CRITERIA["exact"], objects, scores, best, true)  # type: ignore[arg-type]
    assert row["best_of"] == {"1": pytest.approx(2 / 6), "2": pytest.approx(1 / 3)}
    assert row["upper_bound"] == 1.0 and row["chance"] == 0.0 and row["prompts"] == 3
    row = suite._row("size", CRITERIA["size"], objects, scores, [true[0]] * 3, true)  # type: ignore[arg-type]
    shuffled = [captions[i] for i in derangement(3, 0)]
    assert row["chance"] == pytest.approx(np.mean(["small" in caption for caption in shuffled]))
    assert suite._row("position", CRITERIA["position"], objects, scores, best, true) == {  # type: ignore[arg-type]
        "score": "position",
        "prompts": 0,
    }
    pair = f"{ONE} left of {captions[1]}"
    suite = ShapesSuite([{"caption": c} for c in (ONE, pair)], ShapesConfig(candidates=2))
    row = suite._row("position", CRITERIA["position"], objects, scores, best, true)  # type: ignore[arg-type]
    assert row["prompts"] == 1 and row["best_of"] == {"1": 0, "2": 0} and "chance" not in row


@pytest.mark.parametrize("count", [1, 2])
def test_figures_of_shapes_by_hand(count: int) -> None:
    """The best-ranked of the first caption is right; all others show the other caption."""
    captions = [ONE, "a large blue square"]
    small, large = (render(parse_caption(c), 32, 0, i) for i, c in enumerate(captions))
    pictures = {ONE: np.stack([small, large]), captions[1]: np.stack([small, small])}
    drawn = np.array([1, 0][-count:])

    def draw(asked: list[str], draws: Any) -> list[Candidates]:
        ranks = np.array([0.5, 0.25], np.float32)[:count]
        shown = {caption: pictures[caption][:count] for caption in asked}
        return [Candidates(caption=c, pictures=shown[c], scores=ranks, drawn=drawn) for c in asked]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        shown = (255 * pixels).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(shown, np.stack([small, large]), atol=1e-3)
        return pixels

    studio: Any = SimpleNamespace(
        draw=draw,
        tell_cut=list,
        encode=encode,
        decode=lambda codes: codes,
        images=SimpleNamespace(facts=SimpleNamespace(pixels=32)),
    )
    suite = ShapesSuite([{"caption": c} for c in captions], ShapesConfig(candidates=count))
    measured = suite.measure(lambda: studio)
    assert measured.results["prompts"] == 2 and measured.results["candidates"] == count
    single = {1: 0.5, 2: 0.25}[count]
    shares = dict(zip(("1", "2"), (single, 0.5), strict=True)) if count == 2 else {"1": single}
    by_name = {row["score"]: row for row in measured.results["rows"]}
    for name in ("exact", "colour", "size", "shape"):
        row = by_name[name]
        low = row.pop("single_low95")
        assert low == pytest.approx({1: 0.094529, 2: 0.0266765}[count], abs=5e-7)
        figures = {"best_of": shares, "upper_bound": 1.0, "chance": 0.5}
        assert row == {"score": name, "prompts": 2, **figures}
    assert by_name["two objects"] == {"score": "two objects", "prompts": 0}
    expected = {f"{name}, best of {count}": 0.5 for name in ("exact", "colour", "size", "shape")}
    expected |= {f"counting, best of {count}": 1.0}
    assert measured.headline == expected | ({"exact, single": single} if count == 2 else {})


@pytest.mark.parametrize(("rows", "width"), [(64, 24), (20, 64), (2, 16)])
def test_a_fid_of_few_vectors_equals_that_of_moments(rows: int, width: int) -> None:
    rng = keyed_rng(rows, "few")
    one = (rng.normal(size=(rows, width)) / 3 + rng.normal(size=width)).astype(np.float32)
    two = (rng.normal(size=(rows + 5, width)) + rng.normal(size=width)).astype(np.float32)
    expected = frechet_distance(Moments.of(one), Moments.of(two))
    assert frechet_distance_of_few(one, two) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_of_few(one, one) == pytest.approx(0, abs=1e-6)
    by_moments = rows > width
    chosen = expected if by_moments else frechet_distance_of_few(one, two)
    assert frechet_distance_of_sets(one, two) == chosen
    same = np.concatenate([one, two])[:width]
    assert frechet_distance_of_sets(same, two) == frechet_distance_of_few(same, two)


def test_groups_of_n_are_disjoint_and_their_best_is_taken() -> None:
    scores = np.array([[3, 1, 2, 2, 5, 0, 9], [0, 1, 2, 3, 4, 5, 6]], np.float32)
    assert [p.tolist() for p in best_places(scores, 1, 3)] == [[0, 0], [1, 1], [2, 2]]
    assert [p.tolist() for p in best_places(scores, 2, 9)] == [[0, 1], [2, 3], [4, 5]]
    assert [p.tolist() for p in best_places(scores, 3, 9)] == [[0, 2], [4, 5]]
    assert [p.tolist() for p in best_places(scores, 4, 9)] == [[0, 3]]
    assert [p.tolist() for p in best_places(scores, 7, 9)] == [[6, 6]]


def test_clipscore_is_the_scaled_cosine_that_is_not_negative() -> None:
    cosines = np.array([-0.5, 0.0, 0.25], np.float32)
    assert clip_scores(cosines).tolist() == [0.0, 0.0, 0.625]


class Brightness:
    """A judge whose cosine is a picture's mean; negative for the caption `dark`."""

    name, digest = "brightness", "12ab"

    def scores(self, captions: list[str], pixels: torch.Tensor, count: int) -> NDArray[Any]:
        assert pixels.shape == (count, 3, 8, 6)
        (sign,) = [-1.0 if caption == "dark" else 1.0 for caption in captions]
        return sign * pixels[:, 0].mean((1, 2)).numpy()[None]


def test_figures_of_clipscore_by_hand() -> None:
    """Candidates in rank order have the levels 0.2 and 0; of the other caption 1 and 0.4."""
    levels = {"dark": (51, 0), "bright": (255, 102)}
    told: list[list[str]] = []

    def draw(captions: list[str], draws: Any) -> list[Candidates]:
        return [
            Candidates(
                caption=caption,
                pictures=np.stack([np.full((8, 6, 3), each, np.uint8) for each in levels[caption]]),
                scores=np.array([0.5, 0.25], np.float32),
                drawn=np.array([1, 0]),
            )
            for caption in captions
        ]

    studio: Any = SimpleNamespace(draw=draw, tell_cut=told.append)
    judge, settings = Brightness(), ClipscoreConfig(candidates=2)
    prompts = [{"caption": "dark"}, {"caption": "bright"}]
    suite = ClipscoreSuite(prompts, judge, settings, "34cd")  # type: ignore[arg-type]
    measured = suite.measure(lambda: studio)
    # 2.5 times: dark 0, 0; bright 1, 0.4; dark's best as bright 0.2, bright's as dark 0
    assert measured.results == {
        "label": "proxy CLIPScore (CLIP by Tapir)",
        "judge": "brightness",
        "judge_digest": "12ab",
        "prefix": "",
        "weight": 2.5,
        "prompts": 2,
        "single": pytest.approx(2.5 * 1.4 / 4),
        "best": pytest.approx(2.5 / 2),
        "best_std": pytest.approx(2.5 / 2),
        "chance": pytest.approx(2.5 * 0.2 / 2),
    }
    assert measured.headline == {
        "proxy CLIPScore (CLIP by Tapir), best of 2": pytest.approx(1.25),
        "single": pytest.approx(0.875),
    }
    assert told == [["dark", "bright"]]
    same = ClipscoreSuite(prompts, judge, settings, "12ab")  # type: ignore[arg-type]
    assert same.facts["label"] == "proxy CLIPScore (CLIP of the run)"
