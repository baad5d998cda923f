"""What the relaxed searches (PEZ, GBDA, soft prompts) share: optimizers, projection onto tokens, losses of embeddings.

They move something continuous and are judged by discrete prompts alone: what they propose is scored as token ids by the
same code as the candidates of every other search. Letters: P slots, n samples per slot, S prompt length, D width,
A allowed tokens, O openings (distinct texts before the slot).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.log_probs import VOCABULARY_BLOCK
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import scale_embeddings, unembed
from jaxsteer.objectives import Objective
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.scoring import first_log_probs, run_slots

Arguments = tuple[tuple[str, Any], ...]
"""Keyword arguments that a frozen config can hold: ``(("b1", 0.8), ("weight_decay", 0.1))``."""


def make_optimizer(
    optimizer: str | optax.GradientTransformation, learning_rate: float, arguments: Arguments = ()
) -> optax.GradientTransformation:
    """The Optax optimizer of that name with these arguments, or ``optimizer`` itself if it is one already.

    Raises ``UserError`` for a name that Optax does not have and for arguments that it does not take.
    """
    if not isinstance(optimizer, str):
        return optimizer
    constructor: Callable[..., Any] | None = getattr(optax, optimizer, None) or getattr(optax.contrib, optimizer, None)
    try:
        made = constructor(learning_rate, **dict(arguments)) if callable(constructor) else None
    except TypeError as error:
        raise UserError(f"optimizer {optimizer!r} of Optax does not take {dict(arguments)}: {error}") from error
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"Optax has no optimizer {optimizer!r}: give a name such as adam, adamw, sgd, lion or rmsprop, or from "
            "Python any optax.GradientTransformation"
        )
    return made


def table_unit(params: Params) -> Float[Array, ""]:
    """Root mean square entry of the embedding table: the unit in which soft prompts move, so that a learning rate means
    the same for every model."""
    return jnp.sqrt(jnp.mean(jnp.square(params.embed.astype(jnp.float32))))


def allowed_at(task: Task) -> Bool[Array, "S A"]:
    """Which of the allowed tokens ``task.ids`` may stand at each position."""
    first = jnp.arange(task.length)[:, None] == 0
    return jnp.where(first, task.allowed_first[task.ids], True)


def nearest(params: Params, task: Task, soft: Float[Array, "P S D"]) -> Int[Array, "P S"]:
    """The allowed token whose embedding has the largest cosine with each soft one."""
    table = params.embed
    norm = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(table.astype(jnp.float32)), axis=-1)), 1e-12)

    def one(row: tuple[Array, Array]) -> Array:
        likeness = jnp.matmul(table, row[0].astype(table.dtype), preferred_element_type=jnp.float32) / norm
        usable = jnp.where(row[1] == 0, task.allowed_first, task.allowed)
        return jnp.argmax(jnp.where(usable, likeness, -jnp.inf)).astype(jnp.int32)

    population, length, _ = soft.shape
    rows = (soft.reshape(population * length, -1), jnp.tile(jnp.arange(length), population))
    at_once = max(1, VOCABULARY_BLOCK // len(table))
    return lax.map(one, rows, batch_size=min(at_once, population * length)).reshape(population, length)


def soft_target(params: Params, task: Task, objective: Objective, rows: Float[Array, "P S D"]) -> Float[Array, " P"]:
    """(P,) the objective with embedding rows in the slot."""
    return run_slots(params, task, objective, scale_embeddings(rows.astype(params.embed.dtype), task.config))[0]


def mixture_loss(
    params: Params, task: Task, objective: Objective, mixture: Float[Array, "n S A"], fluency: Float[Array, ""]
) -> Float[Array, ""]:
    """Mean over samples of ``J`` where every position holds a mixture of the allowed tokens.

    Its cross-entropy is that of the mixture: ``-sum_v mixture_v log P(v | mixtures before)`` per token.
    """
    table = params.embed[task.ids]
    rows = jnp.einsum("nsa,ad->nsd", mixture, table, preferred_element_type=jnp.float32)
    f, hidden = run_slots(params, task, objective, scale_embeddings(rows.astype(table.dtype), task.config))

    weight, openings = task.opening_weight, hidden.shape[0]

    @jax.checkpoint
    def one(row: tuple[Array, Array]) -> Array:
        log_probs = jax.nn.log_softmax(unembed(params, task.config, row[0]))[:, task.ids]  # (O, A)
        return jnp.sum(weight * (log_probs @ row[1]))

    samples, length, _ = mixture.shape
    total, scored = jnp.zeros((samples,)), length - 1
    if length > 1:
        predictors = jnp.moveaxis(hidden, 0, 2).reshape(samples * (length - 1), openings, -1)
        weights = mixture[:, 1:].reshape(samples * (length - 1), -1)
        at_once = max(1, VOCABULARY_BLOCK // (task.config.vocab_size * openings))
        picked = lax.map(one, (predictors, weights), batch_size=min(at_once, len(weights)))
        total = picked.reshape(samples, length - 1).sum(-1)
    if task.scores_first:
        first = jnp.einsum("o,oa->a", weight, first_log_probs(params, task)[:, task.ids])
        total, scored = total + mixture[:, 0] @ first, scored + 1
    return jnp.mean(-fluency * total / max(scored, 1) - f)
