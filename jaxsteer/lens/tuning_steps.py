"""The programs that train a tuned lens: the gradient of every layer's KL in one pass, and a step of the optimiser.

A translator is linear in what it reads. With y_l = h_l + h_l A_l + b_l, the gradient is h_l^T g_l, g_l that of the KL
with respect to y_l, so that all matrices come from one batched product and no logits outlive their few tokens.

Letters: B rows, T tokens, D width, V vocabulary, l layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from jaxsteer.lens.logit_lens import EVERY, LensRows, find_places, inner, over_tokens, states_at
from jaxsteer.lens.tuned_lens import Translators
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import unembed


@struct.dataclass
class Sums:
    """Sums over the tokens of batches."""

    gradient: Translators
    kl: Float[Array, " l"]
    tokens: Float[Array, ""]


@partial(jax.jit, static_argnames=("config", "step"), donate_argnames="before")
def add_gradients(
    params: Params,
    config: ModelConfig,
    translators: Translators,
    rows: LensRows,
    before: Sums,
    *,
    step: int,
) -> Sums:
    """``before`` with the sums of another batch: KL(output || lens) of every layer, and its gradient."""
    states = states_at(params, config, rows, None, find_places(EVERY, config))
    output, layers = states[:1], states[1:-1]  # the stream before every block
    change = jnp.einsum(
        "lbtd,lde->lbte", layers.astype(jnp.float32), translators.matrix, precision=lax.Precision.HIGHEST
    )
    full = layers.astype(jnp.float32) + change + translators.bias[:, None, None]

    def some(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        y, x, inside = part
        log_p = jax.nn.log_softmax(unembed(params, config, x[0]))

        def kl(y: Float[Array, "B t D"]) -> tuple[Array, Array]:
            log_q = jax.nn.log_softmax(unembed(params, config, y.astype(x.dtype)))
            each = jnp.where(inside[0], inner(jnp.exp(log_p), log_p - log_q), 0.0)
            return each.sum(), each

        (_, each), slope = lax.map(jax.value_and_grad(kl, has_aux=True), y)
        return each, slope

    each, slope = over_tokens((full, output, rows.mask[None]), step, some)
    product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    matrix = product("lbtd,lbte->lde", layers.astype(jnp.float32), slope)
    found = Sums(Translators(matrix, slope.sum((1, 2))), each.sum((1, 2)), rows.mask.sum().astype(jnp.float32))
    return jax.tree.map(jnp.add, before, found)


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("translators", "state"))
def advance(
    optimizer: optax.GradientTransformation, translators: Translators, state: Any, sums: Sums
) -> tuple[Translators, Any]:
    """One step on the mean gradient over the tokens."""
    gradient = jax.tree.map(lambda a: a / sums.tokens, sums.gradient)
    updates, state = optimizer.update(gradient, state, translators)
    return optax.apply_updates(translators, updates), state  # type: ignore[return-value]


def no_sums(translators: Translators) -> Sums:
    """Nothing yet."""
    layers = translators.bias.shape[0]
    zeros = jax.tree.map(jnp.zeros_like, translators)
    return Sums(gradient=zeros, kl=jnp.zeros(layers), tokens=jnp.zeros(()))
