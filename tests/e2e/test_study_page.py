"""The raters' page in a real Chromium: by keyboard, across a killed server, and without scripts."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from serving.study.study import read_study
from serving.study.votes import Vote, Votes
from tests.harness import PATIENCE, json_of, tapir
from tests.support.browser import chromium, keep_local
from tests.support.raters import BLUE, RED, Rater, Server, captions_of, write_set

pytestmark = pytest.mark.seconds
REALISM, MATCH = "Which picture is more realistic?", "Which picture matches the caption better?"
expect.set_options(timeout=1000 * PATIENCE)


def stored(study: Path) -> list[Vote]:
    votes = Votes(study, read_study(study))
    try:
        return votes.all()
    finally:
        votes.close()


def test_the_raters_page(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a", captions_of(3), RED)
    b = write_set(tmp_path / "b", captions_of(3), BLUE)
    study = tmp_path / "study"
    tapir("study", "make", str(a), str(b), f"--out={study}", "--votes=1", "--catch-every=0")
    links = json_of("study", "links", str(study), "--raters=1")
    server = Server(study, tmp_path / "log")
    server.start()
    rater = Rater(server, links["1"])
    address = f"http://127.0.0.1:{server.port}{rater.path}"
    with chromium() as browser:
        _with_scripts(browser, address, server, study)
        _without_scripts(browser, address, study)
        _results(browser, study)


def _with_scripts(browser: Browser, address: str, server: Server, study: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    context.set_default_timeout(1000 * PATIENCE)
    others, page, messages = keep_local(context), context.new_page(), list[str]()
    page.on("console", lambda message: messages.append(message.text))
    page.goto(address)
    expect(page).to_have_title("Pictures 1 of 3")
    _readable(page)
    assert messages == [], "no script or style is refused by the page's own policy"
    _answer_by_keyboard(page)
    expect(page).to_have_title("Pictures 2 of 3")
    assert sorted((v.question, v.seat) for v in stored(study)) == [
        ("match", "neither"),
        ("realism", "right"),
    ]
    page.get_by_role("group", name=REALISM).get_by_label("Left").check()
    page.get_by_role("group", name=MATCH).get_by_label("Right").check()
    button = page.get_by_role("button", name="Next pictures")
    expect(button).to_be_enabled()  # both pictures are there
    server.kill()
    button.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Your answer is kept here")
    server.start()
    expect(page).to_have_title("Pictures 3 of 3")
    assert len(stored(study)) == 4 and others == []
    context.close()


def _readable(page: Page) -> None:
    """What a screen reader is given: names, roles and order."""
    caption = page.get_by_role("heading", level=1)
    expect(caption).to_contain_text("a picture with the number")
    for seat in ("left", "right"):
        picture = page.get_by_role("img", name=f"The picture on the {seat}")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") == 12
    for question, answers in ((REALISM, ["Left", "Right"]), (MATCH, ["Left", "Right", "Neither"])):
        group = page.get_by_role("group", name=question)
        assert [
            row.strip()
            for row in group.get_by_role("radio").evaluate_all(
                "rows => rows.map(row => row.labels[0].textContent)"
            )
        ] == answers
    assert page.evaluate("document.documentElement.lang") == "en"
    names = [RED, BLUE, "/a/", "/b/"]
    assert not any(str(name) in page.content() for name in names)


def _answer_by_keyboard(page: Page) -> None:
    """Tab, arrows and Enter alone: right is more realistic, neither matches."""
    page.keyboard.press("Tab")
    for keys in (("ArrowRight",), ("ArrowRight", "ArrowRight")):
        for key in keys:
            page.keyboard.press(key)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "the focus is visible"
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Next pictures"
    page.keyboard.press("Enter")


def _without_scripts(browser: Browser, address: str, study: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    page.get_by_role("group", name=REALISM).get_by_label("Left").check()
    page.get_by_role("group", name=MATCH).get_by_label("Left").check()
    page.get_by_role("button", name="Next pictures").click()
    expect(page.get_by_role("heading", name="All done")).to_be_visible()
    assert len(stored(study)) == 6
    context.close()


def _results(browser: Browser, study: Path) -> None:
    """The page of the results, from file://."""
    tapir("study", "results", str(study))
    context = browser.new_context()
    others, page, messages = keep_local(context), context.new_page(), list[str]()
    page.on("console", lambda message: messages.append(message.text))
    page.goto((study / "results.html").as_uri())
    expect(page.get_by_role("heading", name="Which pictures do people prefer?")).to_be_visible()
    widths = page.get_by_role("img").evaluate_all("rows => rows.map(row => row.naturalWidth)")
    assert widths == [12] * 6 and messages == []
    assert [url for url in others if not url.startswith("file:")] == []
    context.close()
