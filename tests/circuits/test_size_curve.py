"""CPR and CMD: closed forms, the full circuit, and a curve whose numbers are computed again without it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxsteer import UserError
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.circuit import greedy_edges, pruned, run_circuits
from jaxsteer.circuits.rows import make_rows
from jaxsteer.circuits.size_curve import SHARES, SizeCurve, areas, size_curve
from jaxsteer.objectives import LogitDifference
from tests.helpers.checkpoints import family_config, random_model

RNG = np.random.default_rng(0)
MODEL = random_model(family_config("gemma3", n_layers=2))
ROWS, SOURCE = (make_rows(MODEL, [RNG.integers(0, 67, n) for n in (6, 8, 5)]) for _ in range(2))
METRIC = LogitDifference(plus=np.asarray([3, 5, 7]), minus=np.asarray([4, 60, 2]))


def test_the_benchmark_s_areas() -> None:
    ones, zeros = [1.0] * len(SHARES), [0.0] * len(SHARES)
    assert areas(SHARES, ones) == pytest.approx((0.999, 0), abs=1e-12)
    assert areas(SHARES, zeros) == pytest.approx((0, 0.999), abs=1e-12)
    # f(k) = k: half of 1 - 0.001^2, and what is left of the square.
    assert areas(SHARES, SHARES) == pytest.approx((0.4999995, 0.4990005), abs=1e-12)
    # A circuit that does twice too much is as far from the whole as one that does nothing, and has twice the area.
    assert areas(SHARES, [2.0] * len(SHARES)) == pytest.approx((1.998, 0.999))
    assert areas([0.5, 1.0], [0.5, 1.5]) == pytest.approx((0.5, 0.25))


@pytest.fixture(scope="module")
def found() -> SizeCurve:
    scores = attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=2)
    return size_curve(MODEL, ROWS, METRIC, SOURCE, scores, shares=[0.05, 0.3, 1.0], random=4)


def test_every_point_is_a_circuit_that_was_run(found: SizeCurve) -> None:
    scores = attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=2)
    graph = scores.graph
    circuits = [pruned(graph, greedy_edges(scores, int(share * graph.n_edges))) for share in (0.05, 0.3, 1.0)]
    got = run_circuits(MODEL, ROWS, METRIC, SOURCE, graph, circuits)
    change = (got.target - got.base).sum()
    expected = (got.scores - got.base).sum(1) / change
    np.testing.assert_allclose([p.faithfulness for p in found.points], expected, atol=1e-5)
    assert [p.edges for p in found.points] == [edges.sum() for edges in circuits]
    assert (found.base, found.target) == pytest.approx((got.base.mean(), got.target.mean()))
    whole = found.points[-1]
    assert (whole.faithfulness, whole.complement) == pytest.approx((1, 0), abs=1e-4)
    assert whole.random == pytest.approx([1] * 4, abs=1e-4) and whole.ci95 == pytest.approx((1, 1), abs=1e-3)
    rest = run_circuits(MODEL, ROWS, METRIC, SOURCE, graph, [graph.edges & ~circuits[1]])
    assert found.points[1].complement == pytest.approx(float(rest.faithfulness[0]), abs=1e-4)
    assert all(p.ci95[0] <= p.faithfulness <= p.ci95[1] for p in found.points)


def test_areas_of_the_curve_and_of_random_ones(found: SizeCurve) -> None:
    f = [p.faithfulness for p in found.points]
    assert found.cpr == pytest.approx(0.25 * (f[0] + f[1]) / 2 + 0.7 * (f[1] + f[2]) / 2)
    assert found.cmd == pytest.approx(0.25 * (abs(1 - f[0]) + abs(1 - f[1])) / 2 + 0.7 * (abs(1 - f[1])) / 2, abs=1e-4)
    assert found.random_areas.shape == (4, 2) and np.ptp(found.random_areas[:, 0]) > 0
    first = [p.random[0] for p in found.points]
    np.testing.assert_allclose(found.random_areas[0], areas([0.05, 0.3, 1.0], first))
    assert found.cpr_ci95[0] <= found.cpr <= found.cpr_ci95[1]
    assert SizeCurve.from_json(found.to_json()) == found and "CPR" in found.table()
    plot = found.plot()
    assert len(plot.rows) == 3 and "CMD" in plot.title and "<svg" in plot.svg()
    alone = dataclasses.replace(found, points=tuple(dataclasses.replace(p, random=()) for p in found.points))
    assert alone.random_areas.shape == (0, 2) and "of random connected" not in alone.table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": [0.5, 0.1]}, "rising numbers above 0 and up to 1"),
        ({"shares": [0.0, 0.1]}, "rising numbers"),
        ({"shares": [0.5]}, "two or more"),
        ({"groups": ["a"]}, "a group for each of 3 rows, got 1"),
        ({"source": ROWS, "random": 1}, "does not change the metric"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    scores = attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=1)
    with pytest.raises(UserError, match=message):
        size_curve(MODEL, ROWS, METRIC, found=scores, **({"source": SOURCE, "shares": [0.1, 1.0]} | changes))
    other = dataclasses.replace(scores, fingerprint="other", model="other")
    with pytest.raises(UserError, match="of other, not of random"):
        size_curve(MODEL, ROWS, METRIC, SOURCE, other)
