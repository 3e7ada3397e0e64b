"""The report: one self-contained HTML file, right in its numbers, safe with hostile text, made of any run."""

import base64
import contextlib
import hashlib
import json
import math
import re
from dataclasses import replace

import pytest
from helpers_page import Page, page_of
from helpers_run import with_text, write_run
from hypothesis import given
from hypothesis import strategies as st

from uniapl.analysis import Evaluation, Interval, paired_difference
from uniapl.config_errors import ConfigError
from uniapl.report import write_report
from uniapl.report.axes import Scale, compact, percent, points, ticks
from uniapl.report.charts import Series, interval_chart, line_chart, moving_mean, stacked_chart
from uniapl.report.samples import PER_KIND, choose, paired_samples
from uniapl.runlog import RunError, RunLog

HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "\"'&amp; ]]> \x00\x1b[2J \ud800 \u202e{{7*7}}"
)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "local")


@pytest.fixture(scope="module")
def full_page(full_run):
    return page_of(full_run)


def test_evaluations_beside_training_make_a_curve(full_run, tmp_path):
    assert "Held-out pass rate over training" not in write_report(full_run).read_text(encoding="utf-8")
    run = write_run(tmp_path / "run")
    before = Evaluation.load(run / "eval" / "before.json")
    for step in (10, 20):
        versions = [step, step + 1] if step == 20 else [step]
        replace(before, step=step, versions=versions).save(run / "eval" / f"step-{step:05d}.json")
    html = write_report(run).read_text(encoding="utf-8")
    [svg] = re.findall("<svg[^>]*Held-out pass rate over training: pass rate from[^>]*>", html)
    assert all(f'"step {step}"' in svg for step in (0, 10, 20, 30))
    assert "1 of 2 evaluations beside training took so long that new weights came in between" in html
    (run / "eval" / "step-00010.json").write_text("{}")
    with pytest.raises(RunError, match=r"step-00010\.json: not a saved evaluation"):
        write_report(run)


def test_the_report_stands_in_the_run_folder(full_run):
    assert write_report(full_run) == full_run / "report.html"
    assert not list(full_run.glob("*.tmp"))


def test_the_page_needs_no_other_file_and_no_network(full_page):
    for tag, attrs in full_page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), tag
        assert not {"src", "action", "style"} & attrs.keys(), (tag, attrs)
        assert attrs.get("href", "#").startswith("#"), (tag, attrs)  # links stay within the page
    styles = "".join(text for tag, text in full_page.texts if tag == "style")
    assert "url(" not in styles and "@import" not in styles


def test_only_the_reports_own_script_and_style_count(full_page):
    [policy] = [a["content"] for a in full_page.attributes("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for kind in ("script", "style"):
        [text] = [text for tag, text in full_page.texts if tag == kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") for _, attrs in full_page.tags for name in attrs)


def test_the_headline_is_the_held_out_pass_rate_with_its_difference(full_run, full_page):
    before, after = (Evaluation.load(full_run / "eval" / f"{name}.json") for name in ("before", "after"))
    found = paired_difference(before, after)
    assert f"{percent(before.pass_rate.value)} → {percent(after.pass_rate.value)} of 64" in full_page.text
    interval = f"interval {points(found.difference.low)} to {points(found.difference.high)}"
    assert f"{points(found.difference.value)} points" in full_page.text and interval in full_page.text
    assert f"{found.gained} gained, {found.lost} lost" in full_page.text
    assert "1 sample before training could not be scored" in full_page.text


def test_a_difference_that_may_be_chance_is_called_so(tmp_path, full_page):
    run = write_run(tmp_path / "same", evaluations=("before",))
    (run / "eval" / "after.json").write_bytes((run / "eval" / "before.json").read_bytes())
    assert "No significant change of the pass rate: the interval includes 0" in page_of(run).text
    assert "interval includes 0" not in full_page.text


def test_charts_hold_the_logged_numbers(full_run, full_page):
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").open()]
    chart = full_page.chart("Reward of the rollouts")
    assert [row["name"] for row in chart["rows"]] == ["mean reward", "pass rate"]
    assert chart["labels"] == [f"step {line['step']}" for line in lines]
    assert chart["rows"][0]["text"] == [compact(line["reward/mean"]) for line in lines]


def test_every_section_of_a_whole_run_is_there(full_page):
    ids = [a["id"] for a in full_page.attributes("section")]
    expected = ["result", "training", "expert", "balance", "staleness", "time", "samples", "constraints", "health"]
    assert ids == [*expected, "reproduce"]
    assert [a["href"] for a in full_page.attributes("a")] == ["#main", *(f"#{name}" for name in ids)]
    titles = {a["aria-label"].split(":")[0] for a in full_page.attributes("svg") if "aria-label" in a}
    for title in ["Staleness", "Discriminator gap", "Shares of the weighted loss", "Shares of the gradient"]:
        assert title in titles
    for name in ("Response length", "Token log-probability"):
        assert {f"{name}, before", f"{name}, after"} <= titles


def test_charts_can_be_reached_and_read_without_a_pointer(full_page):
    charts = [a for a in full_page.attributes("svg") if "data-chart" in a]
    assert len(charts) > 20
    assert all(a["tabindex"] == "0" and a["role"] == "img" and a["aria-label"] for a in charts)
    assert all("aria-label" in a or a.get("aria-hidden") == "true" for a in full_page.attributes("svg"))


def test_times_add_up_to_the_whole(full_run, full_page):
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").open()]
    whole = sum(line["time/step"] for line in lines)
    train = sum(line["time/train"] for line in lines) / whole
    assert re.search(rf"train 2 min \d+ s {percent(train)}", full_page.text)


def test_constraints_show_both_rates(full_run, full_page):
    before, after = (Evaluation.load(full_run / "eval" / f"{name}.json") for name in ("before", "after"))
    for name, rate in after.check_rates.items():
        assert f"{name} {percent(before.check_rates[name].value)} → {percent(rate.value)}" in full_page.text


def test_config_and_versions_tell_how_to_run_it_again(full_page):
    assert "uniapl train config.yaml run.name=local-again" in full_page.text
    assert "path: models/smollm2-135m-instruct" in full_page.text and "vllm 0.32.0" in full_page.text


def test_passwords_in_addresses_stay_out_of_the_report(tmp_path):
    run = write_run(tmp_path / "r", steps=1, evaluations=())
    path = run / "config.yaml"
    # No run takes such an address any more, but a folder may be of an older one.
    path.write_text(path.read_text().replace("redis://user@", "redis://user:secret@word@"))
    text = page_of(run).text
    assert "secret" not in text and "word@" not in text and "redis://***@cache.example:6379/0" in text


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "hostile", steps=2)
    for name in ("before", "after"):
        with_text(Evaluation.load(run / "eval" / f"{name}.json"), HOSTILE).save(run / "eval" / f"{name}.json")
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "config.yaml").write_text('model:\n  path: "</pre><script>alert(3)</script>"\n')
    with contextlib.closing(RunLog(run, tensorboard=False)) as log:
        log.log(3, {"check/<script>alert(4)</script>": 0.5})
    page = page_of(run)
    assert len(page.attributes("script")) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "<script>alert(1)</script>" in page.text and "{{7*7}}" in page.text and "alert(4)" in page.text
    assert not {"\x00", "\x1b", "\ud800"} & set(page.text)


def test_a_run_folders_name_stays_text(tmp_path):
    page = page_of(write_run(tmp_path / "<b>bold<b> & co", steps=1, evaluations=(), config=False))
    assert page.attributes("b") == [] and "<b>bold<b> & co" in page.text


def test_a_run_without_evaluation_says_so(tmp_path):
    page = page_of(write_run(tmp_path / "r", evaluations=()))
    assert "no held-out evaluation" in page.text
    assert [a["id"] for a in page.attributes("section")] == [
        "result",
        "training",
        "expert",
        "balance",
        "staleness",
        "time",
        "health",
        "reproduce",
    ]


def test_an_interrupted_run_says_how_far_it_came(tmp_path):
    page = page_of(write_run(tmp_path / "r", steps=12, evaluations=("before",)))
    assert "Not finished: 12 of 30 steps were made." in page.text
    assert "there is no evaluation after it" in page.text


def test_a_finished_run_says_so(full_page):
    assert "Finished: 30 optimizer steps." in full_page.text


def test_a_run_without_rollouts_shows_what_it_has(tmp_path):
    page = page_of(write_run(tmp_path / "r", sft=True))
    assert "No rollouts were made" in page.text
    assert page.chart("Demonstration loss") and "Reward of the rollouts" not in page.text


@pytest.mark.parametrize(("steps", "said"), [(0, "No optimizer step was logged."), (1, "Not finished: 1 of 30")])
def test_a_run_of_no_or_one_step_has_a_report(tmp_path, steps, said):
    assert said in page_of(write_run(tmp_path / "r", steps=steps, evaluations=())).text


def test_an_empty_folder_has_a_report_that_names_what_is_missing(tmp_path):
    text = page_of(tmp_path).text
    for said in ["No optimizer step", "no held-out evaluation", "config.yaml is missing", "versions.json is missing"]:
        assert said in text


def test_a_run_stopped_while_a_line_was_written_still_has_its_report(tmp_path):
    run = write_run(tmp_path / "r", steps=3, evaluations=())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    with pytest.warns(UserWarning, match="unfinished"):
        assert "3 of 30 steps" in page_of(run).text


def test_long_runs_stay_small_and_say_that_points_are_means(tmp_path):
    run = write_run(tmp_path / "r", steps=1300, planned=1300, evaluations=())
    page = page_of(run)
    assert "Thin lines are means of 5 steps" in page.text
    assert len(page.chart("Loss")["px"]) == 260
    assert (run / "report.html").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("file", "text", "error", "said"),
    [
        ("data.json", "[[1]]", RunError, r"data\.json: not the rows of a table"),
        ("versions.json", "[", RunError, r"versions\.json: not a JSON object"),
        ("eval/before.json", "{}", RunError, r"before\.json: not a saved evaluation"),
        ("metrics.jsonl", "x\n", RunError, r"metrics\.jsonl line 1: not valid JSON"),
        ("config.yaml", "a: [", ConfigError, r"config\.yaml: line 1: not valid YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, text, error, said):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(error, match=said):
        write_report(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match="nowhere: no such folder; allowed: the folder of a run"):
        write_report(tmp_path / "nowhere")


def test_samples_of_every_outcome_are_shown_and_counted(full_run):
    before, after = (Evaluation.load(full_run / "eval" / f"{name}.json") for name in ("before", "after"))
    chosen = choose(paired_samples(before, after))
    assert sum(count for _, count, _ in chosen) == 64
    assert [kind for kind, _, _ in chosen][:2] == ["newly passed", "no longer passed"]
    for kind, count, pairs in chosen:
        assert len(pairs) == min(count, PER_KIND) and {pair.kind for pair in pairs} == {kind}
    for pair in chosen[0][2]:
        assert (pair.before.passed, pair.after.passed) == (False, True)


def test_lines_run_from_edge_to_edge_of_the_plot():
    chart = json.loads(
        Page(line_chart("T", [Series("a", [1, 2, 3], [0, 5, 10])], "u").svg).attributes("svg")[0]["data-chart"]
    )
    assert chart["px"] == [50, 230, 410]


def test_higher_values_are_drawn_higher():
    svg = line_chart("T", [Series("a", [1, 2], [0, 10])], "u").svg
    [(first, second)] = re.findall(r'class="line c1" d="M50\.?0* ([\d.]+)L410\.?0* ([\d.]+)"', svg)
    assert float(second) < float(first)


def test_stacked_layers_reach_the_sum():
    figure = stacked_chart("T", [Series("a", [1, 2], [3, 1]), Series("b", [2], [2], "c2")], "s")
    layers = re.findall(r'class="area \w+" d="([^"]+)"', figure.svg)
    assert len(layers) == 2
    tops = [[float(v) for v in re.findall(r"V([\d.]+)H", layer)][:2] for layer in layers]
    assert tops[1] == [26.0, 26.0] and tops[0][0] == 26.0


def test_a_chart_of_nothing_is_none():
    assert line_chart("T", [Series("a", [], [])], "u") is None
    assert stacked_chart("T", [], "u") is None


def test_names_in_charts_are_escaped():
    figure = interval_chart('"><script>', [("<b>", Interval(0.5, 0.4, 0.6, 9), "c1")])
    page = Page(figure.svg)
    assert {tag for tag, _ in page.tags} <= {"svg", "path", "text", "circle"} and "<b>" in page.text


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_rising_and_within_the_range(low, width):
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 12 and found == sorted(set(found))
    slack = 1e-6 * width + 2 * math.ulp(abs(low) + width)  # far from 0 a narrow range is a few floats wide
    assert all(low - slack <= tick <= low + width + slack for tick in found)


def test_ticks_of_steps_are_whole():
    assert ticks(1, 3, 6, whole=True) == [1, 2, 3]


def test_scale_maps_and_clips():
    scale = Scale(0, 10, 100, 0)
    assert [scale(v) for v in (0, 5, 10, 20, -1)] == [100, 50, 0, 0, 100]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.3125, "0.312"),
        (-2.5, "−2.5"),
        (1e-5, "1e-5"),
        (0.0005, "0.0005"),
        (1234.4, "1,234"),
        (56_700, "56.7k"),
        (999_999, "1M"),
        (2.5e9, "2.5B"),
    ],
)
def test_numbers_are_short(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 %"), (0.314, "31 %"), (0.015, "1.5 %"), (0.02, "2 %"), (0.004, "0.4 %"), (0.0999, "10 %"), (-0.5, "−50 %")],
)
def test_fractions_are_in_percent(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.314, "+31"), (-0.02, "−2"), (0.001, "0"), (-0.001, "0")])
def test_differences_are_in_points(value, text):
    assert points(value) == text


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60))
def test_the_moving_mean_keeps_length_and_range(values):
    smooth = moving_mean(values)
    assert len(smooth) == len(values)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in smooth)


def test_the_moving_mean_of_a_straight_line_is_that_line_inside():
    assert moving_mean(list(range(32)))[2:-2] == pytest.approx(list(range(2, 30)))
