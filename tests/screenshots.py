"""Makes the pictures of reports in docs/ with a real Chromium.

    python tests/screenshots.py RUN [COMPARED COMPARED …]

RUN gives report.png, report-phone.png and report-dark.png; the others, where there are two or more, report-compare.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from helpers_browser import Browser

from uniapl.report import write_comparison, write_report

DOCS = Path(__file__).parents[1] / "docs"


def main(runs: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as scratch, Browser(Path(scratch) / "profile") as browser:
        report = write_report(runs[0])
        browser.open(report)
        browser.picture(DOCS / "report.png", 1500)
        browser.open(report, dark=True)
        browser.run("document.getElementById('expert').scrollIntoView()")
        browser.run("document.querySelector('#expert .pairs svg').focus()")
        browser.press("ArrowLeft", times=3)
        browser.picture(DOCS / "report-dark.png")
        browser.open(report, 390, 844, phone=True)
        browser.picture(DOCS / "report-phone.png", 1500)
        if len(runs) > 2:
            browser.open(write_comparison(runs[1:], Path(scratch) / "comparison.html"))
            browser.picture(DOCS / "report-compare.png", 1600)


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])
