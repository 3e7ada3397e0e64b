"""Agreement with a peer: the loss of TRL's GRPOTrainer on the same model, samples and advantages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from uniapl.config import ObjectiveConfig
from uniapl.objective.objective import rows_loss
from uniapl.objective.rows import count_terms, make_rows, share_prompts
from uniapl.objective.sequences import training_sequences
from uniapl.policy import PREFIX, load_policy
from uniapl.records import Group, MixedBatch, Prompt, Sample, Score, VersionSpan

LONGEST = 9
PROMPTS = [[5, 6, 7], [8, 9]]
LENGTHS = [[4, 9], [1, 6]]
REWARDS = [[1.0, 0.0], [0.3, 0.8]]


def near(logprobs: list[list[float]], spread: float, seed: int) -> list[list[float]]:
    """The log-probabilities of every response with noise, so that ratios leave the clip and the bounds of kappa."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.tensor(x) + spread * torch.randn(len(x), generator=generator)).tolist() for x in logprobs]


def make_batch(behaviour: list[list[float]] | None = None) -> MixedBatch:
    left = iter(behaviour or [[0.0] * n for lengths in LENGTHS for n in lengths])
    groups = []
    for g, lengths in enumerate(LENGTHS):
        samples = [
            Sample(
                [20 + 40 * g + 7 * i + t for t in range(n)], next(left), [VersionSpan(0, n, 0)], "", "stop", Score(r)
            )
            for i, (n, r) in enumerate(zip(lengths, REWARDS[g], strict=True))
        ]
        groups.append(Group(g, Prompt(f"p{g}", [], PROMPTS[g]), samples, "a"))
    return MixedBatch(0, groups, [])


def padded(values: list[list[float]] | list[list[int]], left: bool = False) -> Tensor:
    width = max(map(len, values))
    return torch.tensor([[0] * (width - len(v)) + v if left else v + [0] * (width - len(v)) for v in values])


class Ours:
    """The packed objective on the tiny model, prompts shared."""

    def __init__(self, folder: Path) -> None:
        self.policy = load_policy(str(folder))
        rows, _, _ = self.packed(make_batch(), ObjectiveConfig(), self.weights(0.0))
        with torch.no_grad():
            self.logprobs = [x.tolist() for x in self.policy(rows).split([n for x in LENGTHS for n in x])]

    def weights(self, beta: float) -> dict[str, float]:
        return {"preference": 1.0, "demonstration": 0.0, "adversarial": 0.0, "kl": beta}

    def packed(self, batch: MixedBatch, objective: ObjectiveConfig, weights: dict[str, float]) -> Any:
        """Rows, counts, advantages [samples]."""
        sequences = training_sequences(batch, objective, 1.0, weights, LONGEST)
        rows = make_rows([[block] for block in share_prompts(sequences, 64, True)])
        return rows, count_terms(sequences), [s.terms["preference"].advantage for s in sequences]

    def __call__(self, objective: ObjectiveConfig, beta: float, old: Any, behaviour: Any, reference: Any) -> Any:
        """`RowsLoss`, gradients by name, advantages."""
        weights = self.weights(beta)
        rows, counts, advantages = self.packed(make_batch(behaviour), objective, weights)
        self.policy.zero_grad()
        flat = [torch.tensor([*chain.from_iterable(x)]) for x in (reference, old)]
        found = rows_loss(self.policy(rows), rows, counts, weights, objective, *flat)
        found.loss.backward()
        gradients = {n.removeprefix(PREFIX): p.grad.clone() for n, p in self.policy.named_parameters()}
        return found, gradients, advantages


@pytest.fixture(scope="module")
def ours(tiny: Path) -> Ours:
    return Ours(tiny)


@pytest.fixture(scope="module")
def peer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes a real GRPOTrainer on the tiny model."""
    from datasets import Dataset

    # The loss needs no engine, and to import one takes longer than all of these tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("trl.import_utils"), "is_vllm_available", lambda min_version=None: False)
        from trl import GRPOConfig, GRPOTrainer

    def make(**options: Any) -> Any:
        config = GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=LONGEST,
            use_bias_correction_kl=False,
            **options,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "unused"}] * 4),
            processing_class=AutoTokenizer.from_pretrained(tiny),
        )
        trainer.model.eval()  # no accumulation of gradients: the loss is that of the whole batch
        return trainer

    return make


def peer_loss(trainer: Any, advantages: list[float], old: Any, reference: Any, kappa: Tensor | None) -> Any:
    """Loss, gradients by name and the fraction of clipped tokens."""
    samples = [s for g in make_batch().groups for s in g.samples]
    prompts = [p for p in PROMPTS for _ in range(2)]
    mask = padded([[1] * len(s.token_ids) for s in samples])
    inputs = {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([[1] * len(p) for p in prompts], left=True),
        "completion_ids": padded([s.token_ids for s in samples]),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": kappa,
    }
    trainer.use_vllm = kappa is not None
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, trainer._metrics["eval"]["clip_ratio/region_mean"][-1]


def corrected(mode: str, old: Any, behaviour: Any) -> Tensor | None:
    """What TRL multiplies the tokens with, by its `vllm_importance_sampling_mode` and bounds 0.7 and 1.4."""
    difference = padded(old) - padded(behaviour)
    if mode == "off":
        return None
    if mode == "sequence":
        return difference.sum(-1, keepdim=True).exp().clamp(max=1.4)
    kappa = difference.exp()
    return kappa.clamp(max=1.4) if mode == "truncate" else kappa.masked_fill((kappa < 0.7) | (kappa > 1.4), 0.0)


# (TRL's loss type, our average, level of the ratio, correction, beta)
CASES = [
    ("bnpo", "token", "token", "off", 0.0),
    ("dapo", "token", "token", "off", 0.0),
    ("grpo", "sequence", "token", "off", 0.0),
    ("dr_grpo", "constant", "token", "off", 0.0),
    ("grpo", "sequence", "sequence", "off", 0.0),
    ("dapo", "token", "sequence", "off", 0.0),
    ("dapo", "token", "token", "truncate", 0.0),
    ("grpo", "sequence", "token", "mask", 0.0),
    ("grpo", "sequence", "sequence", "sequence", 0.0),
    ("dr_grpo", "constant", "sequence", "truncate", 0.0),
    ("grpo", "sequence", "token", "off", 0.1),
    ("dr_grpo", "constant", "token", "off", 0.1),
    ("dapo", "token", "token", "truncate", 0.1),
]


@pytest.mark.parametrize(("kind", "average", "level", "correction", "beta"), CASES)
def test_loss_gradient_and_clip_fraction_agree(
    ours: Ours, peer: Callable[..., Any], kind: str, average: str, level: str, correction: str, beta: float
) -> None:
    old = near(ours.logprobs, 0.3, seed=0)
    behaviour, reference = near(old, 0.3, seed=1), near(ours.logprobs, 0.5, seed=2)
    objective = ObjectiveConfig.model_validate(
        {
            "preference": {"average": average, "clip_low": 0.15, "clip_high": 0.3},
            "surrogate": {"ratio": level, "correction": correction, "cap": 1.4, "floor": 0.7},
        }
    )
    found, gradients, advantages = ours(objective, beta, old, behaviour, reference)
    trainer = peer(loss_type=kind, importance_sampling_level=level, epsilon=0.15, epsilon_high=0.3, beta=beta)
    loss, wanted, clipped = peer_loss(trainer, advantages, old, reference, corrected(correction, old, behaviour))
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    ours_flat, theirs = (torch.cat([g[n].flatten() for n in wanted]) for g in (gradients, wanted))
    assert (ours_flat - theirs).norm() <= 1e-5 * theirs.norm()
    if level == "token":
        fraction = found.sums["sum/clipped"] / found.sums["tokens/sampled"]
        assert fraction == pytest.approx(clipped, rel=1e-6)
        assert 0 < fraction < 1
