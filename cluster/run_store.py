"""A run whose folder is in an object store: its files go there at every checkpoint, and come from there at a resume.

This machine works on a copy in its scratch folder. A store has no rename: a checkpoint counts once its manifest is
there, which is written last, in one piece. Sending goes on beside training; the next checkpoint waits for it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any

import ray

from cluster import checkpoints
from cluster.checkpoints import MANIFEST, STORE_MARK
from cluster.node_parts import fetch_part, files_below, on_node, send_part
from learner.zero_files import needed, saved_ranks
from uniapl import storage
from uniapl.config import Config
from uniapl.config_errors import ConfigError
from uniapl.report import write_report
from uniapl.runlog import ENDED_FILE, RunError
from uniapl.scratch import make_scratch
from uniapl.shared_paths import require_writable
from uniapl.storage import Entry, StorageError, join

OWN_WAY = ("checkpoints", "nodes", "model")
"""Folders that go to the store in their own way, or not at all."""
LEFT_THERE = (*OWN_WAY, "batches", "failed", "tensorboard")
"""Folders that neither a resume nor a report needs."""
UNFINISHED = (".partial", ".tmp")


def open_store(config: Config) -> RunStore | None:
    """Of a run whose `run.folder` is a URL, once it is known that this machine can write there; None with a path.

    Raises:
        ConfigError: it cannot, or the scratch folder cannot be used.
    """
    if config.run_url is None:
        return None
    make_scratch(config.run.scratch)
    require_writable(config.run_url, "the driver")
    return RunStore(config, config.run_url)


class RunStore:
    """The folder of one run in a store, and the working copy of it on the driver's machine.

    Args:
        config: of the run.
        url: of its folder.
    """

    def __init__(self, config: Config, url: str) -> None:
        self.url = url
        self._config = config
        self._folder = config.run_dir
        self._sent: dict[str, tuple[int, int]] = {}
        self._pending: Future[None] | None = None

    def open(self, resume: bool) -> None:
        """Make the working copy: empty, or of what the store has of the run.

        Raises:
            ConfigError: the run is there and `resume` was not asked for, or the scratch folder is used otherwise.
            StorageError: the store cannot be used.
        """
        there = storage.exists(join(self.url, "config.yaml"))
        if there and not resume:
            raise ConfigError(f"run.name: {self.url} is there already; allowed: another name, or --resume to go on")
        self._clear()
        if there:
            storage.delete(join(self.url, ENDED_FILE))
            _fetch_small_files(self.url, self._folder)
            self._sent = self._signatures()
        whole = [step for step, files in self._found().items() if MANIFEST in files]
        self._mark(_name(max(whole)) if whole else None)

    def has_checkpoints(self) -> bool:
        return bool(self._found())

    def push(self) -> None:
        """Send the files of the working copy that have changed since they were last sent, but for checkpoints."""
        now = self._signatures()
        changed = {name: self._folder / name for name in now if self._sent.get(name) != now[name]}
        storage.upload_all(changed, self.url)
        self._sent |= {name: now[name] for name in changed}

    def send_model(self, node: str) -> None:
        """Send the exported model from the node of learner rank 0."""
        storage.delete_all(join(self.url, "model"))
        self._get(on_node(node, send_part, self._config, node, "model", join(self.url, "model")))

    def begin(self, step: int, place: Path, nodes: list[str], note: Callable[[str], None]) -> None:
        """Begin to send a checkpoint.

        Args:
            step: optimizer steps made.
            place: the driver's own part of it.
            nodes: of the learner ranks, in their order.
            note: is told when it is in the store.
        """
        self._pending = future = Future[None]()

        def send() -> None:
            try:
                began = time.monotonic()
                size = self._send(step, place, nodes)
                took = time.monotonic() - began
                note(f"checkpoint {self._of(place.name)}: {size / 2**20:.1f} MiB sent in {took:.1f} s")
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        Thread(target=send, daemon=True).start()

    def settle(self) -> None:
        """Wait until the checkpoint that is being sent, if any, is in the store.

        Raises:
            RunError: it did not get there, or not within `cluster.step_timeout_s`.
            RayError: the process that sent it was lost.
        """
        pending, self._pending = self._pending, None
        limit = self._config.cluster.step_timeout_s
        try:
            if pending is not None:
                pending.result(timeout=limit)
        except StorageError as error:
            cause = getattr(error, "cause", error)  # Ray hands on a task's error with it as the cause
            line = f"a checkpoint could not be sent: {cause}; {checkpoints.kept(self._folder)}"
            raise RunError(line) from None
        except TimeoutError:
            raise RunError(
                f"a checkpoint was not in {self.url} within {limit:g} s (cluster.step_timeout_s); "
                f"{checkpoints.kept(self._folder)}"
            ) from None

    def raise_failed(self) -> None:
        """As `settle`, where the sending has ended."""
        if self._pending is not None and self._pending.done():
            self.settle()

    def settle_before_a_restart(self, note: Callable[[str], None]) -> None:
        """As `settle`, but a checkpoint that did not get there is only told: an older one is gone on from."""
        try:
            self.settle()
        except Exception as error:
            note(" ".join(str(error).split())[:500])

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Around a run that has Ray: an error does not cut off the checkpoint that is being sent, a signal does."""
        try:
            yield
        except Exception:
            self.settle_before_a_restart(warnings.warn)
            raise
        self.settle()

    def fetch_newest(self, nodes: list[str]) -> tuple[int, Path, int] | None:
        """Fetch the newest whole checkpoint, each learner rank's node what its ranks need.

        Args:
            nodes: of the learner ranks, in their order.

        Returns:
            its step, the driver's part of it, the number of ranks that wrote it; None without any. Damaged ones are
            named in a warning and passed over.
        """
        for step, files in sorted(self._found().items(), reverse=True):
            found = self._fetch(step, files, nodes)
            if not isinstance(found, str):
                self._mark(found[0].name)
                return step, *found
            warnings.warn(f"{self._of(_name(step))}: {found}; an older checkpoint is used", stacklevel=2)
        return None

    def _send(self, step: int, place: Path, nodes: list[str]) -> int:
        """Send everything, the manifest last, then delete what is too many; returns the bytes sent."""
        url = self._of(place.name)
        storage.delete_all(url, first=MANIFEST)  # only a torn or damaged one can stand there
        parts = [on_node(node, send_part, self._config, node, place.name, url) for node in sorted(set(nodes))]
        own = files_below(place)
        own.pop(MANIFEST)
        sent = storage.upload_all(own, url)
        for part in parts:
            sent |= self._get(part)
        if _saved_by(sent) != len(nodes):
            raise StorageError(
                f"{url}: files of {_saved_by(sent)} learner ranks were sent, there are {len(nodes)}; "
                "allowed: run.folder where every node can write"
            )
        self.push()
        storage.write(join(url, MANIFEST), checkpoints.manifest(step, dict(sorted(sent.items()))).encode())
        self._mark(place.name)
        run = self._config.run
        for old in checkpoints.surplus(sorted(self._found()), step, run.keep_last, run.keep_every):
            storage.delete_all(self._of(_name(old)), first=MANIFEST)
        return sum(size for size, _ in sent.values())

    def _fetch(self, step: int, files: dict[str, Entry], nodes: list[str]) -> tuple[Path, int] | str:
        """The driver's part and the number of ranks that wrote the checkpoint, or what is wrong with it."""
        url, place = self._of(_name(step)), self._folder / "checkpoints" / _name(step)
        if MANIFEST not in files:
            return f"not whole, {MANIFEST} is missing"
        text = storage.read(join(url, MANIFEST))
        problem = checkpoints.manifest_problem(
            text, _name(step), {n: e.size for n, e in files.items() if n != MANIFEST}
        )
        if problem is not None:
            return problem
        written = json.loads(text)["files"]
        saved_by, parts = _saved_by(written), []
        for node in sorted(set(nodes)):
            wanted = needed(written, [r for r, at in enumerate(nodes) if at == node], saved_by, len(nodes))
            chosen = {name: written[name] for name in wanted}
            parts.append(on_node(node, fetch_part, self._config, node, _name(step), url, chosen))
        own = [name for name in written if "/" not in name]
        found = storage.download_all([*own, MANIFEST], url, place)
        wrong = [f"{name} is not what was written" for name in own if found[name] != written[name]]
        wrong += [answer for answer in map(self._get, parts) if answer is not None]
        return wrong[0] if wrong else (place, saved_by)

    def _found(self) -> dict[int, dict[str, Entry]]:
        """The files of every checkpoint in the store, whole or not, by step."""
        steps: dict[int, dict[str, Entry]] = {}
        for name, entry in storage.find(join(self.url, "checkpoints")).items():
            place, _, file = name.partition("/")
            number = place.removeprefix("step-")
            if number.isdigit() and place == _name(int(number)):
                steps.setdefault(int(number), {})[file] = entry
        return steps

    def _get(self, part: Any) -> Any:
        return ray.get(part, timeout=self._config.cluster.step_timeout_s)

    def _of(self, checkpoint: str) -> str:
        return join(self.url, "checkpoints", checkpoint)

    def _signatures(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every file of the working copy that goes to the store as it is."""
        states = {name: path.stat() for name, path in files_below(self._folder).items() if _goes_along(name)}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}

    def _clear(self) -> None:
        if self._folder.exists() and any(self._folder.iterdir()) and not (self._folder / STORE_MARK).exists():
            raise ConfigError(
                f"run.scratch: {self._folder} is no working copy of a run in a store; allowed: another scratch folder"
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)

    def _mark(self, newest: str | None) -> None:
        """Say in the working copy what it is of, and which checkpoint is the newest in the store."""
        mark = {"url": self.url, "newest": newest}
        (self._folder / STORE_MARK).write_text(json.dumps(mark), encoding="utf-8")


def _fetch_small_files(url: str, folder: Path) -> None:
    """What a resume goes on with, and a report is made of: configuration, metrics, evaluations."""
    names = [name for name in storage.find(url) if name.partition("/")[0] not in LEFT_THERE]
    storage.download_all(names, url, folder)


def _name(step: int) -> str:
    return f"step-{step:05d}"


def _goes_along(name: str) -> bool:
    first = name.partition("/")[0]
    return first not in (*OWN_WAY, STORE_MARK) and not name.endswith(UNFINISHED)


def _saved_by(files: dict[str, Any]) -> int:
    """The number of learner ranks whose files are among these."""
    return saved_ranks([PurePosixPath(name).name for name in files if name.startswith("zero/")], "the checkpoint")


def write_report_there(url: str) -> str:
    """Make the report of a run in a store again, beside its metrics; returns its URL.

    Raises:
        ConfigError: it is no run's folder.
        StorageError: the store cannot be used.
    """
    if not storage.exists(join(url, "config.yaml")):
        raise ConfigError(f"{url}: holds no config.yaml; allowed: the folder of a run, such as s3://BUCKET/runs/NAME")
    with tempfile.TemporaryDirectory(prefix="uniapl-report-") as name:
        folder = Path(name) / PurePosixPath(url).name
        _fetch_small_files(url, folder)
        report = write_report(folder)
        storage.upload(report, join(url, report.name))
    return join(url, report.name)
