"""The geometry of characters at one site: role vectors, the axis, principal components, and how sure they are.

Everything is float64 NumPy on sums of states by role and question, because the unit of every interval is the question:
a draw of the bootstrap takes whole questions with all rollouts of all roles to them.

Letters: R roles, A = R + 1 with the Assistant as it is at the end, Q questions, D width, k components.
Source: 2601.10387.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from jaxsteer.errors import UserError
from jaxsteer.statistics import spearman

COMPONENTS = 3
"""Principal components that are looked at one by one."""
SHARE = 0.7
"""Of the variance, which so many components reach."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Means:
    """States summed by role and question; the last role is the Assistant as it is."""

    sums: Float[np.ndarray, "A Q D"]
    counts: Int[np.ndarray, "A Q"]

    @classmethod
    def of(
        cls,
        states: Float[np.ndarray, "n D"],
        role: Int[np.ndarray, " n"],
        question: Int[np.ndarray, " n"],
        roles: int,
        questions: int,
    ) -> Means:
        """Of rollouts whose role (``roles``: the Assistant) and question are given by number; others are negative."""
        kept = role >= 0
        cells = (role * questions + question)[kept]
        sums = np.zeros(((roles + 1) * questions, states.shape[1]))
        np.add.at(sums, cells, states[kept].astype(np.float64))
        counts = np.bincount(cells, minlength=len(sums))
        return cls(sums=sums.reshape(roles + 1, questions, -1), counts=counts.reshape(roles + 1, questions))

    @property
    def questions(self) -> int:
        """How many questions there are."""
        return int(self.counts.shape[1])

    def vectors(self, weights: Float[np.ndarray, " Q"] | None = None) -> Float[np.ndarray, "A D"]:
        """The mean of each role's rollouts, each question counted by its weight; NaN where a role has none."""
        weights = np.ones(self.questions) if weights is None else weights
        with np.errstate(invalid="ignore"):
            found: np.ndarray = np.einsum("q,rqd->rd", weights, self.sums) / (self.counts @ weights)[:, None]
        return found

    def errors(self) -> Float[np.ndarray, "A D"]:
        """Standard error of each role's vector over its questions, per dimension; NaN with fewer than two."""
        with np.errstate(invalid="ignore", divide="ignore"):
            each = self.sums / self.counts[:, :, None]
            share = self.counts / self.counts.sum(1, keepdims=True)
            squares = np.nansum((share[:, :, None] * (each - self.vectors()[:, None])) ** 2, axis=1)
            n = (self.counts > 0).sum(1)[:, None]
            return np.where(n > 1, np.sqrt(squares * n / (n - 1)), np.nan)

    def draws(self, n: int, seed: int = 0) -> Iterator[Float[np.ndarray, " Q"]]:
        """Weights of ``n`` bootstrap samples of the questions; one in which a role has no rollout is drawn again.

        Raises ``UserError`` where a role has rollouts to so few questions that this goes on and on.
        """
        rng, tries = np.random.default_rng(seed), 0
        for _ in range(n):
            while True:
                weights = rng.multinomial(self.questions, np.full(self.questions, 1 / self.questions)).astype(float)
                if ((self.counts @ weights) > 0).all():
                    break
                if (tries := tries + 1) > 100 * n:
                    raise UserError(
                        "a role has rollouts to so few questions that drawing questions again leaves it without any: "
                        "leave such roles out, or give more questions"
                    )
            yield weights

    def halves(self, n: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Vectors of both halves of the questions, split at random ``n`` times; splits that leave a role out are not
        counted. Raises ``UserError`` where no split leaves every role a rollout in both halves."""
        rng, found = np.random.default_rng(seed), 0
        for _ in range(20 * n):
            first = np.zeros(self.questions)
            first[rng.permutation(self.questions)[: self.questions // 2]] = 1
            if ((self.counts @ first) > 0).all() and ((self.counts @ (1 - first)) > 0).all():
                found += 1
                yield self.vectors(first), self.vectors(1 - first)
            if found == n:
                return
        if not found:
            raise UserError(
                f"{self.questions} questions cannot be halved so that every role has a rollout in both halves: give "
                "more questions, or a judge's filter that leaves more"
            )

    def shuffled(self, seed: int) -> Means:
        """A control: the roles of the rollouts to each question exchanged at random, the Assistant's left alone."""
        rng = np.random.default_rng(seed)
        order = np.stack([rng.permutation(len(self.counts) - 1) for _ in range(self.questions)], axis=1)
        order = np.concatenate([order, np.full((1, self.questions), len(order))])
        at = (order, np.arange(self.questions)[None])
        return Means(sums=self.sums[at], counts=self.counts[at])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """The axis and the principal components of one set of vectors."""

    vectors: Float[np.ndarray, "A D"]
    axis: Float[np.ndarray, " D"]
    """mean(default) - mean over roles, as measured: it points towards the Assistant."""
    components: Float[np.ndarray, "k D"]
    """Of length 1, from the mean-centred vectors of the roles without the Assistant, oriented along the axis."""
    explained: Float[np.ndarray, " r"]
    """Share of the variance along each of all components."""

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "A D"], *, scaled: bool = False) -> Geometry:
        """Of role vectors and the Assistant's; ``scaled`` divides every dimension by its spread over roles first.

        Raises ``UserError`` for fewer than 4 roles, and for roles that are all the same.
        """
        roles = len(vectors) - 1
        if roles <= COMPONENTS:
            raise UserError(f"the space of characters needs at least {COMPONENTS + 1} roles, got {roles}")
        if scaled:
            spread = vectors[:-1].std(0)
            vectors = vectors / np.where(spread > 0, spread, 1)
        centred = vectors[:-1] - vectors[:-1].mean(0)
        # Through the Gram matrix: there are fewer roles than dimensions, and a bootstrap does this often.
        values, sides = np.linalg.eigh(centred @ centred.T)
        values, sides = np.maximum(values[::-1], 0), sides[:, ::-1]
        if not values[0] > 0:
            raise UserError("all roles have the same vector: the model does not play them, or reads none of it")
        axis = vectors[-1] - vectors[:-1].mean(0)
        components = (sides[:, :COMPONENTS] / np.sqrt(np.maximum(values[:COMPONENTS], 1e-300))).T @ centred
        signs = np.where(components @ axis < 0, -1.0, 1.0)
        return cls(vectors=vectors, axis=axis, components=components * signs[:, None], explained=values / values.sum())

    @property
    def unit(self) -> Float[np.ndarray, " D"]:
        """The axis, of length 1."""
        return self.axis / np.linalg.norm(self.axis)

    @property
    def positions(self) -> Float[np.ndarray, " A"]:
        """Projections on the axis: 0 is the mean of the roles, 1 the Assistant."""
        return self.along(self.axis)

    def along(self, axis: Float[np.ndarray, " D"]) -> Float[np.ndarray, " A"]:
        """Projections on another axis, 0 being the mean of the roles, in lengths of the Assistant's own axis."""
        found: np.ndarray = (self.vectors - self.vectors[:-1].mean(0)) @ axis
        return found / (np.linalg.norm(axis) * np.linalg.norm(self.axis))

    @property
    def loadings(self) -> Float[np.ndarray, "A k"]:
        """Coordinates along the components, in units of the stream."""
        found: np.ndarray = (self.vectors - self.vectors[:-1].mean(0)) @ self.components.T
        return found

    @property
    def cosines(self) -> Float[np.ndarray, " k"]:
        """Of the axis with each component; not negative, as the components are oriented along it."""
        found: np.ndarray = self.components @ self.unit
        return found

    @property
    def edge(self) -> Float[np.ndarray, " k"]:
        """How far from the roles' end on the axis' side the Assistant lies on each component, as a share of the roles'
        range: 0 at the outermost role, negative beyond it."""
        roles, default = self.loadings[:-1], self.loadings[-1]
        found: np.ndarray = (roles.max(0) - default) / (roles.max(0) - roles.min(0))
        return found

    @property
    def needed(self) -> int:
        """Components that reach ``SHARE`` of the variance."""
        return int(np.searchsorted(np.cumsum(self.explained), SHARE - 1e-12) + 1)


def spread(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The middle 95 % of values."""
    low, high = np.percentile(np.asarray(values, np.float64), [2.5, 97.5])
    return float(low), float(high)


def pivotal(
    found: float, drawn: Sequence[float] | np.ndarray, low: float = -np.inf, high: float = np.inf
) -> tuple[float, float]:
    """95 % interval of ``found`` from its bootstrap draws, reflected at it (Efron and Tibshirani 1993, basic interval).

    The noise of the questions shortens cosines and positions, and in a draw it does so twice: the middle of the draws
    lies beside the estimate as the estimate lies beside the truth. ``low`` and ``high`` bound what is possible.
    """
    first, last = spread(drawn)
    return float(np.clip(2 * found - last, low, high)), float(np.clip(2 * found - first, low, high))


def cosine(a: Float[np.ndarray, " D"], b: Float[np.ndarray, " D"]) -> float:
    """Cosine of two vectors; 0 where one is zero."""
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two random halves of the questions say of each other, over many splits."""

    cosine: float
    """Of their axes, in the mean."""
    cosine_spread: tuple[float, float]
    order: float
    """Rank correlation of the roles' positions, each half's roles on its own axis."""
    order_spread: tuple[float, float]


def agreement(means: Means, splits: int, seed: int = 0) -> Agreement:
    """How well two halves of the questions agree on the axis and on the order of the roles along it.

    Raises ``UserError`` as ``Means.halves`` does.
    """
    cosines, orders = [], []
    for first, second in means.halves(splits, seed):
        one, other = Geometry.of(first), Geometry.of(second)
        cosines.append(cosine(one.axis, other.axis))
        orders.append(spearman(one.positions[:-1], other.positions[:-1]))
    return Agreement(
        cosine=float(np.mean(cosines)), cosine_spread=spread(cosines),
        order=float(np.mean(orders)), order_spread=spread(orders),
    )  # fmt: skip


def contrasts(vectors: Float[np.ndarray, "A D"]) -> Float[np.ndarray, " R"]:
    """What the Assistant's place would be worth if any role stood in it: for each role, the cosine of its own axis
    (role minus the mean of the others) with PC1 of the others. The base rate of ``Geometry.cosines[0]``."""
    roles = len(vectors) - 1
    found = np.empty(roles)
    for j in range(roles):
        others = np.delete(vectors[:-1], j, axis=0)
        found[j] = Geometry.of(np.concatenate([others, vectors[j : j + 1]])).cosines[0]
    return found


def exchanged(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *, draws: int = 2000, seed: int = 0) -> float:
    """Two-sided p-value of the rank correlation of ``a`` and ``b`` when the entries of one are exchanged at random."""
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    rng, found = np.random.default_rng(seed), abs(first @ second)
    beyond = sum(abs(first @ rng.permutation(second)) >= found - 1e-9 for _ in range(draws))
    return float(beyond + 1) / (draws + 1)
