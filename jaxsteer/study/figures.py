"""The figures that results draw of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxsteer.display import ACCENT, BAND, INK, MUTED, OTHER, PAGE, Plot, in_style, interval, panels, short, visible
from jaxsteer.errors import UserError
from jaxsteer.evals.free_answers import WrittenRates
from jaxsteer.evals.rates import Rate
from jaxsteer.ranges import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = 44
"""Letters of a prompt beside its rates."""


class BareShare(NamedTuple):
    """The share of an ``evals.rates.Rate``, of which interval and n may not be known."""

    rate: float
    ci95: Interval | None = None
    n: int | None = None


Share = Rate | BareShare | None
"""What is drawn on one line, if anything."""


@dataclasses.dataclass(frozen=True)
class RateRow:
    """One line of ``rate_plot``."""

    label: str
    kind: str
    """baseline, prompt or control."""
    test: Share
    validation: Share = None
    chosen: bool = False
    """Whether it is drawn as the reported one."""
    replies: WrittenRates | None = None
    """Of a persona in words, what the model writes freely on test questions."""
    validation_replies: WrittenRates | None = None

    @property
    def colour(self) -> str:
        """By kind."""
        return OTHER if self.chosen else {"baseline": INK, "prompt": ACCENT}.get(self.kind, MUTED)


@in_style
def rate_plot(rows: Sequence[RateRow]) -> Plot | None:
    """Persona rates with 95 % intervals, the baseline also as a band; beside them, of personas in words, the rates of
    free replies. None where none was measured."""
    rows = [row for row in rows if row.test or row.validation]
    if not rows:
        return None
    measures: dict[str, tuple[str, list[tuple[Share, Share]]]] = {
        "rate": ("persona answers (%)", [(row.test, row.validation) for row in rows])
    }
    if words := any(row.replies for row in rows):
        free: list[tuple[Share, Share]] = [(_share(row.replies), _share(row.validation_replies)) for row in rows]
        preferred = ("the persona's reply is likelier (%)", measures["rate"][1])
        measures = {"replies": ("free replies in character (%)", free), "rate": preferred}
    figure, axes = panels(len(measures), width=11 if words else 9.2, height=0.6 + 0.29 * len(rows), share_y=words)
    table: list[dict[str, object]] = []
    tips: dict[str, str] = {}
    for axis, (measure, (label, shares)) in zip(axes, measures.items(), strict=True):
        _draw(axis, measure, rows, shares, tips)
        axis.set_xlabel(f"{label}, 95 % intervals; filled: test, hollow: validation" if not words else label)
        for row, pair in zip(rows, shares, strict=True):
            table += [
                {"prompt": visible(row.label), "kind": row.kind, "selected": row.chosen, "split": split,
                 "rate": share.rate, "low": _ends(share)[0] / 100, "high": _ends(share)[1] / 100, "n": share.n}
                | ({"measure": measure} if words else {})
                for split, share in zip(("validation", "test"), reversed(pair)) if share is not None
            ]  # fmt: skip
    axes[0].set_yticks(range(len(rows)), [short(row.label, LABEL) for row in rows])
    for tick, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        tick.set_color(OTHER if row.chosen else INK)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return Plot(name="rates", title="Persona rates with 95 % intervals", figure=figure, rows=tuple(table), tips=tips)


def _draw(
    axis: Axes, measure: str, rows: Sequence[RateRow], shares: Sequence[tuple[Share, Share]], tips: dict[str, str]
) -> None:
    """One measure: (test, validation) of every row. ``tips`` takes the text over each point."""
    for row, pair in zip(rows, shares, strict=True):
        if row.kind == "baseline" and any(pair):
            axis.axvspan(*_ends(pair[0] or pair[1]), color=BAND, zorder=0)
            break
    for place, (row, (test, validation)) in enumerate(zip(rows, shares, strict=True)):
        for split, share in (("validation", validation), ("test", test)):
            if share is None:
                continue
            if split == "test":
                axis.plot(_ends(share), [place, place], color=row.colour, linewidth=2.2, solid_capstyle="butt")
            fill = row.colour if split == "test" else PAGE
            gid = f"{measure}-{place}-{split}"
            axis.plot(
                100 * share.rate, place, "o", markersize=6, markerfacecolor=fill, markeredgecolor=row.colour, gid=gid
            )
            tips[gid] = f"{row.label}: {split} {interval(share)}, n = {'?' if share.n is None else share.n} questions"
    axis.set_xlim(-2, 102)
    axis.grid(visible=False, axis="y")


def _share(found: WrittenRates | None) -> BareShare | None:
    """The rate of free replies, where some could be read."""
    return None if found is None or found.rate is None else BareShare(found.rate, found.ci95, found.n)


def _ends(share: Share) -> tuple[float, float]:
    """The interval of a rate in percent; the rate itself where there is none."""
    assert share is not None
    low, high = share.ci95 or (share.rate, share.rate)
    return 100 * low, 100 * high


def drawn(plot: Plot | None) -> Figure:
    """The figure of a plot. Raises ``UserError`` where there is none."""
    if plot is None:
        raise UserError("no rates were measured: there is nothing to plot")
    return plot.figure
