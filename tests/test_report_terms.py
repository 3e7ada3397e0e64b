"""The report of the terms: weights, shares, gradients, and metrics that only some steps have."""

import contextlib
import json
import re

import pytest
from helpers_page import Page, page_of
from helpers_run import DIAGNOSTICS_EVERY, write_run

from uniapl.objective_config import ObjectiveConfig
from uniapl.report.axes import compact, percent
from uniapl.report.charts import Series, band_chart, line_chart
from uniapl.report.words import objective_words, weight_words
from uniapl.runlog import RunLog

ALL_TERMS = ["preference", "demonstration", "adversarial", "kl"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "local", evaluations=())


@pytest.fixture(scope="module")
def full_page(full_run):
    return page_of(full_run)


def page_of_records(folder, records):
    """The page of a run that logged these metrics, from step 1 on."""
    with contextlib.closing(RunLog(folder, tensorboard=False)) as log:
        for step, record in enumerate(records, start=1):
            log.log(step, record)
    return page_of(folder)


def titles(page):
    return {a["aria-label"].split(":")[0] for a in page.attributes("svg") if "aria-label" in a}


def names(chart):
    return [row["name"] for row in chart["rows"]]


def test_weights_and_shares_hold_the_logged_numbers_of_all_four_terms(full_run, full_page):
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").open()]
    for title, prefix, show in (
        ("Weights of the terms", "weight", compact),
        ("Shares of the weighted", "share", percent),
    ):
        [title] = [found for found in titles(full_page) if found.startswith(title)]
        chart = full_page.chart(title)
        assert names(chart) == ALL_TERMS
        for row in chart["rows"]:
            assert row["text"] == [show(line[f"{prefix}/{row['name']}"]) for line in lines]


def test_shares_of_the_gradient_are_its_norms_on_the_steps_that_measured_them(full_run, full_page):
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").open()]
    norms = [[line[f"gradient/norm_{term}"] for term in ALL_TERMS] for line in lines if "gradient/norm_kl" in line]
    chart = full_page.chart("Shares of the gradient")
    assert names(chart) == ALL_TERMS and len(norms) == len(chart["px"]) == 30 // DIAGNOSTICS_EVERY
    shown = [[row["text"][step] for row in chart["rows"]] for step in range(len(norms))]
    assert shown == [[percent(norm / sum(row)) for norm in row] for row in norms]


def test_ages_of_the_tokens_are_stacked_in_their_order(tmp_path):
    records = [{"staleness/age_0": 0.5, "staleness/age_8": 0.25, "staleness/age_2": 0.25, "staleness/age_x": 1.0}] * 3
    page = page_of_records(tmp_path, records)
    assert names(page.chart("Tokens by age")) == ["age 0", "age 2", "age 8 or more"]


def test_gradients_stand_at_the_diagnostic_steps_of_the_whole_runs_axis(full_page):
    norms, cosines = (
        full_page.chart("Gradient norm of each term"),
        full_page.chart("Cosines between the terms' gradients"),
    )
    assert norms["labels"] == [f"step {step}" for step in range(DIAGNOSTICS_EVERY, 31, DIAGNOSTICS_EVERY)]
    assert names(norms) == ALL_TERMS
    assert names(cosines) == ["demo, pref", "demo, adv", "demo, kl", "pref, adv", "pref, kl", "adv, kl"]
    every_step = full_page.chart("Loss")["px"]
    assert norms["px"] == [every_step[step - 1] for step in (10, 20, 30)]


def test_a_metric_of_some_steps_stands_beside_one_of_all_steps(full_run, full_page):
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").open()]
    estimate, exact = full_page.chart("Entropy of the policy")["rows"]
    assert all(estimate["text"]) and len(estimate["text"]) == 30
    assert exact["text"] == [compact(line["entropy/exact"]) if "entropy/exact" in line else "" for line in lines]


@pytest.mark.parametrize("title", ["Importance weights", "KL, learner to reference", "Effective sample size"])
def test_what_tells_how_far_the_policy_moved_is_there(full_page, title):
    assert title in titles(full_page)


def test_importance_weights_tell_all_their_quantiles(full_run, full_page):
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").open()]
    rows = {row["name"]: row["text"] for row in full_page.chart("Importance weights")["rows"]}
    keys = {"1 %": "p01", "median": "p50", "99 %": "p99", "smallest": "min", "largest": "max"}
    assert rows == {name: [compact(line[f"importance/{key}"]) for line in lines] for name, key in keys.items()}


def test_the_discriminator_and_the_groups_of_equal_rewards_are_there(full_page):
    for title in ("accuracy", "margin", "loss", "score", "gap"):
        assert f"Discriminator {title}" in titles(full_page)
    assert names(full_page.chart("Groups of equal rewards so far")) == ["sampled again", "kept"]
    assert names(full_page.chart("Clipped tokens")) == ["preference", "adversarial"]


def test_lines_that_are_zero_throughout_are_left_out_where_that_says_nothing(full_page, tmp_path):
    title = "Tokens left out by the correction"
    assert title not in titles(full_page)
    record = {"weight/demonstration": 1.0, "weight/kl": 0.0, "share/demonstration": 1.0, "share/kl": 0.0}
    page = page_of_records(tmp_path, [record | {"correction/masked_fraction": f} for f in (0.0, 0.25)])
    assert page.chart(title)["rows"][0]["text"] == ["0 %", "25 %"]
    assert names(page.chart("Weights of the terms")) == ["demonstration"]
    assert names(page.chart("Shares of the weighted loss")) == ["demonstration"]


def test_a_run_without_rollouts_shows_its_one_term(tmp_path):
    page = page_of(write_run(tmp_path / "r", sft=True))
    for title in ("Weights of the terms", "Shares of the weighted loss", "Gradient norm of each term"):
        assert names(page.chart(title)) == ["demonstration"]
    assert not {"Cosines between the terms' gradients", "Importance weights", "Entropy of the policy"} & titles(page)


def test_after_a_hard_switch_the_rollouts_stand_in_their_part_of_the_axis(tmp_path):
    before = {"loss/total": 1.0, "loss/demonstration": 1.0}
    after = {"loss/total": 0.1, "loss/preference": 0.1, "reward/mean": 0.5, "reward/pass_rate": 0.5}
    page = page_of_records(tmp_path, [before] * 10 + [after] * 11)
    whole, reward = page.chart("Loss"), page.chart("Reward of the rollouts")
    assert reward["labels"] == [f"step {step}" for step in range(11, 22)]
    assert reward["px"] == whole["px"][10:]
    assert page.chart("Demonstration loss")["px"] == whole["px"][:10]


def test_a_run_without_weights_and_shares_has_no_section_of_them(tmp_path):
    page = page_of_records(tmp_path, [{"loss/total": 1.0}])
    assert "balance" not in [a["id"] for a in page.attributes("section")]


@pytest.mark.parametrize(("style", "paths", "dots"), [("smooth", 2, 0), ("plain", 1, 0), ("dots", 1, 20)])
def test_lines_are_smoothed_plain_or_dotted(style, paths, dots):
    svg = line_chart("T", [Series("a", range(20), range(20), "c1", style)], "u").svg
    assert (len(re.findall(r'class="(?:raw|line) ', svg)), svg.count("<circle")) == (paths, dots)


def test_a_band_goes_along_its_upper_edge_and_back_along_the_lower():
    low, middle, high = (Series(name, [1, 2, 3], ys) for name, ys in (("l", [0] * 3), ("m", [1] * 3), ("h", [2, 4, 2])))
    svg = band_chart("T", low, middle, high, [], "u").svg
    [outline] = re.findall(r'class="band c1" d="M([^"]+)Z"', svg)
    xs, ys = zip(*((float(v) for v in point.split()) for point in outline.split("L")), strict=True)
    assert xs == (50, 230, 410, 410, 230, 50)
    assert ys[1] < ys[0] == ys[2] < ys[3] == ys[4] == ys[5]


def test_a_band_of_nothing_is_none():
    empty = Series("a", [], [])
    assert band_chart("T", empty, empty, empty, [], "u") is None


def test_quotes_in_a_charts_data_stay_within_it():
    name = "' onload='alert(1) \" & &#39; </svg>"
    page = Page(line_chart("T", [Series(name, [1, 2], [1, 2])], "u").svg)
    assert page.chart("T")["rows"][0]["name"] == name
    assert not any(attribute.startswith("on") for _, attrs in page.tags for attribute in attrs)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (0.5, "0.5"),
        (0, ""),
        ({"kind": "constant", "value": 0.5}, "0.5"),
        ({"kind": "constant", "value": 0.0}, ""),
        ({"kind": "schedule", "value": 0.9, "end": 0.05, "steps": 200}, "schedule 0.9 → 0.05 in 200 steps"),
        (
            {"kind": "schedule", "value": 0.9, "end": 0.05, "steps": 200, "warmup_steps": 20},
            "schedule 0.9 → 0.05 in 200 steps, 20 of them warm-up",
        ),
        ({"kind": "switch", "value": 1.0, "end": 0.0, "steps": 100}, "1 for 100 steps, then 0"),
        ({"kind": "complement"}, "1 − demonstration"),
        ({"kind": "lagrangian", "value": 0.1, "target": 1.2}, "lagrangian, target 1.2"),
        (None, ""),
        ("0.5", ""),
        (float("inf"), ""),
        ({"kind": ["x"]}, ""),
        ({"kind": "switch", "value": "much"}, "? for ? steps, then ?"),
    ],
)
def test_weights_are_said_in_words(weight, words):
    assert weight_words(weight) == words


def test_the_objective_of_a_resolved_configuration_is_said_in_words():
    tree = {
        "preference": {"weight": {"kind": "complement"}},
        "demonstration": {"weight": {"kind": "schedule", "value": 0.9, "end": 0.05, "steps": 200}},
        "adversarial": {"weight": 0.1, "discriminator": "embedding"},
    }
    resolved = ObjectiveConfig.model_validate(tree).model_dump(mode="json")
    assert objective_words(resolved) == (
        "preference: 1 − demonstration; demonstration: schedule 0.9 → 0.05 in 200 steps; adversarial: 0.1 (embedding)"
    )
    resolved["adversarial"]["as_reward"] = True
    assert objective_words(resolved).endswith("adversarial: 0.1 (embedding, within the reward)")


@pytest.mark.parametrize("objective", [None, [], "x", {"preference": 1}, {"kl": {}}])
def test_what_is_no_objective_has_no_words(objective):
    assert objective_words(objective) == ""


def test_the_page_says_the_objective_in_words(full_page):
    said = "preference: 1 − demonstration; demonstration: schedule 0.9 → 0.05 in 20 steps; adversarial: 0.2 (embedding)"
    assert said in full_page.text
