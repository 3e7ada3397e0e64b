"""The cotrained discriminator: its loss, its micro-batches, and its learning on one and on two ranks."""

from __future__ import annotations

import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import helpers_cotrained
import pyarrow as pa
import pytest
import torch
from helpers_cotrained import LEARN_STEPS, group, groups, warm_config
from helpers_tiny import tiny_model
from helpers_zero import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from uniapl.config import Config, ObjectiveConfig
from uniapl.config_errors import ConfigError
from uniapl.data.encoding import ChatEncoder
from uniapl.data.errors import DataError
from uniapl.discriminators import check_discriminator, open_discriminator
from uniapl.discriminators.cotrained import bradley_terry_loss, duel_batch, load_scorer, plan_duels
from uniapl.discriminators.warm_up import WarmUp
from uniapl.metrics import batch_metrics
from uniapl.objective_config import TERMS
from uniapl.records import COMPARISON_SCHEMA, Group, MixedBatch, expert_scores, put_expert_scores


class TestBradleyTerryLoss:
    def test_is_minus_log_sigmoid_of_the_margin(self) -> None:
        expert, samples = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = -torch.log(1 / (1 + torch.exp(samples - expert)))
        torch.testing.assert_close(bradley_terry_loss(expert, samples), expected, rtol=1e-12, atol=1e-14)

    def test_equal_scores_cost_log_two_and_are_pulled_apart_evenly(self) -> None:
        expert, samples = torch.zeros(2, 3, requires_grad=True).unbind()
        loss = bradley_terry_loss(expert, samples)
        assert loss.tolist() == pytest.approx([0.6931471805599453] * 3, abs=1e-15)
        pulls = torch.autograd.grad(loss.sum(), [expert, samples])
        assert [pull.tolist() for pull in pulls] == [[-0.5] * 3, [0.5] * 3]

    @pytest.mark.parametrize(("margin", "loss", "pull"), [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (-1e30, 1e30, -1.0)])
    def test_extreme_margins_neither_overflow_nor_lose_their_gradient(
        self, margin: float, loss: float, pull: float
    ) -> None:
        expert = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
        found = bradley_terry_loss(expert, torch.zeros(1))
        found.sum().backward()
        assert (found.item(), expert.grad.item()) == (loss, pull)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        scores = torch.tensor([[0.3, -2.0, 5.0], [0.1, 3.0, -5.0]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: bradley_terry_loss(s[0], s[1]), scores)


class TestMicroBatches:
    @given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=7), st.integers(1, 200))
    def test_every_pair_is_in_one_of_them_and_only_a_pair_may_be_larger_than_the_budget(
        self, shapes: list[tuple[bool, int]], budget: int
    ) -> None:
        draw = random.Random(0)
        made = [group(i, draw, paired, samples) for i, (paired, samples) in enumerate(shapes)]
        batches = plan_duels(made, budget)
        fought = [id(sample) for batch in batches for duel in batch for sample in duel.samples]
        paired = [g for g in made if g.prompt.expert_ids is not None]
        assert sorted(fought) == sorted(id(sample) for g in paired for sample in g.samples)
        for batch in batches:
            assert batch
            one_pair = len(batch) == len(batch[0].samples) == 1
            assert one_pair or duel_batch(batch).input_ids.numel() <= budget

    def test_rows_are_padded_at_the_right_and_pairs_point_at_them(self) -> None:
        g = group(0, random.Random(1), samples=2)
        g.prompt.token_ids[:], g.prompt.expert_ids[:] = [5, 6], [7]
        g.samples[0].token_ids, g.samples[1].token_ids = [8, 9], []
        [[duel]] = plan_duels([g], 100)
        batch = duel_batch([duel, duel])
        rows = [[5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 0, 0]]
        assert batch.input_ids.tolist() == rows * 2
        assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]] * 2
        assert (batch.expert_row.tolist(), batch.sample_row.tolist()) == ([0, 0, 3, 3], [1, 2, 4, 5])

    def test_none_is_one_token_and_no_pair(self) -> None:
        batch = duel_batch([])
        assert (batch.input_ids.tolist(), batch.expert_row.tolist(), batch.sample_row.tolist()) == ([[0]], [], [])


def test_scores_of_one_copy_of_a_batch_go_into_another() -> None:
    scored, other = groups(0), groups(0)
    for i, sample in enumerate(sample for g in scored if g.prompt.expert_ids for sample in g.samples):
        sample.score.expert_score, sample.score.expert_reference = float(i), 7.5
    put_expert_scores(other, expert_scores(scored[::-1]))
    assert other == scored != groups(0)
    with pytest.raises(KeyError):
        put_expert_scores(groups(1), expert_scores(scored))


class TestPreflight:
    def config(self, model: Path, backbone: Path | None = None, **data: int) -> Config:
        tree = helpers_cotrained.config(str(model), 1, 1024).model_dump()
        tree["objective"]["adversarial"]["cotrained"]["model"] = backbone and str(backbone)
        tree["data"] |= data
        return Config.model_validate(tree)

    def test_the_policys_own_folder_will_do_and_nothing_is_served(self, tiny: Path) -> None:
        check_discriminator(self.config(tiny))
        assert open_discriminator(self.config(tiny)) is None

    def test_so_will_another_model_with_its_vocabulary(self, tiny: Path, tmp_path: Path) -> None:
        check_discriminator(self.config(tiny, tiny_model(tmp_path, seed=3)))

    def test_a_folder_that_is_not_there_is_one_line(self, tiny: Path) -> None:
        with pytest.raises(ConfigError) as error:
            check_discriminator(self.config(tiny, Path("nowhere")))
        assert str(error.value) == (
            "objective.adversarial.cotrained.model: got 'nowhere'; nowhere/config.json is missing; "
            "allowed: a Hugging Face folder with the vocabulary of model.path"
        )

    def test_another_vocabulary_is_one_line(self, tiny: Path, tmp_path: Path) -> None:
        path = tiny_model(tmp_path) / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab["Ġfox"], vocab["Ġbird"] = vocab["Ġbird"], vocab["Ġfox"]
        path.write_text(json.dumps(tokenizer))
        with pytest.raises(ConfigError, match=r"cotrained\.model: got .*, which has another vocabulary; allowed: "):
            check_discriminator(self.config(tiny, tmp_path))

    def test_too_few_positions_are_one_line(self, tiny: Path) -> None:
        with pytest.raises(ConfigError, match=r"model\.path: got .*, which reads 512 tokens; allowed: >= .* = 516"):
            check_discriminator(self.config(tiny, max_response_tokens=500))


def pairs_in(folder: Path) -> Path:
    """Nine preference pairs, written once."""
    path = folder / "pairs.arrow"
    if not path.exists():
        rows = [
            {"id": f"c{i}", "messages": [{"role": "user", "content": f"say {i}"}], "chosen": "red " * i + "fox",
             "rejected": "blue bird"}
            for i in range(9)
        ]  # fmt: skip
        folder.mkdir(exist_ok=True)
        with pa.ipc.new_file(str(path), COMPARISON_SCHEMA) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=COMPARISON_SCHEMA))
    return path


class TestWarmUp:
    def config(self, model: Path, folder: Path, **cotrained: Any) -> Config:
        tree = warm_config(helpers_cotrained.config(str(model), 1, 4096), str(pairs_in(folder))).model_dump()
        tree["objective"]["adversarial"]["cotrained"] |= cotrained
        return Config.model_validate(tree)

    def test_pairs_follow_from_seed_and_step_and_are_shared_by_the_ranks(self, tiny: Path, tmp_path: Path) -> None:
        c = self.config(tiny, tmp_path, warmup_steps=9)
        ids = [[g.prompt.id for g in WarmUp(c).groups(step)] for step in range(10)]
        assert [len(step) for step in ids] == [4] * 9 + [0]
        in_order = list(chain(*ids))
        epochs = [in_order[i : i + 9] for i in range(0, 36, 9)]
        assert all(sorted(epoch) == [f"c{i}" for i in range(9)] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        shares = [[g.prompt.id for g in WarmUp(c).groups(1, rank, 2)] for rank in (0, 1)]
        assert sorted(chain(*shares)) == sorted(ids[1])
        other = c.model_copy(update={"run": c.run.model_copy(update={"seed": 1})})
        assert [g.prompt.id for step in range(9) for g in WarmUp(other).groups(step)] != in_order

    def test_chosen_stands_where_the_experts_response_does(self, tiny: Path, tmp_path: Path) -> None:
        c = self.config(tiny, tmp_path)
        encoder = ChatEncoder.from_folder(tiny)
        for g in WarmUp(c).groups(0):
            number = int(g.prompt.id[1:])
            assert g.prompt.token_ids == encoder.prompt_ids([{"role": "user", "content": f"say {number}"}])
            assert g.prompt.expert_ids == encoder.response_ids("red " * number + "fox")[:16]
            assert [s.token_ids for s in g.samples] == [encoder.response_ids("blue bird")[:16]]

    def test_files_that_cannot_be_used_are_found_before_the_start(self, tiny: Path, tmp_path: Path) -> None:
        check_discriminator(self.config(tiny, tmp_path))
        with pytest.raises(DataError, match=r"^none.arrow: no such file; allowed: existing .arrow or .parquet files$"):
            check_discriminator(self.config(tiny, tmp_path, comparisons=["none.arrow"]))
        c = self.config(tiny, tmp_path)
        short = c.model_copy(update={"data": c.data.model_copy(update={"max_prompt_tokens": 3})})
        with pytest.raises(DataError, match=r"pairs.arrow: row \d: column messages: \d+ tokens; allowed: <= 3"):
            check_discriminator(short)
        assert (
            WarmUp(short.model_copy(update={"data": short.data.model_copy(update={"on_bad_row": "skip"})})).groups(0)
            == []
        )
        with pytest.raises(ValidationError, match=r"cotrained.comparisons: got files; allowed: \[\] when"):
            self.config(tiny, tmp_path, warmup_steps=0)


def run_cotrained(model: Path, out: Path, ranks: int, row_tokens: int, **learner: object) -> list[dict[str, Any]]:
    """Run `helpers_cotrained` on `ranks` processes of this machine; what each of them wrote."""
    spec = {"model": str(model), "row_tokens": row_tokens, "learner": learner, "comparisons": str(pairs_in(out.parent))}
    run_ranks("helpers_cotrained", out, ranks, spec)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


Runs = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cotrained")


@pytest.fixture(scope="module")
def runs(tiny: Path, folder: Path) -> Runs:
    """The same work on one rank in few micro-batches, and on two that must cut every group."""
    return {
        "one": run_cotrained(tiny, folder / "one", 1, 4096),
        "two": run_cotrained(tiny, folder / "two", 2, 64, activation_checkpointing=True),
    }


def plain_scores(scorer: torch.nn.Module, batch: list[Group]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(d of the expert, d of each sample) of every paired group, each sequence alone and unpadded."""

    def score(ids: list[int]) -> torch.Tensor:
        hidden = scorer.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return (hidden * scorer.head.weight).sum()

    return [
        (
            score(g.prompt.token_ids + g.prompt.expert_ids),
            torch.stack([score(g.prompt.token_ids + sample.token_ids) for sample in g.samples]),
        )
        for g in batch
        if g.prompt.expert_ids is not None
    ]


@pytest.fixture(scope="module")
def plain_warm_up(tiny: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Of the first step with a warm-up, by plain PyTorch: margins of samples and of pairs, norm of the gradient."""
    c = warm_config(helpers_cotrained.config(str(tiny), 1, 4096), str(pairs_in(folder)))
    scorer = load_scorer(str(tiny), seed=0)
    sampled, compared = (
        torch.cat([expert - samples for expert, samples in plain_scores(scorer, batch)]).double()
        for batch in (groups(0), WarmUp(c).groups(0))
    )
    (-torch.nn.functional.logsigmoid(torch.cat([sampled, compared]))).mean().backward()
    norm = torch.stack([p.grad.norm() for p in scorer.parameters()]).norm().item()
    return sampled.detach(), compared.detach(), norm


@pytest.mark.parametrize("name", ["one", "two"])
class TestOnRanks:
    def test_scores_loss_and_gradient_are_those_of_plain_pytorch(
        self, runs: Runs, folder: Path, tiny: Path, name: str
    ) -> None:
        scorer = load_scorer(str(tiny), seed=0)
        duels = plain_scores(scorer, groups(0))
        pairs = torch.cat([expert - samples for expert, samples in duels])
        loss = torch.log1p(torch.exp(-pairs.double())).mean()
        loss.backward()
        metrics, norm = runs[name][0]["metrics"][0], runs[name][0]["norm"]
        assert metrics["discriminator/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["discriminator/margin"] == pytest.approx(pairs.mean().item(), rel=1e-5)
        assert metrics["discriminator/accuracy"] == (pairs > 0).double().mean().item()
        expected = {key: p.grad for key, p in scorer.named_parameters()}
        found = torch.load(folder / name / "gradients.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
        total = torch.stack([g.norm() for g in expected.values()]).norm().item()
        assert metrics["discriminator/grad_norm"] == pytest.approx(total, rel=1e-5)
        assert norm == pytest.approx(total, rel=1e-5)

    def test_a_warm_up_learns_from_preference_pairs_too_and_goes_on_exactly(
        self, runs: Runs, plain_warm_up: tuple[torch.Tensor, torch.Tensor, float], name: str
    ) -> None:
        sampled, compared, norm = plain_warm_up
        losses = -torch.nn.functional.logsigmoid(torch.cat([sampled, compared]))
        warm = runs[name][0]["warm"]
        first = warm["metrics"][0]
        assert first["discriminator/comparisons"] == 4
        assert first["discriminator/comparison_loss"] == pytest.approx(losses[-4:].mean().item(), rel=1e-5)
        assert first["discriminator/comparison_accuracy"] == (compared > 0).double().mean().item()
        assert first["discriminator/loss"] == pytest.approx(losses[:-4].mean().item(), rel=1e-5)
        assert first["discriminator/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert ["discriminator/comparisons" in m for m in warm["metrics"]] == [True, True, False]
        assert all(rank["warm"]["resumed"] == rank["warm"]["metrics"][1:] for rank in runs[name])
        assert all(rank["warm"]["metrics"] == warm["metrics"] for rank in runs[name])
        assert sorted(warm["alone"]) == [
            f"discriminator/{key}" for key in ("comparison_accuracy", "comparison_loss", "comparisons", "grad_norm")
        ]

    def test_unpaired_samples_have_no_score_and_make_no_step(self, runs: Runs, name: str) -> None:
        scores = {int(lease): found for rank in runs[name] for lease, found in rank["scores"].items()}
        assert len(scores) == 15
        for lease, found in scores.items():
            assert [value is None for pair in found for value in pair] == [lease % 10 == 2] * 8
        assert all(rank["without"] == {} and rank["unchanged"] for rank in runs[name])

    def test_metrics_are_the_same_on_every_rank_and_as_those_of_the_scored_batch(self, runs: Runs, name: str) -> None:
        assert all(rank["metrics"] == runs[name][0]["metrics"] for rank in runs[name])
        batch = groups(1)
        put_expert_scores(batch, {int(lease): s for rank in runs[name] for lease, s in rank["scores"].items()})
        expected = batch_metrics(MixedBatch(1, batch, []), ObjectiveConfig(), dict.fromkeys(TERMS, 0.0))
        for key, value in runs[name][0]["metrics"][1].items():
            if key in expected:
                assert value == pytest.approx(expected[key], rel=1e-6), key

    def test_a_loaded_state_continues_to_the_bit(self, runs: Runs, name: str) -> None:
        for rank in runs[name]:
            assert rank["resumed"] == rank["undisturbed"]
            assert rank["resumed"][0] != rank["metrics"][0]

    def test_it_learns_to_tell_the_expert_from_samples_that_it_has_not_seen(self, runs: Runs, name: str) -> None:
        accuracy = [m["discriminator/accuracy"] for m in runs[name][0]["learned"]]
        assert runs[name][0]["metrics"][0]["discriminator/accuracy"] < 0.8
        assert len(accuracy) == LEARN_STEPS and sum(accuracy[-5:]) / 5 > 0.9

    def test_a_loss_that_is_not_finite_stops_every_rank_before_the_step_and_names_the_prompt(
        self, runs: Runs, name: str
    ) -> None:
        for rank in runs[name]:
            assert rank["error"] == "the discriminator's loss is not finite; prompts: p993"
            assert rank["untouched"]


def test_in_bfloat16_it_learns_too_and_scores_keep_their_digits(tiny: Path, folder: Path) -> None:
    [rank] = run_cotrained(tiny, folder / "low", 1, 256, dtype="bfloat16")
    accuracy = [m["discriminator/accuracy"] for m in rank["learned"]]
    assert sum(accuracy[-5:]) / 5 > 0.9
    assert rank["resumed"] == rank["undisturbed"]
    scores = torch.tensor([own for found in rank["scores"].values() for own, _ in found if own is not None])
    assert (scores != scores.bfloat16()).float().mean() > 0.9


def test_neither_ranks_nor_micro_batches_change_scores_and_metrics(runs: Runs) -> None:
    [one], two = runs["one"], runs["two"]
    for found, expected in zip(two[0]["metrics"], one["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    scores = {lease: found for rank in two for lease, found in rank["scores"].items()}
    assert scores.keys() == one["scores"].keys()
    for lease, found in scores.items():
        for pair, expected in zip(found, one["scores"][lease], strict=True):
            assert pair == pytest.approx(expected, abs=1e-5)
