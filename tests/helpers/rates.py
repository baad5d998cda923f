"""Rates made up for tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsteer.evals.choice import ChoiceResult
from jaxsteer.evals.rates import Rate, letter_collapse
from jaxsteer.prompts import Placement


def made_rate(value: float, n: int = 240, a_rate: float = 0.5, **changes: Any) -> Rate:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.002) / n)
    ci95 = (max(0.0, value - half), min(1.0, value + half))
    rate = Rate(
        rate=float(value), ci95=ci95, n=n, a_rate=a_rate, swapped_rate=0.93, auroc=0.5,
        auroc_ci95=(0.4, 0.6), rate_by_label=(value, value), margin=0.0, probability=float(value),
        letter_collapse=letter_collapse(a_rate),
    )  # fmt: skip
    return dataclasses.replace(rate, **changes)


def made_choices(d: Sequence[float], d_swapped: Sequence[float], matching_first: Sequence[bool]) -> ChoiceResult:
    """Answers to questions in both orders: log-odds of the first answer, and where the persona's answer stands."""
    rows = np.array([x for pair in zip(d, d_swapped, strict=True) for x in pair])
    first = [y for m in matching_first for y in (m, not m)]
    names = tuple(str(i) for i in range(len(d)) for _ in range(2))
    return ChoiceResult(
        prompt="p",
        placement=Placement(),
        ids=names,
        groups=names,
        both_orders=True,
        log_probs=np.stack([rows - 1, np.full(len(rows), -1.0)], axis=1),
        tokens=np.ones((len(rows), 2), int),
        persona_first=np.array(first),
        joined=np.zeros(len(rows), int),
    )
