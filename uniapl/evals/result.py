"""What an evaluation found: as JSON, and as tables for the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from uniapl.evals.scores import Answer, by_instruction, scores
from uniapl.evals.suites import Suite

LEVELS = {
    "prompt_strict": "prompts, strict",
    "prompt_strict_any": "prompts, strict, any of the samples",
    "prompt_loose": "prompts, loose",
    "prompt_loose_any": "prompts, loose, any of the samples",
    "instruction_strict": "instructions, strict",
    "instruction_loose": "instructions, loose",
    "pass": "prompts passed",
    "pass_any": "prompts passed, any of the samples",
}


@dataclass(frozen=True)
class Result:
    """One model's answers to one suite. `skipped`: instructions that cannot be judged here, with the reason."""

    suite: Suite
    model: str
    settings: dict[str, Any]
    answers: list[list[Answer]]
    skipped: dict[str, str]
    seconds: float
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the responses, JSON-able."""
        flat = [answer for group in self.answers for answer in group]
        rates = by_instruction(self.answers)
        return {
            "suite": self.suite.name,
            "source": self.suite.source,
            "model": self.model,
            "settings": self.settings,
            "prompts": len(self.suite.items),
            "scores": {name: dataclasses.asdict(interval) for name, interval in scores(self.answers).items()},
            "instructions": {
                name: {"strict": strict.value, **({"loose": loose.value} if loose else {}), "prompts": strict.count}
                for name, (strict, loose) in rates.items()
            },
            "skipped": self.skipped,
            "skipped_prompts": self.skipped_prompts,
            "unscored": dict(self.unscored),
            "tokens": sum(answer.tokens for answer in flat),
            "truncated": sum(answer.finish_reason == "length" for answer in flat),
            "seconds": round(self.seconds, 1),
            "versions": self.versions,
        }

    @property
    def skipped_prompts(self) -> int:
        """Prompts with an instruction that cannot be judged here: no part of the rates at the prompt level."""
        return sum(any(one.id in self.skipped for one in item.instructions) for item in self.suite.items)

    @property
    def unscored(self) -> Counter[str]:
        """Why single responses could not be judged, with their numbers."""
        flat = [answer for group in self.answers for answer in group]
        found = Counter(answer.unscored for answer in flat if answer.unscored)
        return found + Counter(v.reason for answer in flat for v in answer.verdicts if v.reason)

    def save(self, path: Path) -> None:
        """Write it as JSON with all responses, whole or not at all."""
        responses = [
            {
                "id": item.id,
                "prompt": item.text,
                "instructions": [dataclasses.asdict(one) for one in item.instructions],
                "responses": [_slim(answer) for answer in group],
            }
            for item, group in zip(self.suite.items, self.answers, strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".tmp")
        tree = self.to_dict() | {"responses": responses}
        fresh.write_text(json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        fresh.replace(path)

    def tables(self) -> list[Table]:
        """The scores, and a row for each instruction."""
        whole = Table(title=Text(f"{self.suite.name}: {self.model}"), title_justify="left")
        for name in ("level", "score", "95 % interval", "of prompts"):
            whole.add_column(name, justify="left" if name == "level" else "right")
        for name, one in scores(self.answers).items():
            whole.add_row(LEVELS[name], f"{one.value:.1%}", f"{one.low:.1%} to {one.high:.1%}", str(one.count))
        detail = Table(title="by instruction", title_justify="left")
        for name in ("instruction", "strict", "loose", "prompts"):
            detail.add_column(name, justify="left" if name == "instruction" else "right", overflow="fold")
        for name, (strict, loose) in by_instruction(self.answers).items():
            detail.add_row(Text(name), f"{strict.value:.0%}", f"{loose.value:.0%}" if loose else "", str(strict.count))
        return [whole, *([detail] if detail.rows else [])]

    def notes(self) -> list[str]:
        """What the scores leave out, a line each."""
        lines = [f"skipped: {why if name in why else f'{name}: {why}'}" for name, why in self.skipped.items()]
        if self.skipped:
            share = f"{self.skipped_prompts} of {len(self.suite.items)} prompts ask for one of these"
            lines.append(f"{share} and are in no rate at the prompt level")
        lines += [f"not judged: {count} × {reason}" for reason, count in self.unscored.most_common()]
        cut = sum(answer.finish_reason == "length" for group in self.answers for answer in group)
        if cut:
            lines.append(f"{cut} responses were cut off at {self.settings['max_tokens']} tokens (--max-tokens)")
        return lines


def _slim(answer: Answer) -> dict[str, Any]:
    """Without the fields that say nothing."""
    tree = dataclasses.asdict(answer)
    tree["verdicts"] = [{k: v for k, v in one.items() if v not in (None, "")} for one in tree["verdicts"]]
    return {key: value for key, value in tree.items() if value not in (None, "", [], {}) or key == "text"}
