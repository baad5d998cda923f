"""The transformer: pure functions over stacked parameters, one scan whatever the depth.

Letters: B rows, T time, D width, N query heads, K key/value heads, H head width, I MLP width, V vocabulary,
L layers, C groups of rows that share a prefix, U prefix length.

``run_layers(params, config, x, context, start, stop)`` is the hook system: reading layer l means stopping there,
editing means stop, edit, run on. Places inside a block are reached by ``tap(name, layer, value) -> value``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.attention import Past, Prefix, Segment, apply_pattern, attend, rotary_tables, rotate
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Layers, Params
from jaxsteer.models.taps import Intervention, Tap, make_where, no_tap, tap_of


@struct.dataclass
class Context:
    """What every block of a forward pass shares: rotary tables, masks, and the keys and values of earlier text."""

    sin: Float[Array, "R B T h"]
    cos: Float[Array, "R B T h"]
    self_mask: Bool[Array, "b T T"]
    distance: Int[Array, "T T"]
    positions: Int[Array, "B T"]
    past: tuple[Past, ...]
    windows: Int[Array, " L"]
    rope_index: Int[Array, " L"]


def make_context(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *past: Past | None,
) -> Context:
    """The context of rows whose tokens stand at ``positions``; ``mask`` is False on padding (either side).

    Valid tokens of a row must be contiguous. ``past`` is what comes before the rows' own tokens, in this order (None:
    nothing). ``B`` may be 1 when all rows share the same positions and no past has positions per group.
    """
    t = positions.shape[1]
    sin, cos = rotary_tables(config.ropes, config.d_head, positions)
    steps = jnp.arange(t)
    distance = steps[:, None] - steps[None, :]
    self_mask = (distance >= 0)[None]
    if mask is not None:
        self_mask = self_mask & mask[:, None, :]
    return Context(
        sin=sin,
        cos=cos,
        self_mask=self_mask,
        distance=distance,
        positions=positions,
        past=tuple(each for each in past if each is not None),
        windows=jnp.asarray(config.windows, jnp.int32),
        rope_index=jnp.asarray(config.rope_index, jnp.int32),
    )


def positions_of(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every token when padding does not count (padding itself gets 0)."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], config: ModelConfig) -> Float[Array, "... D"]:
    """RMSNorm with its variance in float32. Llama and Qwen cast before the weight, Gemma after ``1 + w``."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    if config.norm_plus_one:
        return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * weight


def _dense(x: Array, w: Array) -> Array:
    """``x @ w`` over the last axis of x and the first of w, as one 2-D product (XLA's CPU matmul wants that)."""
    flat = x.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *w.shape[1:])


def embed(params: Params, config: ModelConfig, tokens: Int[Array, "B T"], tap: Tap = no_tap) -> Float[Array, "B T D"]:
    """Token embeddings as they enter the residual stream (Gemma's multiplier included)."""
    return tap("hook_embed", 0, scale_embeddings(params.embed[tokens], config))


def scale_embeddings(x: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... D"]:
    """Rows of the embedding table turned into residual-stream vectors: times sqrt(D) in Gemma, in x's dtype."""
    if not config.embed_scale:
        return x
    return x * jnp.asarray(math.sqrt(config.d_model), x.dtype)


def _attention(
    w: Layers, config: ModelConfig, x: Float[Array, "B T D"], context: Context, layer: Int[Array, ""], tap: Tap
) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    q, k, v = _dense(x, w.q), _dense(x, w.k), _dense(x, w.v)
    if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
        q, k, v = q + w.q_bias, k + w.k_bias, v + w.v_bias
    q, k, v = tap("attn.hook_q", layer, q), tap("attn.hook_k", layer, k), tap("attn.hook_v", layer, v)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, config), rms_norm(k, w.k_norm, config)
    table = context.rope_index[layer]
    q = rotate(q, context.sin[table], context.cos[table])
    k = rotate(k, context.sin[table], context.cos[table])
    k, v = jnp.moveaxis(k, 1, -1), jnp.moveaxis(v, 1, -1)
    window = context.windows[layer] if config.windowed else None
    segments = [past.segment(layer, context.positions, window) for past in context.past]
    segments.append(Segment(k, v, _own_mask(context, window)))
    z, pattern = attend(q, segments, scale=config.query_scale, softcap=config.attn_softcap)
    tapped = tap("attn.hook_pattern", layer, pattern)
    if tapped is not pattern:  # an edited pattern replaces the fused product
        z = apply_pattern(tapped, segments)
    z = tap("attn.hook_z", layer, z)
    out = _dense(z.reshape(*z.shape[:2], -1), w.o.reshape(-1, config.d_model))
    if w.post_attn_norm is not None:
        out = rms_norm(out, w.post_attn_norm, config)
    return tap("hook_attn_out", layer, out), (k, v)


def _own_mask(context: Context, window: Int[Array, ""] | None) -> Bool[Array, "b 1 T T"]:
    mask = context.self_mask
    if window is not None:
        mask = mask & (context.distance < window)
    return mask[:, None]


def _mlp(w: Layers, config: ModelConfig, x: Float[Array, "B T D"], layer: Int[Array, ""], tap: Tap) -> Array:
    act = jax.nn.silu if config.activation == "silu" else lambda a: jax.nn.gelu(a, approximate=True)
    x = tap("mlp.hook_in", layer, x)
    hidden = act(tap("mlp.hook_pre", layer, _dense(x, w.gate))) * tap("mlp.hook_pre_linear", layer, _dense(x, w.up))
    out = _dense(tap("mlp.hook_post", layer, hidden), w.down)
    if w.post_mlp_norm is not None:
        out = rms_norm(out, w.post_mlp_norm, config)
    return tap("hook_mlp_out", layer, out)


def block(
    w: Layers,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    layer: Int[Array, ""],
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B K H T"], Float[Array, "B K H T"]]]:
    """One transformer block with the weights ``w`` of layer ``layer`` (no layer axis).

    Returns the residual stream after the block and this layer's (rotated keys, values).
    """
    x = tap("hook_resid_pre", layer, x)
    attn_out, kv = _attention(w, config, rms_norm(x, w.attn_norm, config), context, layer, tap)
    x = tap("hook_resid_mid", layer, _rounded(x + attn_out))
    x = x + _mlp(w, config, rms_norm(x, w.mlp_norm, config), layer, tap)
    return tap("hook_resid_post", layer, x), kv


def _rounded(x: Array) -> Array:
    """X as its dtype can hold it, without which XLA may hand the norm a float32 sum that no tap can see."""
    if x.dtype == jnp.float32:
        return x
    return lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)


def layer_weights(params: Params, layer: int | Int[Array, ""]) -> Layers:
    """The weights of one layer, without the layer axis."""
    return jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, layer, 0, keepdims=False), params.layers)


class Keep(NamedTuple):
    """What ``run_and_keep`` keeps of one place: ``pick(value)`` at these layers, which ascend."""

    place: str
    layers: tuple[int, ...]
    pick: Callable[[Array], Array]


def run_layers(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    start: int,
    stop: int,
    *,
    tap: Tap = no_tap,
) -> Float[Array, "B T D"]:
    """The residual stream after blocks ``start`` ... ``stop - 1`` (static ints), from the stream before ``start``.

    Compiles to one scan; the layer's weights are indexed inside the rematerialised body, because slicing the stack
    or indexing outside of it copies the weights.
    """
    return run_and_keep(params, config, x, context, start, stop, (), tap=tap)[0]


def run_and_keep(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    start: int,
    stop: int,
    keep: Sequence[Keep],
    *,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T D"], list[Array]]:
    """``run_layers``, and for every ``keep`` an array (its layers, ...) of what was picked of the tapped values.

    One scan whatever is kept; layers of ``keep`` lie in ``start`` ... ``stop - 1``.
    """
    if start == stop:
        return x, []

    @jax.checkpoint
    def step(x: Array, layer: Array) -> tuple[Array, list[Array]]:
        kept: dict[str, Array] = {}

        def keeping(place: str, layer: Array | int, value: Array) -> Array:
            kept[place] = value = tap(place, layer, value)
            return value

        x = block(layer_weights(params, layer), config, x, context, layer, keeping if keep else tap)[0]
        return x, [k.pick(kept[k.place]) for k in keep]

    # A layer writes into the slot of the next layer that is wanted, which then writes over it. Layers above the last
    # wanted one write into a spare row.
    slots = [jnp.asarray(np.searchsorted(k.layers, np.arange(start, stop))) for k in keep]

    def one_layer(carry: tuple[Array, list[Array]], layer: Array) -> tuple[tuple[Array, list[Array]], None]:
        x, kept = step(carry[0], layer)
        buffers = [
            lax.dynamic_update_index_in_dim(buffer, value, slot[layer - start], 0)
            for buffer, value, slot in zip(carry[1], kept, slots, strict=True)
        ]
        return (x, buffers), None

    shapes = jax.eval_shape(step, x, jax.ShapeDtypeStruct((), jnp.int32))[1] if keep else []
    buffers = [
        jnp.zeros((len(k.layers) + (k.layers[-1] < stop - 1), *shape.shape), shape.dtype)
        for k, shape in zip(keep, shapes, strict=True)
    ]
    (x, buffers), _ = lax.scan(one_layer, (x, buffers), jnp.arange(start, stop))
    return x, [buffer[: len(k.layers)] for buffer, k in zip(buffers, keep, strict=True)]


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "C U"],
    mask: Bool[Array, "C U"],
    tap: Tap = no_tap,
) -> tuple[Prefix, Float[Array, "C U D"]]:
    """Keys and values of C prefixes (padding on either side) and their final residual stream."""
    positions = positions_of(mask)
    context = make_context(config, positions, mask)
    x, (k, v) = run_and_cache(params, config, embed(params, config, tokens, tap), context, config.n_layers, tap=tap)
    return Prefix(k=k, v=v, mask=mask, positions=positions), x


def run_and_cache(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    stop: int,
    *,
    tap: Tap = no_tap,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "l B K H T"], Float[Array, "l B K H T"]]]:
    """The residual stream after blocks 0 ... ``stop - 1``, and the (rotated keys, values) of each.

    Differentiable with respect to ``x`` through both.
    """

    @jax.checkpoint
    def step(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
        return block(layer_weights(params, layer), config, x, context, layer, tap)

    return lax.scan(step, x, jnp.arange(stop))


def unembed(params: Params, config: ModelConfig, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits of residual-stream vectors taken after the last block (final norm included)."""
    x = rms_norm(x, params.final_norm, config)
    if params.unembed is None:
        logits = lax.dot_general(x, params.embed, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    else:
        logits = jnp.matmul(x, params.unembed, preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    edits: Intervention | None = None,
    prompt_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T V"]:
    """Float32 next-token logits at every position; ``mask`` is False on padding (either side)."""
    if mask is None:
        positions = jnp.arange(tokens.shape[1])[None]
    else:
        positions = positions_of(mask)
    tap = tap_of(edits, make_where(tokens, positions, mask, prompt_length))
    context = make_context(config, positions, mask)
    x = run_layers(params, config, embed(params, config, tokens, tap), context, 0, config.n_layers, tap=tap)
    return unembed(params, config, x)
