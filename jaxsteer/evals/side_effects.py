"""What prompts and edits do to text that has nothing to do with the persona: divergence from the model, perplexity.

Letters: E edits, B rows, T time, R tokens of a reply, P prompts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.evals.scoring import stack_edits
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import forward
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import Intervention
from jaxsteer.prompts import Placement, encode_texts, question_conversation, render
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import as_tuple

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

LOGITS = 2**26
"""Logits of one pass held at once, in floats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideEffects:
    """Per edit, and for the model as it is, what happens to neutral text."""

    kl: Float[np.ndarray, " E"]
    """Mean over tokens of KL(unedited || edited) of the next-token distribution, nats."""
    perplexity: Float[np.ndarray, " E"]
    """exp of the mean negative log-probability per token under the edited model."""
    baseline_perplexity: float
    tokens: int
    """Tokens that the means are over."""


def side_effects(
    model: Model,
    texts: Sequence[np.ndarray],
    variants: Sequence[Intervention],
    *,
    counted: Sequence[Bool[np.ndarray, " _"]] | None = None,
) -> SideEffects:
    """Run neutral texts (lists of token ids) through the model as it is and under every edit of ``variants``.

    The edits run in one program and differ in their arrays only. All of a text counts as prompt. KL is over every
    token's next-token distribution, perplexity over every token but the first; of ``counted`` tokens only (a mask for
    each text), both are over these as they are predicted. Raises ``UserError`` for a text of fewer than two tokens or
    longer than the model's positions.
    """
    config = model.config
    lengths = [len(text) for text in texts]
    if not texts or min(lengths) < 2 or max(lengths) > config.max_positions:
        raise UserError(
            f"Neutral texts must have 2 to {config.max_positions} tokens; these {len(texts)} have "
            f"{min(lengths, default=0)} to {max(lengths, default=0)}."
        )
    width = min(bucket(max(lengths), 8), config.max_positions)
    shards = 1 if model.mesh is None else model.mesh.shape["prompts"]
    rows = max(1, min(LOGITS // (width * config.vocab_size), -(-len(texts) // shards))) * shards
    stacked = stack_edits(variants, config)
    order = sorted(range(len(texts)), key=lambda i: lengths[i])
    totals = np.zeros((3, len(variants)))
    counts = np.zeros(2, int)
    for begin in range(0, len(order), rows):
        chosen = [texts[i] for i in order[begin : begin + rows]]
        tokens, mask = pad_rows(chosen + [texts[0][:0]] * (rows - len(chosen)), width)
        predicts, targets = mask, mask[:, 1:]
        if counted is not None:
            targets = np.zeros_like(mask)
            for row, i in enumerate(order[begin : begin + rows]):
                targets[row, : lengths[i]] = counted[i]
            targets = targets[:, 1:]
            predicts = np.pad(targets, [(0, 0), (0, 1)])
        arrays = (shard_rows(model.mesh, a) for a in (tokens, mask, predicts, targets))
        found = _compare(model.params, config, *arrays, stacked)
        totals += np.asarray(found, np.float64)
        counts += (int(predicts.sum()), int(targets.sum()))
    kl, edited, plain = totals[0] / counts[0], totals[1] / counts[1], totals[2][0] / counts[1]
    return SideEffects(
        kl=kl, perplexity=np.exp(edited), baseline_perplexity=float(np.exp(plain)), tokens=int(counts[0])
    )


@functools.partial(jax.jit, static_argnames="config")
def _compare(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    predicts: Bool[Array, "B T"],
    targets: Bool[Array, "B T-1"],
    edits: Intervention,
) -> Float[Array, "3 E"]:
    """Sums of KL where ``predicts``, and of the edited and the unedited negative log-probability of ``targets``."""

    def nll(log_probs: Float[Array, "B T V"]) -> Float[Array, ""]:
        taken = jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(taken * targets)

    base = jax.nn.log_softmax(forward(params, config, tokens, mask))

    def one(edit: Intervention) -> Float[Array, " 3"]:
        log_probs = jax.nn.log_softmax(forward(params, config, tokens, mask, edit))
        kl = jnp.sum(jnp.exp(base) * (base - log_probs), axis=-1)
        return jnp.stack([jnp.sum(kl * predicts), nll(log_probs), nll(base)])

    return lax.map(one, edits).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyEffects:
    """Per prompt, what happens to the model's own replies to neutral requests."""

    kl: Float[np.ndarray, " P"]
    """Mean over tokens of KL(model as it is || with prompt and edit) of the next-token distribution, nats."""
    perplexity: Float[np.ndarray, " P"]
    """exp of the mean negative log-probability per token of the replies."""
    baseline_perplexity: float
    tokens: int
    """Tokens of the replies: the same for every prompt."""


def reply_effects(
    model: Model,
    texts: str | Sequence[str],
    prompts: str | Sequence[str],
    *,
    placement: Placement = Placement(),
    edits: Intervention | None = None,
    max_new_tokens: int = 32,
) -> ReplyEffects:
    """How much prompts (and an edit) change what the model would say to requests that are no business of theirs.

    The model as it is replies greedily to every request without a prompt. Its reply, token by token, is then scored
    with each prompt in its place and under ``edits``, so that every comparison is over the same tokens. Raises
    ``UserError`` where the model replies nothing at all.
    """
    texts, prompts = as_tuple(texts), as_tuple(prompts)
    contexts = [
        encode_texts(
            model.tokenizer,
            [render(model.tokenizer, question_conversation(t, placement), p) for t in texts],
            style=placement.style,
        )
        for p in ("", *prompts)
    ]
    made = generate(model, contexts[0], temperature=0, max_new_tokens=max_new_tokens)
    replies = [made.tokens[i, :length] for i, length in enumerate(made.lengths)]
    total = sum(map(len, replies))
    if not total:
        raise UserError(f"{model.name} replies nothing to these {len(texts)} neutral requests: give others")
    config, longest = model.config, max(len(c) + max_new_tokens for group in contexts for c in group)
    width = min(bucket(longest, 8), config.max_positions)
    shards = 1 if model.mesh is None else model.mesh.shape["prompts"]
    rows = max(1, min(LOGITS // (width * config.vocab_size), -(-len(texts) // shards))) * shards
    sums = np.zeros((len(prompts), 3))
    for p, prompted in enumerate(contexts[1:]):
        for begin in range(0, len(texts), rows):
            chosen = range(begin, min(begin + rows, len(texts)))
            both = [
                _reply_rows([group[i] for i in chosen], [replies[i] for i in chosen], rows, width, max_new_tokens)
                for group in (contexts[0], prompted)
            ]
            arrays = [[shard_rows(model.mesh, a) for a in arrays] for arrays in both]
            sums[p] += np.asarray(_compare_replies(model.params, config, arrays[0], arrays[1], edits), np.float64)
    return ReplyEffects(
        kl=sums[:, 0] / total,
        perplexity=np.exp(sums[:, 1] / total),
        baseline_perplexity=float(np.exp(sums[0, 2] / total)) if len(prompts) else float("nan"),
        tokens=total,
    )


def _reply_rows(
    contexts: Sequence[np.ndarray], replies: Sequence[np.ndarray], rows: int, width: int, most: int
) -> list[np.ndarray]:
    """Padded tokens and mask, per reply token the position that predicts it and itself, and the contexts' lengths."""
    whole = [np.concatenate(pair) for pair in zip(contexts, replies, strict=True)]
    tokens, mask = pad_rows(whole + [whole[0][:0]] * (rows - len(whole)), width)
    at, target = np.zeros((rows, most), np.int32), np.full((rows, most), -1, np.int32)
    lengths = np.ones(rows, np.int32)
    mask[:, 0] = True  # rows that fill up the batch
    for row, (context, reply) in enumerate(zip(contexts, replies, strict=True)):
        n, m = len(context), len(reply)
        at[row, :m], target[row, :m], lengths[row] = n - 1 + np.arange(m), reply, n
    return [tokens, mask, at, target, lengths]


@functools.partial(jax.jit, static_argnames="config")
def _compare_replies(
    params: Params, config: ModelConfig, plain: list[Array], prompted: list[Array], edits: Intervention | None
) -> Float[Array, " 3"]:
    """Sums over reply tokens of KL, of the prompted and of the plain negative log-probability."""

    def reply_log_probs(arrays: list[Array], edits: Intervention | None) -> Float[Array, "B R V"]:
        tokens, mask, at, _, lengths = arrays
        logits = forward(params, config, tokens, mask, edits, lengths)
        return jax.nn.log_softmax(jnp.take_along_axis(logits, at[:, :, None], axis=1))

    target = plain[3]
    valid = target >= 0
    base, changed = reply_log_probs(plain, None), reply_log_probs(prompted, edits)
    kl = jnp.sum(jnp.sum(jnp.exp(base) * (base - changed), axis=-1) * valid)

    def nll(log_probs: Float[Array, "B R V"]) -> Float[Array, ""]:
        taken = jnp.take_along_axis(log_probs, jnp.maximum(target, 0)[:, :, None], axis=-1)[..., 0]
        return -jnp.sum(taken * valid)

    return jnp.stack([kl, nll(changed), nll(base)])
