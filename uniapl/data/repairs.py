"""Answers brought by rule to satisfy constraints, and the arguments of the constraints drawn to fit them.

A `Draft` starts as sentences that the model wrote for the plain instruction. Each constraint's repair
draws its arguments, changes the draft so that it will hold, and returns the arguments. Training and
held-out arguments never meet: words are dealt to one split or the other, counts by parity.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uniapl.data import constraints as c
from uniapl.data import phrases
from uniapl.data.instructions import HELDOUT_TOPICS, TRAIN_TOPICS
from uniapl.data.text import content_words, lower_first, similar, without_commas

Kwargs = dict[str, Any]
LETTERS = {"train": "etanirdu", "heldout": "oshlcm"}
HELDOUT_SHARE = 5  # one in so many words is dealt to the held-out split


class Unfit(Exception):  # noqa: N818 (no error: the next draft is tried)
    """This draft cannot be made to follow the constraint; the text is the reason."""


@dataclass
class Draft:
    """An answer in the making.

    `sentences` are the model's; `spare` are further ones of its for the same instruction, `leads` the
    first ones of its other samples; `added` come from repairs. `phrase` is the topic with its article.
    """

    split: str
    topic: str
    phrase: str
    sentences: list[str]
    spare: list[str]
    leads: list[str]
    rng: random.Random
    added: list[str] = field(default_factory=list)
    layout: Callable[[list[str]], str] = " ".join
    title: str = ""
    postscript: str = ""
    end_phrase: str = ""
    finish: list[Callable[[str], str]] = field(default_factory=list)

    def body(self) -> str:
        """The running text, without title, postscript and end phrase."""
        return " ".join([*self.sentences, *self.added])

    def render(self) -> str:
        """The answer."""
        between = "\n" if self.layout is _bulleted else " "
        text = between.join(part for part in (self.layout(self.sentences), *self.added, self.end_phrase) if part)
        text = "\n".join(part for part in (self.title, text, self.postscript) if part)
        for change in self.finish:
            text = change(text)
        return text


def repair(draft: Draft, chosen: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The constraints with their arguments, in the order given, and the answer.

    Raises:
        Unfit: the draft cannot follow one of them.
    """
    early = [constraint for constraint in REPAIRS if constraint in chosen]
    kwargs = {constraint: REPAIRS[constraint](draft) for constraint in early}
    text = draft.render()
    kwargs |= {constraint: MEASURED[constraint](draft, text) for constraint in MEASURED if constraint in chosen}
    return [{"id": constraint, "kwargs": kwargs[constraint]} for constraint in chosen], text


def belongs_to(word: str, split: str) -> bool:
    """Whether a word may be an argument of this split: topic words stay with their topics, others are dealt out."""
    word = word.lower()
    if word in _HELDOUT_WORDS or word in _TRAIN_WORDS:
        return word in (_HELDOUT_WORDS if split == "heldout" else _TRAIN_WORDS - _HELDOUT_WORDS)
    return (zlib.crc32(word.encode()) % HELDOUT_SHARE == 0) == (split == "heldout")


def _words_of(topics: dict[str, str], sentences: tuple[tuple[str, str], ...], more: tuple[str, ...]) -> set[str]:
    named = {word for text in topics.values() for word in re.findall(r"[a-z]+", text.lower())}
    return named | {keyword for keyword, _ in sentences} | set(more)


_TRAIN_WORDS = _words_of(TRAIN_TOPICS, phrases.KEYWORD_SENTENCES["train"], phrases.FORBIDDEN_WORDS["train"])
_HELDOUT_WORDS = _words_of(HELDOUT_TOPICS, phrases.KEYWORD_SENTENCES["heldout"], phrases.FORBIDDEN_WORDS["heldout"])


def _parts(draft: Draft, count: int, filler: bool = True) -> list[str]:
    """Exactly `count` different sentences: with spare ones, then up to two fillers, where the draft has too few."""
    parts = draft.sentences[:count]
    about = draft.rng.choice(phrases.TOPIC_SENTENCES).format(t=draft.phrase)
    fillers = [about, draft.rng.choice(phrases.KEYWORD_SENTENCES[draft.split])[1]] if filler else []
    for sentence in [*draft.spare, *fillers]:
        if len(parts) < count and not any(similar(sentence, part) for part in parts):
            parts.append(sentence)
    if len(parts) < count:
        raise Unfit("too few different sentences")
    return parts


def _existence(draft: Draft) -> Kwargs:
    """Words of the answer, and often one that only an added sentence brings in."""
    keywords = [word for word in content_words(draft.body()) if belongs_to(word, draft.split)]
    chosen = draft.rng.sample(keywords, min(len(keywords), draft.rng.choice((1, 1, 2))))
    if not chosen or draft.rng.random() < 0.6:
        keyword, sentence = draft.rng.choice(phrases.KEYWORD_SENTENCES[draft.split])
        draft.added.append(sentence)
        chosen = [*chosen[:1], keyword] if keyword not in chosen else chosen
    return {"keywords": sorted(chosen)}


def _frequency(draft: Draft) -> Kwargs:
    """The topic's own last word: asked for again and again, or only so often."""
    keyword = draft.topic.split()[-1].rstrip("s") if draft.rng.random() < 0.3 else draft.topic.split()[-1]
    if not belongs_to(keyword, draft.split):
        raise Unfit("no keyword of this split")
    frequency = {"train": 2, "heldout": 3}[draft.split]
    relation = draft.rng.choice(("at least", "at least", "less than"))
    found = len(re.findall(keyword, draft.body(), flags=re.IGNORECASE))
    if relation == "less than":
        frequency = {"train": draft.rng.choice((2, 4)), "heldout": 3}[draft.split]
        return {"keyword": keyword, "frequency": frequency, "relation": relation}
    for sentence in draft.rng.sample(phrases.TOPIC_SENTENCES, max(frequency - found, 0)):
        draft.added.append(sentence.format(t=draft.phrase))
    return {"keyword": keyword, "frequency": frequency, "relation": relation}


def _forbidden(draft: Draft) -> Kwargs:
    """Words that the model used in its other samples, or overused ones."""
    text = draft.body().lower()
    used = [w for w in content_words(" ".join(draft.spare)) if belongs_to(w, draft.split)]
    words = used + list(phrases.FORBIDDEN_WORDS[draft.split])
    absent = [word for word in dict.fromkeys(words) if not re.search(rf"\b{word}\b", text)][:4]
    return {"forbidden_words": sorted(draft.rng.sample(absent, min(2, len(absent))))}


def _highlight(draft: Draft) -> Kwargs:
    """The longest content words of the answer, marked."""
    count = {"train": draft.rng.choice((1, 1, 3)), "heldout": 2}[draft.split]
    words = sorted(content_words(" ".join(draft.sentences)), key=len, reverse=True)
    chosen = [w for w in words if draft.topic.split()[-1] in w][:1] or words[:1]
    chosen += [word for word in words if word not in chosen][: count - len(chosen)]
    if len(chosen) < count:
        raise Unfit("too few words to highlight")
    for word in chosen:
        place = next(i for i, s in enumerate(draft.sentences) if re.search(rf"\b{word}\b", s, re.IGNORECASE))
        draft.sentences[place] = re.sub(rf"\b({word})\b", r"*\1*", draft.sentences[place], count=1, flags=re.IGNORECASE)
    return {"num_highlights": count}


def _bullets(draft: Draft) -> Kwargs:
    count = {"train": draft.rng.choice((2, 2, 2, 4)), "heldout": 3}[draft.split]
    draft.sentences = _parts(draft, count)
    draft.layout = _bulleted
    return {"num_bullets": count}


def _bulleted(parts: list[str]) -> str:
    return "\n".join(f"- {part}" for part in parts)


def _paragraphs(draft: Draft) -> Kwargs:
    count = {"train": 2, "heldout": 3}[draft.split]
    draft.sentences = _parts(draft, count)
    draft.layout = _starred
    return {"num_paragraphs": count}


def _starred(parts: list[str]) -> str:
    return "\n***\n".join(parts)


def _first_word(draft: Draft) -> Kwargs:
    count = {"train": 2, "heldout": 3}[draft.split]
    draft.sentences = _parts(draft, count)
    nth = count
    word = draft.rng.choice(phrases.OPENERS[draft.split])
    draft.sentences[nth - 1] = f"{word.capitalize()}, {lower_first(draft.sentences[nth - 1])}"
    draft.layout = _spaced
    return {"num_paragraphs": count, "nth_paragraph": nth, "first_word": word}


def _spaced(parts: list[str]) -> str:
    return "\n\n".join(parts)


def _sections(draft: Draft) -> Kwargs:
    marker, count = {"train": ("Section", 2), "heldout": ("SECTION", 3)}[draft.split]
    draft.sentences = _parts(draft, count)
    draft.layout = lambda parts: "\n".join(f"{marker} {i}\n{part}" for i, part in enumerate(parts, start=1))
    return {"section_spliter": marker, "num_sections": count}


def _two_responses(draft: Draft) -> Kwargs:
    draft.sentences = _parts(Draft(**{**vars(draft), "sentences": draft.sentences[:1], "spare": draft.leads}), 2, False)
    draft.layout = "\n******\n".join
    return {}


def _json(draft: Draft) -> Kwargs:
    draft.finish.append(lambda text: json.dumps({"answer": text}, ensure_ascii=False))
    return {}


def _title(draft: Draft) -> Kwargs:
    """The topic alone, or a phrase about it."""
    patterns = [_in_title_case(pattern.format(t=draft.phrase)) for pattern in phrases.TITLES]
    draft.title = f"<<{draft.rng.choice([_in_title_case(draft.topic), *patterns])}>>"
    return {}


def _in_title_case(text: str) -> str:
    first, *others = text.split()
    small = ("a", "an", "and", "at", "in", "of", "on", "the", "to", "with")
    return " ".join([first[0].upper() + first[1:], *(w if w in small else w[0].upper() + w[1:] for w in others)])


def _postscript(draft: Draft) -> Kwargs:
    marker = phrases.POSTSCRIPT_MARKERS[draft.split]
    text = draft.rng.choice(phrases.POSTSCRIPTS).format(t=draft.phrase)
    draft.postscript = f"{marker if marker.endswith('.') else marker + '.'} {text}"
    return {"postscript_marker": marker}


def _placeholders(draft: Draft) -> Kwargs:
    count = {"train": draft.rng.choice((1, 1, 3)), "heldout": 2}[draft.split]
    draft.added.append(draft.rng.choice(phrases.PLACEHOLDER_SENTENCES[count]))
    return {"num_placeholders": count}


def _end(draft: Draft) -> Kwargs:
    draft.end_phrase = draft.rng.choice(phrases.END_PHRASES[draft.split])
    return {"end_phrase": draft.end_phrase}


def _no_comma(draft: Draft) -> Kwargs:
    if any(sentence.count(",") > 3 for sentence in draft.sentences):
        raise Unfit("too many commas")
    draft.sentences = [without_commas(sentence) for sentence in draft.sentences]
    draft.finish.append(lambda text: text.replace(",", ""))
    return {}


def _case(change: Callable[[str], str]) -> Callable[[Draft], Kwargs]:
    def apply(draft: Draft) -> Kwargs:
        draft.finish.append(change)
        return {}

    return apply


def _quotation(draft: Draft) -> Kwargs:
    draft.finish.append(lambda text: f'"{text}"')
    return {}


def _number_of_words(draft: Draft, text: str) -> Kwargs:
    """A bound close to the answer's own length: even numbers in training, odd ones held out."""
    words = len(re.findall(r"\w+", text))
    parity = {"train": 0, "heldout": 1}[draft.split]
    if words >= 18 and draft.rng.random() < 0.5:
        bound = words - draft.rng.randint(0, 4)
        return {"num_words": bound - (bound % 2 != parity), "relation": "at least"}
    bound = words + draft.rng.randint(1, 4)
    return {"num_words": bound + (bound % 2 != parity), "relation": "less than"}


def _letter_frequency(draft: Draft, text: str) -> Kwargs:
    letter = draft.rng.choice(LETTERS[draft.split])
    found = text.lower().count(letter)
    parity = {"train": 0, "heldout": 1}[draft.split]
    if found >= 3 and draft.rng.random() < 0.5:
        bound = found - draft.rng.randint(0, 1)
        return {"letter": letter, "let_frequency": bound - (bound % 2 != parity), "let_relation": "at least"}
    bound = found + draft.rng.randint(1, 2)
    return {"letter": letter, "let_frequency": bound + (bound % 2 != parity), "let_relation": "less than"}


# In the order in which they are applied.
REPAIRS: dict[str, Callable[[Draft], Kwargs]] = {
    c.BULLETS: _bullets,
    c.PARAGRAPHS: _paragraphs,
    c.FIRST_WORD: _first_word,
    c.SECTIONS: _sections,
    c.TWO_RESPONSES: _two_responses,
    c.NO_COMMA: _no_comma,
    c.EXISTENCE: _existence,
    c.FREQUENCY: _frequency,
    c.PLACEHOLDERS: _placeholders,
    c.FORBIDDEN: _forbidden,
    c.HIGHLIGHT: _highlight,
    c.TITLE: _title,
    c.POSTSCRIPT: _postscript,
    c.END: _end,
    c.JSON: _json,
    c.LOWERCASE: _case(str.lower),
    c.CAPITAL: _case(str.upper),
    c.QUOTATION: _quotation,
}

# Arguments that are read off the finished answer.
MEASURED: dict[str, Callable[[Draft, str], Kwargs]] = {c.WORDS: _number_of_words, c.LETTERS: _letter_frequency}
