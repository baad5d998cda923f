"""Statistics against SciPy, and against values worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxsteer.statistics import auroc, bootstrap, bootstrap_auroc, bootstrap_mean, mcnemar, spearman, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (57, 200), (1, 1)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_without_data_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


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
