"""Linear probes and a small MLP, fitted side by side: label sets and penalties are columns of one program.

Every fit is of states x [n, D] standardised over the texts of weight 1 (the others are only scored), with an intercept
that no penalty touches:

* logistic: minimises sum of log losses + penalty / 2 |w|^2, which is scikit-learn's ``LogisticRegression(C=1/penalty)``
* ridge:    minimises sum of (x w + b - t)^2 + penalty |w|^2 for t = -1, 1: ``RidgeClassifier(alpha=penalty)``
* mean:     w is the difference of the class means; the threshold lies half way. It has no penalty
* mlp:      one hidden layer of ReLUs, Adam on the whole batch, penalty / 2 times the squares of its matrices

The first two are solved by Newton's method. Each step is a linear system that conjugate gradients solve without ever
forming a D x D matrix, preconditioned by the principal axes of all states; products with x are shared by all columns.

Letters: n texts, D width, M columns (label sets times penalties), r principal axes, I hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxsteer.lens.probe_options import Kind

HIDDEN, STEPS, RATE = 16, 200, 1e-2
"""Of the MLP: hidden units, steps of Adam, and its learning rate."""
_NEWTON, _CONJUGATE = 25, 60
_TOLERANCE = 1e-6
"""Of the gradient, relative to that at the start."""
_HALVINGS = 12

_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Axes(NamedTuple):
    """The principal axes of standardised states and the sums of squares along them: what preconditions their fits."""

    vectors: Float[Array, "D r"]
    squares: Float[Array, " r"]


class Fit(NamedTuple):
    """A fit of M columns, for states as they are."""

    scores: Float[Array, "n M"]
    """Log-odds of label 1 (logistic, mlp), or what is above 0 for it."""
    w: Float[Array, "D M"]
    """Weights of the states; of an MLP the mean gradient of its log-odds over the texts of weight 1."""
    b: Float[Array, " M"]
    """Intercepts: scores are x w + b, but for an MLP."""


def principal_axes(x: Float[Array, "n D"]) -> Axes:
    """Of all states together, through the smaller of their two Gram matrices. They only speed fits up."""
    mean, std = _moments(x, jnp.ones(len(x)))
    z = (x - mean) / std
    if x.shape[0] >= x.shape[1]:
        squares, vectors = jnp.linalg.eigh(_product(z.T, z))
        return Axes(vectors, jnp.maximum(squares, 0))
    squares, left = jnp.linalg.eigh(_product(z, z.T))
    real = squares > 1e-5 * squares[-1]
    vectors = _product(z.T, left) * jnp.where(real, lax.rsqrt(jnp.where(real, squares, 1)), 0)
    return Axes(vectors, jnp.where(real, squares, 0))


def fit(
    kind: Kind,
    x: Float[Array, "n D"],
    y: Float[Array, "n M"],
    weight: Float[Array, " n"],
    penalty: Float[Array, " M"],
    axes: Axes,
) -> Fit:
    """Fit labels y (0 or 1) on the texts of weight 1, and score all. Traced under jit; pure."""
    mean, std = _moments(x, weight)
    z = (x - mean) / std
    if kind == "mlp":
        return _mlp(z, y, weight, penalty, std)
    if kind == "mean":
        w, b = _mean_difference(z, y, weight, std)
    else:
        w, b = _newton(kind, z, y, weight, penalty, axes)
    scores = _product(z, w) + b
    w = w / std[:, None]
    return Fit(scores, w, b - _product(mean, w))


def log_loss(scores: Float[Array, "n M"], y: Float[Array, "n M"]) -> Float[Array, "n M"]:
    """Negative log-probability of labels, in nats, of scores that are log-odds."""
    return jnp.logaddexp(0, scores) - y * scores


def calibrated(scores: Float[Array, "n M"], y: Float[Array, "n M"], weight: Float[Array, " n"]) -> Float[Array, "n M"]:
    """Log-odds a s + c of scores, a logistic fit of each column's on the texts of weight 1 (Platt 1999)."""
    centre = (weight[:, None] * scores).sum(0) / weight.sum()
    spread = jnp.sqrt((weight[:, None] * (scores - centre) ** 2).sum(0) / weight.sum()) + 1e-12
    s = (scores - centre) / spread

    def step(_: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        a, c = at
        p = jax.nn.sigmoid(a * s + c)
        q = weight[:, None] * jnp.maximum(p * (1 - p), 1e-4)
        g = weight[:, None] * (p - y)
        ga, gc = (g * s).sum(0) + 1e-2 * a, g.sum(0)
        aa, ac, cc = (q * s * s).sum(0) + 1e-2, (q * s).sum(0), q.sum(0)
        det = aa * cc - ac * ac
        return a - (cc * ga - ac * gc) / det, c - (aa * gc - ac * ga) / det

    a, c = lax.fori_loop(0, 20, step, (jnp.zeros(s.shape[1]), jnp.zeros(s.shape[1])))
    return a * s + c


def _moments(x: Float[Array, "n D"], weight: Float[Array, " n"]) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    """Mean and standard deviation over the texts of weight 1; 1 for what does not vary."""
    total = weight.sum()
    mean = _product(weight, x) / total
    variance = _product(weight, (x - mean) ** 2) / total
    return mean, jnp.where(variance > 0, jnp.sqrt(variance), 1.0)


def _mean_difference(
    z: Float[Array, "n D"], y: Float[Array, "n M"], weight: Float[Array, " n"], std: Float[Array, " D"]
) -> tuple[Float[Array, "D M"], Float[Array, " M"]]:
    """For standardised states, the difference of the means of states as they are."""
    ones, zeros = weight[:, None] * y, weight[:, None] * (1 - y)
    first, second = (_product(z.T, side) / jnp.maximum(side.sum(0), 1) for side in (ones, zeros))
    w = (first - second) * jnp.square(std)[:, None]
    return w, -jnp.sum(w * (first + second) / 2, 0)


def _newton(
    kind: Kind,
    z: Float[Array, "n D"],
    y: Float[Array, "n M"],
    weight: Float[Array, " n"],
    penalty: Float[Array, " M"],
    axes: Axes,
) -> tuple[Float[Array, "D M"], Float[Array, " M"]]:
    """Weights and intercepts at the minimum, for standardised states."""
    mass, logistic = weight[:, None], kind == "logistic"

    def loss(m: Array) -> Array:
        each = log_loss(m, y) if logistic else (m - (2 * y - 1)) ** 2 / 2
        return (mass * each).sum(0)

    def slopes(m: Array) -> tuple[Array, Array]:
        """First and second derivatives of every text's loss."""
        if not logistic:
            return mass * (m - (2 * y - 1)), jnp.broadcast_to(mass, m.shape)
        p = jax.nn.sigmoid(m)
        return mass * (p - y), mass * p * (1 - p)

    def gradient(w: Array, m: Array) -> tuple[Array, Array, Array]:
        first, second = slopes(m)
        return _product(z.T, first) + penalty * w, first.sum(0), second

    def step(state: tuple) -> tuple:
        count, w, b, m, (gw, gb, second), _ = state
        dw, db, move = _solve(z, second, penalty, axes, gw, gb)
        now = loss(m) + penalty / 2 * (w * w).sum(0)
        wd, dd, ww = (w * dw).sum(0), (dw * dw).sum(0), (w * w).sum(0)
        length, open_ = jnp.ones_like(b), jnp.ones_like(b, bool)
        for halving in range(_HALVINGS):
            size = 0.5**halving
            then = loss(m + size * move) + penalty / 2 * (ww + 2 * size * wd + size**2 * dd)
            fine = then <= now + 1e-6 * jnp.abs(now)
            length = jnp.where(open_ & fine, size, length)
            open_ = open_ & ~fine
        length = jnp.where(open_, 0.0, length)
        w, b = w + length * dw, b + length * db
        m = _product(z, w) + b
        found = gradient(w, m)
        return count + 1, w, b, m, found, _size(*found[:2])

    shape = (z.shape[1], y.shape[1])
    w, b, m = jnp.zeros(shape), jnp.zeros(shape[1]), jnp.zeros(y.shape)
    found = gradient(w, m)
    start = _size(*found[:2])
    state = (0, w, b, m, found, start)
    state = lax.while_loop(lambda s: (s[0] < _NEWTON) & (s[5] > _TOLERANCE * start).any(), step, state)
    return state[1], state[2]


def _solve(
    z: Float[Array, "n D"],
    second: Float[Array, "n M"],
    penalty: Float[Array, " M"],
    axes: Axes,
    gw: Float[Array, "D M"],
    gb: Float[Array, " M"],
) -> tuple[Float[Array, "D M"], Float[Array, " M"], Float[Array, "n M"]]:
    """Newton's step (-H^-1 g) for every column, and its products with the states, by conjugate gradients."""
    total = jnp.maximum(second.sum(0), 1e-12)
    along = 1 / (penalty + axes.squares[:, None] * total / len(z)) - 1 / penalty

    def precondition(rw: Array, rb: Array) -> tuple[Array, Array]:
        return rw / penalty + _product(axes.vectors, along * _product(axes.vectors.T, rw)), rb / total

    def step(state: tuple) -> tuple:
        count, dw, db, move, rw, rb, pw, pb, rho = state
        t = _product(z, pw) + pb
        u = second * t
        hw, hb = _product(z.T, u) + penalty * pw, u.sum(0)
        curve = (pw * hw).sum(0) + pb * hb
        a = jnp.where(curve > 0, rho / jnp.where(curve > 0, curve, 1), 0)
        rw, rb = rw - a * hw, rb - a * hb
        sw, sb = precondition(rw, rb)
        new = (rw * sw).sum(0) + rb * sb
        beta = jnp.where(rho > 0, new / jnp.where(rho > 0, rho, 1), 0)
        return count + 1, dw + a * pw, db + a * pb, move + a * t, rw, rb, sw + beta * pw, sb + beta * pb, new

    rw, rb = -gw, -gb
    pw, pb = precondition(rw, rb)
    rho = (rw * pw).sum(0) + rb * pb
    zero = jnp.zeros_like
    state = (0, zero(rw), zero(rb), zero(second), rw, rb, pw, pb, rho)
    goal = 1e-6 * rho  # squares: a thousandth of the gradient is left
    state = lax.while_loop(lambda s: (s[0] < _CONJUGATE) & (s[-1] > goal).any(), step, state)
    return state[1], state[2], state[3]


def _size(gw: Array, gb: Array) -> Array:
    return jnp.sqrt((gw * gw).sum(0) + gb * gb)


def _mlp(
    z: Float[Array, "n D"],
    y: Float[Array, "n M"],
    weight: Float[Array, " n"],
    penalty: Float[Array, " M"],
    std: Float[Array, " D"],
) -> Fit:
    """An MLP for every column, all from the same start."""
    keys = jax.random.split(jax.random.key(0), 2)
    width = z.shape[1]
    start = {
        "w1": jax.random.normal(keys[0], (width, HIDDEN)) / width**0.5,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN,)) / HIDDEN**0.5,
        "b2": jnp.zeros(()),
    }
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (y.shape[1], *leaf.shape)), start)
    optimiser = optax.adam(RATE)

    def score(p: dict[str, Array], z: Array) -> Array:
        return _product(jax.nn.relu(_product(z, p["w1"]) + p["b1"]), p["w2"]) + p["b2"]

    def loss(many: dict[str, Array]) -> Array:
        scores = jax.vmap(score, (0, None), 1)(many, z)
        squares = (many["w1"] ** 2).sum((1, 2)) + (many["w2"] ** 2).sum(1)
        total = (weight[:, None] * log_loss(scores, y)).sum() + (penalty / 2 * squares).sum()
        return total / weight.sum()

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        many, memory = state
        change, memory = optimiser.update(jax.grad(loss)(many), memory)
        return (optax.apply_updates(many, change), memory), None

    (many, _), _ = lax.scan(step, (many, optimiser.init(many)), None, STEPS)
    scores = jax.vmap(score, (0, None), 1)(many, z)
    gradients: Callable = jax.vmap(jax.grad(lambda p, z: _product(weight, score(p, z)) / weight.sum(), 1), (0, None))
    w = gradients(many, z).sum(1).T / std[:, None]
    return Fit(scores, w, jnp.zeros(y.shape[1]))
