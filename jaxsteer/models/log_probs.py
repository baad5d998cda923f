"""Log-probabilities of given tokens after given positions of the stream, a few rows of logits at a time.

Letters: n rows, D width, V vocabulary, k labels of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import unembed, unembed_normed

LOGITS_NOT_FINITE = (
    "The model's logits are NaN or infinite, so that no result could be right. Its weights are finite, as loading "
    "checked: something on the way overflows. Try --dtype float32, or steer with a smaller coefficient."
)


def not_finite(steered: str = "") -> str:
    """``LOGITS_NOT_FINITE``, with what the model was steered by."""
    return LOGITS_NOT_FINITE + f" Here it was steered by: {steered[:300]}." * bool(steered)


VOCABULARY_BLOCK = 2**24
"""Logits held at once, in floats: 64 MiB. What needs logits of many rows takes as many rows at a time as fit."""


@jax.custom_vjp
def entries(values: Float[Array, " V"], index: Int[Array, " *k"]) -> Float[Array, " *k"]:
    """``values[index]``. Its gradient is a comparison: that of a gather is a scatter, which accelerators do entry by
    entry.
    """
    return values[index]


def _entries_forward(values: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return values[index], (index, jnp.arange(len(values)))


def _entries_backward(kept: tuple[Array, Array], change: Array) -> tuple[Array, None]:
    index, column = kept
    here = jnp.where(column == index[..., None], change[..., None], 0.0)
    return here.reshape(-1, len(column)).sum(0), None


entries.defvjp(_entries_forward, _entries_backward)


def label_log_probs(
    params: Params,
    config: ModelConfig,
    hidden: Float[Array, "n D"],
    labels: Int[Array, "n ..."],
    *,
    normed: bool = False,
) -> Float[Array, "n ..."]:
    """Log-probabilities (float32, nats) of labels, one or k per row of the stream after the last block, or of what the
    final norm made of it (``normed``).

    Differentiable in ``hidden``; the logits are computed again on the way back instead of being kept.
    """

    @jax.checkpoint
    def one(row: tuple[Array, Array]) -> Array:
        logits = (unembed_normed if normed else unembed)(params, config, row[0])
        return entries(logits, row[1]) - jax.nn.logsumexp(logits)

    rows = max(1, VOCABULARY_BLOCK // config.vocab_size)
    if hidden.shape[0] <= rows:
        return jax.vmap(lambda h, y: one((h, y)))(hidden, labels)
    return lax.map(one, (hidden, labels), batch_size=rows)
