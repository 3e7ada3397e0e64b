"""`uniapl data import` of much data: how far it is, interruptions, memory."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_import import chats, contents, imported, write_lines
from rich.console import Console

from cluster.cli import main
from uniapl.data.importing.job import run_import
from uniapl.data.importing.records import Request
from uniapl.data.progress import Bar

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [{"prompt": f"p{i // 2}", "chosen": f"a{i}", "rejected": "b"} for i in range(50)]
BAD = {"prompt": "", "chosen": "a", "rejected": "b"}


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)


def test_a_terminal_shows_how_far_the_import_is(tmp_path: Path) -> None:
    path, console = write_lines(tmp_path / "[red]a.jsonl", chats(600)), terminal()
    imported(tmp_path / "out", path, console=console)
    last = console.file.getvalue().rpartition("importing [red]a.jsonl")[2]  # type: ignore[attr-defined]
    assert re.search(r"━ +(8[5-9])% 512 rows 0:00:0\d", last), last


class Drawn(Bar):
    """Drawn at every step; by itself a bar is drawn ten times a second."""

    def at(self, done: int, rows: int | None = None) -> None:
        super().at(done, rows)
        self._progress.refresh()


def test_a_terminal_shows_how_far_the_checking_of_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, console = write_lines(tmp_path / "a.jsonl", [{"prompt": "p" * (1 << 20)}] * 4), terminal()
    monkeypatch.chdir(tmp_path)  # a long name leaves no room for the times
    with Drawn(console) as bar:
        run_import(Request([path.name], tmp_path / "out"), bar)
    checking = console.file.getvalue().partition("importing")[0]  # type: ignore[attr-defined]
    assert "checking " in checking
    assert list(dict.fromkeys(re.findall(r"(\d+)% +0:", checking))) == ["0", "25", "50", "75", "100"], checking


KILLED = """
import sys, time
from pathlib import Path
from uniapl.data.importing import ledger, shards
def slow(function, name):
    def called(self, *arguments):
        made = function(self, *arguments)
        if name(self) == sys.argv[1]:
            print(sys.argv[1], flush=True)
            time.sleep(60)
        return made
    return called
shards.ShardFile.close = slow(shards.ShardFile.close, lambda file: file.path.name)
ledger.Ledger.save = slow(ledger.Ledger.save, lambda ledger: f"source {ledger.source}")
from cluster.cli import main
sys.exit(main(sys.argv[2:]))
"""


def as_lines(folder: Path) -> list[str]:
    return [
        str(write_lines(folder / "a.jsonl", [*PAIRS, b"{"])),
        str(write_lines(folder / "b.jsonl", [b"{", *PAIRS[:20], b"{"])),
    ]


def as_saved_data_sets(folder: Path) -> list[str]:
    import datasets

    for name, rows in {"a": [*PAIRS, BAD], "b": [BAD, *PAIRS[:20], BAD]}.items():
        datasets.Dataset.from_list(rows).save_to_disk(folder / name)
    return [f"hf:{folder}/a", f"hf:{folder}/b"]


@pytest.mark.parametrize(
    ("at", "inputs", "end"),
    [
        ("heldout.arrow", as_lines, signal.SIGKILL),
        ("comparisons-00001.arrow", as_lines, signal.SIGINT),
        ("source 2", as_lines, signal.SIGKILL),
        ("comparisons-00001.arrow", as_saved_data_sets, signal.SIGKILL),
    ],
)
def test_after_kill_9_and_ctrl_c_the_same_command_goes_on_and_makes_the_same_bytes(
    tmp_path: Path, at: str, inputs: Callable[[Path], list[str]], end: signal.Signals
) -> None:
    """Ended where it is worst: a file has its name and is not yet in the ledger; all are, and there is no manifest."""
    asked = ["--on-bad-row", "skip", "--heldout", "3", "--rows-per-shard", "20"]
    arguments = ["data", "import", *inputs(tmp_path), *asked]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert main([*arguments, "--out", str(undisturbed)]) == 0
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, at, *arguments, "--json", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == at
    child.send_signal(end)
    said, told = child.communicate()
    if end == signal.SIGINT:
        goes_on = "stopped by Ctrl-C; the same command goes on where it was"
        assert (child.returncode, said, told.splitlines()[-1]) == (130, "", goes_on)
    assert not (out / "manifest.json").exists()
    kept = out / "train-00000.arrow"
    before = kept.stat().st_mtime_ns if kept.exists() else None
    time.sleep(0.01)
    assert main([*arguments, "--out", str(out)]) == 0
    assert contents(out) == contents(undisturbed)
    assert before is None or kept.stat().st_mtime_ns == before, "a finished shard is kept, not written again"


MEMORY = """
import re, sys, threading, time
from pathlib import Path
from cluster.cli import main

def now(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

def watch():
    global own
    while True:
        own = max(own, now("RssAnon"))
        time.sleep(0.005)

own = 0
threading.Thread(target=watch, daemon=True).start()
for path in sys.argv[1:]:
    assert main(["data", "import", path, "--out", path.removeprefix("hf:") + ".out", "--heldout", "20"]) == 0
    print("MiB", now("VmHWM"), own)
"""
"""Not getrusage's peak: that one begins with that of the process which started this one, and tests are larger."""
SIZES = {"jsonl": (1000, 4000), "json": (300, 3000), "csv": (300, 3000), "parquet": (6000, 24000), "saved": (300, 3000)}
"""Rows of 5 kB. With 1,000 a shard's buffer has been full; Parquet's reader takes its own 30 MiB over the first few
thousand, and none after that."""
PLAIN = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
"""Allocators that give back: Arrow's own keep for each thread what it had, more of it where threads have to wait."""


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """As JSON in one array, as Parquet in one row group."""
    if path.suffix == ".jsonl":
        write_lines(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=len(rows), compression="none")
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path)
        return f"hf:{path}"
    return str(path)


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """The process's peak after less and after more of each kind, one kind after the other.

    Of a saved data set it is the process's own memory, looked at every 5 ms: its files are mapped, and their pages are
    the kernel's to take back.
    """
    inputs = [
        written(tmp_path / f"{size}.{kind}", [{"prompt": f"{i} ", "response": f"{i:05}" * 1000} for i in range(size)])
        for kind, sizes in SIZES.items()
        for size in sizes
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *inputs],
        env=os.environ | PLAIN | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("MiB")]
    assert len(lines) == len(inputs)
    for number, kind in enumerate(SIZES):
        less, more = (int(line[2 if kind == "saved" else 1]) for line in lines[2 * number : 2 * number + 2])
        assert more - less < 10, f"MiB of {kind}: {less}, then {more}"
