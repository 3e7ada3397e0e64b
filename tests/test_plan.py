"""`uniapl plan`: its arithmetic against sums by hand, and against models that are really built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_qwen3 import PARAMETERS, write_config
from helpers_tiny import tiny_model

from uniapl.config import Config, load_config
from uniapl.config_errors import ConfigError
from uniapl.plan.engine import engine_memory
from uniapl.plan.fit import GIB, Machines, misfits
from uniapl.plan.learner import LearnerModels, activation_bytes, layer_bytes, learner_parts, loading_bytes
from uniapl.plan.pace import Rates, pace, rates_of_run, step_tokens
from uniapl.plan.plan import make_plan
from uniapl.plan.shape import ModelShape, read_shape

BILLION = ModelShape(
    parameters=1_000_000_000,
    largest=100_000_000,
    vocabulary=50_000,
    hidden=2000,
    intermediate=8000,
    layers=20,
    heads=20,
    kv_heads=4,
    head_dim=100,
    qk_norm=False,
)
"""Round numbers, for sums by hand."""


def settings(model: str = "unused", **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": model},
        "data": {"train": ["unused"], "max_prompt_tokens": 100, "max_response_tokens": 60},
        "rollout": {"max_tokens": 60, "max_model_len": 160, "group_size": 4, "groups_in_flight": 8},
        "learner": {"row_tokens": 320, "micro_batch_rows": 2},
        "evaluation": {"prompts": 0},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return Config.model_validate(tree)


def parts_of(config: Config, **beside: ModelShape) -> dict[str, float]:
    return {part.name: part.bytes for part in learner_parts(config, LearnerModels(BILLION, **beside), gpu=True)}


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model_that_is_really_built(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "whole", tied=tied)
    built = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")  # no weights, no tokenizer
    shape = read_shape("model.path", str(tmp_path / "bare"))
    assert shape.parameters == sum(p.numel() for p in built.parameters())
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.qk_norm) == (2, 4, 2, 32, True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_of_the_recipes_models(tmp_path: Path, name: str) -> None:
    assert read_shape("model.path", str(write_config(name, tmp_path))).parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "model.path: got '{folder}'; allowed: a Hugging Face folder with a config.json"),
        ('{"model_type": "no_such"}', "model.path: got '{folder}'; "),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": 1}', "model.path: got '{folder}', a mixture of experts; "),
    ],
)
def test_what_is_no_dense_language_model_is_one_line(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError) as error:
        read_shape("model.path", str(tmp_path))
    assert str(error.value).startswith(message.format(folder=tmp_path))
    assert "\n" not in str(error.value)


def saved_bytes(folder: Path, layers: int, dtype: str, checkpointing: bool) -> tuple[int, int]:
    """What autograd really keeps of a forward pass over packed rows with shared prompts; and the rows' tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from uniapl.objective.rows import make_rows
    from uniapl.objective.sequences import TermShare, TrainingSequence
    from uniapl.policy import Policy

    config = AutoConfig.from_pretrained(folder, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(getattr(torch, dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    two = [
        TrainingSequence(str(i), list(range(100)), [5] * 110, 1.0, None, {"preference": TermShare(1.0, 110, 0.5)})
        for i in (0, 1)
    ]
    rows = make_rows([[two], [two]])
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(rows)
    return sum(storage.nbytes() for storage in kept.values()), rows.input_ids.numel()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_as_many_bytes_for_the_backward_pass_as_the_plan_says(tiny: Path, dtype: str) -> None:
    (one, tokens), (two, _) = (saved_bytes(tiny, layers, dtype, False) for layers in (1, 2))
    shape = read_shape("model.path", str(tiny))
    assert two - one == tokens * layer_bytes(shape, dtype, width=320, dense_mask=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activations_of_a_micro_batch_are_those_of_its_layers_and_edges(tiny: Path, dtype: str) -> None:
    saved, tokens = saved_bytes(tiny, 2, dtype, False)
    assert tokens == 640
    said = activation_bytes(settings(learner={"dtype": dtype}), read_shape("model.path", str(tiny)), gpu=False)
    assert saved == pytest.approx(said, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_the_layers_and_one_whole_layer(tiny: Path) -> None:
    (one, tokens), (two, _) = (saved_bytes(tiny, layers, "bfloat16", True) for layers in (1, 2))
    assert two - one == tokens * 2 * 64
    config = settings(learner={"activation_checkpointing": True})
    said = activation_bytes(config, read_shape("model.path", str(tiny)), gpu=False)
    layer = layer_bytes(read_shape("model.path", str(tiny)), "bfloat16", 320, dense_mask=True)
    # Positions are arguments of the layers here, which autograd does not report.
    assert two + tokens * layer == pytest.approx(said, rel=0.03)


def test_memory_of_a_rank_by_hand() -> None:
    config = settings(learner={"ranks": 4, "dtype": "bfloat16"})
    parts = parts_of(config)
    assert parts["weights, own part"] == 2 * 250e6
    assert parts["float32 masters"] == 4 * 250e6
    assert parts["AdamW moments"] == 8 * 250e6
    assert parts["gradient sums"] == 4 * 250e6
    assert parts["weights, gathered"] == 2e9
    assert parts["reduce bucket"] == 2 * 500e6
    # A layer, per token: norms 2 (8 x 2000 + 4), queries, keys, values and result 2 (2 x 2000 + 2 x 400) + 4 x 20,
    # feed-forward 8 x 8000. Beside the layers: 8 x 2000 and positions 4 x 100. 640 tokens, 20 layers.
    assert parts["activations"] == 640 * (20 * (32_008 + 9_680 + 64_000) + 16_400)
    # A bucket of 5e8 in bfloat16 and a quarter of it in float32; the head's gradient; three chunks of logits.
    assert parts["gradients on the way"] == 2 * 500e6 + 4 * 125e6 + 4 * 100e6 + 12 * (7 << 20)


def test_gradients_that_are_measured_term_by_term_stand_side_by_side() -> None:
    terms: dict[str, Any] = {"preference": {"weight": 0.5}, "demonstration": {"weight": 0.5}}
    terms["adversarial"] = {"weight": 0.1, "discriminator": "embedding"}
    parts = parts_of(settings(learner={"ranks": 4}, objective=terms))
    assert parts["gradients of single terms"] == 2 * 4 * 250e6, "of all terms but the last"
    assert "gradients of single terms" not in parts_of(settings(objective=terms | {"diagnostics_every": 0}))
    one = terms | {"preference": {"weight": 0.0}, "adversarial": {"weight": 0.0}}
    assert parts_of(settings(objective=one)).get("gradients of single terms", 0) == 0


def test_float32_weights_are_their_own_masters() -> None:
    parts = parts_of(settings(learner={"dtype": "float32"}))
    assert "float32 masters" not in parts
    assert parts["weights, own part"] == 4e9


def test_reference_and_discriminator_take_their_part() -> None:
    config = settings(learner={"ranks": 2})
    alone, beside = parts_of(config), parts_of(config, reference=BILLION, discriminator=BILLION)
    assert beside["frozen reference"] == 2 * 500e6 + 2e9
    assert beside["cotrained discriminator"] == (2 + 4 + 8 + 4) * 500e6 + 2e9 + 2 * 500e6
    assert beside["activations"] == alone["activations"], "one after the other"


def test_while_it_loads_a_rank_holds_the_whole_model() -> None:
    config = settings(learner={"ranks": 4})
    process = parts_of(config)["the process itself"]
    assert loading_bytes(config, LearnerModels(BILLION), gpu=True) == 2 * 1.25e9 + process


def test_keys_and_values_of_a_token_by_hand(tmp_path: Path) -> None:
    shape = read_shape("model.path", str(write_config("qwen3-0.6b", tmp_path)))
    assert shape.kv_bytes("bfloat16") == 2 * 28 * 8 * 128 * 2 == 114_688
    assert shape.kv_bytes("bfloat16", 4) == 114_688 // 4
    assert shape.kv_bytes("bfloat16", 16) == 114_688 // 8, "a GPU holds no less than one head"


def test_sequences_of_an_engine_on_a_cpu_by_hand() -> None:
    config = settings(rollout={"kv_cache_gib": 1.5, "max_num_seqs": 1000})
    memory = engine_memory(config, BILLION, None)
    assert memory.kv_token_bytes == 2 * 20 * 4 * 100 * 2 == 32_000
    assert memory.kv_tokens == (3 << 29) // 32_000
    assert memory.sequences == (3 << 29) // 32_000 // 160
    assert memory.wanted == 32


def test_an_engine_on_a_gpu_fills_its_share_of_the_memory() -> None:
    memory = engine_memory(settings(rollout={"gpu_memory_utilization": 0.5}), BILLION, 40 * GIB)
    assert sum(part.bytes for part in memory.parts) == pytest.approx(20 * GIB)
    assert memory.sequences == 64, "rollout.max_num_seqs"


def test_tokens_and_seconds_of_a_synchronous_step_by_hand() -> None:
    config = settings(objective={"demonstration": {"weight": 0.5}})
    tokens = step_tokens(config, Rates())
    assert (tokens.generated, tokens.trained) == (32 * 60, 32 * 160 + 16 * 160)
    found = pace(config, tokens, Rates(generate=960, train=768), sent_bytes=2 * 10**9, bandwidth=4.0)
    assert found is not None
    assert (found.generate_s, found.train_s, found.broadcast_s, found.step_s) == (2.0, 10.0, 0.5, 12.5)
    assert (found.bottleneck, found.staleness_mean, found.staleness_max) == ("training", 0.0, 0)
    thrice = settings(objective={"demonstration": {"weight": 0.5}}, learner={"steps_per_batch": 3})
    longer = pace(thrice, tokens, Rates(generate=960, train=768), sent_bytes=2 * 10**9, bandwidth=4.0)
    assert longer is not None and longer.train_s == 3 * found.train_s


@pytest.mark.parametrize(
    ("generate", "step_s", "bottleneck", "mean", "most"),
    [(960, 10.5, "training", 3.0, 3), (96, 20.5, "generating", 1.0, 2)],
)
def test_an_asynchronous_step_takes_as_long_as_the_slower_side(
    generate: float, step_s: float, bottleneck: str, mean: float, most: int
) -> None:
    overlapped = {"queue": {"max_staleness": 3}, "objective": {"demonstration": {"weight": 0.5}}}
    config = settings(**overlapped, rollout={"actors": 2})
    rates = Rates(generate=generate, train=768)
    found = pace(config, step_tokens(config, rates), rates, sent_bytes=2 * 10**9, bandwidth=4.0)
    assert found is not None
    assert (found.step_s, found.bottleneck) == (step_s, bottleneck)
    # Two engines of 8 groups hold two batches of 8: a token is up to two versions old where they are the slower side.
    assert (found.staleness_mean, found.staleness_max) == (mean, most)


def test_without_a_rate_there_is_no_time() -> None:
    config = settings()
    assert pace(config, step_tokens(config, Rates()), Rates(train=1.0), 0, 1.0) is None


def test_without_rollouts_nothing_is_generated_or_sent(tiny: Path) -> None:
    config = settings(str(tiny), objective={"preference": {"weight": 0.0}, "demonstration": {"weight": 1.0}})
    plan = make_plan(config, Machines(gpus=1), Rates(train=100.0))
    assert (plan.engine, plan.broadcast_bytes, plan.tokens.generated, plan.gpus) == (None, 0, 0, 1)
    assert plan.pace is not None
    assert plan.pace.step_s == 16 * 160 / 100
    assert plan.misfits == []


def test_rates_of_a_run_are_medians_of_all_steps_but_the_first(tmp_path: Path) -> None:
    tree = settings(queue={"max_staleness": 1}).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="--run"):
        rates_of_run(tmp_path)
    steps = [(1.0, 9.0), (100.0, 64.0), (300.0, 128.0), (200.0, 192.0)]
    lines = [
        {
            "step": step,
            "tokens/generated_per_s": rate,
            "tokens/trained_per_s": 2 * rate,
            "tokens/generated": count,
            "tokens/trained": 3 * count,
            "broadcast/bytes": 5e8,
            "time/broadcast": 0.25,
        }
        for step, (rate, count) in enumerate(steps, start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rates = rates_of_run(tmp_path)
    assert (rates.generate, rates.train, rates.bandwidth) == (200.0, 400.0, 2.0)
    assert (rates.sample_tokens, rates.sequence_tokens) == (128 / 32, 384 / 32)
    assert "asynchronous" in rates.notes[0]
    other = settings(queue={"groups_per_step": 16})  # another configuration, at the run's mean lengths
    assert step_tokens(other, rates).generated == 64 * 4


def fits(config: Config, shape: ModelShape, machines: Machines) -> list[str]:
    engine = engine_memory(config, shape, machines.gpu_gib * GIB)
    return [str(misfit) for misfit in misfits(config, LearnerModels(shape), engine, machines)]


@pytest.mark.parametrize(
    ("rollout", "learner", "machines", "what", "change"),
    [
        ({"actors": 7}, {"ranks": 2}, Machines(gpus=8), "2 learner ranks and 7 engines of 1 = 9 GPUs on 8", "6"),
        ({"tensor_parallel": 4}, {"ranks": 6}, Machines(gpus=8), "6 learner ranks and 1 engines of 4", "learner.ranks"),
        ({"tensor_parallel": 4}, {"ranks": 6}, Machines(node_gpus=2), "4 GPUs on a node of 2", "tensor_parallel to 2"),
        ({"tensor_parallel": 8}, {}, Machines(), "20 attention heads on 8 GPUs", "tensor_parallel to 1, 2, 4"),
    ],
)
def test_what_does_not_fit_names_the_key(
    rollout: dict[str, Any], learner: dict[str, Any], machines: Machines, what: str, change: str
) -> None:
    [said] = fits(settings(rollout=rollout, learner=learner), BILLION, machines)
    assert said.startswith("what does not fit: ")
    assert what in said.partition("; change ")[0]
    assert change in said.partition("; change ")[2]


@pytest.mark.parametrize(
    ("gpu_gib", "learner", "changed"),
    [
        (36, {"row_tokens": 4096}, {"micro_batch_rows": 1}),
        (30, {"row_tokens": 4096}, {"micro_batch_rows": 1, "activation_checkpointing": True}),
        (15, {"row_tokens": 320}, {"micro_batch_rows": 1, "activation_checkpointing": True, "ranks": 4}),
    ],
)
def test_the_change_that_is_named_makes_a_learner_rank_fit(
    gpu_gib: float, learner: dict[str, Any], changed: dict[str, Any]
) -> None:
    machines = Machines(gpu_gib=gpu_gib)
    [said] = fits(settings(learner=learner), BILLION, machines)
    words = " and ".join(f"learner.{key} to {str(value).lower()}" for key, value in changed.items())
    assert said.endswith(f"; change {words}")
    assert fits(settings(learner=learner | changed), BILLION, machines) == []


def test_the_tensor_parallel_size_that_is_named_makes_an_engine_fit(tmp_path: Path) -> None:
    shape = read_shape("model.path", str(write_config("qwen3-32b", tmp_path)))
    learner = {"ranks": 64, "activation_checkpointing": True}
    [said] = fits(settings(rollout={"gpu_memory_utilization": 0.5}, learner=learner), shape, Machines())
    assert "leave a KV cache of 0 tokens" in said
    assert said.endswith("change rollout.tensor_parallel to 2")
    larger = settings(rollout={"gpu_memory_utilization": 0.5, "tensor_parallel": 2}, learner=learner)
    assert fits(larger, shape, Machines()) == []


def test_a_model_that_no_rank_can_load_whole_is_named(tmp_path: Path) -> None:
    shape = read_shape("model.path", str(write_config("qwen3-32b", tmp_path)))
    config = settings(learner={"ranks": 512, "activation_checkpointing": True}, rollout={"tensor_parallel": 8})
    [said] = fits(config, shape, Machines(gpu_gib=40))
    assert "while it loads" in said


def test_the_ranks_of_a_node_load_into_its_memory(tmp_path: Path) -> None:
    """Eight times four bytes for each of 32.8 billion parameters: 976 GiB."""
    shape = read_shape("model.path", str(write_config("qwen3-32b", tmp_path)))
    config = settings(learner={"ranks": 32, "activation_checkpointing": True}, rollout={"tensor_parallel": 4})
    assert fits(config, shape, Machines(node_gib=977)) == []
    [said] = fits(config, shape, Machines(node_gib=976))
    assert said.startswith("what does not fit: 8 ranks that load a model of 122.0 GiB each into a node of 976 GiB")
    assert fits(config, shape, Machines(node_gpus=4, node_gib=489)) == []


def test_many_ranks_on_a_cpu_hold_the_whole_model_while_they_load() -> None:
    """0.5 GiB of a process and 4 bytes for each of 10⁹ parameters, where a rank of 64 takes less later."""
    config = settings(learner={"ranks": 64, "activation_checkpointing": True, "micro_batch_rows": 1})
    [said] = misfits(config, LearnerModels(BILLION), None, Machines(gpus=0, cpu_gib=64))
    assert said.what.startswith("64 learner ranks of 4.2 GiB ")


def test_on_a_cpu_the_longest_sequence_has_to_fit_into_the_cache() -> None:
    config = settings(rollout={"max_model_len": 200_000, "kv_cache_gib": 2.0})
    engine = engine_memory(config, BILLION, None)
    [said] = misfits(config, LearnerModels(BILLION), engine, Machines(gpus=0, cpu_gib=64))
    assert said.what.startswith("a sequence of 200,000 tokens (rollout.max_model_len) into a KV cache of ")
    larger = settings(rollout={"max_model_len": 200_000, "kv_cache_gib": float(said.change.split()[-1])})
    assert engine_memory(larger, BILLION, None).kv_tokens >= 200_000


def test_processes_on_cpus_share_the_machine() -> None:
    config = settings()
    engine = engine_memory(config, BILLION, None)
    models = LearnerModels(BILLION)
    assert misfits(config, models, engine, Machines(gpus=0, cpu_gib=64)) == []
    [said] = misfits(config, models, engine, Machines(gpus=0, cpu_gib=16))
    assert "into 16.0 GiB" in said.what


@pytest.mark.parametrize(
    ("name", "gpus"), [("qwen3-0.6b", 8), ("qwen3-0.6b-1gpu", 1), ("qwen3-4b", 16), ("qwen3-32b", 48)]
)
def test_the_recipes_fit_on_the_machines_that_they_name(tmp_path: Path, name: str, gpus: int) -> None:
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    assert f"--gpus {gpus}\n" in path.read_text(encoding="utf-8")
    config = load_config(path, [f"model.path={write_config(name.removesuffix('-1gpu'), tmp_path)}"])
    plan = make_plan(config, Machines(gpus=gpus), Rates())
    assert (plan.misfits, plan.gpus) == ([], gpus)
    assert plan.engine is not None
    assert plan.engine.sequences >= plan.engine.wanted


def test_a_rank_that_would_fit_without_diagnostics_is_told_to_go_without(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "configs/qwen3-4b.yaml"
    config = load_config(path, [f"model.path={write_config('qwen3-4b', tmp_path)}"])
    [said] = make_plan(config, Machines(gpus=16, gpu_gib=24), Rates()).misfits
    assert said.change == "objective.diagnostics_every to 0"
    less = config.model_copy(update={"objective": config.objective.model_copy(update={"diagnostics_every": 0})})
    assert make_plan(less, Machines(gpus=16, gpu_gib=24), Rates()).misfits == []
