"""The configuration: one typed tree, read from YAML, overridden by `key=value`.

Every wrong key or value is one line that names the key, the value and what is allowed, raised as
`ConfigError` before any process starts. Methods (sft, grpo, uniapl, ...) are overlays: small YAML
files that set values of this same tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, ValidationError, model_validator

from uniapl.config_errors import ConfigError, masked, read_yaml, set_dotted, validation_lines
from uniapl.config_types import (
    REDIS_PASSWORD,
    Address,
    Dtype,
    Name,
    NonNegative,
    Positive,
    Probability,
    RedisUrl,
    Seconds,
    Section,
    Text,
)
from uniapl.learner_config import LearnerConfig
from uniapl.logging_config import LoggingConfig, logging_conflicts
from uniapl.objective_config import ObjectiveConfig, objective_conflicts
from uniapl.scratch import scratch_folder, short_digest
from uniapl.storage import is_remote, join, url_conflicts

LONGEST_S = 1e9
"""Seconds; Python's locks take no more than 9.2e9."""


class RunConfig(Section):
    """What one run is called, how long it goes on and where it is written."""

    name: Name = Field("run", description="the run's folder; by default the configuration file's name")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="data order, samples and dropout follow from it")
    steps: Positive = Field(30, description="optimizer steps of the whole run")
    folder: Text = Field(
        "runs", description="where the folders of runs are: a shared path, or a URL such as s3://B/runs"
    )
    scratch: Text | None = Field(
        None, description="folder on each machine for copies from and to object stores; null: a temporary one"
    )
    checkpoint_every: NonNegative = Field(10, description="optimizer steps; 0: only at the end")
    keep_last: Positive = Field(2, description="newest checkpoints that stay")
    keep_every: NonNegative = Field(0, description="steps; checkpoints at multiples stay for ever; 0: none")
    max_restarts: NonNegative = Field(
        3, description="times the whole system starts again after the queue or a learner rank died"
    )
    grace_seconds: Seconds = Field(60.0, description="seconds from SIGTERM to the end, with a checkpoint")


class ModelConfig(Section):
    """The policy: a Hugging Face folder with a chat template."""

    path: Text = Field(description="with config.json, *.safetensors, tokenizer and chat template")


class DataConfig(Section):
    """Arrow IPC or Parquet shards, named by paths, URLs of an object store, or globs of either."""

    train: Annotated[list[Text], Field(min_length=1)] = Field(description="shards of prompts and demonstrations")
    heldout: list[Text] = Field([], description="shards to evaluate on; never trained on")
    on_bad_row: Literal["error", "skip"] = Field("error", description="end the run, or pass the row over and count it")
    max_prompt_tokens: Positive = Field(512, description="tokens; a row with a longer prompt is a bad row")
    max_response_tokens: Positive = Field(512, description="tokens; longer expert responses are bad demonstrations")


class RolloutConfig(Section):
    """Rollout actors, each with one vLLM engine, and how they sample."""

    actors: Positive = Field(1, description="that are wanted, with one engine each")
    min_actors: Positive | None = Field(None, description="fewest to begin and to go on with; null: rollout.actors")
    max_actors: Positive | None = Field(None, description="most, where the cluster has room; null: rollout.actors")
    max_restarts: NonNegative = Field(3, description="times each place's actor is started again within the run")
    group_size: Positive = Field(4, description="samples of one prompt")
    max_tokens: Positive = Field(64, description="tokens of one response, at most")
    temperature: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="of sampling and of its log-probabilities"
    )
    top_p: Probability = Field(1.0, description="nucleus sampling; 1: off. The learner does not truncate: keep 1")
    top_k: NonNegative = Field(0, description="likeliest tokens to draw from; 0: all. Keep 0, for the same reason")
    dtype: Dtype = Field("bfloat16", description="of the engine's weights and arithmetic, and of what is broadcast")
    max_model_len: Positive = Field(1024, description="tokens of prompt and response that an engine takes")
    max_num_seqs: Positive = Field(64, description="sequences that one engine decodes at a time")
    groups_in_flight: Positive = Field(8, description="groups that one actor generates at a time")
    update_mode: Literal["keep", "wait", "abort"] = Field(
        "keep", description="new weights: go on with running responses, finish them first, or make them anew"
    )
    kv_cache_gib: Annotated[float, Field(gt=0)] = Field(
        1.0, description="GiB of KV cache; CPU engines alone; rounded up"
    )
    gpu_memory_utilization: Probability = Field(0.9, description="fraction of a GPU's memory; GPU engines alone")
    tensor_parallel: Positive = Field(1, description="GPUs of one engine")
    threads: NonNegative = Field(0, description="CPU threads of one engine; 0: all cores")
    enforce_eager: bool = Field(True, description="no CUDA graphs; on a CPU engines are always eager")

    @property
    def least(self) -> int:
        return self.actors if self.min_actors is None else self.min_actors

    @property
    def most(self) -> int:
        return self.actors if self.max_actors is None else self.max_actors


class RewardFunction(Section):
    """One reward: a built-in name or the user's `module:function`."""

    name: Text = Field(description="ifeval, ifbench, exact_match, math or module:function")
    weight: float = Field(1.0, description="factor of its value in the sum; may be negative")
    version: Text = Field("1", description="part of the cache key: change it when the code changes")


class RewardConfig(Section):
    """The reward service: a Ray Serve application."""

    functions: Annotated[list[RewardFunction], Field(min_length=1)] = Field(
        [RewardFunction(name="ifeval")],
        description="whose weighted values are added up; each is applied to every prompt",
    )
    redis_url: RedisUrl | None = Field(
        None, description=f"cache of scores; null: in memory. Password: {REDIS_PASSWORD}"
    )
    cache_entries: NonNegative = Field(100_000, description="scores that each replica keeps in memory; 0: none")
    min_replicas: Positive = Field(1, description="of the reward service, always there")
    max_replicas: Positive = Field(1, description="of the reward service, under load")
    batch_size: Positive = Field(8, description="groups scored in one call, at most")
    batch_wait_s: Annotated[float, Field(ge=0)] = Field(0.01, description="seconds a call waits for more groups")
    timeout_s: Seconds = Field(60.0, description="seconds of one call of a reward function; then unscored")


class QueueConfig(Section):
    """How batches are made of groups and demonstrations."""

    groups_per_step: NonNegative = Field(8, description="prompts of a batch, with rollout.group_size samples each")
    demonstrations_per_step: NonNegative = Field(16, description="expert responses of a batch")
    max_staleness: NonNegative = Field(
        0, description="versions (optimizer steps) of age at most; 0: strictly synchronous"
    )
    on_stale: Literal["drop", "correct"] = Field(
        "drop", description="older groups: sample the prompt again, or use them and rely on objective.surrogate"
    )
    lease_s: Seconds = Field(600.0, description="seconds to sample, score and commit; then leased again")
    group_timeout_s: Seconds | None = Field(None, description="seconds to sample a group; null: as its lease")
    on_straggler: Literal["accept", "reissue"] = Field(
        "reissue", description="samples missing by then: use the group without them, or sample the prompt again"
    )
    min_group: Annotated[int, Field(ge=2)] = Field(2, description="samples that a group is accepted with")
    max_reissues: NonNegative = Field(2, description="times a prompt is sampled again for stragglers; then dropped")
    max_regenerations: NonNegative = Field(2, description="times a prompt is sampled again that could not be scored")
    on_equal_rewards: Literal["keep", "resample"] = Field(
        "keep", description="groups without a preference: use them, or sample the prompt again"
    )
    max_resamples: NonNegative = Field(2, description="times a prompt is resampled for equal rewards; then kept")


class EvaluationConfig(Section):
    """Held-out prompts, sampled and verified before and after training, and beside it."""

    prompts: NonNegative = Field(64, description="held-out prompts, always the same; 0: no evaluation")
    every: NonNegative = Field(0, description="optimizer steps, by the engines beside training; 0: before and after")
    samples: Positive = Field(1, description="responses of each prompt")
    temperature: Annotated[float, Field(ge=0, le=10)] = Field(0.0, description="of sampling; 0: greedy")


class ClusterConfig(Section):
    """Where Ray is, and how long anything may take."""

    address: Address = Field(
        "local", description="local: start Ray here, or within a Ray job join its cluster; auto or HOST:PORT: join one"
    )
    object_store_gib: Annotated[float, Field(gt=0)] = Field(1.0, description="GiB of Ray's, where it is started here")
    start_timeout_s: Seconds = Field(600.0, description="seconds until all that is needed is up, or nodes have joined")
    step_timeout_s: Seconds = Field(1800.0, description="seconds for a batch, and for each call of the learner")
    broadcast_timeout_s: Seconds = Field(120.0, description="seconds of each phase of a broadcast; then cut off")


class Config(Section):
    """The whole tree."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    queue: QueueConfig = QueueConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if found := _conflicts(self):
            raise ValueError("\n".join(found))
        return self

    @property
    def needs_engine(self) -> bool:
        """Whether any rollout engine is started: for training, or for evaluation by sampling."""
        return self.objective.uses_rollouts or self.evaluation.prompts > 0

    @property
    def run_dir(self) -> Path:
        """The run's folder on this machine: with an object store a working copy in the scratch folder."""
        if self.run_url is None:
            return Path(self.run.folder) / self.run.name
        return scratch_folder(self.run.scratch) / "runs" / short_digest(self.run_url) / self.run.name

    @property
    def run_url(self) -> str | None:
        """The run's folder in an object store; None where `run.folder` is a path."""
        return join(self.run.folder, self.run.name) if is_remote(self.run.folder) else None


def _conflicts(c: Config) -> list[str]:
    """Pairs of keys whose values cannot go together, each as one line."""
    o, q = c.objective, c.queue
    found = objective_conflicts(o)
    if o.shapes_rewards and q.on_equal_rewards == "resample":
        found.append(
            "queue.on_equal_rewards: got 'resample'; allowed: 'keep' when objective.adversarial.as_reward is true: "
            "the expert score tells samples of equal reward apart"
        )
    if o.uses_rollouts and q.groups_per_step == 0:
        found.append("queue.groups_per_step: got 0; allowed: > 0 when any weight but the demonstrations' is > 0")
    if o.uses_demonstrations and q.demonstrations_per_step == 0:
        found.append("queue.demonstrations_per_step: got 0; allowed: > 0 when objective.demonstration.weight is > 0")
    if o.uses_rollouts and c.rollout.group_size == 1:
        found.append("rollout.group_size: got 1; allowed: >= 2, one sample has no advantage within its group")
    found += _straggler_conflicts(c)
    if c.rollout.least > c.rollout.actors:
        found.append(f"rollout.min_actors: got {c.rollout.least}; allowed: <= rollout.actors = {c.rollout.actors}")
    if c.rollout.most < c.rollout.actors:
        found.append(f"rollout.max_actors: got {c.rollout.most}; allowed: >= rollout.actors = {c.rollout.actors}")
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    if longest > c.rollout.max_model_len:
        found.append(
            f"rollout.max_model_len: got {c.rollout.max_model_len}; "
            f"allowed: >= data.max_prompt_tokens + rollout.max_tokens = {longest}"
        )
    longest = c.data.max_prompt_tokens + max(c.rollout.max_tokens, c.data.max_response_tokens)
    if longest > c.learner.row_tokens:
        found.append(
            f"learner.row_tokens: got {c.learner.row_tokens}; "
            f"allowed: >= the longest prompt and response together = {longest}"
        )
    if c.reward.max_replicas < c.reward.min_replicas:
        least = f"reward.min_replicas = {c.reward.min_replicas}"
        found.append(f"reward.max_replicas: got {c.reward.max_replicas}; allowed: >= {least}")
    found += _redis_conflicts(c.reward.redis_url) + logging_conflicts(c.logging)
    names = [function.name for function in c.reward.functions]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"reward.functions: got '{name}' {names.count(name)} times; allowed: each name once")
    if c.learner.warmup_steps > c.run.steps:
        found.append(f"learner.warmup_steps: got {c.learner.warmup_steps}; allowed: <= run.steps = {c.run.steps}")
    places = {"run.folder": [c.run.folder], "data.train": c.data.train, "data.heldout": c.data.heldout}
    return found + _evaluation_conflicts(c) + _endless(c) + url_conflicts(places)


def _evaluation_conflicts(c: Config) -> list[str]:
    found = []
    if c.evaluation.prompts > 0 and not c.data.heldout:
        found.append("data.heldout: got []; allowed: at least one shard when evaluation.prompts is > 0")
    if c.evaluation.every > 0 and c.evaluation.prompts == 0:
        found.append(f"evaluation.every: got {c.evaluation.every}; allowed: 0 when evaluation.prompts is 0")
    return found


def _redis_conflicts(url: str | None) -> list[str]:
    """Secrets in the address: what the configuration holds stands in the run's folder, for all to read."""
    key = f"reward.redis_url: got '{masked(url or '')}'"
    try:
        parts = urlsplit(url or "")
        secret = parts.password is not None or any("password" in name for name in parse_qs(parts.query))
    except ValueError as error:
        return [f"{key}; {error}"]
    return [f"{key}; allowed: no password, it is read from the environment: {REDIS_PASSWORD}"] if secret else []


def _endless(c: Config) -> list[str]:
    """Times that no clock of the system takes as a limit."""
    times = {
        f"{section}.{key}": value
        for section in type(c).model_fields
        for key, value in getattr(c, section)
        if key.endswith("_s") and isinstance(value, float)
    }
    return [
        f"{key}: got {value:g}; allowed: <= {LONGEST_S:g}, in seconds"
        for key, value in times.items()
        if value > LONGEST_S
    ]


def _straggler_conflicts(c: Config) -> list[str]:
    q, size = c.queue, c.rollout.group_size
    if q.group_timeout_s is None:
        return []
    found = []
    if q.group_timeout_s >= q.lease_s:
        found.append(f"queue.group_timeout_s: got {q.group_timeout_s:g}; allowed: < queue.lease_s = {q.lease_s:g}")
    if q.on_straggler == "accept" and q.min_group > size:
        found.append(f"queue.min_group: got {q.min_group}; allowed: <= rollout.group_size = {size}")
    return found


def load_config(path: str | Path, overrides: list[str] = [], method: str | None = None) -> Config:  # noqa: B006
    """Read `path`, lay the method's file over it, then `overrides` (`key.sub=value`, YAML values).

    Args:
        path: the YAML file.
        overrides: such as `learner.ranks=2`; a later one wins.
        method: a name found as `methods/NAME.yaml` beside `path`, or the path of a YAML file.

    Raises:
        ConfigError: one line per wrong key or value.
    """
    path = Path(path)
    layers = [(str(path), read_yaml(path))]
    if method is not None:
        overlay = method_path(path, method)
        layers.append((str(overlay), read_yaml(overlay)))
    tree: dict[str, Any] = {"run": {"name": path.stem}}
    for _, layer in layers:
        tree = _overlay(tree, layer)
    for override in overrides:
        set_dotted(tree, override)
        layers.append(("override", {}))
        set_dotted(layers[-1][1], override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = validation_lines(error, Config, lambda key: _layer_of(key, layers))
        raise ConfigError("\n".join(lines)) from None


def _layer_of(key: list[Any], layers: list[tuple[str, dict[str, Any]]]) -> str:
    """The name of the last layer that sets `key` or, where none does, of the first."""
    for name, layer in reversed(layers):
        node: Any = layer
        for part in key:
            if not isinstance(node, dict):
                return name  # the layer replaces something above the key
            if part not in node:
                break
            node = node[part]
        else:
            return name
    return layers[0][0]


def method_path(config: Path, method: str) -> Path:
    """Where the overlay of a method stands.

    Raises:
        ConfigError: there is none, with the names that there are.
    """
    if method.endswith((".yaml", ".yml")):
        return Path(method)
    folder = config.parent / "methods"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if method not in known:
        names = ", ".join(known) or "none"
        raise ConfigError(f"--method: got '{method}'; allowed: a .yaml file, or one in {folder}: {names}")
    return folder / f"{method}.yaml"


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; dictionaries are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged
