"""The task's prompts: `python -m my_task.prompts` writes train.parquet and heldout.parquet."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

from uniapl.records import SHARD_SCHEMA

ANIMALS = ["cat", "dog", "fox", "owl", "bear", "wolf", "hare", "seal", "crow", "frog"]


def row(number):
    names = random.Random(number).sample(ANIMALS, 2 + number % 4)
    ask = f"Name {len(names)} animals, one word each, separated by commas."
    content = [{"role": "user", "content": ask}]
    verifier = json.dumps({"count": len(names)})
    return {"id": f"animals-{number}", "messages": content, "response": ", ".join(names), "verifier": verifier}


if __name__ == "__main__":
    for name, numbers in (("train", range(200)), ("heldout", range(200, 232))):
        pq.write_table(pa.Table.from_pylist([row(n) for n in numbers], SHARD_SCHEMA), f"{name}.parquet")
