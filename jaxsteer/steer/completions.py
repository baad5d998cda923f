"""Completions of texts in token space, and their log-probabilities under an edit: what vectors are learned from.

Letters: n examples, k kinds of completion, b examples of a batch, T tokens, R tokens of a completion, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import run_layers
from jaxsteer.models.log_probs import label_log_probs
from jaxsteer.models.model import Model
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.taps import make_where, tap_of
from jaxsteer.models.transformer import embed, make_context, positions_of
from jaxsteer.processes import to_host
from jaxsteer.steer.edits import Edit

TOKENS, MOST_TOKENS = {"cpu": 2**11}, 2**15
"""Tokens of one pass: by kind of device, and elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A text in token space, and what should follow when the vector is added (``sign`` 1) or subtracted (-1)."""

    context: Int[np.ndarray, " _"]
    """One BOS included where the model has one."""
    wanted: Int[np.ndarray, " _"]
    unwanted: Int[np.ndarray, " _"] | None = None
    """What should not follow; ``po`` needs it."""
    sign: int = 1

    def completions(self, both: bool) -> tuple[np.ndarray, ...]:
        """What is wanted, and what is not where ``both`` are asked for."""
        return (self.wanted, self.unwanted) if both and self.unwanted is not None else (self.wanted,)


@struct.dataclass
class Completions:
    """Completions of n examples, padded on the right: those wanted, then those not (po)."""

    tokens: Int[Array, "k n T"]
    mask: Bool[Array, "k n T"]
    at: Int[Array, "k n R"]
    """Where each token of a completion is predicted."""
    target: Int[Array, "k n R"]
    """-1 behind its end."""
    reference: Float[Array, "k n"]
    """Their log-probabilities without steering."""
    prompt_length: Int[Array, " n"]
    sign: Float[Array, " n"]


def check_examples(examples: Sequence[Example], both: bool, positions: int, longest: int) -> None:
    """Raise ``UserError`` for examples that nothing can be learned from, or that are longer than ``positions`` when
    completions are cut to the ``longest``. ``both``: there must be unwanted completions.
    """
    if not examples:
        raise UserError("no examples were given: a vector is learned from texts and what should follow them")
    for number, example in enumerate(examples):
        parts = [a for a in (example.context, example.wanted, example.unwanted) if a is not None]
        if not all(np.ndim(a) == 1 and np.asarray(a).dtype.kind in "iu" for a in parts):
            raise UserError(
                f"example {number} must hold lists of token ids, one axis of integers each, got "
                f"{', '.join(f'{np.asarray(a).dtype} {list(np.shape(a))}' for a in parts)}"
            )
        if example.sign not in (1, -1) or not len(example.context) or not len(example.wanted):
            raise UserError(
                f"example {number} has {len(example.context)} tokens of context, {len(example.wanted)} of what is "
                f"wanted, and sign {example.sign}: expected at least one of each, and 1 or -1"
            )
        if both and (example.unwanted is None or not len(example.unwanted)):
            raise UserError(
                f"example {number} has no unwanted completion: po learns from what is wanted beside what is not. Give "
                f"one, or learn by ntp"
            )
        if example.unwanted is not None and np.array_equal(example.unwanted, example.wanted):
            raise UserError(f"example {number} wants and does not want the same completion: there is nothing to learn")
    size = max(len(e.context) + min(len(c), longest) for e in examples for c in e.completions(both))
    if size > positions:
        raise UserError(
            f"the longest example has {size} tokens, but the model has {positions} positions: shorten the contexts, "
            f"or the completions (Learning.tokens)"
        )


def completions_of(model: Model, examples: Sequence[Example], both: bool, longest: int) -> Completions:
    """Padded completions of at most ``longest`` tokens; with their log-probabilities unsteered where ``both`` kinds are
    asked for."""
    cut = [[c[:longest] for c in kind] for kind in zip(*(e.completions(both) for e in examples), strict=True)]
    whole = [[np.concatenate([e.context, c]) for e, c in zip(examples, kind, strict=True)] for kind in cut]
    width = min(bucket(max(len(row) for rows in whole for row in rows), 8), model.config.max_positions)
    most = max(len(c) for kind in cut for c in kind)
    at, target = (
        np.zeros((len(cut), len(examples), most), np.int32),
        np.full((len(cut), len(examples), most), -1, np.int32),
    )
    for k, kind in enumerate(cut):
        for i, (example, completion) in enumerate(zip(examples, kind, strict=True)):
            at[k, i, : len(completion)] = len(example.context) - 1 + np.arange(len(completion))
            target[k, i, : len(completion)] = completion
    rows = [pad_rows(each, width) for each in whole]
    data = Completions(
        tokens=jnp.asarray(np.stack([tokens for tokens, _ in rows])),
        mask=jnp.asarray(np.stack([mask for _, mask in rows])),
        at=jnp.asarray(at),
        target=jnp.asarray(target),
        reference=jnp.zeros(at.shape[:2]),
        prompt_length=jnp.asarray([len(e.context) for e in examples], jnp.int32),
        sign=jnp.asarray([e.sign for e in examples], jnp.float32),
    )
    if not both:
        return data
    batch = max(1, room() // (2 * width))
    starts = [jnp.arange(i, i + batch) % len(examples) for i in range(0, len(examples), batch)]
    found = [to_host(_reference(model.params, model.config, take(data, chosen))) for chosen in starts]
    return dataclasses.replace(data, reference=jnp.asarray(np.concatenate(found, axis=1)[:, : len(examples)]))


def take(data: Completions, chosen: Int[Array, " b"]) -> Completions:
    """The examples of these numbers."""
    return jax.tree.map(lambda a: a[chosen] if a.ndim == 1 else a[:, chosen], data)


def digest(data: Completions) -> str:
    """Of all that is learned from."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(data))).hexdigest()[:16]


def room() -> int:
    """Tokens of one pass."""
    return TOKENS.get(jax.default_backend(), MOST_TOKENS)


def completion_log_probs(
    params: Params, data: Completions, edit: Edit | None, *, config: ModelConfig, start: int
) -> Float[Array, "k b"]:
    """Summed log-probabilities of completions. Nothing is changed before block ``start``."""
    k, b, t = data.tokens.shape
    tokens, mask = data.tokens.reshape(k * b, t), data.mask.reshape(k * b, t)
    positions = positions_of(mask)
    context = make_context(config, positions, mask)
    tap = tap_of(edit, make_where(tokens, positions, mask, jnp.tile(data.prompt_length, k)))
    x = run_layers(params, config, embed(params, config, tokens, positions), context, 0, start)
    x = run_layers(params, config, x, context, start, config.n_layers, tap=tap)
    at, target = (a.reshape(k * b, -1) for a in (data.at, data.target))
    x = jnp.take_along_axis(x, at[:, :, None], axis=1)
    found = label_log_probs(params, config, x.reshape(-1, x.shape[-1]), jnp.maximum(target, 0).reshape(-1))
    return (found.reshape(target.shape) * (target >= 0)).sum(-1).reshape(k, b)


@functools.partial(jax.jit, static_argnames="config")
def _reference(params: Params, config: ModelConfig, data: Completions) -> Float[Array, "k b"]:
    return completion_log_probs(params, data, None, config=config, start=config.n_layers)
