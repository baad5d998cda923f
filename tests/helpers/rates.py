"""Rates made up for tests."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxsteer.evals.rates import Rate, letter_collapse


def made_rate(value: float, n: int = 240, a_rate: float = 0.5, **changes: Any) -> Rate:
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.002) / n)
    ci95 = (max(0.0, value - half), min(1.0, value + half))
    rate = Rate(
        rate=float(value), ci95=ci95, n=n, a_rate=a_rate, swapped_rate=0.93, auroc=0.5,
        auroc_ci95=(0.4, 0.6), rate_by_label=(value, value), margin=0.0, probability=float(value),
        letter_collapse=letter_collapse(a_rate),
    )  # fmt: skip
    return dataclasses.replace(rate, **changes)
