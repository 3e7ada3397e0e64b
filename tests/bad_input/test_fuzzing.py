"""Random input: the configuration is a Config or a ConfigError, a shard gives rows or DataErrors, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError, parse_yaml

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"model": {"path": "m"}, "data": {"train": ["t"], "heldout": ["h"]}}
SOUND = Config.model_validate(SMALLEST).model_dump(mode="json")
SOUND_TEXT = yaml.safe_dump(SOUND, sort_keys=False)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
yaml_like = st.text(alphabet="abe01 .:-+?!&*#|>%@`'\"[]{},<=~\\/\n\t\r\u2028\u202e\ufeff\x00\ud800", max_size=60)


def keys(tree: dict[str, Any], above: str = "") -> list[str]:
    """Every key of a tree as a dotted path."""
    found = []
    for name, value in tree.items():
        found += [f"{above}{name}", *(keys(value, f"{above}{name}.") if isinstance(value, dict) else [])]
    return found


def outcome(path: Path, overrides: list[str]) -> None:
    """Loads it; an error must be lines that each end in what is wrong, without line breaks of the input's."""
    try:
        assert isinstance(load_config(path, overrides), Config)
    except ConfigError as error:
        assert str(error) and all(line.strip() for line in str(error).split("\n"))
        assert str(error).encode("utf-8", "backslashreplace")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzing") / "config.yaml"


@settings(max_examples=150)
@given(st.binary(max_size=80) | yaml_like.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'"\\ud800": 1')
@example(b'a: "\\UFFFFFFFF"')
@example(b"%YAML 1.1\n--- {a: !!python/name:os.system x}")
def test_any_bytes_as_a_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    outcome(path, [])


@settings(max_examples=100)
@given(st.sampled_from(keys(SOUND)), trees)
def test_any_tree_in_the_place_of_any_value(path: Path, key: str, tree: Any) -> None:
    path.write_text(json.dumps(SMALLEST))
    outcome(path, [f"{key}={json.dumps(tree)}"])


@settings(max_examples=150)
@given(st.sampled_from(keys(SOUND)) | st.text(max_size=30), yaml_like | st.text(max_size=30))
@example("\udcff", "1")
@example("run.steps" + ".x" * 2000, "1")
def test_any_text_as_an_override(path: Path, key: str, value: str) -> None:
    path.write_text(json.dumps(SMALLEST))
    outcome(path, [f"{key}={value}"])


@settings(max_examples=60)
@given(st.integers(0, len(SOUND_TEXT) - 1), st.integers(0, 12), st.binary(max_size=12))
def test_a_sound_file_with_some_bytes_changed(path: Path, at: int, cut: int, put: bytes) -> None:
    raw = SOUND_TEXT.encode()
    path.write_bytes(raw[:at] + put + raw[at + cut :])
    outcome(path, [])


@settings(max_examples=100)
@given(trees)
def test_what_json_writes_is_read_as_it_was(tree: Any) -> None:
    """But for what no configuration has: numbers of more than 18 digits, halves of surrogate pairs, an empty key."""
    try:
        found = parse_yaml(json.dumps({"key": tree}), "FILE")
    except ConfigError as error:
        assert any(why in str(error) for why in ("more than 18 digits", "not Unicode text", "not valid YAML")), error
    else:
        assert set(found) == {"key"}


_SHARDS = """
import json, sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers_shards import nullable, row, write_ipc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from uniapl.data.errors import DataError
from uniapl.data.reader import ShardReader

folder, count = Path(sys.argv[1]), int(sys.argv[2])
rows = [row(i) for i in range(12)]
sound = [write_ipc(folder / "sound", rows, compression=c).read_bytes() for c in (None, "lz4", "zstd")]
for options in ({"compression": "none"}, {"compression": "zstd"}, {"use_dictionary": False}):
    pq.write_table(pa.Table.from_pylist(rows, schema=nullable()), folder / "sound", row_group_size=4, **options)
    sound.append((folder / "sound").read_bytes())

put = st.sampled_from((b"\\0", b"\\x01", b"\\x7f", b"\\x80", b"\\xff", b"\\xff" * 8, bytes(8), b"\\xff" * 7 + b"\\x7f"))
length = max(map(len, sound))
places = st.integers(0, length - 1)
overwritten = st.tuples(places, put | st.binary(min_size=1, max_size=1)).map(lambda e: (e[0], len(e[1]), e[1]))
changed = st.tuples(places, st.integers(0, 63), st.binary(max_size=63))

def tried(path):
    try:
        shards = ShardReader([path])
    except DataError:
        return "refused"
    outcome = "read"
    for index in range(min(len(shards), 24)):
        try:
            shards[index]
        except DataError:
            outcome = "read in part"
    return outcome

found = {"refused": 0, "read": 0, "read in part": 0}

@settings(max_examples=count, deadline=None, database=None, print_blob=True,
          suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
@given(st.sampled_from(sound), st.lists(overwritten | overwritten | changed, min_size=1, max_size=4))
def broken(content, edits):
    content = bytearray(content)
    for at, cut, put in edits:
        at %= len(content) or 1
        content[at : at + cut] = put
    path = folder / "last"  # a new file each time: the last one may still be mapped; it stays where this crashes
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    found[tried(path)] += 1

broken()
print(json.dumps(found))
"""


@pytest.mark.timeout(120)
def test_shards_with_changed_bytes_never_crash_the_process(tmp_path: Path) -> None:
    """In a process of its own, so that a crash or an endless loop inside Arrow is seen; UNIAPL_FUZZ=N tries N."""
    count = int(os.environ.get("UNIAPL_FUZZ", "600"))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _SHARDS, str(tmp_path), str(count)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"on {tmp_path / 'last'}: {done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert sum(found.values()) >= 0.9 * count and all(found.values()), found
