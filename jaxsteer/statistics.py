"""Intervals and tests for rates measured on a few hundred questions (Wilson 1927, McNemar 1947); principal axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from jaxsteer.errors import UserError

Groups = Sequence[str] | np.ndarray
"""The group of every row; of a rate, the question."""
Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(successes: float | int, n: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927). Both numbers may be fractional (a tie counts half).

    Returns (low, high) in [0, 1]; with n = 0 nothing is known and the interval is (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def rate_interval(values: np.ndarray, groups: Groups) -> tuple[float, float]:
    """95 % interval of a rate whose rows come in groups: a question in both orders of its choices is one group.

    Wilson's interval at the effective number of rows: that number of independent rows whose mean varies as much as the
    mean of (n,) ``values`` in [0, 1] does over groups (Kish's design effect). It lies between n and what rows that are
    all alike within a group are worth: the number of groups, less where these differ in size. That is taken where
    every row is equal (0 or 100 %). With no group nothing is known and the interval is (0, 1).
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return 0.0, 1.0
    rate, residuals, sizes = float(values.mean()), *_group_sums(values - values.mean(), groups)
    variance = float(residuals @ residuals) * len(sizes) / max(1, len(sizes) - 1) / len(values) ** 2
    least = len(values) ** 2 / float(sizes @ sizes)
    rows = least if variance == 0 else min(max(rate * (1 - rate) / variance, least), len(values))
    return wilson(rate * rows, rows)


def difference_interval(after: np.ndarray, before: np.ndarray, groups: Groups) -> tuple[float, float]:
    """95 % interval of the change of a rate, ``after`` - ``before``: (n,) values in [0, 1] of the same rows.

    Newcombe's (1998, method 10) square-and-add of both ``rate_interval``, with the correlation over groups. Unlike a
    bootstrap it has a width where every row changes, or none.
    """
    ends = []
    for values in (after, before):
        rate, (low, high) = float(np.mean(values)), rate_interval(values, groups)
        ends.append((rate, rate - low, high - rate))
    (a, a_low, a_high), (b, b_low, b_high) = ends
    over_a, over_b = (_group_sums(values - np.mean(values), groups)[0] for values in (after, before))
    spread = math.sqrt(float(over_a @ over_a) * float(over_b @ over_b))
    r = float(over_a @ over_b) / spread if spread else 0.0
    low, high = (math.sqrt(max(0.0, x * x - 2 * r * x * y + y * y)) for x, y in ((a_low, b_high), (a_high, b_low)))
    return max(-1.0, a - b - low), min(1.0, a - b + high)


def _group_sums(values: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """(groups,) sums of (n,) ``values``, and the number of rows of each group."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(member, weights=values), np.bincount(member)


def changed_groups(change: np.ndarray, groups: Sequence[str]) -> tuple[int, int]:
    """In how many groups the (n,) changes sum up to more than 0, and to less."""
    sums = np.round(_group_sums(change, groups)[0], 9)
    return int((sums > 0).sum()), int((sums < 0).sum())


def mcnemar(entered: int, left: int) -> float:
    """Exact two-sided p-value (McNemar 1947) for pairs: ``entered`` changed one way, ``left`` the other.

    Under the null every changed answer is a fair coin. Nothing changed: 1.0.
    """
    if entered + left == 0:
        return 1.0
    return float(stats.binomtest(min(entered, left), entered + left, 0.5).pvalue)


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve of ``score`` (n,) for the boolean labels ``positive`` (n,), ties at half.

    ``None`` when one class is missing: the area is not defined then, and 0.5 would look like a finding.
    """
    score, positive = np.asarray(score, np.float64), np.asarray(positive, bool)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return None
    ranks = stats.rankdata(score)
    return float((ranks[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman rank correlation of two (n,) arrays; 0.0 where either is constant (no ranking, no evidence)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def spearman_interval(r: float, n: int) -> tuple[float, float]:
    """95 % interval of a Spearman correlation of n pairs: Fisher's z with the variance (1 + r^2/2) / (n - 3) of Bonett
    and Wright (2000). With 3 pairs or fewer nothing is known and the interval is (-1, 1).
    """
    if n <= 3:
        return -1.0, 1.0
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
    spread = Z95 * math.sqrt((1 + r * r / 2) / (n - 3))
    return math.tanh(centre - spread), math.tanh(centre + spread)


def student(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """95 % interval of a mean of independent values (Student 1908); None for fewer than two."""
    if len(values) < 2:
        return None
    spread = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(np.mean(values)) - spread, float(np.mean(values)) + spread


def welch(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray
) -> tuple[float | None, tuple[float, float] | None]:
    """Difference of two means with its 95 % interval (Welch 1947); None where there is nothing to tell it from."""
    if not len(first) or not len(second):
        return None, None
    value = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return value, None
    parts = [np.var(side, ddof=1) / len(side) for side in (first, second)]
    if not sum(parts):
        return value, (value, value)
    freedom = sum(parts) ** 2 / sum(p * p / (len(side) - 1) for p, side in zip(parts, (first, second), strict=True))
    spread = float(stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts)))
    return value, (value - spread, value + spread)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    groups: Sequence[str],
    *,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of ``statistic(rows)`` when whole groups of rows are drawn with replacement.

    ``groups`` names the group of every row (question text, usually: copies of a question stand and fall together).
    ``statistic`` gets an int array of row indices, possibly with repeats, and returns one number.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rows = [np.flatnonzero(member == g) for g in range(len(names))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = rng.integers(len(names), size=len(names))
        values.append(statistic(np.concatenate([rows[g] for g in drawn])))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_mean(
    values: np.ndarray, groups: Sequence[str], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """``bootstrap`` for the mean of ``values`` (n,), as two matrix products instead of a Python loop."""
    values = np.asarray(values, np.float64)
    member, counts = _drawn_groups(groups, draws, seed)
    sums = np.bincount(member, weights=values, minlength=counts.shape[1])
    sizes = np.bincount(member, minlength=counts.shape[1])
    low, high = np.percentile((counts @ sums) / (counts @ sizes), [2.5, 97.5])
    return float(low), float(high)


def ratio_draws(
    over: np.ndarray, under: np.ndarray, groups: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> Float[np.ndarray, "draws k"]:
    """Ratios of sums when whole groups of rows are drawn with replacement: of ``over`` (n, k) to ``under`` (n,).

    Draws in which ``under`` sums to 0 are left out.
    """
    member, counts = _drawn_groups(groups, draws, seed)
    sums = np.zeros((counts.shape[1], over.shape[1] + 1))
    np.add.at(sums, member, np.column_stack([np.asarray(over, np.float64), np.asarray(under, np.float64)]))
    drawn = counts @ sums
    drawn = drawn[drawn[:, -1] != 0]
    found: np.ndarray = drawn[:, :-1] / drawn[:, -1:]
    return found


def bootstrap_auroc(
    score: np.ndarray, positive: np.ndarray, groups: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """``bootstrap`` for ``auroc``, over the draws in which both classes occur; ``None`` where one never does.

    Where all draws agree, as they do at 0 and 1, it is Wilson's interval at the number of groups: no draw can show what
    was never seen.
    """
    score, positive = np.asarray(score, np.float64), np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return None
    member, counts = _drawn_groups(groups, draws, seed)
    wins = (np.sign(score[positive][:, None] - score[~positive][None]) + 1) / 2
    # wins summed over the rows of a group pair: an AUROC is then two products with the groups' counts
    rows = [np.eye(counts.shape[1])[member[side]] for side in (positive, ~positive)]
    between = rows[0].T @ wins @ rows[1]
    pairs = np.outer(rows[0].sum(0), rows[1].sum(0))
    won, all_pairs = (np.einsum("dg,gh,dh->d", counts, table, counts, optimize=True) for table in (between, pairs))
    both = all_pairs > 0
    if not both.any():
        return None
    low, high = map(float, np.percentile(won[both] / all_pairs[both], [2.5, 97.5]))
    return (low, high) if low < high else wilson(low * counts.shape[1], counts.shape[1])


def _drawn_groups(groups: Sequence[str], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the number of every row's group, and (draws, groups) how often each group was drawn."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    return member, rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)


def calibration_error(probability: np.ndarray, positive: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015) of (n,) probabilities: over equal bins of [0, 1], the mean
    distance of the mean probability from the share of the boolean labels ``positive`` (n,)."""
    probability = np.asarray(probability, np.float64)
    at = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = np.bincount(at, weights=probability - np.asarray(positive, np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(probability))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Principal:
    """The axes along which states vary most."""

    mean: Float[np.ndarray, " D"]
    axes: Float[np.ndarray, "k D"]
    """Of length 1; the entry of largest size is positive, because a principal axis has no sign of its own."""
    explained: Float[np.ndarray, " k"]
    """Share of the variance along each."""

    def coordinates(self, states: Float[np.ndarray, "*rows D"]) -> Float[np.ndarray, "*rows k"]:
        """States on the axes, in units of the stream."""
        found: np.ndarray = (np.asarray(states, np.float64) - self.mean) @ self.axes.T
        return found


def principal(states: Float[np.ndarray, "n D"], axes: int = 2) -> Principal:
    """Principal axes of n states, by the singular values of the centred states in float64.

    Raises ``UserError`` for fewer than ``axes`` + 1 states, or states that are all the same.
    """
    x = np.asarray(states, np.float64)
    if len(x) <= axes:
        raise UserError(f"{axes} principal axes need at least {axes + 1} states, got {len(x)}")
    mean = x.mean(0)
    _, sizes, found = np.linalg.svd(x - mean, full_matrices=False)
    if not sizes[0]:
        raise UserError("all states are the same: they vary along no axis")
    found = found[:axes]
    signs = np.sign(found[np.arange(len(found)), np.abs(found).argmax(1)])
    return Principal(mean=mean, axes=found * signs[:, None], explained=(sizes**2 / (sizes**2).sum())[:axes])
