"""Choosing the next token: temperature, top-k, top-p, and random numbers that belong to a row and not to a batch.

Letters: B rows, V vocabulary, S stop tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.ranges import MOST, CountFrom0, Range, Seed, Weight, check_ranges

STOPS = 8
"""Stop tokens come in such numbers, so that no program is made for every number of them."""
_BLOCK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a text goes on and where it ends. Raises ``UserError`` for values that mean nothing."""

    max_new_tokens: Annotated[int, Range(1, MOST)] = 256
    """Longest answer in tokens."""
    temperature: Weight = 1.0
    """0: always the likeliest token."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Only the likeliest tokens that together reach this probability."""
    top_k: CountFrom0 = 0
    """Only the k likeliest tokens (0: all)."""
    stop: Sequence[str | int] = ()
    """Texts that end an answer, or from Python ids of tokens, beside the model's own stop tokens."""
    seed: Seed = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Check the values; ``stop`` may be any sequence."""
        check_ranges(self)
        if isinstance(self.stop, str):
            raise UserError(
                f"stop must be a list of texts or ids, got the single string {self.stop!r}. Write [{self.stop!r}]."
            )
        if "" in self.stop:
            raise UserError("An empty stop string would end every text at once.")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Those of ``stop`` that are texts."""
        return tuple(stop for stop in self.stop if isinstance(stop, str))


DEFAULTS = Decoding()


@struct.dataclass
class Sampling:
    """How the next token is chosen: settings of one call, or of every row (``of_rows``), then with a leading axis.

    Data, all but ``vocab``: no value leads to another program.
    """

    key: Array
    """Folded with (row, number of the token), so that a row's tokens do not depend on what is decoded beside it."""
    temperature: Float[Array, "*B"]
    """0: the likeliest token (the first of equal ones). Otherwise logits are divided by it."""
    top_k: Int[Array, "*B"]
    """Only the k likeliest tokens (and those equal to the last of them); 0: all."""
    top_p: Float[Array, "*B"]
    """Only the likeliest tokens that together reach this probability, after ``top_k``; 1: all."""
    stop: Int[Array, "*B S"]
    """Ids that end a row (filled up with -1)."""
    vocab: int = struct.field(pytree_node=False)
    """Tokens of the tokenizer; rows of the embedding table at and after it are padding and are never chosen."""


def stop_ids(model: Model, decoding: Decoding) -> set[int]:
    """Ids that end a row: those of ``decoding``, the checkpoint's generation config and the tokenizer's EOS."""
    ids = {int(stop) for stop in decoding.stop if not isinstance(stop, str)} | set(model.stop_tokens)
    if model.tokenizer is not None and model.tokenizer.eos_token_id is not None:
        ids.add(model.tokenizer.eos_token_id)
    return ids


def make_sampling(model: Model, decoding: Decoding) -> Sampling:
    """The settings as a pytree."""
    known = model.config.vocab_size if model.tokenizer is None else len(model.tokenizer)
    stop = sorted(stop_ids(model, decoding))
    return dataclasses.replace(
        plain_sampling(min(known, model.config.vocab_size)),
        key=jax.random.key(decoding.seed),
        temperature=jnp.float32(decoding.temperature),
        top_k=jnp.int32(decoding.top_k),
        top_p=jnp.float32(max(decoding.top_p, jnp.finfo(jnp.float32).tiny)),  # smaller ones are 0, and keep no token
        stop=jnp.asarray([*stop, *[-1] * (-len(stop) % STOPS or (0 if stop else STOPS))], jnp.int32),
    )


def plain_sampling(vocab: int) -> Sampling:
    """Every token as likely as the model has it, without stop tokens."""
    return Sampling(
        key=jax.random.key(0),
        temperature=jnp.float32(1),
        top_k=jnp.int32(0),
        top_p=jnp.float32(1),
        stop=jnp.full(STOPS, -1, jnp.int32),
        vocab=vocab,
    )


def of_rows(sampling: Sampling, rows: Int[Array, " B"]) -> Sampling:
    """The settings of one call for each of its rows, by the numbers of these in the call."""
    keys = jax.vmap(partial(jax.random.fold_in, sampling.key))(rows)
    spread = lambda a: jnp.broadcast_to(a, (len(rows), *a.shape))  # noqa: E731
    return dataclasses.replace(jax.tree.map(spread, sampling), key=keys)


def choose(logits: Float[Array, "B V"], sampling: Sampling, step: Int[Array, " B"]) -> Int[Array, " B"]:
    """The next token of every row; ``sampling`` is that of the rows, ``step`` counts their tokens so far."""
    if sampling.vocab < logits.shape[1]:
        logits = jnp.where(jnp.arange(logits.shape[1]) < sampling.vocab, logits, -jnp.inf)
    drawn = sampling.temperature > 0
    limited = (sampling.top_k > 0) | (sampling.top_p < 1)

    def draw(logits: Array) -> Array:
        scaled = logits / jnp.where(drawn, sampling.temperature, 1)[:, None]
        restrict = lambda x: jnp.where(limited[:, None], _restrict(x, sampling), x)  # noqa: E731
        scaled = lax.cond(limited.any(), restrict, lambda x: x, scaled)
        keys = jax.vmap(jax.random.fold_in)(sampling.key, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        return _likeliest(jnp.where(drawn[:, None], scaled + noise, logits))

    return lax.cond(drawn.any(), draw, _likeliest, logits).astype(jnp.int32)


def _likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest values of each row: argmax, in two steps, of which XLA's CPU backend vectorises one."""
    rows, vocab = logits.shape
    blocks = jnp.pad(logits, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
    best = jnp.argmax(blocks.max(-1), axis=-1)
    inside = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
    return best * _BLOCK + jnp.argmax(inside, axis=-1)


def _restrict(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits with -inf wherever top-k and then top-p exclude a token."""
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, logits.shape[1]), logits.shape[1])
    logits = _keep_largest(logits, lambda kept: kept.sum(-1) >= k)
    p = jax.nn.softmax(logits, axis=-1)
    return _keep_largest(logits, lambda kept: jnp.where(kept, p, 0).sum(-1) >= sampling.top_p)


def _keep_largest(
    logits: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, " B"]]
) -> Float[Array, "B V"]:
    """-inf at all but the largest values of each row, as few as are ``enough`` (all where nothing is).

    Bisection over the bits of the threshold: exact after 32 passes, and far cheaper than sorting a vocabulary on CPU.
    """
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # integers in the order of the floats

    def halve(_: Array | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which (low + high) / 2 would overflow
        holds = enough(order >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    ends = jnp.iinfo(jnp.int32)
    low = jnp.full(len(logits), ends.min, jnp.int32)
    low, _ = lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, ends.max)))
    return jnp.where(order >= low[:, None], logits, -jnp.inf)
