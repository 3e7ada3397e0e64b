"""Writes run folders as a training run would, with numbers that follow from a seed."""

import dataclasses
import itertools
import json
import math
import random

import yaml

from uniapl.analysis import EvaluatedSample, Evaluation
from uniapl.config import Config
from uniapl.objective_config import Coefficient
from uniapl.runlog import RunLog

CHECKS = [
    "change_case:english_lowercase",
    "change_case:english_capital",
    "combination:two_responses",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:title",
    "keywords:existence",
    "keywords:forbidden_words",
    "length_constraints:number_words",
    "punctuation:no_comma",
    "startend:quotation",
]
PROMPTS = [
    "Explain why the sky is blue to a child. Your whole answer must be in lowercase letters.",
    "Thank a neighbour for watering the plants. Wrap the entire answer in double quotation marks.",
    "List three things to check before a long bicycle tour. Use exactly 3 bullet points (* like this).",
    "Describe the taste of a ripe pear. Do not use any commas.",
    "Give advice for a first day at a new job. At the end, add a postscript that starts with P.S.",
]
ROLLOUT_KEYS = (
    *("reward/", "check/", "ratio/", "correction/", "importance/", "entropy/", "kl/", "staleness/", "discriminator/"),
    "queue/",
)
ROLLOUT_TERMS = ("preference", "adversarial", "kl")
SFT_LACKS = (
    *ROLLOUT_KEYS,
    *(f"{prefix}{term}" for term in ROLLOUT_TERMS for prefix in ("loss/", "share/", "weight/", "gradient/norm_")),
    "gradient/cosine",
    "length/sample",
    "length/truncated",
    "tokens/generated",
    "time/generate",
    "time/score",
)

TERMS = ("demonstration", "preference", "adversarial", "kl")
DEMONSTRATION_WEIGHT = Coefficient(kind="schedule", value=0.9, end=0.05, steps=20)
DIAGNOSTICS_EVERY = 10


def write_run(folder, steps=30, planned=30, evaluations=("before", "after"), sft=False, config=True, seed=0):
    """A run folder with `steps` of `planned` steps and the named evaluations; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    log = RunLog(folder, tensorboard=False)
    for step in range(1, steps + 1):
        metrics = step_metrics(step, planned, rng)
        log.log(step, {k: v for k, v in metrics.items() if not (sft and k.startswith(SFT_LACKS))})
    log.close()
    for name in evaluations:
        evaluation(name, planned, random.Random(seed + 1)).save(folder / "eval" / f"{name}.json")
    if config:
        write_config(folder, planned, sft)
        versions = {"uniapl": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "vllm": "0.32.0", "ray": "2.60.0"}
        (folder / "versions.json").write_text(json.dumps(versions))
    return folder


def write_config(folder, planned, sft=False):
    objective = {"demonstration": {"weight": 1.0}, "preference": {"weight": 0.0}}
    if not sft:
        objective = {
            "preference": {"weight": {"kind": "complement"}},
            "demonstration": {"weight": DEMONSTRATION_WEIGHT.model_dump()},
            "adversarial": {"weight": 0.2, "discriminator": "embedding"},
            "kl": {"weight": 0.01},
        }
    tree = {
        "run": {"name": folder.name, "steps": planned, "seed": 7},
        "model": {"path": "models/smollm2-135m-instruct"},
        "data": {"train": ["data/train-*.arrow"], "heldout": ["data/heldout.arrow"]},
        "objective": objective,
        "reward": {"redis_url": "redis://user@cache.example:6379/0"},
        "learner": {"warmup_steps": 0},
    }
    resolved = Config.model_validate(tree).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))


def step_metrics(step, planned, rng):
    done = step / planned
    wobble = lambda size: rng.gauss(0, size)  # noqa: E731
    reward = 0.28 + 0.3 * done + wobble(0.05)
    losses = {"preference": -0.02 + wobble(0.01), "demonstration": 1.9 * math.exp(-done) + wobble(0.05)}
    losses["adversarial"] = 0.05 * (1 - done) + wobble(0.01)
    losses["kl"] = 0.02 * done + abs(wobble(0.002))
    demonstration = DEMONSTRATION_WEIGHT.at(step - 1)
    weights = {"preference": 1 - demonstration, "demonstration": demonstration, "adversarial": 0.2, "kl": 0.01}
    weighted = {name: weights[name] * losses[name] for name in losses}
    size = sum(abs(value) for value in weighted.values())
    times = {"generate": 2.6, "score": 0.3, "wait": 0.1, "train": 5.1, "evaluate": 0.3, "broadcast": 0.4, "other": 0.2}
    times = {name: max(0.0, value * (1 + wobble(0.08))) for name, value in times.items()}
    gap = 0.35 * (1 - 0.7 * done)
    return {
        "time": 1_763_800_000.0 + 9 * step,
        "reward/mean": reward,
        "reward/std": 0.3,
        "reward/pass_rate": reward - 0.08,
        "reward/zero_advantage_groups": max(0.0, 0.4 - 0.2 * done + wobble(0.05)),
        "reward/unscored": 0,
        **{f"check/{name}": min(1.0, max(0.0, reward + wobble(0.2))) for name in CHECKS},
        "loss/total": sum(weighted.values()),
        **{f"loss/{name}": value for name, value in losses.items()},
        **{f"share/{name}": abs(value) / size for name, value in weighted.items()},
        **{f"weight/{name}": value for name, value in weights.items()},
        **(diagnostics(weights, wobble) if step % DIAGNOSTICS_EVERY == 0 else {}),
        **importance(wobble),
        "entropy/estimate": 1.1 - 0.3 * done + wobble(0.05),
        "ratio/mean": 1 + wobble(0.002),
        "ratio/max": 1.2 + abs(wobble(0.1)),
        "ratio/clip_fraction": abs(wobble(0.01)),
        "ratio/clip_fraction_adversarial": abs(wobble(0.01)),
        "correction/mean": 1 + wobble(0.003),
        "correction/masked_fraction": 0.0,
        "kl/behaviour": 0.0008 + abs(wobble(0.0003)),
        "kl/reference": losses["kl"],
        "staleness/mean": rng.choice([0, 0.25, 0.5, 1]),
        "staleness/max": 1,
        "discriminator/sample_mean": 0.82 - gap + wobble(0.02),
        "discriminator/expert_mean": 0.82,
        "discriminator/gap": gap + wobble(0.02),
        "discriminator/accuracy": min(1.0, 0.5 + gap),
        "discriminator/margin": 4 * gap + wobble(0.1),
        "discriminator/loss": 0.69 - gap,
        "length/sample_mean": 58 - 14 * done + wobble(2),
        "length/demonstration_mean": 41 + wobble(2),
        "length/truncated": max(0.0, 0.6 - 0.4 * done + wobble(0.04)),
        "expert/nll": losses["demonstration"],
        "tokens/generated_per_s": 760 + wobble(30),
        "tokens/trained_per_s": 1180 + wobble(40),
        "learner/learning_rate": 1e-5 * (0.1 + 0.45 * (1 + math.cos(math.pi * done))),
        "learner/grad_norm": 1.5 + wobble(0.3),
        "learner/packing_efficiency": 0.93 + wobble(0.01),
        "queue/ready": rng.randint(0, 8),
        "queue/open": rng.randint(0, 8),
        "queue/dropped_stale": 0,
        "queue/dropped_unscored": 0,
        "queue/resampled": 2 * step,
        "queue/kept_equal": step // 3,
        **{f"time/{name}": value for name, value in times.items()},
        "time/step": sum(times.values()),
    }


def diagnostics(weights, wobble):
    """What only some steps have: the exact entropy, and each term's gradient."""
    norms = {f"gradient/norm_{name}": weight * (2 + wobble(0.2)) for name, weight in weights.items()}
    pairs = itertools.combinations(TERMS, 2)
    return norms | {f"gradient/cosine_{a}_{b}": wobble(0.3) for a, b in pairs} | {"entropy/exact": 1.0 + wobble(0.05)}


def importance(wobble):
    """Quantiles of the importance weights and the effective sample size."""
    names = ("min", "p01", "p50", "p99", "max")
    weights = sorted(math.exp(wobble(0.02) + spread) for spread in (-0.9, -0.1, 0, 0.1, 1.2))
    found = {f"importance/{name}": weight for name, weight in zip(names, weights, strict=True)}
    return found | {"importance/ess": 0.97 + wobble(0.005)}


def evaluation(name, step, rng, prompts=64):
    """Before: about a third of the prompts pass; after: about six in ten, shorter and more like the expert."""
    after = name == "after"
    samples = [evaluated_sample(index, after, rng) for index in range(prompts)]
    experts = random.Random(7)  # the same responses in every evaluation
    expert_lengths = [max(4, round(experts.gauss(40, 9))) for _ in range(prompts)]
    slope = 0.9 if after else 0.45
    expert_logprobs = [-rng.expovariate(slope) for _ in range(sum(expert_lengths))]
    return Evaluation(step if after else 0, samples, expert_lengths, expert_logprobs)


def evaluated_sample(index, after, rng):
    checks = {name: rng.random() < (0.78 if after else 0.55) for name in rng.sample(CHECKS, rng.randint(1, 3))}
    tokens = max(4, min(64, round(rng.gauss(44 if after else 60, 12))))
    return EvaluatedSample(
        prompt_id=f"heldout-{index:03}",
        prompt=PROMPTS[index % len(PROMPTS)],
        response=f"response {'after' if after else 'before'} {index}: " + "sunlight is scattered by the air. " * 4,
        tokens=tokens,
        reward=None if index == 63 and not after else float(all(checks.values())),
        checks=checks,
        expert_response=None if index % 9 == 8 else f"expert {index}: blue light is scattered most, and so we see it.",
        token_logprobs=[-rng.expovariate(1.1 if after else 1.6) for _ in range(tokens)],
    )


def with_text(original, text):
    """An evaluation in which every piece of text is `text`."""
    samples = [
        dataclasses.replace(s, prompt=text, response=text, expert_response=text, checks={text: True})
        for s in original.samples
    ]
    return dataclasses.replace(original, samples=samples)
