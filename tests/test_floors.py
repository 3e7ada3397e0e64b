"""The three floors: imports run downward only, also those inside functions; files stay small."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "uniapl": {"ray", "vllm", "deepspeed", "actors", "learner", "cluster"},
    "actors": {"learner", "cluster"},
    "learner": {"actors", "cluster"},
    "cluster": set(),
}
DYNAMIC = {"import_module", "__import__"}
MAX_LINES = 400


def files_of(package):
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no files in {package}"
    return found


def imported(source, package=""):
    """(line, top-level package) of every import in the source of a module of `package`, however it is made."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level < 2:
            names = [package if node.level else node.module]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if node.module is None else [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            names = [str(node.args[0].value)] if called in DYNAMIC else []
        else:
            continue
        yield from ((node.lineno, name.split(".")[0]) for name in names)


def violations(source, package):
    return [f"line {line} imports {name}" for line, name in imported(source, package) if name in FORBIDDEN[package]]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_nothing_from_above_or_beside_it(package):
    found = {str(path.relative_to(ROOT)): violations(path.read_text(), package) for path in files_of(package)}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_file_is_longer_than_400_lines(package):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files_of(package)}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("package", "source", "found"),
    [
        ("uniapl", "import ray", ["line 1 imports ray"]),
        ("uniapl", "import os, ray.serve as serve", ["line 1 imports ray"]),
        ("uniapl", "from vllm.config import VllmConfig", ["line 1 imports vllm"]),
        ("uniapl", "def f():\n    from deepspeed import zero", ["line 2 imports deepspeed"]),
        ("uniapl", "if TYPE_CHECKING:\n    import actors.queue", ["line 2 imports actors"]),
        ("uniapl", "importlib.import_module('learner.step')", ["line 1 imports learner"]),
        ("uniapl", "__import__('cluster')", ["line 1 imports cluster"]),
        ("uniapl", "from .. import actors", ["line 1 imports actors"]),
        ("actors", "from learner.group import start", ["line 1 imports learner"]),
        ("learner", "try:\n    import actors\nexcept ImportError: pass", ["line 2 imports actors"]),
        ("uniapl", "import rayon, vllm_tools\nfrom .ray import x\nfrom . import ray\n'import ray'", []),
        ("actors", "import ray, vllm, uniapl.mixing", []),
        ("learner", "import ray, deepspeed, uniapl.packing", []),
        ("cluster", "import actors.queue, learner.group, uniapl.config", []),
    ],
)
def test_the_check_sees_every_kind_of_import_and_nothing_else(package, source, found):
    assert violations(source, package) == found


def test_no_deadline_in_the_sources_is_taken_from_the_wall_clock():
    """Four lines ask for it: the time logged with a step or a resume, the age of a file, whether it was set back."""
    wall = re.compile(r"time\.time\(|datetime\.(now|utcnow|today)|from time import")
    files = [path for part in ("uniapl", "actors", "learner", "cluster") for path in (ROOT / part).rglob("*.py")]
    found = {(path.name, line.strip()) for path in files for line in path.read_text().splitlines() if wall.search(line)}
    assert found == {
        ("runlog.py", "self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))"),
        ("runlog.py", 'record = {"step": step, "time": time.time()} | numbers | {"step": step}'),
        ("wall_clock.py", "return time.time() - time.monotonic()"),
        (
            "doctor_machine.py",
            "ours = [p for p in ours if p.stat().st_uid == os.getuid() and time.time() - p.stat().st_mtime > LEFT_S]",
        ),
    }
