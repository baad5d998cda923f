"""The geometry of characters against scikit-learn, the released pipeline's arithmetic, and spaces that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.decomposition import PCA

from jaxsteer.axis.geometry import Geometry, Means, agreement, contrasts, cosine, exchanged, pivotal
from jaxsteer.errors import UserError

R, Q, D = 20, 12, 32


def rollouts(noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(states, role, question, place): roles lie along one direction, the Assistant beyond the last of them."""
    rng = np.random.default_rng(seed)
    place = np.append(np.linspace(-1, 1, R), 1.5)
    direction = np.eye(D)[0] * 3
    question = rng.normal(size=(Q, D))  # what all roles say to a question alike
    role, asked = np.repeat(np.arange(R + 1), 2 * Q), np.tile(np.repeat(np.arange(Q), 2), R + 1)
    states = place[role][:, None] * direction + question[asked] + noise * rng.normal(size=(len(role), D))
    return states.astype(np.float32), role, asked, place


def means(noise: float = 1.0, seed: int = 0) -> Means:
    states, role, question, _ = rollouts(noise, seed)
    return Means.of(states, role, question, R, Q)


def test_vectors_and_axis_are_those_of_the_released_pipeline():
    """Role vectors are means over all rollouts, the axis is default minus the mean of the role vectors, PCA is that of
    scikit-learn on the mean-centred role vectors."""
    states, role, _, _ = rollouts()
    wide = states.astype(np.float64)
    released = np.stack([wide[role == r].mean(0) for r in range(R)])
    default = wide[role == R].mean(0)
    axis = default - released.mean(0)
    here = Geometry.of(means().vectors())
    np.testing.assert_allclose(here.vectors[:-1], released, atol=1e-6)
    np.testing.assert_allclose(here.axis, axis, atol=1e-6)
    pca = PCA().fit(released)
    np.testing.assert_allclose(here.explained[: R - 1], pca.explained_variance_ratio_[: R - 1], atol=1e-6)
    for k in range(3):
        assert abs(cosine(here.components[k], pca.components_[k])) == pytest.approx(1, abs=1e-6)
        assert cosine(here.components[k], axis) >= 0
        np.testing.assert_allclose(np.abs(here.loadings[:, k]), np.abs(pca.transform(here.vectors)[:, k]), atol=1e-6)
    assert here.needed == int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), 0.7) + 1)
    unit = axis / np.linalg.norm(axis)
    expected = (here.vectors @ unit - released.mean(0) @ unit) / ((default - released.mean(0)) @ unit)
    np.testing.assert_allclose(here.positions, expected, atol=1e-12)
    assert here.positions[-1] == pytest.approx(1) and here.positions[:-1].mean() == pytest.approx(0, abs=1e-12)


def test_errors_are_those_of_the_mean_over_questions():
    found = means()
    each = found.sums / found.counts[:, :, None]
    expected = each.std(1, ddof=1) / np.sqrt(Q)
    np.testing.assert_allclose(found.errors(), expected, rtol=1e-9)


def test_the_known_order_is_found_and_an_exchanged_one_is_not():
    states, role, question, place = rollouts()
    here, control = Geometry.of(means().vectors()), means().shuffled(0)
    assert stats.spearmanr(here.positions[:-1], place[:-1]).statistic > 0.97
    assert cosine(here.axis, np.eye(D)[0]) > 0.9 and here.cosines[0] > 0.9
    assert here.edge[0] < 0  # beyond the last role
    assert agreement(means(), 20).order > 0.95
    assert abs(agreement(control, 20).order) < 0.4
    np.testing.assert_array_equal(control.sums[-1], means().sums[-1])  # the Assistant's stay
    np.testing.assert_allclose(control.sums[:-1].sum(0), means().sums[:-1].sum(0))  # and every question's


def test_scaling_takes_out_a_dimension_of_outsize_spread():
    """As in small models, where a few dimensions have values a thousand times larger than the others."""
    vectors = means(noise=0.1).vectors()
    loud = vectors.copy()
    loud[:, 5] += 1000 * np.random.default_rng(0).normal(size=len(loud))
    assert Geometry.of(loud).cosines[0] < 0.9 or abs(Geometry.of(loud).components[0, 5]) > 0.99
    unit = Geometry.of(loud, scaled=True)
    assert abs(unit.components[0, 5]) < 0.5


def test_intervals_cover_the_truth():
    """The position of a role in the limit of many questions lies in 95 % intervals about so often; with plain
    percentiles it would lie below them, because noise makes the axis longer."""
    truth = Geometry.of(means(noise=0.0).vectors()).positions
    inside = []
    for seed in range(40):
        found = means(noise=1.0, seed=seed)
        exact = Geometry.of(means(noise=0.0, seed=seed).vectors()).positions
        drawn = np.stack([Geometry.of(found.vectors(w)).positions for w in found.draws(100, seed)])
        here = Geometry.of(found.vectors()).positions
        for i in range(0, R, 3):
            low, high = pivotal(here[i], drawn[:, i])
            inside.append(low <= exact[i] <= high)
    assert 0.85 < np.mean(inside) <= 1.0
    assert len(truth) == R + 1
    assert pivotal(0.9, [0.5, 0.6, 0.7], 0, 1) == pytest.approx((1.0, 1.0), abs=0.11)


def test_draws_and_halves_keep_every_role():
    found = means()
    found = Means(sums=found.sums.copy(), counts=found.counts.copy())
    found.sums[3, 2:], found.counts[3, 2:] = 0, 0  # role 3 has rollouts to two questions only
    for weights in found.draws(20):
        assert weights.sum() == Q and np.isfinite(found.vectors(weights)).all()
    for one, other in found.halves(5):
        assert np.isfinite(one).all() and np.isfinite(other).all()
    found.counts[3, 1], found.sums[3, 1] = 0, 0
    with pytest.raises(UserError, match="cannot be halved"):
        list(found.halves(3))


def test_the_base_rate_is_that_of_each_role_in_the_assistants_place():
    vectors = means().vectors()
    base = contrasts(vectors)
    others = np.delete(vectors[:-1], 4, axis=0)
    axis = vectors[4] - others.mean(0)
    first = PCA().fit(others).components_[0]
    assert base[4] == pytest.approx(abs(cosine(axis, first)), abs=1e-9)
    assert len(base) == R


def test_exchanged_is_uniform_under_the_null_and_small_for_an_order():
    rng = np.random.default_rng(0)
    found = [exchanged(rng.normal(size=15), rng.normal(size=15), draws=200, seed=i) for i in range(100)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert exchanged(np.arange(15.0), np.arange(15.0) ** 3) == pytest.approx(1 / 2001)


def test_too_few_or_equal_roles_are_refused():
    with pytest.raises(UserError, match="at least 4 roles, got 3"):
        Geometry.of(means().vectors()[:4])
    with pytest.raises(UserError, match="all roles have the same vector"):
        Geometry.of(np.ones((6, 4)))
