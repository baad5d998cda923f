"""Decoding: prompts are run once, then one token after the other, entirely on the device.

What the rows decode goes into a ``Cache``, written in place. Rows that continue the same prompt share one copy of its
keys and values, a ``Prefix``; where every row has a prompt of its own, the prompts are the beginning of the cache. The
number of tokens of a call is data, so that streaming in small pieces and
decoding to the end are one compiled program; prompts of alike length share it too (``bucket``).

Letters: B rows, P distinct prompts, C groups of rows that share a prompt (B = C * b), U prompt length (left-padded),
M slots for new tokens, L layers, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.attention import Cache, Prefix
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.sampling import Sampling, choose
from jaxsteer.models.sharding import place, shard_rows
from jaxsteer.models.taps import Intervention, checked, make_where, tap_of
from jaxsteer.models.transformer import block, embed, layer_weights, make_context, positions_of, prefill, unembed

NO_TOKEN = -1
"""Stands in results where a row had ended already."""
CACHE_SPEC = P(None, "prompts", "model", None, None)
"""How keys and values [L, B, K, H, M] lie on a mesh."""
_FIRST_SLOTS = 64
"""Room that decoding starts with; it doubles as often as rows need it."""


@struct.dataclass
class State:
    """Rows while they are decoded. Donated from call to call."""

    cache: Cache
    tokens: Int[Array, "B M"]
    """Those decoded so far, what ended the row included; the last one has not been run yet."""
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    offset: Int[Array, ""]
    """Slots of the cache before the first token that is decoded: the prompts', or none."""
    limit: Int[Array, " B"]
    """Tokens that a row may have at most."""
    done: Bool[Array, " B"]
    rows: Int[Array, " B"]
    """Number of the row in the whole call, for its random numbers."""


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
) -> tuple[Prefix | None, State]:
    """Run left-padded prompts and choose the first token of every row. Group c continues prompt ``groups[c]``.

    The prefix is None where every row has a prompt of its own: then the cache holds the prompts as well.
    """
    tap = tap_of(edits, make_where(tokens, positions_of(mask), mask))
    prefix, x = prefill(params, config, tokens, mask, tap)
    logits = unembed(params, config, x[:, -1])
    if len(groups) != len(tokens):  # as many as there are prompts are the prompts themselves
        pick = partial(jnp.take, indices=groups, mode="clip")
        prefix = jax.tree.map(lambda a: pick(a, axis=1 if a.ndim == 5 else 0), prefix)
        logits = pick(logits, axis=0)
    share = len(rows) // len(groups)
    logits = jnp.repeat(logits, share, axis=0)
    prompt_length = jnp.repeat(prefix.length, share)
    room = [(0, 0)] * 4 + [(0, slots)]
    if share == 1:  # one stretch of keys instead of two: less to start and to join for every token and layer
        cache = Cache(
            k=_laid_out(jnp.pad(prefix.k, room), mesh),
            v=_laid_out(jnp.pad(prefix.v, room), mesh),
            start=tokens.shape[1] - prompt_length,
            length=jnp.int32(tokens.shape[1] - 1),
        )
        offset, shared = tokens.shape[1], None
    else:
        empty = jnp.zeros((config.n_layers, len(rows), config.n_kv_heads, config.d_head, slots), prefix.k.dtype)
        empty = _laid_out(empty, mesh)
        cache = Cache(k=empty, v=empty, start=jnp.zeros_like(rows), length=jnp.int32(-1))
        offset, shared = 0, prefix
    state = State(
        cache=cache,
        tokens=jnp.zeros((len(rows), slots), jnp.int32),
        length=jnp.zeros_like(rows),
        prompt_length=prompt_length,
        offset=jnp.int32(offset),
        limit=limit,
        done=limit <= 0,
        rows=rows,
    )
    return shared, _append(state, sampling, logits)


def _append(state: State, sampling: Sampling, logits: Float[Array, "B V"]) -> State:
    """The state with one more token per row that is not done, chosen by ``logits``."""
    filled = state.cache.length + 1
    step = filled - state.offset
    token = choose(logits, sampling, state.rows, step)
    length = state.length + ~state.done
    stopped = (token[:, None] == sampling.stop).any(-1)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, length=filled),
        tokens=lax.dynamic_update_slice(state.tokens, jnp.where(state.done, 0, token)[:, None], (0, step)),
        length=length,
        done=state.done | stopped | (length >= state.limit),
    )


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    params: Params,
    config: ModelConfig,
    prefix: Prefix | None,
    state: State,
    sampling: Sampling,
    edits: Intervention | None,
    steps: Int[Array, ""],
) -> State:
    """Up to ``steps`` more tokens for every row; ends early when all rows are done or the cache is full."""

    def forward(state: State) -> tuple[Array, Cache]:
        cache, step = state.cache, state.cache.length - state.offset
        token = lax.dynamic_slice_in_dim(state.tokens, step, 1, axis=1)
        positions = (state.prompt_length + step)[:, None]
        context = make_context(config, positions, None, prefix, cache)
        tap = tap_of(edits, make_where(token, positions, ~state.done[:, None], state.prompt_length))

        def one(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
            return block(layer_weights(params, layer), config, x, context, layer, tap)

        # The cache is written once per token and not layer by layer: what the scan only reads is never copied.
        x, (k, v) = lax.scan(one, embed(params, config, token, tap), jnp.arange(config.n_layers))
        write = lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, cache.length, axis=4)  # noqa: E731
        return unembed(params, config, x[:, 0]), dataclasses.replace(cache, k=write(cache.k, k), v=write(cache.v, v))

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        left, state = carry
        logits, cache = forward(state)
        return left - 1, _append(dataclasses.replace(state, cache=cache), sampling, logits)

    def more(carry: tuple[Array, State]) -> Array:
        left, state = carry
        return (left > 0) & ~state.done.all() & (state.cache.length - state.offset < state.tokens.shape[1] - 1)

    return lax.while_loop(more, body, (steps, state))[1]


@partial(jax.jit, static_argnames=("slots", "mesh"))
def grow(state: State, *, slots: int, mesh: Mesh | None = None) -> State:
    """The same rows with room for ``slots`` tokens. A token costs time in proportion to the room that there is."""
    more = slots - state.tokens.shape[1]
    wider = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])  # noqa: E731
    cache = dataclasses.replace(
        state.cache, k=_laid_out(wider(state.cache.k), mesh), v=_laid_out(wider(state.cache.v), mesh)
    )
    return dataclasses.replace(state, cache=cache, tokens=wider(state.tokens))


def _laid_out(cache: Float[Array, "L B K H M"], mesh: Mesh | None) -> Float[Array, "L B K H M"]:
    return cache if mesh is None else lax.with_sharding_constraint(cache, place(mesh, CACHE_SPEC, cache.shape))


# Many prompts


@dataclasses.dataclass
class Progress:
    """What a batch of rows has decoded so far."""

    rows: Int[np.ndarray, " B"]
    """Which rows of the call these are: row ``i * samples + j`` is sample j of prompt i."""
    tokens: Int[np.ndarray, "B M"]
    """``NO_TOKEN`` after a row's end."""
    length: Int[np.ndarray, " B"]
    done: Bool[np.ndarray, " B"]
    """Whoever iterates may set an entry: that row then gets no more tokens."""


def bucket(n: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, 128 ... that is at least ``n``: sizes that programs are compiled for."""
    size = 16
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def generate_tokens(
    model: Model,
    prompts: Sequence[Int[np.ndarray, " _"]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    samples: int = 1,
    edits: Intervention | None = None,
    every: int | None = None,
    batch: int = 64,
) -> Iterator[Progress]:
    """Continue prompts of token ids; yields each batch of rows every ``every`` tokens and when it is done.

    Equal prompts (and the samples of one) are run once. At most ``batch`` rows are decoded at a time, those with
    prompts of alike length together; neither this nor ``every`` changes a token. Edits whose arrays differ per row say
    so by an attribute ``rows``: then all rows are decoded at once, in their order, each with its own prompt. Raises
    ``UserError``, before any work, for what does not fit the model.
    """
    _check(model, prompts, max_new_tokens=max_new_tokens, samples=samples, batch=batch)
    count, own = len(prompts) * samples, getattr(edits, "rows", None)
    if own is not None and own != count:
        raise UserError(f"The edits are made for {own} rows; {len(prompts)} prompts x {samples} samples are {count}.")
    edits = checked(edits, model.config, own)
    plans = _plan(prompts, samples, batch) if own is None else [_every_row(count, samples)]
    return (
        progress
        for plan in plans
        for progress in _decode_batch(model, prompts, plan, sampling, max_new_tokens, edits, every)
    )


def _check(model: Model, prompts: Sequence[np.ndarray], **counts: int) -> None:
    vocab, longest = len(model.params.embed), model.config.max_positions - 1
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")
    for i, ids in enumerate(prompts):
        if not 1 <= len(ids) <= longest:
            raise UserError(
                f"Prompt {i} has {len(ids)} tokens. This model's positions end at {longest + 1}, so a prompt may have "
                f"1 to {longest} tokens if at least one is to follow."
            )
        if min(ids) < 0 or max(ids) >= vocab:
            raise UserError(
                f"Prompt {i} holds token ids from {min(ids)} to {max(ids)}; they must lie in 0 ... {vocab - 1}. Do "
                f"they come from this model's tokenizer?"
            )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One batch: its prompts, which of them each group continues, the rows of each group."""

    prompts: list[int]
    groups: list[int]
    rows: list[list[int]]


def _every_row(count: int, samples: int) -> _Plan:
    return _Plan([row // samples for row in range(count)], list(range(count)), [[row] for row in range(count)])


def _plan(prompts: Sequence[np.ndarray], samples: int, batch: int) -> list[_Plan]:
    """Batches of at most ``batch`` rows. All groups have one size, which divides the number of rows of every prompt."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(prompts):
        rows.setdefault(tuple(map(int, ids)), []).extend(range(i * samples, (i + 1) * samples))
    common = math.gcd(*map(len, rows.values()))
    size = max((d for d in range(1, min(common, batch) + 1) if common % d == 0), default=1)
    groups = [
        (members[0] // samples, members[i : i + size])
        for _, members in sorted(rows.items(), key=lambda item: len(item[0]))
        for i in range(0, len(members), size)
    ]
    plans = []
    for i in range(0, len(groups), batch // size):
        held = groups[i : i + batch // size]
        distinct = list(dict.fromkeys(prompt for prompt, _ in held))
        plans.append(_Plan(distinct, [distinct.index(prompt) for prompt, _ in held], [group for _, group in held]))
    return plans


def _decode_batch(
    model: Model,
    prompts: Sequence[np.ndarray],
    plan: _Plan,
    sampling: Sampling,
    max_new_tokens: int,
    edits: Intervention | None,
    every: int | None,
) -> Iterator[Progress]:
    params, config, mesh = model.params, model.config, model.mesh
    tokens, mask = _pad_left([prompts[i] for i in plan.prompts])
    groups, rows = np.asarray(plan.groups, np.int32), np.asarray(plan.rows, np.int32)
    limit = np.minimum(config.max_positions - mask.sum(-1)[groups], max_new_tokens).repeat(rows.shape[1])
    most, kept = int(limit.max()), rows.size
    if mesh is not None and getattr(edits, "rows", None) is None:  # rows that end at once fill up the devices
        devices = mesh.shape.get("prompts", 1)
        spare = -len(groups) % (devices // math.gcd(devices, rows.shape[1]))
        groups, rows = np.pad(groups, (0, spare)), np.pad(rows, [(0, spare), (0, 0)])
        limit = np.pad(limit, (0, rows.size - kept))

    def seen(state: State) -> Progress:
        tokens, length, done = jax.device_get((state.tokens[:kept], state.length[:kept], state.done[:kept]))
        tokens = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, NO_TOKEN)
        return Progress(rows.ravel()[:kept], tokens, length, np.array(done))

    arrays = (shard_rows(mesh, a) for a in (tokens, mask, groups, rows.ravel(), limit.astype(np.int32)))
    prefix, state = start(params, config, *arrays, sampling, edits, slots=min(_FIRST_SLOTS, bucket(most)), mesh=mesh)
    progress = seen(state)
    while not progress.done.all():
        if every is not None:
            yield progress
            done = np.pad(progress.done, (0, rows.size - kept), constant_values=True)
            state = dataclasses.replace(state, done=shard_rows(mesh, done))
        goal = int(progress.length.max()) + (every or most)
        while not progress.done.all() and (length := int(progress.length.max())) < goal:
            if length == state.tokens.shape[1]:
                state = grow(state, slots=2 * length, mesh=mesh)
            state = decode(params, config, prefix, state, sampling, edits, np.int32(goal - length))
            progress = seen(state)
    yield progress


def _pad_left(prompts: Sequence[np.ndarray]) -> tuple[Int[np.ndarray, "P U"], Bool[np.ndarray, "P U"]]:
    """Tokens and mask, as long as the bucket of the longest prompt."""
    lengths = np.asarray([len(ids) for ids in prompts])
    width = bucket(int(lengths.max()))
    mask = np.arange(width) >= width - lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(prompts)
    return tokens, mask
