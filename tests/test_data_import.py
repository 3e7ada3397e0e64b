"""`uniapl data import`: kinds of files, what is asked for, the held-out split, interruptions, memory, hubs."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_import import assistant, chats, contents, imported, rows_of, user, write_lines
from helpers_shards import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import main
from cluster.commands.data import FORMATS
from uniapl.data.comparisons import ComparisonReader
from uniapl.data.errors import DataError
from uniapl.data.importing import formats
from uniapl.data.importing.json_text import json_rows

ROOT = Path(__file__).resolve().parent.parent

FILES: dict[str, tuple[str, bytes, str]] = {
    "kind": (
        "a.txt",
        b"x",
        "a.txt: unknown kind of file; allowed: names that end in .jsonl, .ndjson, .json, .csv, .parquet, .arrow",
    ),
    "empty": ("a.jsonl", b"\n", "a.jsonl: no rows; allowed: at least one row"),
    "first row": (
        "a.jsonl",
        b"x\n",
        "a.jsonl: row 0 (line 1): not JSON (Expecting value at character 1); allowed: a JSON object",
    ),
    "columns": (
        "a.csv",
        b"a,b\n1,2\n",
        "a.csv: no known format has the columns a, b; allowed: messages, conversations, "
        "instruction and output, chosen and rejected, or --prompt COLUMN and --response COLUMN",
    ),
    "array cut off": (
        "a.json",
        b'[{"prompt": "a"}, {"pro',
        "a.json: the array does not end after row 1; allowed: a whole file",
    ),
    "gzip cut off": (
        "a.jsonl.gz",
        gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:40],
        "a.jsonl.gz: cannot be read, "
        "truncated or damaged: Compressed file ended before the end-of-stream marker was reached; allowed: "
        "a whole file",
    ),
    "Parquet": ("a.parquet", b"PAR1", "a.parquet: cannot be read, truncated or damaged: "),
    "fields of CSV": (
        "a.csv",
        b'prompt,response\na,b\n"a\nb"\n',
        "a.csv: row 1 (line 4): 1 fields; allowed: 2, as in the first line (or leave such rows out: --on-bad-row skip)",
    ),
    "bytes of CSV": (
        "a.csv",
        b"prompt,response\na,\xff\n",
        "a.csv: row 0 (line 2): column response: not UTF-8; allowed: UTF-8 text",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used_is_one_line_and_status_2(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, message = FILES[case]
    (tmp_path / name).write_bytes(data)
    assert main(["data", "import", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{tmp_path}/{message}")


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "alpaca"}, "column instruction: missing, for the format alpaca; allowed: question, answer"),
    "prompt": ({"prompt": "text"}, "column text: missing, for the format plain; allowed: question, answer"),
    "shards": ({"shards": 8}, "--shards: got 8; allowed: <= 4, the training rows"),
    "heldout": ({"heldout": 4}, "--heldout: got 4; allowed: < 4, the different prompts of all rows"),
    "number": (
        {"verifier": "question", "verifier_is": "number"},
        "row 0 (line 1): column question: got 'qa'; allowed: a number alone, or behind '####'",
    ),
    "verifier": ({"verifier": "answer"}, "row 0 (line 1): column answer: a number; allowed: a JSON object"),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_is_asked_for_must_go_with_the_data(tmp_path: Path, case: str) -> None:
    options, message = ASKED[case]
    path = write_lines(tmp_path / "a.jsonl", [{"question": f"q{'abcd'[i]}", "answer": f"{i}"} for i in range(4)])
    with pytest.raises(DataError) as caught:
        imported(tmp_path / "out", path, **options)
    assert message in str(caught.value)


def test_the_formats_of_the_help_are_those_there_are() -> None:
    assert sorted(FORMATS) == sorted(formats.NAMES)


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f'say {i},\n"é"', "response": f"well\n{i}"} for i in range(700)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=200)
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    found = {}
    for ending in ("jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow"):
        imported(tmp_path / ending, tmp_path / f"a.{ending}")
        found[ending] = [(r.id, r.messages, r.response) for r in rows_of(tmp_path / ending / "train-*.arrow")]
    assert [f"{m[0]['content']}|{r}" for _, m, r in found["jsonl"]] == [f"{r['prompt']}|{r['response']}" for r in rows]
    assert len({identity for identity, _, _ in found["jsonl"]}) == 700
    assert all(rows == found["jsonl"] for rows in found.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5), st.booleans(), st.integers(1, 9))
def test_an_array_is_read_element_by_element_in_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], spaced: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=1 if spaced else None, ensure_ascii=spaced), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uniapl.data.importing.json_text._CHUNK", chunk)
        assert [record.values for record in json_rows(path, 0)] == rows
        assert [record.row for record in json_rows(path, 2)] == list(range(len(rows)))[2:]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(str.strip)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.lists(st.tuples(TEXTS, TEXTS), max_size=2), TEXTS, TEXTS), min_size=1, max_size=9))
def test_any_text_comes_through_unchanged(tmp_path_factory: pytest.TempPathFactory, talks: list[Any]) -> None:
    """Earlier turns, the last question, and its answer, from the chat format and from ShareGPT's."""
    folder = tmp_path_factory.mktemp("texts")
    expected = [
        ([m for asked, said in turns for m in (user(asked), assistant(said))] + [user(last)], answer)
        for turns, last, answer in talks
    ]
    whole = [[*messages, assistant(answer)] for messages, answer in expected]
    names = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in messages] for messages in whole]
    write_lines(folder / "a.jsonl", [{"messages": messages} for messages in whole])
    write_lines(folder / "b.jsonl", [{"conversations": messages} for messages in shared])
    imported(folder / "out", folder / "?.jsonl")
    assert [(row.messages, row.response) for row in rows_of(folder / "out/train-*.arrow")] == expected * 2


def test_verifiers_and_responses_that_are_too_long(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"q{i}", "answer": f"{'hello ' * 4 * i} #### 1,{i}00", "check": {"n": i}} for i in range(2)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    limit = {"model": str(tmp_path / "model"), "max_response_tokens": 5}
    imported(tmp_path / "n", path, verifier="answer", verifier_is="number", **limit)
    found = rows_of(tmp_path / "n/train-*.arrow")
    assert [row.verifier for row in found] == ['{"answer": "1000"}', '{"answer": "1100"}']
    assert [row.response is None for row in found] == [False, True]
    imported(tmp_path / "a", path, verifier="question", verifier_is="answer")
    assert rows_of(tmp_path / "a/train-*.arrow")[1].verifier == '{"answer": "q1"}'
    imported(tmp_path / "o", path, verifier="check")
    assert rows_of(tmp_path / "o/train-*.arrow")[1].verifier == '{"n": 1}'


def test_a_heldout_prompt_is_in_no_training_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row | {"chosen": row["messages"], "rejected": [row["messages"][0],
                       assistant("no")]} for row in chats(90)])  # fmt: skip
    ledger = imported(tmp_path / "out", path, heldout=10, shards=4)
    held = rows_of(tmp_path / "out/heldout.arrow")
    train = rows_of(tmp_path / "out/train-*.arrow")
    pairs = list(ComparisonReader([tmp_path / "out/comparisons-*.arrow"]))
    said = [{" ".join(r.messages[0]["content"].split()).lower() for r in rows} for rows in (held, train, pairs)]
    assert len(held) == len(said[0]) == 10
    assert not said[0] & (said[1] | said[2])
    assert len(train) == len(pairs) == ledger.counts.imported == 90 - ledger.counts.held_back
    assert ledger.counts.held_back > 10, "some of them are asked twice"
    sizes = [file["rows"] for file in ledger.files if file["name"].startswith("train")]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 1
    places = [row.id for row in train]
    reversed_path = write_lines(tmp_path / "b.jsonl", [json.loads(x) for x in reversed(path.read_text().splitlines())])
    imported(tmp_path / "again", reversed_path, heldout=10)
    assert {r.id for r in rows_of(tmp_path / "again/train-*.arrow")} == set(places), "text alone decides, and makes ids"


def test_a_finished_import_is_left_alone_and_another_one_refused(tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "a.jsonl", chats(30)), tmp_path / "out"
    imported(out, path, rows_per_shard=20)
    made = contents(out)
    imported(out, path, rows_per_shard=20)
    assert contents(out) == made
    with pytest.raises(DataError) as caught:
        imported(out, path, rows_per_shard=30)
    allowed = "allowed: the same command and inputs, another --out, or --overwrite"
    assert str(caught.value) == f"{out}: holds an import with rows_per_shard = 20, not 30; {allowed}"
    write_lines(path, chats(31))
    with pytest.raises(DataError) as caught:
        imported(out, path, rows_per_shard=20)
    assert str(caught.value) == f"{out}: {path} is not what it was when the import began; {allowed}"
    assert contents(out) == made
    imported(out, path, rows_per_shard=50, overwrite=True)
    assert list(contents(out)) == ["manifest.json", "train-00000.arrow"]
    (out / "train-00000.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match=r"train-00000.arrow: was changed since it was imported; allowed: as it was"):
        imported(out, path, rows_per_shard=50)
    with pytest.raises(DataError, match=r"x.arrow: stands where shards are to be written; allowed: an empty folder"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other/x.arrow").touch()
        imported(tmp_path / "other", path)


def test_a_hugging_face_data_set_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = chats(50)
    expected = imported(tmp_path / "lines", write_lines(tmp_path / "a.jsonl", rows), heldout=5)
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select(range(9))).save_to_disk(tmp_path / "splits")
    (tmp_path / "loaded").mkdir()
    saved.to_parquet(tmp_path / "loaded/train.parquet")
    for name in ("one", "splits:train", "loaded:train"):
        ledger = imported(tmp_path / f"out-{name}", f"hf:{tmp_path}/{name}", heldout=5)
        assert ledger.counts == expected.counts
        ids = [row.id for row in rows_of(tmp_path / f"out-{name}/train-*.arrow")]
        assert ids == [row.id for row in rows_of(tmp_path / "lines/train-*.arrow")]
        from_row_40 = list(_source(f"hf:{tmp_path}/{name}").rows(40, ["messages"]))
        assert [r.row for r in from_row_40] == list(range(40, 50))
        assert from_row_40[0].values == rows[40]
    assert imported(tmp_path / "test", f"hf:{tmp_path}/splits:test").counts.imported == 9
    allowed = "allowed: a data set of a hub that can be reached, or a folder"
    for name, message in {
        "no/such-set": "hf:no/such-set: ConnectionError: Couldn't reach 'no/such-set' on the Hub "
        f"(OfflineModeIsEnabled); {allowed}",
        f"{tmp_path}/splits:dev": f"hf:{tmp_path}/splits:dev: ValueError: no split 'dev' but train, test; {allowed}",
        "a:b:c:d": "hf:a:b:c:d: cannot be read; allowed: hf:NAME[:SPLIT[:CONFIG]], such as hf:openai/gsm8k:train:main",
    }.items():
        assert main(["data", "import", f"hf:{name}", "--out", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.strip() == message


def _source(name: str) -> Any:
    from uniapl.data.importing.hub import HubSource

    return HubSource(name)
