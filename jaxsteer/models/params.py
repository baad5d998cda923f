"""Parameters as Flax pytrees: shapes, shardings and random initialisation.

Letters: L layers, D width, N query heads, K key/value heads, H head width, I MLP width, V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxsteer.models.config import ModelConfig


@struct.dataclass(kw_only=True)
class Layers:
    """Weights of all blocks, stacked on a leading layer axis; ``None`` where a family has no such weight."""

    attn_norm: Float[Array, "L D"]
    q: Float[Array, "L D N H"]
    k: Float[Array, "L D K H"]
    v: Float[Array, "L D K H"]
    o: Float[Array, "L N H D"]
    mlp_norm: Float[Array, "L D"]
    gate: Float[Array, "L D I"] | None = None
    up: Float[Array, "L D I"]
    down: Float[Array, "L I D"]
    q_bias: Float[Array, "L N H"] | None = None
    k_bias: Float[Array, "L K H"] | None = None
    v_bias: Float[Array, "L K H"] | None = None
    q_norm: Float[Array, "L H"] | None = None
    k_norm: Float[Array, "L H"] | None = None
    post_attn_norm: Float[Array, "L D"] | None = None
    post_mlp_norm: Float[Array, "L D"] | None = None
    attn_norm_bias: Float[Array, "L D"] | None = None
    mlp_norm_bias: Float[Array, "L D"] | None = None
    o_bias: Float[Array, "L D"] | None = None
    up_bias: Float[Array, "L I"] | None = None
    down_bias: Float[Array, "L D"] | None = None


@struct.dataclass
class Params:
    """Weights of one model. ``unembed`` is ``None`` when it is tied to ``embed``."""

    embed: Float[Array, "V D"]
    layers: Layers
    final_norm: Float[Array, " D"]
    unembed: Float[Array, "D V"] | None = None
    final_norm_bias: Float[Array, " D"] | None = None
    positions: Float[Array, "P D"] | None = None
    """Learned vectors of the positions; ``None`` where positions are told by rotation."""


LAYER_SPECS: dict[str, P] = {
    "attn_norm": P(None),
    "q": P(None, "model", None),
    "k": P(None, "model", None),
    "v": P(None, "model", None),
    "o": P("model", None, None),
    "mlp_norm": P(None),
    "gate": P(None, "model"),
    "up": P(None, "model"),
    "down": P("model", None),
    "q_bias": P("model", None),
    "k_bias": P("model", None),
    "v_bias": P("model", None),
    "q_norm": P(None),
    "k_norm": P(None),
    "post_attn_norm": P(None),
    "post_mlp_norm": P(None),
    "attn_norm_bias": P(None),
    "mlp_norm_bias": P(None),
    "o_bias": P(None),
    "up_bias": P("model"),
    "down_bias": P(None),
}
"""Tensor-parallel layout of one layer's leaves (without the layer axis) on the mesh axis "model"."""

TOP_SPECS: dict[str, P] = {
    "embed": P("model", None),
    "final_norm": P(None),
    "unembed": P(None, "model"),
    "final_norm_bias": P(None),
    "positions": P(None, None),
}


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of one layer, for exactly the leaves that ``config`` has."""
    d, n, k, h, i = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_mlp
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "q": (d, n, h),
        "k": (d, k, h),
        "v": (d, k, h),
        "o": (n, h, d),
        "mlp_norm": (d,),
        "gate": (d, i),
        "up": (d, i),
        "down": (i, d),
    }
    if not config.gated_mlp:
        del shapes["gate"]
    if config.qkv_bias:
        shapes |= {"q_bias": (n, h), "k_bias": (k, h), "v_bias": (k, h)}
    if config.qk_norm:
        shapes |= {"q_norm": (h,), "k_norm": (h,)}
    if config.post_norms:
        shapes |= {"post_attn_norm": (d,), "post_mlp_norm": (d,)}
    if config.norm == "layer":
        shapes |= {"attn_norm_bias": (d,), "mlp_norm_bias": (d,)}
    if config.writer_bias:
        shapes |= {"o_bias": (d,), "up_bias": (i,), "down_bias": (d,)}
    return shapes


def top_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf outside the blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size, config.d_model),
        "final_norm": (config.d_model,),
    }
    if not config.tied_embeddings:
        shapes["unembed"] = (config.d_model, config.vocab_size)
    if config.norm == "layer":
        shapes["final_norm_bias"] = (config.d_model,)
    if config.learned_positions:
        shapes["positions"] = (config.max_positions, config.d_model)
    return shapes


def init_params(config: ModelConfig, key: jax.Array, dtype: str | jnp.dtype = "float32") -> Params:
    """Random weights: normal with standard deviation 1/sqrt(fan-in), residual writers scaled by 1/sqrt(2 L).

    Norm weights start at the value that leaves the normalised stream unchanged, biases at zero.
    """
    keys = iter(jax.random.split(key, 32))
    norm_one = 0.0 if config.norm_plus_one else 1.0
    writers = 1.0 / math.sqrt(2 * config.n_layers)
    layers: dict[str, jax.Array] = {}
    for name, shape in layer_shapes(config).items():
        full = (config.n_layers, *shape)
        if name.endswith("norm"):
            layers[name] = jnp.full(full, norm_one, dtype)
        elif name.endswith("bias"):
            layers[name] = jnp.zeros(full, dtype)
        else:
            fan_in = math.prod(shape[:-1]) if name in ("o", "down") else shape[0]
            scale = (writers if name in ("o", "down") else 1.0) / math.sqrt(fan_in)
            layers[name] = (jax.random.normal(next(keys), full) * scale).astype(dtype)
    top = top_shapes(config)
    embed_std = 1.0 / math.sqrt(config.d_model)
    tables = {
        name: (jax.random.normal(next(keys), top[name]) * embed_std).astype(dtype)
        for name in ("unembed", "embed", "positions")
        if name in top
    }
    bias = {"final_norm_bias": jnp.zeros(top["final_norm_bias"], dtype)} if "final_norm_bias" in top else {}
    return Params(layers=Layers(**layers), final_norm=jnp.full(top["final_norm"], norm_one, dtype), **tables, **bias)
