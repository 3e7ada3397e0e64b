"""The learner's step against plainer ways of doing the same work, each in a process of its own, by turns.

    python benchmarks/objective.py [--model FOLDER] [--steps 5] [--dtype bfloat16] [--scale 1] [--rows 512x4]

learner: packed rows with shared prompts, one forward and backward for all terms, ZeRO-3 (learner/step.py).
bare:    forward, backward and AdamW over the same rows in plain PyTorch: what the learner could at best take.
plain:   a padded batch, full logits, one forward and backward per term.

The work is W of benchmarks/work.py.
All hold float32 master weights and optimizer state. `--random 0.6b` measures a Qwen3-0.6B with random weights.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from work import batch, in_turns, report, timed

WEIGHTS = {"demonstration": 0.5, "preference": 0.5, "adversarial": 0.1, "kl": 0.0}
PLAIN_SEQUENCES = 8
"""Sequences of one padded forward pass: about the tokens of the learner's micro-batch."""


def settings(a: argparse.Namespace) -> Any:
    """The configuration that the three share."""
    from uniapl.config import load_config

    row_tokens, micro = a.rows.split("x")
    return load_config(
        "configs/local.yaml",
        [
            f"model.path={a.model}",
            f"learner.dtype={a.dtype}",
            f"learner.row_tokens={row_tokens}",
            f"learner.micro_batch_rows={micro}",
            "objective.diagnostics_every=0",
        ],
    )


def load(a: argparse.Namespace, attention: str) -> nn.Module:
    """The causal language model, float32, in training mode."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if a.random is None:
        return AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation=attention).train()
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return Qwen3ForCausalLM(shape).float().train()


class MasterAdamW:
    """AdamW on float32 copies of a low-precision model's weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clip to norm 1, step, and copy the masters back."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)


def learner(a: argparse.Namespace) -> dict[str, Any]:
    """The product's own step."""
    from learner.device import local_device, set_threads
    from learner.step import train_step
    from learner.zero import build_engine, join_ranks
    from uniapl.policy import Policy

    config, device = settings(a), local_device(0)
    set_threads(0, 1)
    join_ranks(device, 600)
    engine = build_engine(Policy(load(a, device.attention)), config.learner, 1, device)
    seen: dict[str, float] = {}

    def step(i: int) -> None:
        seen.update(train_step(engine, batch(i, a.scale), config, WEIGHTS, 1e-5, device.torch_device))

    found = timed(step, a.steps, device.torch_device)
    return found | {"packing": round(seen["learner/packing_efficiency"], 3), "tokens": int(seen["tokens/trained"])}


def _sequences(a: argparse.Namespace, config: Any, i: int) -> Any:
    from uniapl.objective.sequences import training_sequences

    return training_sequences(batch(i, a.scale), config.objective, 1.0, WEIGHTS, config.rollout.max_tokens)


def bare(a: argparse.Namespace) -> dict[str, Any]:
    """The same rows, a mean of log-probabilities as the loss, no ZeRO."""
    from learner.device import local_device, set_threads
    from learner.passes import plan_micro_batches
    from learner.zero import join_ranks
    from uniapl.objective.rows import make_rows
    from uniapl.policy import Policy

    config, here = settings(a), local_device(0)
    device = here.torch_device
    set_threads(0, 1)
    join_ranks(here, 600)
    policy = Policy(load(a, here.attention)).to(device, getattr(torch, a.dtype))
    optimizer = MasterAdamW(policy)

    def step(i: int) -> None:
        for rows in plan_micro_batches(_sequences(a, config, i), config.learner, device):
            (-policy(make_rows(rows).to(device)).sum() / 1000).backward()
        optimizer.step()

    return timed(step, a.steps, device)


def plain(a: argparse.Namespace) -> dict[str, Any]:
    """Padded sequences, all logits, a forward and backward per term."""
    from learner.device import local_device, set_threads

    config, device = settings(a), local_device(0).torch_device
    set_threads(0, 1)
    model = load(a, "sdpa").to(device, getattr(torch, a.dtype))
    optimizer = MasterAdamW(model)

    def step(i: int) -> None:
        sequences = _sequences(a, config, i)
        for term, weight in WEIGHTS.items():
            mine = [s for s in sequences if term in s.terms]
            count = sum(s.terms[term].count for s in mine)
            for at in range(0, len(mine), PLAIN_SEQUENCES):
                (weight * padded_loss(model, mine[at : at + PLAIN_SEQUENCES], term, device) / count).backward()
        optimizer.step()

    return timed(step, a.steps, device)


def padded_loss(model: nn.Module, sequences: list[Any], term: str, device: str) -> Tensor:
    """One term's sum over padded sequences, from logits of every token."""
    width = max(len(s) for s in sequences)
    ids, attended, loss_mask = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(3))
    advantage, behaviour = torch.zeros(len(sequences), width), torch.zeros(len(sequences), width)
    for row, s in enumerate(sequences):
        start, end = len(s.prompt_ids), len(s)
        ids[row, :end] = torch.tensor(s.prompt_ids + s.response_ids)
        attended[row, :end] = 1
        loss_mask[row, start:end] = 1
        advantage[row, start:end] = s.terms[term].advantage
        behaviour[row, start:end] = torch.tensor(s.behaviour_logprobs or [0.0] * (end - start))
    ids, attended, loss_mask = ids.to(device), attended.to(device), loss_mask.to(device)
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
    logprobs = F.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    if term == "demonstration":
        return -(logprobs * loss_mask[:, 1:]).sum()
    ratio = torch.exp(logprobs - logprobs.detach())
    kappa = torch.exp(logprobs.detach() - behaviour[:, 1:].to(device)).clamp(max=2.0)
    return -(kappa * ratio * advantage[:, 1:].to(device) * loss_mask[:, 1:]).sum()


WAYS = {"learner": learner, "bare": bare, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--random", choices=["0.6b"], help="random weights of this shape instead of --model's")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--scale", type=int, default=1, help="of the batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", default="512x4", help="tokens of a row x rows of a forward pass")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        report(WAYS[a.one](a))
        return
    given = [f"--{key}={getattr(a, key)}" for key in ("model", "steps", "scale", "dtype", "rows")]
    given += ["--random", a.random] if a.random else []
    found = in_turns({way: [*given, "--one", way] for way in a.ways})
    for way in a.ways:
        ratio = {"x_learner": round(found[way]["step_s"] / found["learner"]["step_s"], 2)} if "learner" in found else {}
        print(json.dumps({"way": way} | found[way] | ratio), flush=True)


if __name__ == "__main__":
    main()
