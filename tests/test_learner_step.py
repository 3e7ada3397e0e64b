"""Steps of the ZeRO-3 learner that must not be made, and the frozen reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_tiny import tiny_model
from helpers_zero import batch, run_ranks
from transformers import AutoModelForCausalLM

from learner.nonfinite import NonFiniteError

OF_P1 = {f"p1/{i}" for i in range(4)}


def with_embedding(folder: Path, token: int, value: float) -> str:
    """The tiny model with one row of its input embedding set to `value`."""
    tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[(1, 4096), (2, 32)], ids=["1 rank, long rows", "2 ranks, short rows"])
def found(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 found; every rank found the same."""
    base, (ranks, rows) = tmp_path_factory.mktemp("steps"), request.param
    spec = {
        "model": str(tiny),
        "poisoned": with_embedding(base / "poisoned", token=5, value=float("nan")),
        "steep": with_embedding(base / "steep", token=9, value=0.0),
        "row_tokens": rows,
    }
    out = run_ranks("rank_steps", base / "out", ranks, spec)
    all_ranks = [torch.load(out / f"found-{rank}.pt", weights_only=True) for rank in range(ranks)]
    failing = [key for key in all_ranks[0] if key != "kl"]
    assert all(other[key] == all_ranks[0][key] for other in all_ranks for key in failing)
    return all_ranks[0] | {"short rows": rows < 100}


@pytest.mark.parametrize("case", ["loss", "loss, with diagnostics"])
def test_an_infinite_loss_names_the_samples_whose_loss_it_is(found: dict[str, Any], case: str) -> None:
    assert found[case]["what"] == "loss"
    assert found[case]["found_in"] == "samples"
    assert set(found[case]["ids"]) == OF_P1


def test_a_gradient_that_overflows_under_a_finite_loss_is_found_in_its_micro_batch(found: dict[str, Any]) -> None:
    assert found["gradient"]["what"] == "gradient"
    assert found["gradient"]["found_in"] == "one or more of the samples"
    ids = found["gradient"]["ids"]
    assert set(ids) & OF_P1
    assert (len(ids) < 17) == found["short rows"], "of 17 sequences, only the micro-batch's"


def test_a_poisoned_weight_names_every_sample_up_to_eight(found: dict[str, Any]) -> None:
    assert len(found["weight"]["ids"]) == 17
    assert found["weight"]["line"].startswith("the loss is not finite; samples: ")
    assert found["weight"]["line"].endswith(" and 9 more")
    assert found["weight"]["line"].count(",") == 7


def test_a_gradient_that_deepspeed_refuses_is_told_like_one_that_is_not_finite(found: dict[str, Any]) -> None:
    """The driver keeps the batch of either, and says how to make the step again."""
    start = "the gradient that DeepSpeed refused is not finite; samples of the batch: "
    assert found["refused"].startswith(start)
    assert found["refused"].endswith(" and 9 more")


@pytest.mark.parametrize("case", ["loss", "loss, with diagnostics", "gradient", "weight"])
def test_no_weight_has_changed(found: dict[str, Any], case: str) -> None:
    assert found[case]["unchanged"]


@pytest.mark.parametrize("case", ["loss", "loss, with diagnostics", "gradient"])
def test_the_next_step_is_that_of_a_learner_to_which_it_never_happened(found: dict[str, Any], case: str) -> None:
    assert found[case]["afterwards"] == found[case]["without a past"]
    assert found[case]["same weights"]


def test_the_policy_begins_at_the_reference_and_leaves_it(found: dict[str, Any]) -> None:
    first, *later = found["kl"]
    assert first["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert first["gradient/norm_kl"] <= 1e-6 * first["learner/grad_norm"]
    assert all(m["kl/reference"] > 1e-4 and m["gradient/norm_kl"] > 1e-3 for m in later)
    assert all(m["loss/kl"] == pytest.approx(m["kl/reference"]) for m in found["kl"])


def test_the_exact_entropy_is_that_of_the_samples_distribution(found: dict[str, Any], tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    entropies = []
    for group in batch().groups:
        for sample in group.samples:
            ids, n = group.prompt.token_ids + sample.token_ids, len(sample.token_ids)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1].double() / 0.8
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    assert found["kl"][0]["entropy/exact"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)


def test_the_error_travels_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(NonFiniteError(3, "loss", ["p/0", "d"], "samples")))
    assert (error.step, error.what, error.ids) == (3, "loss", ["p/0", "d"])
    assert str(error) == "the loss is not finite; samples: p/0, d"
