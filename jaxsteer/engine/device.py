"""What the engine runs on the device: pieces of prompts, steps of all rows, and rows that come and go.

Every row has its own stretch of the cache, from its first token on, so that its numbers depend neither on the rows
beside it nor on when it came. All sizes are those of the arrays: a few widths B and rooms M, and pieces of T tokens.

Letters: B rows, T tokens of a piece of a prompt, D width, V vocabulary, L layers, K key/value heads, H head width,
M room of a row in tokens, G selectors of a row, N tokens of one call, k most likely tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.engine.table import Table, empty, tap_of_table, touched
from jaxsteer.models.attention import Segment
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.decoding import CACHE_SPEC, choose_tokens, run_tokens
from jaxsteer.models.layers import CACHE, scan_blocks
from jaxsteer.models.params import Params
from jaxsteer.models.roles import ASSISTANT, UNKNOWN, Roles
from jaxsteer.models.sampling import Sampling, of_rows, plain_sampling
from jaxsteer.models.sharding import place
from jaxsteer.models.taps import Where
from jaxsteer.models.transformer import embed, make_context, unembed

TOPS = 20
"""k: most likely tokens that can be asked for."""
PER_CALL = 16
"""N: tokens of a row that one call can make."""
STOPS = 16
"""Stop tokens of a row."""


@struct.dataclass
class Room:
    """Keys and values of each row's own tokens; the token at position p lies at p. A ``Past``."""

    k: Float[Array, "L B K H M"]
    v: Float[Array, "L B K H M"]
    held: Int[Array, " B"]
    """Tokens that a row has in it."""

    def segment(self, layer: Int[Array, ""], positions: Int[Array, "B T"], window: Int[Array, ""] | None) -> Segment:
        """See ``models.attention.Past``."""
        at = jnp.arange(self.k.shape[-1])
        allowed = (at < self.held[:, None])[:, None, None]
        if window is not None:
            allowed = allowed & (positions[:, None, :, None] - at < window)
        k, v = (lax.dynamic_index_in_dim(a, layer, 0, keepdims=False) for a in (self.k, self.v))
        return Segment(k, v, allowed)


@struct.dataclass
class Rows:
    """B rows while they are decoded. Donated from call to call."""

    room: Room
    token: Int[Array, " B"]
    """The next one that is run."""
    role: Int[Array, " B"]
    """Of that token, as in ``Roles``; so are the next two."""
    turn: Int[Array, " B"]
    leads: Bool[Array, " B"]
    turns: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    made: Int[Array, " B"]
    """Tokens decoded so far."""
    limit: Int[Array, " B"]
    """Tokens that a row may decode."""
    done: Bool[Array, " B"]
    tops: Int[Array, " B"]
    """Most likely tokens that are wanted beside each; -1: not even its log-probability."""
    sampling: Sampling
    table: Table


@struct.dataclass
class Scores:
    """Log-probabilities (natural, float32) of tokens, and the most likely ones in their place."""

    log_prob: Float[Array | np.ndarray, "B N"]
    top_ids: Int[Array | np.ndarray, "B N k"]
    top_log_probs: Float[Array | np.ndarray, "B N k"]


@struct.dataclass
class Made:
    """What one call decoded."""

    tokens: Int[Array, "B N"]
    """``NOT_FINITE`` where logits were NaN or infinite."""
    count: Int[Array, " B"]
    """Tokens of each row."""
    done: Bool[Array, " B"]
    scores: Scores


@partial(jax.jit, static_argnames=("config", "rows", "slots", "vocab", "dtype", "mesh"))
def blank(config: ModelConfig, *, rows: int, slots: int, vocab: int, dtype: Any, mesh: Mesh | None = None) -> Rows:
    """A batch without any row in it, with room for ``slots`` tokens of each."""
    zeros = partial(jnp.zeros, rows, jnp.int32)
    k, v = (jnp.zeros((config.n_layers, rows, config.n_kv_heads, config.d_head, slots), dtype) for _ in range(2))
    sampling = of_rows(plain_sampling(vocab), zeros())
    return Rows(
        room=Room(k=_laid_out(k, mesh), v=_laid_out(v, mesh), held=zeros()),
        token=zeros(),
        role=zeros(),
        turn=zeros(),
        leads=jnp.zeros(rows, bool),
        turns=zeros(),
        prompt_length=zeros(),
        made=zeros(),
        limit=zeros(),
        done=jnp.ones(rows, bool),
        tops=zeros() - 1,
        sampling=dataclasses.replace(sampling, stop=jnp.full((rows, STOPS), -1, jnp.int32)),
        table=_empty_on_device(config, rows),
    )


def _empty_on_device(config: ModelConfig, rows: int) -> Table:
    one = empty(config, 1)
    return jax.tree.map(lambda a: jnp.full((rows, *a.shape[1:]), a.ravel()[0], a.dtype), one)


# Prompts


@partial(jax.jit, static_argnames="config", donate_argnames="room")
def extend(
    params: Params,
    config: ModelConfig,
    room: Room,
    tokens: Int[Array, "1 T"],
    count: Int[Array, ""],
    mask: Bool[Array, "1 G T"],
    table: Table,
) -> tuple[Room, Float[Array, "1 T D"]]:
    """The room of one row with the first ``count`` of these tokens behind those it has, and their stream."""
    steps = jnp.arange(tokens.shape[1])[None]
    positions = room.held[:, None] + steps
    context = make_context(config, positions, steps < count, room)
    tap = tap_of_table(table, mask)
    x = embed(params, config, tokens, positions, tap)
    x, [(k, v)] = scan_blocks(params, config, x, context, 0, config.n_layers, tap=tap, keep=[CACHE], remat=False)
    write = partial(lax.dynamic_update_slice_in_dim, start_index=room.held[0], axis=4)
    return Room(k=write(room.k, k), v=write(room.v, v), held=room.held + count), x


@partial(jax.jit, static_argnames="config")
def score(
    params: Params, config: ModelConfig, x: Float[Array, "1 T D"], labels: Int[Array, "1 T"]
) -> tuple[Scores, Bool[Array, ""]]:
    """How likely each label is after each token, and whether all logits are finite."""
    logits = unembed(params, config, x[0])
    return jax.tree.map(lambda a: a[None], _scores(logits, labels[0])), jnp.isfinite(logits).all()


def _scores(logits: Float[Array, "n V"], labels: Int[Array, " n"]) -> Scores:
    """One score per row of logits: arrays without the axis of calls."""
    log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, ids = lax.top_k(log_probs, min(TOPS, logits.shape[-1]))
    own = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return Scores(log_prob=own, top_ids=ids.astype(jnp.int32), top_log_probs=top)


@jax.jit
def masks(table: Table, where: Where) -> Bool[Array, "1 G M"]:
    """Which tokens of a prompt the selectors of its row select."""
    return touched(table, where)


@partial(jax.jit, donate_argnames="room")
def lay(room: Room, piece: tuple[Array, Array]) -> Room:
    """The room of one row with a piece of a prompt that was kept behind what it has."""
    write = partial(lax.dynamic_update_slice_in_dim, start_index=room.held[0], axis=4)
    return Room(k=write(room.k, piece[0]), v=write(room.v, piece[1]), held=room.held + piece[0].shape[-1])


@partial(jax.jit, static_argnames="size")
def cut(room: Room, start: Int[Array, ""], *, size: int) -> tuple[Array, Array]:
    """Keys and values of a piece of one row's prompt."""
    k, v = (lax.dynamic_slice_in_dim(a, start, size, axis=4) for a in (room.k, room.v))
    return k, v


@partial(jax.jit, static_argnames=("config", "slots", "dtype"))
def empty_room(config: ModelConfig, *, slots: int, dtype: Any) -> Room:
    """Room for one row."""
    shape = (config.n_layers, 1, config.n_kv_heads, config.d_head, slots)
    return Room(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), held=jnp.zeros(1, jnp.int32))


# Rows


@partial(jax.jit, static_argnames="mesh", donate_argnames="rows")
def put(rows: Rows, one: Rows, at: Int[Array, ""], mesh: Mesh | None = None) -> Rows:
    """The batch with one row in place ``at``."""

    def write(whole: Array, part: Array) -> Array:
        if whole.ndim == 5:
            return _laid_out(lax.dynamic_update_slice_in_dim(whole, part, at, axis=1), mesh)
        return whole.at[at].set(part[0])

    return jax.tree.map(write, rows, one)


@jax.jit
def take(rows: Rows, at: Int[Array, ""]) -> Rows:
    """One row of the batch."""
    room = Room(
        k=lax.dynamic_slice_in_dim(rows.room.k, at, 1, axis=1),
        v=lax.dynamic_slice_in_dim(rows.room.v, at, 1, axis=1),
        held=rows.room.held[at][None],
    )
    none: Any = None
    others = dataclasses.replace(rows, room=none)
    return dataclasses.replace(jax.tree.map(lambda a: a[at][None], others), room=room)


@partial(jax.jit, static_argnames="slots")
def fit(room: Room, *, slots: int) -> Room:
    """The room with other slots behind its tokens."""
    own = room.k.shape[-1]
    size = lambda a: jnp.pad(a, [(0, 0)] * 4 + [(0, max(slots - own, 0))])[..., :slots]  # noqa: E731
    return dataclasses.replace(room, k=size(room.k), v=size(room.v))


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="rows")
def advance(
    params: Params,
    config: ModelConfig,
    rows: Rows,
    alive: Bool[Array, " B"],
    steps: Int[Array, ""],
    mesh: Mesh | None = None,
) -> tuple[Rows, Made]:
    """Up to ``steps`` (at most N) tokens more for every row that is ``alive`` and not done; ends where none is left."""
    b = len(rows.token)
    rows = dataclasses.replace(rows, done=rows.done | ~alive)
    k = min(TOPS, config.vocab_size)
    made = Made(
        tokens=jnp.zeros((b, PER_CALL), jnp.int32),
        count=jnp.zeros(b, jnp.int32),
        done=rows.done,
        scores=Scores(
            log_prob=jnp.zeros((b, PER_CALL)),
            top_ids=jnp.zeros((b, PER_CALL, k), jnp.int32),
            top_log_probs=jnp.zeros((b, PER_CALL, k)),
        ),
    )

    def more(carry: tuple[Array, Rows, Made]) -> Array:
        step, rows, _ = carry
        return (step < jnp.minimum(steps, PER_CALL)) & ~rows.done.all()

    def one(carry: tuple[Array, Rows, Made]) -> tuple[Array, Rows, Made]:
        step, rows, made = carry
        going = ~rows.done
        rows, token, scores = _step(params, config, rows, mesh)
        write = lambda a, new: a.at[:, step].set(new)  # noqa: E731
        return (
            step + 1,
            rows,
            Made(
                tokens=write(made.tokens, token),
                count=made.count + going,
                done=rows.done,
                scores=jax.tree.map(write, made.scores, scores),
            ),
        )

    _, rows, made = lax.while_loop(more, one, (jnp.int32(0), rows, made))
    return rows, made


def _step(params: Params, config: ModelConfig, rows: Rows, mesh: Mesh | None) -> tuple[Rows, Int[Array, " B"], Scores]:
    """Every row one token further: what it decoded, and its scores where any row wants them."""
    room, b = rows.room, len(rows.token)
    positions = room.held[:, None]
    where = Where(
        tokens=rows.token[:, None],
        positions=positions,
        valid=jnp.ones((b, 1), bool),
        prompt_length=rows.prompt_length,
        roles=Roles(role=rows.role[:, None], turn=rows.turn[:, None], leads=rows.leads[:, None], turns=rows.turns),
    )
    tap = tap_of_table(rows.table, touched(rows.table, where))
    logits, (k, v) = run_tokens(params, config, where, tap, room)
    token, made, done = choose_tokens(logits, rows.sampling, rows.made, rows.limit, rows.done)

    wanted = (rows.tops >= 0) & ~rows.done
    shapes = jax.eval_shape(_scores, logits, token)
    none = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
    scores = lax.cond(wanted.any(), _scores, none, logits, token)

    def write(whole: Array, new: Array) -> Array:
        each = jnp.arange(b)
        whole = whole.at[:, each, :, :, room.held].set(jnp.moveaxis(new[..., 0], 1, 0), mode="drop")
        return _laid_out(whole, mesh)

    known = rows.turns > 0
    new = Rows(
        room=Room(k=write(room.k, k), v=write(room.v, v), held=room.held + ~rows.done),
        token=token,
        role=jnp.where(known, ASSISTANT, UNKNOWN).astype(jnp.int32),
        turn=rows.turns - 1,
        leads=jnp.ones(b, bool),
        turns=rows.turns,
        prompt_length=rows.prompt_length,
        made=made,
        limit=rows.limit,
        done=done,
        tops=rows.tops,
        sampling=rows.sampling,
        table=rows.table,
    )
    return new, token, scores


def _laid_out(cache: Float[Array, "L B K H M"], mesh: Mesh | None) -> Float[Array, "L B K H M"]:
    return cache if mesh is None else lax.with_sharding_constraint(cache, place(mesh, CACHE_SPEC, cache.shape))


def row_of(
    room: Room,
    *,
    token: int,
    role: int,
    turn: int,
    turns: int,
    prompt_length: int,
    limit: int,
    tops: int,
    sampling: Sampling,
    table: Table,
) -> Rows:
    """A row whose prompt has been run but for its last token.

    Many parameters: it is what a row is.
    """

    def number(n: int, dtype: Any = np.int32) -> Any:
        return np.asarray([n], dtype)

    return Rows(
        room=room,
        token=number(token),
        role=number(role),
        turn=number(turn),
        leads=number(True, bool),
        turns=number(turns),
        prompt_length=number(prompt_length),
        made=number(0),
        limit=number(limit),
        done=number(limit <= 0, bool),
        tops=number(tops),
        sampling=sampling,
        table=table,
    )
