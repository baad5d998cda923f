"""What edits do to text that has nothing to do with the persona: divergence from the unedited model, and perplexity.

Letters: E edits, B rows, T time, V vocabulary.
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
from jaxsteer.evals.scoring import bucket, stack_edits
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import Intervention
from jaxsteer.models.transformer import forward

if TYPE_CHECKING:
    from jaxsteer.models.loading import Model

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


def side_effects(model: Model, texts: Sequence[np.ndarray], edits: Sequence[Intervention]) -> SideEffects:
    """Run neutral texts (lists of token ids) through the model as it is and under every one of ``edits``.

    The edits run in one program and differ in their arrays only. All of a text counts as prompt. KL is over every
    token's next-token distribution, perplexity over every token but the first. Raises ``UserError`` for a text of
    fewer than two tokens or longer than the model's positions.
    """
    config = model.config
    lengths = [len(text) for text in texts]
    if not texts or min(lengths) < 2 or max(lengths) > config.max_positions:
        raise UserError(
            f"Neutral texts must have 2 to {config.max_positions} tokens; these {len(texts)} have "
            f"{min(lengths, default=0)} to {max(lengths, default=0)}."
        )
    width = min(bucket(max(lengths)), config.max_positions)
    shards = 1 if model.mesh is None else model.mesh.shape["prompts"]
    rows = max(1, min(LOGITS // (width * config.vocab_size), -(-len(texts) // shards))) * shards
    stacked = stack_edits(edits, config)
    order = sorted(range(len(texts)), key=lambda i: lengths[i])
    totals = np.zeros((3, len(edits)))
    counts = np.zeros(2, int)
    for begin in range(0, len(order), rows):
        tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for row, i in enumerate(order[begin : begin + rows]):
            tokens[row, : lengths[i]], mask[row, : lengths[i]] = texts[i], True
        found = _compare(model.params, config, *(shard_rows(model.mesh, a) for a in (tokens, mask)), stacked)
        totals += np.asarray(found, np.float64)
        counts += (int(mask.sum()), int(mask[:, 1:].sum()))
    kl, edited, plain = totals[0] / counts[0], totals[1] / counts[1], totals[2][0] / counts[1]
    return SideEffects(
        kl=kl, perplexity=np.exp(edited), baseline_perplexity=float(np.exp(plain)), tokens=int(counts[0])
    )


@functools.partial(jax.jit, static_argnames="config")
def _compare(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], edits: Intervention
) -> Float[Array, "3 E"]:
    """Sums over tokens of KL, of the edited and of the unedited negative log-probability."""

    def nll(log_probs: Float[Array, "B T V"]) -> Float[Array, ""]:
        taken = jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(taken * mask[:, 1:])

    base = jax.nn.log_softmax(forward(params, config, tokens, mask))

    def one(edit: Intervention) -> Float[Array, " 3"]:
        log_probs = jax.nn.log_softmax(forward(params, config, tokens, mask, edit))
        kl = jnp.sum(jnp.exp(base) * (base - log_probs), axis=-1)
        return jnp.stack([jnp.sum(kl * mask), nll(log_probs), nll(base)])

    return lax.map(one, edits).T
