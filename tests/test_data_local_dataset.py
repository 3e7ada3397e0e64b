"""The local data set: what is committed is what the builder makes, and it holds what it promises."""

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uniapl.data import constraints
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.instructions import HELDOUT_TOPICS, TRAIN_TOPICS, plain_instructions
from uniapl.data.local_dataset import PLAIN_RESPONSES, build_local_dataset, prepare
from uniapl.data.local_model import load_tokenizer
from uniapl.data.plain_responses import PlainSample, read_plain_responses, record_plain_responses
from uniapl.data.reader import Row, ShardReader

LOCAL = Path(__file__).parent.parent / "data" / "local"
RELATIONS = {"relation", "let_relation"}
WITHOUT_ARGUMENTS = {
    constraints.LOWERCASE,
    constraints.CAPITAL,
    constraints.QUOTATION,
    constraints.NO_COMMA,
    constraints.TITLE,
    constraints.JSON,
    constraints.TWO_RESPONSES,
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return list(_rows("train-*.arrow"))


@pytest.fixture(scope="module")
def heldout() -> list[Row]:
    return list(_rows("heldout.arrow"))


def _rows(pattern: str) -> Iterator[Row]:
    reader = ShardReader([LOCAL / pattern])
    return (reader[i] for i in range(len(reader)))


def _instructions(row: Row) -> list[dict[str, Any]]:
    return json.loads(row.verifier or "{}")["instructions"]


def _plain(row: Row) -> str:
    """The prompt without the constraints' sentences."""
    first = _instructions(row)[0]
    content = row.messages[0]["content"]
    return content[: content.index(constraints.describe(first["id"], first["kwargs"]))].strip()


def _arguments(rows: list[Row]) -> set[tuple[str, str, str]]:
    """(constraint, key, value) of every argument, lists by their items, keyword constraints taken together."""
    found = set()
    for row in rows:
        for instruction in _instructions(row):
            for key, value in instruction["kwargs"].items():
                for item in value if isinstance(value, list) else [value]:
                    words = key in ("keyword", "keywords", "forbidden_words")
                    found.add(("words", "", str(item)) if words else (instruction["id"], key, str(item)))
    return {argument for argument in found if argument[1] not in RELATIONS}


def test_a_rebuild_gives_the_committed_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    report = build_local_dataset(tmp_path, LOCAL / PLAIN_RESPONSES, tokenizer_folder, seed=0)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in LOCAL.iterdir() if path.name != PLAIN_RESPONSES}
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []
    assert report["train"]["prompts"] >= 3000


def test_there_is_enough_of_it(train: list[Row], heldout: list[Row]) -> None:
    assert len(list(LOCAL.glob("train-*-of-*.arrow"))) >= 4
    assert len(train) >= 3000
    assert sum(row.response is not None for row in train) >= 2000
    assert len(heldout) == 256
    assert all(row.response is not None for row in heldout)
    assert len({row.id for row in [*train, *heldout]}) == len(train) + len(heldout)
    assert len({row.messages[0]["content"] for row in [*train, *heldout]}) == len(train) + len(heldout)
    assert sum(path.stat().st_size for path in LOCAL.iterdir()) < 6_000_000


def test_every_expert_response_passes_its_verifier_and_fits(
    train: list[Row], heldout: list[Row], tokenizer_folder: Path
) -> None:
    encoder = ChatEncoder.from_folder(tokenizer_folder)
    experts = [row for row in [*train, *heldout] if row.response is not None]
    for row in [*random.Random(0).sample(experts, 600), *heldout]:
        assert constraints.failed(_instructions(row), row.response or "") == [], row
        assert len(encoder.response_ids(row.response or "")) <= 64, row


def test_prompts_say_what_the_verifier_checks(train: list[Row], heldout: list[Row]) -> None:
    for row in [*train[::5], *heldout]:
        chosen = _instructions(row)
        assert 1 <= len(chosen) <= 3
        content = row.messages[0]["content"]
        assert len(_plain(row)) >= 10
        assert all(constraints.describe(i["id"], i["kwargs"]) in content for i in chosen)
        assert not any(constraints.conflict(a["id"], b["id"]) for a in chosen for b in chosen if a is not b)


def test_every_constraint_is_met_in_both_splits(train: list[Row], heldout: list[Row]) -> None:
    for rows, at_least in ((train, 40), (heldout, 1)):
        counts = dict.fromkeys(constraints.WEIGHTS, 0)
        for row in rows:
            for instruction in _instructions(row):
                counts[instruction["id"]] += row.response is not None
        assert min(counts.values()) >= at_least, counts


def test_heldout_shares_no_instruction_topic_or_argument_with_training(train: list[Row], heldout: list[Row]) -> None:
    assert not {_plain(row) for row in train} & {_plain(row) for row in heldout}
    topics = [
        {t.strip() for text in split.values() for t in text.split(";")} for split in (TRAIN_TOPICS, HELDOUT_TOPICS)
    ]
    assert not topics[0] & topics[1]
    shared = _arguments(train) & _arguments(heldout)
    assert shared == set()
    compared = {argument[0] for argument in _arguments(heldout)} - {"words"}
    assert compared == set(constraints.WEIGHTS) - WITHOUT_ARGUMENTS - {constraints.EXISTENCE, constraints.FORBIDDEN}


def _shingles(text: str, size: int = 7) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_nothing_of_ifevals_own_prompts_is_in_training(train: list[Row]) -> None:
    """IFEval is for evaluation: no plain instruction stands in it, nor do seven words in a row."""
    spec = importlib.util.find_spec("eval_framework")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)))
    lines = (folder / "tasks/ifeval/data/input_data.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == 541
    seen = set().union(*map(_shingles, prompts))
    text = "\n".join(prompts).lower()
    for plain in {_plain(row) for row in train} | {i.text for i in plain_instructions(0)}:
        assert plain.lower() not in text
        assert not _shingles(plain) & seen, plain


def test_the_verifier_says_the_same_at_every_call() -> None:
    lower = [{"id": constraints.LOWERCASE, "kwargs": {}}]
    assert len({str(constraints.failed(lower, "gardening is fun.")) for _ in range(20)}) == 1
    assert constraints.failed(lower, "the sun gives light and heat to the earth.") == []
    assert constraints.failed(lower, "The sun gives light and heat to the earth.") == [constraints.LOWERCASE]
    assert constraints.failed(lower, "") == [constraints.LOWERCASE]


def test_recording_keeps_every_instruction_and_ranks_its_samples(tmp_path: Path) -> None:
    """With a recorder that says what it was asked: the real one is vLLM, and needs half a minute to start."""

    def recorder(model_folder: Path, instructions: list[str], seed: int) -> Iterator[list[PlainSample]]:
        assert (model_folder, seed) == (Path("model"), 3)
        for text in instructions:
            yield [PlainSample(text, -1.0, False), PlainSample("worse", -2.0, True), PlainSample("better", -0.5, True)]

    record_plain_responses(recorder, Path("model"), tmp_path / "plain.arrow", 3)
    read = read_plain_responses(tmp_path / "plain.arrow")
    assert [r.instruction for r in read] == plain_instructions(3)
    assert all([s.text for s in r.samples] == ["better", "worse", r.instruction.text] for r in read)


def test_the_recording_is_of_todays_instructions() -> None:
    assert [r.instruction for r in read_plain_responses(LOCAL / PLAIN_RESPONSES)] == plain_instructions(0)


@pytest.mark.parametrize("content", [None, b"", b"ARROW1\0\0 torn"])
def test_plain_responses_that_cannot_be_read_are_named(
    tmp_path: Path, tokenizer_folder: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / PLAIN_RESPONSES).write_bytes(content)
    with pytest.raises(DataError, match=r"plain_responses\.arrow: .*; allowed: an Arrow IPC file of plain responses"):
        prepare(tmp_path, tokenizer_folder, seed=0, record=False)
