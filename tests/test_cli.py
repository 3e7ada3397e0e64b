"""The command line: quick help, and one line for a user's mistake, before any process starts."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_toy import toy_config, write_shard

from cluster.cli import command_parser, main

ROOT = Path(__file__).resolve().parent.parent


def uniapl(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def parsers(parser: argparse.ArgumentParser, words: str = "uniapl") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """`parser` and all below it, by their words."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, f"{words} {name}")


@pytest.mark.parametrize(("words", "parser"), list(parsers(command_parser())))
def test_help_fits_on_a_screen_and_has_an_example(words: str, parser: argparse.ArgumentParser) -> None:
    lines = parser.format_help().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert f"usage: {words} " in lines[0]
    assert lines[2], "what it does"
    assert any(line.startswith(("  uniapl ", "  eval ")) for line in lines), "an example"


def test_the_table_in_the_docs_has_every_command_and_says_which_have_json() -> None:
    """By its usage, in the order of the help."""
    text = (ROOT / "docs/cli.md").read_text().partition("## ")[0]
    told = {
        words.replace("\\|", "|"): json.strip() for words, json in re.findall(r"(?m)^\| `(.+?)` \|.*\|(.*)\|$", text)
    }
    commands = {usage(parser): parser for _, parser in parsers(command_parser()) if parser.get_default("run")}
    assert list(told) == list(commands)
    with_json = [words for words, parser in commands.items() if "--json" in parser.format_help()]
    assert [words for words, json in told.items() if json and not words.startswith("train")] == with_json


def usage(parser: argparse.ArgumentParser) -> str:
    line = parser.format_usage().splitlines()[0].removeprefix("usage: uniapl ").removesuffix(" [OPTION ...]")
    return line.replace("...", "…")


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "vllm", "pydantic", "numpy", "rich", "yaml", "argcomplete")
    help_of_all = "import sys, cluster.cli as c; c.command_parser().format_help()"
    code = f"{help_of_all}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_that_nobody_foresaw_has_its_traceback_and_what_to_do_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: argparse.Namespace) -> None:
        """In the place of a command: an input that is known to break one would be mended instead."""
        raise ZeroDivisionError

    monkeypatch.setattr("cluster.commands.report.run", broken)
    assert main(["report", "x"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.rstrip().splitlines()[-1].startswith("not foreseen; `uniapl doctor` checks this machine")


COMPLETE = """
eval "$(python -m cluster.cli completion bash)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<< "$1"
[[ "$1" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete uniapl
printf '%s\n' "${COMPREPLY[@]}"
"""
"""Asks bash's completion as a TAB does."""


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("uniapl re", {"report", "replay"}),
        ("uniapl replay runs/x 3 --", {"--pdb", "--failed", "--json"}),
        ("uniapl train c.yaml learner.r", {"learner.ranks=", "learner.row_tokens="}),
        ("uniapl train c.yaml objective.kl.w", {"objective.kl.weight."}),
    ],
)
def test_bash_completes_commands_options_and_keys(tmp_path: Path, line: str, wanted: set[str]) -> None:
    program = tmp_path / "uniapl"
    program.write_text(f"#!{sys.executable}\nfrom cluster.cli import main\nmain()\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert {word.strip() for word in done.stdout.split()} == wanted, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere"], "model.path: got 'nowhere'; allowed: a Hugging Face folder with a config.json"),
        (["data.train=[none-*.arrow]"], "none-*.arrow"),
        (["reward.functions=[{name: no_such}]"], "no_such"),
        (["reward.functions=[{name: 'no_module:f'}]"], "no_module"),
        (["run.steps=0"], "run.steps: got 0; allowed: a whole number > 0"),
        (["learner.lr=1"], "learner.lr: unknown key"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path: Path, tiny: Path, overrides: list[str], message: str) -> None:
    config = toy_config(tmp_path, tiny)
    done = uniapl("train", str(config), *overrides, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "runs").exists(), "nothing may be written"


def test_a_broken_shard_is_named_before_anything_starts(tmp_path: Path, tiny: Path) -> None:
    config = toy_config(tmp_path, tiny)
    shard = tmp_path / "train-0.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    done = uniapl("train", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(shard) in done.stderr


def test_report_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.arrow", [])
    done = uniapl("report", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_overrides_may_stand_after_options() -> None:
    from cluster.cli import _arguments

    found = _arguments(["train", "c.yaml", "a.b=1", "-m", "sft", "run.steps=2"])
    assert (found.methods, found.overrides) == (["sft"], ["a.b=1", "run.steps=2"])
