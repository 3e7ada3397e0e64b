"""How close a response is to the expert's: the share of words that both have."""

from uniapl.discriminators import ExpertScores


class WordOverlap:
    def scores(self, comparisons):
        return [ExpertScores(1.0, [overlap(c.expert, text) for text in c.responses]) for c in comparisons]


def overlap(expert, response):
    mine, theirs = (set(text.lower().replace(",", " ").split()) for text in (response, expert))
    return len(mine & theirs) / max(1, len(mine | theirs))
