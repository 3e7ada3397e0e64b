"""The report in use, in a real Chromium: pointer, keys, phone, dark mode, print, and nothing from the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import Browser, needs_browser
from helpers_run import write_run

from uniapl.report import write_comparison, write_report

pytestmark = needs_browser
PHONES = [320, 390]
CHART = "document.querySelector('#training svg[data-chart]')"
TIP = "(document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText)"
CONTRASTS = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || ['SCRIPT', 'STYLE'].includes(node.tagName)) continue;
    const style = getComputedStyle(node), front = node.closest('svg') ? style.fill : style.color, back = behind(node);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found[`${node.tagName} ${node.className.baseVal ?? node.className} ${front} on ${back}`] = (a + 0.05) / (b + 0.05);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name, seed=seed) for seed, name in enumerate(("a" * 40, "second"))]
    return {"report": write_report(runs[0]), "comparison": write_comparison(runs)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(params=["report", "comparison"])
def page(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


def trouble(browser: Browser, page: Path) -> list[Any]:
    """Requests but for the page itself, errors of its script, and what its policy refused."""
    found = []
    for event in browser.events:
        told = event["params"]
        if event["method"] == "Network.requestWillBeSent" and told["request"]["url"] != page.as_uri():
            found.append(told["request"]["url"])
        elif event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
            found.append(told)
    return found


def test_no_request_and_no_error_also_when_all_is_opened_and_pointed_at(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.run("document.querySelectorAll('svg[tabindex]').forEach((one) => one.focus())")
    tables = browser.run("document.querySelectorAll('details.values table').length")
    assert tables == browser.run("document.querySelectorAll('svg[data-chart]').length") > 15
    assert trouble(browser, page) == []


def test_what_a_page_asks_of_the_network_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    """Else the test above could not fail."""
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'><script>nothing()</script>")
    browser.open(page)
    assert len(trouble(browser, page)) >= 2


def test_the_pointer_shows_the_values_of_the_nearest_step(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"])
    browser.run(f"{CHART}.scrollIntoView({{block: 'center'}})")
    box = browser.run(
        f"(({{left, top, width, height}}) => [left, top, width, height])({CHART}.getBoundingClientRect())"
    )
    chart = browser.run(f"JSON.parse({CHART}.dataset.chart)")
    left, top, width, height = box
    for index in (0, 14, 29):
        browser.point(left + chart["px"][index] / 420 * width + 1, top + height / 2)
        shown = browser.run(TIP)
        assert shown.splitlines()[0] == f"step {index + 1}"
        for row in chart["rows"]:
            assert f"{row['name']} {row['text'][index]}" in shown
    browser.point(1, 1)
    assert browser.run(TIP) == ""


def test_every_chart_is_reached_by_tab_and_read_by_arrows_and_as_a_table(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["report"])
    focused = "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText)"
    reached = []
    for _ in range(250):
        browser.press("Tab")
        if browser.run("document.activeElement === document.body"):
            break
        reached.append(browser.run(focused))
    assert reached[0] == "Skip to the content"
    labels = browser.run("[...document.querySelectorAll('svg[aria-label]')].map((svg) => svg.ariaLabel)")
    assert len(labels) > 25 and set(labels) <= set(reached)
    assert {f"{label.split(':')[0]}: values as a table" for label in labels if "interval" not in label} <= set(reached)

    browser.run(f"{CHART}.focus()")
    browser.press("Tab")
    browser.press("Enter")
    browser.run("new Promise((done) => setTimeout(done, 100))")  # the table is made after the key
    table = browser.run("document.activeElement.parentElement.querySelector('table').innerText")
    chart = browser.run(f"JSON.parse({CHART}.dataset.chart)")
    assert len(table.splitlines()) == 31 and chart["rows"][0]["text"][6] in table
    browser.run(f"{CHART}.focus()")  # as by Tab: the last key was one
    browser.press("Home")
    assert browser.run(TIP).splitlines()[0] == "step 1"
    browser.press("ArrowRight", times=2)
    assert browser.run(TIP).splitlines()[0] == "step 3"
    browser.press("Escape")
    assert browser.run(TIP) == ""


@pytest.mark.parametrize("width", PHONES)
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width, 800, phone=True)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    text = "[...document.querySelectorAll('main svg text')].map((one) => one.getBoundingClientRect().height)"
    assert min(browser.run(text)) > 9  # pixels of a line


def test_a_finger_on_a_chart_shows_its_values_until_it_touches_another_place(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["report"], 390, 844, phone=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        for chart in range(2):
            one = f"document.querySelectorAll('#training svg[data-chart]')[{chart}]"
            browser.run(f"{one}.scrollIntoView({{block: 'center'}})")
            box = browser.run(
                f"(({{left, top, width, height}}) => [left, top, width, height])({one}.getBoundingClientRect())"
            )
            browser.tap(box[0] + box[2] / 2, box[1] + box[3] / 2)
            row = browser.run(f"JSON.parse({one}.dataset.chart).rows[0]")
            step = int(browser.run(TIP).splitlines()[0].removeprefix("step "))
            assert 10 < step < 20 and f"{row['name']} {row['text'][step - 1]}" in browser.run(TIP)
            edges = browser.run(
                "(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())"
            )
            assert 0 <= edges[0] < edges[1] <= 390
        browser.tap(5, 5)
        assert browser.run(TIP) == ""
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground_in_light_and_in_dark(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    [red] = re.findall(r"rgb\((\d+),", ground)
    assert (int(red) < 60) == dark
    found = browser.run(CONTRASTS)
    assert len(found) > 10
    assert {kind: ratio for kind, ratio in found.items() if ratio < 4.5} == {}


def test_on_paper_the_page_is_light_and_shows_its_samples(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('details.values')).display") == "none"
    assert len(browser.call("Page.printToPDF")["data"]) > 50_000
