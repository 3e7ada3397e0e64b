"""`uniapl eval`: a model or a run on a suite, in this process, without Ray."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.offline import Response, sample_prompts
from cluster.checkpoints import installed_versions
from uniapl.config import Config, RewardFunction, load_config
from uniapl.config_errors import ConfigError
from uniapl.data.encoding import ChatEncoder, check_template
from uniapl.data.errors import DataError
from uniapl.data.model_folder import check_model, read_model_config, size_of
from uniapl.evals.result import Result
from uniapl.evals.scores import Answer
from uniapl.evals.suites import Item, Suite, open_suite
from uniapl.evals.verdicts import judge, unavailable
from uniapl.records import Prompt, Score
from uniapl.rewards import ScoreRequest, resolve
from uniapl.rewards.cache import MemoryCache
from uniapl.rewards.scoring import Scorer

MAX_TOKENS = 1280
"""Of a response where neither --max-tokens nor a run's held-out suite says otherwise."""
Judge = Callable[[Suite, list[list[Response]]], tuple[list[list[Answer]], dict[str, str]]]


def evaluate_model(options: Namespace) -> int:
    """Sample, judge, write the JSON and print the table; returns the exit status.

    Raises:
        ConfigError, DataError: before the engine starts.
    """
    if options.samples > 1 and options.temperature == 0:
        raise ConfigError(f"--samples: got {options.samples}, all alike at temperature 0; allowed: --temperature > 0")
    config, run = _config(options.target)
    suite = open_suite(options.suite, config.data.heldout if run else None, options.limit)
    judged = _judge(suite, options.reward, config)
    check_template(config.model.path)
    encoder = ChatEncoder.from_folder(config.model.path)
    prompts = [_prompt_ids(item, encoder, suite) for item in suite.items]
    config = _sized(config, options, max(map(len, prompts)), run)
    check_model(config, len(encoder.tokenizer))
    began = time.monotonic()
    with _progress() as bar:
        task = bar.add_task(f"{suite.name}: starting the engine", total=len(prompts) * options.samples)

        def done(response: Response) -> None:
            bar.update(task, advance=1, description=f"{suite.name}: responses")

        responses = sample_prompts(config, _gpu(), prompts, options.samples, options.temperature, done)
    seconds = time.monotonic() - began
    answers, skipped = judged(suite, responses)
    settings = _settings(config, options)
    result = Result(suite, config.model.path, settings, answers, skipped, seconds, installed_versions())
    _show(result, options.out or _place(options, suite), options.json)
    return 0


def _config(target: Path) -> tuple[Config, bool]:
    """The configuration of a run, with its exported model, or the default one around a model; whether it is a run."""
    if (target / "config.yaml").is_file():
        config = load_config(target / "config.yaml")
        if not (target / "model" / "config.json").is_file():
            raise ConfigError(
                f"{target}: holds no model/, which a run writes at its end; "
                f"allowed: the folder that `uniapl export {target}` writes from a checkpoint"
            )
        return _with(config, "model", path=str(target / "model")), True
    if not (target / "config.json").is_file():
        raise ConfigError(
            f"{target}: holds neither config.yaml nor config.json; allowed: the folder of a run or a model"
        )
    tree: dict[str, Any] = {"model": {"path": str(target)}, "data": {"train": ["none"]}, "evaluation": {"prompts": 0}}
    return Config.model_validate(tree), False


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _prompt_ids(item: Item, encoder: ChatEncoder, suite: Suite) -> list[int]:
    try:
        return encoder.prompt_ids(item.messages)
    except DataError as error:
        raise DataError(f"{suite.source}: prompt {item.id}: {error}") from None


def _sized(config: Config, options: Namespace, longest: int, run: bool) -> Config:
    """With room in the engine for the longest prompt and a whole response."""
    read = size_of(read_model_config("model.path", config.model.path), "max_position_embeddings")
    wanted = options.max_tokens or (config.rollout.max_tokens if run and options.suite == "heldout" else MAX_TOKENS)
    room = wanted if read is None else read - longest
    if room < 1 or (options.max_tokens and wanted > room):
        raise ConfigError(
            f"--max-tokens: got {wanted}; allowed: <= {max(room, 0)}, since {config.model.path} reads {read} tokens "
            f"and the longest prompt has {longest}"
        )
    tokens = min(wanted, room)
    config = _with(config, "run", seed=options.seed)
    return _with(
        config,
        "rollout",
        max_tokens=tokens,
        max_model_len=longest + tokens,
        dtype=options.dtype or config.rollout.dtype,
        tensor_parallel=options.tensor_parallel,
    )


def _judge(suite: Suite, reward: str | None, config: Config) -> Judge:
    """Verifiers where prompts have instructions, else rewards: `--reward`, or the run's own.

    Raises:
        ConfigError: an unknown reward.
        DataError: some prompts have instructions and others have not.
    """
    without = [item for item in suite.items if not item.instructions]
    if reward is None and not without:
        return _by_verifiers
    if reward is None and len(without) < len(suite.items):
        raise DataError(
            f"{suite.source}: prompt {without[0].id} has no instructions and others have; "
            "allowed: all or none of them, or --reward NAME for all"
        )
    if reward is None and suite.name != "heldout":
        raise ConfigError(
            f"--suite: {suite.source} has prompts without instructions; allowed: with --reward exact_match, math, "
            "or module:function"
        )
    functions = [RewardFunction(name=reward)] if reward else config.reward.functions
    timeout_s = config.reward.timeout_s
    scorer = Scorer(resolve(functions, timeout_s), MemoryCache(config.reward.cache_entries), timeout_s)

    def by_rewards(suite: Suite, responses: list[list[Response]]) -> tuple[list[list[Answer]], dict[str, str]]:
        requests = [
            ScoreRequest(Prompt(item.id, item.messages, [], item.verifier), [r.text for r in group])
            for item, group in zip(suite.items, responses, strict=True)
        ]
        found = [scorer.score([request])[0] for request in requests]
        pairs = zip(responses, found, strict=True)
        return [[_rewarded(r, s) for r, s in zip(group, scores, strict=True)] for group, scores in pairs], {}

    return by_rewards


def _by_verifiers(suite: Suite, responses: list[list[Response]]) -> tuple[list[list[Answer]], dict[str, str]]:
    skipped = unavailable([(item.text, item.instructions) for item in suite.items])
    return [
        [Answer(*_sampled(r), verdicts=judge(item.instructions, item.text, r.text, skipped)) for r in group]
        for item, group in zip(suite.items, responses, strict=True)
    ], skipped


def _rewarded(response: Response, score: Score) -> Answer:
    return Answer(*_sampled(response), reward=score.reward, checks=score.checks, unscored=score.unscored or "")


def _sampled(response: Response) -> tuple[str, int, str, float]:
    """Text, tokens, why it ended, log-probability."""
    return response.text, len(response.token_ids), response.finish_reason, sum(response.logprobs)


def _settings(config: Config, options: Namespace) -> dict[str, Any]:
    r = config.rollout
    return {
        "samples": options.samples,
        "temperature": options.temperature,
        "top_p": r.top_p,
        "max_tokens": r.max_tokens,
        "dtype": r.dtype,
        "seed": config.run.seed,
        "limit": options.limit,
        "reward": options.reward,
    }


def _place(options: Namespace, suite: Suite) -> Path:
    """RUN/eval/SUITE-HOW.json; of a model, which is left as it is, runs/eval/MODEL/SUITE-HOW.json."""
    how = "greedy" if options.temperature == 0 else f"k{options.samples}-t{options.temperature:g}"
    target: Path = options.target
    folder = target if (target / "config.yaml").is_file() else Path("runs") / "eval" / target.resolve().name
    return (folder / "eval" if folder == target else folder) / f"{suite.name}-{how}.json"


def _gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _show(result: Result, path: Path, as_json: bool) -> None:
    result.save(path)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    console = Console()
    for table in result.tables():
        console.print(table)
    for line in result.notes():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    settings = result.settings
    how = "greedy" if settings["temperature"] == 0 else f"{settings['samples']} samples at {settings['temperature']:g}"
    print(f"{how}, {settings['dtype']}, up to {settings['max_tokens']} tokens, {result.seconds:.0f} s")
    print(f"results: {path}")
