"""The suite panels: its shares by hand, its prompts, and the files that it writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InputError
from core.files.atomic import Json
from core.storage.store import open_store
from data_pipeline.config import PackConfig
from data_pipeline.packing.pack import pack
from data_pipeline.sources.drawn.panels import CAPTIONS, OPERATIONS, Panel
from generation.evaluation.suites.config import PanelsConfig
from generation.evaluation.suites.panels import PanelsSuite, judged
from generation.evaluation.suites.prompts import panel_problems
from generation.evaluation.suites.run import run_suite
from generation.text_to_image import open_studio
from tests.unit.finished import write_models

TOPS = [
    Panel(form="circle", colour="blue", row=3, column=5),
    Panel(form="T", colour="green", row=4, column=9),
    Panel(form="cross", colour="purple", row=3, column=12),
]
OTHERS = [TOPS[1], TOPS[2], TOPS[0]]


def test_shares_by_hand() -> None:
    right = [OPERATIONS["flipped"](top) for top in TOPS]
    below: list[list[Panel | None]] = [
        [right[0], right[0]],
        [replace(right[1], colour="red"), None],
        [right[2], right[0]],
    ]
    swapped: list[list[Panel | None]] = [[right[1], right[0]], [right[2], None], [right[0], None]]
    again: list[list[Panel | None]] = [[right[0]], [right[1]], [None]]
    figures = judged("flipped", TOPS, OTHERS, below, swapped, again)
    expected = {
        "exact": 3 / 6,
        "swapped": 1 / 6,
        "swapped_follows": 3 / 6,
        "chance": 1 / 6,
        "upper_bound": 2 / 3,
        "form": 4 / 6,
        "colour": 3 / 6,
        "row": 5 / 6,
        "column": 4 / 6,
        "style": 5 / 6,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert 0 < figures["exact_low95"] < 0.5 and figures["prompts"] == 3


def test_swapped_prompts_differ() -> None:
    rows = [_row(caption, top) for caption in list(CAPTIONS.values())[:2] for top in TOPS]
    suite = PanelsSuite(rows, PanelsConfig(), Path())
    others = suite._swapped()
    assert sorted(others[:3]) == [0, 1, 2] and sorted(others[3:]) == [3, 4, 5]
    assert all(i != other for i, other in enumerate(others))
    for wrong in (rows[2:], [rows[0], *rows]):
        (problem,) = panel_problems(wrong)
        assert problem.startswith("prompts: same: the prompts must be two or more")


def test_pictures_and_figures_of_each_operation_without_a_clip(tmp_path: Path) -> None:
    data, models = str(tmp_path / "raw"), write_models(tmp_path / "models", [*CAPTIONS.values()])
    pack(["panels"], open_store(data), PackConfig(count=400, pixels=16, validation=0.3))
    config, out = PanelsConfig(per_operation=4, candidates=2), tmp_path / "out"
    body = run_suite("panels", data, replace(models, clip=tmp_path / "no-clip"), config, out)
    names = [f"{name}.png" for name in OPERATIONS]
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(["suite.json", "suite-request.json", "gallery.json", *names])
    gallery = json.loads((out / "gallery.json").read_bytes())["rows"]
    assert [(row["file"], row["caption"]) for row in gallery] == list(
        zip(names, CAPTIONS.values(), strict=True)
    )
    rows = body["results"]["rows"]
    assert [(row["operation"], row["prompts"]) for row in rows] == [(x, 4) for x in OPERATIONS]
    assert all(row["exact"] == 0 for row in rows), "an untrained prior"
    assert len({json.dumps(row["top"]) for row in body["prompts"][:4]}) == 4


def test_a_prompt_draws_the_same_pictures_beside_others(tmp_path: Path) -> None:
    """Whatever the other prompts and the number of candidates, as the file's rule of keys says."""
    models = write_models(tmp_path / "models", [*CAPTIONS.values()])
    rows = [_row(CAPTIONS["red"], top) for top in TOPS]
    studio = open_studio(models, rerank=False)
    few, many = (
        PanelsSuite(prompts, PanelsConfig(candidates=candidates, temperature=2.0), tmp_path)
        for prompts, candidates in ((rows[1:], 1), (rows, 3))
    )
    drawn = few._draw(studio, few._tops, "few"), many._draw(studio, many._tops, "many")
    assert (drawn[0] == drawn[1][1:, :1]).all()


def test_pairs_of_another_source_are_refused(tmp_path: Path) -> None:
    data, models = str(tmp_path / "raw"), write_models(tmp_path / "models", ["a small red circle"])
    pack(["shapes"], open_store(data), PackConfig(count=40, pixels=16, validation=0.3))
    with pytest.raises(InputError, match="not a caption of the panels generator"):
        run_suite("panels", data, models, PanelsConfig(), tmp_path / "out")


def _row(caption: str, top: Panel) -> Json:
    upper = {name: getattr(top, name) for name in ("form", "colour", "row", "column")}
    return {"caption": caption, "key": "k", "top": upper}
