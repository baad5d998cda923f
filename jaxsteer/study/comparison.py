"""What a comparison of steering vectors found: every method at equal disturbance, with controls and predictors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsteer.display import aligned, decimals, interval, percent, wrapped
from jaxsteer.evals.calibration import Unreached
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates, is_illusion
from jaxsteer.evals.rates import Difference, Rate
from jaxsteer.evals.steerability import Steerability
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0
from jaxsteer.runs.files import TABLE_FORMAT
from jaxsteer.runs.result import Result
from jaxsteer.study.results import Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {1: "away", -1: "towards"}
"""Of a push, by its sign: from the persona, or to it."""
PREDICTORS = {
    "agreement": "agreement", "separability": "d'", "auroc": "AUROC", "split_half_cosine": "split-half",
    "cosine": "cosine to the mean difference", "latents": "share of latents",
}  # fmt: skip
"""What is known of a vector before it steers, by its heading."""


def _range(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """The mean, with the smallest and the largest where there are several."""
    if not len(values):
        return "-"
    ends = f" ({shown(min(values))} to {shown(max(values))})" if len(values) > 1 else ""
    return shown(float(np.mean(values))) + ends


def _slope(found: Sequence[Steerability]) -> str:
    """A mean slope with its interval over questions, or with the range over draws."""
    if len(found) == 1:
        return _with_ends(found[0].slope)
    return _range([one.slope.value for one in found], lambda value: f"{value:.2f}")


def _named(drawn: Sequence[ComparedVector]) -> str:
    many = f", {len(drawn)} draws" * (len(drawn) > 1)
    return drawn[0].method + f" (control{many})" * drawn[0].control


def _site(drawn: Sequence[ComparedVector]) -> str:
    sites = dict.fromkeys(vector.site.replace("hook_", "") for vector in drawn)
    return next(iter(sites)) if len(sites) == 1 else "several"


def _with_ends(found: Difference) -> str:
    """A mean with its interval."""
    ends = "" if found.ci95 is None else f" ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})"
    return f"{found.value:.2f}{ends}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push(Record):
    """One strength of a vector, on test questions."""

    strength: float
    """In units of the strength that was calibrated, with the sign of the push: 1 is away from the persona."""
    coefficient: float
    """In mean norms of the stream."""
    kl: float
    """On neutral text, nats per token."""
    perplexity: float
    rate: Rate
    replies: WrittenRates | None = None
    """What is written freely, where answers are replies; at the calibrated strengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedVector(Record):
    """One method's vector at the site that validation questions chose."""

    method: str
    site: str
    control: bool = False
    predictors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """On validation questions: agreement, separability, auroc; split_half_cosine of train questions; cosine to the mean
    difference at the same site; share of the SAE's latents that make it."""
    draw: CountFrom0 | None = None
    """Of a control that is drawn several times: which of its draws, counted from 0."""
    steerability: Steerability | None = None
    """None where a sign does not reach the disturbance."""
    contexts: Mapping[str, Steerability] = dataclasses.field(default_factory=dict)
    """Under other prompts, and on other data."""
    pushes: tuple[Push, ...]
    unreached: tuple[Unreached, ...] = ()
    """By sign, how near it came where no strength reaches the disturbance; there are no pushes of that sign then."""

    not_finite: tuple[float, ...] = ()
    """Strengths at which the model's logits were not finite; there are no pushes of them."""

    @property
    def name(self) -> str:
        """The method, with the number of the draw."""
        return self.method if not self.draw else f"{self.method} {self.draw + 1}"

    def short_of(self, sign: int) -> Unreached | None:
        """How near the pushes of this sign came to the disturbance, where they do not reach it."""
        return next((one for one in self.unreached if one.sign == sign), None)

    def at(self, strength: float) -> Push | None:
        """The push of this strength."""
        return next((push for push in self.pushes if push.strength == strength), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """Methods of steering side by side; metrics.json is its serialised form."""

    kind: str = "comparison"
    model: str
    fingerprint: str
    persona: str
    goal: str = "reduce"
    kl: float
    """The disturbance that strength 1 and -1 are calibrated to, nats per token of neutral text."""
    read_position: str
    baseline: Rate
    """Without steering."""
    baseline_replies: WrittenRates | None = None
    vectors: tuple[ComparedVector, ...]
    questions: CountFrom0
    neutral_tokens: CountFrom0
    timing: Timing
    environment: Mapping[str, Any]

    @property
    def in_words(self) -> bool:
        """Whether the result is what is written freely."""
        return self.baseline_replies is not None

    @property
    def methods(self) -> tuple[tuple[ComparedVector, ...], ...]:
        """The vectors of each method: one, or all draws of a control."""
        names = dict.fromkeys(vector.method for vector in self.vectors)
        return tuple(tuple(vector for vector in self.vectors if vector.method == name) for name in names)

    def row(self, drawn: Sequence[ComparedVector], sign: int) -> dict[str, str]:
        """A method's pushes of one sign, in cells by heading; of several draws means and ranges."""
        pushes = [push for vector in drawn if (push := vector.at(float(sign))) is not None]
        cells = {"method": _named(drawn), "site": _site(drawn), "push": WAYS[sign]}
        if not pushes:
            near = max(
                (one for vector in drawn if (one := vector.short_of(sign))), key=lambda one: one.kl, default=None
            )
            if near is None:
                return {}
            why = f"cannot reach {self.kl:g}"
            return cells | {"strength": f"{near.coefficient:.3g}", "KL": f"{near.kl:.2g}", "rate": why}
        if len(drawn) > 1:
            return cells | self._spread(drawn, pushes)
        push = pushes[0]
        replies, margin = push.replies, push.rate.margin_difference
        mark = "!" * push.rate.letter_collapse + "~" * (self.in_words and is_illusion(push.rate, replies))
        cells |= {
            "strength": f"{push.coefficient:.2f}",
            "KL": f"{push.kl:.2f}",
            "rate": interval(push.rate) + mark,
            "margin": "-" if margin is None else _with_ends(margin),
            "perplexity": f"{push.perplexity:.3g}",
        }
        if self.in_words:
            cells["free replies"] = "-" if replies is None or replies.rate is None else interval(replies)
            cells["distinct 3-grams"] = "-" if replies is None else percent(replies.distinct_3)
        return cells

    def _spread(self, drawn: Sequence[ComparedVector], pushes: Sequence[Push]) -> dict[str, str]:
        """Means over the draws of a control, with the smallest and the largest."""
        short = len(drawn) - len(pushes)
        margins = [push.rate.margin_difference.value for push in pushes if push.rate.margin_difference is not None]
        cells = {
            "strength": f"{np.mean([push.coefficient for push in pushes]):.2f}",
            "KL": f"{np.mean([push.kl for push in pushes]):.2f}",
            "rate": _range([push.rate.rate for push in pushes], percent)
            + "!" * any(push.rate.letter_collapse for push in pushes)
            + f", {short} cannot reach {self.kl:g}" * bool(short),
            "margin": _range(margins, lambda value: f"{value:.2f}"),
            "perplexity": f"{np.mean([push.perplexity for push in pushes]):.3g}",
        }
        if self.in_words:
            said = [push.replies for push in pushes if push.replies is not None]
            cells["free replies"] = _range([one.rate for one in said if one.rate is not None], percent)
            distinct = [one.distinct_3 for one in said if one.distinct_3 is not None]
            cells["distinct 3-grams"] = percent(float(np.mean(distinct))) if distinct else "-"
        return cells

    def facts(self, drawn: Sequence[ComparedVector]) -> dict[str, str]:
        """What is known of a method's vector and how questions follow it, in cells by heading."""
        heads = {n: h for n, h in PREDICTORS.items() if any(n in one.predictors for one in self.vectors)}
        cells = {"method": _named(drawn)}
        for name, head in heads.items():
            known = [vector.predictors.get(name, math.nan) for vector in drawn]
            cells[head] = _range([one for one in known if math.isfinite(one)], lambda value: decimals(value, 2))
        followed = [vector.steerability for vector in drawn if vector.steerability is not None]
        if not followed:
            return cells
        both = lambda value: f"{value:.2f}"  # noqa: E731
        cells |= {
            "slope": _slope(followed),
            "spread": _range([one.spread for one in followed], both),
            "residual": _range([one.residual for one in followed], both),
            "against": _range([one.anti for one in followed], percent),
        }
        for name in drawn[0].contexts or next((v.contexts for v in drawn if v.contexts), {}):
            cells[name] = _slope([vector.contexts[name] for vector in drawn if name in vector.contexts])
        return cells

    def tables(self) -> dict[str, list[dict[str, str]]]:
        """Cells of the tables by title."""
        pushed = [row for drawn in self.methods for sign in (1, -1) if (row := self.row(drawn, sign))]
        none = {name: "" for row in pushed for name in row}
        none |= {"method": "no steering", "KL": "0", "rate": interval(self.baseline)}
        if self.baseline_replies is not None:
            none |= {"free replies": interval(self.baseline_replies)}
            none["distinct 3-grams"] = percent(self.baseline_replies.distinct_3)
        return {
            f"At a KL of {self.kl:g} nats on neutral text": [none, *pushed],
            "What predicts it, and how questions follow": [self.facts(drawn) for drawn in self.methods],
        }

    def table(self) -> str:
        """Both tables for the terminal."""
        head = f"Steering vectors for {self.persona} on {self.model}: {self.questions} test questions"
        parts = [head]
        for title, rows in self.tables().items():
            columns = list(dict.fromkeys(name for row in rows for name in row))
            cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
            parts.append(f"{title}\n\n{aligned(cells)}")
        parts += map(wrapped, self.notices())
        parts.append(wrapped(self.legend()))
        return "\n\n".join(parts)

    def notices(self) -> list[str]:
        """What could not be measured, vector by vector."""
        return [
            f"{vector.name}: the model's logits were not finite at strengths {', '.join(f'{s:g}' for s in some)}"
            for vector in self.vectors
            if (some := vector.not_finite)
        ]

    def legend(self) -> str:
        """What the headings mean."""
        illusion = f" ~ {ILLUSION}." if self.in_words else ""
        return (
            "Rates are those of the persona, with 95 % intervals over questions. Strength: mean norms of the stream. "
            "Margin: mean change of the persona's log-odds, nats. Slope: of these log-odds over strength, in nats per "
            "calibrated strength; below 0 where going along the vector leads away from the persona. Spread: its "
            "standard deviation between questions. Residual: distance of the log-odds from the lines. Against: "
            "questions that move against the mean. An interval says how sure a number is for this vector; whether it "
            "means anything is said by the random ones beside it, because what any push does bends both signs one way "
            "and leaves a slope. Of a control with several draws: the mean over them, with the smallest and the "
            "largest. Cannot reach: no strength has that disturbance; strength and KL are the nearest below it. "
            f"! one letter wins whatever is asked.{illusion}"
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per method and strength."""
        return [
            {
                "method": vector.method,
                "draw": vector.draw,
                "site": vector.site,
                **{name: getattr(push, name) for name in ("strength", "coefficient", "kl", "perplexity")},
                "rate": push.rate.rate,
                "rate_low": push.rate.ci95[0],
                "rate_high": push.rate.ci95[1],
                "margin_change": None if push.rate.margin_difference is None else push.rate.margin_difference.value,
                "replies_rate": None if push.replies is None else push.replies.rate,
                "slope": None if vector.steerability is None else vector.steerability.slope.value,
                **{name: vector.predictors.get(name) for name in PREDICTORS},
            }
            for vector in self.vectors
            for push in vector.pushes
        ]

    def page(self) -> dict[str, Any]:
        """What ``jaxsteer report`` shows (docs/report.md), for results.json."""
        rows = []
        for vector in self.vectors:
            for push in vector.pushes:
                if abs(push.strength) == 1:
                    way = WAYS[1 if push.strength > 0 else -1]
                    told = {"model": self.model, "persona": f"{self.persona} ({way})", "method": vector.name}
                    more = {"kind": "control" if vector.control else "baseline", "site": vector.site, "steered": True}
                    rows.append({**told, **more, **push.rate.to_json()})
        tables = [
            {
                "title": title,
                "head": (head := list(dict.fromkeys(name for row in cells for name in row))),
                "rows": [[row.get(name, "") for name in head] for row in cells],
                "caption": " ".join([*(f"{notice}." for notice in self.notices()), self.legend()]),
            }
            for title, cells in self.tables().items()
        ]
        return {
            "format": TABLE_FORMAT,
            "title": f"Steering vectors for {self.persona} on {self.model}",
            "model": self.model,
            "rows": rows,
            "tables": tables,
            "environment": dict(self.environment),
        }

    def plot(self) -> Figure:
        """Effect against disturbance, both signs: it need not rise with strength."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, sign in zip(axes, (1, -1), strict=True):
            for vector in self.vectors:
                some = sorted((p for p in vector.pushes if p.strength * sign > 0), key=lambda p: abs(p.strength))
                x, y = [0.0, *(p.kl for p in some)], [self.baseline.rate, *(p.rate.rate for p in some)]
                axis.plot(x, y, "--o" if vector.control else "-o", label=vector.name, markersize=3, linewidth=1)
            axis.set(xlabel="KL on neutral text (nats per token)", title=WAYS[sign], ylim=(-0.02, 1.02))
        axes[0].set_ylabel("rate of the persona")
        axes[1].legend(fontsize=8)
        figure.suptitle(f"{self.persona} on {self.model}", fontsize=10)
        return figure
