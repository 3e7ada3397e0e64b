"""What a row of every format becomes in `uniapl data import`, and what is said of rows that cannot be used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers_import import assistant, imported, rows_of, user, write_lines
from helpers_shards import word_tokenizer

from cluster.cli import main
from uniapl.config import load_config
from uniapl.data.comparisons import ComparisonReader
from uniapl.data.errors import DataError
from uniapl.data.importing.summary import summary

SYSTEM = {"role": "system", "content": "be kind"}
TALK = [user("one"), assistant("two"), user("three")]
HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "

ACCEPTED: dict[str, tuple[dict[str, Any], list[dict[str, str]], str | None]] = {
    "chat": ({"messages": [SYSTEM, *TALK, assistant("four")]}, [SYSTEM, *TALK], "four"),
    "chat, a turn behind the last answer": ({"messages": [*TALK, assistant("four"), user("five")]}, TALK, "four"),
    "chat, parts of text": (
        {"messages": [user("x") | {"content": [{"type": "text", "text": "one"}]}, assistant("two")]},
        [user("one")],
        "two",
    ),
    "sharegpt": (
        {
            "system": "be kind",
            "conversations": [
                {"from": "human", "value": "one"},
                {"from": "gpt", "value": "two"},
                {"from": "human", "value": "three"},
                {"from": "gpt", "value": "four"},
            ],
        },
        [SYSTEM, *TALK],
        "four",
    ),
    "alpaca": ({"instruction": "one", "input": "", "output": "two"}, [user("one")], "two"),
    "alpaca, input": ({"instruction": "one", "input": "more", "output": "two"}, [user("one\n\nmore")], "two"),
    "alpaca, history": (
        {"instruction": "three", "output": "four", "history": [["one", "two"]], "system": "be kind"},
        [SYSTEM, *TALK],
        "four",
    ),
    "plain": ({"question": "one", "answer": "two", "level": 3}, [user("one")], "two"),
    "plain, a prompt alone": ({"prompt": "one", "response": None}, [user("one")], None),
    "plain, no response at all": ({"problem": "one"}, [user("one")], None),
    "plain, messages": ({"prompt": TALK, "completion": [assistant("four")]}, TALK, "four"),
    "shard": ({"messages": TALK, "response": "four", "verifier": None}, TALK, "four"),
    "shard, a prompt alone": ({"messages": TALK, "response": None}, TALK, None),
}
PAIRS: dict[str, dict[str, Any]] = {
    "texts beside a prompt": {"prompt": "three", "chosen": "four", "rejected": "no"},
    "answers beside a prompt": {
        "prompt": [user("three")],
        "chosen": [assistant("four")],
        "rejected": [assistant("no")],
    },
    "conversations (UltraFeedback)": {
        "prompt": "three",
        "messages": [user("three"), assistant("four")],
        "chosen": [user("three"), assistant("four")],
        "rejected": [user("three"), assistant("no")],
    },
    "system and question (Orca)": {"system": "", "question": "three", "chosen": "four", "rejected": "no"},
    "transcripts (HH)": {
        "chosen": "\n\nHuman: three\n\nAssistant: four",
        "rejected": "\n\nHuman: three\n\nAssistant: no",
    },
}
CHAT = {"messages": [user("one"), assistant("two")]}
BAD: dict[str, tuple[Any, Any, str]] = {
    "not JSON": (
        CHAT,
        b"{",
        "row 1 (line 2): not JSON (Expecting property name enclosed in double quotes at "
        "character 2); allowed: a JSON object",
    ),
    "not an object": (CHAT, [1], "row 1 (line 2): a JSON list; allowed: a JSON object"),
    "not UTF-8": (
        CHAT,
        b'{"messages": "\xff"}',
        "row 1 (line 2): 'utf-8' codec can't decode byte 0xff in position 14: invalid start byte; allowed: UTF-8 text",
    ),
    "not UTF-8: half a pair": (
        CHAT,
        {"messages": [user("\ud800"), assistant("b")]},
        "row 1 (line 2): column messages: message 0: "
        "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed; "
        "allowed: UTF-8 text",
    ),
    "wrong type: column missing": (
        CHAT,
        {"x": 1},
        "row 1 (line 2): column messages: null; allowed: a list of messages",
    ),
    "wrong type": (
        CHAT,
        {"messages": [user("a"), 3]},
        "row 1 (line 2): column messages: message 1: a number; allowed: an object with role and content",
    ),
    "no messages": (CHAT, {"messages": []}, "row 1 (line 2): column messages: empty; allowed: at least one message"),
    "no user turn": (
        CHAT,
        {"messages": [SYSTEM, assistant("a")]},
        "row 1 (line 2): column messages: no user turn before the last assistant turn; allowed: one",
    ),
    "no assistant turn": (
        CHAT,
        {"messages": [user("a")]},
        "row 1 (line 2): column messages: no assistant turn; allowed: at least one",
    ),
    "order of roles": (
        CHAT,
        {"messages": [user("a"), assistant("b"), assistant("c")]},
        "row 1 (line 2): column messages: message 2: the assistant answers 'assistant'; allowed: a turn of the user",
    ),
    "bad role": (
        CHAT,
        {"messages": [{"role": "tool", "content": "x"}]},
        "row 1 (line 2): column messages: message 0: role 'tool'; allowed: system, user (human), assistant (gpt)",
    ),
    "tool call": (
        CHAT,
        {"messages": [user("a"), assistant("b") | {"tool_calls": [1]}]},
        "row 1 (line 2): column messages: message 1: a call of a tool; allowed: text",
    ),
    "empty message": (
        CHAT,
        {"messages": [user(" "), assistant("b")]},
        "row 1 (line 2): column messages: message 0: empty; allowed: text",
    ),
    "empty prompt": (
        {"prompt": "a", "response": "b"},
        {"prompt": "\n", "response": "b"},
        "row 1 (line 2): column prompt: empty; allowed: text",
    ),
    "empty response": (
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": ""},
        "row 1 (line 2): column response: empty; allowed: text",
    ),
    "text too long": (
        {"prompt": "a"},
        {"prompt": "a" * (2**20 + 1)},
        "row 1 (line 2): column messages: message 0: content: 1048577 characters; allowed: <= 1048576",
    ),
    "different prompts": (
        PAIRS["texts beside a prompt"],
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "row 1 (line 2): column rejected: another prompt than in chosen; allowed: the same",
    ),
    "equal responses": (
        PAIRS["texts beside a prompt"],
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "row 1 (line 2): column rejected: the same response as in chosen; allowed: another",
    ),
    "no prompt": (
        PAIRS["texts beside a prompt"],
        {"chosen": "b", "rejected": "c"},
        "row 1 (line 2): column chosen: no "
        "transcript; allowed: one that begins with 'Human:', or a column prompt beside it",
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_a_row_becomes(tmp_path: Path, case: str) -> None:
    row, messages, response = ACCEPTED[case]
    ledger = imported(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [row]))
    assert ledger.inputs[0]["format"] == case.partition(",")[0]
    [found] = rows_of(tmp_path / "out/train-00000.arrow")
    assert (found.messages, found.response) == (messages, response)
    assert ledger.counts.without_response == (response is None)


@pytest.mark.parametrize("case", PAIRS)
def test_a_preference_pair_is_a_demonstration_and_a_comparison(tmp_path: Path, case: str) -> None:
    ledger = imported(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [PAIRS[case]]))
    [found] = rows_of(tmp_path / "out/train-*.arrow")
    assert (found.messages, found.response) == ([user("three")], "four")
    [pair] = ComparisonReader([tmp_path / "out/comparisons-*.arrow"])
    assert (pair.id, pair.messages, pair.chosen, pair.rejected) == (found.id, found.messages, "four", "no")
    assert ledger.counts.pairs == 1
    *_, train, compared = summary(ledger, tmp_path / "out").splitlines()
    assert train == f'data.train=["{tmp_path}/out/train-*.arrow"]'
    assert compared == f'objective.adversarial.cotrained.comparisons=["{tmp_path}/out/comparisons-*.arrow"]'


def test_a_transcript_keeps_its_turns(tmp_path: Path) -> None:
    pair = {"chosen": HH + "four", "rejected": HH + "no"}
    imported(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [pair]))
    assert rows_of(tmp_path / "out/train-*.arrow")[0].messages == TALK


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, reason: str) -> None:
    good, bad, message = BAD[reason]
    path = write_lines(tmp_path / "a.jsonl", [good, bad])
    with pytest.raises(DataError) as caught:
        imported(tmp_path / "out", path)
    assert str(caught.value) == f"{path}: {message} (or leave such rows out: --on-bad-row skip)"
    assert not list((tmp_path / "out").glob("*.arrow*")), "nothing half done stays"
    ledger = imported(tmp_path / "out", path, on_bad_row="skip")
    assert ledger.counts.imported == 1
    counted = reason.partition(":")[0]
    assert ledger.counts.skipped == {counted: {"rows": 1, "first": f"{path}: {message}"}}


PROMPT, DEMONSTRATION, PAIR = (
    {"prompt": "a"} | more for more in ({}, {"response": "b"}, {"chosen": "b", "rejected": "c"})
)


def test_the_columns_of_all_first_rows_tell_the_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [PROMPT, DEMONSTRATION])
    assert imported(tmp_path / "out", path).counts.without_response == 1
    assert [row.response for row in rows_of(tmp_path / "out/train-*.arrow")] == [None, "b"]
    conversation = {"messages": [user("one")]}
    path = write_lines(tmp_path / "b.jsonl", [conversation, conversation | {"response": "two"}])
    imported(tmp_path / "out-b", path)
    assert [row.response for row in rows_of(tmp_path / "out-b/train-*.arrow")] == [None, "two"]


FIRST_ROWS = "in none of the first rows, by which the format is plain, which ignores it"
IGNORED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "responses": ([PROMPT] * 100 + [DEMONSTRATION], f"row 100 (line 101): column response: {FIRST_ROWS}"),
    "pairs": ([DEMONSTRATION] * 100 + [PAIR], f"row 100 (line 101): column chosen: {FIRST_ROWS}"),
    "pairs among others": ([PROMPT, PAIR], "row 0 (line 1): column chosen: null"),
    "another prompt": (
        [{"question": "a", "answer": "b"}] * 100 + [DEMONSTRATION],
        f"row 100 (line 101): column prompt: {FIRST_ROWS}",
    ),
    "another response": (
        [DEMONSTRATION, {"prompt": "a", "completion": "b"}],
        "row 1 (line 2): column completion: a response, where other rows have it in response",
    ),
    "a conversation's response": (
        [CHAT] * 100 + [{"messages": [user("a")], "response": "b"}],
        "row 100 (line 101): column response: in none of the first rows, by which the format is chat",
    ),
}


@pytest.mark.parametrize("case", IGNORED)
def test_no_row_loses_a_column_that_says_something(tmp_path: Path, case: str) -> None:
    rows, message = IGNORED[case]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        imported(tmp_path / "out", path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_what_became_of_the_rows_for_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [DEMONSTRATION, PROMPT, {"prompt": ""}])
    assert main(["data", "import", str(path), "--out", str(tmp_path / "out"), "--on-bad-row", "skip", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["imported"], found["without_response"], found["skipped"]["empty prompt"]["rows"]) == (2, 1, 1)
    assert [file["name"] for file in found["files"]] == ["train-00000.arrow"]


def test_columns_that_change_nothing_may_come_late(tmp_path: Path) -> None:
    late = {"response": None, "system": "be kind", "level": 3}
    path = write_lines(tmp_path / "a.jsonl", [PROMPT] * 100 + [PROMPT | late])
    assert imported(tmp_path / "out", path).counts.imported == 101
    told = write_lines(
        tmp_path / "b.jsonl", [PROMPT | {"response": None, "answer": "5"}, {"prompt": "c", "answer": "6"}]
    )
    options = {"verifier": "answer", "verifier_is": "answer"}
    assert imported(tmp_path / "told", told, **options).counts.without_response == 2


def _commands(config: Path) -> list[list[str]]:
    """The lines `uniapl data …` in the comments of a recipe, as arguments."""
    text = "\n".join(line.removeprefix("#").strip() for line in config.read_text().splitlines())
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("uniapl data import")]


def _data_set(folder: Path, config: str, split: str, rows: list[dict[str, Any]]) -> None:
    """A data set of a hub, as a folder with one split of one configuration."""
    (folder / "data").mkdir(parents=True)
    write_lines(folder / "data" / f"{split}.jsonl", rows)
    files = f"  data_files:\n  - split: {split}\n    path: data/{split}*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b", "qwen3-32b"])
def test_the_commands_of_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On folders with a few rows in the form of the public data sets, since no hub can be reached from here."""
    recipe = Path(__file__).resolve().parent.parent / "configs" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    gsm8k, deepmath = tmp_path / "openai/gsm8k", tmp_path / "zwhe99/DeepMath-103K"
    rows = [{"question": f"q{i}", "answer": f"1 + {i}\n#### 1,{i}00"} for i in range(5)]
    _data_set(gsm8k, "main", "test", rows)
    solved = {"generated_solution": "It is \\boxed{7}.", "problem_source": "augmented_gsm8k"}
    rows = [{"problem": f"p{answer}", "expected_answer": answer, **solved} for answer in ("7", "x + 1", "\\frac{7}{2}")]
    rows[0]["generated_solution"] = "hello " * 600
    _data_set(tmp_path / "nvidia/OpenMathInstruct-2", "default", "train_1M", rows)
    finals = ["3", "\\frac{1}{2}", "Yes", "2\\pi", "$-7.5$."]
    rows = [
        {"question": f"q{i}", "final_answer": finals[i % 5], "r1_solution_1": "hello " * (9000 if i % 100 == 0 else 9)}
        for i in range(1700)
    ]
    deepmath.mkdir(parents=True)
    write_lines(deepmath / "train.jsonl", rows)
    config = load_config(recipe)
    word_tokenizer().save_pretrained(config.model.path)
    for arguments in _commands(recipe):
        assert main(arguments) == 0
    train, held = rows_of(*config.data.train), rows_of(*config.data.heldout)
    answers = {json.loads(row.verifier or "")["answer"] for row in [*train, *held]}
    if name == "qwen3-0.6b":
        assert [row.response for row in train] == [None, "It is \\boxed{7}."]
        assert (len(held), answers) == (5, {"7", "7/2"} | {f"1{i}00" for i in range(5)})
    else:
        assert (len(train), len(held)) == (20, 1000)
        assert answers == {"3", "1/2", "-15/2"}
        assert sum(row.response is None for row in [*train, *held]) in range(1, 18)
