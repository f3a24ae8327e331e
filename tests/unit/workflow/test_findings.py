"""The report's sentences, costs and worst examples, of figures with known answers."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.unit.workflow.test_report import ACCURACY, BEST, CAPTIONS, SCORES, demo_folder
from workflow.report.costs import costs_of
from workflow.report.findings import findings_of, worst_rows
from workflow.report.page import write_report

PRIOR = {"validation_loss": 2.0, "shuffled_caption_loss": 2.5, "per_position_entropy": 3.0}


def _texts(summary: dict[str, Any], rows: Any = (), scores: Any = None) -> list[tuple[str, str]]:
    whole = {"prior": PRIOR, "clip": {"accuracy": 0.5}, **summary}
    return [(each.kind, each.text) for each in findings_of(whole, rows, scores)]


def _has(kind: str, text: str, findings: list[tuple[str, str]]) -> bool:
    return any(kind == k and text in t for k, t in findings)


def test_a_prior_is_judged_by_its_bounds() -> None:
    findings = _texts({})
    assert _has(
        "learned", "reads captions: the right one makes a picture likelier (held-out", findings
    )
    assert _has("learned", "(2 nats a code, and 3 from each position's counts alone)", findings)
    blind = {**PRIOR, "shuffled_caption_loss": 2.001, "per_position_entropy": 2.0}
    findings = _texts({"prior": blind})
    assert _has("fails", "does not read captions yet", findings)
    assert _has("fails", "no more than how often each code occurs", findings)


def test_accuracy_is_divided_into_what_prior_and_dvae_lose() -> None:
    accuracy = {**ACCURACY, "reconstruction": 0.9, "guidance": {"1": 0.5, "3": 0.75, "4": 0.75}}
    findings = _texts({"caption_accuracy": accuracy})
    assert _has("learned", "Of 3 held-out captions, 82% are drawn exactly as they say", findings)
    assert _has("learned", "by chance it would be 12%", findings)
    assert _has("fails", "8% of captions fail although the dVAE could show them", findings)
    assert _has("fails", "The dVAE loses 10% of the true pictures", findings)
    assert _has("learned", "the best of 64 is exact in 82% of cases, a single one in 50%", findings)
    assert _has("note", "Of the guidance scales, 3 is best: 75%", findings)
    partial = {**ACCURACY, "best_of_64_prompts": 1, "best_of_32_prompts": 1}
    text = "58% are drawn exactly as they say (the best of 16 by"
    assert _has("learned", text, _texts({"caption_accuracy": partial}))
    nothing = {"prompts": 8, "best_of_1": 0.0, "best_of_2": 0.0, "chance": 0.0, "reconstruction": 1}
    findings = _texts({"caption_accuracy": nothing, "clip": {"accuracy": 1 / 64}})
    assert _has("fails", "0% are drawn exactly", findings)
    assert _has("fails", "Ranking more candidates does not help", findings)
    assert _has("fails", "CLIP picks the right caption of 64 for 2%", findings)
    kinds = [kind for kind, _ in findings]
    assert kinds == sorted(kinds, key=["learned", "fails", "note"].index)


def test_words_that_fail_are_named_with_their_counts() -> None:
    rows = [
        {"caption": f"two {colour} dots", "exact": [colour == "red", True], "scores": [0.5, 0.1]}
        for colour in ("red", "blue", "green")
    ]
    rows += [{"caption": "a red dot", "exact": [True, True], "scores": [0.5, 0.1]}] * 3
    findings = _texts({}, rows)
    assert _has("fails", "fail most often: “dots” (2 of 3), “two” (2 of 3).", findings)
    assert not any("most often" in text for _, text in _texts({}, rows[3:]))
    assert not any("most often" in t for _, t in _texts({}, [{"caption": "x", "scores": [1.0]}]))
    assert _has("note", "FID 31.25 (lower is better), IS 4.5", _texts({}, [], SCORES))


def test_worst_captions_come_first() -> None:
    def row(name: str, score: float, *exact: bool) -> dict[str, Any]:
        return {"caption": name, "scores": [score], **({"exact": list(exact)} if exact else {})}

    rows = [row("right", 0.1, True, False), row("a", 0.2, False, True), row("b", 0.3, False, False)]
    rows += [row("c", 0.4, False, False)]
    assert [each["caption"] for each in worst_rows(rows, 9)] == ["c", "b", "a"]
    assert [each["caption"] for each in worst_rows(rows, 1)] == ["c"]
    unchecked = [row("x", 0.3), row("y", 0.1), row("z", 0.2), row("y", 0.15), row("z", 0.4)]
    assert [each["caption"] for each in worst_rows(unchecked, 2)] == ["y", "z"]


def test_costs_count_nodes_workers_cores_and_gpus() -> None:
    summary = {"seconds": {"pack": 900, "prior": 2700}, "cores": 2}
    costs = costs_of(summary)
    assert (costs["seconds"], costs["core_hours"], costs["gpu_hours"]) == (3600, 2.0, 0.0)
    assert costs["dollars"] == pytest.approx(0.1) and costs["price"] == "$0.05 a core and hour"
    assert [row["share"] for row in costs["rows"]] == [0.25, 0.75]
    used = {"pack": {"workers": 8, "cpus": 4}, "prior": {"nodes": 2, "gpus": 8, "cpus": 96}}
    costs = costs_of({**summary, "resources": used})
    assert costs["core_hours"] == 8 + 144 and costs["gpu_hours"] == 12
    assert costs["dollars"] == 48 and costs["price"] == "$4 an H100 and hour"


def test_the_page_begins_with_pictures_and_ends_with_commands(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path, **ACCURACY)
    path = folder / "samples" / "candidates.json"
    rows = json.loads(path.read_text())["rows"]
    for i, row in enumerate(rows):
        row["exact"] = [i != 1, *[False] * 4]
    path.write_text(json.dumps({"rows": rows}))
    html = write_report(folder).read_text()
    order = ["best pictures", "<h2>Findings", "Worst examples", "<h2>Curves", "<h2>Time and cost"]
    order += ["<h2>Leaderboard row", "<h2>Commands to try next", "<h2>All pictures"]
    places = [html.index(text) for text in order]
    assert places == sorted(places)
    worst = html[places[2] : places[3]]
    assert worst.count("<img") == 1 and "&lt;b&gt;blue&lt;/b&gt;" in worst
    assert "(0 of 5 exact)" in worst and "(1 of 5 exact)" in html[places[0] : places[1]]
    assert html[places[0] : places[1]].count("<img") == len(CAPTIONS) == len(BEST)
    assert "| run | data | prior | steps |" in html and "6 layers of 192 | 1,200 |" in html
    assert f"tapir report {folder}" in html and "tapir sample &#39;a &#34;quoted" in html


def test_the_strip_shows_the_best_candidate_alone(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path)
    image = re.search(r'<img src="data:image/png;base64,([^"]+)"', write_report(folder).read_text())
    assert image
    flags = cv2.IMREAD_COLOR
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(image[1]), np.uint8), flags)
    tiles = cv2.imread(str(folder / "samples" / "0.png"), flags)
    assert tiles is not None and shown is not None
    np.testing.assert_array_equal(shown, tiles[:, : tiles.shape[1] // 5])
