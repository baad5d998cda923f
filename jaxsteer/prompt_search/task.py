"""What a search optimises against: fixed contexts with cached prefixes, a token mask, and the scores of prompts.

Letters: C contexts, O openings (texts before the slot: C, or 1 where all contexts have the same), M candidates, S
prompt length, A tokens after the slot, T = S + A, D width, V vocabulary, U prefix length, P parents. Rows are
context-major: row c * M + m is candidate m in context c.

    f(p) = sum_c weight_c * objective(reads of c)         x(p) = sum_c weight_c * mean_j -log P(p_j | context, p_<j)

Both as in EPO (arXiv 2402.01702): every candidate meets the same contexts, and one function scores parents and
children. ``combine`` may replace f's mean over contexts by the worst of them or by a soft minimum.

Where prompts may differ in length (``least`` < S), shorter ones begin with ``PAD``: a row's own tokens still stand in
one piece, nothing looks at the padding, and positions are counted without it.

What stands before the slot is run once. What stands after it is run for every candidate in every context, and so is the
slot; but where the texts before it are the same (a searched system message), every candidate's slot is run once and
its keys and values serve all contexts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.attention import Prefix, Shared
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.log_probs import label_log_probs
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import (
    Context,
    embed,
    make_context,
    prefill,
    run_and_cache,
    run_layers,
    scale_embeddings,
    unembed,
)
from jaxsteer.objectives import Needs, Objective, Reads
from jaxsteer.objectives.reads import Layout, Target, read
from jaxsteer.prompts.slots import PAD, Slots

Combine = Literal["mean", "worst", "soft-min"]
COMBINE: tuple[str, ...] = get_args(Combine)
ROWS = 512
"""Rows (candidates times contexts) scored at once by default: on a CPU larger batches only leave its caches."""


@struct.dataclass
class Task:
    """The fixed surroundings of a search; a pytree, so that a jitted step takes it as an argument."""

    prefix: Prefix
    """Of the O openings."""
    last_hidden: Float[Array, "O D"]
    """Stream of the last token before the slot: predicts the slot's first token."""
    after: Int[Array, "C A"]
    after_mask: Bool[Array, "C A"]
    read_index: Int[Array, " C"]
    """Where the objective reads, counted from the slot's first token."""
    target: Target | None
    """Per context, the answer whose probability is asked for, at the end of ``after``; counted like ``read_index``."""
    weight: Float[Array, " C"]
    allowed: Bool[Array, " V"]
    allowed_first: Bool[Array, " V"]
    """Tokens that may stand first in the slot (where the text has a space before it, they bring that space)."""
    ids: Int[Array, " n"]
    """The allowed tokens, and ``first_ids`` those allowed first, as lists to draw from."""
    first_ids: Int[Array, " n1"]
    config: ModelConfig = struct.field(pytree_node=False)
    needs: Needs = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)
    """Tokens of a prompt, S; the most of them where prompts vary."""
    least: int = struct.field(pytree_node=False)
    """The fewest tokens of a prompt; S where all have the same."""
    batch: int = struct.field(pytree_node=False)
    """Candidates scored at once (each in all contexts)."""
    scores_first: bool = struct.field(pytree_node=False)
    """Whether something precedes the slot, so that its first token has a probability."""
    slot_once: bool = struct.field(pytree_node=False)
    """Whether a candidate's slot is run once for all contexts; O is 1 then."""
    reads_last: bool = struct.field(pytree_node=False)
    """Whether nothing before the slot's last token is read, in any context."""
    combine: Combine = struct.field(pytree_node=False, default="mean")
    temperature: float = struct.field(pytree_node=False, default=1.0)
    """Of "soft-min", in units of the objective."""
    draft: Any = None
    """A ``probe_sampling.Draft``: the small model that chooses which children are scored."""

    @property
    def contexts(self) -> int:
        """Number of contexts C."""
        return self.after.shape[0]

    @property
    def varies(self) -> bool:
        """Whether prompts may differ in length."""
        return self.least < self.length

    @property
    def opening_weight(self) -> Float[Array, " O"]:
        """Weight of every opening in the cross-entropy."""
        return jnp.sum(self.weight, keepdims=True) if self.slot_once else self.weight


def make_task(
    params: Params,
    config: ModelConfig,
    slots: Slots,
    *,
    needs: Needs,
    allowed: Bool[np.ndarray, " V"],
    allowed_first: Bool[np.ndarray, " V"] | None = None,
    batch: int | None = None,
    combine: str = "mean",
    temperature: float = 1.0,
    least: int | None = None,
) -> Task:
    """Cache what precedes the slot and check that everything fits.

    ``slots`` holds the ids around the slot and the read position of every context, ``needs`` is what the objective
    reads, ``allowed`` the token mask and ``allowed_first`` the one for the slot's first token (default: the same).
    ``batch`` candidates are scored at once (default: about ``ROWS`` rows). ``combine`` says what becomes of the
    objective's values in the contexts: their "mean", the "worst", or their "soft-min" at ``temperature``, which lies
    between the two (towards the mean when it is large against their differences). Prompts have ``least`` tokens to
    ``slots.length`` (default: exactly that). Raises ``UserError`` when a context with its prompt is longer than the
    model's positions, when a read position lies outside of slot and tail, when too few tokens are allowed, or for a
    name, temperature or length that cannot be.
    """
    if combine not in COMBINE or not temperature > 0:
        raise UserError(
            f"combine must be one of {', '.join(COMBINE)}, temperature above 0: got {combine!r}, {temperature}"
        )
    before, after, length = slots.before, slots.after, slots.length
    least = length if least is None else least
    if not 1 <= least <= length:
        raise UserError(f"prompts of {least} to {length} tokens: expected a range of 1 or more, smaller number first")
    read_index = [int(index) for index in slots.read_index]
    longest = max(len(b) + length + len(a) for b, a in zip(before, after, strict=True))
    if longest > config.max_positions:
        raise UserError(
            f"the longest context needs {longest} tokens with its {length}-token prompt, but the model has "
            f"{config.max_positions} positions: shorten the questions or the prompt"
        )
    for index, tail in zip(read_index, after, strict=True):
        if not length - least <= index < length + len(tail):
            raise UserError(f"read position {index} lies outside of the {length} slot and {len(tail)} tail tokens")
    first = allowed if allowed_first is None else allowed & allowed_first
    if min(int(allowed.sum()), int(first.sum())) < 2:
        raise UserError(
            f"{int(allowed.sum())} tokens are allowed, {int(first.sum())} of them at the start of the prompt; a search "
            "needs at least 2 of both: loosen the token filter"
        )
    contexts = len(before)
    tails, tails_mask = padded(row_tails(slots))
    target = make_target(slots)
    looked_at = read_index if target is None else [*read_index, *target.start.tolist()]
    slot_once = contexts > 1 and min(looked_at) >= length and not needs.spans
    slot_once = slot_once and all(np.array_equal(b, before[0]) for b in before)
    before = before[:1] if slot_once else before
    width = max(1, max(len(b) for b in before))
    tokens = np.zeros((len(before), width), np.int32)
    mask = np.zeros((len(before), width), bool)
    for row, ids in enumerate(before):  # left-padded: the last column is the last token of every context
        if len(ids):
            tokens[row, -len(ids) :], mask[row, -len(ids) :] = ids, True
    prefix, hidden = jax.jit(prefill, static_argnums=1)(params, config, jnp.asarray(tokens), jnp.asarray(mask))
    return Task(
        prefix=prefix,
        last_hidden=hidden[:, -1],
        after=jnp.asarray(tails),
        after_mask=jnp.asarray(tails_mask),
        read_index=jnp.asarray(read_index, jnp.int32),
        target=target,
        weight=jnp.full((contexts,), 1.0 / contexts, jnp.float32),
        allowed=jnp.asarray(allowed),
        allowed_first=jnp.asarray(first),
        ids=jnp.asarray(np.flatnonzero(allowed), jnp.int32),
        first_ids=jnp.asarray(np.flatnonzero(first), jnp.int32),
        config=config,
        needs=needs,
        length=length,
        least=least,
        batch=batch or max(1, ROWS // contexts),
        scores_first=bool(all(len(b) for b in before)),
        slot_once=slot_once,
        reads_last=min(read_index) >= length - 1,
        combine=combine,  # type: ignore[arg-type]
        temperature=float(temperature),
    )


def row_tails(slots: Slots) -> list[np.ndarray]:
    """Per context, the ids to run after the slot: up to the last one that is read or predicts a target token."""
    if slots.target:
        return [np.concatenate([c, t[:-1]]) for c, t in zip(slots.closing, slots.target, strict=True)]
    # Tokens behind the read position cannot influence it, and fluency needs the slot alone.
    needed = max(0, int(max(slots.read_index)) + 1 - slots.length)
    return [tail[:needed] for tail in slots.after]


def make_target(slots: Slots) -> Target | None:
    """The slots' target answers, counted from the slot's first token."""
    if not slots.target:
        return None
    ids, mask = map(jnp.asarray, padded(slots.target))
    start = [slots.length - 1 + len(closing) for closing in slots.closing]
    return Target(ids=ids, mask=mask, start=jnp.asarray(start, jnp.int32))


def padded(rows: Sequence[np.ndarray]) -> tuple[Int[np.ndarray, "C A"], Bool[np.ndarray, "C A"]]:
    """Rows of ids padded at their ends, and where they are not padding."""
    lengths = np.asarray([len(row) for row in rows])
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return ids, mask


def pads_of(task: Task, ids: Int[Array, "M S"]) -> Int[Array, " M"] | None:
    """How many ``PAD`` each prompt begins with; ``None`` where all prompts have the same length."""
    return (ids == PAD).sum(-1) if task.varies else None


def slot_rows(
    params: Params, task: Task, slot: Float[Array, "M S D"], pads: Int[Array, " M"] | None = None
) -> tuple[Float[Array, "CM T D"], Context]:
    """Every candidate in every context, context-major: slot and tail as they enter block 0, and their context."""
    config, contexts, m = task.config, task.contexts, slot.shape[0]
    tail = embed(params, config, task.after)
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
    return x, _row_context(task, x.shape[1], contexts, m, valid, pads)


def run_slots(
    params: Params,
    task: Task,
    objective: Objective,
    slot: Float[Array, "M S D"],
    pads: Int[Array, " M"] | None = None,
) -> tuple[Float[Array, " M"], Float[Array, "O M s D"]]:
    """F of every candidate, and the final stream at the slot tokens that predict another one (s = S - 1).

    ``slot`` holds the candidates' tokens as they enter block 0, ``pads`` how many of the first are padding.
    """
    config, m = task.config, slot.shape[0]
    if task.slot_once:
        reads, x, at = _read_tails(params, task, slot, pads)
    else:
        x, context = slot_rows(params, task, slot, pads)
        reads, x, at = read(params, config, task.needs, x, context, _layout(task, m, pads))
    f = combined(objective(reads).reshape(task.contexts, m), task.weight, task.combine, task.temperature)
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
    x, (k, v) = run_and_cache(params, config, slot, slot_context, depth)
    own = jnp.arange(task.length)
    seen, skipped = jnp.ones((1, task.length), bool), jnp.zeros(1, jnp.int32)
    if pads is not None:
        seen, skipped = own >= pads[:, None], pads
    positions = task.prefix.length[:, None] + own - skipped[:, None]
    shared = Shared(k=k, v=v, mask=seen[:, None, None], positions=positions, interleaved=True)
    after = embed(params, config, task.after)
    tails = jnp.repeat(after, m, axis=0)
    where = jnp.broadcast_to(task.prefix.length + task.length + jnp.arange(after.shape[1]), tails.shape[:2])
    if pads is not None:
        where = where - jnp.tile(pads, task.contexts)[:, None]
    context = make_context(config, where, jnp.repeat(task.after_mask, m, axis=0), task.prefix, shared=shared)
    reads, _, _ = read(params, config, task.needs, tails, context, _layout(task, m, pads, start=task.length))
    return reads, x, depth


def combined(
    scores: Float[Array, "C M"], weight: Float[Array, " C"], how: str = "mean", temperature: float = 1.0
) -> Float[Array, " M"]:
    """An objective's values in all contexts as one: see ``make_task``."""
    scores = scores.astype(jnp.float32)
    if how == "worst":
        return jnp.min(scores, axis=0)
    if how == "soft-min":
        share = (weight / jnp.sum(weight))[:, None]
        return -temperature * jax.nn.logsumexp(-scores / temperature, axis=0, b=share)
    return jnp.sum(weight[:, None] * scores, axis=0)


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
        f, hidden = run_slots(params, task, objective, embed(params, task.config, batch), pads_of(task, batch))
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
