"""`uniapl report` of several runs: overlaid curves, final numbers with intervals, only what differs."""

import dataclasses
import json
import shutil

import pytest
import yaml
from helpers_page import Page
from helpers_run import write_run
from test_security_report import HOSTILE, run_with

from cluster.cli import main
from uniapl.analysis import Evaluation, paired_difference
from uniapl.report import write_comparison
from uniapl.report.axes import compact, points


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first, second = write_run(folder / "first"), write_run(folder / "second", steps=12, seed=3)
    tree = yaml.safe_load((second / "config.yaml").read_text())
    tree["learner"]["learning_rate"] = 3e-4
    tree["reward"]["redis_url"] = "redis://user:secret@other.example:6379/0"
    (second / "config.yaml").write_text(yaml.safe_dump(tree))
    (second / "versions.json").write_text(json.dumps({"torch": "2.14.0"}))
    return [first, second, write_run(folder / "third", steps=5, evaluations=(), sft=True)]


@pytest.fixture(scope="module")
def page(runs):
    path = write_comparison(runs)
    assert path == runs[0].parent / "comparison.html"
    return Page(path.read_text(encoding="utf-8"))


def test_curves_of_all_runs_are_over_each_other(runs, page):
    chart = page.chart("Loss")
    assert [row["name"] for row in chart["rows"]] == ["first", "second", "third"]
    assert len({row["colour"] for row in chart["rows"]}) == 3
    for row, run in zip(chart["rows"], runs, strict=True):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        assert [text for text in row["text"] if text] == [compact(line["loss/total"]) for line in lines]
    assert [row["name"] for row in page.chart("Reward of the rollouts")["rows"]] == ["first", "second"]


def test_final_numbers_come_with_the_difference_from_the_first_run(runs, page):
    first, second = (Evaluation.load(run / "eval" / "after.json") for run in runs[:2])
    found = paired_difference(first, second).difference
    told = f"{points(found.value)} points ({points(found.low)} to {points(found.high)})"
    assert "second against first : pass rate" in page.text and told in page.text
    assert "third has no evaluation after training" in page.text
    for name in ("Pass rate after", "Reward after", "Expert's negative log-likelihood after", "Wasserstein-1"):
        assert name in page.text
    assert "12 of 30" in page.text


def test_of_settings_and_versions_only_what_differs_is_told(page):
    settings = page.text.split("Keys of config.yaml with different values")[1].split("How to reproduce")[0]
    assert "learner.learning_rate" in settings and "0.0003" in settings
    assert "objective.preference.weight" in settings  # of the third
    assert "model.path" not in settings and "run.name" not in settings
    assert "torch" in settings and "2.14.0" in settings
    assert "secret" not in page.text and "redis://***@other.example:6379/0" in settings


def test_samples_whose_outcomes_differ_stand_side_by_side(runs, page):
    section = page.text.split("chosen by order only")[1].split("What differs")[0]
    first, second = ({s.prompt_id: s for s in Evaluation.load(r / "eval" / "after.json").samples} for r in runs[:2])
    shown = [p for p in first if first[p].passed != second[p].passed][:6]
    assert shown and section.count("checks passed") == 2 * len(shown)


def test_runs_of_one_name_are_told_apart_and_of_one_setting_said_to_be_so(tmp_path):
    one = write_run(tmp_path / "a" / "run", steps=2)
    shutil.copytree(one, tmp_path / "b" / "run")
    text = Page(write_comparison([one, tmp_path / "b" / "run"]).read_text(encoding="utf-8")).text
    assert str(one) in text and str(tmp_path / "b" / "run") in text
    assert "the configurations are the same" in text and "The versions are the same" in text


def test_hostile_text_makes_no_element_or_attribute(tmp_path):
    def tags(word):
        folder = tmp_path / str(len(word))
        made = write_comparison([run_with(folder / name, word) for name in ("x", "y")])
        return [(tag, sorted(attrs)) for tag, attrs in Page(made.read_text(encoding="utf-8")).tags]

    assert tags(" ".join(HOSTILE)) == tags("harmless")


def test_the_command_writes_where_it_is_told_and_says_so(runs, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs[:2]), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"comparison: {out}\n" and out.is_file()
    assert main(["report", str(runs[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(runs[0] / "report.html")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{0}", "{0}"], "{0}: the same run a second time; allowed: each run once"),
        (["{0}", "nowhere"], "nowhere: holds no config.yaml; allowed: the folder of a run, such as runs/local"),
        (
            ["{0}", "--out", "x.html"],
            "--out: got 'x.html'; allowed: with two runs or more, one has its own report.html",
        ),
        (["{0}", "{1}", "--out", "no/x.html"], "--out: got 'no/x.html'; allowed: a file in a folder that is there"),
        (["{0}"] * 13, "report: got 13 runs; allowed: at most 12 in one comparison"),
    ],
)
def test_what_cannot_be_compared_is_one_line(runs, capsys, arguments, said):
    assert main(["report", *(word.format(*runs) for word in arguments)]) == 2
    assert capsys.readouterr().err == said.format(*runs) + "\n"


def test_an_evaluation_of_other_prompts_is_not_compared(runs, tmp_path):
    other = write_run(tmp_path / "other", steps=1)
    path = other / "eval" / "after.json"
    found = Evaluation.load(path)
    samples = [dataclasses.replace(s, prompt_id=f"x-{s.prompt_id}") for s in found.samples]
    dataclasses.replace(found, samples=samples).save(path)
    text = Page(write_comparison([runs[0], other], tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "not the same held-out prompts, so no difference is told" in text and "against first" in text
    assert "Pass rate, against first" not in text
