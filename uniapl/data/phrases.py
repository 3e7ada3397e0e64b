"""Sentences that repairs add, written for this project; {t} is the topic of the instruction.

Whatever can become an argument of a constraint is given per split, so that held-out arguments stay new.
"""

from __future__ import annotations

Split = str

KEYWORD_SENTENCES: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("patience", "With a little patience it all makes sense."),
        ("smile", "That thought is sure to bring a smile."),
        ("details", "As so often, the small details matter most."),
        ("simple", "The idea behind it is quite simple."),
        ("people", "Many people would agree with that."),
        ("everyday", "It is a small part of everyday life."),
        ("surprise", "That may come as a surprise to some."),
        ("remember", "It is a good thing to remember."),
        ("value", "It is easy to see the value in that."),
        ("world", "It makes the world a little richer."),
        ("reason", "There is a good reason for that."),
        ("experience", "Experience is the best teacher here."),
        ("future", "It will matter just as much in the future."),
        ("beginning", "That is only the beginning of the story."),
    ),
    "heldout": (
        ("wonder", "It is no wonder that so many are curious about it."),
        ("lesson", "There is a lesson in that for all of us."),
        ("worth", "It is well worth a closer look."),
        ("heart", "That is the heart of the matter."),
        ("example", "It is a fine example to keep in mind."),
    ),
}

FORBIDDEN_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("very", "really", "things", "great", "important", "unique", "various"),
    "heldout": ("truly", "stuff", "amazing", "incredible"),
}

TOPIC_SENTENCES = (
    "There is more to {t} than meets the eye.",
    "There is always something new to learn about {t}.",
    "It is hard to imagine the world without {t}.",
    "One could say a lot more about {t}.",
)

END_PHRASES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Hope this helps!",
        "That sums it up!",
        "What do you think?",
        "Thanks for asking!",
        "Have a lovely day!",
        "Would you like to hear more?",
        "There is always more to learn!",
        "Does that make sense?",
        "And that is the short answer!",
    ),
    "heldout": (
        "Is there anything else you want to know?",
        "Stay curious!",
        "Isn't that nice?",
        "Ask me again any time!",
    ),
}

POSTSCRIPT_MARKERS: dict[Split, str] = {"train": "P.S.", "heldout": "P.P.S"}
POSTSCRIPTS = (
    "I could talk about {t} all day.",
    "There is always more to say about {t}.",
    "Thank you for asking about {t}.",
    "Let me know if you want to hear more about {t}.",
    "Is there anything you would add about {t}?",
    "Ask me about {t} any time.",
)

TITLES = ("All About {t}", "A Word on {t}", "A Few Words on {t}", "Thoughts on {t}")

PLACEHOLDER_SENTENCES: dict[int, tuple[str, ...]] = {
    1: ("Learn more at [website].", "Ask [name] for more.", "Read more in [book title].", "Signed, [your name]."),
    2: (
        "Ask [name] at [email] for more.",
        "Write to [name] at [address].",
        "Call [name] at [phone number] to learn more.",
    ),
    3: ("Ask [name] at [email] or visit [website].", "Meet [name] at [address] on [date] to learn more."),
}

OPENERS: dict[Split, tuple[str, ...]] = {
    "train": ("overall", "also", "indeed", "still", "besides", "today"),
    "heldout": ("ultimately", "moreover", "additionally"),
}
