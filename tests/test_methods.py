"""Methods are files of values: each gives the weights that it stands for, and none is a branch in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from uniapl.config import Config, load_config
from uniapl.config_errors import read_yaml
from uniapl.objective.controllers import Controllers

ROOT = Path(__file__).parents[1]
NAMES = ["a_grpo", "a_sft", "chord", "grpo", "sft", "sft_then_grpo", "uniapl"]
A_NAME = re.compile(rf"(?:^|_)({'|'.join(sorted(NAMES, key=len, reverse=True))})(?=_|$)", re.IGNORECASE)
PACKAGES = ["uniapl", "actors", "learner", "cluster", "benchmarks"]

# (method, step, w_pref, mu, lambda)
WEIGHTS = [
    ("sft", 0, 0.0, 1.0, 0.0),
    ("sft", 500, 0.0, 1.0, 0.0),
    ("grpo", 0, 1.0, 0.0, 0.0),
    ("grpo", 500, 1.0, 0.0, 0.0),
    ("sft_then_grpo", 0, 0.0, 1.0, 0.0),
    ("sft_then_grpo", 99, 0.0, 1.0, 0.0),
    ("sft_then_grpo", 100, 1.0, 0.0, 0.0),
    ("sft_then_grpo", 500, 1.0, 0.0, 0.0),
    ("chord", 0, 0.1, 0.9, 0.0),
    ("chord", 100, 0.525, 0.475, 0.0),
    ("chord", 200, 0.95, 0.05, 0.0),
    ("chord", 500, 0.95, 0.05, 0.0),
    ("a_sft", 0, 0.0, 1.0, 0.1),
    ("a_sft", 500, 0.0, 1.0, 0.1),
    ("a_grpo", 0, 1.0, 0.0, 0.1),
    ("a_grpo", 500, 1.0, 0.0, 0.1),
    ("uniapl", 0, 0.5, 0.5, 0.1),
    ("uniapl", 500, 0.5, 0.5, 0.1),
]


def load(method: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs/local.yaml", overrides, [method])


def test_these_are_the_methods_that_there_are() -> None:
    assert sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml")) == NAMES
    assert {name for name, *_ in WEIGHTS} == set(NAMES)


@pytest.mark.parametrize(("method", "step", "preference", "mu", "lam"), WEIGHTS)
def test_weights_over_the_run(method: str, step: int, preference: float, mu: float, lam: float) -> None:
    found = Controllers(load(method).objective).weights(step)
    wanted = {"preference": preference, "demonstration": mu, "adversarial": lam, "kl": 0.0}
    assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_a_method_sets_all_that_it_stands_for_whatever_was_there(method: str, other: str, tmp_path: Path) -> None:
    """Laid over a file of another method, so that no key of that one is left at work."""
    tree = read_yaml(ROOT / "configs/local.yaml")
    tree["objective"] = read_yaml(ROOT / f"configs/methods/{other}.yaml")["objective"]
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = Controllers(load_config(path, [], [str(ROOT / f"configs/methods/{method}.yaml")]).objective)
    alone = Controllers(load(method).objective)
    assert [found.weights(step) for step in (0, 99, 100, 300)] == [alone.weights(step) for step in (0, 99, 100, 300)]


def test_sft_starts_no_engine_and_grpo_reads_no_demonstrations() -> None:
    assert not load("sft").needs_engine
    assert not load("grpo").objective.uses_demonstrations
    assert not load("a_grpo").objective.uses_demonstrations
    assert load("a_sft").objective.uses_rollouts


def test_the_switch_of_sft_then_grpo_can_be_set_and_tells_what_a_step_needs() -> None:
    objective = load("sft_then_grpo", "objective.demonstration.weight.steps=12").objective
    assert [(objective.rollouts_at(s), objective.demonstrations_at(s)) for s in (0, 11, 12, 23)] == [
        (False, True),
        (False, True),
        (True, False),
        (True, False),
    ]


def named(source: str) -> list[str]:
    """Names of methods in Python source: in identifiers and string literals or parts of them, docstrings excepted."""
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            found += A_NAME.findall(node.value)
        for field in ("id", "attr", "name", "arg"):
            value = getattr(node, field, None)
            found += A_NAME.findall(value) if isinstance(value, str) else []
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_method_is_named_in_the_code(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    # The project has the name of one of its methods.
    found = {str(p.relative_to(ROOT)): [n for n in named(p.read_text()) if n.lower() != "uniapl"] for p in paths}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('if method == "sft":\n    pass', ["sft"]),
        ("def grpo(): ...", ["grpo"]),
        ("class GRPO: ...", ["GRPO"]),
        ("loss.chord(a_sft=1)", ["chord", "a_sft"]),
        ('"""sft"""\ndef f():\n    """grpo"""\n    return 1  # chord', []),
        ('phi = "chord_phi"; run_grpo_step()', ["chord", "grpo"]),
        ('x = "averages as in grpo"; p_one_minus_p = 1', []),
    ],
)
def test_the_check_sees_names_and_literals_and_no_prose(source: str, names: list[str]) -> None:
    assert sorted(named(source)) == sorted(names)
