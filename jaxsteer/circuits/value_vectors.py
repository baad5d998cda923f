"""Steering value vectors (2604.08524): what each head writes when it looks at a steered token.

A vector s that is added to the stream reaches the values of head h in block m as (s * gamma) W_V / r, r the root mean
square of the stream there; through W_O that is the steering value vector of the head,

    svv = (s * gamma) W_V W_O        (Gemma: gamma is 1 + w, and the weight of the norm after attention comes behind)

which depends on the input by positive factors only. Nothing has a bias: biases of values do not change by steering. A
LayerNorm (GPT-2) takes the mean of s away first, and r is the deviation.

Letters: L layers, D width, N query heads, K key/value heads, G = N / K, H head width, V vocabulary, S vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sites import parse_site
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.models.transformer import centred, norm_weight
from jaxsteer.processes import to_host
from jaxsteer.steer.selectors import Positions, Selector, select


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ValueVectors:
    """Steering value vectors of a vector added at one site."""

    site: str
    first: int
    """The first block that reads the steered stream; below it vectors are 0."""
    heads: Float[np.ndarray, "L N D"]
    """What each head writes; it depends on the input by a positive factor of the layer and token."""

    @property
    def summed(self) -> Float[np.ndarray, " D"]:
        """Over all heads and layers."""
        return self.heads.sum((0, 1))


def value_vectors(
    model: Model, vector: Float[np.ndarray, " D"], site: str, *, layers: Sequence[int] | None = None
) -> ValueVectors:
    """The value vectors of ``vector`` added at ``site``, a site of the stream, in all blocks above it or in ``layers``.

    Raises ``UserError`` for other sites, and for a vector that is not of the model's width.
    """
    first = first_block(model, site)
    given = np.asarray(vector, np.float32)
    if given.shape != (model.config.d_model,):
        raise UserError(
            f"the vector has shape {list(given.shape)}; the stream of {model.name} is {model.config.d_model}"
        )
    reads = np.arange(model.config.n_layers) >= first
    if layers is not None:
        reads &= np.isin(np.arange(model.config.n_layers), np.asarray(layers))
    heads = to_host(_heads(model.params, model.config, jnp.asarray(given)))
    return ValueVectors(
        site=parse_site(site, model.config.n_layers).name, first=first, heads=heads * reads[:, None, None]
    )


def first_block(model: Model, site: str) -> int:
    """The first block whose attention reads what is added at a site of the stream. Raises ``UserError`` for others."""
    parsed = parse_site(site, model.config.n_layers)
    if parsed.kind in ("hook_embed", "hook_resid_pre"):
        return parsed.layer
    if parsed.kind in ("hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        return parsed.layer + 1
    raise UserError(f"{site!r} is not in the stream: value vectors are of what is added to it, e.g. hook_resid_post")


@partial(jax.jit, static_argnames="config")
def _in_values(params: Params, config: ModelConfig, vector: Float[Array, " D"]) -> Float[Array, "L K H"]:
    """(s * gamma) W_V of every layer."""
    w = params.layers
    along = centred(vector, config) * norm_weight(w.attn_norm, config)
    return jnp.einsum("ld,ldkh->lkh", along, w.v.astype(jnp.float32), precision=lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames="config")
def _heads(params: Params, config: ModelConfig, vector: Float[Array, " D"]) -> Float[Array, "L N D"]:
    w = params.layers
    values = jnp.repeat(_in_values(params, config, vector), config.n_heads // config.n_kv_heads, axis=1)
    found = jnp.einsum("lnh,lnhd->lnd", values, w.o.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if w.post_attn_norm is None:
        return found
    return found * norm_weight(w.post_attn_norm, config)[:, None]


# Ablation


@struct.dataclass
class WithoutValues(Intervention):
    """Steering's direct part taken out of all values: v - (s * gamma) W_V / r, r of the run itself. Made by
    ``ablate_value_vectors``; stands behind the steering edit in ``Edits``."""

    part: Float[Array | np.ndarray, "L K H"]
    """(s * gamma) W_V; 0 in the blocks below the steered site."""
    selector: Selector

    @property
    def kinds(self) -> frozenset[str]:
        """The values, and the scale that they were divided by."""
        return frozenset({"ln1.hook_scale", "attn.hook_v"})

    def touched(self, where: Where) -> Array:
        """The steered tokens."""
        return self.selector.touched(where)

    def tap(self, where: Where) -> Tap:
        """The tap for these tokens."""
        touched, part, seen = self.selector.touched(where), jnp.asarray(self.part), {}

        def change(kind: str, layer: Any, value: Array) -> Array:
            if kind == "ln1.hook_scale":
                seen["scale"] = value
                return value
            taken = part[layer] / seen.pop("scale")[..., None]
            return jnp.where(touched[:, :, None, None], value.astype(jnp.float32) - taken, value).astype(value.dtype)

        return Tap(self.kinds, change)


def ablate_value_vectors(
    model: Model,
    vector: Float[np.ndarray, " D"],
    site: str,
    *,
    coefficient: float = 1.0,
    positions: Positions = "all",
    layers: Sequence[int] | None = None,
) -> WithoutValues:
    """An edit that takes (coefficient * s * gamma) W_V / r out of every value above ``site`` (or in ``layers``).

    ``positions`` are those that are steered. What remains of steering in the values is the change of r, and what other
    parts have made of it. Raises ``UserError`` as ``value_vectors``.
    """
    reads = np.arange(model.config.n_layers) >= first_block(model, site)
    if layers is not None:
        reads &= np.isin(np.arange(model.config.n_layers), np.asarray(layers))
    given = jnp.asarray(np.asarray(vector, np.float32) * np.float32(coefficient))
    part = to_host(_in_values(model.params, model.config, given)) * reads[:, None, None]
    return WithoutValues(part=part, selector=select(positions))
