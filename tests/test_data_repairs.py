"""Plain answers repaired to follow constraints, and the tools on text that this needs."""

import itertools
import random

import pytest

from uniapl.data import constraints as c
from uniapl.data.repairs import Draft, Unfit, belongs_to, repair
from uniapl.data.text import is_sound, sentences, similar, without_commas

SENTENCES = [
    "A bicycle is a simple machine, and it carries people, bags and dreams.",
    "Riders push the pedals to travel quietly through crowded streets.",
]
SPARE = ["Many commuters choose this vehicle because parking costs nothing.", "Children remember their earliest ride."]


def _draft(seed: int, split: str = "train") -> Draft:
    topic = {"train": "bicycle", "heldout": "skateboard"}[split]
    own = [sentence.replace("bicycle", topic) for sentence in SENTENCES]
    return Draft(split, topic, f"a {topic}", own, list(SPARE), list(SPARE), random.Random(seed))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("constraint", c.WEIGHTS)
def test_each_constraint_can_be_repaired(constraint: str, split: str) -> None:
    for seed in range(5):
        instructions, text = repair(_draft(seed, split), [constraint])
        assert [i["id"] for i in instructions] == [constraint]
        assert c.failed(instructions, text) == [], text


def test_most_pairs_of_constraints_can_be_repaired_together() -> None:
    """Where a pair cannot, the verifier finds out and the draft is dropped: never is a wrong answer kept."""
    pairs = [pair for pair in itertools.combinations(c.WEIGHTS, 2) if not c.conflict(*pair)]
    kept = 0
    for pair in pairs:
        instructions, text = repair(_draft(1), list(pair))
        kept += c.failed(instructions, text) == []
    assert len(pairs) > 100
    assert kept > 0.95 * len(pairs)


EXPECTED = {
    c.QUOTATION: f'"{" ".join(SENTENCES)}"',
    c.LOWERCASE: " ".join(SENTENCES).lower(),
    c.CAPITAL: " ".join(SENTENCES).upper(),
    c.BULLETS: f"- {SENTENCES[0]}\n- {SENTENCES[1]}",
    c.PARAGRAPHS: f"{SENTENCES[0]}\n***\n{SENTENCES[1]}",
    c.SECTIONS: f"Section 1\n{SENTENCES[0]}\nSection 2\n{SENTENCES[1]}",
    c.TWO_RESPONSES: f"{SENTENCES[0]}\n******\n{SPARE[0]}",
    c.JSON: f'{{"answer": "{" ".join(SENTENCES)}"}}',
    c.NO_COMMA: f"A bicycle is a simple machine and it carries people bags and dreams. {SENTENCES[1]}",
}


@pytest.mark.parametrize("constraint", EXPECTED)
def test_what_a_repair_does(constraint: str) -> None:
    assert repair(_draft(1), [constraint])[1] == EXPECTED[constraint]


def test_title_postscript_and_end_phrase_stand_at_their_places() -> None:
    _, text = repair(_draft(0), [c.TITLE, c.POSTSCRIPT])
    first, *_, last = text.splitlines()
    assert first.startswith("<<")
    assert last.startswith("P.S. ")
    instructions, text = repair(_draft(0), [c.END])
    assert text.endswith(" " + instructions[0]["kwargs"]["end_phrase"])


def test_too_little_text_is_unfit() -> None:
    draft = _draft(0)
    draft.sentences, draft.leads = SENTENCES[:1], []
    with pytest.raises(Unfit, match="too few different sentences"):
        repair(draft, [c.TWO_RESPONSES])


@pytest.mark.parametrize("word", ["bicycle", "skateboard", "lantern", "wonder", "patience", "Table"])
def test_a_word_belongs_to_exactly_one_split(word: str) -> None:
    assert belongs_to(word, "train") != belongs_to(word, "heldout")


@pytest.mark.parametrize(
    ("sentence", "plain"),
    [
        ("It is red, blue, and green.", "It is red and blue and green."),
        ("In summer, people swim.", "In summer people swim."),
        ("It costs 1,000 coins, but it lasts.", "It costs 1000 coins but it lasts."),
        ("No commas here.", "No commas here."),
    ],
)
def test_commas_are_taken_out(sentence: str, plain: str) -> None:
    assert without_commas(sentence) == plain


def test_a_cut_off_sentence_is_left_out() -> None:
    assert sentences('"One is here. Two is too! And three was c') == ["One is here.", "Two is too!"]


@pytest.mark.parametrize(
    "sentence",
    [
        "Too short.",
        "I'm sorry, but as a language model I cannot say that.",
        "The garden is a garden where exploration, exploration and curiosity meet.",
        "Dear [Name], this is about the owls.",
        "Owls 🦉 are birds of the night.",
        "Owls are owls because they are owls of the night.",
    ],
)
def test_unsound_sentences_are_not_used(sentence: str) -> None:
    assert not is_sound(sentence, "owls")
    assert is_sound("Owls hunt at night and sleep through the day.", "owls")


def test_sentences_that_say_the_same_are_similar() -> None:
    assert similar("Courage helps people stand against danger.", "Courage lets people stand before danger.")
    assert not similar("Courage helps people stand against danger.", "Bread tastes better with butter.")
