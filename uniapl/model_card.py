"""The README.md of an exported model: what it was made of, how, and how well it did."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from uniapl.analysis import Evaluation, Interval
from uniapl.config import Config, load_config
from uniapl.config_errors import masked
from uniapl.data.used import COLUMNS, files_recorded, files_used
from uniapl.report.words import objective_words
from uniapl.runlog import read_metrics

SHOWN = ("reward/mean", "reward/pass_rate", "loss/total", "expert/nll", "discriminator/gap", "kl/reference")
"""Of the last step's metrics, those that there are."""


def model_card(run: Path, step: int, dtype: str) -> str:
    """The card of the weights after `step` optimizer steps of a run.

    Args:
        run: its folder.
        step: 0: what training began from.
        dtype: of the weights.

    Raises:
        ConfigError, RunError: a file of the run is damaged.
    """
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = load_config(run / "config.yaml")
    results = _results(run, step, config)
    parts = [
        f"---\n{yaml.safe_dump(_header(config, results), sort_keys=False, allow_unicode=True)}---",
        f"# {config.run.name}, step {step} of {config.run.steps}",
        f"`{_base(config)}` post-trained with UniAPL: expert demonstrations, group-sampled rollouts and an adversarial "
        f"term as weighted terms of one objective. Weights: {dtype}, as the learner held them after {step} optimizer "
        "steps.",
        f"## Method\n\n{_table(('what', 'value'), _method(config))}",
        f"## Data\n\n{_table(COLUMNS, _data(run, config))}",
        f"## Results\n\n{_results_table(results)}{_training(run, step)}",
        f"## Made with\n\n{_table(('package', 'version'), _versions(run))}",
        f"## How to make it again\n\nWith the configuration below as `config.yaml`, the same data and packages:\n\n"
        f"    uniapl train config.yaml run.name={config.run.name}-again\n"
        f"    uniapl export {config.run.folder}/{config.run.name}-again --step {step}\n\n"
        f"```yaml\n{masked(text).strip()}\n```",
        "## Licence\n\nThat of the model training began from, and of the data: see there.",
    ]
    return "\n\n".join(parts) + "\n"


def _base(config: Config) -> str:
    return Path(config.model.path).name


def _header(config: Config, results: list[tuple[str, int, Interval]]) -> dict[str, Any]:
    """The metadata that model hubs read."""
    header: dict[str, Any] = {
        "base_model": _base(config),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["uniapl", "post-training", *_terms(config)],
    }
    if (licence := _licence(Path(config.model.path))) is not None:
        header["license"] = licence
    after = [rate for name, _, rate in results if name == "this model"]
    if after:
        metric = {"type": "pass_rate", "name": "held-out pass rate", "value": round(after[0].value, 4)}
        dataset = {"type": "held-out", "name": f"{after[0].count} held-out prompts"}
        result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]}
        header["model-index"] = [{"name": config.run.name, "results": [result]}]
    return header


def _terms(config: Config) -> list[str]:
    return [term for term, weight in config.objective.coefficients.items() if weight.ever_positive]


def _licence(base: Path) -> str | None:
    """What the base model's own card says."""
    try:
        head = (base / "README.md").read_text(encoding="utf-8").split("---")
        found = yaml.safe_load(head[1]).get("license") if len(head) > 2 and not head[0].strip() else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _method(config: Config) -> list[tuple[str, ...]]:
    q, r, learner = config.queue, config.rollout, config.learner
    batch = []
    if config.objective.uses_rollouts:
        batch.append(f"{q.groups_per_step} prompts × {r.group_size} samples")
    if config.objective.uses_demonstrations:
        batch.append(f"{q.demonstrations_per_step} demonstrations")
    return [
        ("weights of the terms", objective_words(config.objective.model_dump(mode="json"))),
        ("batch", " + ".join(batch)),
        ("sampling", f"temperature {r.temperature:g}, up to {r.max_tokens} tokens"),
        ("rewards", ", ".join(function.name for function in config.reward.functions)),
        ("staleness", f"at most {q.max_staleness} versions"),
        ("learning rate", f"{learner.learning_rate:g}, {learner.warmup_steps} steps of warm-up"),
        ("arithmetic", learner.dtype),
        ("seed", str(config.run.seed)),
    ]


def _data(run: Path, config: Config) -> list[tuple[str, ...]]:
    rows = files_recorded(run) or files_used(config)
    return [(use, f"`{file}`", size, digest and f"`{digest}`") for use, file, size, digest in rows]


def _results(run: Path, step: int, config: Config) -> list[tuple[str, int, Interval]]:
    """(what, step, held-out pass rate) before training and of these weights, where they were evaluated.

    An evaluation beside training that later weights had a part in is not of these.
    """
    last = [("after", config.run.steps)] if step == config.run.steps else []
    found = []
    for name, made in [("before", 0), (f"step-{step:05d}", step), *last]:
        path = run / "eval" / f"{name}.json"
        if not path.is_file():
            continue
        evaluation = Evaluation.load(path)
        if evaluation.step != made or (name.startswith("step-") and evaluation.versions != [made]):
            continue
        if (rate := evaluation.pass_rate) is not None:
            found.append(("before training" if name == "before" else "this model", made, rate))
    return found


def _results_table(results: list[tuple[str, int, Interval]]) -> str:
    if not results:
        return "These weights were not evaluated by the run.\n"
    rows = [
        (name, str(step), f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}", str(rate.count))
        for name, step, rate in results
    ]
    return _table(("held-out pass rate", "step", "rate", "95 % interval", "prompts"), rows)


def _training(run: Path, step: int) -> str:
    last = next((record for record in read_metrics(run) if record["step"] == step), None)
    rows = [(f"`{key}`", f"{last[key]:.4g}") for key in SHOWN if key in last] if last else []
    return f"\nIn the step that made them:\n\n{_table(('metric', 'value'), rows)}" if rows else ""


def _versions(run: Path) -> list[tuple[str, ...]]:
    path = run / "versions.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [(name, str(version)) for name, version in sorted(found.items())]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
