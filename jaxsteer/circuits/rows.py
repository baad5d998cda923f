"""Texts that are run and scored: where a metric reads them, and how much each reading counts.

A metric is an objective (``jaxsteer.objectives``): a function from what was read to a score per reading. A row's score
is the weighted sum over its q readings, which are contexts of their own: reading j of row b is context b q + j, so that
an objective may ask for another pair of tokens, or another distribution, at every one of them.

Letters: B rows, T tokens, q readings of a row, n tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import ready_for
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket
from jaxsteer.models.params import Params
from jaxsteer.models.roles import Roles, stack_rendered
from jaxsteer.models.run import logits as run_logits
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import Intervention, Tap, make_where, tap_of
from jaxsteer.models.transformer import Context, make_context, positions_of
from jaxsteer.objectives.reads import Layout, Needs, Objective, Reads, Target, needs
from jaxsteer.objectives.terms import LogitDifference, MatchDistribution, Term, as_pytree
from jaxsteer.processes import to_host
from jaxsteer.prompts.generate import Prompt, encode_prompts
from jaxsteer.ranges import as_tuple


@struct.dataclass
class Rows:
    """Texts in token space, padded on the right, and where they are read; NumPy arrays, made by ``make_rows``."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    """False on padding."""
    read: Int[Array, "B q"]
    """Tokens whose prediction is scored; entries of weight 0 only fill up."""
    weight: Float[Array, "B q"]
    """How much a reading counts: 1 over the row's number of readings, so that a score is a mean over them."""
    context: Int[Array, "B q"]
    """Number of each reading among all."""
    prompt_length: Int[Array, " B"]
    """Where each row's response begins, for edits that tell prompt from response."""
    roles: Roles | None = None
    answer: Int[Array, "B n"] | None = None
    """Answers whose log-probability a metric may ask for; their tokens but the last stand in the row."""
    answer_mask: Bool[Array, "B n"] | None = None

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens of each row."""
        return np.asarray(self.mask).sum(-1)

    @property
    def readings(self) -> Bool[np.ndarray, "B q"]:
        """True where a reading counts."""
        return np.asarray(self.weight) != 0

    def take(self, index: Any) -> Rows:
        """The rows of these numbers, or a slice of them."""
        return jax.tree.map(lambda a: a[index], self)

    def reading(self, positions: Sequence[Sequence[int]]) -> Rows:
        """The same texts read at other tokens: a list of them for each row, negative ones counted from its end.

        Raises ``UserError`` for a row without any, and for tokens outside of the row.
        """
        if len(positions) != len(self.lengths):
            raise UserError(f"{len(positions)} lists of readings were given for {len(self.lengths)} rows")
        width = max((len(each) for each in positions), default=0)
        read, weight = np.zeros((len(positions), width), np.int32), np.zeros((len(positions), width), np.float32)
        for row, (each, length) in enumerate(zip(positions, self.lengths, strict=True)):
            at = np.asarray(each, np.int64)
            if not at.size or at.min() < -length or at.max() >= length:
                raise UserError(
                    f"row {row} has {length} tokens and is to be read at {np.asarray(each).tolist()}: give one or more "
                    f"of its tokens"
                )
            read[row, : len(at)], weight[row, : len(at)] = at % length, 1 / len(at)
        context = np.arange(read.size, dtype=np.int32).reshape(read.shape)
        return self.replace(read=read, weight=weight, context=context)  # type: ignore[attr-defined,no-any-return]


def make_rows(
    model: Model,
    texts: Prompt | Sequence[Prompt],
    *,
    read: Sequence[Sequence[int]] | None = None,
    prompt_length: Sequence[int] | None = None,
    answers: Sequence[Sequence[int]] | None = None,
) -> Rows:
    """Rows of ``texts``: texts, conversations or token ids, as ``generate`` takes them.

    Args:
        read: for each row the tokens whose prediction is scored; by default the last one, or what ``answers`` follow.
        prompt_length: where each row's response begins; by default all is prompt.
        answers: token ids that follow each text and whose log-probability is asked for (``TargetLogProb``). They become
            part of the rows.

    Raises ``UserError`` for texts longer than the model's positions, and for readings outside of a text.
    """
    rendered = encode_prompts(model, texts, roles=True)
    ends = [len(row.ids) for row in rendered]
    if answers is not None:
        if len(answers) != len(rendered) or not all(len(a) for a in answers):
            raise UserError(f"give one answer, of at least one token, for each of {len(rendered)} texts")
        rendered = [row.answered(np.asarray(a, np.int32)[:-1]) for row, a in zip(rendered, answers, strict=True)]
        read = read if read is not None else [[end - 1] for end in ends]
    longest = max(len(row.ids) for row in rendered)
    if longest > model.config.max_positions or not min(ends):
        raise UserError(
            f"texts have {min(ends)} to {longest} tokens; this model takes 1 to {model.config.max_positions}"
        )
    tokens, mask, roles = stack_rendered(rendered, min(bucket(longest, 8), model.config.max_positions))
    count = len(tokens)
    lengths = np.asarray(ends if prompt_length is None else prompt_length, np.int32)
    if lengths.shape != (count,):
        raise UserError(f"prompt_length must have one number for each of {count} texts")
    arrays: dict[str, Any] = {"tokens": tokens, "mask": mask, "prompt_length": lengths}
    arrays |= {name: np.zeros((count, 1), np.int32) for name in ("read", "weight", "context")}
    rows = Rows(**arrays, roles=roles if all(row.turns for row in rendered) else None)
    rows = rows.reading([[-1]] * count if read is None else read)
    if answers is None:
        return rows
    if rows.read.shape[1] != 1:
        raise UserError("an answer is predicted at one token of its row: give no other readings beside answers")
    width = max(map(len, answers))
    ids, valid = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)], valid[row, : len(answer)] = answer, True
    return rows.replace(answer=ids, answer_mask=valid)  # type: ignore[attr-defined,no-any-return]


def check_lengths(rows: Rows, other: Rows) -> None:
    """Refuse rows that cannot be patched into each other token by token, with their lengths (``UserError``)."""
    if np.shape(rows.tokens)[0] != np.shape(other.tokens)[0]:
        raise UserError(f"{len(rows.tokens)} rows cannot be patched from {len(other.tokens)}: give one for each")
    for row, (own, theirs) in enumerate(zip(rows.lengths, other.lengths, strict=True)):
        if own != theirs:
            raise UserError(
                f"row {row} has {own} tokens and its source has {theirs}: values go from token to token, so write "
                f"texts of equally many tokens, or align them (circuits.sources.align, for exact patching)"
            )


# Metrics between two runs of the same tokens


def token_difference(base: Float[np.ndarray, "B q V"], source: Float[np.ndarray, "B q V"]) -> LogitDifference:
    """At every reading the logit of the token that ``source`` likes best minus that of ``base``'s (2604.08524).

    Logits are those of two runs (``reading_logits``). It is 0 where both like the same token.
    """
    plus, minus = (np.asarray(a).reshape(-1, np.shape(a)[-1]).argmax(-1).astype(np.int32) for a in (source, base))
    return LogitDifference(plus=jnp.asarray(plus), minus=jnp.asarray(minus))


def kl_difference(base: Float[np.ndarray, "B q V"], source: Float[np.ndarray, "B q V"]) -> Term:
    """At every reading KL(base || patched) - KL(source || patched), in nats: larger where it is like ``source``."""
    log = lambda a: jax.nn.log_softmax(jnp.asarray(a).reshape(-1, np.shape(a)[-1]))  # noqa: E731
    return MatchDistribution(log_probs=log(source)) - MatchDistribution(log_probs=log(base))


def reading_logits(model: Model, rows: Rows, edits: Intervention | None = None) -> Float[np.ndarray, "B q V"]:
    """Float32 logits of the next token at every reading."""
    found = run_logits(model, rows.tokens, rows.mask, edits=edits, prompt_length=rows.prompt_length, roles=rows.roles)
    return np.asarray(to_host(jnp.take_along_axis(found, jnp.asarray(rows.read)[:, :, None], axis=1)))


def where_tokens_differ(
    model: Model, rows: Rows, edits: Intervention | None, other: Intervention | None = None
) -> Rows:
    """The rows read where the greedy tokens of two runs differ, from the prompt's last token on.

    Rows in which they never do are left out. Raises ``UserError`` where none is left.
    """
    tokens = [
        np.asarray(to_host(run_logits(
            model, rows.tokens, rows.mask, edits=each, prompt_length=rows.prompt_length, roles=rows.roles
        ).argmax(-1)))
        for each in (edits, other)
    ]  # fmt: skip
    steps = np.arange(rows.tokens.shape[1])
    differ = (tokens[0] != tokens[1]) & (steps >= np.asarray(rows.prompt_length)[:, None] - 1)
    differ &= steps < rows.lengths[:, None]
    kept = np.flatnonzero(differ.any(-1))
    if not len(kept):
        raise UserError("both runs like the same tokens everywhere: there is nothing to explain. Steer more strongly")
    return rows.take(kept).reading([np.flatnonzero(differ[row]).tolist() for row in kept])


# Inside programs


def metric_of(metric: Objective, config: ModelConfig) -> tuple[Any, Needs]:
    """The metric as a pytree, and what it reads. Raises ``UserError`` as ``objectives.needs``."""
    metric = jax.tree.map(jnp.asarray, as_pytree(metric))
    return metric, needs(metric, config)


def layout_of(rows: Rows) -> Layout:
    """Where things stand in the rows, for an objective: all of a row is its "prompt"."""
    none = jnp.zeros_like(rows.mask)
    answer = None
    if rows.answer is not None and rows.answer_mask is not None:
        answer = Target(ids=rows.answer, mask=rows.answer_mask, start=rows.read)
    return Layout(
        read=jnp.asarray(rows.read),
        context=jnp.asarray(rows.context).reshape(-1),
        spans={"prompt": jnp.asarray(rows.mask), "tail": none},
        keys={"before": none, "prompt": jnp.asarray(rows.mask), "tail": none},
        target=answer,
    )


def scores(metric: Any, reads: Reads, rows: Rows) -> Float[Array, " B"]:
    """Every row's score. A reading of weight 0 counts for nothing, whatever it says."""
    found = metric(reads).reshape(rows.weight.shape)
    return jnp.where(rows.weight != 0, found * rows.weight, 0.0).sum(-1)


def opened_rows(params: Params, config: ModelConfig, rows: Rows, edits: Intervention | None) -> tuple[Context, Tap]:
    """The context of the rows, and the tap of the edits on them."""
    positions = positions_of(rows.mask)
    where = make_where(rows.tokens, positions, rows.mask, rows.prompt_length, rows.roles)
    edits, context = ready_for(params, config, edits, where, make_context(config, positions, rows.mask))
    return context, tap_of(edits, where)


def on_devices(model: Model, rows: Rows) -> Rows:
    """The rows spread over the model's mesh."""
    return jax.tree.map(partial(shard_rows, model.mesh), rows)


def check_answer(found: Needs, rows: Rows) -> None:
    """Refuse a metric that asks for answers of rows that have none (``UserError``)."""
    if found.target and rows.answer is None:
        raise UserError("the metric reads the log-probability of an answer: give answers to make_rows")


def listed(values: Any) -> tuple[int, ...]:
    """One number or several, as a tuple."""
    return tuple(int(value) for value in as_tuple(values))
