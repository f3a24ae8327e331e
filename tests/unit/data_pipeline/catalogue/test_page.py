"""The page about a set, and the verb `tapir data`."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli.catalogue import data
from core.errors import ConfigError
from core.storage.store import FolderStore
from data_pipeline.catalogue.parts import open_catalogue
from data_pipeline.catalogue.query import open_database
from data_pipeline.catalogue.summary import Summary, summarise
from data_pipeline.config import CatalogueConfig
from data_pipeline.sources.pair import Unusable
from tests.catalogued import Made, catalogued_set, small_set

HOSTILE = '"><script>alert(1)</script><img src=http://evil/x onerror=alert(1)>&lt;\x1b]0;owned\x07'


class _Tags(HTMLParser):
    """Collects the tags and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _summary(store: FolderStore, folder: Path) -> Summary:
    config = CatalogueConfig(memory_gigabytes=0.5)
    with open_database(open_catalogue(store, folder / "cache"), config) as database:
        return summarise(database)


def test_a_summary_counts_by_hand(tmp_path: Path) -> None:
    store, rows = small_set(tmp_path)
    summary = _summary(store, tmp_path)
    assert summary == _summary(store, tmp_path)
    assert (summary.rows, summary.kept) == (82, {"train": 62, "validation": 10})
    assert list(summary.rejects.items()) == [
        *(("duplicate", 4), ("near-duplicate", 4), ("file", 1), ("small", 1))
    ]
    assert summary.examples["file"] == [("x", "x is a link")]
    histograms = summary.histograms
    assert histograms["Shorter side, pixels"] == {"to 31": 72}
    squares = sum(row.picture % 5 == 0 and row.split is not None for row in rows)
    assert histograms["Longer over shorter side"] == {
        "to 1": squares,
        "over 1 to 1.25": 72 - squares,
    }
    assert histograms["Words of a caption"] == {"9 to 16": 72}
    assert summary.cluster_sizes == {"2": 8}
    assert [(row.key, row.size, row.is_kept) for row in summary.clusters][:2] == [
        *(("k008", 2, True), ("k018", 2, True))
    ]


def test_captions_keys_and_reasons_are_text_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Made(key=f"k{n}", caption=f"{HOSTILE} {n}", picture=n, split=split)
        for n, split in enumerate(("train", "train", "validation"))
    ]
    rows.append(Made(key="k3", caption=f"{HOSTILE} 0", picture=0))
    bad = Unusable(key=HOSTILE, kind=HOSTILE, reason=HOSTILE)
    rows.append(Made(key="", caption="", picture=0, split=None, reject=bad))
    store, work = FolderStore(tmp_path / "set"), tmp_path / "work"
    work.mkdir()
    catalogued_set(store, work, [rows])
    page = tmp_path / "page.html"
    data([store.url, "--out", str(page), "--json"])
    assert json.loads(capsys.readouterr().out)["rejects"] == {"duplicate": 1, HOSTILE: 1}
    parser = _Tags()
    parser.feed(page.read_text())
    assert {tag for tag, _ in parser.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table"),
        *("tr", "td", "span", "figure", "figcaption", "img"),
    }
    images = [facts for tag, facts in parser.tags if tag == "img"]
    assert len(images) == 3 and all(
        (facts["src"] or "").startswith("data:image/jpeg;base64,")
        and facts.keys() == {"src", "alt"}
        for facts in images
    )
    assert parser.text.count("<script>alert(1)</script>") >= 6, "hostile text is shown as text"
    policy = [facts["content"] for tag, facts in parser.tags if "http-equiv" in facts]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    data([store.url, "--sql", "SELECT caption FROM pairs WHERE kept ORDER BY key"])
    assert "\x1b" not in (out := capsys.readouterr().out) and out.count("\\x1b]0;owned") == 3


def test_the_verb_answers_and_writes_views(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = small_set(tmp_path)
    query = "SELECT split, count(*) AS n, NULL AS x FROM pairs WHERE kept GROUP BY 1 ORDER BY 1"
    data([store.url, "--sql", query])
    assert capsys.readouterr().out == "split\tn\tx\ntrain\t62\t\nvalidation\t10\t\n"
    data([store.url, "--sql", query, "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "columns": ["split", "n", "x"],
        "rows": [["train", 62, None], ["validation", 10, None]],
    }
    data([store.url, "--sql", "SELECT 'nan'::DOUBLE, -'inf'::DOUBLE, 1.5::DOUBLE", "--json"])
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer["rows"] == [["nan", "-inf", 1.5]]
    view = tmp_path / "view"
    data([store.url, "--keep", "width <= 26", "--dest", str(view), "--json"])
    counts = json.loads(capsys.readouterr().out)
    data([str(view), "--out", str(tmp_path / "view.html"), "--json"])
    page = json.loads(capsys.readouterr().out)
    assert page["kept"] == {split: counts[split] for split in ("train", "validation")}
    assert page["rejects"]["condition"] == 72 - sum(page["kept"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sql", "SELECT 1", "--keep", "true", "--dest", "x"], "cannot be combined"),
        (["--keep", "true"], "--keep needs --dest"),
        (["--dest", "x"], "--keep needs --dest"),
        (["--near", "2"], "belong to --keep"),
        (["--keep", "true", "--dest", "x", "--near", "4"], "must be 0 to 3"),
        (["--memory-gigabytes", "0"], "at least 0.1"),
    ],
)
def test_wrong_flags_are_refused_before_the_set_is_opened(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(["nowhere", *flags])
