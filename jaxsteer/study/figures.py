"""The figures that results draw of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxsteer.display import ACCENT, BAND, INK, MUTED, OTHER, PAGE, Plot, in_style, interval, panels, short, visible
from jaxsteer.evals.rates import Interval, Rate

LABEL = 44
"""Letters of a prompt beside its rates."""


class BareShare(NamedTuple):
    """The share of an ``evals.rates.Rate``, of which interval and n may not be known."""

    rate: float
    ci95: Interval | None = None
    n: int | None = None


@dataclasses.dataclass(frozen=True)
class RateRow:
    """One line of ``rate_plot``."""

    label: str
    kind: str
    """baseline, prompt or control."""
    test: Rate | BareShare | None
    validation: Rate | BareShare | None = None
    chosen: bool = False
    """Whether it is drawn as the reported one."""

    @property
    def colour(self) -> str:
        """By kind."""
        return OTHER if self.chosen else {"baseline": INK, "prompt": ACCENT}.get(self.kind, MUTED)


@in_style
def rate_plot(rows: Sequence[RateRow]) -> Plot | None:
    """Persona rates with 95 % intervals, the baseline also as a band. None where none was measured."""
    rows = [row for row in rows if row.test or row.validation]
    if not rows:
        return None
    figure, (axis,) = panels(width=9.2, height=0.6 + 0.29 * len(rows))
    for row in rows:
        if row.kind == "baseline":
            axis.axvspan(*_ends(row.test or row.validation), color=BAND, zorder=0)
            break
    table, tips = [], {}
    for place, row in enumerate(rows):
        for split, rate in (("validation", row.validation), ("test", row.test)):
            if rate is None:
                continue
            low, high = _ends(rate)
            if split == "test":
                axis.plot([low, high], [place, place], color=row.colour, linewidth=2.2, solid_capstyle="butt")
            fill = row.colour if split == "test" else PAGE
            gid = f"rate-{place}-{split}"
            axis.plot(
                100 * rate.rate, place, "o", markersize=6, markerfacecolor=fill, markeredgecolor=row.colour, gid=gid
            )
            tips[gid] = f"{row.label}: {split} {interval(rate)}, n = {'?' if rate.n is None else rate.n} questions"
            table.append(
                {"prompt": visible(row.label), "kind": row.kind, "selected": row.chosen, "split": split,
                 "rate": rate.rate, "low": low / 100, "high": high / 100, "n": rate.n}
            )  # fmt: skip
    axis.set_yticks(range(len(rows)), [short(row.label, LABEL) for row in rows])
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(OTHER if row.chosen else INK)
    axis.set_xlim(-2, 102)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("persona answers (%), 95 % intervals; filled: test, hollow: validation")
    return Plot(name="rates", title="Persona rates with 95 % intervals", figure=figure, rows=tuple(table), tips=tips)


def _ends(rate: Rate | BareShare | None) -> tuple[float, float]:
    """The interval of a rate in percent; the rate itself where there is none."""
    assert rate is not None
    low, high = rate.ci95 or (rate.rate, rate.rate)
    return 100 * low, 100 * high
