"""A persona rate with its controls, and when a rate is no evidence because one letter wins whatever is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.statistics import bootstrap_mean, changed_groups, difference_interval, mcnemar, wilson

R = TypeVar("R", bound=Record)

A_RATES = (0.1, 0.9)
"""A-rates outside of this range mean that a letter wins whatever the question says."""
A_RATE_SHIFT = 0.25
"""So does an A-rate this far from the baseline's."""


def letter_collapse(a_rate: float, baseline: float | None = None) -> bool:
    """Whether an A-rate, beside that without a prompt, says that one letter wins whatever is asked."""
    shifted = baseline is not None and abs(a_rate - baseline) > A_RATE_SHIFT
    return not A_RATES[0] <= a_rate <= A_RATES[1] or shifted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """The mean of paired differences."""

    value: float
    ci95: Interval | None = None
    """Over questions: of rates Newcombe's interval, of other numbers a bootstrap."""

    @classmethod
    def of_rates(cls, after: np.ndarray, before: np.ndarray, groups: Sequence[str]) -> Difference:
        """The change of a rate, from (n,) values of the same rows and the question of each."""
        return cls(value=float(np.mean(after - before)), ci95=difference_interval(after, before, groups))

    @classmethod
    def of_means(cls, change: np.ndarray, groups: Sequence[str], draws: int) -> Difference:
        """The mean of (n,) changes that are no rates, with ``draws`` samples of the bootstrap."""
        return cls(value=float(change.mean()), ci95=bootstrap_mean(change, groups, draws=draws))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flips(Record):
    """Questions that show the persona more, or less, than without a prompt, over both orders of their choices."""

    becomes_persona: CountFrom0
    leaves_persona: CountFrom0
    mcnemar_p: Share
    """Exact p-value of McNemar's test over these questions."""

    @classmethod
    def of(cls, change: np.ndarray, groups: Sequence[str]) -> Flips:
        """From the (n,) changes of rows and the question of each."""
        becomes, leaves = changed_groups(change, groups)
        return cls(becomes_persona=becomes, leaves_persona=leaves, mcnemar_p=mcnemar(becomes, leaves))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side(Record):
    """How likely a kind of reply is, per token."""

    log_prob: float
    """Mean over questions, nats."""
    change: Difference | None = None
    """Against the baseline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides(Record):
    """Which of two answers in words a prompt moved. A preference can be won by making the other answer unlikely, with
    no more of the behaviour than before."""

    persona: Side
    """The persona's answers."""
    other: Side
    yardstick: Side | None = None
    """Fluent replies to something else: a prompt that makes everything unlikely moves them too."""
    relative_rate: Share | None = None
    """The rate if an answer gains only what it rises beyond the yardstick, and nothing by the other's fall."""
    relative_ci95: Interval | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate(Record):
    """The persona rate of one prompt with its controls. ``None`` where a number is undefined or not measured."""

    rate: Share
    """Share of rows whose persona answer wins; a tie counts half."""
    ci95: Interval
    """Of the rate over questions (``statistics.rate_interval``)."""
    n: CountFrom0
    """Questions. What asks the same thing, in whatever order of choices, is one."""
    a_rate: Share
    """Share of rows won by the first answer, (A); near 0 or 1 one letter wins whatever is asked."""
    swapped_rate: Share | None
    """Share of items whose chosen *content* stays the same when the choices are exchanged."""
    auroc: Share | None
    """Of d = log P(first) - log P(second) against the position of the persona's answer: immune to a constant letter
    bias."""
    auroc_ci95: Interval | None
    rate_by_label: tuple[Share | None, Share | None]
    """The rate where the persona's answer is the first, and where it is the second."""
    margin: float
    """Mean log-odds of the persona's answer, nats."""
    probability: Share
    """Mean probability of the persona's answer, given one of the two."""
    letter_collapse: bool
    """Whether one letter wins whatever is asked (``letter_collapse``): the rate is no evidence then."""
    debiased_rate: Share | None = None
    """The rate after subtracting the letter preference item by item."""
    letter_bias: float | None = None
    """Mean (d + d') / 2 over the two orders of an item, nats."""
    difference: Difference | None = None
    """Of the rate, against the baseline."""
    margin_difference: Difference | None = None
    flips: Flips | None = None
    """Questions that turn to and from the persona's answer, against the baseline."""
    sides: Sides | None = None
    """For replies, which of the two a prompt moved."""

    def __repr__(self) -> str:
        low, high = self.ci95
        return f"Rate({self.rate:.2f}, {low:.2f} to {high:.2f}, n={self.n} questions)"

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> Rate:
        """The object that ``to_json`` wrote, or that an older version did."""
        found = super().from_json(record, where)
        return by_question(found, record, where) if counts_rows(record) else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Before(Record):
    """What only older versions wrote beside a rate."""

    ci95_groups: Interval | None = None
    """Bootstrap interval over questions."""


def counts_rows(record: Any) -> bool:
    """Whether a version wrote it whose ``ci95`` and ``n`` took the rows of a question for independent."""
    if not isinstance(record, Mapping):
        return False
    each = record.get("each")
    return "ci95_groups" in record or (isinstance(each, list) and any(map(counts_rows, each)))


def by_question(found: R, record: Any, where: str = "", *, rate: str = "rate", orders: int = 0, unread: int = 0) -> R:
    """What such a version wrote, with ``n`` in questions and without tests over rows.

    How far the orders of a question agreed is not in the file row by row: the interval is that of orders which always
    agree, or one that the file holds at the end where that is wider. ``orders`` of a rate are two if it has a
    ``swapped_rate``; ``unread`` rows count nowhere.
    """
    values: Any = found
    orders = orders or (1 if values.swapped_rate is None else 2)
    known = max(0, (values.n or 0) - unread) / orders
    share = min(1.0, max(0.0, getattr(values, rate) or 0.0))
    ends = [wilson(share * known, known), values.ci95, _Before.from_json(record, where).ci95_groups]
    lows, highs = zip(*(pair for pair in ends if pair is not None), strict=True)
    changed = {"n": values.n and values.n // orders, "ci95": (min(lows), max(highs)), "flips": None}
    return dataclasses.replace(values, **{name: value for name, value in changed.items() if hasattr(found, name)})
