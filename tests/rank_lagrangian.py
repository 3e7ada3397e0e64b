"""One rank that samples from its own policy and trains on it, many steps. Started by test_lagrangian.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from helpers_toy import many_e
from helpers_zero import config, open_engine
from transformers import AutoTokenizer

from learner.step import train_step
from uniapl.metrics import batch_metrics
from uniapl.objective.controllers import Controllers
from uniapl.records import Demonstration, Group, MixedBatch, Prompt, Sample, Score, VersionSpan

TOKENS = 8
SAMPLES = 8


def main(spec: dict[str, Any], out: Path, rank: int) -> None:
    """Train every objective of `spec` for its steps, from the same weights; writes the metrics of every step."""
    found = {name: _train(spec["model"], run["objective"], run["steps"]) for name, run in spec["runs"].items()}
    (out / "steps.json").write_text(json.dumps(found))


def _train(model: str, objective: dict[str, Any], steps: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    c = config(model, objective)
    controllers = Controllers(c.objective)
    engine, _ = open_engine(c, 1)
    found = []
    for step in range(steps):
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            groups = _groups(engine.module.model, tokenizer, step)
        whole, weights = MixedBatch(step, groups, _demonstrations(tokenizer)), controllers.weights(step)
        metrics = batch_metrics(whole, c.objective, weights) | train_step(engine, whole, c, weights, 4e-3, "cpu")
        controllers.update(step, metrics)
        found.append(metrics | {f"weight/{term}": weight for term, weight in weights.items()})
    return found


def _demonstrations(tokenizer: Any) -> list[Demonstration]:
    """An expert who never writes an `e`."""
    return [
        Demonstration(f"d{i}", [1, 40 + i], [*tokenizer.encode(text), tokenizer.eos_token_id])
        for i, text in enumerate(["ab cd", "ba dc", "cab d", "dab c"])
    ]


@torch.no_grad()
def _groups(model: Any, tokenizer: Any, step: int) -> list[Group]:
    """Four prompts, `SAMPLES` responses of `TOKENS` tokens each, drawn one token after the other."""
    found = []
    for g in range(4):
        prompt = Prompt(f"p{step}-{g}", [], [1, 40 + g])
        ids = torch.tensor([prompt.token_ids] * SAMPLES)
        logprobs = []
        for _ in range(TOKENS):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            ahead = (hidden @ model.get_output_embeddings().weight.T / 0.8).log_softmax(-1)
            drawn = torch.multinomial(ahead.exp(), 1)
            logprobs.append(ahead.gather(1, drawn))
            ids = torch.cat([ids, drawn], dim=1)
        rows = zip(ids[:, -TOKENS:].tolist(), torch.cat(logprobs, dim=1).tolist(), strict=True)
        found.append(Group(g, prompt, [_sample(prompt, *row, tokenizer, step) for row in rows], "a"))
    return found


def _sample(prompt: Prompt, ids: list[int], logprobs: list[float], tokenizer: Any, step: int) -> Sample:
    text = tokenizer.decode(ids)
    return Sample(ids, logprobs, [VersionSpan(0, len(ids), step)], text, "stop", Score(many_e(prompt, text)))
