"""Whose character a reply is in, by its words: log-odds learned from replies of both sides (train questions only).

Pirates say "ye" and "matey". The rule sees single words, so that a change of subject can move it too: it stands beside
other measures, with its accuracy on replies that it did not learn from.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxsteer.errors import UserError
from jaxsteer.personas.items import Item, normal

SMOOTHING = 0.5
"""Added to the number of replies that hold a word, on both sides."""
LEAST = 2
"""Replies that must hold a word for it to count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordOdds:
    """Log-odds of every known word for the persona's side, nats."""

    odds: Mapping[str, float]
    threshold: float
    """Scores above it are the persona's: half-way between the mean scores of both sides."""

    def score(self, text: str, prompt: str = "") -> float | None:
        """Mean log-odds of the distinct known words of a text; None where it has none.

        Words of ``prompt`` do not count: a prompt may plant its own.
        """
        known = [self.odds[word] for word in words(text) - words(prompt) if word in self.odds]
        return sum(known) / len(known) if known else None

    def shows(self, text: str, prompt: str = "") -> bool | None:
        """Whether a text is in the persona's character; None where nothing tells."""
        score = self.score(text, prompt)
        return None if score is None else score > self.threshold


def words(text: str) -> set[str]:
    """The distinct words of a text, without case."""
    return set(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", normal(text)))


def learn_words(items: Sequence[Item]) -> WordOdds:
    """The odds of words in the answers of ``items``. Raises ``UserError`` where no word tells the sides apart."""
    sides = [[words(item.matching) for item in items], [words(item.not_matching) for item in items]]
    counts = [Counter(word for reply in side for word in reply) for side in sides]
    odds = {
        word: math.log((counts[0][word] + SMOOTHING) / (counts[1][word] + SMOOTHING))
        for word in sorted({*counts[0], *counts[1]})
        if counts[0][word] + counts[1][word] >= LEAST
    }
    rule = WordOdds(odds=odds, threshold=0.0)
    scores = [[s for item in items if (s := rule.score(reply(item))) is not None] for reply in (_matching, _other)]
    if not all(scores) or _mean(scores[0]) <= _mean(scores[1]):
        raise UserError(
            f"the two answers of {len(items)} questions cannot be told apart by their words: give more questions, or "
            "answers that differ"
        )
    return dataclasses.replace(rule, threshold=(_mean(scores[0]) + _mean(scores[1])) / 2)


def accuracy(rule: WordOdds, items: Sequence[Item]) -> float:
    """Share of the answers of ``items`` (others than it learned from) that the rule reads right; unread are wrong."""
    right = [rule.shows(item.matching) is True for item in items] + [
        rule.shows(item.not_matching) is False for item in items
    ]
    return sum(right) / len(right)


def _matching(item: Item) -> str:
    return item.matching


def _other(item: Item) -> str:
    return item.not_matching


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
