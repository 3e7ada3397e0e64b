"""The configuration: where its values come from, and that it stays small."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from uniapl.config import Config, load_config
from uniapl.config_errors import MAX_YAML_BYTES, parse_yaml
from uniapl.objective_config import Coefficient

SMALLEST = "model: {path: m}\ndata: {train: [t.arrow], heldout: [h.arrow]}\n"


def load(tmp_path, text="", overrides=(), methods=()):
    """The configuration of `SMALLEST` and `text`, in a file called tiny.yaml."""
    path = tmp_path / "tiny.yaml"
    path.write_text(SMALLEST + text)
    return load_config(path, overrides, methods)


def leaves(model, prefix=""):
    """The dotted keys of every field that is no section; a weight, which may be a number, is none."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Coefficient:
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_what_a_file_does_not_say_has_a_default_and_the_run_is_named_after_the_file(tmp_path):
    config = load(tmp_path)
    assert config.run.name == "tiny"
    assert config.run_dir == Path("runs/tiny")
    assert (config.queue.groups_per_step, config.queue.max_staleness) == (8, 0)
    assert config.learner.betas == [0.9, 0.95]
    assert config.reward.functions[0].name == "ifeval"


def test_the_file_sets_values_at_every_depth(tmp_path):
    config = load(tmp_path, "run: {name: other}\nobjective:\n  preference:\n    clip_low: 0.1\n")
    assert config.run.name == "other"
    assert config.objective.preference.clip_low == 0.1
    assert config.objective.preference.clip_high == 0.2


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path):
    config = load(tmp_path, "run: {steps: 5}\n", ["run.steps=6", "run.steps=7", "run.seed = 3"])
    assert (config.run.steps, config.run.seed) == (7, 3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learner.learning_rate=1e-5", 1e-5),
        ("learner.learning_rate=1", 1.0),
        ("learner.learning_rate=.5", 0.5),
        ("learner.betas=[0, 0.5]", [0.0, 0.5]),
        ("learner.warmup_steps=010", 10),
        ("learner.warmup_steps=0x10", 16),
        ("learner.activation_checkpointing=true", True),
        ("learner.dtype=float32", "float32"),
    ],
)
def test_override_values_are_read_as_yaml(tmp_path, override, value):
    config = load(tmp_path, "", [override])
    found = getattr(config.learner, override.partition("=")[0].removeprefix("learner."))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["no", "on", "2020-01-01", "1:30", "0b1", "NaN-model"])
def test_words_that_older_yaml_reads_as_something_else_are_text(text):
    assert parse_yaml(f"key: {text}", "here") == {"key": text}


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "head.cluster:6379", "[::1]:6379"])
def test_addresses_of_a_cluster(tmp_path, address):
    assert load(tmp_path, "", [f'cluster.address="{address}"']).cluster.address == address


@pytest.mark.parametrize(
    "url", ["redis://h:1/0", "rediss://u@h:1/0?ssl_ca_certs=/ca.pem", "unix:///tmp/redis.sock", "null"]
)
def test_urls_of_a_score_cache(tmp_path, url):
    found = load(tmp_path, "", [f"reward.redis_url={url}"]).reward.redis_url
    assert found == (None if url == "null" else url)


def test_a_method_is_laid_over_the_file_and_under_the_overrides(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/sft.yaml").write_text(
        "objective: {preference: {weight: 0}, demonstration: {weight: 1}}\nqueue: {groups_per_step: 0}\n"
    )
    text = "objective: {preference: {clip_low: 0.1}}\nqueue: {groups_per_step: 4, demonstrations_per_step: 3}\n"
    config = load(tmp_path, text, ["objective.demonstration.weight=0.5"], methods=["sft"])
    assert not config.objective.uses_rollouts
    assert config.objective.demonstration.weight == Coefficient(value=0.5)
    assert config.objective.preference.clip_low == 0.1
    assert (config.queue.groups_per_step, config.queue.demonstrations_per_step) == (0, 3)
    alone = load(tmp_path, text, methods=[str(tmp_path / "methods/sft.yaml")])
    assert alone.objective.weight_at("demonstration", 0) == 1


def test_a_later_method_wins_and_what_it_leaves_stays(tmp_path):
    files = []
    for name, text in [("a", "rollout: {actors: 1}\nlearner: {ranks: 3}\n"), ("b", "learner: {ranks: 2}\n")]:
        files.append(str(tmp_path / f"{name}.yaml"))
        (tmp_path / f"{name}.yaml").write_text(text)
    config = load(tmp_path, "rollout: {actors: 8}\n", methods=files)
    assert (config.rollout.actors, config.learner.ranks) == (1, 2)
    assert load(tmp_path, methods=files[::-1]).learner.ranks == 3


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], True),
        (["evaluation.prompts=0"], True),
        (["objective.preference.weight=0", "objective.demonstration.weight=1"], True),
        (["objective.preference.weight=0", "objective.demonstration.weight=1", "evaluation.prompts=0"], False),
    ],
)
def test_an_engine_is_needed_for_rollouts_and_for_evaluation(tmp_path, overrides, needed):
    assert load(tmp_path, "", overrides).needs_engine is needed


def test_a_configuration_written_out_reads_back_the_same(tmp_path):
    overrides = [
        "learner.betas=[0.8, 0.9]",
        "reward.functions=[{name: a}, {name: 'm:f'}]",
        "objective.kl.weight={kind: switch, steps: 5}",
    ]
    config = load(tmp_path, "", overrides)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_values_cannot_change_after_loading(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        load(tmp_path).run.steps = 3


def test_a_file_with_a_byte_order_mark_and_comments_up_to_the_limit_is_read(tmp_path):
    path = tmp_path / "full.yaml"
    text = ("\ufeff" + SMALLEST).encode()
    path.write_bytes(text + b"#" * (MAX_YAML_BYTES - len(text)))
    assert load_config(path).model.path == "m"


def test_the_whole_tree_has_fewer_than_120_fields():
    keys = list(leaves(Config))
    assert "objective.adversarial.clip_low" in keys
    assert len(keys) + len(Coefficient.model_fields) < 120


def test_every_default_is_valid_and_every_section_but_model_and_data_has_one():
    required = [name for name, field in Config.model_fields.items() if field.is_required()]
    assert required == ["model", "data"]
