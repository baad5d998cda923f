"""How far a push moves each question: the slope of the preference over strengths, and what a mean of it hides.

Propensity is the log-odds of the persona's answer against the other (per token where answers are replies); a question
with lettered choices is asked in both orders, so that the letter cancels. Its slope over strengths is fitted by least
squares, question by question. Source: 2407.12404 (steerability, anti-steerable questions).

Letters: E strengths, n questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, choice_eval
from jaxsteer.evals.rates import Difference
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Item
from jaxsteer.prompts import Placement
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.statistics import bootstrap_mean, spearman, wilson

STRENGTHS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""In units of the vector that is under study."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steerability(Record):
    """Slopes of propensity over strength, nats per unit of strength. The unit of all intervals is the question."""

    slope: Difference
    """The mean, towards the persona's answer."""
    spread: float
    """Standard deviation between questions."""
    anti: Share
    """Share of questions that move against the mean."""
    anti_ci95: Interval
    residual: float
    """Root mean square distance from the lines, nats: 0 where propensity is linear in strength."""
    monotone: float
    """Mean rank correlation of strength and propensity within a question, in the direction of the mean slope."""
    n: CountFrom0
    """Questions."""
    propensity: tuple[float, ...]
    """Mean propensity at every strength."""
    strengths: tuple[float, ...]


def propensities(results: Sequence[ChoiceResult]) -> tuple[Float[np.ndarray, "E n"], tuple[str, ...]]:
    """Propensity of every question, and the questions: rows of one question (its orders, copies) are averaged."""
    groups = tuple(dict.fromkeys(results[0].groups))
    member = np.asarray([groups.index(group) for group in results[0].groups])
    counts = np.bincount(member)
    return np.stack([np.bincount(member, weights=result.margin) / counts for result in results]), groups


def steerability(margins: Float[np.ndarray, "E n"], strengths: Sequence[float], *, draws: int = 2000) -> Steerability:
    """What ``margins`` (propensity of n questions under E strengths, nats) say of a push.

    Raises ``UserError`` for fewer than three strengths or two questions, and for numbers that are not finite.
    """
    x, y = np.asarray(strengths, np.float64), np.asarray(margins, np.float64)
    if len(set(strengths)) < 3 or y.shape != (len(x), y.shape[-1]) or y.shape[1] < 2 or not np.isfinite(y).all():
        raise UserError(
            f"steerability is fitted to finite propensities of 2 or more questions under 3 or more strengths; got "
            f"{list(y.shape)} under {list(strengths)}"
        )
    centred = x - x.mean()
    slopes = centred @ y / (centred @ centred)
    lines = y.mean(0) + centred[:, None] * slopes
    mean = float(slopes.mean())
    towards = np.sign(mean) or 1.0
    anti = slopes * towards < 0
    ranks = [spearman(x, row) for row in y.T if np.ptp(row) > 0]
    return Steerability(
        slope=Difference(value=mean, ci95=bootstrap_mean(slopes, [str(i) for i in range(len(slopes))], draws=draws)),
        spread=float(slopes.std(ddof=1)),
        anti=float(anti.mean()),
        anti_ci95=wilson(int(anti.sum()), len(anti)),
        residual=float(np.sqrt(((y - lines) ** 2).mean())),
        monotone=float(np.mean(ranks) * towards) if ranks else 0.0,
        n=len(slopes),
        propensity=tuple(map(float, y.mean(1))),
        strengths=tuple(map(float, x)),
    )


def steer_each(
    model: Model,
    items: Sequence[Item],
    edits: Sequence[Intervention],
    prompts: str | Sequence[str] = "",
    *,
    placement: Placement = Placement(),
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "p E n"]:
    """Propensity of every question under every edit, with each of p ``prompts`` in its place.

    All edits run in one program. Raises ``UserError`` as ``choice_eval``.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    results = choice_eval(model, items, texts, placement=placement, variants=edits, progress=progress)
    margins, _ = propensities(results)
    return margins.reshape(len(edits), len(texts), -1).swapaxes(0, 1)
