"""The model's own samples for the plain instructions, recorded once: what the local data set is built from.

Recording depends on the machine's arithmetic; the file it writes does not, so it is kept with the project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from uniapl.data.errors import DataError
from uniapl.data.instructions import Instruction, plain_instructions

SYSTEM = "You answer every request in one or two short, clear and correct sentences."
SAMPLES = 3
MAX_TOKENS = 48
TEMPERATURE = 0.5
TOP_P = 0.95

SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),
        pa.field(
            "samples",
            pa.list_(pa.struct([("text", pa.string()), ("mean_logprob", pa.float32()), ("finished", pa.bool_())])),
            nullable=False,
        ),
    ]
)


@dataclass(frozen=True)
class PlainSample:
    """One sampled answer; `mean_logprob` over its tokens; `finished`: it ended by itself within the budget."""

    text: str
    mean_logprob: float
    finished: bool


@dataclass(frozen=True)
class PlainResponses:
    """An instruction with its best samples, best first."""

    instruction: Instruction
    samples: list[PlainSample]


Recorder = Callable[[Path, list[str], int], Iterable[list[PlainSample]]]
"""(model folder, instructions, seed) -> `SAMPLES` samples for each instruction."""


def record_plain_responses(record: Recorder, model_folder: Path, out: Path, seed: int) -> None:
    """Sample every plain instruction and write the samples, best first, to `out` (Arrow IPC)."""
    instructions = plain_instructions(seed)
    sampled = record(model_folder, [i.text for i in instructions], seed)
    write_plain_responses([PlainResponses(i, best(s)) for i, s in zip(instructions, sampled, strict=True)], out)


def best(samples: list[PlainSample]) -> list[PlainSample]:
    """The distinct samples, best first: finished ones first, then by mean log probability."""
    distinct = {sample.text.strip(): sample for sample in samples if sample.text.strip()}
    return sorted(distinct.values(), key=lambda s: (not s.finished, -s.mean_logprob, s.text))


def write_plain_responses(responses: list[PlainResponses], out: Path) -> None:
    """Write `responses` to the Arrow IPC file `out`."""
    rows = [
        {
            "split": r.instruction.split,
            "kind": r.instruction.kind,
            "topic": r.instruction.topic,
            "instruction": r.instruction.text,
            "samples": [asdict(sample) for sample in r.samples],
        }
        for r in responses
    ]
    with pa.OSFile(str(out), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def read_plain_responses(path: Path) -> list[PlainResponses]:
    """Everything in a file written by `write_plain_responses`.

    Raises:
        DataError: the file is missing, torn or of another kind.
    """
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
            if not table.schema.equals(SCHEMA):
                raise DataError(f"{path}: columns {table.schema.names}; allowed: {SCHEMA.names}")
            return [_from_row(row) for row in table.to_pylist()]
    except OSError as error:
        raise DataError(f"{path}: {error}; allowed: an Arrow IPC file of plain responses") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: {error}; allowed: an Arrow IPC file of plain responses") from None


def _from_row(row: dict) -> PlainResponses:
    instruction = Instruction(row["split"], row["kind"], row["topic"], row["instruction"])
    return PlainResponses(instruction, [PlainSample(**sample) for sample in row["samples"]])
