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
        assert page.locator("#refused").is_hidden()
        page.fill("#key", "schlüssel–")  # no header can carry it: the field says so
        page.click("#key-dialog button")
        assert page.locator("#key:invalid").count() == 1 and page.locator("#key-dialog[open]").count() == 1
        page.fill("#key", "wrong")
        page.click("#key-dialog button")
        page.wait_for_selector("#refused:not([hidden])")
        page.press("#key", "Escape")
        page.wait_for_selector(".error button")
        assert "wants an API key" in page.locator("#panes .error").inner_text()
        page.click(".error button")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector(".pane")
        say(page, "word " * 2000)
        assert "takes 512 at most" in page.locator(".error:visible").inner_text()
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


def stream(page: Any, *pieces: dict[str, Any], done: bool = True) -> None:
    """What the server says to the next messages."""
    events = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    events = [
        f"event: error\n{event}" if "error" in piece else event for event, piece in zip(events, pieces, strict=True)
    ]
    body = "".join([": alive\n\n", *events, *(["data: [DONE]\n\n"] if done else [])])
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream"))


def piece(finish: str | None = None, **delta: str) -> dict[str, Any]:
    text = delta.get("content", "")
    top = [{"token": text, "logprob": -0.1}, {"token": "other", "logprob": -3.0}]
    scored = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": scored}]}


@pytest.mark.parametrize(
    ("end", "shown", "text"),
    [
        ([piece("length")], ".note", "Cut off here"),
        ([{"error": {"message": "the server is shutting down", "code": "shutting_down"}}], ".error", "shutting down"),
        (None, ".error", "broke off"),
    ],
)
def test_how_an_answer_ended_is_said(page: Any, end: list[dict[str, Any]] | None, shown: str, text: str) -> None:
    stream(page, piece(content="partly"), *(end or []), done=end is not None)
    say(page, "hello")
    assert text in page.locator(f".talk {shown}").inner_text()
    assert page.locator(".assistant").inner_text() == "partly"


def test_thoughts_stand_apart(page: Any) -> None:
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
    stream(page, piece(reasoning_content="hm, "), piece(reasoning_content="well"), piece(content="yes"), piece("stop"))
    for _ in range(2):
        say(page, "is it?")
    assert page.locator(".thoughts").first.text_content() == "Thoughtshm, well"
    assert page.locator(".assistant").first.inner_text() == "yes" and "hm" not in str(sent[-1]["messages"])
    stream(page, piece(reasoning_content="on and on"), piece("length"))
    say(page, "and now?")  # it thought, and was cut off before it said anything: that is an answer too
    assert page.locator(".unsent").count() == 0 and "Cut off" in page.locator(".note").inner_text()


def test_probabilities_by_keyboard(page: Any) -> None:
    stream(page, *(piece(content=f"word{i} ") for i in range(4)), piece("stop"))
    say(page, "hello")
    assert page.locator(".token[tabindex='0']").count() == 1  # one stop on the way of Tab
    page.locator(".token[tabindex='0']").focus()
    for key, at in (("ArrowRight", 1), ("End", 3), ("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == f"word{at} "
        assert page.locator("#alternatives .chosen span").first.inner_text() == f"word{at}␣"
    described = page.evaluate("document.activeElement.getAttribute('aria-describedby')")
    assert page.locator(f"#{described}").is_visible()
    assert page.locator("meter[aria-label='probability of other']").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#alternatives").is_hidden()


def test_a_second_pane_goes_on_from_the_first(page: Any) -> None:
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
    settings(page, max_tokens="6", seed="1")
    say(page, "once upon")
    page.press("body", "Alt+c")
    panes = page.locator(".pane")
    assert [panes.nth(i).locator(".talk > *").all_inner_texts() for i in (0, 1)] == [
        panes.nth(0).locator(".talk > *").all_inner_texts()
    ] * 2
    panes.nth(1).locator(".token").first.hover()
    assert page.locator("#alternatives .chosen").count() == 1
    settings(page, 1, max_tokens="6", seed="2")
    say(page, "and then")
    asked = [body["messages"] for body in sent[-2:]]
    assert all([m["content"] for m in messages][::2] == ["once upon", "and then"] for messages in asked)
    page.press("body", "Alt+c")
    page.press("body", "Alt+c")
    assert panes.nth(1).locator(".user").count() == 2  # closed and opened again, it is as it was
    page.press("body", "Alt+n")
    assert page.locator(".user").count() == 0
    settings(page, 0, max_tokens="400")
    page.press("body", "Alt+c")
    page.fill("#message", "go on")
    page.press("#message", "Enter")
    page.wait_for_selector(".assistant .token")
    page.press("body", "Alt+c")  # while the first is answered
    assert panes.nth(1).locator(".user").count() == 0
    page.press("body", "Escape")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")


def test_settings_that_cannot_be_sent_are_shown(page: Any) -> None:
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
    settings(page, temperature="-1")
    page.fill("#message", "hello")
    page.press("#message", "Enter")
    assert page.evaluate("document.activeElement.name") == "temperature" and not sent
    assert page.input_value("#message") == "hello"
    page.keyboard.press("Escape")
    assert page.locator(".bar details[open]").count() == 0
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.locator("summary").click()
    page.locator(".talk").click()
    assert page.locator(".bar details[open]").count() == 0
    settings(page, temperature="0", max_tokens="3", stop="END\nnew\\nline")
    say(page, "hello")
    assert sent[-1]["stop"] == ["END", "new\nline"]


@pytest.mark.parametrize("kept", ["nonsense", "5", "null", '{"temperature": {}, "model": 7}'])
def test_whatever_was_kept_the_page_begins(page: Any, kept: str) -> None:
    page.evaluate(
        "k => ['pane0', 'pane1', 'panes', 'theme'].forEach((n) => localStorage.setItem('landmark.' + n, k))", kept
    )
    page.reload()
    page.wait_for_selector(".pane")
    assert page.input_value("[name=temperature]") == "0.7"


def test_a_server_that_is_away_comes_back(browser: Any, running: Live) -> None:
    page = browser.new_page()
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(running.url)
    assert "cannot be reached" in page.locator("#panes .error").inner_text()
    page.unroute_all()
    page.wait_for_selector(".pane")  # it tries again by itself
    page.route("**/v1/**", lambda route: route.abort())
    say(page, "hello")
    assert "cannot be reached" in page.locator(".talk .error").inner_text()
    page.unroute_all()
    page.wait_for_function("document.querySelector('#away').textContent === ''")
    page.close()


@pytest.mark.parametrize(("width", "height"), [(360, 640), (844, 390)])
def test_all_settings_fit_a_phone(page: Any, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.press("body", "Alt+c")
    for pane in range(2):
        box = page.locator(".pane").nth(pane)
        box.locator("summary").click()
        at = box.locator(".settings").bounding_box()
        assert at["x"] >= 0 and at["y"] >= 0 and at["x"] + at["width"] <= width and at["y"] + at["height"] <= height
        box.locator("[name=system]").scroll_into_view_if_needed()
        assert box.locator("[name=system]").is_visible()
        page.keyboard.press("Escape")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("header").bounding_box()["height"] < (100 if width < height else 60)
    assert all(page.locator(".talk").nth(i).bounding_box()["height"] > 60 for i in range(2))


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (name) => {
    document.body.style.color = `var(--${name})`;
    canvas.fillStyle = getComputedStyle(document.body).color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pair = (a, b) => {
    const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
    return (bright + 0.05) / (dark + 0.05);
  };
  const names = (pairs) => Object.fromEntries(pairs.map(([a, b]) => [`${a} on ${b}`, pair(a, b)]));
  const grounds = ["paper", "raised"];
  return [names([["ink", "mine"], ["paper", "accent"],
                 ...["ink", "soft", "wrong"].flatMap((text) => grounds.map((ground) => [text, ground]))]),
          names(["edge", "accent", "wrong"].flatMap((edge) => grounds.map((ground) => [edge, ground])))];
}"""


def test_contrast(page: Any) -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11, in both themes."""
    for _ in range(2):
        texts, controls = page.evaluate(CONTRAST)
        assert {name: ratio for name, ratio in texts.items() if ratio < 4.5} == {}
        assert {name: ratio for name, ratio in controls.items() if ratio < 3} == {}
        page.press("body", "Alt+t")


def test_a_long_answer_is_drawn_at_once(page: Any) -> None:
    """4,000 tokens, which came at once: what drawing them costs does not grow with their square."""
    times = []
    for count in (1000, 4000):
        stream(page, *(piece(content=f"w{i} ") for i in range(count)), piece("stop"))
        page.evaluate("performance.mark('begin')")
        say(page, "hello")
        assert page.locator(".assistant").last.locator(".token").count() == count
        times.append(page.evaluate("performance.now() - performance.getEntriesByName('begin').at(-1).startTime"))
    assert times[1] < 10 * max(times[0], 100), times
