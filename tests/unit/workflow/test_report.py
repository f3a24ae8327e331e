"""report.html: its gallery, its search, and sections that appear with their data."""

import base64
import json
import re
import shlex
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cli.serving.study import study
from core.errors import CorruptError, InputError
from core.keys import keyed_rng
from data_pipeline.images.crops import encode_png
from generation.text_to_image import picture_grid
from serving.config import ServeConfig
from workflow.report.page import write_report
from workflow.report.plots import best_of_counts

CAPTIONS = ["a small red circle", 'a "quoted" <b>blue</b> square', "two green dots & a circle"]
BEST = (0.25, 0.75, 0.5)
"""Score of each caption's best candidate."""
ACCURACY = {
    "prompts": 3,
    **{f"best_of_{n}": 0.5 + n / 200 for n in (1, 2, 4, 8, 16, 32, 64)},
    "best_of_1_low95": 0.25,
    "chance": 0.125,
    "reconstruction": 1.0,
}
SCORES = {
    "label": "FID and IS on held-out shapes",
    "network": "features of the dVAE",
    "rows": [
        {"set": kind, "radius": r, "fid": 31.25 + r, "is": 4.5 - r / 4, "captions": 200 + int(r)}
        for kind in ("all", "without overlap")
        for r in (0.0, 1.0, 2.0)
    ],
}

_COMMAND = re.compile(r"<pre [^>]*>(tapir .*)</pre>")


def demo_folder(folder: Path, candidates: int = 5, side: int = 32, **accuracy: Any) -> Path:
    """The files that the stages of a demo write, with generated numbers and pictures."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    (folder / "scores").mkdir()
    rows = []
    for i, caption in enumerate(CAPTIONS):
        shape = (candidates, side, side, 3)
        pictures = keyed_rng(i, "pictures").integers(0, 256, shape, np.uint8)
        (samples / f"{i}.png").write_bytes(encode_png(picture_grid([pictures], 2)))
        drawn = BEST[i] - keyed_rng(i, "scores").random(candidates - 1)
        scores = [BEST[i], *sorted(drawn.tolist(), reverse=True)]
        rows.append({"caption": caption, "file": f"{i}.png", "scores": scores})
    (samples / "candidates.json").write_text(json.dumps({"rows": rows}))
    for name in ("reconstructions", "image-prompts"):
        shutil.copy(samples / "0.png", samples / f"{name}.png")
    bounds = {"image_loss": 2.0, "per_position_entropy": 3.0, "shuffled_caption_loss": 2.5}
    for stage in ("dvae", "prior", "clip"):
        (folder / stage).mkdir()
        row = {"step": 1, "loss": 3.0, **bounds}
        lines = [json.dumps(r) for r in (row, {**row, "split": "validation"})]
        (folder / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {"stage": "prior", "loop": {"steps": 1200}, "model": {"layers": 6, "dim": 192}}
    (folder / "prior" / "config.json").write_text(json.dumps(config))
    mesh = {"tensor": 2, "pipeline": 2, "data": 2}
    prior = {"engine": "reference", "mesh": mesh, "tokens_per_second": 1234, "compress_rank": 0}
    prior |= {"validation_loss": 2.0, "per_position_entropy": 3.0, "shuffled_caption_loss": 2.5}
    summary = {
        "data": "shapes",
        "size": "tiny",
        "seconds": {"prior": 9.5},
        "commands": ["tapir train prior"],
        "prior": prior,
        "dvae": {"perplexity": 20.0, "psnr": 25.0},
        "clip": {"accuracy": 0.75},
        **({"caption_accuracy": accuracy} if accuracy else {}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class _Gallery(HTMLParser):
    """Parses the page as a browser does: ids, figures with captions, and each candidate."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in, attributes = tag, dict(attrs)
        self.ids += [str(attributes["id"])] if "id" in attributes and tag != "g" else []
        if tag == "figure":
            self.figures.append({**attributes, "text": "", "candidates": [], "at": []})
        elif tag == "ol":
            self.figures[-1].update(attributes)
        elif tag == "li" and "title" in attributes:
            self.figures[-1]["candidates"].append(attributes["title"])
        elif tag == "i" and self.figures:
            self.figures[-1]["at"].append(attributes["style"])

    def handle_data(self, data: str) -> None:
        if self._in == "figcaption" and self.figures and data.strip():
            self.figures[-1]["text"] += data


def _page(folder: Path) -> str:
    return write_report(folder).read_text()


def test_the_gallery_holds_every_candidate_with_its_score(tmp_path: Path) -> None:
    html = _page(demo_folder(tmp_path))
    rows = json.loads((tmp_path / "samples" / "candidates.json").read_text())["rows"]
    figures = _Gallery(html).figures
    assert [figure["data-caption"] for figure in figures] == CAPTIONS
    for figure, row in zip(figures, rows, strict=True):
        assert figure["text"].strip() == row["caption"]
        assert float(figure["data-score"]) == max(row["scores"])
        titles = [f"candidate {i} of 5, score {s:.4f}" for i, s in enumerate(row["scores"], 1)]
        assert figure["candidates"] == titles
        assert figure["at"] == [f"--at: {i}" for i in range(5)]
        match = re.fullmatch(
            r"--side: (\d+)px; --tiles: url\(data:image/png;base64,(.*)\)", figure["style"]
        )
        assert match
        data = base64.b64decode(match[2])
        assert data == (tmp_path / "samples" / row["file"]).read_bytes()
        tiles = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert tiles.shape == (int(match[1]), 5 * int(match[1]), 3)
    assert "<b>blue" not in html


@pytest.mark.parametrize(("side", "shown", "enlarged"), [(8, 80, True), (100, 128, False)])
def test_tiles_have_a_size_that_can_be_seen(
    side: int, shown: int, enlarged: bool, tmp_path: Path
) -> None:
    figure = _Gallery(_page(demo_folder(tmp_path, side=side))).figures[0]
    assert figure["style"].startswith(f"--side: {shown}px;")
    assert ("enlarged" in figure["class"]) == enlarged


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    (demo_folder(tmp_path) / "scores" / "scores.json").write_text(json.dumps(SCORES))
    html = _page(tmp_path)
    page = _Gallery(html)
    ids = re.search(r'\[("tools".*)\]\.map\(id => document', html)
    assert ids and set(json.loads(f"[{ids[1]}]")) <= set(page.ids)
    assert not any(text in html for text in ("<script src", "<link", "@import", "fetch("))
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert not re.search(r"url\((?!data:|#)", html)


SEARCHES = [
    ("", [0, 1, 2]),
    ("circle", [0, 2]),
    ("CIRCLE  red ", [0]),
    ("<b>", [1]),
    ("purple", []),
    ("a+", []),
]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: apt install npm")
def test_the_search_finds_and_sorts(tmp_path: Path) -> None:
    html = _page(demo_folder(tmp_path))
    script = re.search(r'<script id="search">(.*?)</script>', html, re.DOTALL)
    assert script
    rows = [
        {"place": i, "caption": figure["data-caption"], "score": float(figure["data-score"])}
        for i, figure in enumerate(_Gallery(html).figures)
    ]
    ask = f"""{script[1]}
    const rows = {json.dumps(rows)}, queries = {json.dumps([query for query, _ in SEARCHES])};
    console.log(JSON.stringify({{
      matches: queries.map(q => rows.filter(row => fits(row.caption, q)).map(row => row.place)),
      orders: ["place", "score", "caption"].map(f => sorted(rows, f).map(row => row.place)),
    }}));"""
    done = subprocess.run(["node", "-e", ask], capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert results["matches"] == [places for _, places in SEARCHES]
    assert results["orders"] == [[0, 1, 2], [1, 2, 0], [1, 0, 2]]


@pytest.mark.seconds
def test_sections_appear_with_their_data(tmp_path: Path) -> None:
    bare = _page(demo_folder(tmp_path / "bare"))
    assert bare.count("<svg") == 1 and "Caption accuracy" not in bare and "blur" not in bare
    guided = {**ACCURACY, "guidance": {"1": 0.5, "1.5": 0.75, "3": 0.625}}
    folder = demo_folder(tmp_path / "full", **guided)
    (folder / "scores" / "scores.json").write_text(json.dumps(SCORES))
    html = _page(folder)
    assert html.count("<svg") == 3
    for count in (1, 2, 4, 8, 16, 32, 64):
        row = f'<td class="n">{count}</td><td class="n">{0.5 + count / 200:.4g}</td>'
        assert row in html
    assert "guidance scale" in html and "candidates N" in html
    assert SCORES["label"] in html and str(SCORES["network"]) in html
    assert '<td class="n">202</td><td class="n">2</td><td class="n">33.25</td>' in html
    assert html.count("without overlap</td>") == 3
    assert "guidance scale" not in _page(demo_folder(tmp_path / "unguided", **ACCURACY))


def test_pictures_of_a_suite_are_shown(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path / "run")
    suite = folder / "suites" / "panels"
    suite.mkdir(parents=True)
    figures = {"headline": [{"name": "exact", "value": 0.875}], "results": {}}
    asked = {"suite": "panels", "facts": {}, "prompts": [{"caption": "x"}], "settings": {}}
    body = {**asked, **figures, "models": {"prior": "0" * 64}}
    (suite / "suite.json").write_text(json.dumps(body))
    assert "<h2>Translation</h2>" not in write_report(folder).read_text()
    rows = [{"caption": "the <same>", "file": "same.png"}]
    gallery = {"title": "Translation", "text": "Each column is a prompt.", "rows": rows}
    (suite / "gallery.json").write_text(json.dumps(gallery))
    picture = encode_png(np.zeros((4, 4, 3), np.uint8))
    (suite / "same.png").write_bytes(picture)
    html = write_report(folder).read_text()
    assert "<h2>Translation</h2>" in html and "the &lt;same&gt;" in html and "0.875" in html
    assert base64.b64encode(picture).decode() in html
    board = (folder / "leaderboard.md").read_text()
    assert "## Translation: suites/panels" in board and "![](suites/panels/same.png)" in board
    (suite / "gallery.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"gallery.json is damaged"):
        write_report(folder)


def test_best_of_takes_every_count_in_order() -> None:
    assert best_of_counts({"best_of_16": 3.0, "best_of_2": 2.0, "best_of_2_low95": 0.0}) == {
        2: 2.0,
        16: 3.0,
    }


def test_a_verdict_of_own_pairs_is_told_with_the_nearest_pictures(tmp_path: Path) -> None:
    folder = demo_folder(tmp_path / "demo")
    assert "Were the pairs enough?" not in write_report(folder).read_text()
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"verdict": {"findings": ["The pairs <were> enough."]}, "stopped": ["prior"]}
    summary["fewer"] = ["dvae"]
    (folder / "summary.json").write_text(json.dumps(summary))
    nearest = (folder / "samples" / "1.png").read_bytes()
    (folder / "nearest.png").write_bytes(nearest)
    html = write_report(folder).read_text()
    assert "The pairs &lt;were&gt; enough." in html and base64.b64encode(nearest).decode() in html
    assert "Out of time before its last step: prior." in html
    assert "with fewer steps than planned: dvae." in html


@pytest.mark.parametrize("raw", [False, True])
def test_the_next_commands_are_read_by_their_verbs(
    raw: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a folder with a space."""
    folder = demo_folder(tmp_path / "my run")
    if raw:
        (folder / "data" / "raw").mkdir(parents=True)
    commands = [shlex.split(unescape(row)) for row in _COMMAND.findall(_page(folder))]
    verbs = {command[1]: command[2:] for command in commands}
    served = ServeConfig(named=tuple(verbs["serve"]))
    assert served.named == (f"run={folder}",) and served.problems() == []
    other = str(folder / "data" / "raw") if raw else "runs/OTHER"
    assert verbs["study"][:3] == ["make", str(folder), other]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=other):  # all flags are known, the pictures are missing
        study(verbs["study"])
    assert not (folder / "study").exists()
