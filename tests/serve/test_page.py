"""The page in headless Chromium: it talks, compares, shows probabilities, works by keyboard and on a phone.

Needs a Chromium on the machine (LANDMARK_CHROMIUM, or on PATH). LANDMARK_SCREENSHOTS=docs writes the pictures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from landmark.serve.limits import Limits

from .conftest import Live, live, served

CHROMIUM = os.environ.get("LANDMARK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def running() -> Iterator[Live]:
    with live([served("tiny"), served("other")]) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, running: Live) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    outside: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: request.url.startswith(running.url) or outside.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(running.url)
    page.wait_for_selector(".pane select option", state="attached")
    page.fill("[name=seed]", "3", force=True) if page.is_visible("[name=seed]") else None
    yield page
    context.close()
    assert not outside and not errors, (outside, errors)


def settings(page: Any, pane: int = 0, **values: str) -> None:
    """Fill in settings of a pane."""
    box = page.locator(".pane").nth(pane)
    box.locator("summary").click()
    for name, value in values.items():
        box.locator(f"[name={name}]").fill(value)
    box.locator("summary").click()


def say(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")


def shoot(page: Any, name: str) -> None:
    folder = os.environ.get("LANDMARK_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"page-{name}.png"))


def test_a_conversation_with_probabilities(page: Any) -> None:
    settings(page, max_tokens="24", seed="1")
    say(page, "hello")
    answer = page.locator(".assistant .token")
    assert answer.count() > 3
    assert re.fullmatch(r"[\d.]+ tokens/s · first after \d+ ms", page.locator(".speed").first.inner_text())
    answer.nth(2).hover()
    rows = page.locator("#alternatives div")
    assert rows.count() in (5, 6) and page.locator("#alternatives .chosen").count() == 1
    shares = [float(text.rstrip("%")) for text in page.locator("#alternatives span:last-child").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    shoot(page, "chat")
    page.wait_for_function("Number(document.querySelector('[data-figure=used]').textContent.replace('%','')) >= 0")


def test_side_by_side(page: Any) -> None:
    page.press("body", "Alt+c")
    panes = page.locator(".pane")
    assert panes.count() == 2
    assert panes.nth(1).locator("select").input_value() == "other"
    settings(page, 0, max_tokens="12", seed="1")
    settings(page, 1, max_tokens="12", seed="2")
    say(page, "what is a list?")
    texts = [panes.nth(i).locator(".assistant").inner_text() for i in range(2)]
    assert all(texts) and texts[0] != texts[1]
    shoot(page, "compare")
    page.press("body", "Alt+c")
    assert panes.count() == 1


def test_escape_stops_and_alt_n_begins_anew(page: Any, running: Live) -> None:
    settings(page, max_tokens="400")
    page.fill("#message", "go on")
    page.press("#message", "Enter")
    page.wait_for_selector(".assistant .token")
    page.press("body", "Escape")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    assert page.locator(".assistant.busy").count() == 0
    page.press("body", "Alt+n")
    assert page.locator(".assistant").count() == 0 and page.locator(".hint").count() == 1


def test_light_dark_and_a_phone(page: Any) -> None:
    def paper() -> Any:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = paper()
    page.press("body", "Alt+t")
    assert paper() != before
    page.reload()
    page.wait_for_selector(".pane")
    assert paper() != before
    page.set_viewport_size({"width": 375, "height": 700})
    settings(page, max_tokens="16", seed="2")
    say(page, "hello from a phone, in a sentence that is longer than the screen is wide")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator("#send").is_visible()
    shoot(page, "phone")


def test_errors_are_shown_and_a_key_is_asked_for(browser: Any) -> None:
    with live([served()], Limits(keys=("secret",))) as closed:
        page = browser.new_page()
        page.goto(closed.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "secret")
        page.click("#key-dialog button")
        page.wait_for_selector(".pane")
        say(page, "word " * 2000)
        assert "takes 512 at most" in page.locator(".error").inner_text()
        page.close()


def test_what_was_not_answered_is_not_said_again(page: Any) -> None:
    """A message that is refused comes back to be mended; a new conversation knows nothing of the old one."""
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
    say(page, "word " * 2000)
    page.wait_for_selector(".error")
    assert page.input_value("#message").startswith("word word") and page.locator(".user.unsent").count() == 1
    page.fill("#message", "")
    say(page, "hello")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    assert "word" not in str(sent[-1])
    say(page, "first")
    page.keyboard.press("Alt+n")  # while it is answered
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    page.fill("#message", "")
    say(page, "second")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    assert "first" not in str(sent[-1]) and "second" in str(sent[-1])
