"""What makes latents sparse: selection of the largest without sorting, and thresholds with straight-through gradients.

Letters: b activations of a batch, F latents.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def kth_largest(r: Float[Array, "b F"], k: int, axis: int | None) -> Float[Array, ...]:
    """The k-th largest entry of ``r`` >= 0 along ``axis`` (None: of all), with that axis kept at length 1.

    Exact and without sorting. The value is bracketed, and the bracket is cut until it holds one value, or k entries
    are above its low end. It is cut in the middle of the bits, which order non-negative floats. For all entries at
    once, three cuts of four are where the logarithm of the number of larger entries, interpolated, is that of k: a
    third of the cuts suffices then (of many rows the slowest decides). On a mesh that splits the axis only counts
    travel.
    """
    halve = 4 if axis is None else 1

    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.int32)

    def floats(x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.float32)

    def count(least: Array) -> Array:
        return jnp.sum(r >= least, axis=axis, keepdims=True, dtype=jnp.int32)

    def weight(n: Array) -> Array:
        return jnp.log((n + 0.5) / k)

    def is_open(bracket: _Bracket) -> Array:
        return (bracket.n > k) & (bits(bracket.high) - bits(bracket.low) > 1)

    def cut(state: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        i, old = state
        guess = old.low + (old.high - old.low) * old.above / (old.above - old.below)
        guess = jnp.where(i % halve == halve - 1, floats(bits(old.low) + (bits(old.high) - bits(old.low)) // 2), guess)
        inside = bits(old.low) + 1
        guess = floats(jnp.clip(bits(guess), inside, jnp.maximum(bits(old.high) - 1, inside)))
        n = count(guess)
        enough = n >= k
        # An end that stays for a second time weighs half (the Illinois rule), or it would stay for ever.
        new = _Bracket(
            low=jnp.where(enough, guess, old.low),
            high=jnp.where(enough, old.high, guess),
            n=jnp.where(enough, n, old.n),
            above=jnp.where(enough, weight(n), jnp.where(old.last < 0, old.above / 2, old.above)),
            below=jnp.where(enough, jnp.where(old.last > 0, old.below / 2, old.below), weight(n)),
            last=jnp.where(enough, 1, -1),
        )
        return i + 1, jax.tree.map(lambda a, b: jnp.where(is_open(old), a, b), new, old)

    largest = jnp.max(r, axis=axis, keepdims=True)
    tiny = jnp.full_like(largest, jnp.finfo(jnp.float32).tiny)
    n = count(tiny)
    start = _Bracket(tiny, floats(bits(largest) + 1), n, weight(n), weight(jnp.zeros_like(n)), jnp.zeros_like(n))
    found = lax.while_loop(lambda s: (s[0] < _CUTS) & is_open(s[1]).any(), cut, (jnp.int32(0), start))[1]
    return jnp.where(n >= k, jnp.min(jnp.where(r >= found.low, r, jnp.inf), axis=axis, keepdims=True), 0.0)


class _Bracket(NamedTuple):
    """Ends with at least k entries at or above the low one and fewer at or above the high one."""

    low: Array
    high: Array
    n: Array
    """Entries at or above the low end."""
    above: Array
    """Weight of the low end in the interpolation, positive; ``below``, of the high end, is negative."""
    below: Array
    last: Array
    """1 if the low end moved last, -1 if the high end did."""


_CUTS = 4 * 31
"""At least every fourth cut halves the 31 bits, so that so many always suffice, and a NaN cannot make it endless."""


def keep_largest(r: Float[Array, "b F"], k: int, axis: int | None) -> Float[Array, "b F"]:
    """``r`` >= 0 where it is among the k largest along ``axis``, else 0. Differentiable in what is kept."""
    return jnp.where(r >= kth_largest(lax.stop_gradient(r), k, axis), r, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(r: Float[Array, "b F"], threshold: Float[Array, " F"], bandwidth: float) -> Float[Array, "b F"]:
    """``r`` where it is above its threshold t, else 0.

    The derivative by t is that of 2407.14435, section 3: -(t / bandwidth) where |r - t| < bandwidth / 2, else 0.
    """
    return jnp.where(r > threshold, r, 0.0)


def _jump_forward(r: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return jump(r, threshold, bandwidth), (r, threshold)


def _jump_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    r, threshold = saved
    return jnp.where(r > threshold, g, 0.0), -(threshold / bandwidth) * jnp.sum(g * _window(r, threshold, bandwidth), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def above(r: Float[Array, "b F"], threshold: Float[Array, " F"], bandwidth: float) -> Float[Array, "b F"]:
    """1 where ``r`` is above its threshold t, else 0; their sum over latents is L0.

    The derivative by t is that of 2407.14435, section 3: -1 / bandwidth where |r - t| < bandwidth / 2, else 0; by r it
    is 0.
    """
    return (r > threshold).astype(r.dtype)


def _above_forward(r: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return above(r, threshold, bandwidth), (r, threshold)


def _above_backward(bandwidth: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    r, threshold = saved
    return jnp.zeros_like(r), -jnp.sum(g * _window(r, threshold, bandwidth), 0) / bandwidth


def _window(r: Array, threshold: Array, bandwidth: float) -> Array:
    return jnp.abs(r - threshold) < bandwidth / 2


jump.defvjp(_jump_forward, _jump_backward)
above.defvjp(_above_forward, _above_backward)
