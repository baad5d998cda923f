"""Fits of probes against scikit-learn, and against what was planted."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from jaxsteer.lens.fitting import calibrated, fit, principal_axes


def states(n: int, d: int, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated states of uneven scales [n, d], labels along a direction, and which texts are fitted."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ np.diag(1 / np.arange(1, d + 1)) @ rng.standard_normal((d, d))
    x = (x * rng.uniform(0.1, 10, d) + rng.standard_normal(d)).astype(np.float32)
    along = (x - x.mean(0)) / x.std(0) @ rng.standard_normal(d)
    y = along / along.std() + noise * rng.standard_normal(n) > 0
    return x, y, np.arange(n) % 5 > 0


@partial(jax.jit, static_argnames="kind")
def fitted(kind: str, x: jax.Array, y: jax.Array, weight: jax.Array, penalty: jax.Array):
    return fit(kind, x, y, weight, penalty, principal_axes(x))


def standardised(x: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = x.astype(np.float64)
    std = wide[inside].std(0)
    return (wide - wide[inside].mean(0)) / std, std


@pytest.mark.parametrize(("n", "d"), [(300, 40), (60, 100)])
def test_logistic_is_that_of_scikit_learn(n: int, d: int):
    """Weights and intercept for six penalties at once, with more texts than dimensions and with fewer."""
    x, y, inside = states(n, d)
    penalty = np.float32([1e-2, 0.1, 1.0, 10.0, 100.0, 1e4])
    columns = np.repeat(y[:, None].astype(np.float32), len(penalty), 1)
    found = fitted("logistic", x, columns, inside.astype(np.float32), penalty)
    z, std = standardised(x, inside)
    for i, strength in enumerate(penalty):
        oracle = LogisticRegression(C=1 / float(strength), solver="newton-cholesky", tol=1e-12).fit(
            z[inside], y[inside]
        )
        w = np.asarray(found.w[:, i], np.float64) * std
        assert np.linalg.norm(w - oracle.coef_[0]) <= 1e-4 * np.linalg.norm(oracle.coef_[0])
        scores = np.asarray(found.scores[:, i])
        np.testing.assert_allclose(scores, oracle.decision_function(z), atol=2e-4 * np.abs(scores).max())
        np.testing.assert_allclose(x.astype(np.float64) @ found.w[:, i] + found.b[i], scores, atol=1e-2)


def test_ridge_is_that_of_scikit_learn():
    x, y, inside = states(200, 50)
    penalty = np.float32([0.1, 10.0, 1000.0])
    found = fitted("ridge", x, np.repeat(y[:, None].astype(np.float32), 3, 1), inside.astype(np.float32), penalty)
    z, std = standardised(x, inside)
    for i, strength in enumerate(penalty):
        oracle = RidgeClassifier(alpha=float(strength)).fit(z[inside], y[inside])
        w = np.asarray(found.w[:, i], np.float64) * std
        coef = np.ravel(oracle.coef_)
        assert np.linalg.norm(w - coef) <= 1e-4 * np.linalg.norm(coef)
        np.testing.assert_allclose(found.scores[:, i], oracle.decision_function(z), atol=1e-3)


def test_mean_difference_is_that_of_the_states_as_they_are():
    x, y, inside = states(200, 50)
    found = fitted("mean", x, y[:, None].astype(np.float32), inside.astype(np.float32), jnp.ones(1))
    wide = x.astype(np.float64)[inside]
    means = wide[y[inside]].mean(0), wide[~y[inside]].mean(0)
    w = means[0] - means[1]
    np.testing.assert_allclose(found.w[:, 0], w, atol=1e-3)
    np.testing.assert_allclose(found.scores[:, 0], (x - (means[0] + means[1]) / 2) @ w, rtol=1e-3, atol=0.1)


def test_separable_labels_and_dimensions_that_do_not_vary_give_finite_fits():
    x, y, inside = states(40, 80, noise=0.0)
    x[:, 7] = 3.0
    for kind in ("logistic", "ridge", "mean", "mlp"):
        found = fitted(kind, x, y[:, None].astype(np.float32), inside.astype(np.float32), jnp.full(1, 1e-3))
        assert np.isfinite(found.scores).all() and np.isfinite(found.w).all()
        assert kind == "mean" or ((np.asarray(found.scores[:, 0]) > 0) == y)[inside].all()


def test_mlp_learns_what_no_linear_probe_can():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 8)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.float32)[:, None]
    weight = (np.arange(600) < 400).astype(np.float32)
    right = {
        kind: float(((np.asarray(fitted(kind, x, y, weight, jnp.ones(1)).scores) > 0) == y)[400:].mean())
        for kind in ("mlp", "logistic")
    }
    assert right["mlp"] > 0.85 and right["logistic"] < 0.6


def test_calibrated_scores_are_a_logistic_fit():
    rng = np.random.default_rng(0)
    s = rng.standard_normal((500, 1)).astype(np.float32) * 7 + 2
    y = (rng.uniform(size=(500, 1)) < 1 / (1 + np.exp(-(0.4 * s - 1)))).astype(np.float32)
    found = np.asarray(calibrated(jnp.asarray(s), jnp.asarray(y), jnp.ones(500)))
    oracle = LogisticRegression(C=1e6, tol=1e-10).fit(s, y[:, 0])
    np.testing.assert_allclose(found[:, 0], oracle.decision_function(s), atol=0.01)
