"""Reads a report's page as a browser would."""

import json
import re
from html.parser import HTMLParser

from uniapl.report import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The tags, attributes and text of a page; an unclosed or wrongly nested tag is an error."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.texts, self.charts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        words = " ".join(data for tag, data in self.texts if tag not in ("style", "script"))
        return re.sub(r"\s+", " ", words)

    def chart(self, title):
        """What a chart shows at each of its places: the data of its hover."""
        [found] = [a for a in self.attributes("svg") if a.get("aria-label", "").startswith(f"{title}:")]
        return json.loads(found["data-chart"])


def page_of(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))
