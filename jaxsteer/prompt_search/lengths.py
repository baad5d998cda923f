"""Prompts of different lengths in one program: children by inserting, deleting and exchanging tokens.

The operators of FLRT (arXiv 2407.17447) on one token of a prompt, which is drawn uniformly: exchange it, delete it, or
insert a token before it. Prompts stand at the end of their S places, after ``PAD``. Letters: P parents, E children of
each, M = P * E, S places of a prompt.
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
"""Of the children, that are insertions where there is room, and as many deletions; the others are exchanges."""
INSERTIONS = 16
"""Tokens drawn from the model's own distribution for every place, as published."""


class Edits(NamedTuple):
    """What becomes of the children: the token ``at`` which they are changed, and one of the three operators."""

    at: Int[Array, "P E"]
    kind: Int[Array, "P E"]


def draw_edits(key: Key[Array, ""], task: Task, parents: Int[Array, "P S"], children: int) -> Edits:
    """A uniform token and an operator for every child. The shortest prompts lose no token, the longest get none, and
    a first token goes only where the next may stand first; where it may not, the next goes.
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
    return Edits(at, kind)


def edited(parents: Int[Array, "P S"], edits: Edits, tokens: Int[Array, "P E"]) -> Int[Array, "M S"]:
    """The children, parent by parent; ``tokens`` are what is inserted or put in a token's place."""
    place = jnp.arange(parents.shape[1])
    at, kind, tokens = (a[..., None] for a in (*edits, tokens))
    own = parents[:, None]
    one_on = jnp.pad(parents[:, 1:], ((0, 0), (0, 1)))[:, None]
    one_back = jnp.pad(parents[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)[:, None]
    swapped = jnp.where(place == at, tokens, own)
    inserted = jnp.where(place < at - 1, one_on, jnp.where(place == at - 1, tokens, own))
    deleted = jnp.where(place <= at, one_back, own)
    children = jnp.where(kind == SWAP, swapped, jnp.where(kind == INSERT, inserted, deleted))
    return children.reshape(-1, parents.shape[1])


def same_length(task: Task, what: str) -> None:
    """Refuse a task whose prompts vary in length, for ``what`` cannot."""
    if task.varies:
        raise UserError(
            f"{what} keeps a prompt's length, but the task asks for {task.least} to {task.length} tokens: give one "
            "length, or search with epo or mutation (one token at a time)"
        )
