"""The program of direct logit attribution: one scan over the layers, then one division by the last norm's scale.

Letters: B rows, T tokens, P readings of a row, K targets (the one that is asked for, then random ones), D width,
N query heads, H head width, I MLP width, V vocabulary, L layers, F latents.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, layer_weights, ready_for, run_layers, scan_blocks
from jaxsteer.models.params import Layers, Params
from jaxsteer.models.sites import FINAL
from jaxsteer.models.taps import Intervention, Visit, make_where, tap_of
from jaxsteer.models.transformer import (
    centred,
    embed,
    final_norm,
    make_context,
    norm_weight,
    positions_of,
    unembed_normed,
)
from jaxsteer.sae.dictionary import SAE, encode

NONE, AVERAGE = -1, -2
"""In place of a token that a target is compared with: nothing, and the mean over the vocabulary."""


@struct.dataclass
class Asked:
    """What is asked of a batch of rows."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    index: Int[Array, "B P"]
    weight: Float[Array, "B P"]
    """Weight of a reading in its text's mean; 0 for none."""
    plus: Int[Array, "B P K"]
    minus: Int[Array, "B P K"]
    mean: Float[Array, " D"]
    """The mean column of the unembedding."""


@struct.dataclass
class Found:
    """What was found of a batch: of every reading for the target, and sums over rows."""

    logit: Float[Array, "B P"]
    embedding: Float[Array, "B P"]
    attention: Float[Array, "B P L"]
    mlp: Float[Array, "B P L"]
    stream: Float[Array, "B P L"]
    heads: Float[Array, "B P L N"] | None
    bias: Float[Array, "B P"] | None
    """The last norm's own; ``None`` where it has none."""
    attention_bias: Float[Array, "B P L"] | None
    """What belongs to no head; ``None`` where attention has no bias behind its heads."""
    sums: dict[str, Array]
    """Of rows: "parts" [K, 2 L + 1] (one more with ``bias``), "heads" [K, L, N]; "neurons" and "latents" of two
    targets, and squares of one."""


@partial(jax.jit, static_argnames=("config", "known"))
def best_token(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    edits: Intervention | None,
    *,
    known: int,
) -> Int[Array, " B"]:
    """The token below ``known`` that is likeliest after each row."""
    positions = positions_of(mask)
    where = make_where(tokens, positions, mask)
    edits, context = ready_for(params, config, edits, where, make_context(config, positions, mask))
    tap = tap_of(edits, where)
    x = embed(params, config, tokens, positions, tap)
    x = run_layers(params, config, x, context, 0, config.n_layers, tap=tap)
    last = jnp.maximum(mask.sum(-1) - 1, 0)[:, None, None]
    x = jnp.take_along_axis(final_norm(params, config, x, Visit(tap)), last, axis=1)[:, 0]
    return unembed_normed(params, config, x)[:, :known].argmax(-1)


def _columns(params: Params, ids: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    """Columns of the unembedding, float32. A tied one is the table of embeddings as it is, without their scale."""
    found = params.embed[ids] if params.unembed is None else jnp.moveaxis(params.unembed[:, ids], 0, -1)
    return found.astype(jnp.float32)


@partial(jax.jit, static_argnames=("known",))
def mean_column(params: Params, *, known: int) -> Float[Array, " D"]:
    """The mean of the unembedding's columns of the first ``known`` tokens, float32."""
    if params.unembed is None:
        return params.embed[:known].mean(0, dtype=jnp.float32)
    return params.unembed[:, :known].mean(1, dtype=jnp.float32)


_dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("config", "heads", "neurons", "layer"))
def attribute_batch(
    params: Params,
    config: ModelConfig,
    asked: Asked,
    edits: Intervention | None,
    sae: SAE | None,
    *,
    heads: bool,
    neurons: bool,
    layer: int | None,
) -> Found:
    """One scan over the layers; the last norm's scale divides behind it, because all is linear in it."""
    positions = positions_of(asked.mask)
    where = make_where(asked.tokens, positions, asked.mask)
    edits, context = ready_for(params, config, edits, where, make_context(config, positions, asked.mask))
    tap = tap_of(edits, where)
    x = embed(params, config, asked.tokens, positions, tap)
    other = jnp.where((asked.minus == AVERAGE)[..., None], asked.mean, _columns(params, jnp.maximum(asked.minus, 0)))
    wanted = _columns(params, asked.plus) - jnp.where((asked.minus == NONE)[..., None], 0.0, other)
    # The mean that a LayerNorm takes away of the parts is taken away of what they are multiplied with: it is the same.
    along = centred(wanted * norm_weight(params.final_norm, config), config)

    def at(value: Array) -> Array:
        index = asked.index.reshape(*asked.index.shape, *[1] * (value.ndim - 2))
        return jnp.take_along_axis(value, index, axis=1).astype(jnp.float32)

    def pick(own: Array, seen: dict[str, Array]) -> dict[str, Array]:
        return _layer_parts(layer_weights(params, own), config, jax.tree.map(at, seen), along, heads=heads)

    kinds = ["hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    kinds += ["attn.hook_z"] * heads + ["mlp.hook_post"] * neurons
    if config.post_norms:
        kinds += ["ln1_post.hook_scale"] * heads + ["ln2_post.hook_scale"] * neurons
    keep = [Keep(tuple(kinds), lambda *values: pick(values[-1], dict(zip(kinds, values, strict=False))))]
    if layer is not None:
        keep.append(Keep(("hook_resid_post",), lambda value, _: at(value), (layer,)))
    embedding = _dot("bpd,bpkd->bpk", at(x), along)
    x, [kept, *read] = scan_blocks(
        params, config, x, context, 0, config.n_layers, tap=tap, per_layer=jnp.arange(config.n_layers), keep=keep
    )
    visit = Visit(tap, FINAL)
    normed = at(final_norm(params, config, x, visit))
    scale = at(visit.seen["ln_final.hook_scale"])  # [B, P, 1]
    if sae is not None:
        f = encode(sae, read[0][0]) / sae.config.output_scale
        kept["latents"] = f[:, :, None] * _dot("fd,bpkd->bpkf", sae.W_dec.astype(jnp.float32), along[:, :, :2])
    share = 1 / scale[..., 0]
    attention, mlp, stream = (
        jnp.moveaxis(kept[name], 0, 3) * share[..., None, None] for name in ("attention", "mlp", "stream")
    )
    embedding = embedding * share[..., None]
    parts, bias, own = [embedding[..., None], attention, mlp], None, None
    if params.final_norm_bias is not None:
        bias = _dot("bpkd,d->bpk", wanted, params.final_norm_bias.astype(jnp.float32))
        parts.append(bias[..., None])
    if "attention bias" in kept:
        own = jnp.moveaxis(kept["attention bias"], 0, 2) * share[..., None]
    sums = {"parts": _dot("bp,bpkc->kc", asked.weight, jnp.concatenate(parts, -1))}
    if heads:
        kept["heads"] = jnp.moveaxis(kept["heads"], 0, 3) * share[..., None, None, None]
        sums["heads"] = _dot("bp,bpkln->kln", asked.weight, kept["heads"])
    for name, form in (("neurons", "bp,lbpki->bkli"), ("latents", "bp,bpki->bki")):
        if name in kept:
            by_text = _dot(form, asked.weight * share, kept[name])
            sums |= {name: by_text.sum(0), f"{name} squared": jnp.square(by_text[:, 0]).sum(0)}
    return Found(
        logit=_dot("bpd,bpd->bp", normed, wanted[:, :, 0]),
        embedding=embedding[:, :, 0],
        attention=attention[:, :, 0],
        mlp=mlp[:, :, 0],
        stream=stream[:, :, 0],
        heads=kept["heads"][:, :, 0] if heads else None,
        bias=None if bias is None else bias[:, :, 0],
        attention_bias=own,
        sums=sums,
    )


def _layer_parts(
    w: Layers, config: ModelConfig, seen: dict[str, Array], along: Float[Array, "B P K D"], *, heads: bool
) -> dict[str, Array]:
    """Products with ``along`` of what one layer wrote at the readings; neurons' with the first two targets only."""
    names = {"attention": "hook_attn_out", "mlp": "hook_mlp_out", "stream": "hook_resid_post"}
    found = {name: _dot("bpd,bpkd->bpk", seen[kind], along) for name, kind in names.items()}

    def before_norm(along: Array, weight: Array | None, scale: str) -> Array:
        """``along`` as seen from what goes into the norm behind an attention or MLP."""
        return along if weight is None else along * norm_weight(weight, config) / seen[scale][:, :, None]

    if w.o_bias is not None:
        found["attention bias"] = _dot("d,bpd->bp", w.o_bias.astype(jnp.float32), along[:, :, 0])
    if heads:
        back = before_norm(along, w.post_attn_norm, "ln1_post.hook_scale")
        found["heads"] = _dot("bpnh,nhd,bpkd->bpkn", seen["attn.hook_z"], w.o.astype(jnp.float32), back)
    if "mlp.hook_post" in seen:
        back = before_norm(along[:, :, :2], w.post_mlp_norm, "ln2_post.hook_scale")
        found["neurons"] = seen["mlp.hook_post"][:, :, None] * _dot("id,bpkd->bpki", w.down.astype(jnp.float32), back)
    return found
