"""Faithfulness over the size of a circuit, and the two areas by which the MIB benchmark (2504.13151) judges a method.

    CPR  the area under faithfulness:           integral of f(k) dk, larger is better
    CMD  the area between it and the whole:     integral of |1 - f(k)| dk, smaller is better

k is the share of the graph's edges, from 0.001 to 1 on a linear axis, by trapezoids: a circuit that does everything at
every size has 0.999 and 0, one that does nothing 0 and 0.999. Half of either area lies in the last interval.

Letters: B rows, C circuits, k sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.circuit import curve, run_circuits
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.rows import Rows
from jaxsteer.display import ACCENT, BAND, INK, MUTED, Plot, aligned, decimals, in_style, panels, percent
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.objectives.reads import Objective
from jaxsteer.runs.result import Result
from jaxsteer.statistics import bootstrap

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes of the benchmark, as shares of all edges."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizePoint(Record):
    """The circuit of one size."""

    share: float
    """Of the graph's edges that were asked for."""
    edges: int
    """What is left of them when all that hangs loose is pruned."""
    faithfulness: float
    """The share of the metric's change that the circuit makes, a ratio of sums over readings."""
    ci95: tuple[float, float]
    """Bootstrap over rows, or groups of them."""
    complement: float
    """The faithfulness of all edges outside of the circuit."""
    random: tuple[float, ...]
    """That of random connected circuits of (about) as many edges."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeCurve(Result):
    """Faithfulness of circuits of growing size."""

    model: str
    method: str
    """Of the scores that chose the edges."""
    semantics: str
    """How circuits are run; edges are ablated by patching."""
    n_edges: int
    base: float
    """The metric of the run, in the mean over readings."""
    target: float
    """That of its source."""
    rows: int
    points: tuple[SizePoint, ...]
    cpr_ci95: tuple[float, float]
    """Bootstrap over rows, or groups of them."""
    cmd_ci95: tuple[float, float]

    @property
    def cpr(self) -> float:
        """Area under faithfulness."""
        return self._areas([p.faithfulness for p in self.points])[0]

    @property
    def cmd(self) -> float:
        """Area between faithfulness and 1."""
        return self._areas([p.faithfulness for p in self.points])[1]

    @property
    def random_areas(self) -> Float[np.ndarray, "draws 2"]:
        """CPR and CMD of each random draw: one random circuit of every size."""
        draws = np.array([p.random for p in self.points]).T
        return np.array([self._areas(draw) for draw in draws]).reshape(-1, 2)

    def _areas(self, faithfulness: Any) -> tuple[float, float]:
        return areas([p.share for p in self.points], faithfulness)

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every size."""
        found = []
        for p in self.points:
            median, low, high = _band(p.random)
            found.append(
                {"share": p.share, "edges": p.edges, "faithfulness": p.faithfulness, "low": p.ci95[0],
                 "high": p.ci95[1], "complement": p.complement, "random": median, "random_low": low,
                 "random_high": high}
            )  # fmt: skip
        return found

    def table(self) -> str:
        """A line for every size, and the areas."""
        lines = [
            [percent(r["share"]), f"{r['edges']:,}", decimals(r["faithfulness"]),
             f"{r['low']:.2f} to {r['high']:.2f}", decimals(r["complement"]), decimals(r["random"]),
             f"{r['random_low']:.2f} to {r['random_high']:.2f}"]
            for r in self.to_rows()
        ]  # fmt: skip
        note = (
            f"{self.n_edges:,} edges of {self.model}; the metric goes from {self.base:.4f} to {self.target:.4f} in "
            f"{self.rows} rows ({self.method}, {self.semantics} by patching). CPR {self.cpr:.3f} "
            f"({self.cpr_ci95[0]:.3f} to {self.cpr_ci95[1]:.3f}), CMD {self.cmd:.3f} ({self.cmd_ci95[0]:.3f} to "
            f"{self.cmd_ci95[1]:.3f})"
        )
        if len(random := self.random_areas):
            (cpr, low, high), (cmd, below, above) = (_band(column) for column in random.T)
            note += (
                f"; of random connected circuits {cpr:.3f} ({low:.3f} to {high:.3f}) and {cmd:.3f} ({below:.3f} to "
                f"{above:.3f})"
            )
        return aligned(
            [["share", "edges", "faithfulness", "95 %", "complement", "random", "95 % of them"], *lines],
            left=(),
            note=f"{note}.",
        )

    def plot(self) -> Plot:
        """Faithfulness against size, with the band of random circuits."""
        return _drawn(self)


@in_style
def _drawn(found: SizeCurve) -> Plot:
    figure, (axis,) = panels(width=6.8, height=3.8)
    rows = found.to_rows()
    column = lambda name: [row[name] for row in rows]  # noqa: E731
    shares = [100 * share for share in column("share")]
    axis.fill_between(shares, column("random_low"), column("random_high"), color=BAND, label="random, 95 %")
    axis.plot(shares, column("random"), color=MUTED, linewidth=1, label="random, median")
    low, high = np.subtract(column("faithfulness"), column("low")), np.subtract(column("high"), column("faithfulness"))
    errors = np.maximum([low, high], 0)
    axis.errorbar(
        shares, column("faithfulness"), yerr=errors, color=ACCENT, marker="o", markersize=3, linewidth=1.2,
        elinewidth=0.8, label="circuit",
    )  # fmt: skip
    axis.plot(shares, column("complement"), color=ACCENT, linewidth=1, linestyle="--", label="all but the circuit")
    axis.axhline(1, color=INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("% of the edges")
    axis.set_ylabel("faithfulness")
    axis.legend(frameon=False, fontsize=8)
    title = f"Faithfulness by size: CPR {found.cpr:.3f}, CMD {found.cmd:.3f}"
    return Plot(name="circuit-sizes", title=title, figure=figure, rows=tuple(rows))


def areas(shares: Sequence[float] | np.ndarray, faithfulness: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """CPR and CMD of faithfulness at growing shares of the edges, from the first share to the last."""
    f = np.asarray(faithfulness, np.float64)
    return float(np.trapezoid(f, shares)), float(np.trapezoid(np.abs(1 - f), shares))


def size_curve(
    model: Model,
    rows: Rows,
    metric: Objective,
    source: Rows | Intervention,
    found: EdgeScores,
    *,
    shares: Sequence[float] = SHARES,
    end: str = "output",
    semantics: str = "ablate outside",
    edits: Intervention | None = None,
    random: int = 100,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> SizeCurve:
    """Faithfulness of greedy circuits of ``shares`` of the graph's edges, beside random ones of as many edges.

    Many parameters: those of ``run_circuits``, and how circuits are chosen and judged.

    Args:
        found: the scores that choose the edges. They may be of other rows than are judged here (better).
        shares: rising, above 0 and at most 1; each gives max(1, int(share x edges)) edges, which are then pruned.
        end: where the greedy choice begins ("output" or "input").
        random: random connected circuits for every size.
        groups: the group of each row (a question with its rephrasings, say): intervals resample groups.

    Raises:
        UserError: as ``run_circuits``, for scores of another model, shares that do not rise, and where the source
            changes nothing.
    """
    asked = np.asarray(shares, np.float64)
    if asked.ndim != 1 or len(asked) < 2 or asked[0] <= 0 or asked[-1] > 1 or (np.diff(asked) <= 0).any():
        raise UserError(f"shares must be two or more rising numbers above 0 and up to 1, got {shares!r:.80}")
    if found.fingerprint != model.fingerprint:
        raise UserError(f"the scores are of {found.model}, not of {model.name}")
    if groups is not None and len(groups) != len(rows.tokens):
        raise UserError(f"give a group for each of {len(rows.tokens)} rows, got {len(groups)}")
    graph = found.graph
    sizes = [max(1, int(share * graph.n_edges)) for share in asked]
    chosen, controls = curve(found, sizes, end=end, random=random, seed=seed)
    partly = [i for i, edges in enumerate(chosen) if edges.sum() < graph.n_edges]  # what is full has no other
    masks = [*chosen, *(graph.edges & ~edges for edges in chosen), *(edges for i in partly for edges in controls[i])]
    got = run_circuits(model, rows, metric, source, graph, masks, semantics=semantics, edits=edits)
    change = (got.target - got.base) * got.weights
    if abs(change.sum()) < 1e-9:
        raise UserError("the source does not change the metric at all: there is no effect to be faithful to")
    made, count = (got.scores - got.base) * got.weights, len(chosen)
    drawn = got.faithfulness[2 * count :].reshape(len(partly), random)
    random_of = {i: tuple(drawn[number].tolist()) for number, i in enumerate(partly)}

    def share_of(index: Any, rows: np.ndarray) -> Any:
        return made[index][..., rows].sum(-1) / change[rows].sum()

    names = list(groups) if groups is not None else [str(row) for row in range(len(change))]
    every = slice(0, count)
    points = [
        SizePoint(
            share=float(asked[i]),
            edges=int(edges.sum()),
            faithfulness=float(got.faithfulness[i]),
            ci95=bootstrap(partial(share_of, i), names, draws=1000),
            complement=float(got.faithfulness[count + i]),
            random=random_of.get(i, (float(got.faithfulness[i]),) * random),
        )
        for i, edges in enumerate(chosen)
    ]
    own = bootstrap(lambda rows: areas(asked, share_of(every, rows))[0], names, draws=1000)
    apart = bootstrap(lambda rows: areas(asked, share_of(every, rows))[1], names, draws=1000)
    return SizeCurve(
        model=model.name, method=found.method, semantics=semantics, n_edges=graph.n_edges,
        base=float(got.base @ got.weights), target=float(got.target @ got.weights), rows=len(change),
        points=tuple(points), cpr_ci95=own, cmd_ci95=apart,
    )  # fmt: skip


def _band(values: Any) -> tuple[float, float, float]:
    if not len(values):
        return (float("nan"),) * 3
    median, low, high = np.quantile(values, [0.5, 0.025, 0.975])
    return float(median), float(low), float(high)
