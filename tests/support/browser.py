"""A real Chromium, Debian's, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Route, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium; the test is skipped where `make system` could not install it."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: make system")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def keep_local(context: BrowserContext) -> list[str]:
    """Refuse requests to other machines; returns the list of them, which grows."""
    others: list[str] = []

    def decide(route: Route) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", None):  # None: file:, data:
            route.continue_()
        else:
            others.append(route.request.url)
            route.abort()

    context.route("**/*", decide)
    return others
