"""Overlap of circuits: sets counted by hand, ranks against SciPy, random pairs of equal size, a planted behaviour."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import greedy_edges, pruned
from jaxsteer.circuits.edge_scores import EdgeScores
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.overlap import Overlap, overlap
from jaxsteer.circuits.rows import make_rows
from jaxsteer.evals.refusal import opening_ids, refusal_score
from jaxsteer.organisms import persona_world

GRAPH = Graph(n_layers=2, heads=4, kv_heads=2)
RNG = np.random.default_rng(0)


def edges_of(count: int, first: int = 0) -> np.ndarray:
    """Edges ``first`` to ``first + count`` of the graph."""
    edges = np.zeros(GRAPH.edges.shape, bool)
    edges[tuple(np.argwhere(GRAPH.edges)[first : first + count].T)] = True
    return edges


def scores_of(values: np.ndarray, **changes: Any) -> EdgeScores:
    fields = dict(
        model="m", fingerprint="f", n_layers=2, heads=4, kv_heads=2, start=0, per="head", method="inputs", steps=1,
        rule="left", rows=1, readings=1, base=0.0, target=1.0, nodes=(0.0,) * len(GRAPH.writers),
        values=tuple(values.tolist()),
    )  # fmt: skip
    return EdgeScores(**(fields | changes))


def test_sets_are_counted() -> None:
    found = overlap(GRAPH, {"a": edges_of(30), "b": edges_of(20, 20), "c": edges_of(12, 40), "all": GRAPH.edges})
    pair = found.of("b", "a")
    assert (pair.shared, pair.iou, pair.shares, pair.share) == (10, 10 / 40, (10 / 30, 10 / 20), 0.5)
    assert found.of("a", "c").iou == found.of("a", "c").share == 0 == found.of("b", "c").beaten
    assert found.of("c", "all").share == 1 and found.of("c", "all").iou == 12 / GRAPH.n_edges
    assert len(found.pairs) == 6 and {row["beaten"] for row in found.to_rows()} <= set(np.arange(101) / 100)
    again = overlap(GRAPH, {"x": edges_of(30), "y": edges_of(30), "all": GRAPH.edges}, seed=1)
    same = again.of("x", "y")
    assert (same.iou, same.shares, same.beaten) == (1, (1, 1), 1)
    assert same.random[1] <= same.random[0] <= same.random[2] < 1
    assert overlap(GRAPH, {"x": GRAPH.edges, "y": GRAPH.edges}).pairs[0].random == (1, 1, 1)
    assert Overlap.from_json(again.to_json()) == again and "x, y" in again.table()


def test_random_circuits_share_what_their_sizes_let_expect() -> None:
    """Drawn independently, two circuits of n and m of E edges share about n m / E; those that hang together share
    more, because all begin at the input and end at the unembedding."""
    count = 40
    pair = overlap(GRAPH, {"a": edges_of(count), "b": edges_of(count, 50)}, draws=300).pairs[0]
    expected = count / GRAPH.n_edges
    assert expected < pair.random_share[0] < 3 * expected
    other = overlap(GRAPH, {"a": edges_of(count), "b": edges_of(count, 50)}, draws=300, seed=7).pairs[0]
    assert other.random != pair.random and other.random[0] == pytest.approx(pair.random[0], abs=0.03)


def test_ranks_and_signs() -> None:
    values = RNG.standard_normal((2, GRAPH.n_edges))
    values[1] = -(values[0] + values[1])
    circuits = {"a": edges_of(30), "b": edges_of(20, 20)}
    found = overlap(GRAPH, circuits, {"a": scores_of(values[0]), "b": scores_of(values[1])}).pairs[0]
    assert found.rank_correlation == pytest.approx(stats.spearmanr(np.abs(values[0]), np.abs(values[1]))[0])
    assert found.same_sign == (np.sign(values[0, 20:30]) == np.sign(values[1, 20:30])).mean()
    part = overlap(GRAPH, circuits, {"a": scores_of(values[0])}).pairs[0]
    assert part.rank_correlation is None is part.same_sign


def test_two_vectors_of_one_behaviour_share_a_circuit() -> None:
    """The direction of refusal at two strengths: the same edges, the same way, beyond random circuits."""
    model = jaxsteer.load("organism:persona")
    openings = opening_ids(model, persona_world.REFUSAL_OPENINGS)
    metric = lambda reads: refusal_score(reads.logits, openings)  # noqa: E731
    asked = {kind: persona_world.requests(kind, n=16, seed=0, split="train") for kind in ("harmful", "harmless")}
    rows = {kind: make_rows(model, [[{"role": "user", "content": r.text}] for r in a]) for kind, a in asked.items()}
    site = "blocks.1.hook_resid_post"
    states = [
        np.asarray(jaxsteer.capture(model, r.tokens, [site], r.mask)[site])[np.arange(16), r.lengths - 1].mean(0)
        for r in rows.values()
    ]
    vector, own = states[0] - states[1], rows["harmless"].take(slice(4))
    found = {
        name: attribute_edges(model, own, metric, steer.add(site, vector, size), start=2, steps=2)
        for name, size in (("half", 1.0), ("whole", 2.0))
    }
    circuits = {name: pruned(each.graph, greedy_edges(each, 60)) for name, each in found.items()}
    pair = overlap(found["half"].graph, circuits, found).pairs[0]
    assert pair.share > 0.7 > pair.random_share[2] and pair.beaten == 1
    assert (pair.rank_correlation or 0) > 0.8 and (pair.same_sign or 0) > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"circuits": {"a": edges_of(3)}}, "at least two circuits, got 1"),
        ({"circuits": {"a": edges_of(3), "b": edges_of(3)[:2]}}, "circuit 'b' must be edges of the graph"),
        ({"circuits": {"a": ~GRAPH.edges, "b": edges_of(3)}}, "circuit 'a' must be edges of the graph"),
        ({"circuits": {"a": edges_of(0), "b": edges_of(3)}}, "circuit 'a' has no edge"),
        ({"scores": {"c": scores_of(np.zeros(GRAPH.n_edges))}}, "'c'"),
        ({"scores": {"a": scores_of(np.zeros(GRAPH.n_edges), kv_heads=4)}}, "another graph"),
        (
            {"scores": {n: scores_of(np.ones(GRAPH.n_edges), fingerprint=n, model=n) for n in "ab"}},
            r"different models \(a: a, b: b\)",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"circuits": {"a": edges_of(3), "b": edges_of(4)}} | changes
    with pytest.raises(UserError, match=message):
        overlap(GRAPH, **given)
    found = overlap(GRAPH, {"a": edges_of(3), "b": edges_of(4)}, draws=3)
    with pytest.raises(UserError, match="name two different ones"):
        found.of("a", "a")
    assert dataclasses.is_dataclass(found)
