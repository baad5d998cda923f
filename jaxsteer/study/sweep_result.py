"""What a sweep measured: rates and side effects of steering by layer, coefficient and direction, and the choice."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from jaxsteer.display import aligned, interval, percent, wrapped
from jaxsteer.evals.free_answers import ILLUSION, WrittenRates, is_illusion
from jaxsteer.evals.rates import Rate
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0, Interval, Share
from jaxsteer.runs.result import Result
from jaxsteer.statistics import wilson
from jaxsteer.study.results import READABLE, Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERSONA = "persona"
"""The direction under study, among the controls."""
COLUMNS = (
    "direction", "layer", "coefficient", "rate", "ci95", "n", "a_rate", "letter_collapse", "probability", "kl",
    "perplexity",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRow(Record):
    """One setting: a direction added after one block with one coefficient. Rates are on validation questions."""

    direction: str
    """``persona``, or ``random i`` for a control of the same norm."""
    layer: int
    site: str
    coefficient: float
    """In mean norms of the stream at the site."""
    rate: Share
    ci95: Interval
    n: CountFrom0 | None = None
    """Questions. Older versions wrote none, and an interval over rows."""
    a_rate: Share
    letter_collapse: bool
    probability: Share
    kl: float
    """Mean KL to the unsteered model on neutral text, nats per token."""
    perplexity: float
    """Of neutral text."""
    baseline_perplexity: float
    """Of neutral text without steering."""
    replies: WrittenRates | None = None
    """Of a persona in words, what is written freely: along the persona's direction, within the limit of KL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenSetting(SweepRow):
    """The setting that validation questions chose, measured on test questions."""

    test: Rate
    test_baseline: Rate
    """Without steering."""
    test_controls: Mapping[str, Rate]
    """The same setting along the random directions."""
    test_replies: Mapping[str, WrittenRates] = dataclasses.field(default_factory=dict)
    """Of a persona in words, free replies to test questions: by direction, and "" without steering."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unsteered(Record):
    """The model as it is."""

    validation: Rate
    perplexity: float
    """Of neutral text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Result):
    """Steering along a persona's direction at every layer and strength; metrics.json is its serialised form."""

    kind: str = "sweep"
    model: str
    fingerprint: str
    persona: str
    goal: str | None = None
    """What was wanted: less of the persona ("reduce", where nothing is said), or more ("elicit")."""
    direction: Mapping[str, str]
    """How the direction was made."""
    baseline: Unsteered
    rows: tuple[SweepRow, ...]
    """Everything that was measured, by layer."""
    chosen: ChosenSetting | None
    """The setting with the best rate for the goal, of free replies where answers are replies, among those with a ``kl``
    of at most ``max_kl`` and without letter collapse."""
    max_kl: float
    neutral_tokens: int
    timing: Timing
    environment: Mapping[str, Any]

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> Sweep:
        """The object that ``to_json`` wrote, or that an older version did."""
        found = super().from_json(record, where)
        chosen = found.chosen and _by_question(found.chosen, found.baseline.validation.n)
        rows = tuple(_by_question(row, found.baseline.validation.n) for row in found.rows)
        return dataclasses.replace(found, rows=rows, chosen=chosen)

    @property
    def best(self) -> ChosenSetting | None:
        """The chosen setting; None where none keeps the limits."""
        return self.chosen

    @property
    def in_words(self) -> bool:
        """Whether the result is what is written freely."""
        return any(row.replies is not None for row in self.rows)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per setting."""
        names = [name for name in COLUMNS if name != "ci95"]
        return [
            {**{name: getattr(row, name) for name in names}, "ci95_low": row.ci95[0], "ci95_high": row.ci95[1]}
            | ({"replies_rate": row.replies and row.replies.rate} if self.in_words else {})
            for row in self.rows
        ]

    def csv(self) -> str:
        """``to_rows`` as CSV."""
        stream = io.StringIO()
        rows = self.to_rows()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def table(self) -> str:
        """Persona rates and KL by layer and coefficient, then the chosen setting on test questions."""
        rows = [row for row in self.rows if row.direction == PERSONA]
        coefficients = list(dict.fromkeys(row.coefficient for row in rows))
        cells = {(row.layer, row.coefficient): row for row in rows}
        what = f"rate of free replies (where KL is at most {self.max_kl:g};" if self.in_words else "persona rate ("
        table: list[tuple[str, ...]] = [("layer", *(f"{c:+g}" for c in coefficients))]
        for layer in dict.fromkeys(row.layer for row in rows):
            shown = [cells[layer, c] for c in coefficients]
            rates = [percent(r.replies and r.replies.rate if self.in_words else r.rate) for r in shown]
            marks = ["!" if r.letter_collapse else "?" if _unread(r.replies) else " " for r in shown]
            each = zip(rates, shown, marks, strict=True)
            table.append((str(layer), *(f"{rate} ({r.kl:.2f}){mark}" for rate, r, mark in each)))
        title = f"{what} KL on neutral text, nats per token) by coefficient, in mean norms of the stream"
        head, lines = [wrapped(title), aligned(table, left=())], list[str]()
        if any(row.letter_collapse for row in rows):
            lines.append("! one letter wins whatever is asked: the rate is no evidence")
        if any(_unread(row.replies) for row in rows):
            lines.append(
                f"? fewer than {percent(READABLE)} of the replies could be read, and the rate is of these alone"
            )
        base, chosen = self.baseline, self.chosen
        what = "the persona's reply is likelier on" if self.in_words else "rate"
        lines.append(
            f"\nunsteered: {what} {interval(base.validation)}, perplexity of neutral text {base.perplexity:.2f}"
        )
        if chosen is None:
            lines.append(f"no setting keeps KL below {self.max_kl:g} without a letter collapse")
            return "\n".join([*head, *map(wrapped, lines)])
        best = f"{'highest' if self.goal == 'elicit' else 'lowest'} rate {'of free replies ' * self.in_words}"
        lines.append(
            f"chosen by the {best}on validation questions, of equal ones the lowest KL: layer {chosen.layer}, "
            f"coefficient {chosen.coefficient:+g} (KL {chosen.kl:.3f}, perplexity {chosen.perplexity:.2f}"
            + ("" if self.in_words else f", A-rate {percent(chosen.a_rate)}")
            + ")"
        )
        controls = "; ".join(f"{name} {interval(rate)}" for name, rate in chosen.test_controls.items())
        lines.append(
            f"{what} ({chosen.test.n} test questions): {interval(chosen.test_baseline)} -> {interval(chosen.test)}"
            + (f"; controls of equal norm: {controls}" * bool(controls))
        )
        if free := chosen.test_replies:
            others = "; ".join(f"{name} {interval(rate)}" for name, rate in free.items() if name not in ("", PERSONA))
            lines.append(
                f"free replies to {free[''].n} of them: {interval(free[''])} -> {interval(free[PERSONA])}"
                + (f"; controls: {others}" * bool(others))
                + (f"; {ILLUSION}" * is_illusion(chosen.test, free[PERSONA]))
            )
        return "\n".join([*head, *map(wrapped, lines)])

    def plot(self) -> Figure:
        """Heat maps of rate, KL and perplexity by layer and coefficient, one line of them per direction.

        "!" marks rates at which one letter wins whatever is asked.
        """
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.figure import Figure

        panels, shown = dict(PANELS), list(self.rows)
        if self.in_words:
            panels["rate"] = "rate of free replies (%)"
            free = [None if row.replies is None else row.replies.rate for row in shown]
            shown = [
                dataclasses.replace(r, rate=math.nan if f is None else f) for r, f in zip(shown, free, strict=True)
            ]
        directions = list(dict.fromkeys(row.direction for row in self.rows))
        columns = sorted({row.coefficient for row in self.rows})
        layers = sorted({row.layer for row in self.rows})
        size = (2.4 + 0.42 * len(columns), 1.5 + 0.28 * len(layers))
        figure = Figure(figsize=(3 * size[0], len(directions) * size[1]), layout="constrained")
        axes = figure.subplots(len(directions), 3, squeeze=False)
        for column, (key, title) in enumerate(panels.items()):
            values = np.asarray([getattr(row, key) for row in self.rows], float)
            scale = Normalize(0, 1) if key == "rate" else Normalize(0, max(float(np.nanmax(values)), 1e-6))
            if key == "perplexity" and values.min() > 0:
                scale = LogNorm(float(values.min()), max(float(values.max()), float(values.min()) * 1.01))
            for line, direction in enumerate(directions):
                mine = [row for row in shown if row.direction == direction]
                _heat_map(axes[line, column], mine, key, (layers, columns), scale)
                axes[line, column].set_title(f"{direction}: {title}", fontsize=9)
        figure.suptitle(f"{self.persona} on {self.model}", fontsize=10)
        return figure


def _unread(replies: WrittenRates | None) -> bool:
    """Whether a rate of free replies is of too few of them."""
    return replies is not None and (replies.read or 0.0) < READABLE


R = TypeVar("R", bound=SweepRow)


def _by_question(row: R, n: int) -> R:
    """A row of an older version with the interval of so many questions, whose orders always agree."""
    share = min(1.0, max(0.0, row.rate))
    return row if row.n is not None else dataclasses.replace(row, n=n, ci95=wilson(share * n, n))


PANELS = {
    "rate": "persona rate (%)",
    "kl": "KL on neutral text (nats per token)",
    "perplexity": "perplexity of neutral text",
}


def _heat_map(
    axis: Any, rows: Sequence[SweepRow], key: str, ticks: tuple[Sequence[int], Sequence[float]], scale: Any
) -> None:
    """One number of one direction by layer and coefficient."""
    from matplotlib.ticker import PercentFormatter

    layers, coefficients = ticks
    grid = np.full((len(layers), len(coefficients)), math.nan)
    collapsed = np.zeros(grid.shape, bool)
    for row in rows:
        at = layers.index(row.layer), coefficients.index(row.coefficient)
        grid[at], collapsed[at] = getattr(row, key), row.letter_collapse and key == "rate"
    image = axis.imshow(grid, aspect="auto", norm=scale, cmap="viridis_r")
    for y, x in np.argwhere(~np.isnan(grid)):
        value = grid[y, x]
        text = f"{100 * value:.0f}" if key == "rate" else f"{value:.{2 if value < 10 else 0}f}"
        color = "white" if scale(value) > 0.5 else "black"
        axis.text(x, y, text + "!" * bool(collapsed[y, x]), ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(coefficients)), [f"{c:+g}" for c in coefficients])
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_xlabel("coefficient (mean norms of the stream)", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.figure.colorbar(
        image, ax=axis, fraction=0.05, format=PercentFormatter(1, symbol="") if key == "rate" else None
    )
