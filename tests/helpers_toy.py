"""A toy task that a random model can learn in a few steps, with data, reward and configuration."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from uniapl.records import SHARD_SCHEMA, Prompt

WORDS = ["fox", "bird", "tree", "red", "blue", "green", "question", "user"]


def many_e(prompt: Prompt, response: str) -> float:
    """The reward: how many of the first ten characters are an `e`, as a share."""
    return response[:10].count("e") / 10


def many_e_slowly(prompt: Prompt, response: str) -> float:
    """The same, but slow while the file named by `TOY_SLOW` exists."""
    if Path(os.environ["TOY_SLOW"]).exists():
        time.sleep(2)
    return many_e(prompt, response)


def many_e_faulty(prompt: Prompt, response: str) -> float | str:
    """The same, but as the word in the file named by `TOY_SLOW` says, while it exists; `FILE.seen` tells what was done.

    slow: takes 2 s, or as many as the number behind it; hang: comes back when the word is another; wrong: raises,
    returns NaN or a string in turn.
    """
    path = Path(os.environ["TOY_SLOW"])
    word, _, seconds = _word(path).partition(" ")
    if word == "slow":
        time.sleep(float(seconds or 2))
    elif word == "hang":
        _tell(path, word)
        while _word(path) == "hang":
            time.sleep(0.1)
    elif word == "wrong":
        seen = path.with_suffix(".seen")  # a trained model says the same again and again: by turns, not by what it says
        kind = ["raise", "NaN", "string"][len(seen.read_text().split()) % 3 if seen.exists() else 0]
        _tell(path, kind)
        if kind == "raise":
            raise RuntimeError("the judge is out")
        return math.nan if kind == "NaN" else "very good"
    return many_e(prompt, response)


def _word(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _tell(path: Path, word: str) -> None:
    with path.with_suffix(".seen").open("a") as seen:
        seen.write(f"{word}\n")


def many_e_or_too_much(prompt: Prompt, response: str) -> float:
    """The same, but for one prompt numbers that float32 cannot hold, different for different responses."""
    return 1e40 * zlib.crc32(response.encode()) if prompt.id == "toy-7" else many_e(prompt, response)


_calls = itertools.count()


def many_e_or_too_much_stopping(prompt: Prompt, response: str) -> float:
    """The same, as its user debugs it: the first call stops."""
    if next(_calls) == 0:
        breakpoint()
    return many_e_or_too_much(prompt, response)


def write_shard(path: Path, rows: list[dict[str, Any]]) -> Path:
    """An Arrow IPC shard of `SHARD_SCHEMA`."""
    table = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SHARD_SCHEMA) as writer:
        writer.write_table(table)
    return path


def toy_rows(first: int, count: int, expert: str = "eeeee eeeee") -> list[dict[str, Any]]:
    """Prompts of two words; every other row has an expert response."""
    return [
        {
            "id": f"toy-{i}",
            "messages": [{"role": "user", "content": f"say {WORDS[i % 8]} {WORDS[i // 8 % 8]}"}],
            "response": expert if i % 2 == 0 else None,
            "verifier": json.dumps({"answer": "e"}),
        }
        for i in range(first, first + count)
    ]


def toy_config(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """Write shards and a configuration of a small run into `folder`; returns the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        write_shard(folder / f"train-{i}.arrow", toy_rows(32 * i, 32))
    write_shard(folder / "heldout.arrow", toy_rows(100, 8))
    tree: dict[str, Any] = {
        "run": {"name": "toy", "folder": str(folder / "runs"), "steps": 8, "checkpoint_every": 4},
        "model": {"path": str(model)},
        "data": {
            "train": [str(folder / "train-*.arrow")],
            "heldout": [str(folder / "heldout.arrow")],
            "max_prompt_tokens": 64,
            "max_response_tokens": 32,
        },
        "rollout": {
            "actors": 1,
            "group_size": 4,
            "max_tokens": 12,
            "dtype": "float32",
            "max_model_len": 128,
            "groups_in_flight": 8,
            "kv_cache_gib": 0.03,
            "threads": 1,
        },
        "reward": {"functions": [{"name": "helpers_toy:many_e"}]},
        "queue": {"groups_per_step": 8, "demonstrations_per_step": 4},
        "objective": {"preference": {"weight": 0.5}, "demonstration": {"weight": 0.5}},
        "learner": {"ranks": 1, "dtype": "float32", "learning_rate": 0.003, "warmup_steps": 1, "row_tokens": 128},
        "evaluation": {"prompts": 4},
        "cluster": {"object_store_gib": 0.1, "broadcast_timeout_s": 60},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
