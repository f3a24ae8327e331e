"""report.html in Chromium, from file://: no broken rule of axe-core, no request, whole in print."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.workflow.test_report import ACCURACY, SCORES, demo_folder
from workflow.report.page import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: `make system` installs it"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a folder with every section but suites."""
    folder = demo_folder(tmp_path_factory.mktemp("demo"), **{**ACCURACY, "guidance": {"1": 0.5}})
    (folder / "scores" / "scores.json").write_text(json.dumps(SCORES))
    return write_report(folder)


@pytest.fixture(scope="module")
def page(report: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(f"error {error}"))
        page.goto(report.as_uri())
        page.asked = asked
        yield page
        chromium.close()


def test_it_needs_no_other_file_and_raises_no_error(page: Any, report: Path) -> None:
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]


def test_the_search_works_by_keyboard(page: Any) -> None:
    page.focus("#query")
    page.keyboard.type("quoted")
    assert page.text_content("#hits") == "1 of 3 captions"
    assert page.locator("#gallery figure:visible").count() == 1


def test_axe_core_finds_nothing(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_it_prints_whole(page: Any) -> None:
    """In print, captions that the search hid are back, and the search itself is gone."""
    page.emulate_media(media="print")
    assert page.locator("#gallery figure:visible").count() == 3
    assert not page.is_visible("#tools")
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
