"""Scores of children that agree with a parent up to some position: what stands before it is the parent's.

Letters: C contexts, P parents, E children of each, Q pairs of children, S prompt length, A tokens after the slot,
K tokens of a parent that are looked back on, W tokens of a packed row, N of those that predict a slot token, V
vocabulary, D width.

Where a child may differ from its parent is fixed beforehand: child e of every parent agrees with it before
``starts(E, S)[e]``. Positions drawn by ``stratified`` keep to that, and all are equally likely. The parents run once,
and their keys and values are looked back on; a child's own tokens are those from its start on. Early starts leave
long children and late ones short, so two of them, whose lengths add up to the same sum in all pairs, share a row and
do not see each other: rows are dense, and one program of one shape scores all children. With S = 4, two tokens t
behind the slot, and four children a, b, c and d that start at 0, 1, 2 and 3 (a dot is a token of the parent):

    child 0   a a a a t t          row 0   a a a a t t d t t          of pair (0, 3)
    child 1   . b b b t t          side    0 0 0 0 0 0 1 1 1          which child of the pair
    child 2   . . c c t t          index   0 1 2 3 4 5 3 4 5          which token of that child
    child 3   . . . d t t          row 1   b b b t t c c t t          of pair (1, 2)

Exact: what is computed is what ``score`` computes, in other shapes, so that sums may round differently (a few units in
the last place).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsteer.models.attention import Shared
from jaxsteer.models.layers import run_and_cache, run_layers
from jaxsteer.models.log_probs import label_log_probs
from jaxsteer.models.params import Params
from jaxsteer.models.sites import KINDS, parse_site
from jaxsteer.models.transformer import Context, embed_tokens, make_context, placed
from jaxsteer.objectives import Objective
from jaxsteer.objectives.reads import Layout, Target, read
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.scoring import first_log_probs, score

LEAST_SAVING = 0.1
"""Share of tokens that must be saved: less does not pay for the parents' pass and the longer rows."""


def starts(children: int, length: int) -> tuple[int, ...]:
    """The first position at which each of a parent's children may differ from it, in ascending order."""
    return tuple(e * length // children for e in range(children))


def stratified(key: Key[Array, ""], parents: int, children: int, length: int) -> Int[Array, "P E"]:
    """A position to mutate for every child, none before its ``starts``; over children, all are equally likely.

    Child e draws from the e-th of E equal parts of the prompt; a part may straddle positions.
    """
    drawn = jax.random.randint(key, (parents, children), 0, length)
    return (jnp.arange(children) * length + drawn) // children


def shares(task: Task, positions: tuple[int, ...]) -> bool:
    """Whether ``score_children`` shares work at these positions, or falls back on ``score``."""
    sites = [parse_site(name, task.config.n_layers) for name in task.needs.sites]
    inside = any(KINDS[site.kind].over_keys for site in sites)
    if task.slot_once or task.varies or not task.reads_last or task.needs.spans or inside or not any(positions):
        return False
    whole = task.length + task.after.shape[1]
    width = _pack(positions, task.length, task.after.shape[1]).side.shape[1]
    return width / 2 + max(positions) / len(positions) < (1 - LEAST_SAVING) * whole


def score_children(
    params: Params,
    task: Task,
    objective: Objective,
    parents: Int[Array, "P S"],
    children: Int[Array, "M S"],
    positions: tuple[int, ...],
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Objective f and cross-entropy x, as ``score`` gives them, of E children of every parent (parent-major rows).

    Child e of every parent agrees with it before ``positions[e]``; it may differ anywhere from there on. Where
    nothing is gained, or where the objective reads what only the parents run (tokens before the slot's last, spans,
    attention patterns), this is ``score``.
    """
    if not shares(task, positions):
        return score(params, task, objective, children)
    packing = _pack(positions, task.length, task.after.shape[1])
    brood = children.reshape(len(parents), len(positions), task.length)
    family, head = _run_parents(params, task, parents, brood, positions)
    p, q = len(parents), len(packing.child)
    some_p = _divisor(p, max(1, task.batch // len(positions)))
    some_q = q if task.batch >= len(positions) else _divisor(q, max(1, task.batch // 2))

    def one_chunk(at: tuple[Array, Array]) -> tuple[Array, Array]:
        pairs = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(jnp.asarray(a), at[1] * some_q, some_q), packing)
        near = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, at[0] * some_p, some_p, 2), family)
        ids = lax.dynamic_slice_in_dim(brood, at[0] * some_p, some_p)[:, pairs.child]
        return _score_pairs(params, task, objective, near, ids, pairs)

    grid = np.indices((p // some_p, q // some_q)).reshape(2, -1)
    f, own = lax.map(one_chunk, (jnp.asarray(grid[0]), jnp.asarray(grid[1])))
    order = np.unique(packing.child, return_index=True)[1]  # a child without a partner stands there twice

    def as_children(values: Array) -> Float[Array, "P E"]:
        tiled = values.reshape(p // some_p, q // some_q, some_p, some_q, 2)
        return jnp.swapaxes(tiled, 1, 2).reshape(p, 2 * q)[:, order]

    scored = task.length if task.scores_first else task.length - 1
    x = -(head + as_children(own)) / scored
    return as_children(f).reshape(-1), x.reshape(-1)


@struct.dataclass
class _Packing:
    """Where the tokens of pairs of children stand in their rows."""

    child: Int[Array, "Q 2"]
    shift: Int[Array, "Q 2"]
    """Column of a child's own token i, less i (counted from the slot's first token)."""
    side: Int[Array, "Q W"]
    """Which of the two children a token belongs to; 2 for padding."""
    index: Int[Array, "Q W"]
    """Which of its child's tokens it is."""
    start: Int[Array, "Q W"]
    """From where on its child has tokens of its own."""
    predictor: Int[Array, "Q N"]
    """Columns of the tokens that predict a slot token of their child, and padding behind them."""
    predictor_side: Int[Array, "Q N"]
    """The ``side`` of these."""


def _pack(positions: tuple[int, ...], length: int, tail: int) -> _Packing:
    """Pair the child with the earliest start with the one with the latest, and so on, one behind the other."""
    order = np.argsort(positions, kind="stable")
    pairs = -(-len(order) // 2)  # of an odd number the middle one is paired with itself
    child = np.stack([order[:pairs], order[::-1][:pairs]], axis=1)
    start = np.asarray(positions)[child]
    count = length + tail - start
    column = np.arange(count.sum(1).max())
    side = (column >= count[:, :1]).astype(int) + (column >= count.sum(1, keepdims=True))
    shift = np.stack([-start[:, 0], count[:, 0] - start[:, 1]], axis=1)

    def of_child(table: np.ndarray) -> np.ndarray:
        """For every token the entry of its child."""
        return np.take_along_axis(table, np.minimum(side, 1), axis=1)

    index = np.where(side < 2, column - of_child(shift), 0)
    predicts = (side < 2) & (index < length - 1)
    predictor = np.argsort(~predicts, axis=1, kind="stable")[:, : predicts.sum(1).max()]
    predictor_side = np.take_along_axis(np.where(predicts, side, 2), predictor, axis=1)
    tables: Any = (child, shift, side, index, of_child(start), predictor, predictor_side)
    return _Packing(*(table.astype(np.int32) for table in tables))


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


@struct.dataclass
class _Family:
    """Keys and values of the parents' first K tokens in every context."""

    k: Float[Array, "L C P K_ H K"]
    v: Float[Array, "L C P K_ H K"]


def _run_parents(
    params: Params,
    task: Task,
    parents: Int[Array, "P S"],
    brood: Int[Array, "P E S"],
    positions: tuple[int, ...],
) -> tuple[_Family, Float[Array, "P E"]]:
    """What children look back on, and the log-probability of their tokens up to and with the one at their start,
    summed, and averaged over contexts: the last predictor of these is the parent's.
    """
    config, (p, _), contexts, known = task.config, parents.shape, task.contexts, max(positions)
    where = jnp.repeat(task.prefix.length, p)[:, None] + jnp.arange(known)
    x = placed(params, jnp.tile(embed_tokens(params, config, parents[:, :known]), (contexts, 1, 1)), where)
    context = make_context(config, where, None, task.prefix)
    hidden, kv = run_and_cache(params, config, x, context, config.n_layers)
    k, v = (a.reshape(a.shape[0], contexts, p, *a.shape[2:]) for a in kv)
    # What is predicted at positions 1 to K: the parent's token there, and those of the children that start there,
    # filled up with child 0 to as many everywhere.
    starting = [[e for e, start in enumerate(positions) if start == j] for j in range(1, known + 1)]
    most = max(map(len, starting))
    table = np.asarray([row + [0] * (most - len(row)) for row in starting], np.int32).reshape(known, most)
    at = np.arange(1, known + 1)
    labels = jnp.concatenate([parents[:, 1 : known + 1, None], brood[:, table, at[:, None]]], axis=2)
    every = jnp.broadcast_to(labels, (contexts, *labels.shape)).reshape(contexts * p * known, -1)
    later = label_log_probs(params, config, hidden.reshape(contexts * p * known, -1), every)
    later = later.reshape(contexts, p, known, 1 + most)
    first = first_log_probs(params, task) if task.scores_first else jnp.zeros((contexts, config.vocab_size))
    before = jnp.cumsum(jnp.concatenate([first[:, parents[:, :1]], later[..., 0]], axis=2), axis=2)
    # A child that starts at 0 has its own first token's; another the parent's up to its start, and its own there.
    start = np.asarray(positions)
    last = np.maximum(start - 1, 0)
    rank = np.asarray([starting[s - 1].index(e) if s else 0 for e, s in enumerate(positions)])
    total = jnp.where(start == 0, first[:, brood[:, :, 0]], before[:, :, last] + later[:, :, last, 1 + rank])
    return _Family(k=k, v=v), jnp.einsum("c,cpe->pe", task.weight, total)


def _score_pairs(
    params: Params, task: Task, objective: Objective, family: _Family, ids: Int[Array, "P Q 2 S"], packing: _Packing
) -> tuple[Float[Array, "P Q 2"], Float[Array, "P Q 2"]]:
    """F of both children of every pair, and the summed log-probability of their slot tokens after their start."""
    config, contexts, (p, q, *_) = task.config, task.contexts, ids.shape
    groups = (contexts, p, q)
    x = embed_tokens(params, config, _own_tokens(task, ids, jnp.minimum(packing.side, 1), packing.index))
    context = _pair_context(task, family, packing.side, packing.index, packing.start)
    x = placed(params, x, context.positions)

    def of_rows(values: Array, *shape: int) -> Array:
        return jnp.broadcast_to(values, (*groups, *shape)).reshape(-1, *shape)

    layout = Layout(
        read=of_rows(task.read_index[:, None, None, None] + packing.shift, 2),
        context=jnp.repeat(jnp.arange(contexts), p * q * 2),
        spans={},
        keys={},
        target=task.target
        and Target(
            ids=jnp.repeat(task.target.ids, p * q * 2, axis=0),
            mask=jnp.repeat(task.target.mask, p * q * 2, axis=0),
            start=of_rows(task.target.start[:, None, None, None] + packing.shift, 2),
        ),
    )
    reads, x, depth = read(params, config, task.needs, x, context, layout)
    f = task.combine(objective(reads).reshape(contexts, -1), task.weight)
    # Above the deepest read only the tokens that predict another slot token matter.
    n = packing.predictor.shape[1]
    index, start = (jnp.take_along_axis(a, packing.predictor, axis=1) for a in (packing.index, packing.start))
    x = x.reshape(contexts * p, q, -1, config.d_model)[:, jnp.arange(q)[:, None], packing.predictor]
    context = _pair_context(task, family, packing.predictor_side, index, start)
    x = run_layers(params, config, x.reshape(-1, n, config.d_model), context, depth, config.n_layers)
    labels = ids[:, jnp.arange(q)[:, None], jnp.minimum(packing.predictor_side, 1), index + 1]
    log_probs = label_log_probs(params, config, x.reshape(-1, config.d_model), of_rows(labels, n).reshape(-1))
    mine = packing.predictor_side[..., None] == jnp.arange(2)
    own = jnp.einsum("c,cpqn,qnm->pqm", task.weight, log_probs.reshape(*groups, n), mine.astype(jnp.float32))
    return f.reshape(p, q, 2), own


def _own_tokens(
    task: Task, ids: Int[Array, "P Q 2 S"], side: Int[Array, "Q W"], index: Int[Array, "Q W"]
) -> Int[Array, "CPQ W"]:
    p, q, _, length = ids.shape
    slot = ids[:, jnp.arange(q)[:, None], side, jnp.minimum(index, length - 1)]
    shape = (task.contexts, p, q, index.shape[1])
    if not task.after.shape[1]:
        return jnp.broadcast_to(slot, shape).reshape(-1, shape[-1])
    tail = task.after[:, jnp.maximum(index - length, 0)]
    return jnp.where(index < length, slot, tail[:, None]).reshape(-1, shape[-1])


def _pair_context(
    task: Task, family: _Family, side: Int[Array, "Q W"], index: Int[Array, "Q W"], start: Int[Array, "Q W"]
) -> Context:
    """The context of rows that hold two children each: of its own row a token sees its child's tokens up to itself,
    and of the parent what stands before its child's start.
    """
    config, (layers, contexts, p, *_, known) = task.config, family.k.shape
    q, w = side.shape
    lengths = task.prefix.length[:, None, None, None]
    positions = jnp.broadcast_to(lengths + index, (contexts, p, q, w)).reshape(-1, w)
    shared = Shared(
        k=family.k.reshape(layers, contexts * p, *family.k.shape[3:]),
        v=family.v.reshape(layers, contexts * p, *family.v.shape[3:]),
        mask=(jnp.arange(known) < start[..., None])[None],
        positions=jnp.repeat(task.prefix.length, p)[:, None] + jnp.arange(known),
    )
    same = side[:, :, None] == side[:, None, :]
    sees = same & (jnp.arange(w)[:, None] >= jnp.arange(w))
    seen = _valid(task, index)[:, None, :, None, :]
    mask = jnp.broadcast_to(sees & seen, (contexts, p, q, w, w)).reshape(-1, w, w)
    context = make_context(config, positions, None, task.prefix, shared)
    return dataclasses.replace(context, self_mask=mask)


def _valid(task: Task, index: Int[Array, "Q W"]) -> Bool[Array, "C Q W"]:
    """Where rows hold a token of their context and not padding of its tail."""
    if not task.after.shape[1]:
        return jnp.ones((task.contexts, *index.shape), bool)
    return (index < task.length) | task.after_mask[:, jnp.maximum(index - task.length, 0)]
