"""Which tokens a gradient proposes for the places of a prompt, and which the model itself would put there.

Letters: P parents, S prompt length, O openings, D width, V vocabulary, k proposals per position, n insertions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxsteer.models.log_probs import VOCABULARY_BLOCK
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import unembed
from jaxsteer.objectives import Objective
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.scoring import pads_of, slot_loss
from jaxsteer.prompts.slots import PAD


def proposals(
    params: Params,
    task: Task,
    objective: Objective,
    ids: Int[Array, "P S"],
    fluency: Float[Array, " P"],
    top_k: int,
) -> Int[Array, "P S k"]:
    """For every parent and position, the ``top_k`` allowed tokens that most reduce ``J = -f + fluency * x`` to first
    order, the current token excluded.

    The gradient is that of the token's one-hot on both of its paths: as input, through the embedding
    (Gemma's multiplier included), and as label of the cross-entropy. It is taken with respect to embeddings and
    multiplied by the table in chunks of rows: no one-hot and no (P, S, V) array is made. At most ``task.batch`` parents
    are differentiated at a time.
    """
    return _proposed(params, task, objective, ids, fluency, top_k)[0]


def proposals_and_insertions(
    params: Params,
    task: Task,
    objective: Objective,
    ids: Int[Array, "P S"],
    fluency: Float[Array, " P"],
    top_k: int,
    key: Key[Array, ""],
    insertions: int,
) -> tuple[Int[Array, "P S k"], Int[Array, "P S n"]]:
    """``proposals``, and for every position n allowed tokens to insert before it: drawn without replacement from the
    model's own distribution there, averaged over contexts, as in FLRT (arXiv 2407.17447).
    """
    keys = jax.random.split(key, ids.shape)
    swaps, inserts = _proposed(params, task, objective, ids, fluency, top_k, keys, insertions)
    return swaps, inserts


def _proposed(
    params: Params,
    task: Task,
    objective: Objective,
    ids: Int[Array, "P S"],
    fluency: Float[Array, " P"],
    top_k: int,
    keys: Key[Array, "P S"] | None = None,
    insertions: int = 0,
) -> tuple[Int[Array, "P S _"], ...]:
    config = task.config
    parents, length = ids.shape
    grad, predictors = _differentiated(params, task, objective, ids, fluency)
    openings = predictors.shape[2]
    pads = pads_of(task, ids)
    first = jnp.zeros((parents, 1), jnp.int32) if pads is None else pads[:, None]
    position = jnp.arange(length) - first
    scored = length - first - (not task.scores_first)
    label_weight = jnp.broadcast_to(fluency[:, None] / jnp.maximum(scored, 1), (parents, length))
    if not task.scores_first:
        label_weight = jnp.where(position == 0, 0.0, label_weight)

    def best_tokens(row: tuple[Array, ...]) -> tuple[Array, ...]:
        g, predictor, weight, current, position, *key = row
        change = jnp.matmul(params.embed, g, preferred_element_type=jnp.float32)
        log_probs = jax.nn.log_softmax(unembed(params, config, predictor))
        change = change - weight * jnp.einsum("o,ov->v", task.opening_weight, log_probs)
        usable = jnp.where(position == 0, task.allowed_first, task.allowed)
        others = usable & (jnp.arange(config.vocab_size) != current)
        swaps = lax.top_k(jnp.where(others, -change, -jnp.inf), top_k)[1]
        if not key:
            return (swaps,)
        drawn = jax.nn.logsumexp(log_probs, axis=0, b=task.opening_weight[:, None])
        drawn = drawn + jax.random.gumbel(key[0], drawn.shape)
        return swaps, lax.top_k(jnp.where(usable, drawn, -jnp.inf), insertions)[1]

    arrays = (grad, predictors, label_weight, ids, position, *([] if keys is None else [keys]))
    flat = jax.tree.map(lambda a: a.reshape(parents * length, *a.shape[2:]), arrays)
    rows = max(1, VOCABULARY_BLOCK // (config.vocab_size * (openings + 1)))
    found = lax.map(best_tokens, flat, batch_size=min(rows, parents * length))
    return tuple(tokens.reshape(parents, length, -1) for tokens in found)


def _differentiated(
    params: Params, task: Task, objective: Objective, ids: Int[Array, "P S"], fluency: Float[Array, " P"]
) -> tuple[Float[Array, "P S D"], Float[Array, "P S O D"]]:
    """The gradient of J with respect to the parents' embedding rows, and the stream that predicts each token."""
    gradient = jax.grad(slot_loss, argnums=3, has_aux=True)

    def some(batch: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, weights = batch
        grad, hidden = gradient(params, task, objective, params.embed[rows], rows, weights)
        openings, parents, _, d = hidden.shape
        start = jnp.broadcast_to(task.last_hidden[:, None, None], (openings, parents, 1, d))
        predictors = jnp.concatenate([start, hidden], axis=2)
        if task.varies:
            begins = jnp.arange(task.length) == jnp.sum(rows == PAD, axis=-1, keepdims=True)
            predictors = jnp.where(begins[:, :, None], start, predictors)
        return grad, jnp.moveaxis(predictors, 0, 2)

    parents = len(ids)
    chunks = -(-parents // task.batch)
    if chunks == 1:
        return some((ids, fluency))
    size = -(-parents // chunks)
    tiled = jax.tree.map(
        lambda a: jnp.pad(a, ((0, chunks * size - parents), *[(0, 0)] * (a.ndim - 1)), mode="edge").reshape(
            chunks, size, *a.shape[1:]
        ),
        (ids, fluency),
    )
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:parents], lax.map(some, tiled))
