"""The example in examples/own_task, a user's own prompts, reward and discriminator, run by the parts that run them."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
from helpers_cli import train
from helpers_page import page_of
from helpers_rewards import make_prompt

from cluster.preflight import preflight
from uniapl.analysis import EvaluatedSample, Evaluation
from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.discriminators import Comparison, ExpertScores, open_discriminator
from uniapl.discriminators.own import OwnDiscriminator, resolve_own
from uniapl.records import Prompt
from uniapl.rewards import ScoreRequest, resolve
from uniapl.rewards.cache import MemoryCache
from uniapl.rewards.scoring import Scorer
from uniapl.runlog import read_metrics

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_task"
KEY = "objective.adversarial.discriminator"


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The example's configuration with a tiny model, and the shards that its own program wrote."""
    folder = tmp_path_factory.mktemp("own_task")
    with pytest.MonkeyPatch.context() as patch:  # as `python -m my_task.prompts` in this folder does it
        patch.chdir(folder)
        patch.syspath_prepend(EXAMPLE)
        runpy.run_module("my_task.prompts", run_name="__main__")
    shards = [f"data.{name}=['{folder / name}.parquet']" for name in ("train", "heldout")]
    return load_config(EXAMPLE / "config.yaml", [f"model.path={tiny}", *shards])


@pytest.fixture(autouse=True)
def example_is_where_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


def scored(config: Config, prompt: Prompt, responses: list[str]) -> list:
    """As a replica of the reward service does it, without the service around it."""
    scorer = Scorer(resolve(config.reward.functions), MemoryCache(9), 20.0, open_discriminator(config))
    [scores] = scorer.score([ScoreRequest(prompt, responses)])
    return scores


def test_each_part_is_under_20_lines_of_code() -> None:
    for name in ("prompts", "reward", "discriminator"):
        tree = ast.parse((EXAMPLE / "my_task" / f"{name}.py").read_text())
        lines = {node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")}
        assert 3 < len(lines - {1}) < 20, name  # the first is the docstring


def test_the_docs_show_the_examples_code() -> None:
    said = (ROOT / "docs" / "extending.md").read_text()
    for name in ("prompts", "reward", "discriminator"):
        code = (EXAMPLE / "my_task" / f"{name}.py").read_text().partition('"""\n\n')[2].strip()
        assert code and code in said, name


def test_the_task_is_scored_by_its_own_reward_and_discriminator_and_reported(config: Config, tmp_path: Path) -> None:
    prompts = preflight(config)
    assert len(prompts) == 32 and prompts[0].messages[0]["content"].startswith("Name ")
    expert = prompts[0].expert_response
    assert expert
    wrong = "a cat, a cat"
    right, bad = scored(config, prompts[0], [expert, wrong])
    assert (right.reward, right.expert_score, right.expert_reference) == (1.0, 1.0, 1.0)
    assert right.checks == {"animals:count": True, "animals:one_word_each": True, "animals:no_repeats": True}
    assert bad.checks["animals:no_repeats"] is False and bad.reward < 1 and 0 <= bad.expert_score < 1

    samples = [
        EvaluatedSample(p.id, p.messages[-1]["content"], wrong, 3, bad.reward, bad.checks, p.expert_response, [-1.0])
        for p in prompts
    ]
    Evaluation(0, samples, [], []).save(tmp_path / "eval" / "before.json")
    text = page_of(tmp_path).text
    assert "animals:no_repeats" in text and wrong in text and str(expert) in text


@pytest.mark.chaos  # for its minute alone: in `make test` test_resume_async.py trains with the three parts
@pytest.mark.timeout(300)
def test_the_task_is_trained_on(config: Config, tmp_path: Path) -> None:
    """One step by the command, from the example's folder, with its configuration made small."""
    small = [
        *(
            "run.name=own",
            "run.steps=1",
            "learner.warmup_steps=1",
            f"run.folder={tmp_path}",
            "evaluation.prompts=0",
            "cluster.object_store_gib=0.1",
        ),
        *("queue.groups_per_step=2", "queue.demonstrations_per_step=2", "rollout.group_size=2", "rollout.threads=1"),
        *("rollout.dtype=float32", "learner.dtype=float32", f"model.path={config.model.path}"),
        *(f"data.{name}={getattr(config.data, name)}" for name in ("train", "heldout")),
    ]
    train(EXAMPLE / "config.yaml", *small)
    [step] = read_metrics(tmp_path / "own")
    assert {"check/animals:count", "check/animals:one_word_each", "check/animals:no_repeats"} <= step.keys()
    assert step["discriminator/paired"] == 1.0
    assert step["weight/adversarial"] == 0.1


class NotAsked:
    """A user's discriminator, which is made by its name without arguments: what it is to return is put into `found`."""

    found: object = None

    def scores(self, comparisons: list[Comparison]) -> object:
        return self.found


class Picky:
    def __init__(self, threshold: float) -> None: ...


class Silent:
    pass


broken = 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:X", "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
        ("test_extending:Nothing", "module test_extending has no Nothing"),
        ("test_extending:broken", "module test_extending is not callable: broken"),
        ("test_extending:Picky", "missing a required argument: 'threshold'; allowed: a class without arguments"),
        ("test_extending:Silent", "which has no method scores; allowed: one of (comparisons)"),
    ],
)
def test_a_discriminator_that_cannot_be_one_is_one_line(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{KEY}: got '{name}'") as caught:
        resolve_own(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "returned no list of 1 ExpertScores"),
        ([], "returned no list of 1 ExpertScores"),
        ([0.5], "returned no ExpertScores of 1 responses"),
        ([ExpertScores(1.0, [])], "returned no ExpertScores of 1 responses"),
        ([ExpertScores(1.0, [float("nan")])], "returned a score that is not finite"),
    ],
)
def test_wrong_scores_leave_the_samples_unscored_with_the_reason(
    config: Config, monkeypatch: pytest.MonkeyPatch, found: object, said: str
) -> None:
    import test_extending  # the module by the name that the configuration gives it

    monkeypatch.setattr(test_extending.NotAsked, "found", found)
    own = OwnDiscriminator("test_extending:NotAsked")
    scorer = Scorer(resolve(config.reward.functions), MemoryCache(9), 20.0, own)
    [[score]] = scorer.score([ScoreRequest(make_prompt({"count": 1}, expert="cat"), ["dog"])])
    assert score.reward is None and said in str(score.unscored)
