"""What the MLP should say at a subject's last token: a small change of its output that makes the new answer likely.

For every fact a change d of the output of W_down at the last token of its subject (2202.05262, equation 4):

    minimise  mean over prefixes of -log P(answer | prefix, prompt; d) / tokens of the answer
              + kl * KL(P("{subject} is a"; d) || P("{subject} is a"))  + decay * |d|^2 / |v0|^2

by Adam within the ball |d| <= radius |v0|, v0 the mean output without d; a fact whose loss is below ``enough`` rests.
The step of Adam is in units of the root mean square of v0's entries, so that one rate serves all models (the released
code has 0.5 in the stream's own units). The released code measures the decay as |d| / |v0|^2.

All facts are one program and no step returns to the host. What stands before a subject's last token cannot be changed
by d: its keys and values are computed once, and the steps run the few tokens behind it only.

Letters: F facts, P rows of a fact (prefixes, and one of "{subject} is a"), B = F P rows, U tokens before the subject's
last one, T tokens from it on, A answer tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, prefill, run_layers, scan_blocks
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE, label_log_probs
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import NO_TAP, Tap, adding
from jaxsteer.models.transformer import Context, embed, make_context, unembed
from jaxsteer.processes import to_host
from jaxsteer.ranges import Positive, Range, Weight
from jaxsteer.rewrite.facts import Fact
from jaxsteer.rewrite.lowrank import VALUE
from jaxsteer.rewrite.rows import Row, essence_row, fact_row, row_arrays

ROWS = 256
"""Rows of text at a time; facts come in groups of as many as fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """How the wanted output of the MLP is sought. Where nothing else is said, defaults are those of the papers."""

    steps: Annotated[int, Range(1, 1000)] = 60
    """Steps of Adam, at most. (The papers: 20 to 25 longer ones, which find larger changes.)"""
    rate: Positive = 0.15
    """Step of Adam, in root mean squares of the entries of the MLP's output."""
    enough: Weight = 0.05
    """A fact with this loss (nats) is left as it is."""
    radius: Positive = 4.0
    """Largest change of the output, in its own norm."""
    kl: Weight = 0.0625
    """Weight of the divergence on "{subject} is a"."""
    decay: Weight = 1e-3
    """Weight of the squared relative size of the change."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """The wanted changes of every fact."""

    change: Float[np.ndarray, "n D"]
    """d: what the MLP's output is to gain, float64."""
    output: Float[np.ndarray, "n D"]
    """v0: the mean output without it, float64."""
    loss: Float[np.ndarray, " n"]
    """At the end, nats."""
    probability: Float[np.ndarray, " n"]
    """exp of the mean log-probability per token of the new answer at the end, geometric mean over prefixes."""
    steps: Int[np.ndarray, " n"]
    """Steps that a fact moved."""


@struct.dataclass
class _Batch:
    heads: Int[Array, "B U"]
    head_mask: Bool[Array, "B U"]
    tails: Int[Array, "B T"]
    tail_mask: Bool[Array, "B T"]
    reads: Int[Array, "B A"]
    """Positions in the tail from which answer tokens are predicted."""
    labels: Int[Array, "B A"]
    weights: Float[Array, "B A"]
    """Sum to 1 over the answer of a row that has one."""


def wanted_values(
    model: Model,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layer: int,
    *,
    options: ValueOptions = ValueOptions(),
) -> Values:
    """The wanted change of the MLP's output of ``layer`` for every fact.

    Raises ``UserError`` where the loss is not finite, and as ``fact_row`` does.
    """
    rows = [
        [*(fact_row(model, fact, fact.target_new, prefix=prefix) for prefix in prefixes), essence_row(model, fact)]
        for fact in facts
    ]
    width = len(prefixes) + 1
    flat = [row for each in rows for row in each]
    heads, tails = bucket(max(row.subject for row in flat)), bucket(max(len(r.ids) - r.subject for r in flat), 4)
    group = max(1, min(ROWS // width, len(facts)))
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(rows), group):
        chosen = rows[start : start + group]
        chosen = chosen + chosen[-1:] * (group - len(chosen))
        batch = _batch(model, [row for each in chosen for row in each], heads, tails)
        out = to_host(_optimise(model.params, model.config, batch, group=width, layer=layer, options=options))
        found.append(tuple(np.asarray(part)[: len(rows) - start] for part in out))
    change, output, loss, log_prob, steps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not np.isfinite(loss).all() or not np.isfinite(change).all():
        raise UserError(f"seeking new values failed: {LOGITS_NOT_FINITE}")
    return Values(
        change=change.astype(np.float64),
        output=output.astype(np.float64),
        loss=loss,
        probability=np.exp(log_prob),
        steps=steps,
    )


def _batch(model: Model, rows: Sequence[Row], heads: int, tails: int) -> _Batch:
    reads, labels, weights = row_arrays(rows, from_subject=True)
    head, head_mask = pad_rows([row.ids[: row.subject] for row in rows], heads)
    tail, tail_mask = pad_rows([row.ids[row.subject :] for row in rows], tails)
    arrays = (head, head_mask, tail, tail_mask, reads, labels, weights)
    return _Batch(*(shard_rows(model.mesh, array) for array in arrays))


@partial(jax.jit, static_argnames=("config", "group", "layer", "options"))
def _optimise(
    params: Params, config: ModelConfig, batch: _Batch, *, group: int, layer: int, options: ValueOptions
) -> tuple[Array, Array, Array, Array, Array]:
    """(d, v0, loss, mean log-probability of the answer, steps) of every fact; ``group`` rows of a fact, the last one
    being "{subject} is a".
    """
    facts = len(batch.tails) // group
    past, _ = prefill(params, config, batch.heads, batch.head_mask)
    positions = past.length[:, None] + jnp.arange(batch.tails.shape[1])
    context = make_context(config, positions, batch.tail_mask, past)
    before = run_layers(params, config, embed(params, config, batch.tails, positions), context, 0, layer)
    first, output = _at_layer(params, config, before, context, layer)
    v0 = output.reshape(facts, group, -1)[:, :-1].mean(1)
    size = jnp.linalg.norm(v0, axis=-1, keepdims=True)
    plain = jax.nn.log_softmax(_essence(params, config, run_layers(
        params, config, first, context, layer + 1, config.n_layers), batch, group))  # fmt: skip

    def losses(change: Float[Array, "F D"]) -> tuple[Array, tuple[Array, Array]]:
        added = jnp.zeros(before.shape, jnp.float32).at[:, 0].set(jnp.repeat(change, group, 0)).astype(before.dtype)
        x, _ = _at_layer(params, config, before, context, layer, adding({VALUE: added}))
        x = run_layers(params, config, x, context, layer + 1, config.n_layers)
        hidden = jnp.take_along_axis(x, batch.reads[:, :, None], axis=1)
        found = label_log_probs(params, config, hidden.reshape(-1, x.shape[-1]), batch.labels.reshape(-1))
        per_row = jnp.sum(found.reshape(batch.labels.shape) * batch.weights, -1).reshape(facts, group)
        log_prob = per_row[:, :-1].mean(1)
        now = jax.nn.log_softmax(_essence(params, config, x, batch, group))
        kl = jnp.sum(jnp.exp(now) * (now - plain), -1)
        decay = jnp.sum(change**2, -1) / size[:, 0] ** 2
        each = -log_prob + options.kl * kl + options.decay * decay
        return each.sum(), (each, log_prob)

    slope = jax.value_and_grad(losses, has_aux=True)
    optimizer = optax.adam(options.rate)
    unit = size / jnp.sqrt(v0.shape[-1])

    def step(carry: tuple) -> tuple:
        change, state, count, _, _, moved = carry
        (_, (each, log_prob)), gradient = slope(change)
        active = (each >= options.enough)[:, None]
        update, state = optimizer.update(gradient * unit, state)
        new = change + update * unit
        new = new * jnp.minimum(1.0, options.radius * size / jnp.linalg.norm(new, axis=-1, keepdims=True))
        return jnp.where(active, new, change), state, count + 1, each, log_prob, moved + active[:, 0]

    def unfinished(carry: tuple) -> Array:
        return (carry[2] < options.steps) & jnp.any(carry[3] >= options.enough)

    zero = jnp.zeros_like(v0)
    start = (zero, optimizer.init(zero), 0, jnp.full(facts, jnp.inf), jnp.zeros(facts), jnp.zeros(facts, jnp.int32))
    change, _, _, _, _, moved = lax.while_loop(unfinished, step, start)
    _, (each, log_prob) = losses(change)
    return change, v0, each, log_prob, moved


def _at_layer(
    params: Params, config: ModelConfig, x: Array, context: Context, layer: int, tap: Tap = NO_TAP
) -> tuple[Array, Array]:
    """The stream after a block, and what its W_down gives at the first token, float32."""
    keep = [Keep((VALUE,), lambda value, _: value[:, 0].astype(jnp.float32))]
    x, (output,) = scan_blocks(params, config, x, context, layer, layer + 1, tap=tap, keep=keep)
    return x, output[0]


def _essence(params: Params, config: ModelConfig, x: Array, batch: _Batch, group: int) -> Float[Array, "F V"]:
    """Logits after the last token of "{subject} is a" of every fact."""
    last = batch.tail_mask.sum(-1)[group - 1 :: group] - 1
    rows = x[group - 1 :: group]
    return unembed(params, config, jnp.take_along_axis(rows, last[:, None, None], axis=1)[:, 0])
