"""Decoding on the device: prompts are run once, then one token after the other, without the host.

The step itself, a token run (``run_tokens``) and the next one chosen (``choose_tokens``), is that of all decoding: of
batches that begin together, which are here, and of rows that join and leave (``jaxsteer.engine``).

What the rows decode goes into a ``Cache``, written in place. Rows that continue the same prompt share one copy of its
keys and values, a ``Prefix``; where every row has a prompt of its own, the prompts are the beginning of the cache. The
number of tokens of a call is data, so that streaming in small pieces and decoding to the end are one program.

Letters: B rows, P distinct prompts, C groups of rows that share a prompt (B = C * b), U prompt length (left-padded),
M slots for new tokens, L layers, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.attention import Cache, Past, Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import CACHE, prefill, run_and_cache, scan_blocks
from jaxsteer.models.params import Params
from jaxsteer.models.roles import ASSISTANT, Roles
from jaxsteer.models.sampling import Sampling, choose, of_rows
from jaxsteer.models.sharding import place
from jaxsteer.models.taps import Intervention, Tap, Where, make_where, of_one_token, tap_of
from jaxsteer.models.transformer import embed, make_context, positions_of, unembed

NOT_FINITE = -2
"""Stands in the place of a token where the logits are NaN or infinite."""
CACHE_SPEC = P(None, "prompts", "model", None, None)
"""How keys and values [L, B, K, H, M] lie on a mesh."""


@struct.dataclass
class State:
    """Rows while they are decoded: each at its own length, with its own settings. Donated from call to call."""

    cache: Cache
    tokens: Int[Array, "B M"]
    """Those decoded so far, what ended the row included; the last one has not been run yet."""
    length: Int[Array, " B"]
    """Tokens decoded so far."""
    prompt_length: Int[Array, " B"]
    turns: Int[Array, " B"]
    """Turns of each row's conversation: what is decoded is of the last one."""
    limit: Int[Array, " B"]
    """Tokens that a row may have at most."""
    done: Bool[Array, " B"]
    sampling: Sampling
    """Of each row."""


@struct.dataclass
class Batch:
    """Prompts, padded on the left, and the rows that continue them."""

    tokens: Int[Array, "P U"]
    mask: Bool[Array, "P U"]
    groups: Int[Array, " C"]
    """The prompt that each group of rows continues; B / C rows are a group."""
    rows: Int[Array, " B"]
    """Number of each row in the whole call, for its random numbers."""
    limit: Int[Array, " B"]
    """Tokens that a row may have at most; 0 for rows that only fill up the devices."""
    roles: Roles | None = None
    """Of the prompts' tokens, where they are known."""


# The step


def run_tokens(
    params: Params, config: ModelConfig, where: Where, tap: Tap, *past: Past | None
) -> tuple[Float[Array, "B V"], tuple[Float[Array, "L B K H 1"], Float[Array, "L B K H 1"]]]:
    """One token of every row, run behind its past: the logits after it, and its keys and values.

    The caller writes these into its cache: once per token and not layer by layer, since what the scan over the layers
    only reads is never copied.
    """
    context = make_context(config, where.positions, None, *past)
    x = embed(params, config, where.tokens, where.positions, tap)
    x, [kv] = scan_blocks(params, config, x, context, 0, config.n_layers, tap=tap, keep=[CACHE], remat=False)
    return unembed(params, config, x[:, 0], of_one_token(tap)), kv


def choose_tokens(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    made: Int[Array, " B"],
    limit: Int[Array, " B"],
    done: Bool[Array, " B"],
) -> tuple[Int[Array, " B"], Int[Array, " B"], Bool[Array, " B"]]:
    """The next token of every row that is not done, how many it has then, and whether that was its last one.

    A row ends at a stop token, at its limit, and where its logits are NaN or infinite (its token is ``NOT_FINITE``).
    """
    token = choose(logits, sampling, made)
    broken = ~jnp.isfinite(logits).all(-1)
    stopped = (token[:, None] == sampling.stop).any(-1)
    made = made + ~done
    return jnp.where(broken, NOT_FINITE, token), made, done | stopped | broken | (made >= limit)


# Batches that begin together


@partial(jax.jit, static_argnames=("config", "slots", "mesh"))
def start(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    sampling: Sampling,
    edits: Intervention | None,
    *,
    slots: int,
    mesh: Mesh | None = None,
) -> tuple[Prefix | None, State]:
    """Run the prompts and choose the first token of every row.

    The prefix is None where every row has a prompt of its own: then the cache holds the prompts as well.
    """
    prefix, logits = _run_prompts(params, config, batch, edits)
    share = len(batch.rows) // len(batch.groups)
    prompt_length = jnp.repeat(prefix.length, share)
    if share == 1:  # one stretch of keys instead of two: less to start and to join for every token and layer
        shared, slot, length = None, batch.tokens.shape[1], prompt_length
        k, v = (jnp.pad(a, [(0, 0)] * 4 + [(0, slots)]) for a in (prefix.k, prefix.v))
    else:
        shared, slot, length = prefix, 0, jnp.zeros_like(prompt_length)
        k = v = _no_keys(params, config, len(batch.rows), slots)
    cache = Cache(k=_laid_out(k, mesh), v=_laid_out(v, mesh), length=length, slot=jnp.int32(slot))
    return shared, _begun(cache, batch, sampling, prompt_length, jnp.repeat(logits, share, axis=0), slots)


def _run_prompts(
    params: Params, config: ModelConfig, batch: Batch, edits: Intervention | None
) -> tuple[Prefix, Float[Array, "C V"]]:
    """Keys and values of the prompt of every group, and the logits after it."""
    where = where_prompts(batch)
    last = where.at(jnp.full((len(batch.tokens), 1), batch.tokens.shape[1] - 1))
    if edits is not None and edits.on_cache:
        prefix, x = _run_behind_cache(params, config, batch, edits, last)
    else:
        prefix, x = prefill(params, config, batch.tokens, batch.mask, tap_of(edits, where))
    logits = unembed(params, config, x[:, -1], of_one_token(tap_of(edits, last)))
    if len(batch.groups) != len(batch.tokens):  # as many as there are prompts are the prompts themselves
        pick = partial(jnp.take, indices=batch.groups, mode="clip")
        prefix = jax.tree.map(lambda a: pick(a, axis=1 if a.ndim == 5 else 0), prefix)
        logits = pick(logits, axis=0)
    return prefix, logits


def where_prompts(batch: Batch) -> Where:
    """What an intervention is told of the prompts."""
    return make_where(batch.tokens, positions_of(batch.mask), batch.mask, batch.mask.sum(-1), batch.roles)


@partial(jax.jit, static_argnames="config")
def decide(params: Params, config: ModelConfig, batch: Batch, edits: Intervention) -> Intervention:
    """The edits, decided by the prompts (``Intervention.decided``)."""
    return edits.decided(params, config, where_prompts(batch))


def _run_behind_cache(
    params: Params, config: ModelConfig, batch: Batch, edits: Intervention, last: Where
) -> tuple[Prefix, Float[Array, "P 1 D"]]:
    """``prefill`` of prompts whose last token looks back on keys and values that the edits have changed."""
    where = where_prompts(batch)
    before = where.at(jnp.broadcast_to(jnp.arange(batch.tokens.shape[1] - 1), batch.tokens[:, 1:].shape))
    prefix, _ = prefill(params, config, before.tokens, before.valid, tap_of(edits, before))
    prefix, tap = edits.cached(prefix, config), tap_of(edits, last)
    context = make_context(config, last.positions, None, prefix)
    x = embed(params, config, last.tokens, last.positions, tap)
    x, kv = run_and_cache(params, config, x, context, config.n_layers, tap=tap)
    k, v = (jnp.concatenate(pair, axis=-1) for pair in zip((prefix.k, prefix.v), kv, strict=True))
    return Prefix(k=k, v=v, mask=batch.mask, positions=where.positions), x


def _begun(
    cache: Cache,
    batch: Batch,
    sampling: Sampling,
    prompt_length: Int[Array, " B"],
    logits: Float[Array, "B V"],
    slots: int,
) -> State:
    """Rows with their first token, chosen by ``logits``."""
    turns = jnp.zeros(len(batch.tokens), jnp.int32) if batch.roles is None else batch.roles.turns
    turns = jnp.repeat(turns[batch.groups], len(batch.rows) // len(batch.groups))
    state = State(
        cache=cache,
        tokens=jnp.zeros((len(batch.rows), slots), jnp.int32),
        length=jnp.zeros_like(prompt_length),
        prompt_length=prompt_length,
        turns=turns,
        limit=batch.limit,
        done=batch.limit <= 0,
        sampling=of_rows(sampling, batch.rows),
    )
    return _append(state, logits)


def _append(state: State, logits: Float[Array, "B V"]) -> State:
    """The state with one more token per row that is not done, chosen by ``logits``."""
    token, length, done = choose_tokens(logits, state.sampling, state.length, state.limit, state.done)
    new = (jnp.arange(state.tokens.shape[1]) == state.length[:, None]) & ~state.done[:, None]
    tokens = jnp.where(new, token[:, None], state.tokens)
    return dataclasses.replace(state, tokens=tokens, length=length, done=done)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    params: Params,
    config: ModelConfig,
    prefix: Prefix | None,
    state: State,
    edits: Intervention | None,
    steps: Int[Array, ""],
) -> State:
    """Up to ``steps`` more tokens for every row; ends early when all rows are done or the cache is full."""

    def forward(state: State) -> tuple[Array, Cache]:
        last = jnp.maximum(state.length - 1, 0)[:, None]
        token, positions = jnp.take_along_axis(state.tokens, last, axis=1), state.prompt_length[:, None] + last
        where = make_where(token, positions, ~state.done[:, None], state.prompt_length, _answers(state))
        logits, kv = run_tokens(params, config, where, tap_of(edits, where), prefix, state.cache)
        return logits, state.cache.append(*kv)

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        left, state = carry
        logits, cache = forward(state)
        return left - 1, _append(dataclasses.replace(state, cache=cache), logits)

    def more(carry: tuple[Array, State]) -> Array:
        left, state = carry
        return (left > 0) & ~state.done.all() & (state.done | (state.length < state.tokens.shape[1])).all()

    return lax.while_loop(more, body, (steps, state))[1]


def _answers(state: State) -> Roles:
    """Tokens that are decoded are the assistant's, and so is what follows."""
    ones = jnp.ones((len(state.turns), 1), jnp.int32)
    return Roles(role=ASSISTANT * ones, turn=state.turns[:, None] - 1, leads=ones > 0, turns=state.turns)


@partial(jax.jit, static_argnames=("slots", "mesh"))
def grow(state: State, *, slots: int, mesh: Mesh | None = None) -> State:
    """The same rows with room for ``slots`` tokens. A token costs time in proportion to the room that there is."""
    cache, more = state.cache, slots - state.tokens.shape[1]
    wider = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])  # noqa: E731
    cache = dataclasses.replace(cache, k=_laid_out(wider(cache.k), mesh), v=_laid_out(wider(cache.v), mesh))
    return dataclasses.replace(state, cache=cache, tokens=wider(state.tokens))


def _no_keys(params: Params, config: ModelConfig, rows: int, slots: int) -> Float[Array, "L B K H M"]:
    return jnp.zeros((config.n_layers, rows, config.n_kv_heads, config.d_head, slots), params.embed.dtype)


def _laid_out(cache: Float[Array, "L B K H M"], mesh: Mesh | None) -> Float[Array, "L B K H M"]:
    return cache if mesh is None else lax.with_sharding_constraint(cache, place(mesh, CACHE_SPEC, cache.shape))
