"""Shards as one table: random access, order, and what is said of files and rows that cannot be used."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from helpers_shards import nullable, row, write_ipc, write_parquet

from uniapl.data.errors import DataError
from uniapl.data.reader import ShardReader, expand
from uniapl.records import SHARD_SCHEMA


def test_rows_of_all_shards_stand_under_one_index(tmp_path: Path) -> None:
    write_ipc(tmp_path / "b.arrow", [row(i) for i in range(10, 19)])
    write_ipc(tmp_path / "a.arrow", [row(i) for i in range(10)], compression="lz4")
    write_parquet(tmp_path / "c.parquet", [row(i) for i in range(19, 30)])
    reader = ShardReader([tmp_path / "*.arrow", tmp_path / "c.parquet"])
    assert len(reader) == 30
    assert [reader[i].id for i in range(30)] == [f"r{i}" for i in range(30)]
    assert reader[25].messages == [{"role": "user", "content": "hello 25"}]
    assert (reader[24].response, reader[25].response) == ("world 24", None)
    assert [reader.has_response(i) for i in (24, 25)] == [True, False]


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(tmp_path: Path, index: int) -> None:
    reader = ShardReader([write_ipc(tmp_path / "a.arrow", [row(i) for i in range(10)])])
    with pytest.raises(IndexError, match="allowed: 0 to 9"):
        reader[index]


def test_a_file_named_twice_is_read_once_and_globs_are_sorted(tmp_path: Path) -> None:
    paths = [write_ipc(tmp_path / f"{name}.arrow", [row(0)]) for name in "ba"]
    assert expand([tmp_path / "*.arrow", paths[0]]) == [tmp_path / "a.arrow", tmp_path / "b.arrow"]


def test_files_of_other_writers_are_taken(tmp_path: Path) -> None:
    """64-bit strings and lists, nullable fields, other columns beside and in another order."""
    message = pa.struct([("content", pa.large_string()), ("role", pa.large_string())])
    schema = pa.schema(
        [
            ("extra", pa.int64()),
            ("verifier", pa.large_string()),
            ("response", pa.large_string()),
            ("messages", pa.large_list(message)),
            ("id", pa.large_string()),
        ]
    )
    table = pa.Table.from_pylist([row(0) | {"extra": 1}], schema=schema)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    assert ShardReader([tmp_path / "a.arrow"])[0].messages == [{"role": "user", "content": "hello 0"}]


def test_the_schema_of_the_project_is_taken(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(0)], schema=SHARD_SCHEMA)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        writer.write_table(table)
    assert ShardReader([tmp_path / "a.arrow"])[0].id == "r0"


def _without(schema: pa.Schema, name: str) -> pa.Schema:
    return schema.remove(schema.get_field_index(name))


def _write(path: Path, schema: pa.Schema) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(schema.empty_table())
    return path


def _cut(path: Path, bytes_left: int) -> Path:
    path.write_bytes(path.read_bytes()[:bytes_left])
    return path


FILES = {
    "missing": (lambda p: p / "none.arrow", "none.arrow: no such file; allowed: existing .arrow or .parquet files"),
    "empty glob": (lambda p: p / "x*.arrow", "x*.arrow: no file matches; allowed: existing .arrow or .parquet files"),
    "folder": (lambda p: p, ": no such file; allowed: existing .arrow or .parquet files"),
    "not a shard": (
        lambda p: (p / "a.arrow").write_text("id,messages") and p / "a.arrow",
        "a.arrow: neither Arrow IPC nor Parquet; allowed: a file in one of these formats",
    ),
    "empty file": (
        lambda p: ((p / "a.arrow").touch(), p / "a.arrow")[1],
        "a.arrow: neither Arrow IPC nor Parquet; allowed: a file in one of these formats",
    ),
    "truncated IPC": (
        lambda p: _cut(write_ipc(p / "a.arrow", [row(i) for i in range(40)]), 2000),
        "a.arrow: cannot be read, truncated or damaged: ",
    ),
    "truncated Parquet": (
        lambda p: _cut(write_parquet(p / "a.parquet", [row(i) for i in range(40)]), 2000),
        "a.parquet: cannot be read, truncated or damaged: ",
    ),
    "no rows": (lambda p: _write(p / "a.arrow", nullable()), "a.arrow: no rows; allowed: at least one row"),
    "column missing": (
        lambda p: _write(p / "a.arrow", _without(nullable(), "response")),
        "a.arrow: column response: missing; allowed: the columns id, messages, response, verifier",
    ),
    "column of another type": (
        lambda p: _write(p / "a.arrow", nullable().set(0, pa.field("id", pa.int64()))),
        "a.arrow: column id: type int64; allowed: string",
    ),
    "messages as text": (
        lambda p: _write(p / "a.arrow", nullable().set(1, pa.field("messages", pa.string()))),
        "a.arrow: column messages: type string; allowed: list<item: struct<role: string not null, "
        "content: string not null>>",
    ),
    "column twice": (
        lambda p: _write(p / "a.arrow", nullable().append(pa.field("id", pa.string()))),
        "a.arrow: column id: stands twice; allowed: once",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used_is_named_on_opening(tmp_path: Path, case: str) -> None:
    make, message = FILES[case]
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        ShardReader([path])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "allowed: " in str(caught.value)


def test_no_paths_at_all() -> None:
    with pytest.raises(DataError, match="no shards are named; allowed: at least one path or glob"):
        ShardReader([])


def _messages(*turns: tuple[str | None, str | None]) -> list[dict[str, str | None]]:
    return [{"role": role, "content": content} for role, content in turns]


ROWS = {
    "null id": ({"id": None}, "column id: null; allowed: text"),
    "empty id": ({"id": ""}, "column id: empty; allowed: text"),
    "null messages": ({"messages": None}, "column messages: null; allowed: at least one message"),
    "no messages": ({"messages": []}, "column messages: empty; allowed: at least one message"),
    "null message": ({"messages": [None]}, "column messages: message 0: role None; allowed: system, user, assistant"),
    "bad role": (
        {"messages": _messages(("user", "a"), ("bot", "b"))},
        "column messages: message 1: role 'bot'; allowed: system, user, assistant",
    ),
    "null content": (
        {"messages": _messages(("user", None))},
        "column messages: message 0: content null; allowed: text",
    ),
    "blank content": (
        {"messages": _messages(("user", " \n"))},
        "column messages: message 0: content empty; allowed: text",
    ),
    "last turn is not the user's": (
        {"messages": _messages(("user", "a"), ("assistant", "b"))},
        "column messages: the last role is 'assistant'; allowed: user, whom the response answers",
    ),
    "empty response": ({"response": ""}, "column response: empty; allowed: text, or null for none"),
    "blank response": ({"response": " \n "}, "column response: empty; allowed: text, or null for none"),
    "verifier not JSON": ({"verifier": "{"}, "column verifier: not JSON ("),
    "verifier a list": ({"verifier": "[]"}, "column verifier: a JSON list; allowed: a JSON object"),
    "verifier empty": ({"verifier": ""}, "column verifier: not JSON ("),
    "verifier nested without end": ({"verifier": "[" * 100_000}, "column verifier: not JSON ("),
}


@pytest.mark.parametrize("write", [write_ipc, write_parquet], ids=["ipc", "parquet"])
@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_when_it_is_read(tmp_path: Path, case: str, write: object) -> None:
    changes, message = ROWS[case]
    path = write(tmp_path / "shard", [row(i) for i in range(5)] + [row(5, **changes)] + [row(6)])  # type: ignore[operator]
    reader = ShardReader([path])
    assert reader[4].id == "r4"
    assert reader[6].id == "r6"
    with pytest.raises(DataError) as caught:
        reader[5]
    assert str(caught.value).startswith(f"{path}: row 5: {message}")
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = write_ipc(tmp_path / "a.arrow", [row(0, response="world zero")])
    path.write_bytes(path.read_bytes().replace(b"world zero", b"world \xff\xfe\xfd\xfc"))
    with pytest.raises(DataError, match=r"a\.arrow: row 0: column response: .*allowed: UTF-8 text"):
        ShardReader([path])[0]


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row(i) for i in range(8)])
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    reader = ShardReader([path])
    with pytest.raises(DataError, match=r"a\.parquet: row 0: row group 0 is damaged"):
        reader[0]


def test_a_data_error_keeps_its_reason_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("a\nb", "empty response")))
    assert (str(error), error.reason) == ("a b", "empty response")


_MEASURE = """
import json, sys
from uniapl.data.reader import ShardReader
from uniapl.data.shuffle import permutation

def anonymous_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])

small, large = ShardReader([sys.argv[1]]), None
small[0]
before = anonymous_kib()
large = ShardReader([sys.argv[2]])
opened = anonymous_kib() - before
shuffle = permutation(len(large), 7)
for position in range(20_000):
    large[shuffle(position)]
print(json.dumps({"rows": len(large), "opened": opened, "read": anonymous_kib() - before}))
"""


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """300 MB of rows, opened and read in shuffled order, take less than 24 MB of the process's own memory."""
    text = "x" * 1000
    rows = 300_000
    batch = pa.RecordBatch.from_pylist([row(i, response=text) for i in range(3000)], schema=nullable())
    large = tmp_path / "large.arrow"
    with pa.OSFile(str(large), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        for _ in range(rows // 3000):
            writer.write_batch(batch)
    small = write_ipc(tmp_path / "small.arrow", [row(0)])
    assert large.stat().st_size > 300_000_000
    command = [sys.executable, "-c", _MEASURE, str(small), str(large)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["rows"] == rows
    assert measured["opened"] < 8_000, measured
    assert measured["read"] < 24_000, measured
