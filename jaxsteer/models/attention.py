"""Rotary embeddings and one einsum attention: GQA, per-layer window, soft-cap, padding, shared prefix.

Letters: B rows, T queries, U keys of the prefix, C groups of rows that share one prefix (B = C * b),
N query heads, K key/value heads, G = N / K, H head width, L layers.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.config import Rope

MASKED = -1e30
"""Score of a forbidden key. Finite, so that a row without any key gives a mean and not NaN."""


@struct.dataclass
class Prefix:
    """Keys and values of text before the rows, one copy per group of rows and no batch axis.

    Rows are group-major: row ``r`` of ``B`` belongs to group ``r // (B / C)``.
    """

    k: Float[Array, "L C U K H"]
    v: Float[Array, "L C U K H"]
    mask: Bool[Array, "C U"]
    positions: Int[Array, "C U"]

    @property
    def length(self) -> Int[Array, " C"]:
        """Tokens of each group's prefix, padding not counted: the position of the next token."""
        return self.mask.sum(-1)


def inverse_frequencies(rope: Rope, d_head: int) -> np.ndarray:
    """(H/2,) float64 rotary frequencies. Source: transformers' ``modeling_rope_utils`` (formats.md 6.3)."""
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


def _scores(equation: str, q: Array, k: Array, softcap: float | None, mask: Array) -> Array:
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    if softcap is not None:  # before the mask, as in transformers' eager path
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask, scores, MASKED)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    self_mask: Bool[Array, "b T T"],
    prefix: tuple[Float[Array, "C U K H"], Float[Array, "C U K H"], Bool[Array, "C b2 T2 U"]] | None,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Softmax attention over the prefix (if any) and the rows' own keys, in float32.

    ``prefix`` is this layer's (keys, values, mask); it joins in one softmax with the rows' own scores. The two
    parts are never merged through ``return_residual``, whose gradient is wrong (jax-notes 1.6).
    Returns the head outputs ``z`` in the dtype of ``v`` and the attention pattern (S = U + T, prefix first).
    """
    b, t, n, h = q.shape
    kv = k.shape[2]
    g = n // kv
    q = (q * scale).reshape(b, t, kv, g, h)
    own = _scores("btkgh,bukh->bkgtu", q, k, softcap, self_mask[:, None, None])
    peak = own.max(-1, keepdims=True)
    if prefix is not None:
        pk, pv, pmask = prefix
        c = pk.shape[0]
        grouped = q.reshape(c, b // c, t, kv, g, h)
        past = _scores("cbtkgh,cukh->cbkgtu", grouped, pk, softcap, pmask[:, :, None, None])
        past = past.reshape(b, kv, g, t, -1)
        peak = jnp.maximum(peak, past.max(-1, keepdims=True))
    peak = lax.stop_gradient(peak)
    own = jnp.exp(own - peak)
    total = own.sum(-1, keepdims=True)
    if prefix is not None:
        past = jnp.exp(past - peak)
        total = total + past.sum(-1, keepdims=True)
    own = (own / total).astype(v.dtype)
    z = jnp.einsum("bkgtu,bukh->btkgh", own, v)
    pattern = own
    if prefix is not None:
        past = (past / total).astype(v.dtype)
        from_past = jnp.einsum("cbkgtu,cukh->cbtkgh", past.reshape(c, b // c, kv, g, t, -1), pv)
        z = z + from_past.reshape(z.shape)
        pattern = jnp.concatenate([past, own], axis=-1)
    return z.reshape(b, t, n, h), pattern.reshape(b, n, t, -1)
