"""Decoding: prompts are run once, then one token after the other, entirely on the device.

A prompt's keys and values are a ``Prefix``: rows that continue the same prompt share one copy. What the rows decode
goes into a ``Cache``, written in place. The number of tokens of a call is data, so that streaming in small pieces and
decoding to the end are one compiled program; texts of alike length share it too (``bucket``).

Letters: B rows, P distinct prompts, C groups of rows that share a prompt (B = C * b), U prompt length (left-padded),
M slots for new tokens, L layers, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.attention import Cache, Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import place
from jaxsteer.models.taps import Intervention, make_where, tap_of
from jaxsteer.models.transformer import block, embed, layer_weights, make_context, positions_of, prefill, unembed

NO_TOKEN = -1
"""Stands in results where a row had ended already."""
_CACHE_SPEC = P(None, "prompts", "model", None, None)


@struct.dataclass
class Sampling:
    """How the next token is chosen. All of it is data: no value leads to another program."""

    key: Array
    """Folded with (row, number of the token), so that a row's tokens do not depend on what is decoded beside it."""
    temperature: Float[Array, ""]
    """0: the likeliest token (the first of equal ones). Otherwise logits are divided by it."""
    top_k: Int[Array, ""]
    """Only the k likeliest tokens (and those equal to the last of them); 0: all."""
    top_p: Float[Array, ""]
    """Only the likeliest tokens that together reach this probability, after ``top_k``; 1: all."""
    vocab: Int[Array, ""]
    """Tokens of the tokenizer; rows of the embedding table at and after it are padding and are never chosen."""
    stop: Int[Array, " S"]
    """Ids that end a row (filled up with -1)."""


@struct.dataclass
class State:
    """Rows while they are decoded. Donated from call to call."""

    cache: Cache
    tokens: Int[Array, "B M"]
    """Those decoded so far, what ended the row included; the last one has not been run yet."""
    length: Int[Array, " B"]
    limit: Int[Array, " B"]
    """Tokens that a row may have at most."""
    done: Bool[Array, " B"]
    rows: Int[Array, " B"]
    """Number of the row in the whole call, for its random numbers."""


def choose(
    logits: Float[Array, "B V"], sampling: Sampling, rows: Int[Array, " B"], step: Int[Array, ""]
) -> Int[Array, " B"]:
    """The next token of every row; ``step`` counts the tokens decoded before it."""
    logits = jnp.where(jnp.arange(logits.shape[1]) < sampling.vocab, logits, -jnp.inf)

    def draw(logits: Array) -> Array:
        scaled = logits / sampling.temperature
        limited = (sampling.top_k > 0) | (sampling.top_p < 1)
        scaled = lax.cond(limited, partial(_restrict, sampling=sampling), lambda x: x, scaled)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(sampling.key, row), step))(rows)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        return jnp.argmax(scaled + noise, axis=-1)

    likeliest = partial(jnp.argmax, axis=-1)
    return lax.cond(sampling.temperature > 0, draw, likeliest, logits).astype(jnp.int32)


def _restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits with -inf wherever top-k and then top-p exclude a token."""
    size = logits.shape[1]
    falling = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)
    falling = jnp.where(falling >= jnp.take(falling, k[None] - 1, axis=1), falling, -jnp.inf)
    p = jax.nn.softmax(falling, axis=-1)
    kept = (jnp.cumsum(p, axis=-1) - p < sampling.top_p) | (sampling.top_p >= 1)
    least = jnp.where(kept, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


@partial(jax.jit, static_argnames=("config", "slots", "mesh"))
def start(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "P U"],
    mask: Bool[Array, "P U"],
    groups: Int[Array, " C"],
    rows: Int[Array, " B"],
    limit: Int[Array, " B"],
    sampling: Sampling,
    edits: Intervention | None,
    *,
    slots: int,
    mesh: Mesh | None = None,
) -> tuple[Prefix, State]:
    """Run left-padded prompts and choose the first token of every row. Group c continues prompt ``groups[c]``."""
    tap = tap_of(edits, make_where(tokens, positions_of(mask), mask))
    prefix, x = prefill(params, config, tokens, mask, tap)
    logits = unembed(params, config, x[:, -1])
    if len(groups) != len(tokens):  # as many as there are prompts are the prompts themselves
        pick = partial(jnp.take, indices=groups, mode="clip")
        prefix = jax.tree.map(lambda a: pick(a, axis=1 if a.ndim == 5 else 0), prefix)
        logits = pick(logits, axis=0)
    logits = jnp.repeat(logits, len(rows) // len(groups), axis=0)
    shape = (config.n_layers, len(rows), config.n_kv_heads, config.d_head, slots)
    empty = jnp.zeros(shape, prefix.k.dtype)
    if mesh is not None:
        empty = lax.with_sharding_constraint(empty, place(mesh, _CACHE_SPEC, shape))
    none = jnp.zeros_like(rows)
    state = State(
        cache=Cache(k=empty, v=empty, length=jnp.int32(-1)),
        tokens=jnp.zeros((len(rows), slots), jnp.int32),
        length=none,
        limit=limit,
        done=limit <= 0,
        rows=rows,
    )
    return prefix, _append(state, sampling, logits)


def _append(state: State, sampling: Sampling, logits: Float[Array, "B V"]) -> State:
    """The state with one more token per row that is not done, chosen by ``logits``."""
    step = state.cache.length + 1
    token = choose(logits, sampling, state.rows, step)
    length = state.length + ~state.done
    stopped = (token[:, None] == sampling.stop).any(-1)
    return state.replace(
        cache=state.cache.replace(length=step),
        tokens=lax.dynamic_update_slice(state.tokens, jnp.where(state.done, 0, token)[:, None], (0, step)),
        length=length,
        done=state.done | stopped | (length >= state.limit),
    )


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    params: Params,
    config: ModelConfig,
    prefix: Prefix,
    state: State,
    sampling: Sampling,
    edits: Intervention | None,
    steps: Int[Array, ""],
) -> State:
    """Up to ``steps`` more tokens for every row; ends early when all rows are done."""
    prompt_length = jnp.repeat(prefix.length, len(state.rows) // prefix.mask.shape[0])

    def forward(state: State) -> tuple[Array, Cache]:
        cache = state.cache
        token = lax.dynamic_slice_in_dim(state.tokens, cache.length, 1, axis=1)
        positions = (prompt_length + cache.length)[:, None]
        context = make_context(config, positions, None, prefix, cache)
        tap = tap_of(edits, make_where(token, positions, ~state.done[:, None], prompt_length))

        def step(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
            return block(layer_weights(params, layer), config, x, context, layer, tap)

        # The cache is written once per token and not layer by layer: what the scan only reads is never copied.
        x, (k, v) = lax.scan(step, embed(params, config, token, tap), jnp.arange(config.n_layers))
        write = lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, cache.length, axis=4)  # noqa: E731
        return unembed(params, config, x[:, 0]), cache.replace(k=write(cache.k, k), v=write(cache.v, v))

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        left, state = carry
        logits, cache = forward(state)
        return left - 1, _append(state.replace(cache=cache), sampling, logits)

    return lax.while_loop(lambda carry: (carry[0] > 0) & ~carry[1].done.all(), body, (steps, state))[1]
