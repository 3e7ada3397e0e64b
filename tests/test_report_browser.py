"""The report with hostile text in a real browser: its elements stay those of a harmless one, and nothing of it runs.

Needs a Chromium on the PATH; `test_security_report.py` checks the same with Python's parser everywhere.
"""

from __future__ import annotations

import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers_browser import BROWSER, needs_browser
from test_security_report import HARMLESS, HOSTILE, run_with

from uniapl.report import write_report

pytestmark = needs_browser
OWNED = "OWNED"
MARK = [f"<img src=x onerror=\"document.title='{OWNED}'\">", f"<script>document.title='{OWNED}'</script>"]
TEXTS = {
    "all at once": " ".join(HOSTILE + MARK),
    "image": MARK[0],
    "script": "</script>" + MARK[1],
    "attribute": f'" onpointerenter="document.title=\'{OWNED}\'" autofocus onfocus="document.title=\'{OWNED}\'" x="',
}


class Dom(HTMLParser):
    """Elements, with the names of their attributes, as the browser has them once the page's own script has run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.title = ""
        self._in_title = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(sorted(name for name, _ in attrs))))
        self._in_title = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
            self._in_title = False


def dom(page: Path, profile: Path) -> Dom:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={profile}"]
    command = [str(BROWSER), *flags, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return Dom(done.stdout.decode("utf-8", "replace"))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Dom:
    folder = tmp_path_factory.mktemp("harmless")
    found = dom(write_report(run_with(folder / "run", HARMLESS)), folder / "profile")
    assert len(found.elements) > 500
    return found


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_hostile_text_makes_no_element_and_runs_nothing(tmp_path: Path, harmless: Dom, text: str) -> None:
    found = dom(write_report(run_with(tmp_path / "run", text)), tmp_path / "profile")
    assert found.elements == harmless.elements
    assert OWNED not in found.title and found.title == harmless.title


def test_on_a_page_that_does_not_escape_it_the_same_text_runs(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>fine</title><p>{MARK[0]}</p>")
    found = dom(page, tmp_path / "profile")
    assert found.title == OWNED
    assert ("img", ("onerror", "src")) in found.elements
