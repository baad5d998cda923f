"""The scan over the layers, and what runs on it: reading and keeping, caches of keys and values, whole passes.

Letters: B rows, T tokens, U prefix tokens, C groups of rows, D width, K key/value heads, H head width, V vocabulary,
L layers, l layers that are run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.attention import Prefix, Shared
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Layers, Params
from jaxsteer.models.sites import FINAL, KINDS, Site, layers_by_kind
from jaxsteer.models.taps import NO_TAP, Intervention, Tap, Visit, Where, adding, joined, make_where, tap_of
from jaxsteer.models.transformer import Context, block, embed, final_norm, make_context, positions_of, unembed


def layer_weights(params: Params, layer: int | Int[Array, ""]) -> Layers:
    """The weights of one layer, without the layer axis."""
    return jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, layer, 0, keepdims=False), params.layers)


class Keep(NamedTuple):
    """What ``scan_blocks`` keeps of the values at some kinds of site."""

    kinds: tuple[str, ...]
    pick: Callable[..., Any]
    """``(value at each kind ..., this layer's entry of per_layer) -> pytree``."""
    layers: tuple[int, ...] | None = None
    """The layers of which it is kept, in order; None for all that are run."""


CACHE = Keep(("attn.hook_rot_k", "attn.hook_v"), lambda k, v, _: (jnp.moveaxis(k, 1, -1), jnp.moveaxis(v, 1, -1)))
"""Keys and values [B, K, H, T] of every layer, as later text looks back on them."""


def scan_blocks(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    start: int,
    stop: int,
    *,
    tap: Tap | Callable[[Any], Tap] = NO_TAP,
    per_layer: Any = None,
    keep: Sequence[Keep] = (),
    remat: bool = True,
) -> tuple[Float[Array, "B T D"], list[Any]]:
    """The residual stream after blocks ``start`` ... ``stop - 1`` (static ints), from the stream before ``start``.

    It compiles to one scan whatever is changed and kept. The layer's weights are indexed inside the rematerialised
    body, because slicing the stack or indexing outside of it copies the weights. Many parameters: it is the one walk
    through the layers, and every other is a case of it.

    Args:
        tap: changes values at sites. With ``per_layer`` it may be a function from a layer's entry to a tap.
        per_layer: a pytree with a leading axis over the layers that are run (directions, perturbations, dictionaries).
        keep: what to keep of the values at sites.
        remat: whether a gradient computes the blocks again instead of remembering what is inside them.

    Returns:
        The stream, and for every ``keep`` its picks, with a leading axis over its layers: only these take memory.
    """
    if start == stop and not keep:
        return x, []
    wanted = frozenset(kind for k in keep for kind in k.kinds)

    def step(x: Array, layer: Array, own: Any) -> tuple[Array, list[Any]]:
        visit = Visit(tap if isinstance(tap, Tap) else tap(own), wanted, layer)
        x = block(layer_weights(params, layer), config, x, context, visit)
        return x, [k.pick(*(visit.seen[kind] for kind in k.kinds), own) for k in keep]

    if remat:
        step = jax.checkpoint(step)
    some = {i: k.layers for i, k in enumerate(keep) if k.layers is not None}
    # A layer writes into the slot of the next layer that is wanted, which then writes over it. Layers above the last
    # wanted one write into a spare row.
    slots = {i: jnp.asarray(np.searchsorted(layers, np.arange(start, stop))) for i, layers in some.items()}

    def one_layer(carry: tuple[Array, dict], inputs: tuple[Array, Any]) -> tuple[tuple[Array, dict], dict]:
        x, buffers = carry
        layer, own = inputs
        x, kept = step(x, layer, own)
        buffers = {i: _write(buffer, kept[i], slots[i][layer - start]) for i, buffer in buffers.items()}
        return (x, buffers), {i: value for i, value in enumerate(kept) if i not in some}

    buffers: dict[int, Any] = {}
    if some:
        shapes = jax.eval_shape(step, x, jax.ShapeDtypeStruct((), jnp.int32), jax.tree.map(lambda a: a[0], per_layer))
        buffers = {i: _room(shapes[1][i], len(layers) + (layers[-1] < stop - 1)) for i, layers in some.items()}
    (x, buffers), stacked = lax.scan(one_layer, (x, buffers), (jnp.arange(start, stop), per_layer))
    stacked |= {i: jax.tree.map(itemgetter(slice(len(layers))), buffers[i]) for i, layers in some.items()}
    return x, [stacked[i] for i in range(len(keep))]


def _room(shapes: Any, rows: int) -> Any:
    return jax.tree.map(lambda shape: jnp.zeros((rows, *shape.shape), shape.dtype), shapes)


def _write(buffer: Any, value: Any, slot: Array) -> Any:
    return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, slot, 0), buffer, value)


def walk_blocks(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    span: tuple[Int[Array, ""], Int[Array, ""]],
    *,
    tap: Tap = NO_TAP,
    keep: Sequence[tuple[str, Int[Array, ""] | int | None, Callable[[Array], Array]]] = (),
    kept: Sequence[Array] = (),
) -> tuple[Float[Array, "B T D"], list[Array]]:
    """The stream after blocks ``span[0]`` ... ``span[1] - 1``, which are data: one program walks any part of the model.

    Without gradients. ``keep`` are (kind, layer, pick): the pick of the value there takes the place of the entry of
    ``kept``, which goes on as it is where this part does not come by; of layer None, the value in the last block run.
    """
    wanted = frozenset(kind for kind, _, _ in keep)

    def step(layer: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        x, kept = carry
        visit = Visit(tap, wanted, layer)
        x = block(layer_weights(params, layer), config, x, context, visit)
        found = [
            pick(visit.seen[kind]) if at is None else jnp.where(layer == at, pick(visit.seen[kind]), old)
            for (kind, at, pick), old in zip(keep, kept, strict=True)
        ]
        return x, found

    return lax.fori_loop(*span, step, (x, list(kept)))


def run_layers(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    start: int,
    stop: int,
    *,
    tap: Tap = NO_TAP,
) -> Float[Array, "B T D"]:
    """The residual stream after blocks ``start`` ... ``stop - 1``, from the stream before ``start``."""
    return scan_blocks(params, config, x, context, start, stop, tap=tap)[0]


def run_and_read(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    stop: int,
    wanted: Sequence[tuple[Iterable[Site], Callable[[str, Array], Array]]],
    *,
    tap: Tap = NO_TAP,
    added: Mapping[Site, Array] | None = None,
    begin: int = 0,
) -> tuple[Float[Array, "B T D"], list[dict[Site, Array]]]:
    """The stream after ``stop`` blocks, from the one that ``embed`` gives, and what was picked of values on the way.

    From the stream before block ``begin`` instead, if it is given; sites below it are then not seen. Many parameters:
    where the run begins and ends, what changes it, and what is read.

    ``wanted`` are sites with a function ``pick(kind, value)``; each entry gives a dict of its picks. One scan whatever
    is read, and only what is picked at the sites takes memory.

    ``added`` is added to the values at its sites in blocks and behind them, so that a gradient with respect to it is
    one with respect to the values. The scan is then cut: gradients take memory from its first layer to its last.
    """
    added = added or {}
    found: list[dict[Site, Array]] = [{} for _ in wanted]
    lists = [(i, kind, layers) for i, (sites, _) in enumerate(wanted) for kind, layers in layers_by_kind(sites).items()]
    visit = Visit(joined(tap, adding({site.kind: value for site, value in added.items() if site.kind in FINAL})), FINAL)
    visit.seen["hook_embed"] = x
    inside = {site: value for site, value in added.items() if KINDS[site.kind].in_block}
    first, last = min((s.layer for s in inside), default=begin), max((s.layer + 1 for s in inside), default=begin)
    for start, end in ((begin, first), (first, last), (last, stop)):
        here = [(i, kind, tuple(layer for layer in layers if start <= layer < end)) for i, kind, layers in lists]
        here = [(i, kind, layers) for i, kind, layers in here if layers and KINDS[kind].in_block]
        keep = [Keep((kind,), lambda value, _, i=i, k=kind: wanted[i][1](k, value), layers) for i, kind, layers in here]
        changes: dict[str, Any] = {"tap": tap}
        if inside and (start, end) == (first, last):
            changes = {"tap": lambda own: joined(tap, adding(own)), "per_layer": _by_layer(inside, start, end)}
        x, kept = scan_blocks(params, config, x, context, start, end, keep=keep, **changes)
        for (i, kind, layers), values in zip(here, kept, strict=True):
            found[i] |= {Site(layer, kind): value for layer, value in zip(layers, values, strict=True)}
    if any(kind in FINAL for _, kind, _ in lists):
        final_norm(params, config, x, visit)
    for i, kind, _ in lists:
        if not KINDS[kind].in_block:
            found[i][Site(0, kind)] = wanted[i][1](kind, visit.seen[kind])
    return x, found


def _by_layer(values: Mapping[Site, Array], start: int, stop: int) -> dict[str, Array]:
    """The values of every kind with an axis over the layers, zero where there are none."""
    none = {site.kind: jnp.zeros_like(value) for site, value in values.items()}
    return {
        kind: jnp.stack([values.get(Site(layer, kind), zero) for layer in range(start, stop)])
        for kind, zero in none.items()
    }


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "C U"],
    mask: Bool[Array, "C U"],
    tap: Tap = NO_TAP,
) -> tuple[Prefix, Float[Array, "C U D"]]:
    """Keys and values of C prefixes (padding on either side) and their final residual stream."""
    positions = positions_of(mask)
    context = make_context(config, positions, mask)
    x = embed(params, config, tokens, positions, tap)
    x, (k, v) = run_and_cache(params, config, x, context, config.n_layers, tap=tap)
    return Prefix(k=k, v=v, mask=mask, positions=positions), x


def run_and_cache(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    context: Context,
    stop: int,
    *,
    tap: Tap = NO_TAP,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "l B K H T"], Float[Array, "l B K H T"]]]:
    """The residual stream after blocks 0 ... ``stop - 1``, and the (rotated keys, values) of each.

    Differentiable with respect to ``x`` through both.
    """
    x, (cache,) = scan_blocks(params, config, x, context, 0, stop, tap=tap, keep=[CACHE])
    return x, cache


def ready_for(
    params: Params, config: ModelConfig, edits: Intervention | None, where: Where, context: Context
) -> tuple[Intervention | None, Context]:
    """The edits, decided by the prompts of whole texts, and the context in which these are run with them.

    Edits of the cache change it: the last token of a prompt, and what follows, look back on the changed keys and values
    of the tokens before, which a pass of their own computes; those tokens themselves do not.
    """
    if edits is None:
        return None, context
    edits = edits.decided(params, config, where)
    if not edits.on_cache:
        return edits, context
    tap = edits.tap(where)
    x = embed(params, config, where.tokens, where.positions, tap)
    _, (k, v) = run_and_cache(params, config, x, context, config.n_layers, tap=tap)
    behind = where.positions >= where.prompt_length[:, None] - 1
    before = where.valid & ~behind
    prefix = edits.cached(Prefix(k=k, v=v, mask=before, positions=where.positions), config)
    crossing = behind[:, :, None] & before[:, None, :]
    past = Shared(k=prefix.k, v=prefix.v, mask=crossing[:, None], positions=where.positions)
    return edits, dataclasses.replace(context, past=(*context.past, past), self_mask=context.self_mask & ~crossing)


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
    where = make_where(tokens, positions, mask, prompt_length)
    edits, context = ready_for(params, config, edits, where, make_context(config, positions, mask))
    tap = tap_of(edits, where)
    x = embed(params, config, tokens, positions, tap)
    x = run_layers(params, config, x, context, 0, config.n_layers, tap=tap)
    return unembed(params, config, x, tap)
