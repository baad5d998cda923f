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
    changed_groups,
    difference_interval,
    mcnemar,
    principal,
    rate_interval,
    ratio_draws,
    spearman,
    spearman_interval,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (57, 200), (1, 1)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_data_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_interval_of_a_rate_is_wilsons_on_the_rows_that_count() -> None:
    pairs = list("aabbccdd")
    copies = np.asarray([1, 1, 0, 0, 1, 1, 1, 1], float)
    assert rate_interval(copies, pairs) == pytest.approx(wilson(3, 4), abs=1e-12)
    assert rate_interval(copies, list("abcdefgh")) == pytest.approx(wilson(6, 8), abs=1e-12)
    assert rate_interval(np.zeros(8), pairs) == wilson(0, 4)  # and not 0 of 8
    assert rate_interval(np.zeros(0), []) == (0.0, 1.0)
    # Questions of other sizes are worth less than their number: (1 + 7)^2 / (1^2 + 7^2) of two.
    assert rate_interval(np.ones(8), list("abbbbbbb")) == pytest.approx(wilson(1.28, 1.28))


@pytest.mark.parametrize(("n", "most"), [(30, 0.985), (120, 0.97)])
@pytest.mark.parametrize(("before", "after", "kept"), [(0.85, 0.5, 0.0), (0.85, 0.8, 0.8), (0.9, 0.3, 0.5)])
def test_the_interval_of_a_change_covers_it(n: int, most: float, before: float, after: float, kept: float) -> None:
    """Simulated pairs of answers to n questions, of which a part is decided by the same chance; orders agree half."""
    rng, groups, inside = np.random.default_rng(1), [f"{i // 2}" for i in range(2 * n)], 0
    for _ in range(1500):
        one, two = rng.random((2, n, 2))
        two = np.where(rng.random((n, 1)) < kept, one, two)
        for chance in (one, two):
            chance[:, 1] = np.where(rng.random(n) < 0.5, chance[:, 0], chance[:, 1])
        low, high = difference_interval((two < after).ravel() * 1.0, (one < before).ravel() * 1.0, groups)
        inside += low <= after - before <= high
    assert 0.93 <= inside / 1500 <= most


def test_changes_of_a_rate_where_every_question_changes_or_none_does() -> None:
    pairs, ones, zeros = [f"{i // 2}" for i in range(240)], np.ones(240), np.zeros(240)
    assert difference_interval(zeros, zeros, pairs) == pytest.approx((-wilson(0, 120)[1], wilson(0, 120)[1]))
    low, high = difference_interval(zeros, ones, pairs)
    assert low == -1.0 and high == pytest.approx(-1 + np.hypot(wilson(0, 120)[1], wilson(0, 120)[1]))
    # Newcombe (1998): differences of rates are narrower where the same questions stay, wider where others do.
    one = np.arange(240) < 120
    same, other = (difference_interval(x * 1.0, one * 1.0, pairs) for x in (one, ~one))
    assert same[1] - same[0] < 0.01 < other[1] - other[0]
    # Two orders that change in opposite ways are no change of the question.
    assert changed_groups(np.asarray([1, -1, 1, 0, 1, 1, -1, -1.0]), list("aabbccdd")) == (2, 1)


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


@pytest.mark.parametrize(("rho", "n"), [(0.0, 31), (0.6, 31), (0.9, 63)])
def test_the_interval_of_a_spearman_correlation_holds_what_it_says(rho: float, n: int) -> None:
    rng = np.random.default_rng(0)
    true = 6 / np.pi * np.arcsin(rho / 2)  # of normal pairs with correlation rho
    pairs = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(1000, n))
    ends = np.asarray([spearman_interval(spearman(x, y), n) for x, y in pairs.transpose(0, 2, 1)])
    assert np.mean((ends[:, 0] <= true) & (true <= ends[:, 1])) == pytest.approx(0.95, abs=0.02)
    assert spearman_interval(0.9, 3) == (-1.0, 1.0) and spearman_interval(1.0, 30)[1] <= 1.0


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


def test_ratios_of_sums_spread_over_groups_as_the_delta_method_says() -> None:
    rng = np.random.default_rng(0)
    groups = [str(i // 2) for i in range(400)]
    under = rng.uniform(1, 3, 400)
    over = np.stack([0.5 * under + rng.normal(0, 0.3, 400), 2.0 * under], axis=1)
    found = ratio_draws(over, under, groups, draws=4000)
    assert found.shape == (4000, 2)
    np.testing.assert_allclose(found[:, 1], 2.0)  # a ratio that is the same in every row does not vary
    ratio = over[:, 0].sum() / under.sum()
    residuals = (over[:, 0] - ratio * under).reshape(200, 2).sum(1)
    np.testing.assert_allclose(found[:, 0].mean(), ratio, atol=2e-3)
    np.testing.assert_allclose(found[:, 0].std(), np.sqrt((residuals**2).sum()) / under.sum(), rtol=0.05)


def test_bootstrap_of_an_auroc_equals_the_slow_one() -> None:
    rng = np.random.default_rng(2)
    score, positive = rng.integers(0, 9, 60).astype(float), np.arange(60) % 2 == 0
    groups = [str(g) for g in rng.integers(0, 20, 60)]
    quick = bootstrap_auroc(score + positive, positive, groups, draws=4000)
    slow = bootstrap(lambda rows: float(auroc((score + positive)[rows], positive[rows]) or 0.5), groups, draws=2000)
    assert quick == pytest.approx(slow, abs=0.02)
    assert bootstrap_auroc(score, np.ones(60, bool), groups) is None
    apart = np.where(positive, 2.0, -2.0)  # nothing else can be drawn
    assert bootstrap_auroc(apart, positive, groups) == wilson(len(set(groups)), len(set(groups)))


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
