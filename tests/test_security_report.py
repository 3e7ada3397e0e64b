"""The report: whatever text a run holds, the page's elements and attributes are those of a run with harmless text."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers_page import Page, page_of
from helpers_run import write_run

from uniapl.analysis import Evaluation
from uniapl.runlog import METRICS_FILE

HARMLESS = "harmless"
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style></title></textarea></svg></div></details></main></body></html><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><use href=data:x#y></svg>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "'\"` style=position:fixed;background:url(//evil.example) ",
    "<!-- <![CDATA[ ]]> --> <?xml ?> <!doctype html>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;b&#62; &#x3c;i&#x3e;",
    "<meta http-equiv=refresh content=0;url=//evil.example><base href=//evil.example><link rel=x href=//evil.example>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe><form action=//evil.example><input name=a></form>",
    "\u2028alert(1)\u2029\u0085\ufeff\u200b\x00\x08\x0b\x1b[2J\ufffe\ud800\udc00",
    "\u202e\u202d\u2066\u2067\u200f<b>\u2069right to left",
    "{{7*7}}{%raw%}{#x#}${7*7}<%= 7 %>",
    "javascript:alert(1)//https://evil.example/?a=b&copy=c",
]
ATTRIBUTES_WITH_NAMES = {"aria-label", "data-chart"}
"""These name metrics and constraints; they are compared by their kind, not by what stands in them."""


def skeleton(page: Page) -> list[tuple[str, dict[str, str | None]]]:
    """Every element in order with its attributes; numbers left out, which follow lengths of names."""
    return [
        (tag, {k: None if k in ATTRIBUTES_WITH_NAMES else re.sub(r"[\d.]+", "#", v or "") for k, v in attrs.items()})
        for tag, attrs in page.tags
    ]


def run_with(folder: Path, text: str) -> Path:
    """A run in which `text` stands wherever data can bring text in."""
    run = write_run(folder, steps=5)
    for name in ("before", "after"):
        path = run / "eval" / f"{name}.json"
        found = Evaluation.load(path)
        samples = [
            dataclasses.replace(
                s,
                prompt_id=s.prompt_id + text,
                prompt=text + s.prompt,
                response=s.response + text,
                expert_response=text,
                checks={f"{check}/{text}": passed for check, passed in s.checks.items()},
            )
            for s in found.samples
        ]
        dataclasses.replace(found, samples=samples).save(path)
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    lines = [line | {f"check/{text}": 0.5, f"adv/{text}": 0.5, text: 1.0} for line in lines]
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "versions.json").write_text(json.dumps({f"torch {text}": text}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    whole = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is refused there
    config["model"]["path"] = config["objective"]["adversarial"]["discriminator"] = whole
    (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, and holds every text
    return run


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> list[tuple[str, dict[str, str | None]]]:
    found = skeleton(page_of(run_with(tmp_path_factory.mktemp("run") / "r", HARMLESS)))
    assert len(found) > 500
    return found


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_element_and_no_attribute_comes_from_data(tmp_path, harmless, text):
    page = page_of(run_with(tmp_path / "r", text))
    assert skeleton(page) == harmless
    charts = [attrs["data-chart"] for attrs in page.attributes("svg") if "data-chart" in attrs]
    assert charts and all(json.loads(chart)["rows"] for chart in charts)


def test_the_text_itself_is_shown(tmp_path):
    page = page_of(run_with(tmp_path / "r", HOSTILE[0]))
    shown = [text for _, text in page.texts if HOSTILE[0] in text]
    assert len(shown) > 10
