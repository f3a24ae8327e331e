"""leaderboard.md: one table for each set of prompts, best rows first."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import CorruptError, InputError
from tests.unit.workflow.test_report import demo_folder
from workflow.report.page import write_report


def _suite(
    folder: Path, suite: str, figures: dict[str, float], prompts: int = 2, **changes: Any
) -> None:
    body: dict[str, Any] = {
        "suite": suite,
        "facts": {},
        "prompts": [{"caption": f"caption {i}"} for i in range(prompts)],
        "settings": {"candidates": 4, "temperature": 1.0},
        "models": {"prior": "1" * 64, "dvae": "2" * 64},
        "headline": [{"name": name, "value": value} for name, value in figures.items()],
        "results": {"rows": []},
    }
    for name, change in changes.items():
        body[name] = {**body[name], **change}
    folder.mkdir(parents=True)
    (folder / "suite.json").write_text(json.dumps(body))


CURVE = {
    "label": "proxy FID and IS",
    "rows": [
        {"n": n, "fid": 9.0 - n, "fid_std": 0.5, "is": 1.0 + n, "is_std": 0.1, "accuracy": n / 8}
        for n in (1, 2, 4)
    ],
}


def test_rows_of_the_same_prompts_are_in_one_table_best_first(tmp_path: Path) -> None:
    _suite(tmp_path / "a", "shapes", {"exact": 0.5, "size": 0.75})
    _suite(tmp_path / "b" / "c", "shapes", {"exact": 0.625}, settings={"temperature": 0.5})
    _suite(tmp_path / "d", "shapes", {"exact": 0.25}, prompts=3, models={"prior": "3" * 64})
    _suite(tmp_path / "x", "coco", {"FID": 20.0}, models={"dvae": "4" * 64})
    _suite(tmp_path / "y", "coco", {"FID": 10.0})
    _suite(tmp_path / "z", "coco", {"FID": 5.0}, facts={"network": "another"})
    target = write_report(tmp_path)
    assert target == tmp_path / "leaderboard.md"
    tables = [part.split("\n\n") for part in target.read_text().split("\n## ")[1:]]
    assert len({title for title, _ in tables}) == len(tables), "a heading names one table"
    bodies = [(title.split(" (")[0], rows.strip().split("\n")) for title, rows in tables]
    assert [title for title, _ in bodies] == [
        "coco: 2 prompts",
        "coco: 2 prompts, network another",
        "shapes: 2 prompts",
        "shapes: 3 prompts",
    ]
    both = next(rows for title, rows in bodies if len(rows) == 4 and title.startswith("coco"))
    assert both == [
        "| folder | FID | prior | dvae |",
        "| --- | --- | --- | --- |",
        "| y | 10 | 11111111 | 22222222 |",
        "| x | 20 | 11111111 | 44444444 |",
    ]
    assert bodies[2][1] == [
        "| folder | exact | size | temperature | prior |",
        "| --- | --- | --- | --- | --- |",
        "| b/c | 0.625 |  | 0.5 | 11111111 |",
        "| a | 0.5 | 0.75 | 1.0 | 11111111 |",
    ]
    assert bodies[3][1][2:] == ["| d | 0.25 | 33333333 |"]


@pytest.mark.seconds
def test_a_curve_against_n_is_beside_its_file_and_in_the_report(tmp_path: Path) -> None:
    bare = write_report(demo_folder(tmp_path)).read_text()
    assert "Suites" not in bare and not (tmp_path / "leaderboard.md").exists()
    _suite(tmp_path / "suites" / "best", "best-of-n", {"proxy FID": 5.0}, results=CURVE)
    html = write_report(tmp_path).read_text()
    assert html.count("<svg") == bare.count("<svg") + 1 and "best-of-n: 2 prompts" in html
    assert '<td class="n">5</td>' in html
    svg = (tmp_path / "suites" / "best" / "curve.svg").read_text()
    assert svg.startswith("<svg") and "proxy FID" in svg and "exact captions" in svg
    board = (tmp_path / "leaderboard.md").read_text()
    assert "![suites/best](suites/best/curve.svg)" in board
    assert write_report(tmp_path).read_text() == html


def test_files_without_figures_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _suite(tmp_path / "a", "shapes", {"exact": 0.5})
    for name, body in (("b", {}), ("c", {"suite": "shapes"}), ("d", {"suite": "x", "facts": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "suite.json").write_text(json.dumps(body))
    board = write_report(tmp_path).read_text()
    assert "| a | 0.5 |" in board and board.count("\n| ") == 3
    assert caplog.text.count("holds no figures of a suite") == 3
    with pytest.raises(InputError, match=r"no summary\.json and no suite\.json"):
        write_report(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "Expecting"),
        ([], "suite, facts"),
        ({"results": []}, "results missing or wrong"),
        ({"headline": {}}, "headline missing or wrong"),
        ({"headline": []}, "headline missing or wrong"),
        ({"headline": [{"name": "exact"}]}, "headline missing or wrong"),
        ({"prompts": 3, "facts": None}, "facts, prompts missing or wrong"),
        ({"suite": "best-of-n"}, "results: KeyError"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(change: Any, text: str, tmp_path: Path) -> None:
    _suite(tmp_path / "a", "shapes", {"exact": 0.5})
    path = tmp_path / "a" / "suite.json"
    body = json.loads(path.read_text()) | change if isinstance(change, dict) else change
    path.write_text("{" if change is None else json.dumps(body))
    with pytest.raises(CorruptError) as caught:
        write_report(tmp_path)
    message = str(caught.value)
    assert str(path) in message and text in message and "tapir evaluate --suite" in message


def test_a_gallery_without_its_picture_is_named(tmp_path: Path) -> None:
    _suite(tmp_path / "a", "shapes", {"exact": 0.5})
    rows = [{"caption": "a cat", "file": "0.png"}]
    index = {"title": "t", "text": "", "rows": rows}
    (tmp_path / "a" / "gallery.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=r"gallery\.json names a/0\.png, which is missing"):
        write_report(tmp_path)
