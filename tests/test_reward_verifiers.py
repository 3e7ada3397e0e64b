"""Built-in rewards: what each verifier accepts, and that it answers the same way every time."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from helpers_rewards import hide_nltk_data, make_prompt
from if_verifiable.common import evaluate_instructions

from uniapl.rewards import RewardResult, UnscorableError
from uniapl.rewards.answers import exact_match, last_number, math
from uniapl.rewards.instructions import ifbench, ifeval, registry

ENGLISH = "The quick brown fox jumps over the lazy dog while the children are watching from the garden"

# instruction, arguments, a response that follows it, one that does not
IFEVAL = [
    ("keywords:existence", {"keywords": ["fox", "dog"]}, ENGLISH, "The fox sleeps."),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, "relation": "at least"}, "fox fox", "fox"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ENGLISH, "The cat sleeps."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 1, "let_relation": "at least"}, "Lazy.", "Quick."),
    ("language:response_language", {"language": "de"}, "Das ist ein schöner Tag im Garten.", ENGLISH),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Two words.", "Now three words."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "One.\n\nTwo.",
        "One.\n\nThree.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "Dear [name],", "Dear Ann,"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write soon.", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "It is *important*.", "It is important."),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "a",
    ),
    ("detectable_format:json_format", {}, '{"a": 1}', "a: 1"),
    ("detectable_format:title", {}, "<<A title>>\nText.", "A title\nText."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi!"),
    ("startend:end_checker", {"end_phrase": "The end."}, "It was so. The end.", "The end. Or not."),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
    ("punctuation:no_comma", {}, "No pause here.", "Well, yes."),
    ("startend:quotation", {}, '"Quoted."', "Bare."),
]
IFBENCH = [
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "Two words.", "One."),
    ("count:numbers", {"N": 2}, "1 and 2", "1"),
    ("count:unique_word_count", {"N": 2}, "one two", "one one"),
    ("format:parentheses", {}, "(a (b (c (d (e)))))", "(a)"),
    ("format:no_whitespace", {}, "together", "two words"),
    ("sentence:keyword", {"word": "fox", "N": 1}, "A fox ran. It hid.", "It hid. A fox ran."),
    ("words:palindrome", {}, " ".join(["level"] * 10), "no"),
    ("repeat:repeat_change", {"prompt_to_repeat": "Write a poem"}, "Read a poem", "A poem"),
    ("custom:reverse_newline", {}, "no", "yes\nyes"),
]
NEEDS_NLTK_DATA = ["length_constraints:number_sentences", "change_case:capital_word_frequency"]


def instructions(*pairs: tuple[str, dict]) -> dict:
    return {"instructions": [{"id": name, "kwargs": kwargs} for name, kwargs in pairs]}


@pytest.mark.parametrize(("name", "kwargs", "followed", "not_followed"), IFEVAL, ids=[row[0] for row in IFEVAL])
def test_ifeval_tells_following_from_not_following(name, kwargs, followed, not_followed):
    prompt = make_prompt(instructions((name, kwargs)))
    assert ifeval(prompt, followed) == RewardResult(1.0, {name: True})
    assert ifeval(prompt, not_followed) == RewardResult(0.0, {name: False})


def test_every_ifeval_instruction_is_covered():
    assert {row[0] for row in IFEVAL} | set(NEEDS_NLTK_DATA) == set(registry("ifeval"))


@pytest.mark.parametrize(("name", "kwargs", "followed", "not_followed"), IFBENCH, ids=[row[0] for row in IFBENCH])
def test_ifbench_agrees_with_the_benchmarks_own_evaluation(name, kwargs, followed, not_followed):
    prompt = make_prompt(instructions((name, kwargs)))
    for response in (followed, not_followed, ENGLISH):
        [own], _ = evaluate_instructions(response, [name], [kwargs], "", registry("ifbench"))
        assert ifbench(prompt, response) == RewardResult(float(own.strict_pass), {name: own.strict_pass})


def test_the_reward_is_one_only_if_all_instructions_are_followed_and_the_checks_say_which():
    prompt = make_prompt(instructions(("punctuation:no_comma", {}), ("startend:quotation", {})))
    assert ifeval(prompt, '"Yes."') == RewardResult(1.0, {"punctuation:no_comma": True, "startend:quotation": True})
    assert ifeval(prompt, "Yes.") == RewardResult(0.0, {"punctuation:no_comma": True, "startend:quotation": False})


def test_an_instruction_that_stands_twice_counts_as_followed_only_if_both_are():
    twice = instructions(("keywords:existence", {"keywords": ["fox"]}), ("keywords:existence", {"keywords": ["cat"]}))
    assert ifeval(make_prompt(twice), ENGLISH) == RewardResult(0.0, {"keywords:existence": False})


def test_an_empty_response_follows_nothing_and_a_thought_is_not_part_of_the_answer():
    prompt = make_prompt(instructions(("punctuation:no_comma", {})))
    assert ifeval(prompt, "  ").value == 0.0
    assert ifeval(prompt, "<think>well, so</think>Yes.").value == 1.0


def test_verdicts_depend_on_nothing_but_prompt_and_response():
    """Checkers may draw from the global generator and detect languages by sampling."""
    prompt = make_prompt(instructions(("language:response_language", {"language": "en"})))
    response = "Hotel Restaurant Taxi Hallo Hello"

    def verdict(seed: int) -> float:
        random.seed(seed)
        return ifeval(prompt, response).value

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(verdict, range(60)))) == 1


UNSCORABLE = [
    (ifeval, None, "prompt 'p1' has no verifier; allowed: JSON text with the key 'instructions'"),
    (ifeval, "{not json", "prompt 'p1': the verifier is not JSON text"),
    (ifeval, [1], "prompt 'p1': the verifier has no key 'instructions'"),
    (ifeval, {"answer": "4"}, "prompt 'p1': the verifier has no key 'instructions'"),
    (ifeval, {"instructions": []}, "prompt 'p1': 'instructions' is not a list with at least one entry"),
    (
        ifeval,
        {"instructions": ["a"]},
        "prompt 'p1': an instruction is not of the form {'id': ..., 'kwargs': ...}",
    ),
    (ifeval, instructions(("no:such", {})), "prompt 'p1': unknown ifeval instruction 'no:such'"),
    (ifbench, instructions(("punctuation:no_comma", {})), "prompt 'p1': unknown ifbench instruction"),
    (
        ifeval,
        instructions(("punctuation:no_comma", [1])),
        "prompt 'p1': the kwargs of 'punctuation:no_comma' are not an object",
    ),
    (
        ifeval,
        instructions(("punctuation:no_comma", {"x": 1})),
        "prompt 'p1': the kwargs of 'punctuation:no_comma': .* unexpected keyword argument 'x'",
    ),
    (
        ifeval,
        instructions(("keywords:existence", {})),
        "prompt 'p1': the kwargs of 'keywords:existence': keywords is None; allowed: a value it takes",
    ),
    (
        ifeval,
        instructions(("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "at least"})),
        "prompt 'p1': the kwargs of 'keywords:letter_frequency': letter is '#'; allowed: a value it takes",
    ),
    (exact_match, {"answer": "..."}, "prompt 'p1': answer '...'; allowed: text with a letter or digit"),
    (exact_match, {"answer": None}, "prompt 'p1': answer None; allowed: text with a letter or digit"),
    (math, {"answer": "many"}, "prompt 'p1': answer 'many'; allowed: a number"),
    (math, {"answer": "1/0"}, "prompt 'p1': answer '1/0'; allowed: a number"),
]


@pytest.mark.parametrize(("reward", "verifier", "message"), UNSCORABLE)
def test_a_verifier_that_cannot_judge_is_an_error_never_a_zero(reward, verifier, message):
    with pytest.raises(UnscorableError, match=message.replace("{'id': ..., 'kwargs': ...}", ".*")):
        reward(make_prompt(verifier), "Some response.")


@pytest.fixture
def without_nltk_data(monkeypatch, tmp_path):
    hide_nltk_data(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}),
    ],
)
def test_missing_nltk_data_is_an_error_that_says_how_to_get_it(name, kwargs, without_nltk_data):
    with pytest.raises(UnscorableError, match=f"'{name}' needs NLTK data: python -m nltk.downloader punkt"):
        ifeval(make_prompt(instructions((name, kwargs))), ENGLISH)


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("Paris", "paris.", True),
        ("Paris", '  "PARIS"\n', True),
        ("New York", "new   york", True),
        ("ﬁne", "fine", True),
        (42, "42", True),
        ("Paris", "Paris, France", False),
        ("Paris", "", False),
    ],
)
def test_exact_match_ignores_case_spaces_and_punctuation_at_the_ends(answer, response, right):
    assert exact_match(make_prompt({"answer": answer}), response) == RewardResult(float(right), {"exact_match": right})


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("42", "It is 42.", True),
        ("0.75", "So x = 3/4", True),
        ("3/4", r"thus \boxed{\frac{3}{4}}, not 5", True),
        ("5", r"thus \boxed{\frac{3}{4}}, not 5", False),
        ("7", r"\boxed{1} or rather \boxed{\text{about } 7}", True),
        ("7", r"7 \boxed{nothing}", False),
        ("7", r"\boxed{7", True),
        ("1/3", "0.3333333333", False),
        (1234.5, "$1,234.50", True),
        ("50", "50%", True),
        ("-3", "x=−3", True),
        ("3", "5-3", True),
        ("1", "1/0", False),
        ("1", "9" * 5000, False),
        ("1", "none", False),
    ],
)
def test_math_compares_the_final_number_exactly(answer, response, right):
    assert math(make_prompt({"answer": answer}), response) == RewardResult(float(right), {"math": right})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000,000", Fraction(1_000_000)),
        ("1,2", Fraction(2)),
        (r"1{,}000", Fraction(1000)),
        (r"-\dfrac{1}{-4}", Fraction(1, 4)),
        (r"2\frac12", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("", None),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert last_number(text) == number
