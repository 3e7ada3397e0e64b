"""Builds the local data set: plain instructions with constraints, and expert responses that follow them.

Everything is a pure function of the recorded plain responses, the tokenizer and the seed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from uniapl.data import constraints
from uniapl.data.card import write_card
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.plain_responses import PlainResponses, Recorder, read_plain_responses, record_plain_responses
from uniapl.data.repairs import Draft, Unfit, repair
from uniapl.data.text import is_sound, mentions, sentences, similar
from uniapl.records import SHARD_SCHEMA

MAX_RESPONSE_TOKENS = 64
MIN_MEAN_LOGPROB = -1.3
PROMPTS_PER_INSTRUCTION = {"train": 4, "heldout": 3}
ATTEMPTS = 4
TRAIN_SHARDS = 4
HELDOUT_ROWS = 256
PLAIN_RESPONSES = "plain_responses.arrow"


@dataclass(frozen=True)
class Built:
    """A prompt with its constraints; `response` is None where no sound sample could be had."""

    plain: str
    instructions: list[dict[str, Any]]
    response: str | None
    raw_passes: bool
    """Whether the model's best unrepaired sample follows the constraints."""
    tokens: int = 0

    @property
    def content(self) -> str:
        """The user's message."""
        described = [constraints.describe(i["id"], i["kwargs"]) for i in self.instructions]
        return " ".join([self.plain, *(text if text[-1] in ".?!" else text + "." for text in described)])


def prepare(
    out_dir: Path, model_folder: Path, seed: int, record: bool, recorder: Recorder | None = None
) -> dict[str, Any]:
    """Build the local data set in `out_dir`; the report says what it holds and what was dropped.

    Args:
        model_folder: a Hugging Face folder; its tokenizer measures lengths, its model records samples.
        record: sample the plain responses again first, with `recorder`. They depend on the machine's arithmetic.

    Raises:
        DataError: there are no plain responses in `out_dir` and none are recorded, or too few rows come out.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    plain = out_dir / PLAIN_RESPONSES
    if record:
        if recorder is None:
            raise ValueError("record=True needs a recorder")
        record_plain_responses(recorder, model_folder, plain, seed)
    return build_local_dataset(out_dir, plain, model_folder, seed)


def build_local_dataset(out_dir: Path, plain_responses: Path, tokenizer_folder: Path, seed: int) -> dict[str, Any]:
    """Write training shards, the held-out shard and the data card to `out_dir`: the same bytes for the same input.

    Raises:
        DataError: the plain responses or the tokenizer cannot be read, or too few rows come out.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    encoder = ChatEncoder.from_folder(tokenizer_folder)
    recorded = read_plain_responses(plain_responses)
    report: dict[str, Any] = {"seed": seed}
    for split in ("train", "heldout"):
        dropped: Counter[str] = Counter()
        part = [r for r in recorded if r.instruction.split == split]
        built = [item for r in part for item in _prompts(r, encoder, seed, dropped)]
        random.Random(f"{seed}/{split}/rows").shuffle(built)
        built = built if split == "train" else _choose_heldout(built)
        _write_split(out_dir, split, built)
        report[split] = summary(built, dropped)
    write_card(out_dir / "README.md", report)
    return report


def _choose_heldout(built: list[Built]) -> list[Built]:
    """The first rows with an expert response, one of each instruction before a second of any."""
    seen: Counter[str] = Counter()
    ranked = []
    for item in built:
        if item.response is not None:
            ranked.append((seen[item.plain], item))
            seen[item.plain] += 1
    if len(ranked) < HELDOUT_ROWS:
        raise DataError(f"plain responses: only {len(ranked)} held-out rows come out; allowed: >= {HELDOUT_ROWS}")
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])][:HELDOUT_ROWS]


def _prompts(plain: PlainResponses, encoder: ChatEncoder, seed: int, dropped: Counter[str]) -> Iterator[Built]:
    """Some different prompts for one instruction, each with its own constraints."""
    samples, made = sound_samples(plain), set[str]()
    if not samples:
        dropped["no sound sample"] += 1
    for number in range(PROMPTS_PER_INSTRUCTION[plain.instruction.split] if samples else 1):
        rng = random.Random(f"{seed}/{plain.instruction.text}/{number}")
        for _ in range(ATTEMPTS):
            chosen = constraints.draw_constraints(rng)
            item = _prompt(plain, samples, chosen, number, rng, encoder, dropped)
            if item is not None and item.content not in made:
                made.add(item.content)
                yield item
                break
        else:
            dropped["no constraints fitted"] += 1


def sound_samples(plain: PlainResponses) -> list[list[str]]:
    """The usable samples, best first, each as its leading sound sentences; those off the topic are left out."""
    topic = plain.instruction.topic
    samples = []
    for sample in plain.samples:
        kept: list[str] = []
        for sentence in sentences(sample.text):
            if not is_sound(sentence, topic) or any(similar(sentence, other) for other in kept):
                break
            kept.append(sentence)
        if kept and sample.mean_logprob > MIN_MEAN_LOGPROB and mentions(kept[0], topic):
            samples.append(kept)
    return samples


def _prompt(
    plain: PlainResponses,
    samples: list[list[str]],
    chosen: list[str],
    number: int,
    rng: random.Random,
    encoder: ChatEncoder,
    dropped: Counter[str],
) -> Built | None:
    """The first draft that follows the constraints within the token budget, longest first; None if none does."""
    raw = plain.samples[0].text if plain.samples else ""
    if not samples:
        return _without_response(plain, chosen, rng, raw)
    reasons: Counter[str] = Counter()
    for draft in _drafts(plain, samples, number, rng):
        try:
            instructions, text = repair(draft, chosen)
        except Unfit as unfit:
            reasons[str(unfit)] += 1
            continue
        wrong = constraints.failed(instructions, text)
        tokens = len(encoder.response_ids(text))
        if wrong:
            reasons[f"verifier: {wrong[0]}"] += 1
        elif tokens > MAX_RESPONSE_TOKENS:
            reasons["too long"] += 1
        else:
            return Built(plain.instruction.text, instructions, text, not constraints.failed(instructions, raw), tokens)
    dropped[reasons.most_common(1)[0][0]] += 1
    return None


def _without_response(plain: PlainResponses, chosen: list[str], rng: random.Random, raw: str) -> Built | None:
    """A prompt alone: its arguments are drawn to fit a stand-in text, which is thrown away."""
    try:
        instructions, _ = repair(_draft(plain, [plain.instruction.text], [], [], rng), chosen)
    except Unfit:
        return None
    return Built(plain.instruction.text, instructions, None, not constraints.failed(instructions, raw))


def _drafts(plain: PlainResponses, samples: list[list[str]], number: int, rng: random.Random) -> Iterator[Draft]:
    """Drafts from every sample, starting with another one for every prompt, each in all its lengths."""
    for turn in range(len(samples)):
        at = (number + turn) % len(samples)
        others = samples[:at] + samples[at + 1 :]
        for count in range(min(len(samples[at]), 3), 0, -1):
            yield _draft(plain, samples[at][:count], samples[at][count:], others, rng)


def _draft(
    plain: PlainResponses, kept: list[str], rest: list[str], others: list[list[str]], rng: random.Random
) -> Draft:
    i = plain.instruction
    articles = [f"{article} {i.topic}" for article in ("a", "an", "the") if f"{article} {i.topic}" in i.text]
    phrase = articles[0] if articles else i.topic
    leads = [sample[0] for sample in others]
    later = [sentence for sample in others for sentence in sample[1:]]
    return Draft(i.split, i.topic, phrase, list(kept), [*rest, *leads, *later], leads, rng)


def _write_split(out_dir: Path, split: str, built: list[Built]) -> None:
    rows = [
        {
            "id": f"{split}-{number:05d}",
            "messages": [{"role": "user", "content": item.content}],
            "response": item.response,
            "verifier": json.dumps({"instructions": item.instructions}, sort_keys=True),
        }
        for number, item in enumerate(built)
    ]
    if split == "heldout":
        write_shard(out_dir / "heldout.arrow", rows)
        return
    for shard in range(TRAIN_SHARDS):
        start, end = len(rows) * shard // TRAIN_SHARDS, len(rows) * (shard + 1) // TRAIN_SHARDS
        write_shard(out_dir / f"train-{shard:05d}-of-{TRAIN_SHARDS:05d}.arrow", rows[start:end])


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of `SHARD_SCHEMA` as one uncompressed Arrow IPC file, so that it can be read in place."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))


def summary(built: list[Built], dropped: Counter[str]) -> dict[str, Any]:
    """Counts of what a split holds; `raw pass rate` is that of the model's best unrepaired samples."""
    lengths = sorted(item.tokens for item in built if item.response is not None)
    per: dict[str, list[int]] = {name: [0, 0] for name in constraints.WEIGHTS}
    for item in built:
        for instruction in item.instructions:
            per[instruction["id"]][0] += 1
            per[instruction["id"]][1] += len(item.instructions) == 1 and item.raw_passes
    alone = Counter(item.instructions[0]["id"] for item in built if len(item.instructions) == 1)
    return {
        "prompts": len(built),
        "instructions": len({item.plain for item in built}),
        "with response": len(lengths),
        "raw pass rate": round(sum(item.raw_passes for item in built) / len(built), 3),
        "response tokens": {f"p{q}": lengths[(len(lengths) - 1) * q // 100] for q in (0, 10, 50, 90, 100)},
        "constraints per prompt": dict(sorted(Counter(len(item.instructions) for item in built).items())),
        "constraints": {
            name: {"prompts": n, "alone": alone[name], "raw passes alone": k} for name, (n, k) in per.items()
        },
        "dropped": dict(sorted(dropped.items())),
    }
