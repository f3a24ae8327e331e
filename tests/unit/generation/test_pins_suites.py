"""Pins of the suites: figures worked out by hand, of pictures that are chosen, not drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError, InputError
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.formats.raw import RawSource
from data_pipeline.images.crops import encode_png
from data_pipeline.images.decode import decode_rgb
from data_pipeline.packing.pack import pack
from data_pipeline.sources.drawn.panels import CAPTIONS, OPERATIONS, Panel, render_pair
from data_pipeline.sources.drawn.read_panels import read_pair
from data_pipeline.sources.drawn.shapes import parse_caption, render
from data_pipeline.streaming.stream import stored_records
from data_pipeline.text.bpe import encode, train_bpe
from data_pipeline.tokenize.encode import to_bytes
from generation import text_to_image
from generation.evaluation.suites import best_of_n, fid, geneval, panels
from generation.evaluation.suites.best_of_n import BestOfNSuite
from generation.evaluation.suites.config import (
    BestOfNConfig,
    FidConfig,
    GenevalConfig,
    PanelsConfig,
)
from generation.evaluation.suites.criteria import CRITERIA, TASKS, placed
from generation.evaluation.suites.geneval import GenevalSuite
from generation.evaluation.suites.panels import PanelsSuite
from generation.evaluation.suites.prompts import panel_problems
from generation.text_to_image import Candidates, Studio, picture_grid
from parallel.device import CPU

SIDE, LENGTH = 32, 16
TOPS = [
    Panel(form="circle", colour="blue", row=3, column=5),
    Panel(form="T", colour="green", row=4, column=9),
    Panel(form="cross", colour="purple", row=3, column=12),
]
RED, BLUE = "a small red circle", "a large blue square"


class Oracle:
    """A studio whose model does what the caption says with the first candidate, else nothing.

    A picture's codes are all its number.
    """

    def __init__(self) -> None:
        self.config = SimpleNamespace(text_length=60, image_length=LENGTH)
        self.images = SimpleNamespace(facts=SimpleNamespace(pixels=SIDE, rows=4, columns=4))
        self.caption_dropout = 0.0
        self.tokenizer, self.sampler = train_bpe(list(CAPTIONS.values()), 280), self
        self.pictures: list[NDArray[np.uint8]] = []
        self.keys: list[Any] = []
        self.told: list[str] = []

    codes: Any = Studio.codes
    tell_guidance: Any = Studio.tell_guidance

    def tell_cut(self, captions: list[str]) -> None:
        self.told = captions

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.stack([self._code(picture) for picture in to_bytes(pixels)])

    def _code(self, picture: NDArray[np.uint8]) -> Tensor:
        self.pictures.append(picture)
        return torch.full((LENGTH,), len(self.pictures) - 1, device="cpu")

    def decode(self, codes: Tensor) -> Tensor:
        assert codes.shape[1:] == (LENGTH,)
        shown = np.stack([self.pictures[int(row[0])] for row in codes])
        return torch.from_numpy(shown).permute(0, 3, 1, 2) / 255

    def draw(self, text: Tensor, keys: Any, draws: Any, prompt: Any) -> Iterator[Any]:
        assert prompt.kept.tolist() == [True] * (LENGTH // 2) + [False] * (LENGTH // 2)
        self.keys.append(keys)
        for start in range(0, len(keys), 2):
            part = slice(start, min(start + 2, len(keys)))
            rows = [self._drawn(text[i], keys[i], prompt.codes[i]) for i in range(len(keys))[part]]
            codes, candidates = torch.stack(rows), slice(0, draws.candidates)
            yield SimpleNamespace(captions=part, candidates=candidates, codes=codes)

    def _drawn(self, text: Tensor, keys: Any, code: Tensor) -> Tensor:
        caption, given = keys[0][1], self.pictures[int(code[0])]
        ids = encode(self.tokenizer, caption)
        assert text.tolist()[: len(ids)] == ids
        (name,) = [name for name, known in CAPTIONS.items() if known == caption]
        shown = read_pair(given)
        assert shown.top is not None and shown.bottom is None, "the lower panel is not given"
        return torch.stack([self._code(render_pair(name, shown.top, SIDE // 2)), code])


def _panel_rows(name: str, tops: Sequence[Panel]) -> list[dict[str, Any]]:
    uppers = [{k: getattr(top, k) for k in ("form", "colour", "row", "column")} for top in tops]
    return [{"caption": CAPTIONS[name], "key": "k", "top": upper} for upper in uppers]


def test_a_model_that_obeys_is_exact_with_its_first_candidate_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under another default device. Drawn of another top, the picture follows that one.

    Wilson's lower end for a half of n prompts is 1/2 - 0.98 / sqrt(n + 1.96^2).
    """
    rows = _panel_rows("flipped", TOPS) + _panel_rows("red", TOPS[:2])
    rows = [rows[i] for i in (3, 0, 1, 4, 2)]
    oracle, warnings = cast(Any, Oracle()), list[str]()
    monkeypatch.setattr(text_to_image.LOG, "warning", lambda text, *_: warnings.append(text))
    suite = PanelsSuite(rows, PanelsConfig(candidates=2, seed=5, guidance=2.0), tmp_path)
    with torch.device("meta"):
        measured = suite.measure(lambda: oracle)
    assert oracle.told == list(CAPTIONS.values())
    assert "trained without --caption-dropout" in "".join(warnings)
    tops = [str([*TOPS, *TOPS[:2]][i]) for i in (3, 0, 1, 4, 2)]
    assert tops[2] == "green T at 4,9"
    keys = [[(5, row["caption"], top, i) for i in (0, 1)]
            for row, top in zip(rows, tops, strict=True)]  # fmt: skip
    assert oracle.keys == [keys, keys]
    halves = ("exact", "swapped_follows", "form", "colour", "row", "column", "style")
    figures = {**dict.fromkeys(halves, 0.5), "swapped": 0.0, "chance": 0.0, "upper_bound": 1.0}
    assert measured.results["candidates"] == 2
    by_operation = {row["operation"]: row for row in measured.results["rows"]}
    assert list(by_operation) == ["red", "flipped"]
    for name, prompts, low in (("red", 2, 0.094529), ("flipped", 3, 0.125331)):
        expected = {**figures, "operation": name, "prompts": prompts}
        expected["exact_low95"] = pytest.approx(low, abs=5e-7)
        assert by_operation[name] == expected
    assert measured.headline == {
        "exact": 0.5, "swapped": 0.0, "chance": 0.0, "exact, red": 0.5, "exact, flipped": 0.5
    }  # fmt: skip


def test_a_gallery_shows_twelve_prompts_twice_as_large(tmp_path: Path) -> None:
    tops = [Panel(form="T", colour="red", row=r, column=c) for r in (3, 4) for c in range(3, 10)]
    rows = _panel_rows("same", tops) + _panel_rows("stamp", tops[:2])
    suite = PanelsSuite(rows, PanelsConfig(candidates=2), tmp_path)
    true, first, swapped = (
        np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None] + at, (16, 4, 4, 3))
        for at in (0, 50, 100)
    )
    drawn, others = np.stack([first, first + 128], 1), np.stack([swapped, swapped + 128], 1)
    suite._write_gallery(true, drawn, others)
    for name, shown in (("same", slice(12)), ("stamp", slice(14, 16))):
        grid = decode_rgb((tmp_path / f"{name}.png").read_bytes(), name)
        assert (grid == picture_grid([true[shown], first[shown], swapped[shown]], 2)).all()


@pytest.mark.parametrize(("side", "rows", "height"), [(32, 8, 16), (48, 2, 24), (16, 4, 8)])
def test_a_panel_is_half_a_picture(side: int, rows: int, height: int) -> None:
    assert panels._height(_sized(side, rows)) == height


@pytest.mark.parametrize(("side", "rows"), [(24, 8), (32, 7), (40, 3)])
def test_pictures_that_have_no_two_panels_are_refused(side: int, rows: int) -> None:
    reason = f"{side} pixels and {rows}x5 codes; two panels need a multiple of 16 pixels"
    with pytest.raises(InputError, match=reason):
        panels._height(_sized(side, rows))


def _sized(side: int, rows: int) -> Any:
    facts = SimpleNamespace(pixels=side, rows=rows, columns=5)
    return SimpleNamespace(images=SimpleNamespace(facts=facts))


def test_two_prompts_can_be_swapped_and_one_cannot() -> None:
    assert PanelsSuite(_panel_rows("same", TOPS[:2]), PanelsConfig(), Path())._swapped() == [1, 0]
    for few in ([], _panel_rows("same", TOPS[:1]), _panel_rows("same", [*TOPS, TOPS[0]])):
        (problem,) = panel_problems(few)
        assert "must be two or more" in problem


def test_pictures_of_a_buffer_that_does_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_to_image, "host_memory", lambda: (4 * SIDE**2 * 3, 0))
    oracle: Any = Oracle()
    suite = PanelsSuite(_panel_rows("red", TOPS), PanelsConfig(candidates=2), tmp_path)
    with pytest.raises(ConfigError, match="2 candidates of 3 captions are"):
        suite.measure(lambda: oracle)


def test_a_set_without_an_operation_is_refused(tmp_path: Path) -> None:
    data = str(tmp_path / "raw")
    pack(["panels"], open_store(data), PackConfig(count=6, pixels=16, validation=0.5))
    records = list(stored_records(RawSource(open_store(data), "validation")))
    names = [name for name, caption in CAPTIONS.items()
             if sum(record.caption == caption for record in records) < 2]  # fmt: skip
    assert len(names) > 4
    inputs = cast(Any, SimpleNamespace(data=data, out=tmp_path))
    with pytest.raises(InputError, match=f"2 different upper panels for {', '.join(names)}; pack"):
        panels.prepare(inputs, PanelsConfig(), None)


def test_held_out_panels_are_chosen_by_key(tmp_path: Path) -> None:
    data = str(tmp_path / "raw")
    pack(["panels"], open_store(data), PackConfig(count=90, pixels=16, validation=0.5))
    records = list(stored_records(RawSource(open_store(data), "validation")))
    inputs = cast(Any, SimpleNamespace(data=data, out=tmp_path))
    chosen_by = [panels.prepare(inputs, PanelsConfig(per_operation=3, seed=s), None).prompts
                 for s in (1, 1, 2)]  # fmt: skip
    assert chosen_by[0] == chosen_by[1] != chosen_by[2]
    for rows in chosen_by:
        assert [row["caption"] for row in rows] == [c for c in CAPTIONS.values() for _ in range(3)]
        pictures = {record.key: record for record in records}
        for row in rows:
            record = pictures[row["key"]]
            (name,) = [name for name in OPERATIONS if CAPTIONS[name] == record.caption]
            top = Panel(**row["top"])
            assert record.caption == row["caption"]
            assert (decode_rgb(record.image, "x") == render_pair(name, top, 16)).all()
    given = panels.prepare(inputs, PanelsConfig(), chosen_by[2])
    assert given.prompts == chosen_by[2]


def _candidates(caption: str, *pictures: Any) -> Candidates:
    count = len(pictures)
    return Candidates(
        caption=caption, pictures=np.stack(pictures), scores=np.zeros(count), drawn=np.arange(count)
    )


def _shown(caption: str) -> NDArray[np.uint8]:
    return render(parse_caption(caption), 32, 0, 0)


def test_tasks_of_geneval_by_hand() -> None:
    """Of red: itself and the blue one; of blue: itself and nothing."""
    drawn = {
        RED: _candidates(RED, _shown(RED), _shown(BLUE)),
        BLUE: _candidates(BLUE, _shown(BLUE), np.full((32, 32, 3), 240, np.uint8)),
    }
    asked: list[Any] = []
    studio: Any = SimpleNamespace(
        tell_cut=asked.append, draw=lambda captions, settings: [drawn[c] for c in captions]
    )
    prompts: Any = [{"task": task, "caption": caption}
                    for task, captions in (("colours", [RED, BLUE]), ("counting", [BLUE, RED]))
                    for caption in captions]  # fmt: skip
    suite = geneval.prepare(cast(Any, None), GenevalConfig(candidates=2), prompts)
    measured = suite.measure(lambda: studio)
    assert suite.prompts is prompts and asked == [[RED, BLUE]]
    common = {"prompts": 2, "pictures": 4}
    assert measured.results == {
        "candidates": 2,
        "overall": (0.5 + 0.75) / 2,
        "rows": [
            {"task": "counting", **common, "correct": 0.75, "chance": 0.75},
            {"task": "colours", **common, "correct": 0.5, "chance": 0.25},
        ],
    }
    assert measured.headline == {"overall": 0.625, "counting": 0.75, "colours": 0.5}


def test_each_task_of_geneval_has_its_number_of_prompts() -> None:
    suite = geneval.prepare(cast(Any, None), GenevalConfig(per_task=2), None)
    assert isinstance(suite, GenevalSuite)
    assert [row["task"] for row in suite.prompts] == [name for name in TASKS for _ in (0, 1)]


def test_no_two_objects_have_no_position() -> None:
    scene = parse_caption(f"{RED} left of {BLUE}")
    assert not placed(scene, []) and not CRITERIA["position"].holds(scene, [])
    assert CRITERIA["position"].applies(scene)
    assert not CRITERIA["position"].applies(parse_caption(RED))


class Values:
    """A network: a picture's first value is its feature; its tens modulo 3 are its class."""

    name, label, proxy = "values", "proxy FID and IS", True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, pictures: NDArray[np.uint8]) -> Any:
        self.calls += 1
        values = pictures[:, 0, 0, 0].astype(np.float32)
        logits = 1000 * np.eye(3, dtype=np.float32)[(values // 10).astype(int) % 3]
        return values[:, None], logits


VALUES = {"first": [10, 20, 30, 40], "second": [50, 60, 70, 80]}
SCORES = {"first": [1.0, 2.0, 4.0, 3.0], "second": [9.0, 8.0, 1.0, 2.0]}


def _flat(value: int) -> NDArray[np.uint8]:
    return np.full((4, 4, 3), value, np.uint8)


def _of_set(monkeypatch: pytest.MonkeyPatch, captions: list[str]) -> Any:
    """A set of two real pictures, of values 0 and 20."""
    texts = [SimpleNamespace(text=caption) for caption in captions]
    monkeypatch.setattr(best_of_n, "facts_in", lambda path: SimpleNamespace(pixels=4))
    return SimpleNamespace(
        choose=lambda count, seed: texts[:count], pictures_of=lambda chosen: ["0", "20"],
        read=lambda name: encode_png(_flat(int(name))), name="set", fingerprint="print",
    )  # fmt: skip


def _inputs(out: Path) -> Any:
    models, digests = SimpleNamespace(dvae=None), {"prior": "digest"}
    return SimpleNamespace(models=models, digests=digests, out=out, data="here", device=CPU)


def _ranked(captions: list[str], draws: Any) -> list[Candidates]:
    (caption,) = captions
    assert draws.candidates == 4
    scores = np.array(SCORES[caption], np.float32)
    order = np.argsort(-scores)
    pictures = np.stack([_flat(value) for value in VALUES[caption]])[order]
    return [Candidates(caption=caption, pictures=pictures, scores=scores[order], drawn=order)]


def test_fid_and_is_of_the_best_of_n_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real: mean 10, variance 200. The best of 4 are 30 and 50: mean 40, variance 200: 30^2.

    The best of 2 are 20 and 50, 25^2 + 450 + 200 - 2 * 300; then 30 and 80, 45^2 + 1250 + 200 -
    2 * 500. Of single ones, 40 apart, the variances add 800 + 200 - 2 * 400.
    """
    updates: list[int] = []

    @contextmanager
    def progress(name: str, total: int) -> Iterator[Any]:
        yield SimpleNamespace(update=updates.append)

    monkeypatch.setattr(best_of_n, "progress", progress)
    evaluation, network = _of_set(monkeypatch, list(VALUES)), Values()
    settings = BestOfNConfig(candidates=4, captions=2)
    suite = BestOfNSuite(_inputs(tmp_path), settings, evaluation, network)
    told: list[list[str]] = []
    measured = suite.measure(lambda: cast(Any, SimpleNamespace(draw=_ranked, tell_cut=told.append)))
    assert told == [["first", "second"]]
    assert updates == [1, 2] and network.calls == 3
    fids = {1: [600, 1100, 1800, 2700], 2: [675, 2475], 4: [900]}
    scores = {1: [2.0, 2.0, 2.0, 2.0], 2: [1.0, 2.0], 4: [2.0]}
    rows = [
        {"n": n, "groups": len(fids[n]), "fid": np.mean(fids[n]), "is": np.mean(scores[n])}
        | ({"fid_std": np.std(fids[n]), "is_std": np.std(scores[n])} if n < 4 else {})
        for n in fids
    ]
    assert [{k: pytest.approx(v) for k, v in row.items()} for row in rows] == measured.results.pop(
        "rows"
    )
    assert measured.results == {
        "label": "proxy FID and IS", "network": "values", "captions": 2, "pictures": 2,
        "candidates": 4,
    }  # fmt: skip
    assert measured.headline == pytest.approx(
        {"proxy FID, best of 4": 900.0, "proxy IS, best of 4": 2.0}
    )
    again = BestOfNSuite(_inputs(tmp_path), settings, evaluation, network)
    assert again.measure(_no_studio).headline == measured.headline and network.calls == 3
    fewer = BestOfNConfig(candidates=4, captions=2, repeats=1)
    averaged = BestOfNSuite(_inputs(tmp_path), fewer, evaluation, network).measure(_no_studio)
    assert [row["fid"] for row in averaged.results["rows"]] == pytest.approx([600, 675, 900])
    assert network.calls == 3 and "fid_std" not in averaged.results["rows"][0]
    other = BestOfNConfig(candidates=4, captions=2, seed=1)
    assert BestOfNSuite(_inputs(tmp_path), other, evaluation, network)._blocks != suite._blocks


def _no_studio() -> Any:
    raise AssertionError("all blocks are there")


def test_accuracy_of_the_best_of_n_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first caption, the better of two is right; of the second, neither."""
    evaluation, network = _of_set(monkeypatch, [RED, BLUE]), Values()
    monkeypatch.setattr(network, "proxy", False, raising=False)
    shown = {RED: np.stack([_shown(RED), _shown(BLUE)]), BLUE: np.stack([_shown(RED)] * 2)}

    def draw(captions: list[str], draws: Any) -> list[Candidates]:
        (caption,) = captions
        scores = np.array([0.5, 0.25], np.float32)
        drawn = np.array([1, 0])
        return [Candidates(caption="", pictures=shown[caption], scores=scores, drawn=drawn)]

    settings = BestOfNConfig(candidates=2, captions=2)
    suite = BestOfNSuite(_inputs(tmp_path), settings, evaluation, network)
    measured = suite.measure(lambda: cast(Any, SimpleNamespace(draw=draw, tell_cut=list)))
    assert [row["accuracy"] for row in measured.results["rows"]] == [0.25, 0.5]
    assert measured.headline["accuracy, best of 2"] == 0.5
    assert set(measured.headline) == {f"{x}, best of 2" for x in ("accuracy", "FID", "IS")}


def test_a_set_with_two_captions_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = _of_set(monkeypatch, list(VALUES))
    monkeypatch.setattr(best_of_n, "open_evaluation", lambda data: evaluation)
    monkeypatch.setattr(best_of_n, "open_network", lambda *given: Values())
    inputs, settings = _inputs(tmp_path), BestOfNConfig(candidates=4, captions=2)
    rows = [{"caption": "first"}, {"caption": "second"}]
    for prompts in (None, rows):
        assert best_of_n.prepare(inputs, settings, prompts).prompts == rows
    with pytest.raises(InputError, match="does not choose the prompts"):
        best_of_n.prepare(inputs, settings, rows[:1])
    with pytest.raises(InputError, match="fewer than two captions"):
        best_of_n.prepare(inputs, BestOfNConfig(candidates=4, captions=1), None)


@pytest.mark.parametrize(
    ("proxy", "radius", "names"),
    [
        (False, 0.0, ["FID", "IS"]),
        (True, 0.0, ["proxy FID", "proxy IS"]),
        (False, 2.0, ["FID at blur 2", "IS at blur 2"]),
    ],
)
def test_the_headline_of_a_score_is_its_least_blur(
    proxy: bool, radius: float, names: list[str]
) -> None:
    rows = [{"radius": radius, "fid": 30.0, "is": 4.0}, {"radius": 8.0, "fid": 20.0, "is": 3.0}]
    scores, calls = {"rows": rows, "data": "a/path", "captions": 9}, []
    job: Any = SimpleNamespace(
        prompts=[], facts={}, proxy=proxy, run=lambda *given: calls.append(given) or scores
    )
    measured = fid.FidSuite(job, cast(Any, "member")).measure(_no_studio)
    assert measured.results == {"rows": rows, "captions": 9} and calls == [(_no_studio, "member")]
    assert measured.headline == dict(zip(names, [30.0, 4.0], strict=True))


def test_a_score_reads_the_set_of_its_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"caption": RED}]
    monkeypatch.setattr(
        fid, "open_job", lambda *given: SimpleNamespace(prompts=rows, facts={}, given=given)
    )
    inputs: Any = SimpleNamespace(
        data="coco:somewhere", models=None, digests={}, out=tmp_path, device=CPU, member=None
    )
    for prompts in (None, rows):
        assert fid.prepare_coco(inputs, FidConfig(), prompts).prompts == rows
    with pytest.raises(InputError, match="does not choose the prompts of the file"):
        fid.prepare_coco(inputs, FidConfig(), [{"caption": BLUE}])
    with pytest.raises(InputError, match=r"suite cub reads cub:DIR, not coco:somewhere; .* coco"):
        fid.prepare_cub(inputs, FidConfig(), None)
