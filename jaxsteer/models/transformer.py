"""The transformer: pure functions over stacked parameters, one scan whatever the depth.

Letters: B rows, T time, D width, N query heads, K key/value heads, H head width, I MLP width, V vocabulary,
L layers, C groups of rows that share a prefix, U prefix length.

``run_layers(params, config, x, context, start, stop)`` is the hook system: reading layer l means stopping there,
editing means stop, edit, run on. Places inside a block are reached by ``tap(name, layer, value) -> value``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.attention import MASKED, Past, Segment, apply_pattern, attend, rotary_tables, rotate
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Layers, Params
from jaxsteer.models.taps import NO_TAP, Tap, Visit


@struct.dataclass
class Context:
    """What every block of a forward pass shares: rotary tables, masks, and the keys and values of earlier text."""

    sin: Float[Array, "R B T h"] | None
    cos: Float[Array, "R B T h"] | None
    """``None`` where nothing is rotated."""
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
    sin, cos = rotary_tables(config.ropes, config.d_head, positions) if config.ropes else (None, None)
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


def normed(
    x: Float[Array, "... D"], weight: Float[Array, " D"], config: ModelConfig, bias: Float[Array, " D"] | None = None
) -> Float[Array, "... D"]:
    """The model's norm, its statistics in float32: RMSNorm, or LayerNorm with its ``bias``.

    Llama and Qwen cast before the weight, Gemma after ``1 + w``, GPT-2 after weight and bias.
    """
    wide = centred(x.astype(jnp.float32), config)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    return _weighted(wide, weight, config, bias, x.dtype)


def centred(x: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... D"]:
    """X without its mean where the model's norms take it away (LayerNorm); else x itself. Linear, and symmetric."""
    return x - jnp.mean(x, axis=-1, keepdims=True) if config.norm == "layer" else x


def norm_weight(weight: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... D"]:
    """What a norm multiplies by, float32."""
    return weight.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0)


def _weighted(wide: Array, weight: Array, config: ModelConfig, bias: Array | None, dtype: Any) -> Array:
    if bias is not None:
        return (wide * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)
    if config.norm_plus_one:
        return (wide * (1.0 + weight.astype(jnp.float32))).astype(dtype)
    return wide.astype(dtype) * weight


def _norm(x: Array, weight: Array, config: ModelConfig, visit: Visit, name: str, bias: Array | None = None) -> Array:
    """``normed``, with the sites of its scale and of what is divided by it, before the weight."""
    scale, normalized = f"{name}.hook_scale", f"{name}.hook_normalized"
    if not visit.looks(scale, normalized):
        return normed(x, weight, config, bias)
    wide = centred(x.astype(jnp.float32), config)
    divisor = visit(scale, jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps))
    wide = visit(normalized, wide / divisor)
    if visit.changes(scale, normalized):
        return _weighted(wide, weight, config, bias, x.dtype)
    return normed(x, weight, config, bias)


def _dense(x: Array, w: Array) -> Array:
    """``x @ w`` over the last axis of x and the first of w, as one 2-D product (XLA's CPU matmul wants that)."""
    flat = x.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *w.shape[1:])


def _plus(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias


def embed(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], positions: Int[Array, "b T"], tap: Tap = NO_TAP
) -> Float[Array, "B T D"]:
    """The stream before block 0: embeddings of the tokens (Gemma's multiplier included), and of their ``positions``
    where these have vectors (GPT-2); b may be 1.
    """
    return tap("hook_embed", 0, placed(params, embed_tokens(params, config, tokens), positions))


def embed_tokens(params: Params, config: ModelConfig, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """The embeddings of tokens that have no positions yet: ``placed`` gives them."""
    return scale_embeddings(params.embed[tokens], config)


def placed(params: Params, x: Float[Array, "... T D"], positions: Int[Array, "... T"]) -> Float[Array, "... T D"]:
    """Embeddings of tokens as they enter the stream at ``positions``: with these vectors, where the model has such.

    A position beyond the table gets the last vector; callers refuse such texts.
    """
    if params.positions is None:
        return x
    return x + params.positions.at[positions].get(mode="clip")


def scale_embeddings(x: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... D"]:
    """Rows of the embedding table turned into residual-stream vectors: times sqrt(D) in Gemma, in x's dtype."""
    if not config.embed_scale:
        return x
    return x * jnp.asarray(math.sqrt(config.d_model), x.dtype)


def _project(w: Layers, config: ModelConfig, x: Float[Array, "B T D"], visit: Visit) -> tuple[Array, Array, Array]:
    """Queries, keys and values of the stream before the block.

    Who changes ``hook_q_input`` (k, v likewise) gives every head a copy of the stream of its own, with a norm of its
    own; what a tap does to the norm it then does to every copy.
    """
    split: dict[str, Array] = {}
    for name, weight in (("q", w.q), ("k", w.k), ("v", w.v)):
        kind = f"hook_{name}_input"
        if visit.looks(kind):
            copies = visit(kind, jnp.broadcast_to(x[:, :, None], (*x.shape[:2], weight.shape[1], x.shape[2])))
        if visit.changes(kind):
            given = (w.attn_norm, config, Visit(visit.tap, layer=visit.layer), "ln1", w.attn_norm_bias)
            norm = lambda copy, given=given: _norm(copy, *given)  # noqa: E731
            split[name] = jnp.einsum("btnd,dnh->btnh", jax.vmap(norm, 2, 2)(copies), weight)
    x = _norm(x, w.attn_norm, config, visit, "ln1", w.attn_norm_bias)
    q, k, v = (split[name] if name in split else _dense(x, getattr(w, name)) for name in "qkv")
    return q, k, v


def _attention(
    w: Layers, config: ModelConfig, x: Float[Array, "B T D"], context: Context, visit: Visit
) -> Float[Array, "B T D"]:
    q, k, v = _project(w, config, x, visit)
    if w.q_bias is not None and w.k_bias is not None and w.v_bias is not None:
        q, k, v = q + w.q_bias, k + w.k_bias, v + w.v_bias
    q, k, v = visit("attn.hook_q", q), visit("attn.hook_k", k), visit("attn.hook_v", v)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = normed(q, w.q_norm, config), normed(k, w.k_norm, config)
    layer = jnp.asarray(visit.layer)
    turned = _rotation(context, layer)
    q, k = visit("attn.hook_rot_q", turned(q)), visit("attn.hook_rot_k", turned(k))
    window = context.windows[layer] if config.windowed else None
    segments = [past.segment(layer, context.positions, window) for past in context.past]
    segments.append(Segment(jnp.moveaxis(k, 1, -1), jnp.moveaxis(v, 1, -1), _own_mask(context, window)))

    def scored(scores: Float[Array, "B N T S"]) -> Float[Array, "B N T S"]:
        return visit("attn.hook_attn_scores", scores, fixed=scores == MASKED)

    change = scored if visit.looks("attn.hook_attn_scores") else None
    z, pattern = attend(q, segments, scale=config.query_scale, softcap=config.attn_softcap, change_scores=change)
    pattern = visit("attn.hook_pattern", pattern)
    if visit.changes("attn.hook_pattern"):  # it replaces the fused product
        z = apply_pattern(pattern, segments)
    z = visit("attn.hook_z", z)
    if visit.looks("attn.hook_result"):
        result = visit("attn.hook_result", jnp.einsum("btnh,nhd->btnd", z, w.o))
    if visit.changes("attn.hook_result"):
        out = result.sum(2)
    else:
        out = _dense(z.reshape(*z.shape[:2], -1), w.o.reshape(-1, config.d_model))
    out = visit("attn.hook_out", _plus(out, w.o_bias))
    if w.post_attn_norm is not None:
        out = _norm(out, w.post_attn_norm, config, visit, "ln1_post")
    return visit("hook_attn_out", out)


def _rotation(context: Context, layer: Int[Array, ""]) -> Callable[[Float[Array, "B T X H"]], Float[Array, "B T X H"]]:
    """The layer's rotary embedding of queries or keys; nothing where there is none."""
    sin, cos = context.sin, context.cos
    if sin is None or cos is None:
        return lambda x: x
    table = context.rope_index[layer]
    return lambda x: rotate(x, sin[table], cos[table])


def _own_mask(context: Context, window: Int[Array, ""] | None) -> Bool[Array, "b 1 T T"]:
    mask = context.self_mask
    if window is not None:
        mask = mask & (context.distance < window)
    return mask[:, None]


def _mlp(w: Layers, config: ModelConfig, x: Float[Array, "B T D"], visit: Visit) -> Float[Array, "B T D"]:
    act = jax.nn.silu if config.activation == "silu" else lambda a: jax.nn.gelu(a, approximate=True)
    x = visit("hook_mlp_in", x)
    x = visit("mlp.hook_in", _norm(x, w.mlp_norm, config, visit, "ln2", w.mlp_norm_bias))
    if w.gate is None:
        hidden = act(visit("mlp.hook_pre", _plus(_dense(x, w.up), w.up_bias)))
    else:
        hidden = act(visit("mlp.hook_pre", _dense(x, w.gate))) * visit("mlp.hook_pre_linear", _dense(x, w.up))
    out = visit("mlp.hook_out", _plus(_dense(visit("mlp.hook_post", hidden), w.down), w.down_bias))
    if w.post_mlp_norm is not None:
        out = _norm(out, w.post_mlp_norm, config, visit, "ln2_post")
    return visit("hook_mlp_out", out)


def block(
    w: Layers, config: ModelConfig, x: Float[Array, "B T D"], context: Context, visit: Visit
) -> Float[Array, "B T D"]:
    """The residual stream after one block, with the weights ``w`` of layer ``visit.layer`` (no layer axis)."""
    x = visit("hook_resid_pre", x)
    x = visit("hook_resid_mid", _rounded(x + _attention(w, config, x, context, visit)))
    return visit("hook_resid_post", x + _mlp(w, config, x, visit))


def _rounded(x: Array) -> Array:
    """X as its dtype can hold it, without which XLA may hand the norm a float32 sum that no tap can see."""
    if x.dtype == jnp.float32:
        return x
    return lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)


def final_norm(params: Params, config: ModelConfig, x: Float[Array, "... D"], visit: Visit) -> Float[Array, "... D"]:
    """The stream after the last block, normalised; NaN where its squares overflow.

    A norm would make 0 of those, and every token equally likely, without a word.
    """
    found = _norm(x, params.final_norm, config, visit, "ln_final", params.final_norm_bias)
    return jnp.where(jnp.isinf(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)), jnp.nan, found)


def unembed(params: Params, config: ModelConfig, x: Float[Array, "... D"], tap: Tap = NO_TAP) -> Float[Array, "... V"]:
    """Float32 logits of residual-stream vectors taken after the last block (final norm included)."""
    return unembed_normed(params, config, final_norm(params, config, x, Visit(tap)))


def unembed_normed(params: Params, config: ModelConfig, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits of vectors that went through the final norm."""
    if params.unembed is None:
        logits = lax.dot_general(x, params.embed, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    else:
        logits = jnp.matmul(x, params.unembed, preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


def direction_logits(params: Params, config: ModelConfig, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits that vectors of the stream add where the final norm divides by 1, before the soft-cap.

    Linear in x: a LayerNorm takes the vector's mean away, and its bias, which no part of the stream writes, is left
    out. The norm's division depends on the rest of the stream: divide by a token's scale (``ln_final.hook_scale``) for
    the logits that a part of its stream adds. Vectors are rounded to the table's dtype.
    """
    table = params.embed.T if params.unembed is None else params.unembed
    weight = norm_weight(params.final_norm, config)
    weighted = (centred(x.astype(jnp.float32), config) * weight).astype(table.dtype)
    return jnp.matmul(weighted, table, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
