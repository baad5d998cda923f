"""How far circuits of different vectors (or texts) are the same, beside random ones of equal size."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsteer.circuits.circuit import Edges, random_edges
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph
from jaxsteer.display import aligned, decimals, percent
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files.records import Record
from jaxsteer.runs.result import Result
from jaxsteer.statistics import spearman


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOverlap(Record):
    """Two circuits, and random ones of as many edges."""

    first: str
    second: str
    edges: tuple[int, int]
    """Of either."""
    shared: int
    """Edges of both."""
    random: tuple[float, float, float]
    """Intersection over union of two random connected circuits of these sizes: median, 2.5 and 97.5 %."""
    random_share: tuple[float, float, float]
    """Their shared edges over the edges of the smaller one, likewise."""
    beaten: float
    """Share of the random pairs whose intersection over union is smaller."""
    rank_correlation: float | None = None
    """Spearman's, of the sizes of the scores of all edges of the graph; None without scores."""
    same_sign: float | None = None
    """Share of the shared edges whose scores have one sign; None without scores, or where nothing is shared."""

    @property
    def iou(self) -> float:
        """Intersection over union: 1 for equal circuits, 0 where nothing is shared."""
        return self.shared / (sum(self.edges) - self.shared)

    @property
    def shares(self) -> tuple[float, float]:
        """The shared edges, as a share of those of the first and of the second."""
        return self.shared / self.edges[0], self.shared / self.edges[1]

    @property
    def share(self) -> float:
        """The shared edges, as a share of those of the smaller circuit: 1 where one lies in the other."""
        return self.shared / min(self.edges)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap(Result):
    """Circuits of one graph, two by two."""

    graph_edges: int
    """Edges of the whole graph."""
    draws: int
    """Random pairs that each pair stands beside."""
    pairs: tuple[PairOverlap, ...]

    def of(self, first: str, second: str) -> PairOverlap:
        """The pair of these names, in either order. Raises ``UserError`` for one that there is not."""
        refuse_unknown([first, second], {name for p in self.pairs for name in (p.first, p.second)}, "circuit", "")
        found = [pair for pair in self.pairs if {pair.first, pair.second} == {first, second}]
        if not found:
            raise UserError(f"{first!r} is one circuit: name two different ones")
        return found[0]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every pair."""
        return [
            {"first": p.first, "second": p.second, "edges_first": p.edges[0], "edges_second": p.edges[1],
             "shared": p.shared, "iou": p.iou, "share": p.share, "share_of_first": p.shares[0],
             "share_of_second": p.shares[1], "random_iou": p.random[0], "random_iou_low": p.random[1],
             "random_iou_high": p.random[2], "random_share": p.random_share[0],
             "random_share_low": p.random_share[1], "random_share_high": p.random_share[2],
             "beaten": p.beaten, "rank_correlation": p.rank_correlation, "same_sign": p.same_sign}
            for p in self.pairs
        ]  # fmt: skip

    def table(self) -> str:
        """A line for every pair."""
        band = lambda found: f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"  # noqa: E731
        lines = [
            [f"{p.first}, {p.second}", f"{p.edges[0]:,}, {p.edges[1]:,}", f"{p.shared:,}", percent(p.share),
             band(p.random_share), decimals(p.iou), band(p.random), decimals(p.rank_correlation),
             percent(p.same_sign)]
            for p in self.pairs
        ]  # fmt: skip
        titles = ["circuits", "edges", "shared", "share", "random", "IoU", "random", "rank corr.", "same sign"]
        return aligned(
            [titles, *lines],
            note=f"'share': of the smaller circuit's edges. 'random': {self.draws} pairs of random connected circuits "
            f"of these sizes, median and 95 % of them. 'rank corr.': Spearman of the sizes of the scores of all "
            f"{self.graph_edges:,} edges. 'same sign': of the shared edges, those whose scores have one sign.",
        )


def overlap(
    graph: Graph,
    circuits: Mapping[str, Edges],
    scores: Mapping[str, EdgeScores] | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
) -> Overlap:
    """What every two of ``circuits`` (by name; edges of ``graph``) share, and what random ones of their sizes share.

    ``scores``, of the same names, add how far their ranks agree over all edges. Random circuits hang together
    (``random_edges``), and draw i of one stands against draw i of the other.

    Raises:
        UserError: for fewer than two circuits, one that is empty or has edges beyond the graph, and scores of other
            names, of another graph, or of different models.
    """
    scores = scores or {}
    if len(circuits) < 2:
        raise UserError(f"an overlap needs at least two circuits, got {len(circuits)}")
    refuse_unknown(scores, circuits, "circuit", "scores: ")
    for name, edges in circuits.items():
        if edges.shape != graph.edges.shape or (edges & ~graph.edges).any():
            raise UserError(f"circuit {name!r} must be edges of the graph, bool {list(graph.edges.shape)}")
        if not edges.any():
            raise UserError(f"circuit {name!r} has no edge")
    for name, found in scores.items():
        if found.graph != graph:
            raise UserError(f"the scores of {name!r} are of another graph: {found.graph}, expected {graph}")
    if len({found.fingerprint for found in scores.values()}) > 1:
        models = ", ".join(f"{name}: {found.model}" for name, found in scores.items())
        raise UserError(f"the scores are of different models ({models}): compare circuits within one")
    random = {
        name: [random_edges(graph, int(edges.sum()), seed * 1_000_003 + number * draws + i) for i in range(draws)]
        for number, (name, edges) in enumerate(circuits.items())
    }
    pairs = [_pair(first, second, circuits, scores, random) for first, second in itertools.combinations(circuits, 2)]
    return Overlap(graph_edges=graph.n_edges, draws=draws, pairs=tuple(pairs))


def _pair(
    first: str,
    second: str,
    circuits: Mapping[str, Edges],
    scores: Mapping[str, EdgeScores],
    random: Mapping[str, list[Edges]],
) -> PairOverlap:
    a, b = circuits[first], circuits[second]
    both = a & b
    iou = lambda x, y: float((x & y).sum() / (x | y).sum())  # noqa: E731
    ious = np.array([iou(x, y) for x, y in zip(random[first], random[second], strict=True)])
    shares = [(x & y).sum() / min(x.sum(), y.sum()) for x, y in zip(random[first], random[second], strict=True)]
    ranks = same_sign = None
    if first in scores and second in scores:
        ranks = spearman(*(np.abs(scores[name].values) for name in (first, second)))
        signs = [np.sign(scores[name].matrix[both]) for name in (first, second)]
        same_sign = float((signs[0] == signs[1]).mean()) if both.any() else None
    return PairOverlap(
        first=first,
        second=second,
        edges=(int(a.sum()), int(b.sum())),
        shared=int(both.sum()),
        random=_band(ious),
        random_share=_band(np.asarray(shares)),
        beaten=float((ious < iou(a, b)).mean()),
        rank_correlation=ranks,
        same_sign=same_sign,
    )


def _band(values: np.ndarray) -> tuple[float, float, float]:
    median, low, high = np.quantile(values, [0.5, 0.025, 0.975])
    return float(median), float(low), float(high)
