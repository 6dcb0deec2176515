"""The report in a real browser: nothing fetched, nothing complained of, nothing cut off; pictures for the eye.

Screenshots of the first screen and of the whole page go to `.cache/report-screenshots`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from report_cases import certificate, hostile, kept, statement, with_loss
from tests.browser.chromium import Browser, browsing

from weightproof import report

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "report-screenshots"
CASES = {
    "rejected": lambda: with_loss("rejected"),
    "kept": lambda: with_loss("kept", kept()),
    "undecided": lambda: with_loss("undecided"),
    "outputs-only": statement,
    "hostile": hostile,
}
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
NARROWEST = 360
ROLES = {"banner", "navigation", "main", "contentinfo"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=CASES)
def page(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    path.write_text(report.html(certificate(CASES[request.param]())), encoding="utf-8")
    return path


def require_quiet(browser: Browser, page: Path) -> None:
    assert browser.requested == [page.as_uri()], "the page asks for nothing but itself"
    assert browser.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_page_is_quiet_whole_and_photographed(browser, page, size, dark):
    width, height = SIZES[size]
    browser.open(page.as_uri(), width=width, height=height, dark=dark, mobile=size == "phone")
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= browser.evaluate("innerWidth") == width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 64) is dark, f"{background} in the other scheme"
    CACHE.mkdir(parents=True, exist_ok=True)
    for whole in (False, True):
        picture = CACHE / f"report-{page.stem}-{size}-{'dark' if dark else 'light'}{'-whole' if whole else ''}.png"
        browser.screenshot(picture, whole=whole)
        assert picture.stat().st_size > 20_000, "a blank page compresses to less"
    require_quiet(browser, page)


def test_narrowest_phone_scrolls_nothing_but_tables(browser, page):
    browser.open(page.as_uri(), width=NARROWEST, height=740, dark=False, mobile=True)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= NARROWEST
    outside = browser.evaluate(
        f"[...document.querySelectorAll('main *, header *, nav *')].filter(e => !e.closest('.scroll') && "
        f"!e.closest('svg') && e.getBoundingClientRect().right > {NARROWEST} + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    require_quiet(browser, page)


def test_links_lead_to_their_sections_and_details_open(browser, page):
    browser.open(page.as_uri(), width=1280, height=900, dark=False)
    dead = browser.evaluate(
        "[...document.querySelectorAll('a')].filter(a => !document.querySelector(a.hash)).map(a => a.hash)"
    )
    assert dead == []
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 1280
    require_quiet(browser, page)


def test_screen_reader_finds_landmarks_names_and_pictures(browser, page):
    browser.open(page.as_uri(), width=1280, height=900, dark=False)
    nodes = [node for node in browser.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    roles = [node["role"]["value"] for node in nodes]
    assert {role: roles.count(role) for role in ROLES} == dict.fromkeys(ROLES, 1)
    unnamed = {"image", "img", "region", "table", "link", "heading"}
    silent = [n for n in nodes if n["role"]["value"] in unnamed and not n.get("name", {}).get("value", "").strip()]
    assert silent == [], "everything that a reader stops at has a name"


def test_print_is_light_though_the_screen_is_dark(browser, page):
    browser.open(page.as_uri(), width=1280, height=900, dark=True)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=features)
    try:
        ink = browser.evaluate("getComputedStyle(document.body).color")
        assert sum(map(int, ink[4:-1].split(","))) < 3 * 64, "dark letters on paper"
        assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        browser.call("Emulation.setEmulatedMedia", media="", features=features)
