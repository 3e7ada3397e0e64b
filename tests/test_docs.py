"""The documentation says what is so: links, keys, files, commands, the configuration's reference, the site."""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import markdown
import pytest
import yaml

from cluster.cli import _arguments
from uniapl import config_reference
from uniapl.config import Config
from uniapl.data.reader import ShardReader
from uniapl.objective_config import Coefficient
from uniapl.records import Prompt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "actors|benchmarks|cluster|configs|data|docs|learner|requirements|tests|uniapl"
WRONG_ON_PURPOSE = ("README.md", "learner.lr")
"""The README shows what a wrong key looks like."""
CODE = re.compile(r"^```.*?^```|^(?: {4}.*\n)+", re.MULTILINE | re.DOTALL)


class Links(HTMLParser):
    """Targets of a page's links and pictures, and the anchors that it has."""

    def __init__(self, html):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs["id"]} if "id" in attrs else set()
        self.targets += [attrs[name] for name in ("href", "src") if name in attrs]


@pytest.fixture(scope="module")
def pages():
    extensions = ["tables", "toc", "fenced_code", "attr_list"]
    return {path: Links(markdown.markdown(path.read_text("utf-8"), extensions=extensions)) for path in PAGES}


def broken(path, target, pages):
    """Why a link does not hold; None where it does, or leads out of the project over https."""
    if target.startswith("https://"):
        return None
    link, _, anchor = target.partition("#")
    file = (path.parent / link).resolve() if link else path
    if not file.exists():
        return "no such file"
    if anchor and anchor not in pages[file].anchors:
        return "no such heading"
    return None


def test_links_lead_to_files_and_headings(pages):
    found = [(path, target, broken(path, target, pages)) for path in PAGES for target in pages[path].targets]
    assert len(found) > 50
    assert [(str(path), target, why) for path, target, why in found if why] == []


def test_broken_links_are_found(pages):
    assert broken(PAGES[0], "docs/nothing.md", pages) == "no such file"
    assert broken(PAGES[0], "docs/method.md#nothing", pages) == "no such heading"
    assert broken(PAGES[0], "docs/method.md#formula", pages) is None


def test_links_to_other_sites_are_followed_to_an_answer(capsys, monkeypatch):
    """`make links`; a server here takes the place of the sites, a port without one that of a site that is not there."""
    sys.path.insert(0, str(ROOT / "docs"))
    import follow_links

    known = {link for path in PAGES for link in re.findall(r"https://github.com/[\w./-]+", path.read_text("utf-8"))}
    assert len(known) > 40 and known <= follow_links.outside_links().keys()
    handler = partial(SimpleHTTPRequestHandler, directory=ROOT / "docs")
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as gone,
    ):
        Thread(target=server.serve_forever, daemon=True).start()
        here, nobody = (f"http://127.0.0.1:{s.server_port}" for s in (server, gone))
        gone.server_close()
        said = {}
        for links in ([f"{here}/faq.md"], [f"{here}/faq.md", f"{here}/no.md"], [f"{nobody}/faq.md"]):
            # The site's own links lead elsewhere: these lead to the server above.
            monkeypatch.setattr(follow_links, "outside_links", lambda links=links: dict.fromkeys(links, "page"))
            status = follow_links.main([])
            said[status] = capsys.readouterr().out
        server.shutdown()
    assert said[0] == "1 links: 1 lead somewhere, 0 are gone, 0 gave no answer\n"
    assert said[1].startswith(f"page: {here}/no.md: 404\n")
    assert "Connection refused" in said[2]


def test_every_key_says_something():
    keys = dict(config_reference.all_keys()) | dict(config_reference.all_keys(Coefficient, "objective.TERM.weight."))
    assert len(keys) > 90
    assert [key for key, field in keys.items() if len(field.description or "") < 4] == []


def test_the_reference_is_up_to_date():
    found = (ROOT / "docs/reference/config.md").read_text("utf-8")
    assert found == config_reference.page(), "run: python -m uniapl.config_reference docs/reference/config.md"


def tree_keys():
    """All keys and sections, dotted; a weight's own keys stand below each term's weight."""
    keys = {key for key, _ in config_reference.all_keys()}
    keys |= {f"{key}.{name}" for key in keys if key.endswith(".weight") for name in Coefficient.model_fields}
    return keys | {key.rpartition(".")[0] for key in keys} | {key.replace(".N.", ".") for key in keys}


def test_keys_that_the_pages_name_are_in_the_tree():
    sections, known = "|".join(Config.model_fields), tree_keys()
    named = {
        (path.name, key)
        for path in PAGES
        for key in re.findall(
            rf"(?<![\w./-])(?<!-m )((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?=[`:=,;)\s])", path.read_text("utf-8")
        )
        if not re.search(r"\.(py|md|yaml|json|jsonl|html|arrow|safetensors)$", key)
    }
    assert len(named) > 100
    assert {(page, key) for page, key in named if key not in known} == {WRONG_ON_PURPOSE}


def test_files_that_the_pages_name_are_there():
    named = {
        (path.name, file)
        for path in PAGES
        for file in re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.(?:py|yaml|md|txt|json|svg|png))", path.read_text("utf-8"))
    }
    assert len(named) > 40
    assert sorted((page, file) for page, file in named if not (ROOT / file).is_file()) == []


def commands(text):
    """Lines of code that begin with `uniapl`, those that `\\` continues joined, without their comments."""
    for block in CODE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if words.startswith("uniapl ") and not re.search(r"[…|\[]", words.split("'")[0]):
                yield words


def test_commands_that_the_pages_show_are_understood(capsys):
    known, wrong, count = tree_keys(), [], 0
    for path in PAGES:
        for line in commands(path.read_text("utf-8")):
            count += 1
            try:
                arguments = _arguments(shlex.split(line, comments=True)[1:])
            except SystemExit:
                wrong.append((path.name, line, capsys.readouterr().err))
                continue
            overrides = getattr(arguments, "overrides", [])
            keys = [o.partition("=")[0] for o in overrides if not o.startswith("KEY")]
            wrong += [(path.name, line, key) for key in keys if key not in known]
    assert [(page, key) for page, _, key in wrong] == [WRONG_ON_PURPOSE]
    assert count > 20


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_configurations_that_the_pages_show_are_valid():
    found = [(path, yaml.safe_load(block)) for path in PAGES for block in blocks(path, "yaml")]
    assert len(found) > 4
    for path, tree in found:
        model, data = {"path": "models/x"}, {"train": ["train.arrow"], "heldout": ["heldout.arrow"]}
        assert Config.model_validate({"model": model, "data": data} | tree), path.name


def test_the_guides_code_runs(tmp_path, monkeypatch):
    """A data set as `guides/own-model.md` makes it is read; a reward as in `guides/own-reward.md` is called."""
    monkeypatch.chdir(tmp_path)
    [make_shards] = blocks(ROOT / "docs/guides/own-model.md", "python")
    exec(make_shards, {})
    rows = ShardReader(["train.arrow", "heldout.arrow"])
    assert len(rows) == 200 and (rows[1].response, rows[1].verifier) == ("3", '{"answer": "3"}')
    [reward] = blocks(ROOT / "docs/guides/own-reward.md", "python")
    names = {}
    exec(reward, names)
    prompt = Prompt("a", rows[1].messages, [], rows[1].verifier)
    assert (names["exact"](prompt, " 3"), names["exact"](prompt, "4")) == (1.0, 0.0)


def fields(*files):
    """Names of the fields of the dataclasses in these files of installed packages, which are not imported."""
    packages = Path(next(iter(find_spec("trl").submodule_search_locations))).parent
    trees = [ast.parse((packages / file).read_text("utf-8")) for file in files]
    return {node.target.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}


def test_trl_has_the_fields_that_the_migration_notes_name():
    text = (ROOT / "docs/migration-trl.md").read_text("utf-8")
    known = fields("trl/trainer/base_config.py", "transformers/training_args.py")
    for name in ("grpo", "sft"):
        part = text.partition(f"## {name.upper()}Config")[2].partition("\n## ")[0]
        named = {
            word for row in re.findall(r"^\| (.*?) \|", part, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)
        }
        assert len(named) > 5
        assert named - known - fields(f"trl/trainer/{name}_config.py") == set()


class Loads(HTMLParser):
    """What a browser fetches by itself for a page."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(attrs.get("href", ""))
        elif tag != "a":
            self.found += [attrs[name] for name in ("src", "srcset", "data", "poster") if attrs.get(name)]


def test_the_site_builds_strictly_and_loads_nothing_from_outside(tmp_path):
    """`make docs`: broken links, missing pages and headings are errors; links to other sites are not followed. What
    its scripts fetch was looked at in Chromium by hand: nothing. In a process of its own: mkdocstrings changes Python's
    limit of recursion."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    html = sorted(tmp_path.rglob("*.html"))
    assert len(html) > 20
    loads = [load for page in html for load in Loads(page.read_text("utf-8")).found]
    styles = [url for css in tmp_path.rglob("*.css") for url in re.findall(r"url\(([^)]+)\)", css.read_text("utf-8"))]
    assert loads and styles
    assert [url for url in loads + styles if re.match(r"['\"]?(https?:)?//", url)] == []
