"""`reference_reward`: a frozen reward model that judges a response beside the expert's, as POLAR does.

POLAR (arXiv 2507.05197) reads one sequence that holds the prompt twice, first answered by the reference
and then by the candidate, and says in one number how far both look like the same policy's:

    [bos] prompt \\n reference <|reward|> prompt \\n candidate [end]

The prompt is the contents of its messages, one below the other. The head reads the last token: the model
configuration's `reward_token_id` where it has one (as POLAR's have), else the tokenizer's end of sequence.
The format is the one that POLAR's authors publish with their models; the code here is this project's.

The folder holds any decoder with a `...ForSequenceClassification` head of one label that transformers
itself knows. Code in a folder is never run.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uniapl.config_errors import ConfigError
from uniapl.discriminators.batches import padded_batches
from uniapl.discriminators.folders import read_folder
from uniapl.discriminators.types import Comparison, ExpertScores

_KEY = "objective.adversarial.reward_model"
SEPARATOR = "<|reward|>"
MAX_TOKENS = 16384
"""The longest input, as in POLAR; less where the model says so."""
BATCH_TOKENS = 4096
"""Padded tokens of one forward pass."""


def resolve_reward_model(name: str | None) -> Path:
    """The folder of a reward model.

    Raises:
        ConfigError: no folder, no tokenizer in it, or not a sequence classifier with one label.
    """
    if name is None:
        raise ConfigError(f"{_KEY}: got null; allowed: a folder when the discriminator is 'reference_reward'")
    allowed = "a Hugging Face folder of a sequence classifier with one label, and its tokenizer"
    model, tokenizer = read_folder(_KEY, name, allowed)
    kinds = model.architectures or ["no architecture"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or model.num_labels != 1:
        got = f"{', '.join(kinds)} with {model.num_labels} labels"
        raise ConfigError(f"{_KEY}: got '{name}', which is {got}; allowed: {allowed}")
    if _end_token(tokenizer, model) is None:
        raise ConfigError(f"{_KEY}: got '{name}'; no token to end with; allowed: an eos_token or a reward_token_id")
    return Path(name)


class ReferenceRewardDiscriminator:
    """The reward model's scalar for (prompt, expert's response, response), of any size and sign.

    The longest input is the model's own, at most 16384 tokens. A response, also the expert's, keeps its
    first quarter of that many tokens; then the prompt loses tokens at its beginning, in both places the
    same number, until the whole fits.

    Args:
        folder: the model, see `resolve_reward_model`.
        threads: CPU threads of a forward pass; None: torch's own choice.
        cache_entries: expert responses whose own scores are kept, the most recently used ones.
    """

    def __init__(self, folder: Path | str, threads: int | None = None, cache_entries: int = 4096) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        self._model.eval().requires_grad_(False)
        config = self._model.config.get_text_config()
        self._limit = min(MAX_TOKENS, getattr(config, "max_position_embeddings", None) or MAX_TOKENS)
        end = _end_token(self._tokenizer, config)
        self._begin = [i for i in self._tokenizer("")["input_ids"] if i == self._tokenizer.bos_token_id]
        self._separator = self._tokenizer.encode(SEPARATOR, add_special_tokens=False)
        self._end = [end]
        # The head reads the last token that is not padding: padding must be told from the token at the end.
        self._fill = int(end == 0)  # any token but the one that ends an input
        config.pad_token_id = self._fill
        self._threads = threads
        self._cache_entries = cache_entries
        self._references: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def scores(self, comparisons: Sequence[Comparison]) -> list[ExpertScores]:
        """The scalar of each response, and of the expert's own beside itself.

        One comparison's responses are computed together, and an expert's own score alone, so that a score's last
        bits do not depend on which groups happen to be scored in one call.

        Raises:
            ValueError: the reward model gave a value that is not finite.
        """
        with self._lock:
            return [self._compare(compared) for compared in comparisons]

    def _compare(self, compared: Comparison) -> ExpertScores:
        prompt, expert = _prompt_text(compared.messages), compared.expert
        reference = self._reference(prompt, expert)
        texts = [text for text in dict.fromkeys(compared.responses) if text != expert]
        found = dict(zip(texts, self._run([self.input_ids(prompt, expert, text) for text in texts]), strict=True))
        found[expert] = reference
        return ExpertScores(reference=reference, responses=[found[text] for text in compared.responses])

    def _reference(self, prompt: str, expert: str) -> float:
        """The expert's own score, computed once as long as it is kept."""
        known = self._references.get((prompt, expert))
        score = self._run([self.input_ids(prompt, expert, expert)])[0] if known is None else known
        self._remember((prompt, expert), score)
        return score

    def input_ids(self, prompt: str, reference: str, candidate: str) -> list[int]:
        """What the model reads, cut to its longest input."""
        first, second = (self._encode(f"{prompt}\n{self._cut(text)}") for text in (reference, candidate))
        room = self._limit - len(self._begin) - len(self._separator) - len(self._end)
        surplus = max(0, len(first) + len(second) - room)
        skip = -(-surplus // 2)
        return [*self._begin, *first[skip:], *self._separator, *second[skip:], *self._end]

    def _cut(self, text: str) -> str:
        ids = self._encode(text)
        most = self._limit // 4
        return text if len(ids) <= most else self._tokenizer.decode(ids[:most], skip_special_tokens=False)

    def _encode(self, text: str) -> list[int]:
        """Text that spells a special token, such as the separator, stays text: a policy could write it."""
        # A lone surrogate is valid in Python and nowhere else.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return list(self._tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=True))

    @torch.inference_mode()
    def _run(self, inputs: list[list[int]]) -> list[float]:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        scores = [0.0] * len(inputs)
        for rows in padded_batches([len(ids) for ids in inputs], BATCH_TOKENS):
            longest = max(len(inputs[row]) for row in rows)
            gaps = [longest - len(inputs[row]) for row in rows]
            ids = torch.tensor([inputs[row] + [self._fill] * gap for row, gap in zip(rows, gaps, strict=True)])
            mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, score in zip(rows, logits[:, 0].tolist(), strict=True):
                scores[row] = score
        if not all(math.isfinite(score) for score in scores):
            raise ValueError("the reward model gave a value that is not finite")
        return scores

    def _remember(self, key: tuple[str, str], score: float) -> None:
        self._references[key] = score
        self._references.move_to_end(key)
        while len(self._references) > self._cache_entries:
            self._references.popitem(last=False)


def _prompt_text(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def _end_token(tokenizer: Any, config: Any) -> int | None:
    """The token that the head reads."""
    named = getattr(config, "reward_token_id", None)
    return tokenizer.eos_token_id if named is None else named
