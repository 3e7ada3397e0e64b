"""`uniapl eval`: verdicts, suites, scores, intervals; a model with a real engine. `test_end_to_end.py` has a run."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cli import environment
from helpers_rewards import hide_nltk_data
from helpers_tiny import tiny_model
from helpers_toy import toy_rows, write_shard
from published_ifeval import FILE, NEED_NLTK, needs_nltk, prompts, published

from cluster.cli import main
from uniapl.analysis import wilson_interval
from uniapl.evals.result import Result
from uniapl.evals.scores import Answer, by_instruction, rate, scores
from uniapl.evals.suites import Item, Suite, open_suite
from uniapl.evals.verdicts import Instruction, Verdict, judge, unavailable, variants, without_thinking


def nltk_data() -> bool:
    import nltk

    return any((Path(folder) / "tokenizers" / "punkt_tab").is_dir() for folder in nltk.data.path)


NLTK = pytest.mark.skipif(not nltk_data(), reason="needs NLTK's data: python -m nltk.downloader punkt_tab")


@pytest.fixture(scope="module", params=["without NLTK's data", pytest.param("with it", marks=NLTK)])
def fixed(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Responses and what the published verifier says of them, each with its prompt.

    Of the prompts for which NLTK's data has to be there, or of the others.
    """
    rows = prompts()
    lines = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    found = [line | {"row": rows[line["key"]]} for line in lines]
    some = [line for line in found if needs_nltk(line["row"]) == (request.param == "with it")]
    assert len(some) > 30
    return some


@pytest.fixture(scope="module")
def judged(fixed: list[dict[str, Any]]) -> list[list[Verdict]]:
    return [judge(asked(line["row"]), line["row"]["prompt"], line["response"], {}) for line in fixed]


def asked(row: dict[str, Any]) -> list[Instruction]:
    return [Instruction(*pair) for pair in zip(row["instruction_id_list"], row["kwargs"], strict=True)]


class TestPublishedVerifier:
    def test_every_verdict_is_the_published_one(self, fixed: Any, judged: Any) -> None:
        for line, verdicts in zip(fixed, judged, strict=True):
            found = ([v.strict for v in verdicts], [v.loose for v in verdicts])
            assert found == (line["strict"], line["loose"]), (line["key"], line["response"])

    def test_the_scores_are_the_published_ones(self, fixed: Any, judged: Any) -> None:
        """As its `print_report` adds them up."""
        found = scores([[Answer("", 0, "stop", verdicts=verdicts)] for verdicts in judged])
        for level in ("strict", "loose"):
            lists = [line[level] for line in fixed]
            assert found[f"prompt_{level}"].value == sum(map(all, lists)) / len(lists)
            assert found[f"instruction_{level}"].value == sum(map(sum, lists)) / sum(map(len, lists))
            assert found[f"prompt_{level}"] == wilson_interval(found[f"prompt_{level}"].value, len(fixed))

    def test_the_file_is_what_the_published_verifier_says_today(self, fixed: Any) -> None:
        some = fixed[::3]
        strict, loose = published([line["row"] for line in some], [line["response"] for line in some])
        for line, one, other in zip(some, strict, loose, strict=True):
            assert (one.follow_instruction_list, other.follow_instruction_list) == (line["strict"], line["loose"])

    def test_every_instruction_is_followed_and_not_followed(self) -> None:
        rows, outcomes = prompts(), defaultdict(set)
        for line in map(json.loads, FILE.read_text(encoding="utf-8").splitlines()):
            for name, strict in zip(rows[line["key"]]["instruction_id_list"], line["strict"], strict=True):
                outcomes[name].add(strict)
        assert outcomes.keys() == {name for row in rows.values() for name in row["instruction_id_list"]}
        assert set(map(frozenset, outcomes.values())) == {frozenset({True, False})}

    @NLTK
    def test_with_nltk_data_nothing_of_ifeval_is_skipped(self) -> None:
        assert unavailable([(row["prompt"], asked(row)) for row in prompts().values()]) == {}


class TestVerdicts:
    def test_a_thought_is_no_part_of_the_answer(self) -> None:
        no_comma = [Instruction("punctuation:no_comma", {})]
        assert judge(no_comma, "", "<think>well, so</think>\nYes.", {}) == [Verdict(no_comma[0].id, True, True)]
        assert without_thinking(" <think>never ends, and") == ""
        assert judge(no_comma, "", "<think>never ends", {}) == [Verdict(no_comma[0].id, False, False)]
        assert without_thinking("\n as it is ") == "\n as it is "

    def test_loose_takes_lines_and_asterisks_away(self) -> None:
        assert list(variants("a\n*b*\nc")) == [
            *("a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*"),
            *("a\nb\nc", "b\nc", "a\nb", "b"),
        ]

    def test_what_needs_nltk_data_is_named_once_and_judged_nowhere(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        hide_nltk_data(monkeypatch, tmp_path)
        with pytest.warns(UserWarning, match="draws one"):
            suite = open_suite("ifeval")
        skipped = unavailable([(item.text, item.instructions) for item in suite.items])
        assert skipped.keys() == NEED_NLTK
        assert all("needs NLTK data: python -m nltk.downloader punkt" in reason for reason in skipped.values())
        item = next(item for item in suite.items if 0 < sum(i.id in skipped for i in item.instructions) < 2 <=
                    len(item.instructions))  # fmt: skip
        verdicts = judge(item.instructions, item.text, "", skipped)
        assert {v.strict for v in verdicts if v.instruction in NEED_NLTK} == {None}
        assert {v.strict for v in verdicts if v.instruction not in NEED_NLTK} == {False}
        result = Result(suite, "m", {"max_tokens": 1}, [[Answer("", 0, "length", verdicts=[])]], skipped, 0.0, {})
        assert result.skipped_prompts == 541 - 477
        assert sum("needs NLTK data" in line for line in result.notes()) == 2
        assert result.notes()[-1] == "1 responses were cut off at 1 tokens (--max-tokens)"

    def test_an_argument_that_the_verifier_draws_at_random_is_always_the_same_and_told(self) -> None:
        with pytest.warns(UserWarning, match=r"prompt 1122: keywords:letter_frequency: letter is '#' \(and 1 more\)"):
            suite = open_suite("ifeval")
        item = next(item for item in suite.items if item.id == "1122")
        text = "a bb ccc dddd eeeee ffffff"
        assert len({tuple(judge(item.instructions, item.text, text, {})) for _ in range(10)}) == 1


class TestScores:
    def test_the_interval_is_wilsons_where_each_prompt_has_one_outcome(self) -> None:
        assert rate([[True]] * 30 + [[False]] * 70) == wilson_interval(0.3, 100)
        assert rate([[True]] * 5) == wilson_interval(1.0, 5)
        assert rate([[None], []]) is None

    def test_outcomes_of_one_prompt_that_always_agree_count_as_one(self) -> None:
        alike, single = rate([[True] * 8] * 30 + [[False] * 8] * 70), wilson_interval(0.3, 100)
        assert alike == single

    def test_the_interval_covers_the_truth_as_often_as_it_says(self) -> None:
        """Prompts of different difficulty, four samples of each."""
        random = np.random.default_rng(0)
        covered = 0
        for _ in range(400):
            ease = random.beta(1, 2, size=120)
            found = rate((random.random((120, 4)) < ease[:, None]).tolist())
            assert found is not None
            covered += found.low <= 1 / 3 <= found.high
        assert 0.92 <= covered / 400 <= 0.98

    def test_samples_are_averaged_and_any_of_them_is_told(self) -> None:
        def answer(*strict: bool | None) -> Answer:
            return Answer("", 1, "stop", verdicts=[Verdict(f"i:{n}", one, True) for n, one in enumerate(strict)])

        answers = [[answer(True, True), answer(True, False)], [answer(False), answer(False)], [answer(None)] * 2]
        found = {name: (one.value, one.count) for name, one in scores(answers).items()}
        assert found == {
            "prompt_strict": (0.25, 2),
            "prompt_strict_any": (0.5, 2),
            "instruction_strict": (0.5, 2),
            "prompt_loose": (1.0, 3),
            "prompt_loose_any": (1.0, 3),
            "instruction_loose": (1.0, 3),
        }
        rates = {name: (strict.value, strict.count) for name, (strict, _) in by_instruction(answers).items()}
        assert rates == {"i:0": (0.5, 2), "i:1": (0.5, 1)}

    def test_rewards_count_what_could_be_scored_alone(self) -> None:
        group = [Answer("", 1, "stop", reward=1.0), Answer("", 1, "stop", unscored="timeout")]
        assert scores([group[:1], group[1:]])["pass"].count == 1
        suite = Suite("s", "s", [Item("a", [{"role": "user", "content": "x"}], [], None)] * 2)
        result = Result(suite, "m", {"max_tokens": 9}, [group[:1], group[1:]], {}, 0.0, {})
        assert result.to_dict()["unscored"] == {"timeout": 1}
        assert result.notes() == ["not judged: 1 × timeout"]


class TestSuites:
    def test_ifbench_has_its_294_prompts_and_a_verifier_for_each(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of them draws an argument
            suite = open_suite("ifbench")
        assert len(suite.items) == 294
        skipped = unavailable([(item.text, item.instructions) for item in suite.items])
        assert all("NLTK data" in reason for reason in skipped.values())
        answered = judge(suite.items[0].instructions, suite.items[0].text, "kaleidoscope", skipped)
        assert [verdict.strict for verdict in answered] == [False]

    def test_shards_and_both_forms_of_jsonl_say_the_same(self, tmp_path: Path) -> None:
        verifier = {"instructions": [{"id": "keywords:existence", "kwargs": {"keywords": ["fox"]}}]}
        row = {"id": "a", "messages": [{"role": "user", "content": "Say fox."}], "response": None}
        write_shard(tmp_path / "s.arrow", [row | {"verifier": json.dumps(verifier)}])
        own = {"key": "a", "prompt": "Say fox.", "instruction_id_list": ["keywords:existence"]}
        lines = [row | {"verifier": verifier}, own | {"kwargs": [{"keywords": ["fox"], "letter": None}]}]
        (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
        items = open_suite(str(tmp_path / "s.arrow")).items + open_suite(str(tmp_path / "s.jsonl")).items
        assert len(items) == 3
        for item in items:
            assert (item.id, item.text) == ("a", "Say fox.")
            assert judge(item.instructions, item.text, "A fox.", {})[0].strict is True

    def test_heldout_is_in_the_order_of_training(self, tmp_path: Path, tiny: Path) -> None:
        from helpers_toy import toy_config

        from uniapl.config import load_config
        from uniapl.data.sources import heldout_prompts

        config = load_config(toy_config(tmp_path, tiny))
        items = open_suite("heldout", config.data.heldout, limit=4).items
        assert [item.id for item in items] == [prompt.id for prompt in heldout_prompts(config, 4)]


GOOD = {"prompt": "Say fox.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
BAD = [
    ("not json", r"row 0: not JSON; allowed: an object with 'prompt' or 'messages'"),
    ([1], "row 0: a JSON list; allowed: an object"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "row 0: column prompt: got .*None"),
    (GOOD | {"instruction_id_list": ["no:such"]}, "row 0: unknown instruction 'no:such'; allowed: one of IFEval's or"),
    (GOOD | {"kwargs": []}, r"row 0: kwargs: got \[\]; allowed: one object for each of 1 ids"),
    (GOOD | {"instruction_id_list": "x"}, "row 0: instruction_id_list: got 'x'; allowed: a list of ids"),
    (GOOD | {"kwargs": [{"x": 1}]}, "row 0: the kwargs of 'punctuation:no_comma': .*unexpected keyword argument 'x'"),
    (GOOD | {"prompt": "  "}, "row 0: column messages: message 0: content empty"),
]


class TestCommand:
    @pytest.mark.parametrize(("row", "message"), BAD, ids=range(len(BAD)))
    def test_a_bad_row_is_one_line(self, tmp_path: Path, tiny: Path, capsys: Any, row: Any, message: str) -> None:
        path = tmp_path / "suite.jsonl"
        path.write_text(row if isinstance(row, str) else json.dumps(row))
        self.fails(capsys, [str(tiny), "--suite", str(path)], f"^{path}: {message}")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["MODEL", "--suite", "heldout"], "--suite: got 'heldout', which are the data.heldout shards of a run"),
            (["MODEL", "--suite", "gsm8k"], "--suite: got 'gsm8k'; allowed: ifeval, ifbench, heldout, or a .jsonl"),
            (["MODEL", "--suite", "none.jsonl"], "none.jsonl: No such file or directory; allowed: a .jsonl file"),
            (["MODEL", "--suite", "none.arrow"], "none.arrow: no such file; allowed: existing .arrow or .parquet"),
            (["MODEL", "--suite", "ifeval", "--samples", "2"], "--samples: got 2, all alike at temperature 0"),
            (["MODEL", "--suite", "ifeval", "--max-tokens", "500"], r"--max-tokens: got 500; allowed: <= \d+, since"),
            (
                ["TOY", "--suite", "TOY/toy.arrow"],
                "--suite: .*toy.arrow has prompts without instructions; allowed: with",
            ),
            (["EMPTY", "--suite", "ifeval"], "holds neither config.yaml nor config.json; allowed: the folder of a run"),
            (["RUN", "--suite", "ifeval"], "holds no model/, which a run writes at its end; allowed: the folder that"),
        ],
    )
    def test_a_wrong_word_is_one_line(
        self, tmp_path: Path, tiny: Path, capsys: Any, arguments: list[str], message: str
    ) -> None:
        from helpers_toy import toy_config

        run = tmp_path / "run"
        toy_config(run, tiny).rename(run / "config.yaml")
        write_shard(tmp_path / "toy.arrow", toy_rows(0, 2))
        (tmp_path / "empty").mkdir()
        places = {"MODEL": str(tiny), "EMPTY": str(tmp_path / "empty"), "RUN": str(run), "TOY": str(tiny)}
        words = [places.get(word, word.replace("TOY/", f"{tmp_path}/")) for word in arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fails(capsys, words, message)

    @staticmethod
    def fails(capsys: Any, arguments: list[str], message: str) -> None:
        import re

        assert main(["eval", *arguments]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert re.search(message, line), line


EVALS = """
import json, sys
from cluster.cli import main
sys.exit(max(main(["eval", *words]) for words in json.loads(sys.argv[1])))
"""
PUBLISHED = ("ifeval", "ifbench")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where three evaluations by real engines left their results, and what they printed: a file in IFEval's form, whose
    second prompt asks for the impossible, and of the published suites the first prompts. One process: importing vLLM
    takes longer than all of them."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_model(folder / "model", positions=1024)  # IFBench's prompts are long
    long = {"relation": "at least", "num_words": 100}
    rows = [
        {"key": 7, "prompt": "say red fox", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "key": 8,
            "prompt": "say blue bird",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, long],
        },
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled = ["--samples", "2", "--temperature", "1", "--dtype", "float32"]
    commands = [["model", "--suite", "mine.jsonl", "--max-tokens", "8", *sampled]]
    commands += [["model", "--suite", name, "--limit", "4", "--max-tokens", "8"] for name in PUBLISHED]
    done = subprocess.run(
        [sys.executable, "-c", EVALS, json.dumps(commands)],
        cwd=folder,
        env=environment() | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "eval" / "model", done.stdout


def test_samples_of_a_model_on_a_file_in_ifevals_form(evaluated: tuple[Path, str]) -> None:
    """As a table; two samples of each of two prompts."""
    place, printed = evaluated
    output = printed.partition(end := "results: runs/eval/model/mine-k2-t1.json\n")[0] + end
    *_, how, results = output.splitlines()
    assert how.startswith("2 samples at 1, float32, up to 8 tokens, ")
    assert results == "results: runs/eval/model/mine-k2-t1.json"
    kept = json.loads((place / "mine-k2-t1.json").read_text())
    first, second = (group["responses"] for group in kept["responses"])
    assert len({one["text"] for one in first + second}) > 2, "sampled"
    comma_free = [one["verdicts"][0]["strict"] for one in first + second]
    assert comma_free == ["," not in one["text"] for one in first + second]
    assert [one["verdicts"][1]["strict"] for one in second] == [False, False]
    table = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    shown = {cells[1]: cells[2] for cells in table if len(cells) == 6}
    assert shown["prompts, strict"] == f"{sum(comma_free[:2]) / 4:.1%}"
    assert shown["prompts, strict, any of the samples"] == f"{any(comma_free[:2]) / 2:.1%}"
    assert shown["instructions, strict"] == f"{sum(comma_free) / 6:.1%}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_prompts_are_answered_and_judged(evaluated: tuple[Path, str], name: str) -> None:
    place, printed = evaluated
    assert f"results: runs/eval/model/{name}-greedy.json\n" in printed
    kept = json.loads((place / f"{name}-greedy.json").read_text())
    suite = open_suite(name, limit=4)
    assert [row["id"] for row in kept["responses"]] == [item.id for item in suite.items]
    strict = []
    for item, row in zip(suite.items, kept["responses"], strict=True):
        [found] = row["responses"]
        assert 0 < found["tokens"] <= 8
        verdicts = judge(item.instructions, item.text, found["text"], {})
        assert found["verdicts"] == [
            {"instruction": v.instruction, "strict": v.strict, "loose": v.loose} for v in verdicts
        ]
        strict += [verdict.strict for verdict in verdicts]
    score = kept["scores"]["instruction_strict"]
    assert (score["value"], score["count"]) == (sum(strict) / len(strict), 4)
