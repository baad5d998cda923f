"""Words tell characters apart, on replies that the rule did not learn from, and not by the prompt's own words."""

import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.word_odds import accuracy, learn_words
from jaxsteer.personas import Item


def items(pairs):
    return [Item(id=str(i), question="q", matching=a, not_matching=b, group=str(i)) for i, (a, b) in enumerate(pairs)]


TRAIN = items(
    [
        ("Arr, the sea is me home, matey", "The sea is a large body of water"),
        ("Matey, fetch me rum, arr", "Water is a useful thing to fetch"),
        ("Arr! Me ship sails the sea", "A useful ship sails on water"),
    ]
)


def test_words_tell_the_sides_apart():
    rule = learn_words(TRAIN)
    assert rule.odds["arr"] > 1 and rule.odds["water"] < -1 and "rum" not in rule.odds  # seen in one reply only
    assert rule.shows("ARR, good day") is True and rule.shows("Useful water") is False
    assert rule.shows("Nothing known here") is None
    assert rule.shows("Arr useful water", prompt="say arr") is False  # what the prompt says is not the model's own
    assert accuracy(rule, items([("Arr me", "water"), ("unknown", "useful")])) == pytest.approx(3 / 4)


def test_replies_alike_are_refused():
    with pytest.raises(UserError, match="cannot be told apart"):
        learn_words(items([("same words here", "here same words")] * 3))
