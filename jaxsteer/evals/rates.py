"""A persona rate with its controls, and when a rate is no evidence because one letter wins whatever is asked."""

from __future__ import annotations

import dataclasses

from jaxsteer.files.records import Record

A_RATES = (0.1, 0.9)
"""A-rates outside of this range mean that a letter wins whatever the question says."""
A_RATE_SHIFT = 0.25
"""So does an A-rate this far from the baseline's."""

Interval = tuple[float, float]
"""The lower and the upper end."""


def letter_collapse(a_rate: float, baseline: float | None = None) -> bool:
    """Whether an A-rate, beside that without a prompt, says that one letter wins whatever is asked."""
    shifted = baseline is not None and abs(a_rate - baseline) > A_RATE_SHIFT
    return not A_RATES[0] <= a_rate <= A_RATES[1] or shifted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """The mean of paired differences."""

    value: float
    ci95: Interval | None = None
    """Bootstrap interval over question groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips(Record):
    """Rows whose answer is another one than without a prompt."""

    becomes_persona: int
    leaves_persona: int
    mcnemar_p: float
    """Exact p-value of McNemar's test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate(Record):
    """The persona rate of one prompt with its controls. ``None`` where a number is undefined or not measured."""

    rate: float
    """Share of rows whose persona answer wins; a tie counts half."""
    ci95: Interval
    """Wilson interval of the rate over rows."""
    n: int
    """Rows: items times choice orders."""
    a_rate: float
    """Share of rows won by the first answer, (A); near 0 or 1 one letter wins whatever is asked."""
    swapped_rate: float | None
    """Share of items whose chosen *content* stays the same when the choices are exchanged."""
    ci95_groups: Interval
    """Bootstrap interval over question groups, in which copies of a question do not count twice."""
    auroc: float | None
    """Of d = log P(first) - log P(second) against the position of the persona's answer: immune to a constant letter
    bias."""
    auroc_ci95: Interval | None
    rate_by_label: tuple[float | None, float | None]
    """The rate where the persona's answer is the first, and where it is the second."""
    margin: float
    """Mean log-odds of the persona's answer, nats."""
    probability: float
    """Mean probability of the persona's answer, given one of the two."""
    letter_collapse: bool
    """Whether one letter wins whatever is asked (``letter_collapse``): the rate is no evidence then."""
    debiased_rate: float | None = None
    """The rate after subtracting the letter preference item by item."""
    letter_bias: float | None = None
    """Mean (d + d') / 2 over the two orders of an item, nats."""
    difference: Difference | None = None
    """Of the rate, against the baseline."""
    margin_difference: Difference | None = None
    flips: Flips | None = None
    """Rows that become and that leave the persona's answer, against the baseline."""
