"""Circuits: numbers computed by hand for both semantics, full and empty ones, single edges, how they are chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import curve, greedy_edges, pruned, random_edges, run_circuits, top_edges
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.paths import patch_edges
from jaxsteer.circuits.rows import make_rows
from jaxsteer.evals.refusal import opening_ids, refusal_score
from jaxsteer.objectives import LogitDifference
from jaxsteer.organisms import persona_world
from tests.circuits.toy import toy
from tests.helpers.checkpoints import family_config, random_model

RNG = np.random.default_rng(0)
TEXTS, OTHERS = ([RNG.integers(0, 67, n) for n in (6, 8)] for _ in range(2))
METRIC = LogitDifference(plus=np.asarray([3, 5]), minus=np.asarray([4, 60]))
MODEL = random_model(family_config("gemma3", n_layers=3))
ROWS, SOURCE = make_rows(MODEL, TEXTS), make_rows(MODEL, OTHERS)
GRAPH = Graph.of(MODEL.config)


def of_names(graph: Graph, names: list[str]) -> np.ndarray:
    edges = np.zeros(graph.edges.shape, bool)
    for name in names:
        edges[graph.edge(name)] = True
    return edges


def test_both_semantics_by_hand() -> None:
    model, edits = toy()
    graph = Graph.of(model.config)
    rows, source = make_rows(model, [[1]]), make_rows(model, [[0]])

    def outputs(names: list[str], semantics: str) -> tuple[float, ...]:
        found = []
        for i in range(2):
            metric = lambda reads, i=i: reads.logits[:, i]  # noqa: E731
            got = run_circuits(
                model, rows, metric, source, graph, [of_names(graph, names)], semantics=semantics, edits=edits
            )
            found.append(float(got.scores[0, 0]))
        return tuple(found)

    inside = ["a0.h1->logits"]
    assert outputs(inside, "patch inside") == pytest.approx((-19, -41))
    inside.append("a0.h0->a1.h1<v>")
    assert outputs(inside, "patch inside") == pytest.approx((-13, -25))
    inside.append("input->a0.h0<v>")
    assert outputs(inside, "patch inside") == pytest.approx((-9, -13))
    way = ["input->a0.h0<v>", "a0.h0->a1.h1<v>", "a1.h1->logits"]
    assert outputs(way, "ablate outside") == pytest.approx((-19, -33))
    every = [f"{w}->{r.name}" for r in graph.readers for w in graph.writers[: r.writers]]
    assert outputs(every, "ablate outside") == pytest.approx((25, 49))
    assert outputs([], "ablate outside") == pytest.approx((-25, -49))


@pytest.mark.parametrize("semantics", ["ablate outside", "patch inside"])
@pytest.mark.parametrize("start", [0, 1])
def test_full_and_empty_circuits_are_the_two_runs(semantics: str, start: int) -> None:
    push = steer.add("blocks.0.hook_resid_post", RNG.standard_normal(24), 0.5)
    graph = Graph.of(MODEL.config, start=start)
    full = graph.edges
    got = run_circuits(
        MODEL, ROWS, METRIC, push if start else SOURCE, graph, [full, full & False, full], semantics=semantics
    )
    expected = np.stack([got.target, got.base, got.target])
    np.testing.assert_allclose(got.scores, expected, atol=1e-4)
    np.testing.assert_allclose(got.faithfulness, [1, 0, 1], atol=1e-4)
    layers = Graph.of(MODEL.config, start=start, per="layer")
    got = run_circuits(
        MODEL,
        ROWS,
        METRIC,
        push if start else SOURCE,
        layers,
        [layers.edges, ~layers.edges & False],
        semantics=semantics,
    )
    np.testing.assert_allclose(got.scores, expected[:2], atol=1e-4)


def test_a_circuit_of_one_edge_is_that_edge_patched() -> None:
    names = ["input->a0.h1<q>", "a0.h2->a1.h3<q>", "m0->a2.g1<k>", "a1.h0->m2", "a0.h3->a1.g0<v>", "m1->logits"]
    got = run_circuits(
        MODEL, ROWS, METRIC, SOURCE, GRAPH, [of_names(GRAPH, [name]) for name in names], semantics="patch inside"
    )
    exact = patch_edges(MODEL, ROWS, METRIC, SOURCE, names)
    np.testing.assert_allclose((got.scores - got.base).T, exact, atol=1e-4)
    assert np.abs(exact).max(0).min() > 1e-4


def test_circuits_are_chosen_by_their_scores() -> None:
    found = attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=2)
    for count in (1, 7, 40):
        top = top_edges(found, count)
        assert top.sum() == count
        least = np.abs(found.matrix[top]).min()
        assert (np.abs(found.matrix[found.graph.edges & ~top]) <= least).all()
        for end in ("output", "input"):
            greedy = greedy_edges(found, count, end=end)
            assert greedy.sum() == count and not (greedy & ~GRAPH.edges).any()
    first = greedy_edges(found, 1)
    assert first[-1].argmax() == np.abs(found.matrix[-1]).argmax()
    assert greedy_edges(found, 1, end="input")[:, 0].argmax() == np.abs(found.matrix[:, 0]).argmax()
    every = greedy_edges(found, GRAPH.n_edges)
    np.testing.assert_array_equal(every, GRAPH.edges)


def test_pruning_keeps_what_hangs_together() -> None:
    way = ["input->a0.h0<q>", "a0.h0->a1.g1<v>", "a1.h3->logits"]
    loose = ["input->a0.h1<q>", "m1->logits", "a0.h2->a1.h1<q>"]
    kept = pruned(GRAPH, of_names(GRAPH, [*way, *loose]))
    np.testing.assert_array_equal(kept, of_names(GRAPH, way))
    np.testing.assert_array_equal(pruned(GRAPH, kept), kept)
    assert not pruned(GRAPH, of_names(GRAPH, loose)).any()
    np.testing.assert_array_equal(pruned(GRAPH, GRAPH.edges), GRAPH.edges)
    for seed in range(20):
        edges = random_edges(GRAPH, 30, seed)
        np.testing.assert_array_equal(pruned(GRAPH, edges), edges)
        assert 30 <= edges.sum() <= 30 + 2 * 6
    assert (random_edges(GRAPH, 30, 0) != random_edges(GRAPH, 30, 1)).any()


def test_greedy_circuits_stand_above_random_ones() -> None:
    """A planted behaviour, and the vector that makes it: few edges are enough, and not any."""
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
    push, own = steer.add(site, states[0] - states[1], 2.0), rows["harmless"].take(slice(8))
    found = attribute_edges(model, own, metric, push, start=2, steps=5)
    [chosen], [controls] = curve(found, [60], random=20)
    got = run_circuits(model, own, metric, push, found.graph, [chosen, *controls])
    errors = np.abs(got.faithfulness - 1)
    assert got.semantics == "ablate outside" and (errors[0] < errors[1:]).mean() >= 0.95
    assert chosen.sum() <= 60 <= min(edges.sum() for edges in controls) + 60 - chosen.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantics": "patch"}, "semantics must be one of ablate outside, patch inside"),
        ({"circuits": [GRAPH.edges[:, :3]]}, "edges of the graph"),
        ({"circuits": [~GRAPH.edges]}, "edges of the graph"),
        ({"metric": lambda reads: reads["blocks.1.hook_resid_post"][:, 0]}, "logits and answers"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    given = dict(metric=METRIC, source=SOURCE, graph=GRAPH, circuits=[GRAPH.edges]) | changes
    with pytest.raises(UserError, match=message):
        run_circuits(MODEL, ROWS, **given)
    with pytest.raises(UserError, match="a circuit has 1 to"):
        random_edges(GRAPH, 0, 0)
    assert dataclasses.is_dataclass(GRAPH) and jnp.ones(1).all()
