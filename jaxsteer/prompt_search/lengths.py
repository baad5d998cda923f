"""Prompts of different lengths in one program: children by inserting, deleting and exchanging tokens.

The operators of FLRT (arXiv 2407.17447) on one token of a prompt, which is drawn uniformly: exchange it, delete it, or
insert a token before it. Prompts stand at the end of their S columns, after ``PAD``. Letters: P parents, E children of
each, M = P * E, S columns of a prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxsteer.errors import UserError
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompts.slots import PAD

SWAP, INSERT, DELETE = range(3)
SHARE = 0.25
"""Share of the children that are insertions where there is room, and as many deletions; the others are exchanges."""
INSERTIONS = 16
"""Tokens drawn from the model's own distribution for every position, as published."""


class Mutations(NamedTuple):
    """What becomes of each child: the position of the token that changes, and one of the three operators."""

    at: Int[Array, "P E"]
    kind: Int[Array, "P E"]


def draw_mutations(key: Key[Array, ""], task: Task, parents: Int[Array, "P S"], children: int) -> Mutations:
    """A uniform position and an operator for every child. The shortest prompts lose no token, the longest gain none,
    and the first token is deleted only if the next may stand first; otherwise the next is deleted.
    """
    where, what = jax.random.split(key)
    shape, pads = (len(parents), children), (parents == PAD).sum(-1)[:, None]
    at = pads + jax.random.randint(where, shape, 0, task.length - pads)
    u = jax.random.uniform(what, shape)
    room = (u < SHARE) & (pads > 0)
    spare = (u >= 1 - SHARE) & (task.length - pads > task.least)
    kind = jnp.where(room, INSERT, jnp.where(spare, DELETE, SWAP))
    after = jnp.take_along_axis(parents, jnp.minimum(at + 1, task.length - 1), axis=1)
    at = jnp.where((kind == DELETE) & (at == pads) & ~task.allowed_first[after], at + 1, at)
    return Mutations(at, kind)


def apply_mutations(parents: Int[Array, "P S"], mutations: Mutations, tokens: Int[Array, "P E"]) -> Int[Array, "M S"]:
    """The children, parent by parent. ``tokens`` are those that are inserted or exchanged for the parent's."""
    column = jnp.arange(parents.shape[1])
    at, kind, tokens = (a[..., None] for a in (*mutations, tokens))
    own = parents[:, None]
    next_ = jnp.pad(parents[:, 1:], ((0, 0), (0, 1)))[:, None]
    last = jnp.pad(parents[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)[:, None]
    swapped = jnp.where(column == at, tokens, own)
    inserted = jnp.where(column < at - 1, next_, jnp.where(column == at - 1, tokens, own))
    deleted = jnp.where(column <= at, last, own)
    children = jnp.where(kind == SWAP, swapped, jnp.where(kind == INSERT, inserted, deleted))
    return children.reshape(-1, parents.shape[1])


def require_one_length(task: Task, what: str) -> None:
    """Raise ``UserError`` for a task whose prompts vary in length, which ``what`` cannot do."""
    if task.varies:
        raise UserError(
            f"{what} keeps a prompt's length, but the task asks for {task.least} to {task.length} tokens: give one "
            "length, or search with epo or mutation (one token at a time)"
        )
