"""`cotrained`: a scalar d(x, y) that learns, beside the policy, to tell the expert's responses from the samples.

Loss: Bradley-Terry, -log sigmoid(d(x, y_E) - d(x, y_i)), the mean over all pairs of a batch, as in generative
adversarial distillation (GAD, arXiv 2511.10643). What the policy sees of it are the scores of its samples.

Here is what needs no process group; `learner.cotrained` runs it over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.discriminators.folders import read_folder
from uniapl.records import Group, Sample

_KEY = "objective.adversarial.cotrained.model"


def bradley_terry_loss(expert: Tensor, samples: Tensor) -> Tensor:
    """-log sigmoid(expert - samples) of each pair, [P], in float64; finite for any finite margin.

    Args:
        expert: d of the expert's response, [P].
        samples: d of the sample that it is compared with, [P].
    """
    return -functional.logsigmoid(expert.double() - samples.double())


class ResponseScorer(nn.Module):
    """d(x, y): a transformer and a linear head on its last hidden state at the last token."""

    def __init__(self, backbone: nn.Module, hidden_size: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = _ScalarHead(hidden_size, seed)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One score per row, [rows] float32, of token ids [rows, longest] padded at the right."""
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # [rows, longest, hidden]
        last = attention_mask.sum(1) - 1
        return self.head(hidden[torch.arange(len(last), device=last.device), last])


class _ScalarHead(nn.Module):
    """hidden . weight in float32, also in a model of bfloat16: scores of one group lie close together.

    Without a bias, of which the differences of scores know nothing.
    """

    def __init__(self, hidden_size: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)  # the same on every rank
        self.weight = nn.Parameter(torch.randn(hidden_size, generator=draw) / (hidden_size + 1) ** 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight.float()


def load_scorer(path: str, seed: int, activation_checkpointing: bool = False) -> ResponseScorer:
    """The transformer in a Hugging Face folder, in float32 and training mode, under a fresh head.

    Args:
        path: of any model that `AutoModel` reads; an output layer is left out.
        seed: of the head.
        activation_checkpointing: compute activations again in the backward pass.
    """
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    if activation_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return ResponseScorer(backbone, backbone.config.get_text_config().hidden_size, seed).train()


def backbone_path(config: Config) -> str:
    """The folder that the discriminator starts from."""
    return config.objective.adversarial.cotrained.model or config.model.path


def resolve_backbone(config: Config) -> None:
    """Check that the discriminator's folder can read what the policy writes.

    Raises:
        ConfigError: no such folder, another vocabulary than the policy's, or fewer positions than needed.
    """
    path = backbone_path(config)
    key = _KEY if path != config.model.path else "model.path"
    allowed = "a Hugging Face folder with the vocabulary of model.path"
    model, tokenizer = read_folder(key, path, allowed)
    if path != config.model.path:
        _, own = read_folder("model.path", config.model.path, "a Hugging Face folder")
        if tokenizer.get_vocab() != own.get_vocab():
            raise ConfigError(f"{key}: got '{path}', which has another vocabulary; allowed: {allowed}")
    longest = config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.data.max_response_tokens)
    positions = getattr(model.get_text_config(), "max_position_embeddings", None) or longest
    if positions < longest:
        raise ConfigError(
            f"{key}: got '{path}', which reads {positions} tokens; "
            f"allowed: >= the longest prompt and response together = {longest}"
        )


@dataclass(frozen=True)
class Duel:
    """The expert's response to a prompt against some of the samples of its group."""

    group: Group
    samples: list[Sample]

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of prompt and response: the expert's, then each sample's."""
        prompt = self.group.prompt
        return [prompt.token_ids + ids for ids in (prompt.expert_ids or [], *(s.token_ids for s in self.samples))]

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


def plan_duels(groups: Sequence[Group], budget: int) -> list[list[Duel]]:
    """Micro-batches of at most `budget` padded tokens, the longest first; groups without an expert are left out.

    A group that is larger is cut, and the expert's response then goes along with every part. A pair is never
    cut, so that one that is longer than the budget is by itself.
    """
    duels = [duel for group in groups if group.prompt.expert_ids is not None for duel in _cut(group, budget)]
    batches: list[list[Duel]] = []
    width = rows = 0
    for duel in sorted(duels, key=lambda duel: -duel.longest):
        rows += 1 + len(duel.samples)
        if not batches or rows * width > budget:
            batches.append([])
            width, rows = duel.longest, 1 + len(duel.samples)
        batches[-1].append(duel)
    return batches


def _cut(group: Group, budget: int) -> list[Duel]:
    most = max(1, budget // Duel(group, group.samples).longest - 1)
    return [Duel(group, group.samples[i : i + most]) for i in range(0, len(group.samples), most)]


@dataclass(frozen=True)
class DuelBatch:
    """Padded rows of some duels: `input_ids` and `attention_mask` [rows, longest]; pairs as rows, [P] each."""

    input_ids: Tensor
    attention_mask: Tensor
    expert_row: Tensor
    sample_row: Tensor

    def to(self, device: str) -> DuelBatch:
        return DuelBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def duel_batch(duels: Sequence[Duel]) -> DuelBatch:
    """The rows of `duels` in order, padded at the right; one row of one token and no pair where there are none."""
    rows: list[list[int]] = []
    pairs: list[tuple[int, int]] = []
    for duel in duels:
        pairs += [(len(rows), len(rows) + 1 + i) for i in range(len(duel.samples))]
        rows += duel.rows
    rows = rows or [[0]]
    longest = max(map(len, rows))
    expert_row, sample_row = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return DuelBatch(
        torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        expert_row,
        sample_row,
    )
