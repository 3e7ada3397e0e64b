"""`uniapl replay`: one recorded step again, in this process alone: no Ray, no engines, one rank."""

from __future__ import annotations

import gc
import math
import os
import pdb
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cluster.changes import check_changes
from cluster.replay_steps import find_steps, measurements
from learner.device import cpu_environment
from learner.zero_files import TAG, ranks_in
from uniapl.config import Config
from uniapl.config_errors import ConfigError, set_dotted, validation_lines
from uniapl.data.errors import DataError
from uniapl.data.model_folder import read_model_config, size_of
from uniapl.objective.controllers import Controllers
from uniapl.objective.sequences import training_sequences
from uniapl.recorded import Recorded, token_ids
from uniapl.records import MixedBatch

if TYPE_CHECKING:
    from learner.rank import Rank

CHANGEABLE = (
    "objective",
    "learner.row_tokens",
    "learner.share_prompts",
    "learner.micro_batch_rows",
    "rollout.temperature",
    "rollout.max_tokens",
)
"""Keys, or sections, that a step which has its batch already still depends on."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of loss and gradient norm, relative or absolute: another number of ranks adds up in another order."""
Note = Callable[[str], None]


@dataclass
class Replay:
    """What came of it. `step` counts from 1, as in metrics.jsonl."""

    step: int
    dtype: str
    recorded: dict[str, float] = field(default_factory=dict)
    """As the run logged it; empty for a step that it could not make."""
    replayed: dict[str, float] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """By "replayed" or "changed": what of the step is not finite."""
    blamed: list[dict[str, Any]] = field(default_factory=list)
    """What the batch holds of the sequences to blame for it."""

    @property
    def reproduced(self) -> bool:
        """Whether losses and gradient norm are the recorded ones or, in a step that failed, it fails again."""
        if not self.recorded:
            return "replayed" in self.failures
        keys = [key for key in self.recorded if key.startswith("loss/") or key == "learner/grad_norm"]
        return all(self._same(self.recorded[key], self.replayed.get(key, math.nan)) for key in keys)

    def _same(self, a: float, b: float) -> bool:
        tolerance = TOLERANCE[self.dtype]
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def replay(folder: Path, step: int, override: str | None, failed: bool, stop: bool, note: Note) -> Replay:
    """Make a recorded step again from the weights that it began with.

    Args:
        folder: of the run.
        step: from 1, as in metrics.jsonl.
        override: KEY=VALUE to make it with once more, from the same weights.
        failed: of a step that is there twice, the one that could not be made.
        stop: in Python's debugger before the step.
        note: called with a line on what is going on.

    Raises:
        ConfigError, DataError, RunError: nothing can be made again from what is there; one line.
    """
    steps = find_steps(folder, step, failed)
    last = steps.recorded[-1]
    changed = _changed(last, override) if override else None
    _check(last, changed)
    note("loading the learner ...")
    rank = _load(last.config, steps.start, note)
    for recorded in steps.recorded[:-1]:
        began = time.monotonic()
        rank.use(_alone(recorded.config))
        _make(rank, recorded, update=True)
        note(f"step {recorded.batch.step + 1} made again in {time.monotonic() - began:.1f} s")
    found = Replay(step, last.config.learner.dtype, steps.metrics)
    rank.use(_alone(last.config))
    if stop:  # `rank.step` of learner/rank.py is what comes; `last` holds batch, configuration and weights
        pdb.set_trace()  # not breakpoint(): Ray has that call its own debugger in processes that it started
    _measure(rank, last, found, "replayed")
    if changed is not None:
        rank.use(_alone(changed.config))
        _measure(rank, changed, found, "changed")
    _end(rank)
    return found


def _changed(recorded: Recorded, override: str) -> Recorded:
    """The same step with one value changed; a weight that follows a measurement stays, unless it is what changed."""
    before = recorded.config.model_dump(mode="json")
    tree = recorded.config.model_dump(mode="json")
    set_dotted(tree, override)
    config = _validated(tree)
    lines = check_changes(before, config.model_dump(mode="json"), "the run")
    keys = [line.partition(":")[0] for line in lines]
    if not keys:
        raise ConfigError(f"override {override!r}: is the recorded value; allowed: another one")
    for key in keys:
        if not any(f"{key}.".startswith(f"{known}.") for known in CHANGEABLE):
            raise ConfigError(f"{key}: changes nothing in a recorded step; allowed: {', '.join(CHANGEABLE)}")
    old, new = recorded.config.objective.coefficients, config.objective.coefficients
    controllers = Controllers(config.objective)
    followed = {t: recorded.weights[t] if old[t] == new[t] else new[t].value for t in controllers.state_dict()}
    controllers.load_state_dict(followed)
    return Recorded(recorded.batch, config, controllers.weights(recorded.batch.step))


def _validated(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(validation_lines(error, Config, lambda _: "override"))) from None


def _check(recorded: Recorded, changed: Recorded | None) -> None:
    """What would be an error deep in the model, or have transformers look for a folder on the hub."""
    config = recorded.config
    for c in (config, changed.config if changed else config):
        o = c.objective
        folders = {
            "model.path": c.model.path,
            "objective.kl.reference": o.kl.reference if o.kl.weight.ever_positive else None,
            "objective.adversarial.cotrained.model": o.adversarial.cotrained.model if o.cotrained else None,
        }
        for key, folder in folders.items():
            if folder is not None:
                read_model_config(key, folder)
    vocabulary = size_of(read_model_config("model.path", config.model.path), "vocab_size") or math.inf
    room = min(c.learner.row_tokens for c in (config, changed.config if changed else config))
    for ids in token_ids(recorded.batch):
        if max(ids) >= vocabulary:
            raise DataError(f"the batch holds token {max(ids)}; allowed: < {vocabulary} in {config.model.path}")
        if len(ids) > room:
            raise ConfigError(f"learner.row_tokens: got {room}; allowed: >= {len(ids)}, the batch's longest sequence")


def _alone(config: Config) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": 1})})


def _load(config: Config, start: Path | None, note: Note) -> Rank:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    if not torch.cuda.is_available():
        os.environ.update(cpu_environment() | {"GLOO_SOCKET_IFNAME": "lo"})
    from transformers.utils import logging

    from learner.rank import Rank

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rank = Rank(0, _alone(config))
    if start is not None:
        note(f"loading {start} ...")
        _load_checkpoint(rank, start)
    return rank


def _load_checkpoint(rank: Rank, start: Path) -> None:
    """Nothing is written beside the checkpoint: the run may be going on."""
    from learner.universal import write_universal

    if ranks_in(start / TAG) == 1:
        rank.load(str(start))
        return
    with tempfile.TemporaryDirectory(prefix="uniapl-replay-") as name:
        place = Path(name) / start.name
        write_universal(start, place)
        rank.load(str(place))


def _end(rank: Rank) -> None:
    import torch.distributed as dist

    del rank
    gc.collect()
    dist.destroy_process_group()


def _make(rank: Rank, recorded: Recorded, update: bool) -> dict[str, float]:
    batch = recorded.batch
    known = any(s.score and s.score.expert_score is not None for group in batch.groups for s in group.samples)
    metrics, _ = rank.step(batch.step, batch.groups, batch.demonstrations, recorded.weights, update, known)
    return metrics


def _measure(rank: Rank, recorded: Recorded, found: Replay, name: str) -> None:
    from learner.nonfinite import NonFiniteError

    try:
        getattr(found, name).update(measurements(_make(rank, recorded, update=False)))
    except NonFiniteError as error:
        found.failures[name] = f"the {error.what} is not finite; {error.found_in}"
        found.blamed = found.blamed or [_details(recorded, name) for name in error.ids]


def _details(recorded: Recorded, name: str) -> dict[str, Any]:
    """What stands in the batch of a sequence: `prompt/sample`, or a prompt's or demonstration's id."""
    c = recorded.config
    prompt, _, number = name.rpartition("/")
    weights, length = recorded.weights, c.rollout.max_tokens
    for group in recorded.batch.groups:
        if group.prompt.id == prompt and number.isdigit() and int(number) < len(group.samples):
            sample, alone = group.samples[int(number)], MixedBatch(recorded.batch.step, [group], [])
            sequences = training_sequences(alone, c.objective, c.rollout.temperature, weights, length)
            shares = [s.terms for s in sequences if s.id == name]
            return {
                "id": name,
                "reward": sample.score.reward if sample.score else None,
                "expert_score": sample.score.expert_score if sample.score else None,
                "advantages": {term: share.advantage for terms in shares for term, share in terms.items()},
                "tokens": len(sample.token_ids),
                "lowest_logprob": min(sample.logprobs, default=None),
                "text": sample.text,
            }
    return {"id": name}
