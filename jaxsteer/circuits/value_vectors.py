"""Steering value vectors (2604.08524): what each head writes when it looks at a steered token.

A vector s that is added to the stream reaches the values of head h in block m as (s * gamma) W_V / r, r the root mean
square of the stream there; through W_O that is the steering value vector of the head,

    svv = (s * gamma) W_V W_O        (Gemma: gamma is 1 + w, and the weight of the norm after attention comes behind)

which depends on the input by positive factors only. Nothing has a bias: biases of values do not change by steering.

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

from jaxsteer.display import aligned, decimals, visible
from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sites import parse_site
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.processes import to_host
from jaxsteer.runs.result import Result
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
    gamma = w.attn_norm.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0)
    return jnp.einsum("ld,ldkh->lkh", vector * gamma, w.v.astype(jnp.float32), precision=lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames="config")
def _heads(params: Params, config: ModelConfig, vector: Float[Array, " D"]) -> Float[Array, "L N D"]:
    w = params.layers
    values = jnp.repeat(_in_values(params, config, vector), config.n_heads // config.n_kv_heads, axis=1)
    found = jnp.einsum("lnh,lnhd->lnd", values, w.o.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if w.post_attn_norm is None:
        return found
    return found * (w.post_attn_norm.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0))[:, None]


# Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words(Result):
    """The tokens that a vector speaks for, the strongest first."""

    names: tuple[str, ...]
    """Of the vectors."""
    lens: tuple[tuple[str, ...], ...]
    """By the logit lens, without the norm's division."""
    lens_against: tuple[tuple[str, ...], ...]
    """Of the vector with its sign turned."""
    nearest: tuple[tuple[str, ...], ...]
    """By the cosine with the tokens' columns of the unembedding."""
    cosines: tuple[tuple[float, ...], ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every vector."""
        columns = zip(self.names, self.lens, self.lens_against, self.nearest, self.cosines, strict=True)
        return [
            {
                "vector": name,
                "for": " ".join(up),
                "against": " ".join(down),
                "nearest": " ".join(near),
                "cosine": cosine[0],
            }
            for name, up, down, near, cosine in columns
        ]

    def table(self) -> str:
        """A line for every vector."""
        lines = [
            [row["vector"], *(visible(row[key]) for key in ("for", "against", "nearest")), decimals(row["cosine"])]
            for row in self.to_rows()
        ]
        return aligned([["vector", "for", "against", "nearest", "cosine"], *lines], left=(0, 1, 2, 3))


def read_words(
    model: Model, vectors: Float[np.ndarray, "S D"], names: Sequence[str] | None = None, *, top: int = 8
) -> Words:
    """The tokens of ``vectors`` by logit lens (both signs) and by cosine to the unembedding.

    The lens multiplies by the final norm's weight and the unembedding; what is left out, the norm's division, changes
    no order. Raises ``UserError`` for vectors of another width.
    """
    given = np.asarray(vectors, np.float32)
    if given.ndim != 2 or given.shape[1] != model.config.d_model:
        raise UserError(f"vectors must be [S, {model.config.d_model}], got {list(given.shape)}")
    known = len(model.tokenizer)
    found = to_host(_words(model.params, model.config, jnp.asarray(given), known=known, top=min(top, known)))
    texts = [tuple(tuple(model.tokenizer.decode([int(i)]) for i in row) for row in ids) for ids in found[:3]]
    return Words(
        names=tuple(names or map(str, range(len(given)))),
        lens=texts[0],
        lens_against=texts[1],
        nearest=texts[2],
        cosines=tuple(tuple(row) for row in found[3].tolist()),
    )


@partial(jax.jit, static_argnames=("config", "known", "top"))
def _words(
    params: Params, config: ModelConfig, vectors: Float[Array, "S D"], *, known: int, top: int
) -> tuple[Array, Array, Array, Array]:
    table = (params.embed.T if params.unembed is None else params.unembed).astype(jnp.float32)[:, :known]
    weight = params.final_norm.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0)
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    logits = product(vectors * weight, table)
    lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True) * jnp.linalg.norm(table, axis=0)
    cosines, nearest = lax.top_k(product(vectors, table) / jnp.maximum(lengths, 1e-20), top)
    return lax.top_k(logits, top)[1], lax.top_k(-logits, top)[1], nearest, cosines


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
