"""The scores of prompts in the contexts of a task: the objective f (up) and the cross-entropy x (down).

Letters: C contexts, O openings (texts before the slot: C, or 1 where all contexts have the same), M candidates, S
prompt length, A tokens after the slot, T = S + A, D width, V vocabulary, P parents. Rows are context-major: row
c * M + m is candidate m in context c.

    f(p) = sum_c weight_c * objective(reads of c)         x(p) = sum_c weight_c * mean_j -log P(p_j | context, p_<j)

Both as in EPO (arXiv 2402.01702): every candidate meets the same contexts, and one function scores parents and
children. A ``Combination`` may replace f's mean over contexts by the worst of them or by a soft minimum.

Where prompts may differ in length (``Task.least`` < S), shorter ones begin with ``PAD``: a row's own tokens still stand
in one piece, nothing looks at the padding, and positions are counted without it.

What stands before the slot was run once, by ``make_task``. What stands after it is run for every candidate in every
context, and so is the slot; but where the texts before it are the same (a searched system message), every candidate's
slot is run once and its keys and values serve all contexts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.attention import Shared
from jaxsteer.models.layers import run_and_cache, run_layers
from jaxsteer.models.log_probs import label_log_probs
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import Context, embed_tokens, make_context, placed, scale_embeddings, unembed
from jaxsteer.objectives import Objective, Reads
from jaxsteer.objectives.reads import Layout, read
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompts.slots import PAD


def pads_of(task: Task, ids: Int[Array, "M S"]) -> Int[Array, " M"] | None:
    """How many ``PAD`` each prompt begins with; ``None`` where all prompts have the same length."""
    return (ids == PAD).sum(-1) if task.varies else None


def slot_rows(
    params: Params, task: Task, slot: Float[Array, "M S D"], pads: Int[Array, " M"] | None = None
) -> tuple[Float[Array, "CM T D"], Context]:
    """Every candidate in every context, context-major: slot and tail as they enter block 0, and their context."""
    config, contexts, m = task.config, task.contexts, slot.shape[0]
    tail = embed_tokens(params, config, task.after)
    x = jnp.concatenate(
        [
            jnp.broadcast_to(slot[None], (contexts, *slot.shape)),
            jnp.broadcast_to(tail[:, None], (contexts, m, *tail.shape[1:])),
        ],
        axis=2,
    ).reshape(contexts * m, -1, config.d_model)
    valid = None
    if task.after.shape[1]:
        row = jnp.concatenate([jnp.ones((contexts, task.length), bool), task.after_mask], axis=1)
        valid = jnp.repeat(row, m, axis=0)
    context = _row_context(task, x.shape[1], contexts, m, valid, pads)
    return placed(params, x, context.positions), context


def run_slots(
    params: Params,
    task: Task,
    objective: Objective,
    slot: Float[Array, "M S D"],
    pads: Int[Array, " M"] | None = None,
) -> tuple[Float[Array, " M"], Float[Array, "O M s D"]]:
    """F of every candidate, and the final stream at the slot tokens that predict another one (s = S - 1).

    ``slot`` holds the embeddings of the candidates' tokens (``embed_tokens``), ``pads`` how many of the first are
    padding.
    """
    config, m = task.config, slot.shape[0]
    if task.slot_once:
        reads, x, at = _read_tails(params, task, slot, pads)
    else:
        x, context = slot_rows(params, task, slot, pads)
        reads, x, at = read(params, config, task.needs, x, context, _layout(task, m, pads))
    f = task.combine(objective(reads).reshape(task.contexts, m), task.weight)
    # Above the deepest read only the tokens that predict another slot token matter.
    predicting, openings = task.length - 1, len(task.last_hidden)
    if predicting == 0:
        return f, jnp.zeros((openings, m, 0, config.d_model), x.dtype)
    context = _row_context(task, predicting, openings, m, None, pads)
    x = run_layers(params, config, x[:, :predicting], context, at, config.n_layers)
    return f, x.reshape(openings, m, predicting, config.d_model)


def _read_tails(
    params: Params, task: Task, slot: Float[Array, "M S D"], pads: Int[Array, " M"] | None
) -> tuple[Reads, Float[Array, "M S D"], int]:
    """As ``reads.read``, where the stream that is handed back is the slot's: every candidate's slot runs once, and the
    tails of all contexts look back on it.
    """
    config, m, depth = task.config, slot.shape[0], task.needs.depth(task.config.n_layers)
    slot_context = _row_context(task, task.length, 1, m, None, pads)
    slot = placed(params, slot, slot_context.positions)
    x, (k, v) = run_and_cache(params, config, slot, slot_context, depth)
    own = jnp.arange(task.length)
    seen, skipped = jnp.ones((1, task.length), bool), jnp.zeros(1, jnp.int32)
    if pads is not None:
        seen, skipped = own >= pads[:, None], pads
    positions = task.prefix.length[:, None] + own - skipped[:, None]
    shared = Shared(k=k, v=v, mask=seen[:, None, None], positions=positions, interleaved=True)
    after = embed_tokens(params, config, task.after)
    tails = jnp.repeat(after, m, axis=0)
    where = jnp.broadcast_to(task.prefix.length + task.length + jnp.arange(after.shape[1]), tails.shape[:2])
    if pads is not None:
        where = where - jnp.tile(pads, task.contexts)[:, None]
    context = make_context(config, where, jnp.repeat(task.after_mask, m, axis=0), task.prefix, shared)
    tails = placed(params, tails, where)
    reads, _, _ = read(params, config, task.needs, tails, context, _layout(task, m, pads, start=task.length))
    return reads, x, depth


def _row_context(
    task: Task,
    t: int,
    groups: int,
    m: int,
    valid: Bool[Array, "B T"] | None = None,
    pads: Int[Array, " M"] | None = None,
) -> Context:
    """The context of ``t`` tokens from the slot's first, for m candidates in each of ``groups`` contexts."""
    starts = jnp.repeat(jnp.broadcast_to(task.prefix.length, groups), m)
    positions = starts[:, None] + jnp.arange(t)
    if pads is not None:
        skipped = jnp.tile(pads, groups)[:, None]
        real = jnp.arange(t) >= skipped
        valid = real if valid is None else valid & real
        positions = jnp.maximum(positions - skipped, 0)
    return make_context(task.config, positions, valid, task.prefix)


def _layout(task: Task, m: int, pads: Int[Array, " M"] | None, start: int = 0) -> Layout:
    """Where things stand in rows that begin with token ``start`` of slot and tail (0, or S for tails alone)."""
    shape = (task.contexts, task.length)
    own = jnp.arange(task.length + task.after.shape[1])
    # What a target adds to the tail is no part of the input.
    last = jnp.full(task.contexts, len(own)) if task.target is None else task.target.start
    tail = jnp.concatenate([jnp.zeros(shape, bool), task.after_mask], axis=1) & (own <= last[:, None])
    before = jnp.broadcast_to(task.prefix.mask, (task.contexts, task.prefix.mask.shape[1]))
    tail, before, target, read_index = jax.tree.map(
        lambda a: jnp.repeat(a, m, axis=0), (tail, before, task.target, task.read_index - start)
    )
    prompt = jnp.broadcast_to(own < task.length, tail.shape)
    if pads is not None:
        prompt = prompt & (own >= jnp.tile(pads, task.contexts)[:, None])
    spans = {"prompt": prompt, "tail": tail}
    keys = {name: jnp.concatenate([jnp.zeros_like(before), mask], axis=1) for name, mask in spans.items()}
    keys["before"] = jnp.concatenate([before, jnp.zeros_like(tail)], axis=1)
    return Layout(
        read=read_index,
        context=jnp.repeat(jnp.arange(task.contexts), m),
        spans={name: mask[:, start:] for name, mask in spans.items()},
        keys=keys,
        target=target and dataclasses.replace(target, start=target.start - start),
    )


def cross_entropy(
    params: Params, task: Task, hidden: Float[Array, "O M s D"], ids: Int[Array, "M S"]
) -> Float[Array, " M"]:
    """(M,) mean negative log-probability of the prompt's tokens, in nats per token, over contexts."""
    openings, m, s, d = hidden.shape
    pads = pads_of(task, ids)
    total: Array = jnp.zeros((openings, m))
    if s:
        labels = jnp.broadcast_to(ids[None, :, 1:], (openings, m, s))
        log_probs = label_log_probs(params, task.config, hidden.reshape(-1, d), labels.reshape(-1))
        log_probs = log_probs.reshape(openings, m, s)
        if pads is not None:  # the first token that is none has its probability from before the slot
            log_probs = jnp.where(jnp.arange(s) >= pads[:, None], log_probs, 0.0)
        total = log_probs.sum(-1)
    if task.scores_first:
        first = ids[:, 0] if pads is None else jnp.take_along_axis(ids, pads[:, None], axis=1)[:, 0]
        total = total + first_log_probs(params, task)[:, first]
    count = s + task.scores_first
    scored = max(count, 1) if pads is None else jnp.maximum(count - pads, 1)
    return -jnp.einsum("o,om->m", task.opening_weight, total) / scored


def first_log_probs(params: Params, task: Task) -> Float[Array, "O V"]:
    """Log-probability of every token as the slot's first, per opening."""
    return jax.nn.log_softmax(unembed(params, task.config, task.last_hidden))


def score(
    params: Params, task: Task, objective: Objective, ids: Int[Array, "M S"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Objective f (larger is better) and cross-entropy x (nats per token) of M prompts, at most ``task.batch`` at a
    time, in equal batches.
    """

    def one_batch(batch: Int[Array, "b S"]) -> tuple[Array, Array]:
        f, hidden = run_slots(params, task, objective, embed_tokens(params, task.config, batch), pads_of(task, batch))
        return f, cross_entropy(params, task, hidden, batch)

    m = ids.shape[0]
    chunks = -(-m // task.batch)
    b = -(-m // chunks)
    padded = jnp.pad(ids, ((0, chunks * b - m), (0, 0)), mode="edge").reshape(chunks, b, -1)
    f, x = lax.map(one_batch, padded)
    return f.reshape(-1)[:m], x.reshape(-1)[:m]


def slot_loss(
    params: Params,
    task: Task,
    objective: Objective,
    rows: Float[Array, "P S D"],
    ids: Int[Array, "P S"],
    fluency: Float[Array, " P"],
) -> tuple[Float[Array, ""], Float[Array, "O P s D"]]:
    """Sum over P slots of ``J = -f + fluency * x`` where embedding rows stand in for the tokens ``ids`` that they are,
    and the stream that predicts the tokens (``run_slots``).

    Differentiable in ``rows``. A token's own probability does not depend on its row, so that the gradient of x is that
    of the tokens after it.
    """
    embedded = scale_embeddings(rows.astype(params.embed.dtype), task.config)
    f, hidden = run_slots(params, task, objective, embedded, pads_of(task, ids))
    return jnp.sum(fluency * cross_entropy(params, task, hidden, ids) - f), hidden
