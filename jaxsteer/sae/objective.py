"""SAEGA's objective: latents of a sparse autoencoder, as a term of ``jaxsteer.objectives``.

Letters: F latents, k latents asked for, T tokens of a row.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsteer.files.sae_form import ELEMENTWISE
from jaxsteer.objectives import Reads
from jaxsteer.objectives.terms import At, Term, check_choice
from jaxsteer.sae.dictionary import SAE, encode, preactivations, subset


@struct.dataclass
class Latents(Term):
    """SAEGA's objective: ``sum_i w_i f_i`` over latents of an SAE at one site (arXiv 2601.02896).

    A latent that is off has no gradient, so that token gradients see active latents only. With ``surrogate`` "preact"
    gradients, and nothing else, are those of the pre-activations; scores stay exact. Over a span it is the mean of the
    tokens' latents, not the latents of their mean.
    """

    sae: SAE
    weights: Float[Array, " k"]
    indices: Int[Array, " k"] | None
    """Where latents compete for being active, those to read; ``None`` where ``sae`` holds them alone."""
    site: str = struct.field(pytree_node=False)
    surrogate: Literal["none", "preact"] = struct.field(pytree_node=False, default="none")
    at: At = struct.field(pytree_node=False, default="read")

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The weighted sum of every row."""
        check_choice("surrogate", self.surrogate, ("none", "preact"))
        r = reads[self.site] if self.at == "read" else reads.span(self.site, self.at)
        f = encode(self.sae, r, self.indices)
        if self.surrogate == "preact":
            p = preactivations(self.sae, r, self.indices)
            f = jax.lax.stop_gradient(f) + (p - jax.lax.stop_gradient(p))
        scores = jnp.sum(f * self.weights, axis=-1)
        return scores if self.at == "read" else _mean(scores, reads.span_mask(self.at))


def latents_objective(
    sae: SAE,
    indices: Int[np.ndarray, " k"],
    weights: Float[np.ndarray, " k"],
    site: str,
    *,
    surrogate: Literal["none", "preact"] = "none",
    at: At = "read",
) -> Latents:
    """The weighted sum of these latents (see ``Latents``). No other is ever computed, unless they compete (top-k)."""
    alone = sae.config.activation in ELEMENTWISE
    chosen = jnp.asarray(indices, jnp.int32)
    return Latents(
        sae=subset(sae, chosen) if alone else sae,
        weights=jnp.asarray(weights, jnp.float32),
        indices=None if alone else chosen,
        site=site,
        surrogate=surrogate,
        at=at,
    )


def _mean(values: Float[Array, "rows T"], mask: Array) -> Float[Array, " rows"]:
    return jnp.sum(values * mask, axis=-1) / jnp.maximum(mask.sum(-1), 1)
