"""Shards that are torn, lie about themselves or are of another kind; rows that cannot be used."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_bad_input import complaint
from helpers_shards import nullable, row, word_tokenizer, write_ipc, write_parquet
from helpers_toy import toy_config, toy_rows, write_shard

from uniapl.data import reader
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.data.reader import ShardReader
from uniapl.data.sources import PromptSource

ROWS = [row(i) for i in range(12)]


def ipc(
    path: Path, schema: pa.Schema, compression: str | None = None, rows: list[dict[str, Any]] | None = None
) -> Path:
    table = pa.Table.from_pylist(rows or [], schema=schema)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(table)
    return path


def changed(write: Callable[..., Path], old: bytes, new: bytes, **options: Any) -> Callable[[Path], Path]:
    """A shard in whose file `old`, which must be there, stands as `new`."""

    def make(folder: Path) -> Path:
        path = write(folder / "a.shard", ROWS, **options)
        content = path.read_bytes()
        assert old in content and len(old) == len(new)
        path.write_bytes(content.replace(old, new))
        return path

    return make


def cut(write: Callable[..., Path], keep: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder / "a.shard", ROWS)
        path.write_bytes(keep(path.read_bytes()))
        return path

    return make


def of_type(name: str, kind: pa.DataType) -> Callable[[Path], Path]:
    schema = nullable()
    return lambda folder: ipc(folder / "a.shard", schema.set(schema.get_field_index(name), pa.field(name, kind)))


def of_bytes(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.shard").write_bytes(content)
        return folder / "a.shard"

    return make


def linked_to_itself(folder: Path) -> Path:
    (folder / "a.shard").symlink_to("a.shard")
    return folder / "a.shard"


def stream(folder: Path) -> Path:
    """Arrow's stream format, which is not the file format."""
    path = folder / "a.shard"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, nullable()) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS, schema=nullable()))
    return path


def offsets(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def fewer_rows(folder: Path) -> Path:
    """A Parquet file whose footer gives its row group two rows more than there are."""
    path = write_parquet(folder / "a.shard", ROWS, group=12)
    content = path.read_bytes()
    twelve, fourteen = bytes([2 * 12]), bytes([2 * 14])  # whole numbers in thrift's compact protocol
    for at in range(len(content) - 8, 0, -1):
        if content[at : at + 1] == twelve:
            path.write_bytes(content[:at] + fourteen + content[at + 1 :])
            try:
                if pq.read_metadata(path).row_group(0).num_rows == 14:
                    return path
            except OSError:
                continue  # it was another byte of the footer
    raise AssertionError("the footer's number of rows was not found")


NEITHER = "neither Arrow IPC nor Parquet; allowed: a file in one of these formats"
TORN = "cannot be read, truncated or damaged: "
MESSAGES = "list<item: struct<role: string not null, content: string not null>>"
NO_FILE = "no such file; allowed: existing .arrow or .parquet files"
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
ONE_OFFSETS = offsets(0, 2, 4, 6, 8)
"""Of the ids r0 to r3 in the first record batch."""

# name: (makes the file, how what is said of it begins, after its name)
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one byte": (of_bytes(b"A"), NEITHER),
    "magic alone, Arrow": (of_bytes(b"ARROW1"), TORN),
    "magic twice, Arrow": (of_bytes(b"ARROW1\0\0ARROW1"), TORN),
    "magic alone, Parquet": (of_bytes(b"PAR1"), TORN),
    "magic twice, Parquet": (of_bytes(b"PAR1PAR1"), TORN),
    "JSON lines": (of_bytes(json.dumps(row(0)).encode()), NEITHER),
    "gzip": (of_bytes(b"\x1f\x8b\x08" + bytes(100)), NEITHER),
    "zeros": (of_bytes(bytes(4096)), NEITHER),
    "encrypted Parquet": (of_bytes(b"PARE" + bytes(100) + b"PARE"), NEITHER),
    "a stream": (stream, NEITHER),
    "a link to itself": (linked_to_itself, NO_FILE),
    "a device": (lambda folder: Path("/dev/zero"), NO_FILE),
    "half an IPC file": (cut(write_ipc, lambda b: b[: len(b) // 2]), TORN),
    "an IPC file without its last byte": (cut(write_ipc, lambda b: b[:-1]), TORN),
    "half a Parquet file": (cut(write_parquet, lambda b: b[: len(b) // 2]), TORN),
    "a Parquet file without its last byte": (cut(write_parquet, lambda b: b[:-1]), TORN),
    "two files in one": (cut(write_ipc, lambda b: b + b[:100]), TORN),
    "a Parquet footer longer than the file": (
        cut(write_parquet, lambda b: b[:-8] + b"\xff\xff\xff\x7f" + b[-4:]),
        TORN,
    ),
    "an IPC footer longer than the file": (cut(write_ipc, lambda b: b[:-10] + b"\xff\xff\xff\x7f" + b[-6:]), TORN),
    "an offset behind the buffer": (changed(write_ipc, ONE_OFFSETS, offsets(0, 2, 4, 6, 1 << 30)), TORN),
    "an offset before the buffer": (changed(write_ipc, ONE_OFFSETS, offsets(0, 2, -(1 << 30), 6, 8)), TORN),
    "offsets that fall": (changed(write_ipc, ONE_OFFSETS, offsets(0, 6, 4, 6, 8)), TORN),
    "lists that overlap": (changed(write_ipc, offsets(0, 1, 2, 3, 4), offsets(0, 9, 2, 3, 4)), TORN),
    "a column that is no UTF-8": (changed(write_ipc, b"verifier", b"\xff\xfe\xfd\xfcfier"), TORN),
    "dates": (of_type("id", pa.timestamp("s")), "column id: type timestamp[s]; allowed: string"),
    "bytes": (of_type("id", pa.binary()), "column id: type binary; allowed: string"),
    "text views": (of_type("id", pa.string_view()), "column id: type string_view; allowed: string"),
    "a dictionary": (
        of_type("id", pa.dictionary(pa.int8(), pa.string())),
        "column id: type dictionary<values=string, indices=int8, ordered=0>; allowed: string",
    ),
    "nothing but nulls": (of_type("response", pa.null()), "column response: type null; allowed: string"),
    "lists of one length": (
        of_type("messages", pa.list_(MESSAGE, 2)),
        f"column messages: type fixed_size_list<item: struct<role: string, content: string>>[2]; allowed: {MESSAGES}",
    ),
    "a map": (
        of_type("messages", pa.map_(pa.string(), pa.string())),
        f"column messages: type map<string, string>; allowed: {MESSAGES}",
    ),
    "messages with one field more": (
        of_type("messages", pa.list_(pa.struct([*MESSAGE, ("name", pa.string())]))),
        f"column messages: type list<item: struct<role: string, content: string, name: string>>; allowed: {MESSAGES}",
    ),
    "lists of lists": (
        of_type("messages", pa.list_(pa.list_(MESSAGE))),
        f"column messages: type list<item: list<item: struct<role: string, content: string>>>; allowed: {MESSAGES}",
    ),
    "a column in other letters": (
        changed(write_ipc, b"verifier", b"Verifier"),
        "column verifier: missing; allowed: the columns id, messages, response, verifier",
    ),
    "a column of look-alikes": (
        lambda folder: ipc(
            folder / "a.shard", pa.schema([f.with_name("\u0456d") if f.name == "id" else f for f in nullable()])
        ),
        "column id: missing; allowed: the columns id, messages, response, verifier",
    ),
}


def refused(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        shards = ShardReader([path])
        for index in range(len(shards)):
            shards[index]
    assert "\n" not in str(raised.value) and "allowed: " in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_shard_is_refused_on_opening(tmp_path: Path, case: str) -> None:
    make, expected = FILES[case]
    path = make(tmp_path)
    with pytest.raises(DataError) as raised:
        ShardReader([path])
    said = str(raised.value)
    assert said.startswith(f"{path}: {expected}") and "\n" not in said and "allowed: " in said


def test_a_row_group_with_fewer_rows_than_the_footer_says(tmp_path: Path) -> None:
    assert "row group 0 is damaged: " in refused(fewer_rows(tmp_path))


@pytest.mark.parametrize("kind", ["lz4", "zstd", "parquet", "dictionary"])
def test_a_small_file_that_decodes_to_much_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of 1 MB, not 2 GiB, so that what the test writes stays small."""
    monkeypatch.setattr(reader, "MAX_BLOCK_BYTES", 1_000_000)
    path = tmp_path / "a.shard"
    rows = [row(i, response="x" * 200_000) for i in range(12)]
    if kind in ("lz4", "zstd"):
        ipc(path, nullable(), kind, rows)
        expected = "a record batch of 24"
    else:
        table = pa.Table.from_pylist(rows, schema=nullable())
        pq.write_table(table, path, compression="zstd", use_dictionary=kind == "dictionary")
        expected = "row 0: row group 0 is damaged: more than" if kind == "dictionary" else "a row group of 24"
    assert path.stat().st_size < 60_000
    assert refused(path).startswith(f"{path}: {expected}")


def test_a_compressed_length_that_lies_asks_for_no_memory(tmp_path: Path) -> None:
    """One buffer says that it takes 2**40 bytes when decoded."""
    path = ipc(tmp_path / "a.shard", nullable(), "zstd", [row(0, response="x" * 100_000)])
    length = struct.pack("<q", 100_000)
    path.write_bytes(path.read_bytes().replace(length, struct.pack("<q", 1 << 40)))
    assert re.match(rf"{path}: a record batch of \d{{13}} bytes when decoded; allowed: <= 2147483648, ", refused(path))


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path: Path) -> None:
    """Two of them in one folder, followed by `**`, are 2**40 folders."""
    for name in ("again", "and_again"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "deep").mkdir()
    with pytest.raises(DataError, match="no file matches"):
        ShardReader([tmp_path / "**" / "*.arrow"])
    path = write_ipc(tmp_path / "deep" / "a.arrow", ROWS)
    (tmp_path / ".hidden").mkdir()
    write_ipc(tmp_path / ".hidden" / "b.arrow", ROWS)
    assert reader.expand([tmp_path / "**" / "*.arrow"]) == [path]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "\udcff", "~", "${HOME}/x.arrow", "http://host/x.arrow"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(DataError, match="no such file; allowed: existing"):
        ShardReader([name])


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


LONG = "word " * 300_000
# name: (what differs from a sound row, what is said of it, the reason under which it is counted)
BAD_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "id with a line break": ({"id": "a\nb"}, r"column id: got 'a\nb'; allowed: text without control", "bad id"),
    "id with NUL": ({"id": "a\0"}, r"column id: got 'a\x00'; allowed: text without control", "bad id"),
    "id with an escape": ({"id": "\x1b[2J"}, r"column id: got '\x1b[2J'; allowed: text without control", "bad id"),
    "id turned round": ({"id": "\u202eabc"}, r"column id: got '\u202eabc'; allowed: text without", "bad id"),
    "id of 2000 characters": ({"id": "x" * 2000}, "column id: 2000 characters; allowed: <= 1000", "bad id"),
    "role in capitals": ({"messages": chat(("User", "a"))}, "column messages: message 0: role 'User'", "bad role"),
    "role of look-alikes": ({"messages": chat(("us\u0435r", "a"))}, "column messages: message 0: role 'us", "bad role"),
    "role empty": ({"messages": chat(("", "a"))}, "column messages: message 0: role ''", "bad role"),
    "role endless": ({"messages": chat(("u" * 9999, "a"))}, "column messages: message 0: role 'uuu", "bad role"),
    "tool at the end": (
        {"messages": chat(("user", "a"), ("tool", "b"))},
        "column messages: message 1: role",
        "bad role",
    ),
    "only a system": ({"messages": chat(("system", "a"))}, "column messages: the last role is 'system'", "bad role"),
    "only blanks": (
        {"messages": chat(("user", "\u2003\n\t"))},
        "column messages: message 0: content empty",
        "empty message",
    ),
    "prompt of 60000 words": (
        {"messages": chat(("user", "word " * 60_000))},
        "column messages: 6000",
        "prompt too long",
    ),
    "prompt of 1.5 MB": (
        {"messages": chat(("user", LONG))},
        "column messages: message 0: content: 1500000 characters; allowed: <= 1048576",
        "text too long",
    ),
    "response of 1.5 MB": ({"response": LONG}, "column response: 1500000 characters; allowed", "text too long"),
    "verifier of 1.5 MB": ({"verifier": LONG}, "column verifier: 1500000 characters; allowed", "text too long"),
    "response of blanks": (
        {"response": "\u00a0\u2028"},
        "column response: empty; allowed: text, or null",
        "empty response",
    ),
    "verifier a number": ({"verifier": "3"}, "column verifier: a JSON int; allowed: a JSON object", "bad verifier"),
    "verifier endless digits": ({"verifier": "9" * 9999}, "column verifier: not JSON (", "bad verifier"),
    "verifier twice": ({"verifier": "{}{}"}, "column verifier: not JSON (", "bad verifier"),
    "verifier in Python": ({"verifier": "{'a': 1}"}, "column verifier: not JSON (", "bad verifier"),
}


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(word_tokenizer())


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path: Path, encoder: ChatEncoder, case: str) -> None:
    changes, expected, reason = BAD_ROWS[case]
    path = write_ipc(tmp_path / "a.arrow", [row(0), row(1, **changes), row(2)])
    with pytest.raises(DataError) as raised:
        strict = PromptSource(ShardReader([path]), encoder, 0, 512, 8)
        for _ in range(3):
            strict.next()
    assert str(raised.value).startswith(f"{path}: row 1: {expected}") and len(str(raised.value)) < 500
    lenient = PromptSource(ShardReader([path]), encoder, 0, 512, 8, "skip")
    assert sorted(lenient.next().id for _ in range(2)) == ["r0", "r2"]
    lenient.next()  # of the second epoch
    assert lenient.skipped[reason] >= 1 and set(lenient.skipped) == {reason}


def test_ids_may_repeat_within_and_over_shards(tmp_path: Path) -> None:
    """They are names for logs; what a batch holds is told by leases."""
    paths = [write_ipc(tmp_path / f"{name}.arrow", [row(0), row(0)]) for name in "ab"]
    shards = ShardReader(paths)
    assert [shards[i].id for i in range(4)] == ["r0"] * 4


def test_bytes_that_are_no_text_spoil_one_row_only(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write_ipc(tmp_path / "a.arrow", ROWS)
    path.write_bytes(path.read_bytes().replace(b"world 4", b"\xed\xa0\x80ld 4"))  # a surrogate
    source = PromptSource(ShardReader([path]), encoder, 0, 512, 8, "skip")
    assert {source.next().id for _ in range(11)} == {f"r{i}" for i in range(12)} - {"r4"}
    source.next()  # of the second epoch
    assert source.skipped["not UTF-8"] >= 1 and len(source.skipped) == 1


CLI = {
    "torn shard": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "{p}: cannot be read, truncated or damaged"),
    "empty shard": (lambda p: p.write_bytes(b""), "{p}: neither Arrow IPC nor Parquet; allowed: a file"),
    "no rows": (lambda p: write_shard(p, []), "{p}: no rows; allowed: at least one row"),
    "a bad row": (
        lambda p: write_shard(p, [*toy_rows(0, 5), toy_rows(5, 1)[0] | {"messages": []}]),
        "{p}: row 5: column messages: empty; allowed: at least one message",
    ),
    "a long prompt": (
        lambda p: write_shard(p, [toy_rows(0, 1)[0] | {"messages": chat(("user", "fox " * 500))}]),
        "{p}: row 0: column messages: ",
    ),
    "no response anywhere": (
        lambda p: write_shard(p, [r | {"response": None} for r in toy_rows(0, 8)]),
        "demonstrations: no usable row among all 8 (skipped: none was bad); allowed: at least one",
    ),
}


@pytest.mark.parametrize("case", CLI)
def test_the_command_says_it_before_anything_starts(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, expected = CLI[case]
    config = toy_config(tmp_path, tiny)
    shard = tmp_path / "train-0.arrow"
    spoil(shard)
    said = complaint(capsys, "train", config, f"data.train=[{shard}]")
    assert said.startswith(expected.format(p=shard))
    assert not (tmp_path / "runs").exists()
