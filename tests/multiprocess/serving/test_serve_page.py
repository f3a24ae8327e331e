"""The page in a real Chromium: rows appear, a mask is painted, and kept codes are equal.

With TAPIR_SERVE_MODELS=FOLDER the screenshot shows models of that folder, with TAPIR_CAPTION=TEXT
another caption; TAPIR_SCREENSHOT=FILE keeps it. So docs/images/serve.png is made, by the models of
examples/panels.yaml.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.serving.served import CAPTIONS, TOKEN, Served, served

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: `make system` installs it"),
]
SECONDS = 300_000
"""Milliseconds; other workers may keep all cores busy."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    with served(folder, f"--token-file={folder / 'token'}", "--rows=2") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(server: Served, browser: Any) -> Iterator[Any]:
    """The page, logged in; every request to another place fails the test."""
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    foreign: list[str] = []
    problems: list[str] = []
    opened.on("request", lambda x: foreign.append(x.url) if not _own(server, x.url) else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(server.address)
    opened.get_by_label("Token", exact=True).fill(TOKEN)
    opened.keyboard.press("Enter")
    playwright.expect(opened.locator("#state")).to_have_text("Ready", timeout=SECONDS)
    yield opened
    context.close()
    assert not foreign and not problems


def axe(page: Any) -> None:
    """Check the page as it is now by axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def tab_to(page: Any, name: str) -> None:
    """Press Tab until an element whose name begins so has the focus, which must be visible."""
    focused = """() => {
        const own = document.activeElement;
        const label = own.ariaLabel ?? own.labels?.[0]?.textContent ?? own.textContent;
        return [label.trim(), getComputedStyle(own).outlineStyle];
    }"""
    passed = []
    for _ in range(60):
        page.keyboard.press("Tab")
        label, outline = page.evaluate(focused)
        passed.append(label[:30])
        if label.startswith(name):
            assert outline != "none", name
            return
    raise AssertionError(f"{name} is not reached: {passed}")


def _own(server: Served, url: str) -> bool:
    return url.startswith((f"{server.address}/", "data:", "blob:"))


def codes_after(page: Any, act: Any) -> list[int]:
    """The image tokens of the only picture that `act` draws."""
    page.evaluate("document.getElementById('pictures').replaceChildren()")
    act()
    card = page.locator('#pictures li[aria-busy="false"]')
    playwright.expect(card).to_have_count(1, timeout=SECONDS)
    results = page.locator("#results")
    playwright.expect(results).to_have_attribute("aria-busy", "false", timeout=SECONDS)
    return [int(code) for code in card.get_attribute("data-codes").split()]


def test_rows_appear_and_pictures_are_ranked(page: Any, tmp_path: Path) -> None:
    page.evaluate(
        """() => {
            window.rows = [];
            new MutationObserver((changes) => changes.forEach(({ target }) =>
                window.rows.push(Number(target.dataset.rows)))
            ).observe(document.getElementById("pictures"),
                { subtree: true, attributes: true, attributeFilter: ["data-rows"] });
        }"""
    )
    page.get_by_label("Caption").fill(CAPTIONS[0])
    page.get_by_label("Number of pictures").fill("3")
    page.get_by_role("spinbutton", name="Key").fill("11")
    page.get_by_role("button", name="Draw", exact=True).click()
    playwright.expect(page.locator("#progress")).to_contain_text("best first", timeout=SECONDS)
    rows = page.evaluate("window.rows")
    assert {1, 2, 3, 4} <= set(rows)
    captions = page.locator("#pictures figcaption").all_inner_texts()
    assert [text.split(",")[0] for text in captions] == ["Rank 1", "Rank 2", "Rank 3"]
    scores = [float(text.rsplit(" ", 1)[1]) for text in captions]
    assert scores == sorted(scores, reverse=True)
    assert page.locator("#history li").count() == 3
    with page.expect_download() as downloading:
        page.locator("#pictures a").first.click()
    downloading.value.save_as(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    page.reload()
    playwright.expect(page.locator("#history li")).to_have_count(3)


def test_a_mask_painted_by_mouse_keeps_the_other_codes(page: Any) -> None:
    page.get_by_label("Caption").fill(CAPTIONS[0])
    page.get_by_label("Number of pictures").fill("1")
    draw = page.get_by_role("button", name="Draw", exact=True)
    codes_after(page, draw.click)
    page.locator("#pictures").get_by_role("button").click()
    playwright.expect(page.locator("#mask")).to_be_focused(timeout=SECONDS)
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    cell = box["width"] / 4
    page.mouse.move(box["x"] + cell * 1.5, box["y"] + cell * 2.5)
    page.mouse.down()
    page.mouse.move(box["x"] + cell * 2.5, box["y"] + cell * 2.5, steps=8)
    page.mouse.up()
    playwright.expect(page.locator("#mask-state")).to_contain_text("2 of 16")
    edits = []
    for key in ("1", "2", "3"):
        page.get_by_role("spinbutton", name="Key").fill(key)
        edits.append(codes_after(page, draw.click))
    redrawn = {2 * 4 + 1, 2 * 4 + 2}
    kept = [[code for i, code in enumerate(each) if i not in redrawn] for each in edits]
    assert kept[0] == kept[1] == kept[2]
    assert len({tuple(each) for each in edits}) > 1


def test_the_mask_is_painted_by_keyboard_and_told_to_screen_readers(page: Any) -> None:
    page.get_by_label("Caption").fill(CAPTIONS[1])
    page.get_by_label("Number of pictures").fill("1")
    draw = page.get_by_role("button", name="Draw", exact=True)
    codes_after(page, lambda: draw.press("Enter"))
    page.locator("#pictures").get_by_role("button").press("Enter")
    playwright.expect(page.locator("#mask")).to_be_focused()
    for key in ("ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    playwright.expect(page.locator("#mask-state")).to_contain_text("1 of 16")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#mask-state")).to_contain_text("Row 2, column 3: kept")
    page.keyboard.press("Delete")
    playwright.expect(page.locator("#mask-state")).to_contain_text("0 of 16")


def test_a_wrong_token_is_asked_for_again(server: Served, browser: Any) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(server.address)
    page.get_by_label("Token", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#login")).to_be_visible(timeout=SECONDS)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(20, 23, 28)"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_core_finds_nothing(server: Served, browser: Any, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(server.address)
    playwright.expect(page.locator("#login")).to_be_visible(timeout=SECONDS)
    axe(page)
    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#state")).to_have_text("Ready", timeout=SECONDS)
    page.get_by_label("Caption").fill("a purple circle " * 8)
    page.get_by_label("Number of pictures").fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()
    playwright.expect(page.locator("#progress")).to_contain_text("best first", timeout=SECONDS)
    playwright.expect(page.locator("#warnings")).to_contain_text("'purple'")
    page.locator("#pictures").get_by_role("button").first.click()
    playwright.expect(page.locator("#mask")).to_be_focused(timeout=SECONDS)
    axe(page)
    context.close()


def test_everything_is_done_by_keyboard_alone(page: Any) -> None:
    tab_to(page, "Skip to the pictures")
    tab_to(page, "Caption")
    page.keyboard.type(CAPTIONS[0])
    tab_to(page, "Number of pictures")
    page.keyboard.press("Control+A")
    page.keyboard.type("1")
    tab_to(page, "Draw")
    first = codes_after(page, lambda: page.keyboard.press("Enter"))
    tab_to(page, "Change")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#mask")).to_be_focused()
    page.keyboard.press("Space")
    playwright.expect(page.locator("#mask-state")).to_contain_text("1 of 16")
    tab_to(page, "Draw")
    edited = codes_after(page, lambda: page.keyboard.press("Enter"))
    assert len(edited) == len(first)
    tab_to(page, "Forget all")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#history li")).to_have_count(0)


def test_a_screenshot_for_the_docs(browser: Any, tmp_path: Path) -> None:
    models = os.environ.get("TAPIR_SERVE_MODELS")
    caption = os.environ.get("TAPIR_CAPTION", CAPTIONS[0])
    more = (f"shown={models}",) if models else ()
    context = browser.new_context(viewport={"width": 900, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    with served(tmp_path, more=more) as server:
        page.goto(server.address)
        playwright.expect(page.locator("#state")).to_have_text("Ready", timeout=SECONDS)
        page.get_by_label("Model").select_option("shown" if models else "tiny")
        page.get_by_label("Caption").fill(caption)
        page.get_by_role("spinbutton", name="Key").fill("1")
        page.get_by_role("button", name="Draw", exact=True).click()
        playwright.expect(page.locator("#progress")).to_contain_text("best first", timeout=SECONDS)
        path = Path(os.environ.get("TAPIR_SCREENSHOT", tmp_path / "serve.png"))
        page.screenshot(path=path)
    context.close()
    assert path.stat().st_size < 150_000
