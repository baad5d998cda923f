"""Score prompts again from their text: no cached prefix, no shared code with the inner loop beyond the transformer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_layers
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.transformer import embed, make_context, positions_of, unembed
from jaxsteer.objectives import Needs, Objective, as_pytree
from jaxsteer.objectives.reads import Layout, read
from jaxsteer.prompt_search.contexts import MEAN, Combination, make_target, row_tails
from jaxsteer.prompts.conversation import encode
from jaxsteer.prompts.slots import Slots, resized

PAD_TO = 8
"""Rows are padded to a multiple of this, so that prompts of one search share one compilation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescored:
    """A prompt's scores from its text, in the units of the search."""

    target: float
    cross_entropy: float


def rescore(
    model: Model,
    slots: Slots,
    objective: Objective,
    needs: Needs,
    texts: Sequence[str],
    *,
    combine: Combination = MEAN,
) -> list[Rescored]:
    """Objective and cross-entropy of prompt texts: every context is rendered, tokenised and run as a whole.

    The texts must re-tokenise in place (``prompts.retokenises``) to at most ``slots.length`` tokens; the caller keeps
    others out. ``combine`` as in ``make_task``.
    """
    objective = as_pytree(objective)
    weight = jnp.full(len(slots), 1 / len(slots))
    out = []
    for text in texts:
        rows = _rows(model, slots, text)
        f, x = _score_whole(model.params, model.config, needs, slots.length, objective, rows)
        target = combine(f[:, None], weight)[0]
        out.append(Rescored(target=float(target), cross_entropy=float(jnp.mean(x))))
    return out


@struct.dataclass
class _Rows:
    """One prompt in all contexts, as whole texts."""

    tokens: Int[Array, "C T"]
    mask: Bool[Array, "C T"]
    start: Int[Array, " C"]
    """Where the slot begins."""
    count: Int[Array, ""]
    """Tokens of the prompt."""
    layout: Layout


def _rows(model: Model, slots: Slots, text: str) -> _Rows:
    width = max(len(b) + slots.length + len(a) for b, a in zip(slots.before, row_tails(slots), strict=True))
    width = -(-width // PAD_TO) * PAD_TO
    start = np.asarray([len(b) for b in slots.before], np.int32)
    tokens, mask = np.zeros((len(slots), width), np.int32), np.zeros((len(slots), width), bool)
    for row, conversation in enumerate(slots.conversations):
        ids = encode(model.tokenizer, conversation, text)
        length = len(ids) - len(slots.before[row]) - len(slots.closing[row])  # in every context the same
        if slots.target:
            ids = np.concatenate([ids, slots.target[row][:-1]])
        ids = ids[:width]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    layout = _layout(resized(slots, length), start, mask)
    return _Rows(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(start), jnp.int32(length), layout)


def _layout(slots: Slots, start: Int[np.ndarray, " C"], mask: Bool[np.ndarray, "C T"]) -> Layout:
    """Where things stand in whole texts."""
    own = np.arange(mask.shape[1]) - start[:, None]  # counted from the slot's first token
    closing = np.asarray([slots.length + len(c) for c in slots.closing])[:, None]
    spans = {"prompt": (own >= 0) & (own < slots.length), "tail": mask & (own >= slots.length) & (own < closing)}
    target = make_target(slots)
    layout = Layout(
        read=start + slots.read_index,
        context=jnp.arange(len(slots)),
        spans=spans,
        keys={**spans, "before": mask & (own < 0)},
        target=None if target is None else dataclasses.replace(target, start=target.start + start),
    )
    return jax.tree.map(jnp.asarray, layout)


@functools.partial(jax.jit, static_argnames=("config", "needs", "length"))
def _score_whole(
    params: Params, config: ModelConfig, needs: Needs, length: int, objective: Objective, rows: _Rows
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """The objective in every context, and the mean negative log-probability of the prompt's tokens there."""
    context = make_context(config, positions_of(rows.mask), rows.mask)
    x = embed(params, config, rows.tokens, context.positions)
    reads, x, at = read(params, config, needs, x, context, rows.layout)
    f = objective(reads)
    x = run_layers(params, config, x, context, at, config.n_layers)
    # Label j of the slot is predicted one token earlier; a slot at the very start has no predictor for its first.
    column = rows.start[:, None] + jnp.arange(length)[None]
    labels = jnp.take_along_axis(rows.tokens, column, axis=1)
    predictors = jnp.take_along_axis(x, jnp.maximum(column - 1, 0)[..., None], axis=1)
    log_probs = jax.nn.log_softmax(unembed(params, config, predictors))
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    scored = (column > 0) & (jnp.arange(length) < rows.count)
    return f, -jnp.sum(picked * scored, axis=1) / scored.sum(axis=1)
