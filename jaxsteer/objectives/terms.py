"""Objectives: pure functions from what was read to a score per row.

An objective is any callable ``objective(reads) -> score[rows]``, larger is better. It may be a plain function or a
pytree with ``__call__`` (those below), whose arrays can then differ per problem. Those below add up: ``a - 0.5 * b``,
where either side may also be a plain function. What an objective reads is found by tracing it once (``needs``).

Letters: D width, F latents, V vocabulary, k latents asked for, n tokens of a target, c contexts (or 1 for all alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.log_probs import entries
from jaxsteer.objectives.reads import KEYS, Objective, Reads

Norm = Literal["raw", "cosine", "zscore"]
At = Literal["read", "prompt", "tail"]
"""Which tokens of a row: the one at the read position, or the mean over a span."""


def as_pytree(objective: Objective) -> Objective:
    """The objective as a pytree, which a plain function is not: its code is static then, and it has no arrays."""
    return jax.tree_util.Partial(objective) if jax.tree_util.all_leaves([objective]) else objective


class Term:
    """What the objectives of this module share: sums, differences and multiples of them are objectives too."""

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The score of every row."""
        raise NotImplementedError

    def __add__(self, other: Objective) -> WeightedSum:
        """The sum of both scores."""
        return weighted_sum((1.0, self), (1.0, other))

    __radd__ = __add__

    def __sub__(self, other: Objective) -> WeightedSum:
        """The difference of both scores."""
        return weighted_sum((1.0, self), (-1.0, other))

    def __rsub__(self, other: Objective) -> WeightedSum:
        """The difference of both scores."""
        return weighted_sum((1.0, other), (-1.0, self))

    def __mul__(self, weight: float | Float[Array, ""]) -> WeightedSum:
        """A multiple of the score."""
        return weighted_sum((weight, self))

    __rmul__ = __mul__

    def __neg__(self) -> WeightedSum:
        """The score with its sign turned: what lowered this raises that."""
        return weighted_sum((-1.0, self))


@struct.dataclass
class WeightedSum(Term):
    """``sum_i weight_i * term_i``; made by ``a - 0.5 * b`` or by ``weighted_sum``."""

    weights: Float[Array, " terms"]
    terms: tuple[Objective, ...]

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The weighted sum of every row."""
        scores = [weight * term(reads) for weight, term in zip(self.weights, self.terms, strict=True)]
        return sum(scores[1:], scores[0])


def weighted_sum(*terms: tuple[float | Float[Array, ""], Any]) -> WeightedSum:
    """The sum of ``(weight, objective)`` pairs. Sums within it are flattened; objectives may be plain functions."""
    weights, flat = [], []
    for weight, term in terms:
        if not callable(term):
            raise UserError(f"objectives add up with objectives, not with {type(term).__name__} {term!r}")
        parts = zip(term.weights, term.terms, strict=True) if isinstance(term, WeightedSum) else [(1.0, term)]
        for inner, part in parts:
            weights.append(weight * inner)
            flat.append(as_pytree(part))
    return WeightedSum(weights=jnp.asarray(weights, jnp.float32), terms=tuple(flat))


def _value(reads: Reads, site: str, at: str) -> Float[Array, "rows ..."]:
    """What stands at a site: at the read position, or on average over a span."""
    return reads[site] if at == "read" else reads.span_mean(site, at)


@struct.dataclass
class Projection(Term):
    """RESGA's objective: ``<r, delta>`` at one site (arXiv 2601.02896).

    ``norm`` "raw": in stream units. "cosine": ``<r, delta> / (|r| |delta|)``. "zscore": ``<(r - mean r) / (std r +
    1e-6), delta>`` with mean and std (ddof 1) over the D entries of r, as in RESGA's older runs; for a residual stream
    close to ``sqrt(D) |delta|`` times the cosine. Where a site has heads, they are joined.
    """

    delta: Float[Array, " D"]
    site: str = struct.field(pytree_node=False)
    norm: Norm = struct.field(pytree_node=False, default="raw")
    at: At = struct.field(pytree_node=False, default="read")
    """Where r is taken: at the read position, or its mean over the span "prompt" or "tail"."""

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The projection of every row."""
        check_choice("norm", self.norm, get_args(Norm))
        r = _value(reads, self.site, self.at)
        r = r.reshape(len(r), -1)
        if self.norm == "zscore":
            r = (r - r.mean(-1, keepdims=True)) / (r.std(-1, ddof=1, keepdims=True) + 1e-6)
        projection = jnp.sum(r * self.delta, axis=-1)
        if self.norm != "cosine":
            return projection
        lengths = jnp.sqrt(jnp.sum(r * r, axis=-1) * jnp.sum(self.delta * self.delta) + 1e-24)
        return projection / lengths


@struct.dataclass
class TargetLogProb(Term):
    """Log-probability of the task's target answer after the input, all its tokens teacher-forced: ``sum_j log P(a_j |
    input, a_<j)``, or with ``per_token`` its mean, in nats. GCG's objective (arXiv 2307.15043) with its sign turned.
    """

    per_token: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The log-probability of every row."""
        total = jnp.sum(reads.target_log_probs, axis=-1)
        return total / jnp.maximum(reads.target_mask.sum(-1), 1) if self.per_token else total


@struct.dataclass
class ByContext(Term):
    """Any objective times a number of the row's context, for example -1 where it is to fall: ``w_c f``."""

    objective: Objective
    weights: Float[Array, " c"]

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The wrapped objective's score of every row, times its context's number."""
        return _per_row(self.weights, reads) * self.objective(reads)


@struct.dataclass
class LogitDifference(Term):
    """``logit[plus] - logit[minus]`` of the token after the read position: the log-odds of two tokens, in nats."""

    plus: Int[Array, " c"]
    """Token ids, one per context or one for all."""
    minus: Int[Array, " c"]

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The difference of every row."""
        for ids in (self.plus, self.minus):
            _check_index("token id", ids, reads.logits.shape[-1])
        return _logit(reads, self.plus) - _logit(reads, self.minus)


@struct.dataclass
class Neuron(Term):
    """One entry of a site: a neuron (``blocks.l.mlp.hook_post``), or a coordinate of any other vector."""

    index: Int[Array, ""]
    site: str = struct.field(pytree_node=False)
    at: At = struct.field(pytree_node=False, default="read")

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The entry of every row."""
        value = _value(reads, self.site, self.at)
        if value.ndim != 2:
            raise UserError(
                f"an entry needs a site with one vector per token, but {self.site!r} has shape (rows, "
                f"{', '.join(map(str, value.shape[1:]))}): use jaxsteer.objectives.Attention or a function of "
                "your own"
            )
        _check_index(f"entry of {self.site}", self.index, value.shape[-1])
        return jnp.take(value, self.index, axis=-1)


@struct.dataclass
class Attention(Term):
    """How much a head looks, from the read position, at the prompt (or elsewhere): the sum of its attention
    probabilities over the tokens ``to``, between 0 and 1.
    """

    head: Int[Array, ""]
    site: str = struct.field(pytree_node=False)
    """``blocks.l.attn.hook_pattern``."""
    to: Literal["first", "before", "prompt", "tail"] = struct.field(pytree_node=False, default="prompt")

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The attention of every row."""
        check_choice("to", self.to, KEYS)
        pattern = reads[self.site]
        if pattern.ndim != 3 or not self.site.endswith("attn.hook_pattern"):
            raise UserError(f"attention is read at blocks.<l>.attn.hook_pattern, not at {self.site!r}")
        _check_index(f"head of {self.site}", self.head, pattern.shape[1])
        return jnp.sum(jnp.take(pattern, self.head, axis=1) * reads.keys(self.to), axis=-1)


@struct.dataclass
class MatchDistribution(Term):
    """``-KL(target || model)`` of the next token at the read position, in nats: 0 where the model says the same."""

    log_probs: Float[Array, "c V"]
    """Natural logarithms of the target's probabilities (-inf for 0), one row per context or one for all."""

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """Minus the divergence of every row."""
        target = _per_row(self.log_probs, reads)
        probs = jnp.exp(target)
        ratio = jnp.where(probs > 0, target, 0.0) - jax.nn.log_softmax(reads.logits)
        return -jnp.sum(probs * ratio, axis=-1)


@struct.dataclass
class Standardised(Term):
    """Any objective in units of its standard deviation over random prompts: ``(f - offset) / scale``.

    So a fluency weight (nats traded per standard deviation) means the same at every site and for every objective.
    """

    objective: Objective
    offset: Float[Array, ""]
    scale: Float[Array, ""]

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The wrapped objective's score of every row, shifted and scaled."""
        return (self.objective(reads) - self.offset) / self.scale


def _logit(reads: Reads, ids: Int[Array, " c"]) -> Float[Array, " rows"]:
    row = _per_row(ids, reads)  # below 0 where a context has no id of its own
    return jnp.where(row < 0, jnp.nan, jax.vmap(entries)(reads.logits, row))


def _per_row(values: Array, reads: Reads) -> Array:
    """The entry of every row's context in ``values``, which hold one for every context or one for all."""
    row = reads.context if values.shape[0] > 1 else jnp.zeros_like(reads.context)
    return values.at[row].get(mode="fill")  # too few entries become NaN, which is found before the search


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Refuse what is not among the choices. Raises ``UserError``."""
    if given not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {given!r}")


def _check_index(what: str, index: Int[Array, ...], size: int) -> None:
    """Refuse an index beyond its axis, where its value is known: while ``needs`` traces, but not in a program."""
    if isinstance(index, jax.core.Tracer):
        return
    known = np.asarray(index)
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= size:
        raise UserError(f"there is no {what} with number {low if low < 0 else high}: they are 0 to {size - 1}")
