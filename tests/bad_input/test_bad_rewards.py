"""Reward functions that are not there or not functions, and what they may return instead of a number."""

from __future__ import annotations

import decimal
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_bad_input import complaint
from helpers_rewards import make_prompt
from helpers_toy import toy_config

from uniapl.config import RewardFunction
from uniapl.config_errors import ConfigError
from uniapl.records import Score
from uniapl.rewards import Reward, RewardResult, ScoreRequest, resolve
from uniapl.rewards.cache import MemoryCache
from uniapl.rewards.scoring import Scorer

BUILT_IN = "allowed: ifeval, ifbench, exact_match, math, module:function, or http(s)://HOST:PORT"
FUNCTION = "; allowed: a function of (prompt, response)"

# name: (what stands in the module, the function asked for, how what is said goes on)
MODULES: dict[str, tuple[str, str, str]] = {
    "empty": ("", "f", "; module {m} has no f"),
    "syntax": ("def f(:\n", "f", "; cannot import {m}: SyntaxError: invalid syntax ({m}.py, line 1)"),
    "no UTF-8": ("f = '\udcff'\n", "f", "; cannot import {m}: SyntaxError: (unicode error)"),
    "ends the process": ("import sys\nsys.exit('bye')\n", "f", "; cannot import {m}: SystemExit: bye"),
    "ends it without a word": ("raise SystemExit\n", "f", "; cannot import {m}: SystemExit"),
    "two lines": ("raise ValueError('two\\nlines')\n", "f", "; cannot import {m}: ValueError: two lines"),
    "an endless message": ("raise ValueError('x' * 10**6)\n", "f", "; cannot import {m}: ValueError: xxx"),
    "an error without words": (
        "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n",
        "f",
        "; cannot import {m}: E",
    ),
    "imports what is not there": (
        "import no_such_module\n",
        "f",
        "; cannot import {m}: ModuleNotFoundError: No",
    ),
    "calls itself": ("def g(): g()\ng()\n", "f", "; cannot import {m}: RecursionError: maximum recursion depth"),
    "asked, it raises": ("def __getattr__(name): raise KeyError(name)\n", "f", "; cannot import {m}: KeyError: 'f'"),
    "a number": ("f = 3\n", "f", "; module {m} is not callable: f"),
    "a dotted name": ("class A:\n    def f(p, r): return 1.0\n", "A.f", "; module {m} has no A.f"),
    "one parameter": (
        "def f(prompt): return 1.0\n",
        "f",
        "', TypeError: too many positional arguments" + FUNCTION,
    ),
    "three parameters": (
        "def f(prompt, response, more): return 1.0\n",
        "f",
        "', TypeError: missing a required argument: 'more'" + FUNCTION,
    ),
    "by name only": (
        "def f(*, prompt, response): return 1.0\n",
        "f",
        "', TypeError: too many positional arguments" + FUNCTION,
    ),
    "a generator": ("def f(p, r): yield 1.0\n", "f", "', a generator; allowed: a plain function"),
    "an async generator": ("async def f(p, r): yield 1\n", "f", "', an async generator; allowed: a plain function"),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_users_module_that_cannot_be_used(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, function, expected = MODULES[case]
    module = "bad_" + "".join(c if c.isalnum() else "_" for c in case)
    (tmp_path / f"{module}.py").write_bytes(source.encode("utf-8", "surrogateescape"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as raised:
        resolve([RewardFunction(name=f"{module}:{function}")])
    said = str(raised.value).replace("got '" + f"{module}:{function}" + "'", "got '", 1)
    expected = expected.format(m=module).removeprefix("'")
    assert said.startswith(f"reward.functions.0.name: got '{expected}") and "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("os:getpid", "', TypeError: too many positional arguments" + FUNCTION),
        ("helpers_toy", "'; " + BUILT_IN),
        (":many_e", "'; " + BUILT_IN),
        ("helpers_toy:", "'; " + BUILT_IN),
        ("../helpers_toy:f", "'; cannot import ../helpers_toy: TypeError: the 'package' argument is required"),
        ("/etc/passwd:f", "'; cannot import /etc/passwd: ModuleNotFoundError: No module named '/etc/passwd'"),
        (".helpers_toy:f", "'; cannot import .helpers_toy: TypeError: the 'package' argument is required"),
        ("helpers_toy.py:many_e", "'; cannot import helpers_toy.py: ModuleNotFoundError: No module named"),
        ("h\u0435lpers_toy:many_e", "'; cannot import h\u0435lpers_toy: ModuleNotFoundError: No module named"),
        ("ifeval:", "'; " + BUILT_IN),
        ("IFEval", "'; " + BUILT_IN),
    ],
)
def test_the_command_says_it_before_anything_starts(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    said = complaint(capsys, "train", toy_config(tmp_path, tiny), f"reward.functions=[{{name: '{name}'}}]")
    assert said.startswith(f"reward.functions.0.name: got '{name}{expected}")
    assert not (tmp_path / "runs").exists()


class Number(float):
    """A number that cannot be made a float."""

    def __float__(self) -> float:
        raise RuntimeError


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


def exits(prompt: Any, response: str) -> float:
    raise SystemExit("bye")


def recurses(prompt: Any, response: str) -> float:
    return recurses(prompt, response)


def raises_many_lines(prompt: Any, response: str) -> float:
    raise ValueError("one\ntwo\r\nthree\u2028four")


FINITE = "; allowed: a finite number"
CHECKS = "; allowed: true or false by name"
# name: (what the function returns, or the function, why the sample is unscored)
OUTPUTS: dict[str, tuple[Any, str]] = {
    "tensor": (torch.tensor(1.0), "returned Tensor tensor(1.)" + FINITE),
    "tensors": (torch.ones(2), "returned Tensor tensor([1., 1.])" + FINITE),
    "array": (np.array([1.0]), "returned ndarray array([1.])" + FINITE),
    "numpy bool": (np.bool_(True), "returned bool np.True_" + FINITE),
    "numpy NaN": (np.float64("nan"), "returned np.float64(nan)" + FINITE),
    "numpy complex": (np.complex64(1), "returned complex64 np.complex64(1+0j)" + FINITE),
    "decimal": (decimal.Decimal(1), "returned Decimal Decimal('1')" + FINITE),
    "tuple": ((1.0, {}), "returned tuple (1.0, {})" + FINITE),
    "dict": ({"value": 1.0}, "returned dict {'value': 1.0}" + FINITE),
    "bytes": (b"1", "returned bytes b'1'" + FINITE),
    "one per sample": ([1.0] * 100, "returned list [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...]" + FINITE),
    "a function": (math.sqrt, "returned builtin_function_or_method <built-in function sqrt>" + FINITE),
    "an exception": (ValueError("x"), "ValueError: x"),
    "endless text": ("x" * 10**6, "returned str 'xxxxxxxxxxxx...xxxxxxxxxxxxx'" + FINITE),
    "unprintable": (Unprintable(), "returned Unprintable <Unprintable instance at 0x"),
    "huge": (10**400, "returned 100000000000000000...0000000000000000000" + FINITE),
    "a number that is none": (Number(1.0), "returned 1.0" + FINITE),
    "result in a result": (
        RewardResult(RewardResult(1.0)),
        "returned RewardResult RewardResult(....0, checks={})" + FINITE,
    ),
    "result of None": (RewardResult(None), "returned NoneType None" + FINITE),
    "checks a list": (RewardResult(1.0, ["a"]), "returned checks ['a']" + CHECKS),
    "check by number": (RewardResult(1.0, {1: True}), "returned checks {1: True}" + CHECKS),
    "check with a line break": (RewardResult(1.0, {"a\nb": True}), "returned checks {'a\\nb': True}" + CHECKS),
    "check without name": (RewardResult(1.0, {"": True}), "returned checks {'': True}" + CHECKS),
    "check NaN": (RewardResult(1.0, {"a": math.nan}), "returned checks {'a': nan}" + CHECKS),
    "check numpy": (RewardResult(1.0, {"a": np.bool_(True)}), "returned checks {'a': np.True_}" + CHECKS),
    "endless check": (RewardResult(1.0, {"a" * 1000: True}), "returned checks {'aaaaaaaaaaaa...aaaaaaaaaaaaa': True}"),
    "many checks": (RewardResult(1.0, {str(i): True for i in range(101)}), "returned 101 checks; allowed: <= 100"),
    "exits": (exits, "SystemExit: bye"),
    "recurses": (recurses, "RecursionError: maximum recursion depth exceeded"),
    "many lines": (raises_many_lines, "ValueError: one two three four"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_what_is_no_number_leaves_the_sample_unscored(case: str) -> None:
    """With its reason in one line, and the sample beside it scored."""
    output, expected = OUTPUTS[case]
    bad = output if callable(output) and output is not math.sqrt else lambda prompt, response: output

    def function(prompt: Any, response: str) -> Any:
        return 1.0 if response == "good" else bad(prompt, response)

    scorer = Scorer([Reward("mine", 1.0, "1", function)], MemoryCache(10), 20.0)
    [[good, unscored]] = scorer.score([ScoreRequest(make_prompt(), ["good", "bad"])])
    assert good == Score(reward=1.0)
    assert unscored.reward is None and unscored.checks == {}
    assert unscored.unscored is not None and unscored.unscored.startswith(f"mine: {expected}")
    assert unscored.unscored.isprintable() and len(unscored.unscored) <= 200


def test_a_function_that_prints_disturbs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def function(prompt: Any, response: str) -> float:
        print("scoring\x1b[2J")
        return 1.0

    scorer = Scorer([Reward("mine", 1.0, "1", function)], MemoryCache(10), 20.0)
    assert scorer.score([ScoreRequest(make_prompt(), ["a"])]) == [[Score(reward=1.0)]]
    assert capsys.readouterr().err == ""


VERIFIERS: dict[str, tuple[str, Any, str]] = {
    "no verifier": ("math", None, "prompt 'p1' has no verifier; allowed: JSON text with the key 'answer'"),
    "no JSON": ("math", "{", "prompt 'p1': the verifier is not JSON text"),
    "a list": ("math", [], "prompt 'p1': the verifier has no key 'answer'"),
    "no such key": ("math", {"Answer": 1}, "prompt 'p1': the verifier has no key 'answer'"),
    "no number": ("math", {"answer": "many"}, "prompt 'p1': answer 'many'; allowed: a number"),
    "null": ("math", {"answer": None}, "prompt 'p1': answer None; allowed: a number"),
    "by zero": ("math", {"answer": "1/0"}, "prompt 'p1': answer '1/0'; allowed: a number"),
    "endless digits": ("math", {"answer": "9" * 9999}, "prompt 'p1': answer '999"),
    "punctuation": ("exact_match", {"answer": "?!"}, "prompt 'p1': answer '?!'; allowed: text with a letter or digit"),
    "no list": ("ifeval", {"instructions": "x"}, "prompt 'p1': 'instructions' is not a list with at least one entry"),
    "empty list": ("ifeval", {"instructions": []}, "prompt 'p1': 'instructions' is not a list with at least one entry"),
    "no object": ("ifeval", {"instructions": [1]}, "prompt 'p1': an instruction is not of the form"),
    "unknown": ("ifeval", {"instructions": [{"id": "x"}]}, "prompt 'p1': unknown ifeval instruction 'x'"),
    "kwargs a list": (
        "ifeval",
        {"instructions": [{"id": "keywords:existence", "kwargs": [1]}]},
        "prompt 'p1': the kwargs of 'keywords:existence' are not an object",
    ),
    "unknown kwarg": (
        "ifeval",
        {"instructions": [{"id": "keywords:existence", "kwargs": {"word": "a"}}]},
        "prompt 'p1': the kwargs of 'keywords:existence': ",
    ),
}


@pytest.mark.parametrize("case", VERIFIERS)
def test_a_verifier_that_says_nothing_leaves_the_sample_unscored(case: str) -> None:
    name, verifier, expected = VERIFIERS[case]
    scorer = Scorer(resolve([RewardFunction(name=name)]), MemoryCache(10), 20.0)
    [[score]] = scorer.score([ScoreRequest(make_prompt(verifier), ["an answer"])])
    assert score.reward is None
    assert score.unscored is not None and score.unscored.startswith(f"{name}: {expected}")
