"""The data card that stands beside the local data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_INTRO = """# Local data set

Instruction-following prompts for a small chat model on one machine: a plain instruction with one to three
constraints of IFEval, each checked by a program, and expert responses of at most 64 tokens that follow them.
Written by `uniapl data prepare`; the files here and this card are remade byte for byte from
`plain_responses.arrow`, the tokenizer of SmolLM2-135M-Instruct and seed {seed}.

| file | what it holds |
|---|---|
| `train-*.arrow` | training rows: id, messages, response (null where there is none), verifier |
| `heldout.arrow` | held-out rows: other topics, other instructions, other constraint arguments |
| `plain_responses.arrow` | samples of SmolLM2-135M-Instruct for the plain instructions, recorded once with vLLM |

## How it was made
Instructions are the project's own templates filled with its own topics. Constraints and their wording come from
the checkers of if-verifiable (without the two that need NLTK data); arguments are drawn so that an answer fits in
64 tokens. An expert response is a sample of the model for the plain instruction (sampled with a system message that
asks for brevity; complete sound sentences only; mean log probability above a bound; on topic), repaired by rule: case,
quotation marks, commas, bullets, sections, paragraphs, title, postscript, keywords, highlights, placeholders, end
phrase. It is kept only if every checker passes and it fits in 64 tokens. The facts in it are a small model's and often
wrong: the data teaches form, not knowledge. Where no sample was sound the prompt stands without a response.
The samples of an instruction are ordered (finished ones first, then by mean log probability); every prompt of the
instruction begins with another one, tries its first three sentences, then two, then one, then the next sample, and
takes the first draft whose repair passes.

Held-out arguments are disjoint from training: words are dealt to one split or the other, counts and letters are
split, topics do not overlap. Constraints without arguments (lower case, quotation, ...) recur, as do relations
(`at least`, `less than`). The prompts of IFEval itself are not in here; they are for evaluation only.

## Licences
SmolLM2-135M-Instruct and its samples: Apache-2.0. if-verifiable (wording of the constraints, from Google's IFEval):
Apache-2.0. Instructions, topics and added sentences: this project, Apache-2.0.
"""


def write_card(path: Path, report: dict[str, Any]) -> None:
    """Write the card of a data set with the counts of `report`."""
    parts = [_INTRO.format(seed=report["seed"])]
    parts += [_split(name, report[name]) for name in ("train", "heldout")]
    path.write_text("\n".join(parts), encoding="utf-8")


def _split(name: str, counts: dict[str, Any]) -> str:
    tokens = ", ".join(f"{q} {n}" for q, n in counts["response tokens"].items())
    sizes = ", ".join(f"{n} with {size}" for size, n in counts["constraints per prompt"].items())
    lines = [
        f"## {name}",
        f"{counts['prompts']} prompts ({counts['with response']} with a response) of {counts['instructions']} plain "
        f"instructions. Constraints per prompt: {sizes}. Response tokens, end of turn included: {tokens}. The model's "
        f"best unrepaired sample for the plain instruction, without the constraints, follows them all in "
        f"{counts['raw pass rate']:.1%} of the prompts.",
        "",
        "| constraint | prompts | alone | of these the unrepaired sample passes |",
        "|---|---|---|---|",
    ]
    for constraint, n in counts["constraints"].items():
        lines.append(f"| {constraint} | {n['prompts']} | {n['alone']} | {n['raw passes alone']} |")
    lines += ["", "| attempts dropped because | |", "|---|---|"]
    lines += [f"| {reason} | {n} |" for reason, n in counts["dropped"].items()]
    return "\n".join(lines) + "\n"
