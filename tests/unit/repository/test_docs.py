"""The pages: their links and files exist, snippets run, and the built site needs no network."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.unit.finished import write_models

FLOORS = (
    *("cli", "workflow", "serving", "generation", "planning", "training"),
    *("data_pipeline", "models", "parallel", "checkpoint", "core"),
)
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md", "llms.txt")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
HISTORY = ("LOG.md", "CHANGELOG.md", "decisions")
CURRENT = [page for page in PAGES if not {page.name, page.parent.name} & set(HISTORY)]
"""Pages whose names of files are those of this tree."""
OUTSIDE = re.compile(r"^\s*(?:[a-z]+:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
LOADED = {
    **dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed"), "src"),
    **{"object": "data", "image": "href", "use": "href"},
}
"""Tag -> the attribute whose target a browser loads by itself; of links it depends on `rel`."""
LINKS = {"stylesheet", "preconnect", "preload", "modulepreload", "prefetch", "dns-prefetch", "icon"}


class _Resources(HTMLParser):
    """Collects the URLs that a page loads from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        target = values.get(LOADED.get(tag, ""), "")
        if tag == "link" and LINKS & set(values.get("rel", "").lower().split()):
            target = values.get("href", "")
        if OUTSIDE.match(target):
            self.outside.append(target)
        self.outside += [url for url in values.get("srcset", "").split() if OUTSIDE.match(url)]
        self.outside += IN_STYLES.findall(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        self.outside += IN_STYLES.findall(data) if self.cdata_elem == "style" else []


def outside_resources(site: Path) -> list[str]:
    """The URLs that a site's pages and style sheets load from other hosts."""
    urls = []
    for path in sorted(site.rglob("*.html")):
        page = _Resources()
        page.feed(path.read_text())
        urls += [f"{path.relative_to(site)}: {url}" for url in page.outside]
    for path in sorted(site.rglob("*.css")):
        urls += [f"{path.relative_to(site)}: {url}" for url in IN_STYLES.findall(path.read_text())]
    return urls


@pytest.mark.parametrize(
    "text,count",
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<script src="//cdn.example/x.js"></script>', 1),
        ('<link rel="stylesheet" href="https://fonts.example/css">', 1),
        ('<link rel="preconnect" href="https://fonts.example">', 1),
        ('<img src="HTTPS://example/x.png" srcset="//example/2.png 2x">', 2),
        ("<style>@import 'https://example/x.css'; b { src: url(//example/f.woff2) }</style>", 2),
        ('<p style="background: url(https://example/x.png)">', 1),
        ('<a href="https://arxiv.org/abs/2102.12092">paper</a> @import "https://example/x.css"', 0),
        ('<script src="assets/x.js"></script><link rel="canonical" href="https://example">', 0),
    ],
)
def test_resources_from_outside_are_seen(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "index.html").write_text(text)
    assert len(outside_resources(tmp_path)) == count


def test_style_sheets_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("@import url('https://example/x.css'); a{b:url(fonts/y.woff)}")
    assert outside_resources(tmp_path) == ["x.css: https://example/x.css"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir"]
    done = subprocess.run(
        [*command, str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_needs_no_network(site: Path) -> None:
    assert outside_resources(site) == []
    names = ("index.html", "reference/verbs.html", "reference/api.html", "llms.txt")
    assert all((site / name).is_file() for name in (*names, "search/search_index.js"))
    verbs = (site / "reference" / "verbs.html").read_text()
    assert "tapir train prior paper_12b" in verbs and "--temperature FLOAT" in verbs
    assert "open_studio" in (site / "reference" / "api.html").read_text()


SEARCH = """
const fs = require("fs"), vm = require("vm");
const [worker, index, ...queries] = process.argv.slice(1);
let answer, listen;
Object.assign(globalThis, {
  self: globalThis,
  fetch: undefined,
  addEventListener: (_, handler) => { listen = handler; },
  postMessage: message => answer(message),
  importScripts: (...names) => { throw new Error(`the search loads ${names}`); },
});
for (const file of [worker, index]) vm.runInThisContext(fs.readFileSync(file, "utf8"));
const ask = data => new Promise(resolve => { answer = resolve; listen({ data }); });
(async () => {
  await ask({ type: 0, data: { ...__index, options: {} } });
  const places = [];
  for (const query of queries) {
    const { data } = await ask({ type: 2, data: query });
    places.push(data.items.map(([section]) => section.location));
  }
  console.log(JSON.stringify(places));
})();
"""
"""Runs the site's search worker as a browser does, without anything that could load more."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: apt install npm")
def test_the_search_answers_without_a_network(site: Path) -> None:
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.js")
    command = ["node", "-e", SEARCH, str(worker), str(site / "search" / "search_index.js")]
    queries = ["PowerSGD", "resume", "Slurm", "xyzzy"]
    done = subprocess.run([*command, *queries], capture_output=True, text=True, check=True)
    compression, resume, slurm, none = json.loads(done.stdout)
    assert "engine.html#compression" in compression
    assert resume[0] == "reference/verbs.html#tapir-resume"
    assert slurm[0] == "clusters.html#slurm"
    assert none == []


def _targets(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    missing = [
        target
        for target in _targets(page)
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert missing == []


def test_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100


def _walks() -> dict[str, list[str]]:
    """Heading -> the files of its numbered steps, in order."""
    parts = (ROOT / "docs" / "walks.md").read_text().split("\n## ")[1:]
    step = re.compile(r"^\d+\. `([\w/]+\.py)`", re.MULTILINE)
    return {part.splitlines()[0]: step.findall(part) for part in parts}


def test_walks_name_files_and_go_down() -> None:
    walks = _walks()
    assert len(walks) == 4
    for heading, files in walks.items():
        assert 1 <= len(files) <= 8 and len(set(files)) == len(files), heading
        assert all((ROOT / file).is_file() for file in files), heading
        floors = [[*FLOORS, "cluster"].index(file.split("/")[0]) for file in files]
        assert floors == sorted(floors), heading


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    """Paths in backquotes, of packages and tests; NAME stands for one to be written."""
    folders = "|".join((*FLOORS, "cluster", "tests", "bench", "examples", "constraints"))
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text())
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path / "runs" / "demo", ["a small red circle above a large blue square"])
    names: dict[str, object] = {}
    exec(compile(snippet, "python.md", "exec"), names)
    assert names["best"].pictures.shape[0] == 8  # type: ignore[attr-defined]
    assert names["again"].shape == (16,)  # type: ignore[attr-defined]
    assert Path("best.png").stat().st_size > 0


@pytest.mark.world
def test_the_python_page_reads_tokens(tokens: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert '"runs/tokens"' in snippet
    names: dict[str, object] = {}
    exec(compile(snippet.replace("runs/tokens", str(tokens)), "python.md", "exec"), names)
    assert names["record"].image.shape == (64,)  # type: ignore[attr-defined]
