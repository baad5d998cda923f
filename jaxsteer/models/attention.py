"""Rotary embeddings and one einsum attention: GQA, per-layer window, soft-cap, padding, shared prefix, cache.

Letters: B rows, T queries, U keys of one segment, C groups of rows that share them (B = C * b), S keys of all segments,
M slots of the cache, N query heads, K key/value heads, G = N / K, H head width, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.config import Rope

MASKED = -1e30
"""Score of a forbidden key. Finite, so that a row without any key gives a mean and not NaN."""


class Segment(NamedTuple):
    """Keys, values and mask of one stretch of text, per group of rows; with C = B every row has its own.

    Time comes after the heads because the two products of attention then read keys and values where they lie: a third
    of the time of (U, K, H) on CPU. Elsewhere the compiler chooses layouts itself.
    """

    k: Float[Array, "C K H U"]
    v: Float[Array, "C K H U"]
    mask: Bool[Array, "#C #b #T U"]
    interleaved: bool = False
    """Whether row ``r`` belongs to group ``r % C`` and not to group ``r // (B / C)``."""


@runtime_checkable
class Past(Protocol):
    """Keys and values of the text before the rows' own tokens: a pytree whose arrays have a layer axis.

    ``Prefix``, ``Shared`` and ``Cache`` are three; any other class with this method can stand in their place.
    """

    def segment(self, layer: Int[Array, ""], positions: Int[Array, "B T"], window: Int[Array, ""] | None) -> Segment:
        """Keys and values of one layer, and which of them the tokens at ``positions`` may look back on.

        With a ``window`` a token sees that many positions, itself included.
        """
        ...


@struct.dataclass
class Prefix:
    """Keys and values of text before the rows, one copy per group of rows and no batch axis.

    Rows are group-major: row ``r`` of ``B`` belongs to group ``r // (B / C)``.
    """

    k: Float[Array, "L C K H U"]
    v: Float[Array, "L C K H U"]
    mask: Bool[Array, "C U"]
    positions: Int[Array, "C U"]

    @property
    def length(self) -> Int[Array, " C"]:
        """Tokens of each group's prefix, padding not counted: the position of the next token."""
        return self.mask.sum(-1)

    def segment(self, layer: Int[Array, ""], positions: Int[Array, "B T"], window: Int[Array, ""] | None) -> Segment:
        """See ``Past``."""
        allowed = self.mask[:, None, None, :]
        if window is not None:
            grouped = rearrange(positions, "(c b) t -> c b t 1", c=self.positions.shape[0])
            allowed = allowed & (grouped - self.positions[:, None, None, :] < window)
        return Segment(_of_layer(self.k, layer), _of_layer(self.v, layer), allowed)


@struct.dataclass
class Shared:
    """Keys and values of text between the prefix and the rows' own tokens, one copy per group of rows.

    Row ``r`` of ``B`` belongs to group ``r // (B / C)`` as in ``Prefix``, or to group ``r % C`` if ``interleaved``.
    """

    k: Float[Array, "L C K H U"]
    v: Float[Array, "L C K H U"]
    mask: Bool[Array, "c b T U"]
    """What each token of the rows may look back on; axes of length 1 broadcast over groups, rows of a group, tokens."""
    positions: Int[Array, "c U"]
    """Of each group, or of all groups where they have the same."""
    interleaved: bool = struct.field(pytree_node=False, default=False)

    def segment(self, layer: Int[Array, ""], positions: Int[Array, "B T"], window: Int[Array, ""] | None) -> Segment:
        """See ``Past``."""
        allowed = self.mask
        if window is not None:
            order = "(b c) t -> c b t 1" if self.interleaved else "(c b) t -> c b t 1"
            grouped = rearrange(positions, order, c=self.k.shape[1])
            allowed = allowed & (grouped - self.positions[:, None, None, :] < window)
        return Segment(_of_layer(self.k, layer), _of_layer(self.v, layer), allowed, self.interleaved)


@struct.dataclass
class Cache:
    """Keys and values of each row's own tokens, in M slots that all rows write at the same place.

    A row's tokens lie in the ``length`` slots before ``slot``, the newest last. Rows of different lengths thus need one
    write for all of them and no scatter.
    """

    k: Float[Array, "L B K H M"]
    v: Float[Array, "L B K H M"]
    length: Int[Array, " B"]
    """Tokens of each row."""
    slot: Int[Array, ""]
    """The slot that the next token goes to; M where the cache is full."""

    def segment(self, layer: Int[Array, ""], positions: Int[Array, "B T"], window: Int[Array, ""] | None) -> Segment:
        """See ``Past``."""
        at = jnp.arange(self.k.shape[-1])
        allowed = ((at < self.slot) & (at >= self.slot - self.length[:, None]))[:, None, None]
        if window is not None:
            allowed = allowed & (self.slot - at + jnp.arange(positions.shape[1])[:, None] < window)
        return Segment(_of_layer(self.k, layer), _of_layer(self.v, layer), allowed)

    def append(self, k: Float[Array, "L B K H 1"], v: Float[Array, "L B K H 1"]) -> Cache:
        """The cache, which must not be full, with one more token in every row."""
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=self.slot, axis=4)
        return Cache(k=write(self.k, k), v=write(self.v, v), length=self.length + 1, slot=self.slot + 1)


def _of_layer(stack: Float[Array, "L C K H U"], layer: Int[Array, ""]) -> Float[Array, "C K H U"]:
    return lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


def inverse_frequencies(rope: Rope, d_head: int) -> np.ndarray:
    """(H/2,) float64 rotary frequencies. Source: transformers' ``modeling_rope_utils``."""
    inv = rope.theta ** (-np.arange(0, d_head, 2, dtype=np.float64) / d_head)
    if rope.kind == "linear":
        return inv / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inv
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = (1 - blend) * inv / rope.factor + blend * inv
        return np.where(wavelength > low, inv / rope.factor, np.where(wavelength < high, inv, smooth))
    return inv


def rotary_tables(
    ropes: tuple[Rope, ...], d_head: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "R B T h"], Float[Array, "R B T h"]]:
    """(sin, cos) of every table at every position, h = H/2. Angles in float32: bf16 cannot count past 256."""
    inv = jnp.asarray(np.stack([inverse_frequencies(rope, d_head) for rope in ropes]), jnp.float32)
    angles = positions[None, :, :, None].astype(jnp.float32) * inv[:, None, None, :]
    return jnp.sin(angles), jnp.cos(angles)


def rotate(
    x: Float[Array, "B T X H"], sin: Float[Array, "b T h"], cos: Float[Array, "b T h"]
) -> Float[Array, "B T X H"]:
    """Rotary embedding in the half-split layout of Hugging Face checkpoints (pairs j and j + H/2)."""
    sin, cos = sin[:, :, None, :].astype(x.dtype), cos[:, :, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(
    q: Float[Array, "B T N H"],
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None,
    change_scores: Callable[[Float[Array, "B N T S"]], Float[Array, "B N T S"]] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Softmax attention over all keys of all segments, in float32.

    The segments' scores join in one softmax. They are never merged through ``return_residual``, whose gradient is
    wrong. Returns the head outputs ``z`` in the dtype of the values and the attention pattern
    (S keys, the segments' one after the other). ``change_scores`` is given the scores before the softmax, and
    those of forbidden keys are ``MASKED``.
    """
    q = rearrange(q * scale, "b t (k g) h -> b t k g h", k=segments[0].k.shape[1])
    scores = [_scores(q, segment, softcap) for segment in segments]
    if change_scores is not None:
        scores = _changed_scores(scores, change_scores)
    peak = scores[0].max(-1, keepdims=True)
    for more in scores[1:]:
        peak = jnp.maximum(peak, more.max(-1, keepdims=True))
    peak = lax.stop_gradient(peak)
    exps = [jnp.exp(score - peak) for score in scores]
    total = sum((exp.sum(-1, keepdims=True) for exp in exps[1:]), exps[0].sum(-1, keepdims=True))
    # Written out, because XLA turns the division into this in some programs (one device) and not in others (several).
    share = 1.0 / total
    parts = [(exp * share).astype(segment.v.dtype) for exp, segment in zip(exps, segments, strict=True)]
    z = _weigh(parts[0], segments[0])
    for part, segment in zip(parts[1:], segments[1:], strict=True):
        z = z + _weigh(part, segment)
    pattern = jnp.concatenate(parts, axis=-1)
    return rearrange(z, "b t k g h -> b t (k g) h"), rearrange(pattern, "b k g t s -> b (k g) t s")


def _changed_scores(scores: list[Array], change: Callable[[Array], Array]) -> list[Array]:
    """The scores of all segments, changed as one array."""
    joined = change(rearrange(jnp.concatenate(scores, axis=-1), "b k g t s -> b (k g) t s"))
    joined = rearrange(joined, "b (k g) t s -> b k g t s", k=scores[0].shape[1])
    return jnp.split(joined, np.cumsum([score.shape[-1] for score in scores])[:-1], axis=-1)


def apply_pattern(pattern: Float[Array, "B N T S"], segments: Sequence[Segment]) -> Float[Array, "B T N H"]:
    """The head outputs of an attention pattern that was changed, laid out as ``attend`` returns it."""
    pattern = rearrange(pattern, "b (k g) t s -> b k g t s", k=segments[0].v.shape[1])
    z, start = jnp.zeros((), segments[0].v.dtype), 0
    for segment in segments:
        stop = start + segment.v.shape[-1]
        z, start = z + _weigh(pattern[..., start:stop].astype(segment.v.dtype), segment), stop
    return rearrange(z, "b t k g h -> b t (k g) h")


def _scores(q: Array, segment: Segment, softcap: float | None) -> Float[Array, "B K G T U"]:
    grouped = _grouped(q, segment)
    scores = _wide_product("cbtkgh,ckhu->cbkgtu", grouped, segment.k)
    if softcap is not None:  # before the mask, as in transformers' eager path
        scores = softcap * jnp.tanh(scores / softcap)
    return _ungrouped(jnp.where(segment.mask[:, :, None, None], scores, MASKED), segment)


def _wide_product(subscripts: str, x: Array, y: Array) -> Array:
    """An einsum in float32. XLA's CPU backend lacks some products of narrow types that accumulate in float32."""
    product = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32:
        return product(x, y)
    widened = lambda x, y: product(x.astype(jnp.float32), y.astype(jnp.float32))  # noqa: E731
    return lax.platform_dependent(x, y, cpu=widened, default=product)


def _weigh(pattern: Float[Array, "B K G T U"], segment: Segment) -> Float[Array, "B T K G H"]:
    return _ungrouped(jnp.einsum("cbkgtu,ckhu->cbtkgh", _grouped(pattern, segment), segment.v), segment)


def _grouped(rows: Float[Array, "B ..."], segment: Segment) -> Float[Array, "C b ..."]:
    pattern = "(b c) ... -> c b ..." if segment.interleaved else "(c b) ... -> c b ..."
    return rearrange(rows, pattern, c=segment.k.shape[0])


def _ungrouped(rows: Float[Array, "C b ..."], segment: Segment) -> Float[Array, "B ..."]:
    return rearrange(rows, "c b ... -> (b c) ..." if segment.interleaved else "c b ... -> (c b) ...")
