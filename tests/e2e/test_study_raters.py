"""Three raters in a real Chromium answer 22 pages each; the server is killed in the middle."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.e2e.test_study import COUNT, check_figures, make
from tests.e2e.test_study_page import MATCH, REALISM, stored
from tests.harness import PATIENCE, json_of
from tests.support.browser import chromium, keep_local
from tests.support.raters import BLUE, RED, Rgb, Server, intact, is_catch, seat_of

pytestmark = pytest.mark.slow
RATERS = {1: RED, 2: RED, 3: BLUE}
"""Rater -> colour of the pictures that are more realistic to it; red always matches better."""
PAGES = COUNT + 2
SWAPPED = {"left": "right", "right": "left"}
_PIXELS = """images => images.map(image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
})"""
_ARRIVED = """() =>
  [...document.querySelectorAll("figure img")].every(image => image.naturalWidth > 0)"""
Answers = dict[tuple[int, int, str], str]
"""(rater, trial, question) -> what was clicked first."""


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def new_context(browser: Browser) -> BrowserContext:
    context = browser.new_context()
    context.set_default_timeout(1000 * PATIENCE)
    keep_local(context)
    return context


def trial_of(page: Page) -> int:
    return int(str(page.locator("form").get_attribute("action")).rpartition("/")[2])


def seats_of(page: Page, rater: int) -> dict[str, str]:
    """What the rater answers, from the pixels on the screen."""
    page.wait_for_function(_ARRIVED)  # before the page's script runs, its button is enabled
    expect(page.get_by_role("button", name="Next pictures")).to_be_enabled()
    left, right = (_rgb(row) for row in page.locator("figure img").evaluate_all(_PIXELS))
    if is_catch(left, right):
        return dict.fromkeys(("realism", "match"), intact(left, right))
    return {"realism": seat_of(RATERS[rater], left), "match": seat_of(RED, left)}


def _rgb(values: list[int]) -> Rgb:
    side = int((len(values) // 4) ** 0.5)
    return np.array(values, np.uint8).reshape(side, side, 4)[:, :, :3]


def choose(page: Page, seats: dict[str, str]) -> None:
    for question, name in (("realism", REALISM), ("match", MATCH)):
        group = page.get_by_role("group", name=name)
        group.get_by_label(seats[question].capitalize()).check()


def send(page: Page) -> None:
    """Send the answer; does not wait for the server."""
    page.evaluate("document.querySelector('form').requestSubmit()")


def title_after(answered: int) -> str:
    return "All done" if answered == PAGES else f"Pictures {answered + 1} of {PAGES}"


def test_three_raters_lose_no_vote(tmp_path: Path, browser: Browser) -> None:
    study = make(tmp_path, "--votes=3")
    links = json_of("study", "links", str(study), "--raters=3")
    server, clicked = Server(study, tmp_path / "log"), Answers()
    server.start()
    pages, addresses = dict[int, Page](), dict[int, str]()
    for rater in RATERS:
        pages[rater] = new_context(browser).new_page()
        path = links[str(rater)].rpartition("/r/")[2]
        addresses[rater] = f"http://127.0.0.1:{server.port}/r/{path}"
        pages[rater].goto(f"http://127.0.0.1:{server.port}/healthz")
        pages[rater].goto(addresses[rater])
    for answered in range(PAGES):
        for rater, page in pages.items():
            expect(page).to_have_title(title_after(answered))
            seats = seats_of(page, rater)
            for question, seat in seats.items():
                clicked[rater, trial_of(page), question] = seat
            choose(page, seats)
        if answered == 3:
            _second_tab_and_device(browser, pages[1], addresses[1], clicked)
        for rater, page in pages.items():
            if (answered, rater) != (3, 1):
                send(page)
        if answered == 10:
            _killed(server, pages, addresses, answered + 1)
        if answered == 12:
            _back_and_forward(pages[2], answered + 1)
    for page in pages.values():
        expect(page).to_have_title("All done")
    assert {(v.rater, v.trial, v.question): v.seat for v in stored(study)} == clicked
    assert len(clicked) == 3 * PAGES * 2
    check_figures(json_of("study", "results", str(study)))


def _second_tab_and_device(browser: Browser, first: Page, link: str, clicked: Answers) -> None:
    """The same link in another tab, and on another device: the same pictures on the same sides;
    the first answer counts, and the others only show what comes next."""
    device = new_context(browser)
    tab, other = first.context.new_page(), device.new_page()
    trial = trial_of(first)
    for page in (tab, other):
        page.goto(link)
        assert trial_of(page) == trial
        seats = seats_of(page, 1)
        assert seats == {q: clicked[1, trial, q] for q in ("realism", "match")}
        choose(page, {question: SWAPPED[seat] for question, seat in seats.items()})
    send(first)
    expect(first).to_have_title(title_after(4))
    for page in (tab, other):
        with page.expect_response(lambda response: response.request.method == "POST") as sent:
            send(page)
        assert sent.value.status == 409
        expect(page).to_have_title(title_after(4))
    tab.close()
    device.close()


def _killed(
    server: Server, pages: dict[int, Page], addresses: dict[int, str], answered: int
) -> None:
    """SIGKILL with three answers on their way; each page sends its own again."""
    server.kill()
    server.start()
    for rater, page in pages.items():
        while not _has_title(page, title_after(answered)):
            if page.url.startswith("chrome-error:"):  # answered, and the next page did not come
                page.goto(addresses[rater])


def _has_title(page: Page, title: str) -> bool:
    try:
        expect(page).to_have_title(title, timeout=2000)
    except AssertionError:
        return False
    return True


def _back_and_forward(page: Page, answered: int) -> None:
    """An answered page is not in the history: back leaves the study, forward goes on."""
    expect(page).to_have_title(title_after(answered))
    page.go_back()
    assert page.url.endswith("/healthz")
    page.go_forward()
    expect(page).to_have_title(title_after(answered))


def test_nobody_answers_without_the_pictures(tmp_path: Path, browser: Browser) -> None:
    study = make(tmp_path, "--votes=1", "--count=1", "--catch-every=0")
    link = json_of("study", "links", str(study), "--raters=1")["1"]
    server = Server(study, tmp_path / "log")
    server.start()
    page, lost = new_context(browser).new_page(), [True]
    page.route("**/right.png", lambda route: route.abort() if lost[0] else route.fallback())
    page.goto(f"http://127.0.0.1:{server.port}/r/{link.rpartition('/r/')[2]}")
    button = page.get_by_role("button", name="Next pictures")
    expect(button).to_be_disabled()
    expect(page.get_by_role("status")).to_contain_text("A picture did not arrive")
    choose(page, {"realism": "left", "match": "left"})
    page.keyboard.press("Enter")
    assert stored(study) == []
    lost[0] = False
    expect(button).to_be_enabled()
    expect(page.get_by_role("status")).to_have_text("")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        broken = Axe().run(page)
        assert broken.violations_count == 0, broken.generate_report()
    button.click()
    expect(page).to_have_title("All done")
    assert len(stored(study)) == 2
