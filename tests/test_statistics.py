"""Statistics against SciPy, and against values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxsteer.errors import UserError
from jaxsteer.statistics import (
    auroc,
    bootstrap,
    bootstrap_auroc,
    bootstrap_mean,
    mcnemar,
    principal,
    rate_interval,
    spearman,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (57, 200), (1, 1)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_data_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [30, 120])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
def test_the_interval_of_a_rate_in_both_orders_covers_it_95_times_of_100(n: int, alike: float) -> None:
    """Simulated: with probability ``alike`` the second order of a question copies the first.

    With 30 copied questions only 31 rates can be seen, and no interval covers 2 % in 93 to 97 of 100 studies: single
    rates may reach 98, their average may not.
    """
    rng, groups, covered = np.random.default_rng(0), [f"{i // 2}" for i in range(2 * n)], {}
    for rate in (0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98):
        first, other = rng.random((2, 2000, n)) < rate
        both = np.stack([first, np.where(rng.random((2000, n)) < alike, first, other)], -1).reshape(2000, -1)
        known: dict[tuple[int, int], tuple[float, float]] = {}  # the interval follows from these two counts
        inside = 0
        for row in both:
            pairs = row.reshape(n, 2).sum(1)
            key = int((pairs == 1).sum()), int((pairs == 2).sum())
            if key not in known:
                known[key] = rate_interval(row.astype(float), groups)
            low, high = known[key]
            inside += low <= rate <= high
        covered[rate] = inside / 2000
    assert 0.93 <= np.mean(list(covered.values())) <= 0.97, covered
    assert all(0.925 <= share <= 0.985 for share in covered.values()), covered


def test_the_interval_of_a_rate_is_wilsons_on_the_rows_that_count() -> None:
    pairs = list("aabbccdd")
    copies = np.asarray([1, 1, 0, 0, 1, 1, 1, 1], float)
    assert rate_interval(copies, pairs) == pytest.approx(wilson(3, 4), abs=1e-12)
    assert rate_interval(copies, list("abcdefgh")) == pytest.approx(wilson(6, 8), abs=1e-12)
    assert rate_interval(np.zeros(8), pairs) == wilson(0, 4)  # and not 0 of 8
    assert rate_interval(np.zeros(0), []) == (0.0, 1.0)


def test_mcnemar_is_the_exact_sign_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)  # both tails of B(10, 1/2)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    pairs = score[positive][:, None] - score[~positive][None]
    assert auroc(score, positive) == pytest.approx(np.mean((np.sign(pairs) + 1) / 2))
    assert auroc(score + 100, positive) == auroc(score, positive)  # a constant bias changes nothing
    assert auroc(score, np.ones(50, bool)) is None


def test_spearman_of_a_constant_is_no_evidence() -> None:
    assert spearman(np.arange(5), np.arange(5) ** 3) == pytest.approx(1.0)
    assert spearman(np.zeros(5), np.arange(5)) == 0.0


def test_bootstrap_draws_whole_groups() -> None:
    rng = np.random.default_rng(1)
    values = np.repeat(rng.random(30), 4)  # copies of a question must not narrow the interval
    groups = [str(g) for g in np.repeat(np.arange(30), 4)]
    low, high = bootstrap_mean(values, groups)
    alone = bootstrap_mean(values[::4], groups[::4])
    assert (low, high) == pytest.approx(alone, abs=1e-12)
    slow = bootstrap(lambda rows: float(values[rows].mean()), groups, draws=2000)
    assert (low, high) == pytest.approx(slow, abs=0.02)
    assert low < values.mean() < high


def test_bootstrap_of_an_auroc_equals_the_slow_one() -> None:
    rng = np.random.default_rng(2)
    score, positive = rng.integers(0, 9, 60).astype(float), np.arange(60) % 2 == 0
    groups = [str(g) for g in rng.integers(0, 20, 60)]
    quick = bootstrap_auroc(score + positive, positive, groups, draws=4000)
    slow = bootstrap(lambda rows: float(auroc((score + positive)[rows], positive[rows]) or 0.5), groups, draws=2000)
    assert quick == pytest.approx(slow, abs=0.02)
    assert bootstrap_auroc(score, np.ones(60, bool), groups) is None


def test_principal_axes_are_eigenvectors_of_the_covariance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)) * [9, 4, 1, 1, 1, 1] + 3
    got = principal(x, axes=2)
    covariance = np.cov(x.T, bias=True)
    for axis, share in zip(got.axes, got.explained, strict=True):
        variance = axis @ covariance @ axis
        np.testing.assert_allclose(covariance @ axis, variance * axis, atol=1e-9)
        assert variance / np.trace(covariance) == pytest.approx(share)
        assert np.linalg.norm(axis) == pytest.approx(1) and axis[np.abs(axis).argmax()] > 0
    np.testing.assert_allclose(got.coordinates(x).mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(principal(-x, axes=2).axes, got.axes, atol=1e-9)  # no sign of its own
    with pytest.raises(UserError, match="at least 3 states"):
        principal(x[:2])
    with pytest.raises(UserError, match="the same"):
        principal(np.ones((5, 3)))
