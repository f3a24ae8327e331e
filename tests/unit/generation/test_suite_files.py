"""A suite.json is checked whole when it is read: keys, types, settings and prompts."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError, InputError
from data_pipeline.sources.drawn.panels import CAPTIONS
from generation.evaluation.suites.record import read_recorded

RED, BLUE = {"caption": "a small red circle"}, {"caption": "a large blue square"}
PAIR = {"caption": "a small red circle left of a large blue square"}
UPPER = {"form": "circle", "colour": "blue", "row": 3, "column": 5}
PANELS = [
    {"caption": CAPTIONS["red"], "top": UPPER},
    {"caption": CAPTIONS["red"], "top": {**UPPER, "column": 9}},
]


def read(folder: Path, **body: Any) -> Any:
    path = folder / "mine.json"
    path.write_text(json.dumps(body))
    return read_recorded(path)


@pytest.mark.parametrize(
    ("suite", "prompts"),
    [
        ("shapes", [RED, BLUE]),
        ("clipscore", [RED, {"caption": "a fox"}]),
        (
            "geneval-style",
            [{**each, "task": task} for each in (RED, BLUE) for task in ("size", "colours")],
        ),
        ("panels", [{**PANELS[0], "key": "k"}, PANELS[1]]),
        ("coco", [{**RED, "pictures": ["a.jpg"]}]),
        ("best-of-n", [RED, BLUE]),
    ],
)
def test_right_prompts_are_read(suite: str, prompts: list[Any], tmp_path: Path) -> None:
    recorded = read(tmp_path, suite=suite, prompts=prompts)
    assert (recorded.name, recorded.prompts) == (suite, prompts)


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            suite="geneval-style",
            promptz=[RED],
            facts=[],
            settings={"sed": 1, "candidates": "two"},
            prompts=[{"caption": "a fox", "task": "size"}, {**RED, "task": ["size"]}, RED, 3],
        )
    for text in (
        "mine.json: unknown 'promptz'; did you mean 'prompts'?",
        "facts=[] must be a mapping",
        "settings: unknown 'sed'; did you mean 'seed'?",
        "settings.candidates='two' must be a whole number",
        "prompts[0].caption: 'a fox' is not a caption of the shapes generator",
        "prompts[1].task: ['size'] is no task; geneval-style has single object",
        "prompts[2]: task is missing",
        "prompts[3]=3 must be a mapping of caption, task",
    ):
        assert text in str(caught.value)
    assert str(caught.value).count("mine.json: ") == 8


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"suite": ["shapes"]}, r"suite=\['shapes'\] must be a text"),
        ({"prompts": [RED, BLUE]}, "suite: missing; it is one of shapes"),
        ({"suite": "shapes", "prompts": []}, "at least 2 different captions, and has 0"),
        ({"suite": "shapes", "prompts": [RED, RED]}, "at least 2 different captions, and has 1"),
        (
            {"suite": "shapes", "prompts": [RED, BLUE, RED]},
            "the suite has 'a small red circle' 2 times: .* could stand for itself; give it once",
        ),
        (
            {"suite": "geneval-style", "prompts": [{**x, "task": "size"} for x in (RED, BLUE) * 3]},
            "the task 'size' has 'a small red circle' 3 times",
        ),
        ({"suite": "clipscore", "prompts": [RED, RED, BLUE]}, "red circle' 2 times"),
        ({"suite": "shapes", "settings": {"prompts": 1}}, "settings: prompts=1 must be at least"),
        ({"suite": "shapes", "settings": {"candidates": 0}}, "candidates and batch must be"),
        ({"suite": "shapes", "prompts": [RED, {**BLUE, "top": 3}]}, r"\[1\]: unknown 'top'"),
        ({"suite": "shapes", "prompts": {"caption": "a"}}, "prompts=.* must be a list"),
        ({"suite": "clipscore", "prompts": [RED]}, "at least 2 different captions, and has 1"),
        ({"suite": "clipscore", "prompts": [RED, {"caption": None}]}, "None must be a text"),
        ({"suite": "clipscore", "prompts": [RED, {"text": "a"}]}, "caption is missing"),
        ({"suite": "geneval-style", "prompts": []}, "at least 2 different captions, and has 0"),
        (
            {"suite": "geneval-style", "prompts": [{**RED, "task": "size"}]},
            "the task 'size' needs at least 2 different captions, and has 1",
        ),
        (
            {"suite": "geneval-style", "prompts": [{**PAIR, "task": "size"}]},
            "is no caption for the task 'size'",
        ),
        ({"suite": "panels", "prompts": []}, "every operation: the prompts must be two or more"),
        ({"suite": "panels", "prompts": PANELS[:1]}, "red: the prompts must be two or more"),
        ({"suite": "panels", "prompts": PANELS[:1] * 2}, "with different upper panels"),
        ({"suite": "panels", "prompts": [PANELS[0], RED]}, r"prompts\[1\]: top is missing"),
        (
            {"suite": "panels", "prompts": [{**PANELS[0], "top": {**UPPER, "form": ["T"]}}]},
            "is no upper panel: it needs form",
        ),
        ({"suite": "pairs", "prompts": [{**RED, "pictures": "a.jpg"}]}, "a list of texts"),
        ({"suite": "shapes", "prompts": [{"caption": "x"}] * 30}, "prompts: 10 further problems"),
    ],
)
def test_wrong_files_are_refused(body: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(tmp_path, **body)


@pytest.mark.parametrize("text", ["[]", "{", "\xff"])
def test_what_is_no_mapping_is_no_suite(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"is not a suite\.json"):
        read_recorded(tmp_path / "mine.json")
