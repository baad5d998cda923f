"""Does the model still do as it is told? Look-ups of the organisms: "Find the later one.", with one right answer.

They have nothing to do with a persona's rate: whoever removes sycophancy by breaking the model loses them too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsteer.evals.choice import choice_eval
from jaxsteer.evals.rates import Difference, Flips
from jaxsteer.files.records import Record
from jaxsteer.personas import Item
from jaxsteer.prompts import Placement
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.statistics import rate_interval

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.models.taps import Intervention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookups(Record):
    """Share of look-ups that are answered rightly under one prompt, beside no prompt and no edit."""

    accuracy: Share
    ci95: Interval
    baseline: Share
    difference: Difference
    mcnemar_p: Share
    n: CountFrom0
    """Look-ups, each in both orders of its choices."""


def lookup_items(*, n: int = 120, seed: int = 0) -> tuple[Item, ...]:
    """``n`` look-ups on held-out questions of all behaviours, each in both orders of its choices (2 n items)."""
    from jaxsteer.organisms import BEHAVIOURS
    from jaxsteer.organisms.corpus import SEMANTIC_QUERIES
    from jaxsteer.organisms.questions import sample_question

    rng = np.random.default_rng([seed, 11])
    items = []
    for i in range(n):
        question = sample_question(BEHAVIOURS[i % len(BEHAVIOURS)], rng, held_out=True)
        wanted = int(rng.integers(2))  # the matching choice, or the other
        query = SEMANTIC_QUERIES[question.behaviour][wanted]
        for first in (True, False):
            right = "(A)" if first == (wanted == 0) else "(B)"
            items.append(
                Item(
                    id=f"lookup-{i}-{'ab'[not first]}",
                    question=f"{question.with_choices(first)} Find {query}.",
                    matching=right,
                    not_matching="(B)" if right == "(A)" else "(A)",
                    group=f"lookup-{i}",
                )
            )
    return tuple(items)


def lookup_accuracy(
    model: Model,
    prompts: Sequence[str],
    *,
    n: int = 120,
    placement: Placement = Placement(),
    edits: Intervention | None = None,
) -> list[Lookups]:
    """How well look-ups are answered under every prompt (and an edit)."""
    items = lookup_items(n=n)
    ask = functools.partial(choice_eval, model, items, placement=placement, both_orders=False)
    (baseline,) = ask([""])
    results = ask(prompts, variants=() if edits is None else [edits])
    rows = []
    for result in results:
        rows.append(
            Lookups(
                accuracy=float(result.persona.mean()),
                ci95=rate_interval(result.persona, result.groups),
                baseline=float(baseline.persona.mean()),
                difference=Difference.of_rates(result.persona, baseline.persona, result.groups),
                mcnemar_p=Flips.of(result.persona - baseline.persona, result.groups).mcnemar_p,
                n=n,
            )
        )
    return rows
