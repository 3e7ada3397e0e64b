"""Small tools on English text: sentences, content words, commas, and what counts as a sound sample."""

from __future__ import annotations

import itertools
import re

STOP_WORDS = frozenset(
    """
    about above after again against also because been before being below between both could does doing down during
    each even ever from further have having here into itself just like made make makes many more most much often
    only other over same should some such than that their them then there these they this those through under
    until upon very were what when where which while will with within without would your
    """.split()  # noqa: SIM905 (a list of words reads better so)
)

_UNSOUND = re.compile(
    r"sorry|\bassist|chatbot|language model|hugging|\bAI\b|one sentence|two sentences|short sentences|this question|"
    r"the answer|the request|advertisement|two-line|\bpoem\b|\bentry\b|opening sentence|\bkill|\bdie\b|"
    r"\ba [aeio](?!ne|u)|"
    r"[<>\[\]{}#*_:;|/\\`~–—]|\.\.",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without quotation marks around it; a last one that is cut off is left out."""
    text = " ".join(text.replace("’", "'").replace("“", '"').replace("”", '"').replace('"', "").split())
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    return [part for part in parts if part and part[-1] in ".!?"]


def is_sound(sentence: str, topic: str) -> bool:
    """Whether a sampled sentence is plain prose of 4 to 30 words that does not go in circles."""
    words = re.findall(r"[a-z']+", sentence.lower())
    return (
        4 <= len(words) <= 30
        and sentence.isascii()
        and sentence[0].isupper()
        and not _UNSOUND.search(sentence)
        and not _repeats(words, topic)
    )


def _repeats(words: list[str], topic: str) -> bool:
    stems = [word[:5] for word in words if len(word) > 3 and word not in STOP_WORDS and not mentions(word, topic)]
    adjacent = any(a == b for a, b in itertools.pairwise(words))
    about = sum(mentions(word, topic) for word in words)
    limit = 2 * (len(topic.split()) - 1) if " and " in topic else len(topic.split())
    return adjacent or len(set(stems)) < len(stems) or about > limit


def mentions(text: str, topic: str) -> bool:
    """Whether `text` holds a word of the topic, up to its ending."""
    stems = [word[: max(len(word) - 2, 3)] for word in topic.lower().split() if len(word) > 2 and word != "and"]
    return any(word.startswith(stem) for word in re.findall(r"[a-z']+", text.lower()) for stem in stems)


def content_words(text: str) -> list[str]:
    """The lower-case words of at least 5 letters that carry meaning, each once, in order."""
    words = re.findall(r"(?<![\w-])[a-z]{5,}(?![\w-])", text.lower())
    return [word for word in dict.fromkeys(words) if word not in STOP_WORDS]


def similar(a: str, b: str) -> bool:
    """Whether two sentences say much the same: at least a quarter of their content words are shared."""
    first, second = set(content_words(a)), set(content_words(b))
    return 4 * len(first & second) >= max(len(first | second), 1)


def without_commas(sentence: str) -> str:
    """The sentence with its commas taken out: `red, blue, and green` as `red and blue and green`."""
    pieces = re.split(r",\s+", re.sub(r"(?<=\d),(?=\d)", "", sentence))
    made = pieces[0]
    for number, piece in enumerate(pieces[1:], start=1):
        joined = re.match(r"(and|or|but|so)\b", piece)
        later = next((re.match(r"(and|or)\b", p) for p in pieces[number + 1 :] if re.match(r"(and|or)\b", p)), None)
        item = later is not None and not joined and len(piece.split()) <= 4
        made += f" {later.group(1)} {piece}" if item and later else f" {piece}"
    return made.replace(",", "")


def lower_first(sentence: str) -> str:
    """The sentence as it stands after `Also,`: small first letter, unless its first word is I."""
    return sentence if re.match(r"I\b", sentence) else sentence[0].lower() + sentence[1:]
