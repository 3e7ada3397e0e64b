"""The ZeRO-3 learner against plain PyTorch: same gradients for any ranks, micro-batches and packing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import helpers_zero
import pytest
import torch
from helpers_tiny import tiny_model
from helpers_zero import WEIGHTED, run_ranks
from oracle_objective import Known, oracle_terms
from transformers import AutoModelForCausalLM

from uniapl.config import Config
from uniapl.objective.controllers import Controllers
from uniapl.records import MixedBatch

TERMS = ("demonstration", "preference", "adversarial", "kl")
SAME = 1e-5
CLIPPED = {"max_grad_norm": 1e-6, "warmup_steps": 4, "learning_rate": 0.4, "weight_decay": 0.1}
"""So small a gradient stands below AdamW's epsilon (1e-8) in every element: only there does its size reach the first
step, which else goes by its signs alone."""
LONG, SHORT = 4096, 32
"""Rows: all sequences in one, and about one sequence in each."""
STEPS_PER_BATCH = 3


def objectives(reference: str) -> dict[str, dict[str, Any]]:
    """Objectives that between them use every way to weigh tokens and to average."""
    kl = {"weight": 0.4, "reference": reference}
    preference, adversarial = WEIGHTED["preference"], WEIGHTED["adversarial"]
    return {
        "token": WEIGHTED,
        "sequence": WEIGHTED
        | {
            "preference": preference | {"average": "sequence"},
            "adversarial": adversarial | {"average": "constant"},
            "kl": kl,
            "surrogate": {"ratio": "sequence", "correction": "sequence"},
        },
        "constant": WEIGHTED
        | {
            "preference": preference | {"average": "constant", "advantage_std": False},
            "adversarial": adversarial | {"average": "sequence"},
            "demonstration": {"weight": 0.3, "token_weight": "p_one_minus_p"},
            "kl": kl,
            "surrogate": {"correction": "mask"},
        },
        "shaped": WEIGHTED
        | {"adversarial": adversarial | {"as_reward": True}, "kl": kl, "surrogate": {"proximal": "behaviour"}},
        "uncorrected": WEIGHTED | {"surrogate": {"correction": "off"}},
    }


def cases(reference: str, row_tokens: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        name: {"objective": objective, "row_tokens": row_tokens} for name, objective in objectives(reference).items()
    }
    learner = {"share_prompts": False, "activation_checkpointing": True, "micro_batch_rows": 2}
    found["uncorrected"]["learner"] = {"micro_batch_rows": 3}
    found["constant, checkpointing, unshared"] = found["constant"] | {"learner": learner}
    found["constant"] |= {"learner": {"steps_per_batch": STEPS_PER_BATCH}}
    found["sequence, checkpointing, shared"] = found["sequence"] | {"learner": {"activation_checkpointing": True}}
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another random model."""
    return str(tiny_model(tmp_path_factory.mktemp("reference"), seed=5))


@pytest.fixture(scope="module")
def runs(tiny: Path, reference: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("zero")
    return {
        name: run_ranks(
            "rank_gradients",
            base / str(ranks),
            ranks,
            {"model": str(tiny), "cases": cases(reference, rows), "checkpoint": rows, "clipped": CLIPPED},
        )
        for name, ranks, rows in (("1 rank, long rows", 1, LONG), ("2 ranks, short rows", 2, SHORT))
    }


@pytest.fixture(scope="module")
def found(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: torch.load(folder / "found.pt", weights_only=True) for name, folder in runs.items()}


def plain_logprobs(model: torch.nn.Module, whole: MixedBatch, temperature: float) -> dict[str, torch.Tensor]:
    """Of every response alone: no packing, no padding, full logits, float64 softmax."""

    def of(prompt: list[int], response: list[int], t: float) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / t
        return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]

    values = {d.id: of(d.prompt_ids, d.response_ids, 1.0) for d in whole.demonstrations}
    for group in whole.groups:
        for i, sample in enumerate(group.samples):
            values[f"{group.prompt.id}/{i}"] = of(group.prompt.token_ids, sample.token_ids, temperature)
    return values


def plain_gradients(
    model_path: Path, config: Config, moved: dict[str, torch.Tensor] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """The gradient of weight x term for every term, by autograd on the slow form of the objective.

    Args:
        moved: weights by now; the model's own are those before the batch.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
    frozen = AutoModelForCausalLM.from_pretrained(config.objective.kl.reference or model_path, dtype=torch.float64)
    whole, t = helpers_zero.batch(), config.rollout.temperature
    with torch.no_grad():
        others, start = plain_logprobs(frozen, whole, t), plain_logprobs(model, whole, t)
    model.load_state_dict(moved or {}, strict=False)
    now = plain_logprobs(model, whole, t)
    known = {name: Known(now[name], start[name], others[name]) for name in now}
    weights = Controllers(config.objective).weights(0)
    terms = oracle_terms(whole, config.objective, known, weights["adversarial"], config.rollout.max_tokens)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = {}
    for term, value in terms.items():
        if weights[term] > 0:
            gradients = torch.autograd.grad(weights[term] * value, parameters, retain_graph=True)
            found[term] = dict(zip(names, gradients, strict=True))
    return found


@pytest.fixture(scope="module")
def expected(tiny: Path, reference: str) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The plain gradients by objective and term."""
    built = {name: helpers_zero.config(str(tiny), o) for name, o in objectives(reference).items()}
    return {name: plain_gradients(tiny, config) for name, config in built.items()}


RUNS = ["1 rank, long rows", "2 ranks, short rows"]
CASES = list(cases("", 1))


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any parameter's gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradient.values()])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", RUNS)
class TestGradients:
    @pytest.mark.parametrize("way", ["once", "by term"])
    def test_they_equal_plain_pytorch(self, run: str, case: str, way: str, found: Any, expected: Any) -> None:
        terms = expected[case.split(",")[0]].values()
        total = {name: sum(gradient[name] for gradient in terms) for name in next(iter(terms))}
        assert relative(found[run][case][way], total) <= SAME

    @pytest.mark.parametrize("way", ["once", "by term"])
    def test_the_norm_is_deepspeeds_own(self, run: str, case: str, way: str, found: Any) -> None:
        ours, theirs = found[run][case][f"norm {way}"], found[run][case][f"DeepSpeed's norm {way}"]
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours == pytest.approx(flat(found[run][case][way]).norm().item(), rel=1e-5)

    @pytest.mark.parametrize("way", ["once", "by term"])
    def test_the_optimizer_steps_on_the_sums_themselves_not_on_a_copy(
        self, run: str, case: str, way: str, found: Any
    ) -> None:
        joined = found[run][case][f"joined in place {way}"]
        assert joined and all(joined)

    def test_a_step_with_diagnostics_is_the_step_without(self, run: str, case: str, found: Any) -> None:
        """The step changes the weights by a tenth of their norm (`config` in helpers_zero)."""
        once, by_term = found[run][case]["weights once"], found[run][case]["weights by term"]
        assert (by_term - once).norm() <= SAME * once.norm()

    def test_diagnostics_are_the_norms_and_cosines_of_the_terms(
        self, run: str, case: str, found: Any, expected: Any
    ) -> None:
        parts = {term: flat(gradient) for term, gradient in expected[case.split(",")[0]].items()}
        wanted = {f"gradient/norm_{term}": part.norm().item() for term, part in parts.items()}
        for a, b in combinations([t for t in TERMS if t in parts], 2):
            cosine = torch.dot(parts[a], parts[b]) / (parts[a].norm() * parts[b].norm())
            wanted[f"gradient/cosine_{a}_{b}"] = cosine.item()
        assert found[run][case]["diagnostics"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_the_clipped_gradient_and_the_rate_of_the_step_are_what_adamw_gets(
    run: str, tiny: Path, found: Any, expected: Any
) -> None:
    """Against PyTorch's own clip_grad_norm_ and AdamW on the plain gradient: every weight, by what the step changed."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.grad = sum(gradient[name] for gradient in expected["token"].values()).float()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    decays = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": CLIPPED["weight_decay"]}]
    decays += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decays, lr=CLIPPED["learning_rate"] / CLIPPED["warmup_steps"], betas=(0.9, 0.95))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPED["max_grad_norm"])
    optimizer.step()
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert norm > 100 * CLIPPED["max_grad_norm"], "the bound binds"
    assert (found[run]["clipped"]["weights"] - before - wanted).norm() <= 1e-4 * wanted.norm()
    metrics = found[run]["clipped"]["metrics"]
    assert metrics["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-5), "before clipping"
    assert metrics["learner/learning_rate"] == 0.1


class TestSeveralStepsPerBatch:
    @pytest.mark.parametrize("run", RUNS)
    def test_each_gradient_is_plain_pytorchs_against_the_policy_before_the_batch(
        self, run: str, found: Any, tiny: Path, reference: str
    ) -> None:
        config = helpers_zero.config(str(tiny), objectives(reference)["constant"])
        steps = found[run]["constant"]["steps"]
        assert len(steps) == STEPS_PER_BATCH
        for step in steps[1:]:
            assert not torch.equal(flat(step["weights"]), flat(steps[0]["weights"]))
            terms = list(plain_gradients(tiny, config, step["weights"]).values())
            total = {name: sum(gradient[name] for gradient in terms) for name in terms[0]}
            assert relative(step["gradient"], total) <= SAME

    @pytest.mark.parametrize("run", RUNS)
    def test_the_clip_binds_where_there_are_several(self, run: str, found: Any) -> None:
        for key in ("ratio/clip_fraction", "ratio/clip_fraction_adversarial"):
            assert 0 < found[run]["constant"]["metrics"][key] < 1
            assert found[run]["token"]["metrics"][key] == 0

    @pytest.mark.parametrize("run", RUNS)
    def test_all_other_metrics_are_those_of_the_first_step(self, run: str, found: Any) -> None:
        several, one = (found[run][case]["metrics"] for case in ("constant", "constant, checkpointing, unshared"))
        for key in ("loss/total", "learner/grad_norm", "expert/nll", "importance/ess"):
            assert several[key] == pytest.approx(one[key], rel=1e-5)


def test_a_loaded_checkpoint_continues_to_the_bit(found: Any) -> None:
    for run in RUNS:
        undisturbed, resumed = found[run]["checkpoint"]
        keys = ("loss/total", "learner/grad_norm", "expert/nll", "kl/behaviour")
        assert [undisturbed[k] for k in keys] == [resumed[k] for k in keys]


@pytest.mark.parametrize("case", CASES)
def test_metrics_do_not_depend_on_ranks_and_packing(case: str, found: Any) -> None:
    one, two = (found[run][case]["metrics"] for run in RUNS)
    assert one.keys() == two.keys()
    of_packing = {"tokens/trained_per_s", "tokens/computed", "learner/packing_efficiency"}
    for key in one.keys() - of_packing:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key


def test_importance_weights_are_those_of_the_sampled_tokens(tiny: Path, found: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    whole = helpers_zero.batch()
    with torch.no_grad():
        values = plain_logprobs(model, whole, 0.8)
    logs = [
        values[f"{g.prompt.id}/{i}"] - torch.tensor(s.logprobs) for g in whole.groups for i, s in enumerate(g.samples)
    ]
    weights = torch.cat(logs).exp().sort().values
    n, metrics = len(weights), found["2 ranks, short rows"]["token"]["metrics"]
    assert metrics["importance/min"] == pytest.approx(weights[0].item(), rel=1e-4)
    assert metrics["importance/max"] == pytest.approx(weights[-1].item(), rel=1e-4)
    assert metrics["importance/p50"] == pytest.approx(weights[-(-n // 2) - 1].item(), rel=1e-4)
    assert metrics["importance/ess"] == pytest.approx((weights.sum() ** 2 / (n * (weights**2).sum())).item(), rel=1e-4)


def test_the_exported_folder_is_a_model_with_a_tokenizer(runs: dict[str, Path], tiny: Path) -> None:
    from transformers import AutoTokenizer

    folder = runs["2 ranks, short rows"] / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[k], start[k]) for k in start)
    assert AutoTokenizer.from_pretrained(folder).chat_template
