"""Configurations that tests/test_config_errors.py has not: traps of Unicode and YAML, sizes, names of files.

All through the command line, in one line each; a few in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_bad_input import complaint

from cluster.cli import main
from uniapl.config_errors import MAX_YAML_BYTES

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = "model: {path: m}\ndata: {train: [t.arrow], heldout: [h.arrow]}\n"
SECTIONS = "run, model, data, rollout, reward, queue, objective, learner, evaluation, logging, cluster"
RUN = "name, seed, steps, folder, scratch, checkpoint_every, keep_last, keep_every, max_restarts, grace_seconds"
SEED = "a whole number >= 0 and < 4294967296"
NAME = "text of at most 100 letters, digits, '.', '_' and '-', the first a letter or digit"
TEXT = "one line of 1 to 4095 characters, without control characters"
ADDRESS = "'local', 'auto' or HOST:PORT"
FLOAT = "objective.preference.weight: got {}; allowed: a number >= 0 or a section with the keys kind, value, end, \
warmup_steps, steps, target, rate, min, max"
NEXT = "; allowed: plain YAML, with quotes around text that has special characters"

# (override, the whole line)
OVERRIDES = [
    # Unicode: look-alikes, marks that turn the direction of writing, what is no character
    ("run.n\u0430me=x", rf"override: run.'n\u0430me': unknown key; did you mean 'name'? allowed: {RUN}"),
    ("\uff52\uff55\uff4e.seed=1", rf"override: '\uff52\uff55\uff4e': unknown key; allowed: {SECTIONS}"),
    ("run.se\u200bed=1", rf"override: run.'se\u200bed': unknown key; did you mean 'seed'? allowed: {RUN}"),
    ("run.\u202edees=1", rf"override: run.'\u202edees': unknown key; allowed: {RUN}"),
    ("run.name=n\u0430me", f"override: run.name: got 'n\u0430me'; allowed: {NAME}"),
    ("run.name=CAFE\u0301", f"override: run.name: got 'CAFE\u0301'; allowed: {NAME}"),
    ("run.seed=\u0663", f"override: run.seed: got '\u0663'; allowed: {SEED}"),
    (r'model.path="a\u202eb"', rf"override: model.path: got 'a\u202eb'; allowed: {TEXT}"),
    (r'model.path="a\u2066b"', rf"override: model.path: got 'a\u2066b'; allowed: {TEXT}"),
    (r'model.path="a\u2028b"', rf"override: model.path: got 'a\u2028b'; allowed: {TEXT}"),
    (r'model.path="a\x85b"', rf"override: model.path: got 'a\x85b'; allowed: {TEXT}"),
    (r'model.path="a\x7fb"', rf"override: model.path: got 'a\x7fb'; allowed: {TEXT}"),
    (r'model.path="\x1b[31mred"', rf"override: model.path: got '\x1b[31mred'; allowed: {TEXT}"),
    (
        r'model.path="\ud800"',
        r"""override 'model.path="\\ud800"': line 1: not valid YAML: '\ud800' is not Unicode text""",
    ),
    (
        r'run={"\ud800": 1}',
        r"""override 'run={"\\ud800": 1}': line 1: not valid YAML: '\ud800' is not Unicode text""",
    ),
    ("\udcff=1", r"override '\udcff=1': not UTF-8 text; allowed: key.subkey=value"),
    ("model.path=\udcff", r"override 'model.path=\udcff': not UTF-8 text; allowed: key.subkey=value"),
    # numbers
    ("run.steps=1e999", "override: run.steps: got inf; allowed: a whole number > 0"),
    ("learner.learning_rate=1e999", "override: learner.learning_rate: got inf; allowed: a finite number > 0"),
    ("objective.preference.weight=1e999", "override: " + FLOAT.format("inf")),
    ("objective.preference.weight=[1]", "override: " + FLOAT.format("[1]")),
    (
        f"run.steps={'9' * 19}",
        f"override 'run.steps={'9' * 19}': line 1: not valid YAML: a whole number of more than 18 digits",
    ),
    (
        f"run.seed=-{'1' * 19}",
        f"override 'run.seed=-{'1' * 19}': line 1: not valid YAML: a whole number of more than 18 digits",
    ),
    (
        f"run.steps=0x{'f' * 17}",
        f"override 'run.steps=0x{'f' * 17}': line 1: not valid YAML: a whole number of more than 18 digits",
    ),
    ("run.steps=0b1", "override: run.steps: got '0b1'; allowed: a whole number > 0"),
    ("run.seed=-0x1", f"override: run.seed: got '-0x1'; allowed: {SEED}"),
    ("run.seed=1:30", f"override: run.seed: got '1:30'; allowed: {SEED}"),
    ("run.seed=2020-01-01", f"override: run.seed: got '2020-01-01'; allowed: {SEED}"),
    ("run.seed=# one", f"override: run.seed: got null; allowed: {SEED}"),
    ("learner.learning_rate=1_0.5", "override: learner.learning_rate: got '1_0.5'; allowed: a number > 0"),
    ("queue.lease_s=1e300", "override: queue.lease_s: got 1e+300; allowed: <= 1e+09, in seconds"),
    ("cluster.step_timeout_s=1e10", "override: cluster.step_timeout_s: got 1e+10; allowed: <= 1e+09, in seconds"),
    # depth and shape
    (
        "run.steps" + ".x" * 60_000 + "=1",
        "override 'run.steps" + ".x" * 33 + "....: nested too deeply; allowed: key.subkey=value",
    ),
    (
        "x." * 60_000 + "x=1",
        "override '" + "x." * 38 + "...: nested too deeply; allowed: key.subkey=value",
    ),
    (
        "run.seed=" + "[" * 100_000,
        "override 'run.seed=" + "[" * 67 + "...: not valid YAML: nested too deeply",
    ),
    ("data.train=[[a]]", f"override: data.train.0: got ['a']; allowed: {TEXT}"),
    (
        "data.train={a: b}",
        f"override: data.train: got {{'a': 'b'}}; allowed: a list with at least 1 entry, each {TEXT}",
    ),
    (
        "run.seed=---\n1\n---\n2",
        r"override 'run.seed=---\n1\n---\n2': line 3: not valid YAML: "
        "expected a single document in the stream, but found another document",
    ),
    ("run.seed=!!int 3", "override 'run.seed=!!int 3': line 1: not valid YAML: tags are not allowed"),
    # names of files, addresses
    ("run.name=..", f"override: run.name: got '..'; allowed: {NAME}"),
    (r"run.name=..\x", rf"override: run.name: got '..\\x'; allowed: {NAME}"),
    (r'run.name="a\tb"', rf"override: run.name: got 'a\tb'; allowed: {NAME}"),
    ("model.path=" + "x" * 4096, "override: model.path: got '" + "x" * 76 + f"...; allowed: {TEXT}"),
    ("cluster.address=a:99999", f"override: cluster.address: got 'a:99999'; allowed: {ADDRESS}"),
    ("cluster.address=a:0", f"override: cluster.address: got 'a:0'; allowed: {ADDRESS}"),
    ("cluster.address=a b:1", f"override: cluster.address: got 'a b:1'; allowed: {ADDRESS}"),
    ("cluster.address=:1", f"override: cluster.address: got ':1'; allowed: {ADDRESS}"),
    (
        "reward.redis_url='redis://\u202ex'",
        r"override: reward.redis_url: got 'redis://\u202ex'; "
        "allowed: null or a URL that begins with redis://, rediss:// or unix://",
    ),
]

# (what the file holds beside a sound configuration, what follows its name)
FILES = [
    ("run: &a {seed: 1}\nlearner: *a\n", "line 4: not valid YAML: aliases are not allowed"),
    ("run: !!map {seed: 1}\n", "line 3: not valid YAML: tags are not allowed"),
    ("run: {seed: !!binary aGk=}\n", "line 3: not valid YAML: tags are not allowed"),
    ("run: {seed: ! 1}\n", "line 3: not valid YAML: tags are not allowed"),
    ("run: {name: a, name : b}\n", "line 3: not valid YAML: key 'name' stands twice"),
    ("\"run\": {}\n'run': {}\n", "line 4: not valid YAML: key 'run' stands twice"),
    ('run: {name: a, "n\\u0061me": b}\n', "line 3: not valid YAML: key 'name' stands twice"),
    ("~: x\n", "line 3: not valid YAML: key null is not text"),
    (".nan: x\n", "line 3: not valid YAML: key nan is not text"),
    ("{a: b}: x\n", "line 3: not valid YAML: key {'a': 'b'} is not text"),
    ('"\\ud800": 1\n', r"line 3: not valid YAML: '\ud800' is not Unicode text"),
    ('run: {"\\udc00": {a: 1}}\n', r"line 3: not valid YAML: '\udc00' is not Unicode text"),
    ('run: {name: "\\U00110000"}\n', "not valid YAML: chr() arg not in range(0x110000)"),
    ('run: {name: "\\UFFFFFFFF"}\n', "not valid YAML: Python int too large to convert to C int"),
    ('run: {"a\\u202eb": 1}\n', rf"run.'a\u202eb': unknown key; allowed: {RUN}"),
    ("ru\u00f1: {}\n", rf"'ru\xf1': unknown key; did you mean 'run'? allowed: {SECTIONS}"),
    ("a: \x1b[31m\n", "not valid YAML: unacceptable character #x001b: special characters are not allowed"),
    ("a: \ufffe\n", "not valid YAML: unacceptable character #xfffe: special characters are not allowed"),
    (b"a: \xc0\x80\n", "not UTF-8 text; allowed: a YAML file"),
    (b"\xed\xa0\x80: 1\n", "not UTF-8 text; allowed: a YAML file"),
    (b"a: \xc3", "not UTF-8 text; allowed: a YAML file"),
    (
        "run: |\n  text\n",
        rf"run: got 'text\n'; allowed: a section with the keys {RUN}",
    ),
    ("a: " + "x" * (1 << 20), "larger than 256 KiB; allowed: a configuration file"),
    ("run:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 400)), "not valid YAML: nested too deeply"),
    ("x: " + "{a: " * 2000, "not valid YAML: nested too deeply"),
    ("%YAML 2.0\n---\n", "line 3: not valid YAML: found incompatible YAML document (version 1.* is required)"),
]


def told(expected: str) -> str:
    """With what to do next, which is the same whatever is wrong with YAML."""
    return expected + (NEXT if "not valid YAML" in expected else "")


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(SMALLEST)
    return path


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[ascii(o)[1:40] for o, _ in OVERRIDES])
def test_a_wrong_override(smallest: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str) -> None:
    assert complaint(capsys, "train", smallest, override) == told(expected)


@pytest.mark.parametrize(("content", "expected"), FILES, ids=[ascii(c[:30]) for c, _ in FILES])
def test_a_wrong_file(smallest: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, expected: str) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    smallest.write_bytes(SMALLEST.encode() + raw)
    assert complaint(capsys, "train", smallest) == told(f"{smallest}: {expected}")


@pytest.mark.parametrize("coding", ["utf-16", "utf-32", "utf-16-le"])
def test_a_file_in_another_encoding(smallest: Path, capsys: pytest.CaptureFixture[str], coding: str) -> None:
    smallest.write_bytes(SMALLEST.encode(coding))
    said = complaint(capsys, "train", smallest)
    why = "not valid YAML: unacceptable character #x0000: special characters are not allowed"
    assert said == f"{smallest}: " + (told(why) if coding == "utf-16-le" else "not UTF-8 text; allowed: a YAML file")


def test_links_that_lead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").symlink_to("b.yaml")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    why = "Too many levels of symbolic links; allowed: a readable YAML file"
    assert complaint(capsys, "train", "a.yaml") == f"a.yaml: {why}"
    (tmp_path / "c.yaml").write_text(SMALLEST)
    assert complaint(capsys, "train", "c.yaml", "-m", "a.yaml") == f"a.yaml: {why}"


@pytest.mark.parametrize("method", ["../../etc/passwd", "/etc/passwd", "..", "methods/../x", "s\u0444t", "x" * 300])
def test_a_method_is_a_name_of_the_folder(smallest: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    (smallest.parent / "methods").mkdir()
    (smallest.parent / "methods/sft.yaml").write_text("")
    said = complaint(capsys, "train", smallest, "-m", method)
    assert said == f"--method: got '{method}'; allowed: a .yaml file, or one in {smallest.parent}/methods: sft"


SLOWEST = ["k{}: v\n", "- a\n", "#\n", '"\\n"', "a, ", "? a\n", "'", "|\n ", "x: \n  ", "a: &a{} b\n"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", SLOWEST)
def test_a_file_as_large_as_allowed_is_read_in_bounded_time(
    smallest: Path, capsys: pytest.CaptureFixture[str], piece: str
) -> None:
    """An eighth of the largest size takes half a second; the test's own limit ends what would go on and on."""
    text = "".join(piece.format(number) for number in range(MAX_YAML_BYTES // 8 // len(piece) - 1))
    smallest.write_text(text[: MAX_YAML_BYTES // 8])
    assert main(["train", str(smallest)]) == 2
    assert str(smallest) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([b"train", b"c.yaml", b"model.path=\xff"], r"override 'model.path=\udcff': not UTF-8 text"),
        ([b"train", b"\xff.yaml"], r"\udcff.yaml: No such file or directory; allowed: a readable YAML file"),
    ],
    ids=["override", "file"],
)
def test_arguments_that_are_no_text(smallest: Path, arguments: list[bytes], expected: str) -> None:
    """In a process of its own: the interpreter decodes its arguments."""
    smallest.rename(smallest.with_name("c.yaml"))
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=smallest.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1
