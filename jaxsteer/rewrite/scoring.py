"""Answers scored under changes of the model: log-probabilities, what it would say, drift on neutral text, fluency.

Letters: B rows, T time, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import forward, run_layers
from jaxsteer.models.log_probs import VOCABULARY_BLOCK, not_finite
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import shard_rows
from jaxsteer.models.taps import Intervention, make_where, tap_of
from jaxsteer.models.transformer import embed, make_context, unembed
from jaxsteer.processes import to_host
from jaxsteer.prompts import encode_texts
from jaxsteer.rewrite.rows import Row, row_arrays

BATCH = 32
"""Rows at a time."""
Edits = Callable[[Int[np.ndarray, " B"]], Intervention | None]
"""The change of rows, given the number of the fact that each is about."""


def score_answers(
    model: Model, rows: Sequence[Row], facts: Sequence[int], edits: Edits
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Mean log-probability per token of each row's answer (nats), and whether every token of it is the likeliest.

    ``facts`` are the numbers of the facts that rows are about. Raises ``UserError`` where logits are not finite.
    """
    found, said = np.zeros(len(rows)), np.zeros(len(rows), bool)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        some = [rows[i] for i in chosen + chosen[-1:] * (BATCH - len(chosen))]
        about = np.asarray([facts[i] for i in chosen + chosen[-1:] * (BATCH - len(chosen))])
        width = min(bucket(len(some[-1].ids)), model.config.max_positions)
        tokens, _ = pad_rows([row.ids for row in some], width)
        arrays = (shard_rows(model.mesh, array) for array in (tokens, *row_arrays(some)))
        scores = to_host(_scores(model.params, model.config, *arrays, edits(about)))
        found[chosen], said[chosen] = (part[: len(chosen)] for part in scores)
    if not np.isfinite(found).all():
        raise UserError(not_finite())
    return found, said


@partial(jax.jit, static_argnames="config")
def _scores(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    reads: Int[Array, "B A"],
    labels: Int[Array, "B A"],
    weights: Float[Array, "B A"],
    edits: Intervention | None,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    positions = jnp.arange(tokens.shape[1])[None]
    tap = tap_of(edits, make_where(tokens, positions, None))
    x = embed(params, config, tokens, positions, tap)
    x = run_layers(params, config, x, make_context(config, positions), 0, config.n_layers, tap=tap)
    hidden = jnp.take_along_axis(x, reads[:, :, None], axis=1)

    def one(row: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = unembed(params, config, row[0])
        taken = jnp.take_along_axis(logits, row[1][:, None], axis=1)[:, 0]
        return taken - jax.nn.logsumexp(logits, -1), taken >= logits.max(-1)

    at_once = max(1, VOCABULARY_BLOCK // (config.vocab_size * labels.shape[1]))
    log_probs, best = lax.map(one, (hidden, labels), batch_size=min(at_once, len(tokens)))
    return jnp.sum(log_probs * weights, -1), jnp.all(best | (weights == 0), -1)


def drift(model: Model, texts: Sequence[str], facts: Sequence[int], edits: Edits) -> Float[np.ndarray, " n"]:
    """KL(model as it is || changed) of the next token on each text, mean over its tokens, nats."""
    ids = encode_texts(model.tokenizer, list(texts))
    width = min(bucket(max(len(row) for row in ids)), model.config.max_positions)
    rows = max(1, min(BATCH, (1 << 25) // (width * model.config.vocab_size)))
    found = np.zeros(len(texts))
    for start in range(0, len(ids), rows):
        chosen = list(range(start, min(start + rows, len(ids))))
        padded = chosen + chosen[-1:] * (rows - len(chosen))
        arrays = (shard_rows(model.mesh, array) for array in pad_rows([ids[i][:width] for i in padded], width))
        change = edits(np.asarray([facts[i] for i in padded]))
        found[chosen] = to_host(_drift(model.params, model.config, *arrays, change))[: len(chosen)]
    return found


@partial(jax.jit, static_argnames="config")
def _drift(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], edits: Intervention | None
) -> Float[Array, " B"]:
    base = jax.nn.log_softmax(forward(params, config, tokens, mask))
    new = jax.nn.log_softmax(forward(params, config, tokens, mask, edits))
    kl = jnp.sum(jnp.exp(base) * (base - new), -1)
    return jnp.sum(kl * mask, -1) / mask.sum(-1)


def ngram_entropy(text: str) -> float:
    """Fluency as CounterFact measures it: entropies (bits) of the word pairs and triples of a text, (2/3 H2 + 4/3 H3)
    / 2. A text that repeats itself has a low one."""
    words = re.findall(r"\w+|[^\w\s]", text)
    parts = []
    for size in (2, 3):
        counts = np.asarray([*Counter(zip(*(words[i:] for i in range(size)), strict=False)).values()], np.float64)
        share = counts / counts.sum() if len(counts) else np.ones(1)
        parts.append(-float(np.sum(share * np.log2(share))))
    return (2 / 3 * parts[0] + 4 / 3 * parts[1]) / 2
