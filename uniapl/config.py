"""The configuration: one typed tree, read from YAML, overridden by `key=value`.

Every wrong key or value is one line that names the key, the value and what is allowed, raised as
`ConfigError` before any process starts. Methods (sft, grpo, uniapl, ...) are overlays: small YAML
files that set values of this same tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from uniapl.config_conflicts import conflicts
from uniapl.config_errors import ConfigError, read_yaml, set_dotted, validation_lines
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
from uniapl.logging_config import LoggingConfig
from uniapl.objective_config import ObjectiveConfig
from uniapl.queue_config import QueueConfig
from uniapl.scratch import scratch_folder, short_digest
from uniapl.storage import is_remote, join


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
    max_restarts: NonNegative = Field(3, description="times each place's actor is started again in a row")
    group_size: Positive = Field(4, description="samples of one prompt")
    max_tokens: Positive = Field(64, description="tokens of one response, at most")
    temperature: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="of sampling and of its log-probabilities"
    )
    top_p: Probability = Field(1.0, description="nucleus sampling; 1: off. The learner does not truncate: keep 1")
    dtype: Dtype = Field("bfloat16", description="of the engine's weights and arithmetic, and of what is broadcast")
    max_model_len: Positive = Field(1024, description="tokens of prompt and response that an engine takes")
    max_num_seqs: Positive = Field(64, description="sequences that one engine decodes at a time")
    groups_in_flight: Positive = Field(8, description="groups that one actor generates at a time")
    update_mode: Literal["keep", "wait", "abort"] = Field(
        "keep", description="new weights: go on with running responses, finish them first, or make them anew"
    )
    kv_cache_gib: Annotated[float, Field(gt=0)] = Field(1.0, description="GiB of KV cache; CPU engines alone")
    gpu_memory_utilization: Probability = Field(0.9, description="fraction of a GPU's memory; GPU engines alone")
    tensor_parallel: Positive = Field(1, description="GPUs of one engine")
    colocate: bool = Field(
        False, description="engine and learner on one GPU, in turns: the engine sleeps while the learner trains"
    )
    threads: NonNegative = Field(0, description="CPU threads of one engine; 0: all cores")
    enforce_eager: bool = Field(True, description="no CUDA graphs; on a CPU engines are always eager")

    @property
    def least(self) -> int:
        return self.actors if self.min_actors is None else self.min_actors

    @property
    def most(self) -> int:
        return self.actors if self.max_actors is None else self.max_actors


class RewardFunction(Section):
    """One reward: a built-in name, the user's `module:function`, or the address of the user's server."""

    name: Text = Field(description="ifeval, ifbench, exact_match, math, module:function, or http(s)://HOST:PORT/PATH")
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
        if found := conflicts(self):
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


def load_config(path: str | Path, overrides: Sequence[str] = (), methods: Sequence[str] = ()) -> Config:
    """Read `path`, lay the files of `methods` over it, then `overrides` (`key.sub=value`, YAML values).

    Args:
        path: the YAML file.
        overrides: such as `learner.ranks=2`; a later one wins.
        methods: each a name found as `methods/NAME.yaml` beside `path`, or the path of a YAML file; a later one wins.

    Raises:
        ConfigError: one line per wrong key or value.
    """
    path = Path(path)
    layers = [(str(path), read_yaml(path))]
    for method in methods:
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
