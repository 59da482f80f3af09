"""The page in a headless browser: what a person pastes is judged and shown, and only as text.

GRM_SCREENSHOTS=DIR keeps pictures of it there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeSession

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOTS = os.environ.get("GRM_SCREENSHOTS")  # a directory to keep pictures in
XSS = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request) -> str:
    return request.param


@pytest.fixture
def page(browser) -> Iterator:
    yield from opened(browser, "light")


def opened(browser, scheme: str) -> Iterator:
    """A page that fails its test for any error, and for anything that its policy had to block."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 860})
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    yield page
    context.close()
    expected = [text for text in problems if "status of 4" in text or "ERR_" in text]
    assert problems == expected


def judge(page, query: str, responses: list[str], **fields: str) -> None:
    page.get_by_label("Query").fill(query)
    for _ in range(len(responses) - page.locator(".response").count()):
        page.get_by_role("button", name="Add a response").click()
    for i, text in enumerate(responses):
        page.get_by_label(f"Response {i + 1}", exact=True).fill(text)
    for label, value in fields.items():
        page.locator(f"#{label}").fill(value)
    page.get_by_role("button", name="Judge").click()


def test_a_verdict_is_read_on_the_page(page, client, session):
    page.goto(str(client.base_url))
    api.expect(page.locator("#model")).to_have_text("fake with meta RM and scalar RM")
    judge(page, "Which?", ["score=3", "score=8", "score=5"], k="4", seed="7", criteria="Short.")
    api.expect(page.locator("#winner")).to_have_text("Response 2 wins")
    bars = page.get_by_role("img")
    api.expect(bars).to_have_count(3)
    api.expect(bars.nth(1)).to_have_attribute("aria-label", "Response 2: mean score 8 of 10")
    widths = [float(bars.nth(i).locator(".bar").bounding_box()["width"]) for i in range(3)]
    assert widths[1] > widths[2] > widths[0] > 0
    assert abs(widths[1] / bars.nth(1).bounding_box()["width"] - 0.8) < 0.01
    asked = session.requests[-1]
    assert (asked.options.k, asked.options.seed) == (4, 7)
    assert asked.record.principles == ("Short.",)
    critiques = page.locator(".critique")
    api.expect(critiques).to_have_count(4)
    assert critiques.nth(0).get_by_text("Accuracy: is it right?").is_hidden()
    critiques.nth(0).locator("summary").click()
    assert critiques.nth(0).get_by_text("Accuracy: is it right?").is_visible()
    api.expect(page.locator(".facts")).to_contain_text("100% of the votes agree")
    # Guided votes keep the half that the meta RM ranks highest; the page says which do not.
    api.expect(page.locator(".left-out")).to_have_count(2)


@pytest.mark.parametrize("place", ["query", "response", "critique"])
def test_text_is_shown_as_text_and_never_run(page, serve, place):
    session = FakeSession()
    if place == "critique":
        verdict = session.verdict

        def hostile(request):
            said = verdict(request)
            rows = [dataclasses.replace(r, text=XSS, principles=XSS) for r in said.critiques]
            return dataclasses.replace(said, critiques=tuple(rows), judge=XSS, method=XSS)

        session.verdict = hostile
    page.goto(str(serve(session).base_url))
    texts = {"query": (XSS, ["a", "b"]), "response": ("q", [XSS, "b"])}
    judge(page, *texts.get(place, ("q", ["a", "b"])), k="1")
    api.expect(page.locator("#winner")).to_be_visible()
    page.locator(".critique summary").click()
    if place == "critique":
        api.expect(page.locator(".critique pre").nth(0)).to_have_text(XSS)
        api.expect(page.locator(".critique pre").nth(1)).to_have_text(XSS)
    assert page.title() == "grm_jax judge"
    forged = "#verdict img:not([role]), #verdict script, form img, form script"
    assert page.locator(forged).count() == 0


def test_scripts_that_are_not_the_servers_do_not_run(browser, client):
    page, blocked = browser.new_page(), []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(str(client.base_url))
    for way in (
        "const s = document.createElement('script'); s.textContent = \"document.title='broken'\"; "
        "document.body.append(s)",
        "document.body.innerHTML = '<b>markup</b>'",
        "document.body.insertAdjacentHTML('beforeend', '<p onclick=1>')",
    ):
        page.evaluate(f"() => {{ try {{ {way} }} catch {{}} }}")
    assert page.title() == "grm_jax judge" and page.locator("form").is_visible()
    assert page.locator("b, p[onclick]").count() == 0 and len(blocked) >= 3
    page.close()


def test_failures_ties_and_single_responses_are_said(page, client):
    page.goto(str(client.base_url))
    judge(page, "q", ["unreadable", "b"])
    api.expect(page.locator("#verdict")).to_contain_text("No critique could be read: no_box")
    api.expect(page.get_by_role("img")).to_have_count(0)
    judge(page, "q", ["score=10", "score=10"])
    api.expect(page.locator("#winner")).to_have_text("A tie of 1 and 2")
    page.get_by_role("button", name="Remove response 2").click()
    judge(page, "q", ["score=1"])
    api.expect(page.locator("#winner")).to_contain_text("Score 1")


def test_an_error_of_the_server_is_read_on_the_page(page, client):
    page.goto(str(client.base_url))
    judge(page, "too long", ["a", "b"])
    api.expect(page.get_by_role("alert")).to_contain_text("leave room for a critique")
    judge(page, " ", ["a", "b"])
    api.expect(page.get_by_role("alert")).to_contain_text("query")
    api.expect(page.get_by_role("button", name="Judge")).to_be_enabled()


def test_work_can_be_stopped(page, client, session):
    page.goto(str(client.base_url))
    judge(page, "never", ["a", "b"])
    api.expect(page.locator("#progress")).to_contain_text(
        re.compile("(waiting|running) … 0 of 8 critiques")
    )
    page.get_by_role("button", name="Stop").click()
    api.expect(page.get_by_role("alert")).to_have_text("stopped")
    for _ in range(300):
        if session.cancelled:
            break
        page.wait_for_timeout(10)
    assert session.cancelled


def test_the_token_is_asked_for_and_sent(page, serve):
    page.goto(str(serve(FakeSession(), token="s3cret").base_url))
    judge(page, "q", ["a", "b"])
    api.expect(page.get_by_role("alert")).to_contain_text("token")
    api.expect(page.locator("#token")).to_be_focused()
    judge(page, "q", ["score=1", "score=9"], token="s3cret")
    api.expect(page.locator("#winner")).to_have_text("Response 2 wins")


def test_everything_can_be_reached_by_keyboard_and_has_a_name(page, client):
    page.goto(str(client.base_url))
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('input, textarea, button')]"
        ".filter((e) => !(e.labels?.length && e.labels[0].textContent.trim()) "
        "&& !e.textContent.trim() && !e.getAttribute('aria-label')).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    page.get_by_role("button", name="Fill in an example").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Judge").focus()
    page.keyboard.press("Enter")
    api.expect(page.locator("#winner")).to_be_visible()
    page.locator(".critique summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".critique pre").first.is_visible()


def test_text_can_be_read_in_both_colour_schemes(browser, client, scheme):
    """The contrast of text with what is behind it is at least 4.5 : 1 (WCAG AA)."""
    for page in opened(browser, scheme):
        page.goto(str(client.base_url))
        page.get_by_role("button", name="Fill in an example").click()
        page.get_by_role("button", name="Judge").click()
        page.locator(".critique summary").first.click()
        low = page.evaluate(CONTRAST)
        assert low == []
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"page-{scheme}.png", full_page=True)


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map(
      (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility()) continue;
    const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) found.push([e.outerHTML.slice(0, 80), ratio]);
  }
  return found;
}"""
