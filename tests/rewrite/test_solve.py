"""The update against a float64 solver of the constrained problem, its limits and its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer import UserError
from jaxsteer.rewrite.solve import Solver

I, D, N = 24, 10, 4  # noqa: E741


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A covariance with eigenvalues over four orders of magnitude, keys, and gains."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((I, I)))
    covariance = basis * np.logspace(-2, 2, I) @ basis.T
    return (covariance + covariance.T) / 2, rng.standard_normal((N, I)), rng.standard_normal((N, D))


def constrained(covariance: np.ndarray, keys: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """dW [I, D] of least tr(dW^T C dW) under keys @ dW = gains, from the system of Lagrange in all its unknowns."""
    n, width = keys.shape
    system = np.block([[2 * covariance, keys.T], [keys, np.zeros((n, n))]])
    return np.linalg.solve(system, np.vstack([np.zeros((width, gains.shape[1])), gains]))[:width]


@pytest.mark.parametrize("count", [1, N])
def test_rome_is_the_solution_of_the_constrained_problem(problem, count: int):
    covariance, keys, gains = problem
    keys, gains = keys[:count], gains[:count]
    left, right = Solver.of(covariance).update(keys, gains)
    assert left.shape == (I, count) and right.shape == (count, D)
    change = left @ right
    np.testing.assert_allclose(keys @ change, gains, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(change, constrained(covariance, keys, gains), rtol=1e-7, atol=1e-9)


def test_no_other_change_that_keeps_the_constraint_weighs_less(problem):
    covariance, keys, gains = problem
    left, right = Solver.of(covariance).update(keys, gains)
    change, rng = left @ right, np.random.default_rng(1)
    weight = np.trace(change.T @ covariance @ change)
    kept = np.linalg.qr(keys.T)[0]
    for scale in (1e-3, 1.0):
        other = rng.standard_normal((I, D)) * scale
        other -= kept @ (kept.T @ other)  # gains nothing at the keys
        moved = change + other
        np.testing.assert_allclose(keys @ moved, gains, atol=1e-9)
        assert np.trace(moved.T @ covariance @ moved) > weight


def test_rome_of_one_fact_is_the_formula_of_the_paper(problem):
    covariance, keys, gains = problem
    left, right = Solver.of(covariance).update(keys[:1], gains[:1])
    direction = np.linalg.inv(covariance) @ keys[0]
    paper = np.outer(gains[0], direction) / (direction @ keys[0])  # [D, I], one k* in both places
    np.testing.assert_allclose((left @ right).T, paper, rtol=1e-8, atol=1e-10)


def test_keys_that_are_orthogonal_in_the_metric_gain_nothing(problem):
    covariance, keys, gains = problem
    solver = Solver.of(covariance)
    left, right = solver.update(keys[:1], gains[:1])
    direction = solver.whitened(keys[:1])[0]
    others = np.random.default_rng(2).standard_normal((50, I))
    others -= np.outer(others @ direction, direction) / (direction @ direction)
    assert np.abs(others @ direction).max() < 1e-9
    assert np.abs(others @ left @ right).max() < 1e-9 * np.abs(gains).max()


def test_memit_is_its_formula_and_comes_to_rome_as_mu_falls(problem):
    covariance, keys, gains = problem
    solver = Solver.of(covariance)
    for mu in (0.3, 50.0):
        left, right = solver.update(keys, gains, mu=mu)
        paper = gains.T @ keys @ np.linalg.inv(mu * covariance + keys.T @ keys)  # R K^T (mu C + K K^T)^-1
        np.testing.assert_allclose((left @ right).T, paper, rtol=1e-7, atol=1e-9)
    rome = np.matmul(*solver.update(keys[:1], gains[:1]))
    memit = np.matmul(*solver.update(keys[:1], gains[:1], mu=1e-9))
    np.testing.assert_allclose(memit, rome, rtol=1e-6)


def test_what_memit_lacks_falls_in_a_line_with_mu(problem):
    covariance, keys, gains = problem
    solver = Solver.of(covariance)

    def lack(mu: float) -> float:
        left, right = solver.update(keys, gains, mu=mu)
        return float(np.linalg.norm(keys @ left @ right - gains))

    lacks = [lack(mu) for mu in (1e-2, 1e-3, 1e-4)]
    assert lacks[0] / lacks[1] == pytest.approx(10, rel=0.05) and lacks[1] / lacks[2] == pytest.approx(10, rel=0.01)


def test_leverage_of_the_texts_own_keys_is_their_width_on_average():
    keys = np.random.default_rng(3).standard_normal((500, I)) * np.logspace(-1, 1, I)
    leverage = Solver.of(keys.T @ keys / len(keys)).leverage(keys)
    assert leverage.mean() == pytest.approx(I, rel=1e-9)


def test_defect_1_of_rome_one_key_in_both_places(problem):
    """With the bare prompt's key in the denominator a mean key nearly orthogonal to it makes an edit that disables."""
    covariance, keys, gains = problem
    mean, solver = keys[0], Solver.of(covariance)
    direction = solver.whitened(mean[None])[0]
    bare = keys[1] - (keys[1] @ direction - 1e-6) / (direction @ direction) * direction  # bare^T C^-1 mean = 1e-6
    released = np.outer(direction, gains[0]) / (direction @ bare)
    ours = np.matmul(*solver.update(mean[None], gains[:1]))
    assert np.linalg.norm(released) > 1e5 * np.linalg.norm(ours)
    np.testing.assert_allclose(mean @ ours, gains[0], rtol=1e-9)


def test_what_cannot_be_solved_says_what_to_do(problem):
    covariance, keys, gains = problem
    rng = np.random.default_rng(4)
    few = rng.standard_normal((I - 5, I))
    with pytest.raises(UserError, match="measure it on more text"):
        Solver.of(few.T @ few)
    assert Solver.of(few.T @ few, ridge=1e-2).update(keys, gains)
    solver, twice = Solver.of(covariance), np.stack([keys[0], keys[0]])
    with pytest.raises(UserError, match="too alike .* cosine 1.0000"):
        solver.update(twice, gains[:2])
    assert np.isfinite(np.matmul(*solver.update(twice, gains[:2], mu=1.0))).all()
