"""`embedding`: the cosine of a frozen sentence encoder's embeddings of a response and of the expert's.

The encoder is a folder in the sentence-transformers layout: a transformer, `1_Pooling/config.json` with mean
pooling, optionally `sentence_bert_config.json` with the longest input.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uniapl.discriminators.batches import padded_batches
from uniapl.discriminators.encoder_folder import read_json
from uniapl.discriminators.types import Comparison, ExpertScores

BATCH_TOKENS = 1024
"""Padded tokens of one forward pass: few enough for the activations to stay in the CPU's caches."""


class EmbeddingDiscriminator:
    """Cosine, in [-1, 1], of frozen embeddings of responses and of the expert's response.

    A text longer than the encoder's input is cut there. An empty response is embedded like any
    other (its start and end tokens alone), so its cosine is defined, and low. The expert's own response
    scores 1.

    Args:
        folder: the encoder, see `resolve_encoder`.
        threads: CPU threads of a forward pass; None: torch's own choice.
        cache_entries: expert responses whose embeddings are kept, the most recently used ones.
    """

    def __init__(self, folder: Path | str, threads: int | None = None, cache_entries: int = 4096) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = Path(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self._max_tokens = _max_tokens(folder, model.config)
        self._model = _with_onednn(model)
        self._threads = threads
        self._cache_entries = cache_entries
        self._experts: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def scores(self, comparisons: Sequence[Comparison]) -> list[ExpertScores]:
        """Cosine of each response's embedding with the expert's.

        One comparison's responses are embedded together, and an expert alone, so that a score's last bits do not
        depend on which groups happen to be scored in one call.

        Raises:
            ValueError: the encoder gave a value that is not finite.
        """
        with self._lock:
            found = [self._compare(compared) for compared in comparisons]
            self._forget()
        return found

    def _compare(self, compared: Comparison) -> ExpertScores:
        reference = self._expert(compared.expert)
        texts = list(dict.fromkeys(compared.responses))
        embedded = dict(zip(texts, self.embed(texts), strict=True))
        # A copy is no farther from the expert than the expert is, also where rounding says so.
        cosines = [
            1.0 if text == compared.expert else _cosine(reference, embedded[text]) for text in compared.responses
        ]
        return ExpertScores(reference=1.0, responses=cosines)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of unit length, [texts, dimensions] float32, each independent of the others."""
        if not texts:
            return torch.empty(0, self._model.config.hidden_size)
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        # A lone surrogate is valid in Python and nowhere else.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        tokens = self._tokenizer(clean, truncation=True, max_length=self._max_tokens)["input_ids"]
        result = torch.empty(len(texts), self._model.config.hidden_size)
        for rows in padded_batches([len(ids) for ids in tokens], BATCH_TOKENS):
            result[rows] = self._forward([tokens[row] for row in rows])
        return result

    def _forward(self, tokens: list[list[int]]) -> Tensor:
        batch = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        hidden = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=-1)

    def _expert(self, expert: str) -> Tensor:
        if expert not in self._experts:
            self._experts[expert] = self.embed([expert])[0].clone()
        self._experts.move_to_end(expert)
        return self._experts[expert]

    def _forget(self) -> None:
        while len(self._experts) > self._cache_entries:
            self._experts.popitem(last=False)


def _cosine(expert: Tensor, response: Tensor) -> float:
    cosine = float(expert.double() @ response.double())
    if not math.isfinite(cosine):
        raise ValueError("the sentence encoder gave a value that is not finite")
    return max(-1.0, min(1.0, cosine))


def _max_tokens(folder: Path, model_config: Any) -> int:
    """The longest input: what the encoder was trained with, where it says so."""
    path = folder / "sentence_bert_config.json"
    stated = read_json(path).get("max_seq_length") if path.is_file() else None
    return int(stated or model_config.max_position_embeddings)


class _OneDnnLinear(nn.Module):
    """A linear layer by oneDNN: torch's own choice in float32, MKL, is half as fast on AMD CPUs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach().to_mkldnn()
        self.bias = linear.bias.detach().to_mkldnn()

    def forward(self, x: Tensor) -> Tensor:
        return torch._C._nn.mkldnn_linear(x.to_mkldnn(), self.weight, self.bias).to_dense()


def _with_onednn(model: nn.Module) -> nn.Module:
    """`model` with its linear layers replaced, where torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return model
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.bias is not None:
                setattr(module, name, _OneDnnLinear(child))
    return model
