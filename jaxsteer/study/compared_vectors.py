"""What ``compare`` measures of a steering vector: pushes of both signs at one disturbance, and how questions follow."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsteer.evals.calibration import Calibrated, Unreached, approach
from jaxsteer.evals.choice import ChoiceResult, choice_eval, first_rows, rate
from jaxsteer.evals.free_answers import WrittenResult, written_rates
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.evals.steerability import propensities, steer_each, steerability
from jaxsteer.models.model import Model
from jaxsteer.personas import Item, Persona
from jaxsteer.prompts import Placement
from jaxsteer.sae import SAE
from jaxsteer.steer import Edits, Vectors
from jaxsteer.study.comparison import ComparedVector, Push
from jaxsteer.study.free_replies import TEST_REPLIES, FreeReplies
from jaxsteer.study.vector_methods import CONTROLS, Method

PROMPT, SYSTEM = "Please keep it short.", "You are a helpful assistant who answers in plain words."
"""Other contexts: a sentence behind the question, and a system message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What every vector is measured on, and at which disturbance."""

    kl: float
    """Nats per token of neutral text."""
    strengths: tuple[float, ...]
    """Of both signs, without 0, in units of the strength at that disturbance; 1 and -1 are among them."""
    placement: Placement
    model: Model
    persona: Persona
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    others: dict[str, tuple[Item, ...]]
    neutral: list[np.ndarray]
    baseline: ChoiceResult
    free: FreeReplies | None
    said: WrittenResult | None
    """What is written without steering."""
    sae: SAE | None

    def written(self, edits: Edits | None) -> WrittenResult | None:
        """What is written freely under an edit, where answers are replies."""
        if self.free is None:
            return None
        few = self.test[:TEST_REPLIES]
        return self.free.written(self.model, few, [""], placement=self.placement, edits=edits)[0]


def chosen(bench: Bench, made: Sequence[Vectors]) -> Vectors:
    """The vector that does most for the goal on validation questions at the asked disturbance, with that strength.

    Where none reaches it: the one that comes nearest.
    """
    sign = bench.persona.sign
    found = _approached(bench, made, [sign])
    there = [i for i, one in enumerate(found) if isinstance(one, Calibrated)]
    best = max(range(len(made)), key=lambda i: found[i].kl) if not there else there[0]
    if len(there) > 1:
        edits = [made[i].edits(coefficient=found[i].coefficient) for i in there]
        pushed, _ = propensities(
            choice_eval(bench.model, bench.validation, [""], placement=bench.placement, variants=edits)
        )
        best = there[int(np.argmin(sign * pushed.mean(-1)))]
    return dataclasses.replace(made[best], coefficient=abs(found[best].coefficient))


def _approached(bench: Bench, vectors: Sequence[Vectors], signs: Sequence[int]) -> list[Calibrated | Unreached]:
    return approach(bench.model, vectors, bench.kl, signs=signs, placement=bench.placement)


def measured(
    bench: Bench, method: Method, draw: int, vectors: Vectors, mean: Vectors | None, advance: Any
) -> ComparedVector:
    """A vector's row: pushes of both signs, steerability here and in other contexts, and what predicted it.

    Of a sign that does not reach the disturbance there are no pushes, and without both signs no steerability.
    """
    (site,), model, test = vectors.sites, bench.model, bench.test
    ways = dict(zip((1, -1), _approached(bench, [vectors], [1, -1]), strict=True))
    facts = json.loads(vectors.metadata.get("diagnostics", "{}")).get(site, {})
    if mean is not None and mean.sites == vectors.sites and (vectors.norm(site) and mean.norm(site)):
        a, b = (one.arrays[site].astype(np.float64) for one in (vectors, mean))
        facts["cosine"] = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    row = ComparedVector(
        method=method,
        site=site,
        control=method in CONTROLS,
        predictors={name: float(value) for name, value in facts.items() if math.isfinite(value)},
        draw=draw if method in CONTROLS else None,
        pushes=(),
        unreached=tuple(one for one in ways.values() if isinstance(one, Unreached)),
    )
    reached = {sign: abs(one.coefficient) for sign, one in ways.items() if isinstance(one, Calibrated)}
    if not reached:
        return row
    strengths, effects = _bearable(bench, vectors, reached)
    edits = [vectors.edits(coefficient=c) for c in strengths.values()]
    results = choice_eval(model, test, [""], placement=bench.placement, variants=edits, progress=advance)
    pushes = []
    for (s, c), kl, perplexity, edit, result in zip(strengths.items(), *effects, edits, results, strict=True):
        said = bench.written(edit) if abs(s) == 1 else None
        replies = None if said is None else written_rates(said, first_rows(result, len(said.ids)), bench.said)
        pushes.append(
            Push(
                strength=s,
                coefficient=c,
                kl=float(kl),
                perplexity=float(perplexity),
                rate=rate(result, bench.baseline),
                replies=replies,
            )  # fmt: skip
        )
    left_out = tuple(s for s in bench.strengths if (1 if s > 0 else -1) in reached and s not in strengths)
    row = dataclasses.replace(row, pushes=tuple(pushes), not_finite=left_out)
    if len(reached) < 2:
        return row
    whole, _ = propensities([*results, bench.baseline])
    contexts = {}
    each = functools.partial(steer_each, model, edits=[*edits, vectors.edits(coefficient=0.0)])
    places = {
        "with a sentence": (test, PROMPT, bench.placement),
        "with a system message": (test, SYSTEM, Placement(style=bench.placement.style, slot="system")),
        **{f"on {name}": (items, "", bench.placement) for name, items in bench.others.items()},
    }
    if bench.placement.style == "plain" or any(role == "system" for item in test for role, _ in item.before):
        del places["with a system message"]
    for name, (items, prompt, placement) in places.items():
        (margins,) = each(items=items, prompts=[prompt], placement=placement, progress=advance)
        contexts[name] = steerability(margins, [*strengths, 0.0])
    found = steerability(whole, [*strengths, 0.0])
    return dataclasses.replace(row, steerability=found, contexts=contexts)


def _bearable(
    bench: Bench, vectors: Vectors, reached: dict[int, float]
) -> tuple[dict[float, float], tuple[np.ndarray, np.ndarray]]:
    """Coefficients by strength, of both signs, with KL and perplexity on neutral text; without those strengths beyond
    the calibrated ones under which it is not finite."""
    asked = {s: s * reached[sign] for s in bench.strengths if (sign := 1 if s > 0 else -1) in reached}
    with np.errstate(over="ignore"):
        found = side_effects(bench.model, bench.neutral, [vectors.edits(coefficient=c) for c in asked.values()])
    fine = np.isfinite(found.kl) & np.isfinite(found.perplexity)
    kept = {s: c for (s, c), good in zip(asked.items(), fine, strict=True) if good}
    return kept, (found.kl[fine], found.perplexity[fine])
