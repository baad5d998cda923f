"""Statistics of attention, head by head: tables, heat maps, JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.display import Plot, aligned, in_style, panels, wrapped
from jaxsteer.files.records import Record
from jaxsteer.ranges import CountFrom0
from jaxsteer.runs.result import Result
from jaxsteer.statistics import student

SHOWN = 5
"""Heads of every statistic that the table lists."""
Rows = tuple[tuple[float, ...], ...]
"""By layer and then head; NaN where no text has such a query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistic(Record):
    """One number of every head, in the mean over texts (and over a text's queries before)."""

    name: str
    texts: CountFrom0
    """Those that have queries for it."""
    mean: Rows
    low: Rows
    """Lower ends of Student's 95 % intervals over texts; the mean where there is one text."""
    high: Rows
    uniform: float
    """The same of a head that attends to all tokens so far alike."""

    def strongest(self, count: int = SHOWN) -> list[tuple[int, int]]:
        """(layer, head) of the largest means."""
        mean = np.asarray(self.mean, np.float64)
        order = np.argsort(-np.nan_to_num(mean, nan=-np.inf), axis=None, kind="stable")[:count]
        return [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, mean.shape), strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionStatistics(Result):
    """What every head of a model attends to, over many texts."""

    model: str
    texts: int
    tokens: int
    statistics: tuple[Statistic, ...]
    repeated: CountFrom0 = 0
    """Rows of random tokens that come twice, for the statistics that say so."""
    span: str = ""
    """The text whose share is told."""
    edits: str = ""
    """What the run was changed by."""

    def named(self, name: str) -> Statistic:
        """The statistic of this name."""
        return next(one for one in self.statistics if one.name == name)

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per head."""
        first = self.statistics[0].mean
        return [
            {"layer": layer, "head": head} | {one.name: one.mean[layer][head] for one in self.statistics}
            for layer in range(len(first))
            for head in range(len(first[0]))
        ]

    def table(self) -> str:
        """The heads of the largest means of every statistic, beside uniform attention."""
        rows = [("", "uniform", "median", *(f"no. {i + 1}" for i in range(SHOWN)))]
        for one in self.statistics:
            if not one.texts:
                continue
            cells = [
                f"a{i}.h{j} {one.mean[i][j]:.2f} ({one.low[i][j]:.2f}–{one.high[i][j]:.2f})" for i, j in one.strongest()
            ]
            median = np.nanmedian(np.asarray(one.mean, np.float64))
            rows.append((one.name, f"{one.uniform:.2f}", f"{median:.2f}", *cells, *[""] * (SHOWN - len(cells))))
        layers, heads = len(self.statistics[0].mean), len(self.statistics[0].mean[0])
        notes = [
            f"{layers} x {heads} heads of {self.model} on {self.texts} texts ({self.tokens} tokens); the five largest, "
            f"with 95 % intervals over texts. Entropy in nats, distance in tokens, all else shares of attention.",
            "That a head attends somewhere does not say that it moves anything: see attribution and patching.",
        ]
        notes += [f"Repeated: {self.repeated} rows of random tokens that come twice."] * bool(self.repeated)
        notes += [f"Span: {self.span!r}."] * bool(self.span)
        notes += [f"The run was changed by: {self.edits}."] * bool(self.edits)
        return aligned(rows, left=(0, *range(3, 3 + SHOWN))) + "\n\n" + wrapped(" ".join(notes))

    @in_style
    def plot(self) -> Plot:
        """A map of layers and heads for every statistic."""
        shown = [one for one in self.statistics if one.texts]
        figure, axes = panels(len(shown), width=2.4 * len(shown) + 0.6, height=3.6, share_y=True)
        for axis, one in zip(axes, shown, strict=True):
            share = one.name not in ("entropy", "distance")
            low, high = (0.0, 1.0) if share else (None, None)
            drawn = axis.imshow(
                np.asarray(one.mean, np.float64), aspect="auto", origin="lower", cmap="viridis", vmin=low, vmax=high
            )  # fmt: skip
            axis.set_title(one.name, fontsize=9)
            axis.set_xlabel("head")
            axis.grid(visible=False)
            figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.9)
        axes[0].set_ylabel("layer")
        title = f"What the heads of {self.model} attend to"
        return Plot(name="attention", title=title, figure=figure, rows=tuple(self.to_rows()))


def statistic(name: str, values: Float[np.ndarray, "n L N"], uniform: Float[np.ndarray, " n"]) -> Statistic:
    """The mean over texts; those without such queries are NaN in ``values`` and ``uniform``."""
    known = np.isfinite(uniform)
    some = values[known].astype(np.float64)
    shape = values.shape[1:]
    mean = some.mean(0) if len(some) else np.full(shape, np.nan)
    low, high = mean.copy(), mean.copy()
    if len(some) > 1:
        for at in np.ndindex(shape):
            low[at], high[at] = student(some[(slice(None), *at)]) or (mean[at], mean[at])
    rows = lambda array: tuple(tuple(float(x) for x in row) for row in array)  # noqa: E731
    return Statistic(
        name=name, texts=len(some), mean=rows(mean), low=rows(low), high=rows(high),
        uniform=float(uniform[known].mean()) if len(some) else float("nan"),
    )  # fmt: skip
