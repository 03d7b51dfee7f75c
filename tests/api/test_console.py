"""The console in a real browser against a real server."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from gateway.config import ApiKey, FakeModel
from gateway.engine.fake import FakeSpeed
from tests.support.fake_pool import MODEL, Gateway, make_settings
from tests.support.live import LiveServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Browser, url: str) -> Iterator[Page]:
    """A fresh page whose console errors and uncaught exceptions fail the test."""
    complaints: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        yield page
    assert complaints == []


def test_ladder_answer_and_decision(browser: Browser) -> None:
    gateway = Gateway(
        options=FakeModel(tpot_ms=0.2, build_seconds=0.5),
        speed=FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=2),
    )
    with LiveServer(gateway.open) as server, page_of(browser, server.url) as page:
        expect(page.locator("#ladder tbody tr")).to_have_count(3)
        expect(page.locator("#summary")).to_contain_text("1 of 3 levels ready")
        expect(page.locator("#policies")).to_contain_text("default")

        page.fill("#prompt", "<img src=x onerror=alert(1)>")
        page.fill("#max_tokens", "30")
        page.fill("#latency_ms", "60000")
        page.click("#send")
        expect(page.locator("#decision")).to_contain_text("Budget kept.")
        expect(page.locator("#decision")).to_contain_text("bf16")
        assert len(page.locator("#answer").inner_text()) > 30

        page.click("#explain")
        expect(page.locator("#decision table tr")).to_have_count(4)
        expect(page.locator("#decision tr.chosen")).to_contain_text("bf16")

        assert page.input_value("#decision-id").startswith("dec-")
        page.get_by_role("button", name="Explain it").click()
        expect(page.locator("#decision")).to_contain_text("Ended with status 200")
        expect(page.locator("#decision")).to_contain_text("latency_ms 60000: kept")
        expect(page.locator("#decision tr.chosen")).to_contain_text("bf16")

        page.fill("#latency_ms", "")
        page.get_by_role("button", name="Build int8").click()
        expect(page.locator("#jobs")).to_contain_text(f"{MODEL}@int8")
        expect(page.locator("#jobs")).to_contain_text("done", timeout=15_000)
        page.get_by_role("button", name="Load int8").click()
        expect(page.locator("#summary")).to_contain_text("2 of 3 levels ready", timeout=15_000)


def test_stop_ends_a_long_answer(browser: Browser) -> None:
    gateway = Gateway(speed=FakeSpeed(prefill_tokens_per_s=1e9, tpot_ms=20))
    with LiveServer(gateway.open) as server, page_of(browser, server.url) as page:
        expect(page.locator("#ladder tbody tr")).to_have_count(3)
        page.fill("#max_tokens", "4000")
        page.click("#send")
        expect(page.locator("#answer")).not_to_be_empty()
        page.click("#stop")
        expect(page.locator("#send")).to_be_enabled()
        assert gateway.settles()


def test_output_is_shown_as_text_whatever_it_contains(browser: Browser) -> None:
    """`echo` is off, so hostile text is put where it can come from: a level's failure."""
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    gateway = Gateway(options=FakeModel(tpot_ms=0.2, failing_levels=("int8",)))
    with LiveServer(gateway.open) as server, page_of(browser, server.url) as page:
        page.evaluate("text => takeEvent(JSON.stringify({choices: [{text}]}))", hostile)
        page.evaluate("text => showProblem(text)", hostile)
        assert page.locator("#answer").inner_text() == hostile
        assert page.locator("img").count() == 0
        page.get_by_role("button", name="Build int8").click()
        expect(page.locator("#jobs")).to_contain_text("failed", timeout=15_000)
        assert page.title() == "Pressgate"


def test_a_key_is_asked_for_and_used(browser: Browser) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    keys = (ApiKey(name="user", sha256=digest),)
    gateway = Gateway(make_settings(api_keys=keys))
    with LiveServer(gateway.open) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#problem")).to_contain_text("API key")
        page.fill("#key", "secret")
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#ladder tbody tr")).to_have_count(3)
        expect(page.locator("#problem")).to_be_hidden()
        assert page.input_value("#key") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Browser, scheme: str) -> None:
    """WCAG AA: at least 4.5:1 between text and what is behind it, for every colour in use."""
    gateway = Gateway()
    with LiveServer(gateway.open) as server, page_of(browser, server.url) as page:
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        names = ["--ink", "--soft", "--accent", "--good", "--bad", "--busy"]
        colours = page.evaluate(
            "names => names.map(n => getComputedStyle(document.documentElement)"
            ".getPropertyValue(n).trim())",
            [*names, "--bg", "--card"],
        )
        *inks, ground, card = colours
        for name, ink in zip(names, inks, strict=True):
            for behind in (ground, card):
                assert contrast(ink, behind) >= 4.5, (scheme, name, behind)


def contrast(one: str, two: str) -> float:
    bright, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_field_has_a_label(browser: Browser, server: LiveServer) -> None:
    with page_of(browser, server.url) as page:
        unnamed = page.evaluate(
            "() => [...document.querySelectorAll('input, select, textarea')]"
            ".filter(e => !e.labels.length).map(e => e.id)"
        )
        assert unnamed == []
        assert page.evaluate("() => document.documentElement.lang") == "en"
