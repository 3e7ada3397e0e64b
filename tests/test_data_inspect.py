"""`uniapl data inspect`: counts, lengths, duplicates, and rows as the model sees them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers_import import assistant, imported, user, write_lines
from helpers_shards import row, word_tokenizer, write_ipc, write_parquet
from rich.console import Console

from cluster.cli import main
from uniapl.data.inspection.show import inspect

SYSTEM = {"role": "system", "content": "hello"}
PROMPT = "<|im_start|> user hello <|im_end|> <|im_start|> assistant"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a repeated row, a repeated prompt, a chat of two turns and a held-out prompt; pairs; a tokenizer."""
    folder = tmp_path_factory.mktemp("inspect")
    word_tokenizer().save_pretrained(folder / "model")
    chats = [
        [user("hello"), assistant("world")],
        [user("hello"), assistant("world")],
        [user("Hello"), assistant("hello hello world")],
        [SYSTEM, user("hello"), assistant("world"), user("world"), assistant("hello " * 5 + "hello")],
        [user("world user"), assistant("world")],
    ]
    imported(folder / "chats", write_lines(folder / "chats.jsonl", [{"messages": chat} for chat in chats]), heldout=1)
    pairs = [{"prompt": "hello", "chosen": "world", "rejected": "hello"}]
    imported(folder / "pairs", write_lines(folder / "pairs.jsonl", pairs))
    return folder


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["data", "inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(shards: list[Path], model: Path | None = None, rows: int = 1, **console: Any) -> str:
    file = io.StringIO()
    inspect(
        map(str, shards), model and str(model), rows, False, Console(file=file, width=100, highlight=False, **console)
    )
    return file.getvalue()


def test_counts_lengths_and_duplicates(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, data / "chats/*.arrow", data / "pairs/*.arrow", "--model", data / "model", "--rows", 0)
    shards, pairs = found["kinds"]
    assert [Path(file["name"]).name for file in shards["files"]] == [
        "heldout.arrow",
        "train-00000.arrow",
        "train-00000.arrow",
    ]
    counts = shards["counts"]
    assert counts["rows"] == sum(file["rows"] for file in shards["files"])
    assert counts["with response"] == counts["rows"]
    assert (counts["with verifier"], shards["bad rows"]) == (0, {})
    assert (pairs["kind"], pairs["counts"]["rows"], pairs["unit"]) == ("comparisons", 1, "tokens")
    assert {name: lengths["max"] for name, lengths in pairs["lengths"].items()} == {
        "prompt": 6,
        "chosen": 2,
        "rejected": 2,
    }


def test_what_is_measured_of_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against figures worked out by hand."""
    word_tokenizer().save_pretrained(tmp_path / "model")
    lengths = [1, 1, 2, 3, 7, 8]
    rows = [row(0, id=f"r{i % 5}", response="world " * (n - 1) + "hello") for i, n in enumerate(lengths)]
    rows[3]["messages"] = [SYSTEM, user("hello"), assistant("world"), user("world")]
    rows[5] |= {"response": None, "verifier": None}
    write_ipc(tmp_path / "a.arrow", rows[:4])
    write_parquet(tmp_path / "b.parquet", [*rows[4:], row(0, response=" ")])
    [found] = as_json(capsys, tmp_path / "a.arrow", tmp_path / "b.parquet", "--model", tmp_path / "model")["kinds"]
    assert found["counts"] == {
        "rows": 7,
        "with system message": 1,
        "with several turns": 1,
        "with response": 5,
        "with verifier": 5,
    }
    bad = f"{tmp_path}/b.parquet: row 2: column response: empty; allowed: text, or null for none"
    assert found["bad rows"] == {"empty response": {"rows": 1, "first": bad}}
    response = found["lengths"]["response"]  # with the end of turn: 2, 2, 3, 4, 8
    assert {name: response[name] for name in ("min", "p50", "p90", "max", "mean")} == {
        "min": 2,
        "p50": 3,
        "p90": 4,
        "max": 8,
        "mean": 3.8,
    }
    assert response["histogram"] == [{"from": 2, "rows": 3}, {"from": 4, "rows": 1}, {"from": 8, "rows": 1}]
    assert found["duplicates"] == {"rows": 1, "ids": 1, "prompts": 4, "prompts in several files": 1}
    assert [sample["row"] for sample in found["samples"]] == [0, 3]


def test_rows_are_shown_as_the_model_sees_them(data: Path) -> None:
    plain = printed([data / "pairs/train-*.arrow", data / "pairs/comparisons-*.arrow"], data / "model")
    lines = plain.splitlines()
    assert lines.count(f"prompt: {PROMPT}") == 2
    assert "response: ⟦world <|im_end|>⟧" in lines
    assert {"chosen: ⟦world <|im_end|>⟧", "rejected: ⟦hello <|im_end|>⟧"} <= set(lines)
    schema = "schema id string, messages list<struct<role: string, content: string>>, response string, verifier string"
    assert f"{schema}, source string" in " ".join(plain.split())
    coloured = printed([data / "pairs/train-*.arrow"], data / "model", force_terminal=True, color_system="standard")
    assert "\x1b[1;32mworld <|im_end|>\x1b[0m" in coloured
    assert f"\x1b[2m{PROMPT}\x1b[0m" in coloured
    assert "⟦" not in coloured


def test_without_a_model_the_turns_stand_as_they_are_stored(data: Path) -> None:
    found = printed([data / "chats/*.arrow"], rows=9)
    assert "system: hello\nuser: hello\nassistant: world\nuser: world\nresponse: ⟦hello hello hello" in found
    assert "--model FOLDER shows rows with its chat template" in found
    assert "prompt, characters" in found


def test_a_row_cannot_command_the_terminal(tmp_path: Path) -> None:
    path = write_ipc(tmp_path / "a.arrow", [row(0, response="red\x1b[31m\u202e\tend\n" + "x" * 3000)])
    found = printed([path])
    assert "response: ⟦red\\x1b[31m\\u202e" in found
    assert "… (1,014 characters more)" in " ".join(found.split())
    assert not {"\x1b", "\u202e"} & set(found)


def test_what_is_no_shard_is_one_line_and_status_2(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.arrow").write_text("no")
    for arguments, message in {
        (tmp_path / "a.arrow",): f"{tmp_path}/a.arrow: neither Arrow nor Parquet, or damaged: ",
        (tmp_path / "b.arrow",): f"{tmp_path}/b.arrow: no such file; allowed: existing .arrow or .parquet files",
        (data / "chats/*.arrow", "--model", "none"): "none: no such folder; allowed: a Hugging Face folder with a",
    }.items():
        assert main(["data", "inspect", *map(str, arguments)]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(message)
