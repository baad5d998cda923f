"""What attribution found: a score for every edge and every node of a graph."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsteer.circuits.graph import Graph, Per
from jaxsteer.display import aligned, decimals
from jaxsteer.ranges import CountFrom0
from jaxsteer.runs.result import Result

SHOWN = 15
"""Edges that the table lists: those of the largest scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeScores(Result):
    """How much of the metric's change from a run to its source goes along each edge; means over readings."""

    model: str
    fingerprint: str
    n_layers: int
    heads: int
    kv_heads: int
    start: CountFrom0
    per: Per
    method: str
    steps: int
    rule: str
    rows: int
    readings: int
    base: float
    """The metric of the run."""
    target: float
    """That of its source."""
    nodes: tuple[float, ...]
    """Scores of the writers, in the graph's order."""
    values: tuple[float, ...]
    """Scores of the edges, reader by reader, in the graph's order."""

    @functools.cached_property
    def graph(self) -> Graph:
        """What the scores are of."""
        sizes = dict(n_layers=self.n_layers, heads=self.heads, kv_heads=self.kv_heads)
        return Graph(**sizes, start=self.start, per=self.per)

    @property
    def matrix(self) -> Float[np.ndarray, "R S"]:
        """Scores by reader and writer, 0 where there is no edge."""
        found = np.zeros(self.graph.edges.shape)
        found[self.graph.edges] = self.values
        return found

    def of(self, edge: str) -> float:
        """The score of an edge by its name. Raises ``UserError`` for one that there is not."""
        return float(self.matrix[self.graph.edge(edge)])

    def node(self, name: str) -> float:
        """The score of a writer by its name."""
        return self.nodes[self.graph.writers.index(name)]

    @property
    def completeness(self) -> float:
        """The input's score over the metric's whole change: 1 in the limit of many steps ("inputs")."""
        return self.nodes[0] / (self.target - self.base)

    @property
    def names(self) -> list[str]:
        """Of the edges, in the order of ``values``."""
        writers, readers = self.graph.writers, self.graph.readers
        return [f"{writers[s]}->{readers[r].name}" for r, s in zip(*np.nonzero(self.graph.edges), strict=True)]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every edge."""
        return [{"edge": name, "score": score} for name, score in zip(self.names, self.values, strict=True)]

    def table(self) -> str:
        """The edges of the largest scores."""
        order, names = np.argsort(-np.abs(self.values))[:SHOWN], self.names
        lines = [[names[i], decimals(self.values[i], 4)] for i in order]
        change = self.target - self.base
        return aligned(
            [["edge", "score"], *lines],
            note=f"{self.graph.n_edges:,} edges of {self.model}; the metric goes from {self.base:.4f} to "
            f"{self.target:.4f} (by {change:+.4f}) in the mean of {self.readings} readings of {self.rows} rows; the "
            f"input's score is {self.nodes[0]:+.4f} ({self.method}, {self.steps} steps, {self.rule}).",
        )
