"""Shards, and a word-level tokenizer with a chat template, for tests of the data floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uniapl.records import SHARD_SCHEMA

TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
WORDS = ["<unk>", "user", "assistant", "system", "hello", "world"]


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A sound row; every second one has a response."""
    sound: dict[str, Any] = {
        "id": f"r{number}",
        "messages": [{"role": "user", "content": f"hello {number}"}],
        "response": f"world {number}" if number % 2 == 0 else None,
        "verifier": '{"instructions": []}',
    }
    return sound | changes


def nullable(schema: pa.Schema = SHARD_SCHEMA) -> pa.Schema:
    """The shard schema as other writers have it: everything may be null."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema([(f.name, pa.list_(message) if f.name == "messages" else f.type) for f in schema])


def write_ipc(path: Path, rows: list[dict[str, Any]], batch: int = 4, compression: str | None = None) -> Path:
    """Rows as an Arrow IPC file in record batches of `batch` rows."""
    table = pa.Table.from_pylist(rows, schema=nullable())
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 4) -> Path:
    """Rows as a Parquet file in row groups of `group` rows."""
    pq.write_table(pa.Table.from_pylist(rows, schema=nullable()), path, row_group_size=group)
    return path


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per word, numbers unknown."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made
