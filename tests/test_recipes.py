"""The recipes for GPUs say why: every value of the objective has its reason beside it, and none is without effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from uniapl.config import Config, load_config
from uniapl.objective_config import AdversarialTerm

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("qwen3-*.yaml"))
ANYWHERE = ["rollout.group_size", "learner.learning_rate", "learner.warmup_steps"]
SAID = {
    *(f"preference.{key}" for key in ("weight.kind", "average", "advantage_std")),
    *(f"demonstration.weight.{key}" for key in ("kind", "value", "end", "steps")),
    "demonstration.token_weight",
    *(f"adversarial.{key}" for key in ("weight", "average", "advantage_std", "discriminator")),
    "kl.weight",
    *(f"surrogate.{key}" for key in ("proximal", "correction", "cap")),
}
"""What acts on these runs: with one step on every batch no clip does."""


def leaves(node: yaml.Node, key: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, number of its line, from 0) of every value that is no section."""
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        dotted = f"{key}.{name.value}".removeprefix(".")
        if isinstance(value, yaml.MappingNode):
            yield from leaves(value, dotted)
        else:
            yield dotted, name.start_mark.line


def unexplained(text: str, *below: str) -> list[str]:
    """Keys that begin so and have no comment of their own, on their line or in the one above; a line holds one key."""
    lines, found = text.splitlines(), dict(leaves(yaml.compose(text)))
    taken = list(found.values())

    def explained(line: int) -> bool:
        above = lines[line - 1].strip() if line else ""
        reason = lines[line].partition(" #")[2] or above.removeprefix("#") * above.startswith("#")
        return taken.count(line) == 1 and len(reason.split()) >= 3

    return [key for key, line in found.items() if key.startswith(below) and not explained(line)]


def inert_clips(config: Config) -> list[str]:
    """Clips that were set and can never bind."""
    binds = config.objective.surrogate.proximal == "behaviour" or config.learner.steps_per_batch > 1
    terms = {"preference": config.objective.preference, "adversarial": config.objective.adversarial}
    usual = AdversarialTerm()
    return [
        f"{name}.{key}"
        for name, term in terms.items()
        for key in ("clip_low", "clip_high")
        if not binds and getattr(term, key) != getattr(usual, key)
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
class TestRecipe:
    def test_every_value_of_the_objective_has_its_reason(self, recipe: Path) -> None:
        text = recipe.read_text(encoding="utf-8")
        assert unexplained(text, "objective.", *ANYWHERE) == []
        keys = [key for key, _ in leaves(yaml.compose(text))]
        assert {key.removeprefix("objective.") for key in keys if key.startswith("objective.")} == SAID
        assert set(ANYWHERE) <= set(keys)

    def test_no_clip_is_set_that_cannot_bind(self, recipe: Path) -> None:
        assert inert_clips(load_config(recipe)) == []
        assert inert_clips(load_config(recipe, ["objective.preference.clip_high=0.28"])) == ["preference.clip_high"]
        binding = ["objective.preference.clip_high=0.28", "learner.steps_per_batch=2"]
        assert inert_clips(load_config(recipe, binding)) == []

    def test_the_schedule_is_as_long_as_the_run(self, recipe: Path) -> None:
        config = load_config(recipe)
        assert config.objective.demonstration.weight.steps == config.run.steps


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a: 1 # because it is so\n", []),
        ("# because it is so\na: 1\n", []),
        ("# because it is so\na: 1\nb: 2\n", ["b"]),
        ("a: {b: 1, c: 2} # because it is so\n", ["a.b", "a.c"]),
        ("a: 1 # small\n", ["a"]),
        ("b:\n  a: 1\n", ["b.a"]),
    ],
)
def test_what_a_reason_is(text: str, missing: list[str]) -> None:
    assert unexplained(text, "") == missing
