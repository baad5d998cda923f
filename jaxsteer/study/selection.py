"""The best of several candidates: one rule for every table, by validation questions.

A candidate under which one letter wins whatever is asked comes after all others. Of the rest the one with the lowest
persona rate is the best, or with the highest where the goal is to elicit the persona; where rates are equal, the one
that its table says (the likelier text, the gentler edit, the lower probability of the persona's answer). Test questions
have no part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A rate that was not measured by letters."""

    rate: float
    letter_collapse: bool = False


def best_rate(candidates: Sequence[Any], ties: Sequence[Any], *, goal: str = "reduce", tolerance: float = 0.0) -> int:
    """The index of the best candidate by its ``rate`` on validation questions, and its ``letter_collapse``.

    Rates within ``tolerance`` of the best count as equal and are settled by the smallest of ``ties``, then by the
    order of the candidates. Raises ``ValueError`` for no candidates.
    """
    sound = [i for i, one in enumerate(candidates) if not one.letter_collapse] or list(range(len(candidates)))
    cost = [one.rate if goal == "reduce" else -one.rate for one in candidates]
    best = min(cost[i] for i in sound)
    near = [i for i in sound if cost[i] <= best + tolerance]
    return min(near, key=lambda i: (ties[i], i))


def by_replies(rates: Sequence[Any], replies: Sequence[Any], goal: str) -> Sequence[Any]:
    """What candidates are compared by: the rates of free replies where all have some and any could be read, else those
    of choices. A reply that could not be read counts against the goal."""
    free = [found for found in replies if found is not None]
    if len(free) < len(rates) or not any(found.read for found in free):
        return rates
    return [Candidate(found.at_worst(goal)) for found in free]


def best_prompt(
    rates: Sequence[Any], replies: Sequence[Any], ties: Sequence[float] | None = None, *, goal: str | None = None
) -> int:
    """The index of the best prompt for the goal (by default less of the persona), by ``by_replies``.

    Equal rates are settled by the mean probability of the persona's answer, then by the smallest of ``ties``.
    """
    sign = -1 if goal == "elicit" else 1
    settled = [(sign * rate.probability, tie) for rate, tie in zip(rates, ties or [0.0] * len(rates), strict=True)]
    return best_rate(by_replies(rates, replies, goal or "reduce"), settled, goal=goal or "reduce")
